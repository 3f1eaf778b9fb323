"""Zoology's language model: any mixers in turn, each before an optional MLP, for measuring what mixers can recall.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023).

Shape legend: B batch, L length, D width, V vocabulary, F hidden width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from penstock.nn.causal_lm import Cache, CausalLM, Span
from penstock.nn.decoder import initialise_normal
from penstock.systems.sequence.zoology.convolutions import H3, BaseConv, Hyena
from penstock.systems.sequence.zoology.lookups import MHA, Lookups
from penstock.systems.sequence.zoology.mixers import Mixer, PlainMixer, TokenSpan
from penstock.systems.sequence.zoology.rwkv import RWKVTimeMixer

#: The mixers by the authors' names; `register_mixer` adds to them.
MIXERS: dict[str, Callable[..., nn.Module]] = {
    "BaseConv": BaseConv,
    "H3": H3,
    "Hyena": Hyena,
    "MHA": MHA,
    "RWKVTimeMixer": RWKVTimeMixer,
    "SigmoidLookups": Lookups,
}

#: Bytes of a number that is remembered.
_BYTES = 4


def register_mixer(name: str, mixer: Callable[..., nn.Module]) -> None:
    """Make a mixer of one's own known to `LanguageModel`.

    Args:
        name: for ``mixers=[{"name": name, ...}]``.
        mixer: called as ``mixer(d_model, layer_idx=i, **others)``; a module (B, L, D) -> (B, L, D), causal. A `Mixer`
            can also decode and skip padding.

    Raises:
        ValueError: if another mixer has this name.
    """
    if MIXERS.setdefault(name, mixer) is not mixer:
        raise ValueError(f"there is a mixer {name!r} already; take another name")


def make_mixer(settings: Mapping[str, Any], d_model: int, layer_idx: int) -> Mixer:
    """The mixer of one layer.

    Args:
        settings: its ``name`` and arguments.
        d_model: width D.
        layer_idx: of the layer.

    Raises:
        ValueError: for an unknown name or argument, or impossible sizes.
    """
    arguments = dict(settings)
    name = arguments.pop("name", None)
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} is not known; there are {', '.join(MIXERS)} (see register_mixer)")
    try:
        mixer = MIXERS[name](d_model, layer_idx=layer_idx, **arguments)
    except TypeError as error:
        raise ValueError(f"mixer {name!r}: {error}") from error
    return mixer if isinstance(mixer, Mixer) else PlainMixer(mixer)


class MLP(nn.Module):
    """Two linear maps with an exact GELU between: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD)))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + state_mixer(norm(x)).

    Without an MLP the state mixer is the identity, so that the second norm's own output is added.
    """

    def __init__(self, mixer: Mixer, dim: int, mlp_hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.state_mixer = MLP(dim, mlp_hidden) if mlp_hidden else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, span: Span, number: int) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.mixer(self.norm1(x_BLD), span, number))
        return x_BLD + self.dropout(self.state_mixer(self.norm2(x_BLD)))


class LanguageModel(CausalLM):
    """Decoder-only language model of any mixers: tokens (B, L) -> logits (B, L, V).

    Args:
        vocab_size: V.
        d_model: width D.
        num_layers: blocks.
        mixers: layer i has ``mixers[i % len(mixers)]``, each a mapping with the mixer's ``name`` (see `MIXERS`) and
            arguments. Several make a hybrid.
        mlp_hidden: hidden width F of each block's MLP; 0 has none.
        max_position_embeddings: rows of a learned table of positions; 0 has none.
        learnable_word_embeddings: False freezes the embedding and unties the output matrix from it.
        resid_dropout: of what mixers and MLPs add.
        embed_dropout: of the embedded tokens.
        layer_norm_epsilon: of the last norm.

    Raises:
        ValueError: for no layers or mixers, or a mixer that cannot be built.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 128,
        num_layers: int = 2,
        *,
        mixers: Sequence[Mapping[str, Any]],
        mlp_hidden: int = 0,
        max_position_embeddings: int = 64,
        learnable_word_embeddings: bool = True,
        resid_dropout: float = 0.0,
        embed_dropout: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_layers < 1 or not mixers:
            raise ValueError(f"num_layers={num_layers} and {len(mixers)} mixers: at least one of each")
        if mlp_hidden < 0 or max_position_embeddings < 0:
            raise ValueError(
                f"mlp_hidden={mlp_hidden} and max_position_embeddings={max_position_embeddings} must not be negative"
            )
        self.vocab_size, self.num_layers, self.d_model = vocab_size, num_layers, d_model
        self.word_embeddings = nn.Embedding(vocab_size, d_model)
        self.position_embeddings = nn.Embedding(max_position_embeddings, d_model) if max_position_embeddings else None
        self.embed_dropout = nn.Dropout(embed_dropout)
        built = [make_mixer(mixers[i % len(mixers)], d_model, i) for i in range(num_layers)]
        self.layers = nn.ModuleList(Block(mixer, d_model, mlp_hidden, resid_dropout) for mixer in built)
        self.ln_f = nn.LayerNorm(d_model, eps=layer_norm_epsilon)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        limits = [mixer.max_length for mixer in built if mixer.max_length is not None]
        self.max_length = min([*limits, *([max_position_embeddings] if max_position_embeddings else [])], default=None)
        self.apply(partial(_initialise, num_layers=num_layers))
        if learnable_word_embeddings:
            self.lm_head.weight = self.word_embeddings.weight
        else:
            self.word_embeddings.weight.requires_grad_(False)

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, in order."""
        return [layer.mixer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None) -> Tensor:
        return self.lm_head(self.forward_features(tokens_BL, cache=cache, mask_BL=mask_BL))

    def forward_features(
        self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """What the output matrix reads, (B, L, D); arguments as for `forward`.

        Raises:
            ValueError: see `forward`; also for padding between real tokens, which a convolution would count as time.
        """
        span = TokenSpan(**vars(self.span(tokens_BL, cache, mask_BL)), tokens=tokens_BL)
        if span.key_mask is not None:
            _refuse_gaps(span.key_mask)
        x_BLD = self.word_embeddings(tokens_BL)
        if self.position_embeddings is not None:
            x_BLD = x_BLD + self.position_embeddings(span.positions)
        return self.ln_f(self.run_layers(self.layers, self.embed_dropout(x_BLD), span))

    def state_size(self, length: int) -> int | None:
        """Bytes to be remembered after ``length`` tokens, by the paper's count.

        Returns:
            four bytes a number, summed over layers; ``None`` if a mixer defines none (RWKV-4, look-ups, one's own).
        """
        sizes = [mixer.state_size(length) for mixer in self.mixers]
        known = [size for size in sizes if size is not None]
        return _BYTES * sum(known) if len(known) == len(sizes) else None


def _initialise(module: nn.Module, num_layers: int) -> None:
    """N(0, 0.02) for every linear map and embedding, those inside mixers too; less for what ends a residual branch."""
    initialise_normal(module)
    last = module.fc2 if isinstance(module, MLP) else module.out_proj if isinstance(module, MHA | Hyena) else None
    if last is not None:
        nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * num_layers))


def _refuse_gaps(key_mask_BT: Tensor) -> None:
    starts_B = key_mask_BT[:, 0].long() + (key_mask_BT[:, 1:] & ~key_mask_BT[:, :-1]).sum(1)
    if (starts_B > 1).any():
        row = int((starts_B > 1).int().argmax())
        raise ValueError(
            f"row {row} has padding between tokens; padding must come before or after all of them (pad left to decode)"
        )


def _figure_2(width: int, mixer: Mapping[str, Any]) -> Callable[..., LanguageModel]:
    """The models of the paper's figure 2, which differ in the width and the mixer."""

    def build(*, vocab_size: int = 8192, length: int = 64, num_layers: int = 2) -> LanguageModel:
        settings = dict(mixer)
        if settings["name"] in ("BaseConv", "Hyena", "H3"):
            settings["l_max"] = length
        if settings["name"] == "H3":
            settings["d_state"] = length
        if settings["name"] == "RWKVTimeMixer":
            settings["n_layer"] = num_layers
        positions = length if settings["name"] == "MHA" else 0
        return LanguageModel(vocab_size, width, num_layers, mixers=[settings], max_position_embeddings=positions)

    return build


_FIGURE_2: dict[str, dict[str, Any]] = {
    "attention": {"name": "MHA", "dropout": 0.1},
    "baseconv": {"name": "BaseConv", "kernel_size": [3, -1, 3, -1]},
    "h3": {"name": "H3", "head_dim": 2},
    "hyena": {"name": "Hyena"},
    "rwkv": {"name": "RWKVTimeMixer"},
}

#: Figure 2 of the paper: each mixer at each width, for sequences of ``length`` tokens (64, 128, 256 or 512).
VARIANTS: dict[str, Callable[..., LanguageModel]] = {
    f"zoology_{name}_{width}": _figure_2(width, mixer)
    for name, mixer in _FIGURE_2.items()
    for width in (64, 128, 256, 512)
}
