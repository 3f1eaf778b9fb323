"""Gated linear attention beside causal softmax attention and its own recurrence; and a token at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.lab.bench import Benchmark, Contest
from penstock.ops import gated_linear_attention

_HEADS, _WIDTH, _CHUNK = 4, 64, 64


def _inputs(length: int) -> list[Tensor]:
    """Queries, keys, values and log gates as a freshly initialised layer has them, about -0.04 a step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, logits = torch.randn(4, 1, length, _HEADS, _WIDTH, device=device).unbind()
    return [q, k, v, F.logsigmoid(logits) / 16]


def _forward(function: Callable[..., object], *arguments: object, **options: object) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            function(*arguments, **options)

    return call


def lengthwise(length: int) -> Contest:
    q, k, v, gate = _inputs(length)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, gate)]
    weigh = torch.randn_like(v)

    def both_ways() -> None:
        torch.autograd.grad(gated_linear_attention(*leaves)[0], leaves, weigh)

    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    entries = {
        "penstock forward": _forward(gated_linear_attention, q, k, v, gate),
        "penstock forward + backward": both_ways,
        "causal attention (SDPA) forward": _forward(F.scaled_dot_product_attention, *rows, is_causal=True),
    }
    if length <= 4096:
        entries["recurrence forward"] = _forward(gated_linear_attention, q, k, v, gate, backend="recurrent")
    return Contest(
        entries,
        flops=length * _HEADS * 2 * (2 * _WIDTH * _WIDTH + 2 * _CHUNK * _WIDTH),
        note=f"Batch 1, {_HEADS} heads, width {_WIDTH}, length {length}, float32; the share counts the products of chunks of {_CHUNK}.",
    )


def decoding() -> Contest:
    entries: dict[str, Callable[[], None]] = {}
    for length in (256, 4096, 16384):
        q, k, v, gate = _inputs(length)
        _, state = gated_linear_attention(q, k, v, gate)
        token = [x[:, -1:] for x in (q, k, v, gate)]
        entries[f"penstock, after {length} tokens"] = _forward(gated_linear_attention, *token, state)
    for length in (256, 4096, 16384):
        q, k, v, _ = (x.transpose(1, 2).contiguous() for x in _inputs(length))
        entries[f"attention (SDPA), over {length} keys"] = _forward(F.scaled_dot_product_attention, q[:, :, -1:], k, v)
    return Contest(entries, note=f"One token, batch 1, {_HEADS} heads, width {_WIDTH}; GLA's state has one size.")


def benchmarks() -> dict[str, Benchmark]:
    return {
        "gated_linear_attention_4096": Benchmark("Gated linear attention over 4,096 tokens", partial(lengthwise, 4096)),
        "gated_linear_attention_16384": Benchmark(
            "Gated linear attention over 16,384 tokens", partial(lengthwise, 16384)
        ),
        "gated_linear_attention_decoding": Benchmark("Generating one token after a context", decoding),
    }
