"""Gated linear attention: a matrix a head that fades, key channel by key channel, before each token is written.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t,        o_t = scale q_t S_t

with g_t <= 0 the log gate: decay, then write, then read (Yang et al. 2023, "Gated Linear Attention Transformers").

Shape legend: B batch, L length, H heads, K key width, V value width, C chunk.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penstock.ops.dispatch import choose

Backend = Literal["recurrent", "parallel"]


def gated_linear_attention(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention whose state decays by a gate before each write.

    Args:
        q_BLHK, k_BLHK, v_BLHV: queries, keys, values.
        log_gate: (B, L, H, K), or (B, L, H, 1) for one decay a head; at most 0. Any decay stays finite.
        initial_state: (B, H, K, V), or (N, H, K, V) for N packed sequences; zeros if not given.
        scale: of the queries, default K^-1/2.
        cu_seqlens: (N + 1,) offsets of N sequences packed one after the other in a batch of one; the state starts
            anew at each.
        chunk_size: tokens computed together, a power of two.
        backend: "recurrent" is the definition, a step a token; "parallel" forms the L x L map; default by device.

    Returns:
        the output (B, L, H, V) and the state after the last token, (B or N, H, K, V) in float32 at least.

    Raises:
        ValueError: for shapes that do not fit or a log gate above zero.
    """
    check_inputs(q_BLHK, k_BLHK, v_BLHV, log_gate, initial_state, cu_seqlens)
    scale = q_BLHK.shape[-1] ** -0.5 if scale is None else scale
    form = choose("gated_linear_attention", backend, ("recurrent", "parallel"), lambda: "recurrent")
    assert form
    return recurrent(q_BLHK, k_BLHK, v_BLHV, log_gate, initial_state, scale, cu_seqlens)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, values, decay = q.to(wide) * scale, k.to(wide), v.to(wide), log_gate.to(wide).exp()
    batch, length, heads, width = q.shape
    state = q.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state.to(wide)
    outputs = []
    for t in range(length):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * values[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(v.dtype), state


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Refuse shapes that do not fit each other."""
