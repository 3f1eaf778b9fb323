"""Gated linear attention by the kernel in C.

Shape legend: B batch, L length, H heads, K key width, V value width, N chunks of all sequences.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from penstock.ops.chunked_gla import GENTLE, backward_flops, chunk_for, forward_flops
from penstock.ops.native import gemm, library

#: A longer chunk leaves the cache.
_LONGEST_CHUNK = 256


def native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `gated_linear_attention`; ``bounds`` are the offsets of packed sequences."""
    dtype = v.dtype
    q, k, v, log_gate = (x.float() for x in (q, k, v, log_gate))
    given = (q, k, v, log_gate, *(() if initial_state is None else (initial_state,)))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    output, final, _ = native_forward(
        q, k, v, log_gate, initial_state, scale, chunk_for(q, min(chunk_size, _LONGEST_CHUNK)), bounds or [], keep
    )
    return output.to(dtype), final


def keeps_threads_busy(q: Tensor) -> bool:
    """Whether there is a head of a sequence for each thread."""
    return q.shape[0] * q.shape[2] >= _num_threads()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_threads() -> int:
    return torch.get_num_threads()


@torch.library.custom_op("penstock::gla_native_forward", mutates_args=())
def native_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk: int,
    bounds: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final states, and (if ``keep``) the states that entered the chunks, (N, H, K, V).

    ``bounds`` are empty for a batch of sequences of one length.
    """
    call = _Call(q, k, v, log_gate, scale, chunk, bounds)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    final, states = q.new_empty(call.sequences, *call.state), q.new_empty(call.total if keep else 0, *call.state)
    first = None if initial_state is None else initial_state.float().contiguous()
    call.run("forward", first, output, final, states if keep else None)
    return output, final, states


@native_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk: int,
    bounds: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state = (q.shape[2], q.shape[3], v.shape[3])
    rows = len(bounds) - 1 if bounds else q.shape[0]
    total = sum(-(-(b - a) // chunk) for a, b in pairwise(bounds)) if bounds else rows * -(-q.shape[1] // chunk)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    return output, q.new_empty(rows, *state), q.new_empty(total if keep else 0, *state)


@torch.library.custom_op("penstock::gla_native_backward", mutates_args=())
def native_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    states: Tensor,
    final: Tensor,
    scale: float,
    chunk: int,
    bounds: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log gate and the initial states."""
    call = _Call(q, k, v, log_gate, scale, chunk, bounds)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_gate, final)]
    given = None if grad_final is None else grad_final.contiguous()
    call.run("backward", states, final, grad_output.contiguous(), given, *grads)
    return tuple(grads)  # type: ignore[return-value]


@native_backward.register_fake
def _(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    states: Tensor,
    final: Tensor,
    scale: float,
    chunk: int,
    bounds: list[int],
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_gate, final))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_gate, initial_state, ctx.scale, ctx.chunk, ctx.bounds, _ = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, log_gate, output[2], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_gate, states, final = ctx.saved_tensors
    grad_output = torch.zeros_like(v) if grad_output is None else grad_output
    settings = (ctx.scale, ctx.chunk, ctx.bounds)
    *grads, initial = native_backward(grad_output, grad_final, q, k, v, log_gate, states, final, *settings)
    return (*grads, None if ctx.initial_dtype is None else initial.to(ctx.initial_dtype), *[None] * 4)


native_forward.register_autograd(_backward, setup_context=_setup)
register_flop_formula(torch.ops.penstock.gla_native_forward)(forward_flops)
register_flop_formula(torch.ops.penstock.gla_native_backward)(backward_flops)


class _Fields(ctypes.Structure):
    """``Call`` of gla.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gemm", "q", "k", "v", "g", "bounds", "chunks")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "width", "values", "chunk", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "gentle")),
    ]


class _Call:
    """A call of the kernel: which tokens make up which sequence, and in which chunks."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, scale: float, chunk: int, bounds: list[int]
    ) -> None:
        batch, length, heads, width = q.shape
        ends = bounds or [length * row for row in range(batch + 1)]
        chunks = [0]
        for a, b in pairwise(ends):
            chunks.append(chunks[-1] + -(-(b - a) // chunk))
        self.sequences, self.total, self.state = len(ends) - 1, chunks[-1], (heads, width, v.shape[-1])
        # Kept, since the structure holds bare addresses.
        self._tensors = [x.contiguous() for x in (q, k, v, log_gate)]
        self._tensors += [torch.tensor(ends), torch.tensor(chunks)]
        self._fields = _Fields(
            gemm(),
            *(x.data_ptr() for x in self._tensors),
            *(self.sequences, heads, width, v.shape[-1], chunk, torch.get_num_threads()),
            scale,
            GENTLE,
        )

    def run(self, direction: str, *tensors: Tensor | None) -> None:
        function = getattr(library("gla"), f"gla_{direction}")
        addresses = (None if x is None else ctypes.c_void_p(x.data_ptr()) for x in tensors)
        if function(ctypes.byref(self._fields), *addresses):
            raise MemoryError(f"gated linear attention, {direction}")
