"""Looking up rows of a large table, and learning only the rows that a batch looked up.

Shape legend: V rows of the table, D width, K ids, U different ids among them; ``...`` any leading axes.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from penstock.ops.dispatch import choose
from penstock.ops.native import can_run, library


def lookup(table_VD: Tensor, ids: Tensor, *, fixed: Tensor | None = None, sparse: bool = False) -> Tensor:
    """Rows of a table: (V, D), (...) int64 -> (..., D).

    Args:
        table_VD: the table.
        ids: of the rows.
        fixed: ids whose rows get no gradient, int64 (any number).
        sparse: whether the table's gradient is a coalesced sparse tensor of the rows looked up (see `sum_rows`) and
            not a dense one; not while compiling.
    """
    if torch.compiler.is_compiling():
        rows = F.embedding(ids, table_VD)
        if fixed is None or not torch.is_grad_enabled():
            return rows
        return torch.where((ids[..., None] == fixed).any(-1, keepdim=True), rows.detach(), rows)
    if fixed is None and not sparse:
        return F.embedding(ids, table_VD)
    return _Lookup.apply(table_VD, ids, fixed, sparse)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, ids: Tensor, fixed: Tensor | None, sparse: bool) -> Tensor:
        ctx.save_for_backward(ids, fixed)
        ctx.rows, ctx.sparse = len(table_VD), sparse
        return F.embedding(ids, table_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ids, fixed = ctx.saved_tensors
        if not ctx.sparse:
            grad_VD = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, -1, False)
            return grad_VD if fixed is None else grad_VD.index_fill_(0, fixed, 0), None, None, None
        rows_U, grad_UD = sum_rows(ids.flatten(), grad.flatten(0, -2), ctx.rows)
        if fixed is not None and len(rows_U):
            place = torch.searchsorted(rows_U, fixed).clamp_max(len(rows_U) - 1)
            grad_UD[place[rows_U[place] == fixed]] = 0
        return sparse_rows(rows_U, grad_UD, ctx.rows), None, None, None


def sparse_rows(rows_U: Tensor, values_UD: Tensor, size: int) -> Tensor:
    """A sparse (size, D) tensor of some rows, in rising order and each once."""
    shape = (size, values_UD.shape[1])
    return torch.sparse_coo_tensor(rows_U[None], values_UD, shape, check_invariants=False, is_coalesced=True)


def rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (U,) of a sparse (V, D) tensor, each once and rising, and their values (U, D); a view if they are so already."""
    # Not by is_coalesced(): autograd forgets it.
    rows_U, values_UD = grad._indices()[0], grad._values()
    if bool((rows_U[1:] > rows_U[:-1]).all()):
        return rows_U, values_UD
    return sum_rows(rows_U, values_UD, len(grad))


def sum_rows(
    ids_K: Tensor, values_KD: Tensor, size: int, *, backend: Literal["reference", "native"] | None = None
) -> tuple[Tensor, Tensor]:
    """Add up the rows that share an id.

    Args:
        ids_K: int64, from 0 to ``size`` - 1.
        values_KD: their rows.
        size: V.
        backend: "native" sorts and adds in C, for float32 on the CPU. Default: it, where it can run.

    Returns:
        the ids (U,), each once and rising, and their sums (U, D).
    """
    fits = len(ids_K) < 2**31 and size < 2**31 and values_KD.dtype == torch.float32
    form = choose("sum_rows", backend, ("reference", "native"), lambda: _form(values_KD, fits))
    if form == "reference":
        rows_U, place_K = ids_K.unique(return_inverse=True)
        return rows_U, values_KD.new_zeros(len(rows_U), values_KD.shape[1]).index_add_(0, place_K, values_KD)
    kernels = library("rows")
    assert kernels is not None
    ids_K, values_KD = ids_K.contiguous(), values_KD.contiguous()
    sorted_K, order_K = ids_K.new_empty(2, len(ids_K), dtype=torch.int32)
    kernels.rows_sort.restype = ctypes.c_int64
    count, width = map(ctypes.c_int64, values_KD.shape)
    different = kernels.rows_sort(_at(ids_K), count, ctypes.c_int64(size), _at(sorted_K), _at(order_K))
    if different < 0:
        raise MemoryError(f"sum_rows: no memory to sort {len(ids_K)} ids")
    rows_U, sums_UD = ids_K.new_empty(different), values_KD.new_empty(different, values_KD.shape[1])
    kernels.rows_sum(
        *map(_at, (sorted_K, order_K, values_KD)), count, width, _at(rows_U), _at(sums_UD), torch.get_num_threads()
    )
    return rows_U, sums_UD


@torch.no_grad()
def adam_rows_(
    rows_U: Tensor,
    grad_UD: Tensor,
    table_VD: Tensor,
    mean_VD: Tensor,
    square_VD: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    backend: Literal["reference", "native"] | None = None,
) -> None:
    """One step of Adam on some rows of a table, in place; no other row, nor its moments, is touched.

    Args:
        rows_U: which rows, each once.
        grad_UD: their gradients.
        table_VD, mean_VD, square_VD: the table and the moments of its gradient.
        step: number of this step, from 1; the moments are corrected by it for all rows alike.
        lr, betas, eps: as in `torch.optim.Adam`.
        weight_decay: of these rows; added to the gradient, or, if ``decoupled``, taken off the weights as in AdamW.
        backend: "native" goes over the rows once. Default: it, for float32 on the CPU where it can run.

    Source: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019 for the decoupled decay.
    """
    beta1, beta2 = betas
    rate, root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    tensors = (grad_UD, table_VD, mean_VD, square_VD)
    fits = all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
    if choose("adam_rows", backend, ("reference", "native"), lambda: _form(table_VD, fits)) == "native":
        kernels = library("rows")
        assert kernels is not None
        floats = map(ctypes.c_float, (rate, root, beta1, beta2, eps, decay, shrink))
        grad, *state = map(_at, tensors)
        count, width = map(ctypes.c_int64, grad_UD.shape)
        kernels.rows_adam(_at(rows_U), grad, count, width, *state, *floats, torch.get_num_threads())
        return
    weight_UD = table_VD[rows_U]
    grad_UD = grad_UD + decay * weight_UD
    mean_UD = torch.lerp(mean_VD[rows_U], grad_UD, 1 - beta1)
    square_UD = square_VD[rows_U] * beta2 + (1 - beta2) * grad_UD.square()
    mean_VD[rows_U], square_VD[rows_U] = mean_UD, square_UD
    table_VD[rows_U] = shrink * weight_UD - rate * mean_UD / (square_UD.sqrt() * root + eps)


def _form(x: Tensor, fits: bool) -> str:
    return "native" if fits and can_run("rows", x) else "reference"


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
