"""A language model of the GPT-NeoX kind with codebooks inside: what passes there is a few code ids a token.

Tamkin, Taufeeque and Goodman, "Codebook Features: Sparse and Discrete Interpretability for Neural Networks" (2023).
The codebooks themselves are in `penstock.nn.codebook`; here is where they stand in a block.

Shape legend: B batch, L length, D width, H heads, K head width, F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from penstock.nn.causal_lm import Cache, CausalLM, Span, causal_attention
from penstock.nn.codebook import CodebookKey, CodebookType, Similarity, make_codebook
from penstock.nn.decoder import initialise_normal, rotary_tables, rotate

Place = Literal["attn_preproj", "mlp", "mlp_mid", "attn", "qkv", "attn_plus_mlp", "transformer_block"]


class Codebooks(nn.ModuleDict):
    """The codebooks of a part of a block, by place; a place without one passes its input unchanged."""

    def at(self, place: Place, x_BLD: Tensor) -> Tensor:
        """``x_BLD`` through the codebook at ``place``, if there is one."""
        return self[place](x_BLD) if place in self else x_BLD


class Attention(nn.Module):
    """Causal multi-head attention with partial rotary positions and biases (GPT-NeoX): (B, L, D) -> (B, L, D).

    The rows of ``query_key_value`` are ordered head by head: a head's queries, keys, values.

    Args:
        hidden_size: width D.
        num_heads: H, a divisor of D.
        rotary_fraction: share of each head's channels that rotate.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: if H does not divide D, or the rotating channels are odd in number.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, rotary_fraction: float, rope_theta: float) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}")
        self.num_heads, self.rope_theta = num_heads, rope_theta
        self.rotary_dim = int(rotary_fraction * (hidden_size // num_heads))
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary positions need an even number of channels: {rotary_fraction} x {hidden_size // num_heads} "
                f"is {self.rotary_dim}"
            )
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.codebooks = Codebooks()

    def forward(self, x_BLD: Tensor, span: Span, number: int) -> Tensor:
        qkv = self.codebooks.at("qkv", self.query_key_value(x_BLD)).unflatten(-1, (self.num_heads, -1))
        q, k, v = qkv.transpose(1, 2).chunk(3, -1)
        cos, sin = rotary_tables(span.positions, self.rotary_dim, self.rope_theta, x_BLD.dtype)
        y_BHLK = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, span, number)
        return self.dense(self.codebooks.at("attn_preproj", y_BHLK.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear maps with a GELU between: (B, L, D) -> (B, L, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size)
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size)
        self.act = nn.GELU()
        self.codebooks = Codebooks()

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.codebooks.at("mlp_mid", self.act(self.dense_h_to_4h(x_BLD))))


class CodebookBlock(nn.Module):
    """A pre-norm block whose codebooks stand on what is added to the residual stream, or on the stream itself.

    Args:
        attention, mlp: its two halves.
        hidden_size: width D.
        parallel_residual: both halves read the block's input (GPT-NeoX); else the MLP reads the attention's result.
        eps: of the norms.
    """

    def __init__(
        self, attention: Attention, mlp: MLP, hidden_size: int, *, parallel_residual: bool = True, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.parallel_residual = parallel_residual
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=eps)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=eps)
        self.attention, self.mlp = attention, mlp
        self.codebooks = Codebooks()

    def forward(self, x_BLD: Tensor, span: Span, number: int) -> Tensor:
        attended = self.codebooks.at("attn", self.attention(self.input_layernorm(x_BLD), span, number))
        read_BLD = x_BLD if self.parallel_residual else x_BLD + attended
        moved = attended + self.codebooks.at("mlp", self.mlp(self.post_attention_layernorm(read_BLD)))
        return self.codebooks.at("transformer_block", x_BLD + self.codebooks.at("attn_plus_mlp", moved))

    def home(self, place: Place) -> tuple[Codebooks, int]:
        """Where a codebook at ``place`` belongs, and the width of what it is given."""
        width, inner = self.attention.dense.in_features, self.mlp.dense_4h_to_h.in_features
        if place in ("qkv", "attn_preproj"):
            return self.attention.codebooks, 3 * width if place == "qkv" else width
        return (self.mlp.codebooks, inner) if place == "mlp_mid" else (self.codebooks, width)


class CodebookLM(CausalLM):
    """Decoder-only language model with codebooks: tokens (B, L) -> logits (B, L, V).

    Settings of codebooks that may differ by place are one value for all, or one for each of ``codebook_at``.

    Args:
        vocab_size: V.
        hidden_size, num_layers, num_heads, intermediate_size: D, the number of blocks, H, F.
        codebook_at: the places: the concatenated heads before their projection ("attn_preproj"), the projected
            attention output ("attn"), the queries, keys and values ("qkv"), the MLP's hidden layer ("mlp_mid") or
            output ("mlp"), the sum of both outputs ("attn_plus_mlp"), the residual stream after the block
            ("transformer_block"). None: the network without codebooks.
        codebook_type: "vanilla", one codebook, or "group", side by side ("qkv" is always a group).
        num_codes: of each codebook.
        num_codebooks: of a group; -1: one a head. At "qkv" three times as many.
        top_k: codes chosen a token and codebook.
        codebook_layers: the blocks that have them, from the end if negative; or "all".
        similarity, loss, replace_after, replace_noise: see `CodebookLayer`.
        parallel_residual, eps: see `CodebookBlock`.
        rotary_fraction, rope_theta: see `Attention`.

    Raises:
        ValueError: for impossible sizes, an unknown place, or a list of settings that is not as long as ``codebook_at``.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        intermediate_size: int,
        codebook_at: Sequence[Place] = ("mlp",),
        codebook_type: CodebookType | Sequence[CodebookType] = "vanilla",
        num_codes: int | Sequence[int] = 100,
        num_codebooks: int | Sequence[int] = 1,
        top_k: int | Sequence[int] = 1,
        codebook_layers: Literal["all"] | Sequence[int] = "all",
        similarity: Similarity = "inner_product",
        loss: str = "aeloss",
        replace_after: int = 0,
        replace_noise: float = 0.0,
        parallel_residual: bool = True,
        rotary_fraction: float = 0.25,
        rope_theta: float = 10000.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.vocab_size, self.num_layers, self.num_heads = vocab_size, num_layers, num_heads
        self.embed_in = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            CodebookBlock(
                Attention(hidden_size, num_heads, rotary_fraction=rotary_fraction, rope_theta=rope_theta),
                MLP(hidden_size, intermediate_size),
                hidden_size,
                parallel_residual=parallel_residual,
                eps=eps,
            )
            for _ in range(num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.embed_out = nn.Linear(hidden_size, vocab_size, bias=False)
        self.apply(initialise_normal)  # before there are codes: those start as standard normal
        places = len(codebook_at)
        for place, kind, codes, groups, k in zip(
            codebook_at,
            _each("codebook_type", codebook_type, places),
            _each("num_codes", num_codes, places),
            _each("num_codebooks", num_codebooks, places),
            _each("top_k", top_k, places),
            strict=True,
        ):
            if place not in get_args(Place):
                raise ValueError(
                    f"codebook_at: there is no place {place!r}; it must be one of {', '.join(get_args(Place))}"
                )
            groups = num_heads if groups == -1 else groups
            for number in _numbers(codebook_layers, num_layers):
                home, width = self.blocks[number].home(place)
                home[place] = make_codebook(
                    width,
                    codes,
                    codebook_type="group" if place == "qkv" else kind,
                    num_codebooks=3 * groups if place == "qkv" else groups,
                    top_k=k,
                    similarity=similarity,
                    loss=loss,
                    replace_after=replace_after,
                    replace_noise=replace_noise,
                    key=CodebookKey(number, place),
                )

    @property
    def blocks(self) -> list[CodebookBlock]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, CodebookBlock)]

    def forward(self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None) -> Tensor:
        span = self.span(tokens_BL, cache, mask_BL)
        x_BLD = self.run_layers(self.layers, self.embed_in(tokens_BL), span)
        return self.embed_out(self.final_layer_norm(x_BLD))

    def no_weight_decay(self) -> set[str]:
        codes = {name for name, _ in self.named_parameters() if name.endswith("codebook.weight")}
        return codes | {"embed_in.weight"}


def _each(name: str, setting: Any, places: int) -> Sequence[Any]:
    """One value a place, from one for all or one for each."""
    if isinstance(setting, str | int):
        return [setting] * places
    if len(setting) != places:
        raise ValueError(f"{name}={list(setting)}: codebook_at has {places} places; give one value, or one for each")
    return list(setting)


def _numbers(layers: Literal["all"] | Sequence[int], num_layers: int) -> list[int]:
    """Layer numbers in order, counted from the start."""
    if layers == "all":
        return list(range(num_layers))
    wrong = [number for number in layers if number not in range(-num_layers, num_layers)]
    if wrong:
        raise ValueError(
            f"codebook_layers={layers}: it must be 'all' or numbers from {-num_layers} to {num_layers - 1}"
        )
    return sorted({int(number) % num_layers for number in layers})


def tokfsm(*, vocab_size: int = 11, top_k: int = 1, num_codes: int = 1000, loss: str = "aeloss") -> CodebookLM:
    """The authors' model of the finite state machine: codebooks on every head and every MLP output."""
    return CodebookLM(
        vocab_size,
        128,
        4,
        4,
        intermediate_size=512,
        codebook_at=("attn_preproj", "mlp"),
        codebook_type=("group", "vanilla"),
        num_codebooks=(-1, 1),
        num_codes=num_codes,
        top_k=top_k,
        loss=loss,
    )


def _pythia_70m(*places: Place) -> Callable[..., CodebookLM]:
    def build(
        *, vocab_size: int = 50304, num_layers: int = 6, num_codes: int = 10000, top_k: int = 8, loss: str = "aeloss"
    ) -> CodebookLM:
        return CodebookLM(
            vocab_size,
            512,
            num_layers,
            8,
            intermediate_size=2048,
            codebook_at=places,
            codebook_type="group",
            num_codebooks=-1,
            num_codes=num_codes,
            top_k=top_k,
            loss=loss,
        )

    return build


#: The authors' two settings: their state machine's model, and Pythia-70M with a codebook on every head (and without).
VARIANTS: dict[str, Callable[..., CodebookLM]] = {
    "codebook_tokfsm": tokfsm,
    "codebook_pythia_70m": _pythia_70m("attn_preproj"),
    "codebook_pythia_70m_baseline": _pythia_70m(),
}
