# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton kernels take pointers and constants that Python has no types for.
"""The pooled attention map on CUDA, in Triton: two passes over the keys for each block of queries, no map in memory.

The first pass finds each query's largest score and normaliser, the second the probabilities, tile by tile, and pools
them at once. Memory beside the result is none.

Shape legend: B batch, H heads, G key/value heads, L query length, T key length, K head width, M query blocks, N key
blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scores(q, k_ptr, j, first_query, length, total, width, SIZE_K: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, SIZE_Q: tl.constexpr):  # fmt: skip
    """Scores (ROWS, KEYS) of a block of queries against tile ``j``; minus infinity where nothing is seen."""
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, CHANNELS)
    at = j * SIZE_K + key
    there = (key < SIZE_K) & (at < total)
    k = tl.load(
        k_ptr + at[:, None] * width + channel[None, :], mask=there[:, None] & (channel < width)[None, :], other=0.0
    )
    s = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee")
    query = first_query + row
    seen = there[None, :] & ((row < SIZE_Q) & (query < length))[:, None]
    if CAUSAL:
        seen = seen & (at[None, :] <= query[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _pool(q_ptr, k_ptr, out_ptr, heads, groups, length, total, width, blocks, scale, SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, CAUSAL: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip
    i = tl.program_id(0)
    head = tl.program_id(1)
    shared = head // heads * groups + head % heads // (heads // groups)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    first = i * SIZE_Q
    own = (row < SIZE_Q) & (first + row < length)
    q_at = q_ptr + (head * length + first + row[:, None]) * width + channel[None, :]
    q = tl.load(q_at, mask=own[:, None] & (channel < width)[None, :], other=0.0).to(tl.float32) * scale
    keys = k_ptr + shared * total * width
    last = blocks
    if CAUSAL:
        last = tl.minimum(blocks, tl.cdiv(first + SIZE_Q, SIZE_K))
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    for j in range(last):
        s = _scores(q, keys, j, first, length, total, width, SIZE_K, KEYS, CHANNELS, CAUSAL, ROWS, SIZE_Q)
        higher = tl.maximum(high, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        norm = norm * tl.exp(high - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        high = higher
    shift = tl.where(high == float("-inf"), 0.0, high)
    factor = tl.where(norm > 0, 1.0 / norm, 0.0)
    for j in range(last):
        s = _scores(q, keys, j, first, length, total, width, SIZE_K, KEYS, CHANNELS, CAUSAL, ROWS, SIZE_Q)
        p = tl.exp(s - shift[:, None]) * factor[:, None]
        value = tl.max(tl.max(p, 1), 0) if LARGEST else tl.sum(tl.sum(p, 1), 0)
        tl.store(out_ptr + (head * tl.num_programs(0) + i) * blocks + j, value)


def triton_pooled_map(
    q_BHLK: Tensor, k_BGTK: Tensor, sizes: tuple[int, int], *, largest: bool, causal: bool, scale: float
) -> Tensor:
    """The map pooled by its largest entry or its sum, (B, H, M, N) float32; see `pooled_attention_map`."""
    (batch, heads, length, width), groups, total = q_BHLK.shape, k_BGTK.shape[1], k_BGTK.shape[2]
    rows, blocks = triton.cdiv(length, sizes[0]), triton.cdiv(total, sizes[1])
    out = torch.zeros(batch, heads, rows, blocks, dtype=torch.float32, device=q_BHLK.device)
    _pool[rows, batch * heads](
        q_BHLK.contiguous(),
        k_BGTK.contiguous(),
        out,
        heads,
        groups,
        length,
        total,
        width,
        blocks,
        scale,
        SIZE_Q=sizes[0],
        SIZE_K=sizes[1],
        ROWS=max(16, triton.next_power_of_2(sizes[0])),
        KEYS=max(16, triton.next_power_of_2(sizes[1])),
        CHANNELS=max(16, triton.next_power_of_2(width)),
        CAUSAL=causal,
        LARGEST=largest,
    )
    return out
