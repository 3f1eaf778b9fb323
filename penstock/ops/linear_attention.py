"""Gated linear attention: a matrix a head that fades, key channel by key channel, before each token is written.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t,        o_t = scale q_t S_t

with g_t <= 0 the log gate: decay, then write, then read (Yang et al. 2023, "Gated Linear Attention Transformers").

Shape legend: B batch, L length, H heads, K key width, V value width, N chunks or packed sequences, C tokens a chunk.
"""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from penstock.ops.chunked_gla import chunked
from penstock.ops.dispatch import choose
from penstock.ops.native import can_run
from penstock.ops.native_gla import keeps_threads_busy, native

#: Tokens a piece of an exported program: its map has so many rows and columns a key channel.
_PIECE = 32
Backend = Literal["recurrent", "parallel", "chunk", "native", "fla"]


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
    """Linear attention whose state decays by a gate before each write; linear in length.

    Args:
        q_BLHK, k_BLHK, v_BLHV: queries, keys, values.
        log_gate: (B, L, H, K), or (B, L, H, 1) for one decay a head; at most 0. Any decay stays finite, -inf too.
        initial_state: (B, H, K, V), or (N, H, K, V) for N packed sequences; zeros if not given.
        scale: of the queries, default K^-1/2.
        cu_seqlens: (N + 1,) offsets of N sequences packed one after the other in a batch of one; the state starts
            anew at each.
        chunk_size: tokens computed together by "chunk" and "native", a power of two.
        backend: "recurrent" is the definition, a step a token; "parallel" forms the L x L map; "chunk" computes
            chunks by matrix products and keeps one state a chunk for the backward pass; "native" does so in C, a
            thread a head (on the CPU, float32 or less); "fla" is
            flash-linear-attention's kernel (CUDA). Default: "recurrent" for a single token; "fla" on CUDA where
            installed; "native" where it can run and there is a head for each thread; else "chunk".

    Returns:
        the output (B, L, H, V) and the state after the last token, (B or N, H, K, V) in float32 at least.

    Raises:
        ValueError: for shapes that do not fit, a log gate above zero or NaN, or an unknown backend.
    """
    _check(q_BLHK, k_BLHK, v_BLHV, log_gate, initial_state, cu_seqlens, chunk_size)
    scale = q_BLHK.shape[-1] ** -0.5 if scale is None else scale
    if backend is None and cu_seqlens is None and torch.compiler.is_exporting():
        return _portable(q_BLHK, k_BLHK, v_BLHV, log_gate.expand_as(k_BLHK), initial_state, scale)
    form = choose("gated_linear_attention", backend, get_args(Backend), lambda: _default(q_BLHK))
    bounds = None if cu_seqlens is None else [int(x) for x in cu_seqlens]
    log_gate = log_gate.expand_as(k_BLHK)
    if form == "native" and not can_run("gla", q_BLHK):
        raise ValueError(
            "the native backend needs float32 or less on the CPU and a C compiler; leave backend to choose"
        )
    if form in ("chunk", "native"):
        attend = chunked if form == "chunk" else native
        return attend(q_BLHK, k_BLHK, v_BLHV, log_gate, initial_state, scale, bounds, chunk_size)
    if form == "fla":
        return _fla(q_BLHK, k_BLHK, v_BLHV, log_gate, initial_state, scale, cu_seqlens)
    one = _recurrent if form == "recurrent" else _parallel
    if bounds is None:
        return one(q_BLHK, k_BLHK, v_BLHV, log_gate, initial_state, scale)
    outputs, states = [], []
    for row, (a, b) in enumerate(itertools.pairwise(bounds)):
        state = None if initial_state is None else initial_state[row : row + 1]
        output, state = one(q_BLHK[:, a:b], k_BLHK[:, a:b], v_BLHV[:, a:b], log_gate[:, a:b], state, scale)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None, scale: float
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
    output = torch.stack(outputs, 1) if outputs else torch.zeros_like(values)
    return output.to(v.dtype), state


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """All pairs of tokens at once; memory L x L x K, for reference.

    The exponents are differences of cumulative sums, masked before the exponential: all are at most zero.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # -1e4 forgets as surely as -inf, and differences of it are numbers.
    total = log_gate.to(torch.float64).clamp(min=-1e4).cumsum(1)
    q, k, values = q.to(wide) * scale, k.to(wide), v.to(wide)
    length = q.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, :, :, None, None]
    exponent = (total[:, :, None] - total[:, None]).masked_fill(~past, -math.inf).to(wide)
    weights_BLTH = torch.einsum("blhk,bthk,blthk->blth", q, k, exponent.exp())
    output = torch.einsum("blth,bthv->blhv", weights_BLTH, values)
    last = (total[:, -1:] - total).to(wide).exp()
    state = torch.einsum("blhk,blhv->bhkv", k * last, values)
    if initial_state is not None:
        before = total.to(wide).exp()
        output = output + torch.einsum("blhk,bhkv->blhv", q * before, initial_state.to(wide))
        state = state + before[:, -1, :, :, None] * initial_state.to(wide)
    return output.to(v.dtype), state


def _portable(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """For exported programs: pieces in the parallel form, of PyTorch's own operators and without a look at values."""
    outputs, state = [], initial_state
    pieces = zip(*(x.split(_PIECE, 1) for x in (q, k, v, log_gate)), strict=True)
    for q_part, k_part, v_part, gate_part in pieces:
        output, state = _parallel(q_part, k_part, v_part, gate_part, state, scale)
        outputs.append(output)
    assert state is not None
    return torch.cat(outputs, 1), state


def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from fla.ops.gla import chunk_gla

    return chunk_gla(
        q, k, v, log_gate, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )


def _default(q: Tensor) -> Backend:
    if q.shape[1] == 1:
        return "recurrent"
    if q.is_cuda and q.dtype != torch.float64 and find_spec("fla") is not None:
        return "fla"
    return "native" if can_run("gla", q) and keeps_threads_busy(q) else "chunk"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must be (B, L, H, K) twice and (B, L, H, V)"
        )
    batch, length, heads, width = q.shape
    if log_gate.shape[:3] != q.shape[:3] or log_gate.shape[3:] not in ((width,), (1,)):
        raise ValueError(
            f"log_gate is {tuple(log_gate.shape)}; it must be {tuple(q.shape)} or {(batch, length, heads, 1)}"
        )
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size} must be a power of two")
    rows = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens packs sequences in a batch of one, not {batch}")
        steps = cu_seqlens.diff()
        if cu_seqlens.ndim != 1 or int(cu_seqlens[0]) or int(cu_seqlens[-1]) != length or bool((steps < 1).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}; it is {cu_seqlens.tolist()}")
        rows = len(steps)
    if initial_state is not None and initial_state.shape != (right := (rows, heads, width, v.shape[-1])):
        transposed = initial_state.shape == (rows, heads, v.shape[-1], width)
        hint = " (it looks transposed)" if transposed and right[2] != right[3] else ""
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}; it must be (B, H, K, V) = {right}{hint}")
    # On an accelerator the check would stop the stream; there a bad gate shows in the result.
    if log_gate.device.type == "cpu" and log_gate.numel() and not torch.compiler.is_compiling():
        highest = float(log_gate.detach().amax())
        if not highest <= 0:
            raise ValueError(f"log_gate holds {highest}; the log of a decay is at most 0")
