"""Linear attention with a forget gate on its matrix-valued state, and a language model of such layers.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023).

Shape legend: B batch, L length, D width, H heads, G key/value heads, K key width and V value width a head, R rank,
C channels of a short convolution, W its taps, N packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate
from penstock.gates.core import Passes
from penstock.nn.causal_lm import Cache, Span
from penstock.nn.decoder import DecoderLM, initialise_normal
from penstock.ops import causal_depthwise_conv, gated_linear_attention

Variant = Literal["fla", "paper"]
Decay = Literal["channel", "head", "static", "fixed", "none"]
Mode = Literal["recurrent", "chunk", "parallel"]
Activation = Literal["swish", "silu", "sigmoid", "relu", "sqrelu", "gelu", "logsigmoid"]


def _squared_relu(x: Tensor) -> Tensor:
    return x.relu().square()


#: Each activation, and between which values it lies.
_ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "swish": (F.silu, (-0.2784646, math.inf)),
    "silu": (F.silu, (-0.2784646, math.inf)),
    "sigmoid": (torch.sigmoid, (0.0, 1.0)),
    "relu": (torch.relu, (0.0, math.inf)),
    "sqrelu": (_squared_relu, (0.0, math.inf)),
    "gelu": (partial(F.gelu, approximate="tanh"), (-0.1700410, math.inf)),
    "logsigmoid": (F.logsigmoid, (-math.inf, 0.0)),
}


@dataclass
class PackedSpan(Span):
    """A span of several sequences one after the other in a batch of one; nothing passes from one to the next.

    Attributes:
        cu_seqlens: (N + 1,) their offsets, from 0 to L.
    """

    cu_seqlens: Tensor | None = None


class DecayGate(Gate):
    """The forget gate: how much of the state stays before a token is written (sec. 4.1 and 4.4).

    Its values are log decays, log(alpha) = logsigmoid(W2 W1 x + b) / tau: zero keeps all, minus infinity forgets all.

    Args:
        dim: width D of the layer's input.
        num_heads: G, how many heads have a gate of their own.
        key_width: K.
        decay: "channel", one value a token, head and key channel (the paper's proposal); "head", one a token and
            head (simple GLA, Mamba-2); "static", one learned number a head and key channel that no token moves;
            "fixed", one constant a head, log(1 - 2^(-5 - head)) (RetNet); "none", zero. With the last three the maps of "channel" are there, frozen and unused, so that all arms of a comparison
            have the same parameters and draw the same initial weights.
        low_rank: R, width between W1 and W2.
        normalizer: tau, which keeps decays near one: alpha is a sigmoid to the power 1 / tau.
        clamp_min: the lowest log decay.

    Shapes: (B, L, D) -> (B, L, G, K), or (B, L, G, 1) by "head", or (G, K), (G, 1) where the token is not read. Values in
    float32 at least: products of many decays need it.
    """

    passes: Passes = "channel"
    kind = "decay"
    range = (-math.inf, 0.0)
    unit_dims = 2
    constant: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_width: int,
        *,
        decay: Decay = "channel",
        low_rank: int = 16,
        normalizer: float = 16.0,
        clamp_min: float | None = None,
    ) -> None:
        super().__init__()
        if decay not in get_args(Decay):
            raise ValueError(f"decay={decay!r} must be one of {', '.join(get_args(Decay))}")
        if normalizer <= 0:
            raise ValueError(f"gate_logit_normalizer={normalizer} must be above zero: it divides the log decays")
        if clamp_min is not None and clamp_min > 0:
            raise ValueError(f"clamp_min={clamp_min} must be at most 0: it is the lowest log decay")
        self.num_heads, self.normalizer, self.clamp_min = num_heads, normalizer, clamp_min
        width = 1 if decay == "head" else key_width
        self.proj = nn.Sequential(nn.Linear(dim, low_rank, bias=False), nn.Linear(low_rank, num_heads * width))
        constant = None
        self.static = nn.Parameter(torch.zeros(num_heads, key_width)) if decay == "static" else None
        if decay in ("static", "fixed", "none"):
            self.proj.requires_grad_(False)
        if decay in ("fixed", "none"):
            constant = torch.zeros(num_heads, 1)
            if decay == "fixed":
                constant = torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads)))[:, None]
        if decay in ("head", "fixed"):
            self.passes = "head"
        self.register_buffer("constant", constant, persistent=False)

    def logits(self, x_BLD: Tensor) -> Tensor:
        """The values before the log-sigmoid, shaped as those after it."""
        if self.static is not None:
            return self.static
        return self.proj(x_BLD).unflatten(-1, (self.num_heads, -1))

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.constant is not None:
            return self.constant.to(torch.promote_types(x_BLD.dtype, torch.float32))
        logits = self.logits(x_BLD)
        log_decay = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.normalizer
        return log_decay if self.clamp_min is None else log_decay.clamp(min=self.clamp_min)


class ReadoutGate(Gate):
    """The gate on what a head reads from its state, after the norm (sec. 4.4): activation(W x + b).

    Args:
        dim: width D of the layer's input.
        num_heads, value_width: H and V.
        activation: of the values.
        bias: whether the linear map has a bias.

    Shapes: (B, L, D) -> (B, L, H, V).
    """

    passes = "channel"
    unit_dims = 2
    neutral = (0.0, 1.0)

    def __init__(
        self, dim: int, num_heads: int, value_width: int, *, activation: Activation = "swish", bias: bool = False
    ) -> None:
        super().__init__()
        self.value_width = value_width
        self.activation, self.range = _ACTIVATIONS[activation]
        self.proj = nn.Linear(dim, num_heads * value_width, bias=bias)

    def logits(self, x_BLD: Tensor) -> Tensor:
        """The values before the activation."""
        return self.proj(x_BLD).unflatten(-1, (-1, self.value_width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.activation(self.logits(x_BLD))


class ShortConvolution(nn.Module):
    """A causal convolution of a few taps, channel by channel, then SiLU: (B, L, C) -> (B, L, C).

    It runs over the real tokens only, as if padding were not there, and over each packed sequence by itself.

    Args:
        channels, taps: C and W; the last tap meets the current token.
        bias: whether there is one.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool = False) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x_BLC: Tensor, span: Span | None, state_BCW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x_BLC: the sequence.
            span: its padding or packing.
            state_BCW: the last W inputs before it, newest last; ``None``: there are none.

        Returns:
            the output and the last W inputs to go on from (of a packed span, of no use).
        """
        if isinstance(span, PackedSpan):
            y_BLC, state_BCW = self._packed(x_BLC, span)
        else:
            mask = None if span is None else span.mask
            y_BLC, state_BCW = causal_depthwise_conv(x_BLC, self.weight, self.bias, state_BCW, mask)
        return F.silu(y_BLC), state_BCW

    def _packed(self, x_BLC: Tensor, span: PackedSpan) -> tuple[Tensor, Tensor]:
        """Zeros as wide as the filter between the sequences keep them apart."""
        assert span.cu_seqlens is not None
        tokens = torch.arange(x_BLC.shape[1], device=x_BLC.device)
        place = tokens + torch.bucketize(tokens, span.cu_seqlens[1:], right=True) * (self.taps - 1)
        spaced_BLC = x_BLC.new_zeros(1, int(place[-1]) + 1, x_BLC.shape[2]).index_copy(1, place, x_BLC)
        y_BLC, state_BCW = causal_depthwise_conv(spaced_BLC, self.weight, self.bias)
        return y_BLC[:, place], state_BCW


class GatedLinearAttention(nn.Module):
    """Gated linear attention: (B, L, D) -> (B, L, D), linear in the length, with a state of one size for decoding.

    Args:
        hidden_size: width D.
        expand_k, expand_v: all keys together are expand_k D wide, all values expand_v D.
        num_heads: H; must divide both widths.
        num_kv_heads: G, a divisor of H; heads in groups of H / G share keys, values and decays. Default H.
        feature_map: an activation of queries and keys, or ``None``.
        use_short_conv, conv_size, conv_bias: whether queries, keys and values pass a `ShortConvolution`, and its taps.
        use_output_gate, gate_fn: whether there is a `ReadoutGate`, and its activation.
        elementwise_affine: whether the read-out norm has a weight.
        norm_eps: of the read-out norm.
        gate_logit_normalizer, gate_low_rank_dim, clamp_min, decay: see `DecayGate`.
        fuse_norm: changes no value; in flash-linear-attention it decides under which name the norm is stored, and so
            here which name `checkpoint.to_authors` gives it.
        mode: the form of the operator; by default it chooses by device and length.
        variant: "fla" as maintained in flash-linear-attention: RMS norm with a weight, read-out gate without a bias.
            "paper" as first published: layer norm without a weight, read-out gate with a bias, keys scaled by
            (D / H)^-1/2 (which the norm undoes but for its eps).

    A layer's state in a `Cache`: ``recurrent_state`` (B, H, K, V) in float32 at least and, with short convolutions,
    ``conv_state_q``, ``conv_state_k``, ``conv_state_v``, the last W inputs of each (B, C, W), newest last. States are
    kept without their gradient history: segments of a long text that are trained one after the other with the same
    cache are truncated backpropagation through time.

    Raises:
        ValueError: for widths that heads do not divide, or a mode, activation or decay there is not.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: Activation | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: Activation = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        mode: Mode | None = None,
        *,
        decay: Decay = "channel",
        variant: Variant = "fla",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        key_dim, value_dim = _expanded(hidden_size, expand_k), _expanded(hidden_size, expand_v)
        for what, width in (("key", key_dim), ("value", value_dim)):
            if width < num_heads or width % num_heads:
                raise ValueError(f"the {what} width {width} (of hidden_size={hidden_size}) must be a multiple of num_heads={num_heads}")  # fmt: skip
        if mode is not None and mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} must be one of {', '.join(get_args(Mode))}, or None to let it be chosen")
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r} must be one of {', '.join(get_args(Variant))}")
        for name, activation in (("feature_map", feature_map), ("gate_fn", gate_fn)):
            if activation is not None and activation not in _ACTIVATIONS:
                raise ValueError(f"{name}={activation!r} must be one of {', '.join(_ACTIVATIONS)}")
        if use_short_conv and conv_size < 1:
            raise ValueError(f"conv_size={conv_size}: a short convolution has at least one tap")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.key_width, self.value_width = key_dim // num_heads, value_dim // num_heads
        self.feature_map = None if feature_map is None else _ACTIVATIONS[feature_map][0]
        self.gate_fn, self.fuse_norm, self.mode, self.variant = gate_fn, fuse_norm, mode, variant
        self.key_scale = (hidden_size / num_heads) ** -0.5 if variant == "paper" else 1.0

        linear = partial(nn.Linear, bias=False)
        self.q_proj = linear(hidden_size, key_dim)
        self.k_proj = linear(hidden_size, num_kv_heads * self.key_width)
        self.v_proj = linear(hidden_size, num_kv_heads * self.value_width)
        self.q_conv1d = self.k_conv1d = self.v_conv1d = None
        if use_short_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                ShortConvolution(proj.out_features, conv_size, bias=conv_bias)
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
        self.decay_gate = DecayGate(
            hidden_size,
            num_kv_heads,
            self.key_width,
            decay=decay,
            low_rank=gate_low_rank_dim,
            normalizer=gate_logit_normalizer,
            clamp_min=clamp_min,
        )
        self.readout_norm = (
            nn.RMSNorm(self.value_width, eps=norm_eps, elementwise_affine=elementwise_affine)
            if variant == "fla"
            else nn.LayerNorm(self.value_width, eps=norm_eps, elementwise_affine=False)
        )
        self.readout_gate = (
            ReadoutGate(hidden_size, num_heads, self.value_width, activation=gate_fn, bias=variant == "paper")
            if use_output_gate
            else None
        )
        self.o_proj = linear(value_dim, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as their authors draw them: N(0, 0.02), biases zero; in the paper's variant queries, keys and the
        decay gate Xavier-uniform with gain 2^-2.5."""
        self.apply(initialise_normal)
        for convolution in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            if convolution is not None:
                nn.init.normal_(convolution.weight, std=0.02)
        if self.variant == "paper":
            for weight in (self.q_proj.weight, self.k_proj.weight, *self.decay_gate.proj.parameters()):
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight, gain=2**-2.5)

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """Mix tokens of ``x_BLD``, already normalised.

        Args:
            x_BLD: the layer's input.
            span: padding, packing and what is remembered; default: none of it. Padded tokens neither decay nor write,
                and their own outputs mean nothing.
            number: of this layer in the span's states.

        Raises:
            ValueError: if the remembered state or the padding mask has a shape that does not fit.
        """
        if span is not None and span.mask is not None and span.mask.shape != x_BLD.shape[:2]:
            raise ValueError(
                f"the mask is {tuple(span.mask.shape)}; only a padding mask (B, L) = {tuple(x_BLD.shape[:2])} makes sense here"
            )
        state = None if span is None else span.state(number)
        q, k, v = self._project(x_BLD, span, state)
        log_decay = self.decay_gate(x_BLD).expand(*x_BLD.shape[:2], self.num_kv_heads, -1)
        if span is not None and span.mask is not None:
            padding = ~span.mask[..., None, None]
            k, log_decay = k.masked_fill(padding, 0.0), log_decay.masked_fill(padding, 0.0)
        if (group := self.num_heads // self.num_kv_heads) > 1:
            k, v, log_decay = (x.repeat_interleave(group, 2) for x in (k, v, log_decay))
        o_BLHV, final_state = gated_linear_attention(
            q,
            k,
            v,
            log_decay,
            None if state is None else state.get("recurrent_state"),
            cu_seqlens=span.cu_seqlens if isinstance(span, PackedSpan) else None,
            backend=self.mode,
        )
        if state is not None:
            state["recurrent_state"] = final_state.detach()
        o_BLHV = self.readout_norm(o_BLHV)
        if self.readout_gate is not None:
            o_BLHV = o_BLHV * self.readout_gate(x_BLD)
        return self.o_proj(o_BLHV.flatten(2))

    def _project(
        self, x_BLD: Tensor, span: Span | None, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, H, K), keys (B, L, G, K) and values (B, L, G, V); the convolutions' states move on."""
        projected = {"q": self.q_proj(x_BLD), "k": self.k_proj(x_BLD), "v": self.v_proj(x_BLD)}
        for name, convolution in (("q", self.q_conv1d), ("k", self.k_conv1d), ("v", self.v_conv1d)):
            if convolution is not None:
                before = None if state is None else state.get(f"conv_state_{name}")
                projected[name], last = convolution(projected[name], span, before)
                if state is not None:
                    state[f"conv_state_{name}"] = last.detach()
        q, k = (projected[name].unflatten(-1, (-1, self.key_width)) for name in ("q", "k"))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        if self.key_scale != 1.0:
            k = k * self.key_scale
        return q, k, projected["v"].unflatten(-1, (-1, self.value_width))


def _expanded(width: int, ratio: float) -> int:
    """``width`` times ``ratio`` rounded down, a ratio of whole numbers being meant exactly."""
    return math.floor(width * ratio + 1e-6)


def mlp_width(hidden_size: int) -> int:
    """Hidden width of the published models' SwiGLU: two thirds of 4 D, rounded up to a multiple of 256."""
    return -(-int(hidden_size * 4 * 2 / 3) // 256) * 256


class GLALM(DecoderLM):
    """Language model of gated linear attention, no positions: tokens (B, L) -> logits (B, L, vocabulary).

    Args:
        vocab_size: of the tokens.
        hidden_size, num_layers, num_heads: D, the number of blocks, H.
        intermediate_size: hidden width of the SwiGLU; default by `mlp_width`.
        norm_eps: of all norms, the read-out norms included (the paper's variant has 1e-5).
        tie_embeddings: the output matrix is the embedding.
        others: see `GatedLinearAttention`.

    Raises:
        ValueError: for impossible sizes, see `GatedLinearAttention`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        intermediate_size: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_kv_heads: int | None = None,
        feature_map: Activation | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: Activation = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        mode: Mode | None = None,
        decay: Decay = "channel",
        variant: Variant = "fla",
        tie_embeddings: bool = False,
    ) -> None:
        layers = [
            GatedLinearAttention(
                hidden_size,
                expand_k,
                expand_v,
                num_heads,
                num_kv_heads,
                feature_map,
                use_short_conv,
                conv_size,
                conv_bias,
                use_output_gate,
                gate_fn,
                elementwise_affine,
                norm_eps,
                gate_logit_normalizer,
                gate_low_rank_dim,
                clamp_min,
                fuse_norm,
                mode,
                decay=decay,
                variant=variant,
            )
            for _ in range(num_layers)
        ]
        hidden = mlp_width(hidden_size) if intermediate_size is None else intermediate_size
        super().__init__(layers, vocab_size, hidden_size, hidden, eps=norm_eps, tie_embeddings=tie_embeddings)
        self.apply(initialise_normal)
        for layer in layers:
            layer.reset_parameters()  # Xavier weights of the paper's variant are not for `initialise_normal`.

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        cache: Cache | None = None,
        mask_BL: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each one; see `CausalLM.forward`.

        Args:
            tokens_BL, cache, mask_BL: see there.
            cu_seqlens: (N + 1,) offsets of N sequences packed one after the other in a batch of one, neither padded
                nor cached; each has the logits it has by itself.

        Raises:
            ValueError: also for packed sequences with a cache, a mask or a batch of more than one.
        """
        if cu_seqlens is not None and (cache is not None or mask_BL is not None or len(tokens_BL) != 1):
            raise ValueError(
                f"cu_seqlens packs sequences in a batch of one (here {len(tokens_BL)}), without a cache or a mask"
            )
        span = self.span(tokens_BL, cache, mask_BL)
        if cu_seqlens is not None:
            span = PackedSpan(span.positions, cu_seqlens=cu_seqlens)
        x_BLD = self.run_layers(self.layers, self.embed_tokens(tokens_BL), span)
        return self.lm_head(self.norm(x_BLD))


def gla_340m(*, vocab_size: int = 32000, mode: Mode | None = None, tie_embeddings: bool = False) -> GLALM:
    """The size trained on 15B tokens, as flash-linear-attention builds it."""
    return GLALM(vocab_size, 1024, 24, 4, mode=mode, tie_embeddings=tie_embeddings)


def gla_1_3b(*, vocab_size: int = 32000, mode: Mode | None = None, tie_embeddings: bool = False) -> GLALM:
    """The size trained on 100B tokens, as flash-linear-attention builds it."""
    return GLALM(vocab_size, 2048, 24, 4, mode=mode, tie_embeddings=tie_embeddings)


def gla_1_3b_original(*, vocab_size: int = 50432, num_heads: int = 8, mode: Mode | None = None) -> GLALM:
    """The default of the authors' own code (the paper's text has four heads)."""
    return GLALM(vocab_size, 2048, 24, num_heads, norm_eps=1e-5, mode=mode, variant="paper")


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "gla_340m": gla_340m,
    "gla_1_3b": gla_1_3b,
    "gla_1_3b_original": gla_1_3b_original,
}
