"""Side experiments: the operator's forms agree, and a decoded token costs the same at any context length.

Shape legend: B batch, L length, D width, H heads, K key width, V value width, T context.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.nn.causal_lm import Span, State
from penstock.ops import gated_linear_attention
from penstock.ops.linear_attention import Backend
from penstock.systems.sequence.gla.baseline import SoftmaxAttention
from penstock.systems.sequence.gla.model import GatedLinearAttention

#: The forms held against the recurrence, each with its chunk.
_FORMS: dict[str, tuple[Backend, int]] = {
    "chunk_16": ("chunk", 16),
    "chunk_64": ("chunk", 64),
    "parallel": ("parallel", 64),
}
#: Lengths that leave the last chunk unfilled, or are shorter than one.
_LENGTHS = (1, 13, 75, 130)
_CONTEXTS = (256, 4096)
_TOKENS = 200
_WIDTH, _HEADS = 128, 4


def log_decays(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Log decays in float64: "mild" as of a fresh layer, "wide" from 0 to -150, "extreme" 0 or -150 at random."""
    if kind == "mild":
        return F.logsigmoid(torch.randn(shape, generator=generator, dtype=torch.float64)) / 16
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return -150 * (uniform if kind == "wide" else (uniform < 0.3).double())


def _outputs_and_gradients(inputs: list[Tensor], backend: Backend, chunk_size: int) -> list[Tensor]:
    q, k, v, log_gate, state = leaves = [x.clone().requires_grad_() for x in inputs]
    o, final = gated_linear_attention(q, k, v, log_gate, state, backend=backend, chunk_size=chunk_size)
    # Weights of their own make every output count differently in the gradients.
    weigh = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).cos().view_as(x) for x in (o, final)]
    gradients = torch.autograd.grad((o * weigh[0]).sum() + (final * weigh[1]).sum(), leaves)
    return [o.detach(), final.detach(), *gradients]


def forms(seed: int) -> dict[str, float]:
    """The largest difference of each form from the recurrence, over outputs, final state and all gradients."""
    generator = torch.Generator().manual_seed(seed)
    worst = dict.fromkeys(_FORMS, 0.0)
    for length in _LENGTHS:
        for kind in ("mild", "wide", "extreme"):
            sizes = {"q": (2, length, 2, 6), "k": (2, length, 2, 6), "v": (2, length, 2, 5), "state": (2, 2, 6, 5)}
            drawn = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in sizes.items()}
            gate = log_decays(kind, (2, length, 2, 6), generator)
            inputs = [drawn["q"], drawn["k"], drawn["v"], gate, drawn["state"]]
            expected = _outputs_and_gradients(inputs, "recurrent", 64)
            for name, (backend, chunk_size) in _FORMS.items():
                got = _outputs_and_gradients(inputs, backend, chunk_size)
                apart = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
                worst[name] = max(worst[name], apart)
    return worst | {"worst": max(worst.values())}


@torch.no_grad()
def decode_cost(seed: int) -> dict[str, float]:
    """Microseconds (10th percentile) of one token through one layer after short and long contexts, and their ratios.

    The contexts take turns token by token, so that a busy machine disturbs all alike. Batch of one, float32;
    attention writes into a cache with room for all, the cheapest way it has. Bytes are those of what is remembered.
    """
    torch.manual_seed(seed)
    gated, attention = GatedLinearAttention(_WIDTH, num_heads=_HEADS), SoftmaxAttention(_WIDTH, _HEADS)
    decoders: dict[str, _Decoder] = {}
    for context in _CONTEXTS:
        decoders[f"gated_{context}"] = _gated(gated, context)
        decoders[f"attention_{context}"] = _attention(attention, context)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for token in range(_TOKENS):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            decoder.step(token)
            times[name].append(time.perf_counter() - start)
    low = {name: 1e6 * sorted(own)[_TOKENS // 10] for name, own in times.items()}
    short, long = _CONTEXTS
    return (
        {f"{name}_us": value for name, value in low.items()}
        | {f"{name}_bytes": float(decoder.num_bytes) for name, decoder in decoders.items()}
        | {f"{kind}_ratio": low[f"{kind}_{long}"] / low[f"{kind}_{short}"] for kind in ("gated", "attention")}
    )


class _Decoder(NamedTuple):
    """A layer after some context: ``step(n)`` decodes the n-th token from there."""

    step: Callable[[int], Tensor]
    num_bytes: int


def _gated(layer: GatedLinearAttention, context: int) -> _Decoder:
    states: list[State] = [{}]
    layer(torch.randn(1, context, _WIDTH), Span(torch.arange(context), states=states))
    token_BLD = torch.randn(1, 1, _WIDTH)
    num_bytes = sum(value.nbytes for value in states[0].values())
    return _Decoder(lambda n: layer(token_BLD, Span(torch.tensor([context + n]), states=states)), num_bytes)


def _attention(layer: SoftmaxAttention, context: int) -> _Decoder:
    room = (1, _HEADS, context + _TOKENS, layer.head_width)
    keys, values = torch.randn(room), torch.randn(room)
    token_BD = torch.randn(1, _WIDTH)
    num_bytes = 2 * keys[:, :, :context].numel() * keys.itemsize
    return _Decoder(lambda n: layer.step(token_BD, keys, values, context + n), num_bytes)
