"""A linear layer with ReLU and dropout: after the product one pass over the output, and one on the way back.

As three modules they take seven passes, and PyTorch draws dropout's numbers one after the other.

Shape legend: B rows, X input width, Y output width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from penstock.ops.dispatch import choose
from penstock.ops.native import can_run, library


class HalfProducts:
    """What `half_products` counts: the layers it changed."""

    layers = 0


_half: HalfProducts | None = None


@contextmanager
def half_products() -> Iterator[HalfProducts]:
    """Inside, and where no gradient is wanted, `rectified_linear` takes its products in bfloat16 and adds them in float32.

    Twice as fast on processors that can; the rest of a model, its output above all, stays in float32.
    """
    global _half
    before, _half = _half, HalfProducts()
    try:
        yield _half
    finally:
        _half = before


def rectified_linear(
    x_BX: Tensor,
    weight_YX: Tensor,
    bias_Y: Tensor,
    *,
    dropout: float = 0.0,
    backend: Literal["reference", "native"] | None = None,
) -> Tensor:
    """dropout(relu(x W^T + b)): (B, X) -> (B, Y).

    Args:
        x_BX: float32 for the native form.
        weight_YX: weight.
        bias_Y: bias.
        dropout: the probability with which an output is zero, 0 to 1; what is kept is divided by 1 - p.
        backend: "native" is one pass in C, whose draws come from one number of PyTorch's generator and do not depend on
            the threads. Default: it, where it can run and nothing is being compiled, exported or autocast.

    Raises:
        ValueError: for a dropout outside [0, 1].
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} must be from 0 to 1")
    if _half is not None and not torch.is_grad_enabled():
        _half.layers += 1
        return F.dropout((x_BX.bfloat16() @ weight_YX.bfloat16().T).float().add_(bias_Y).relu_(), dropout)
    form = choose("rectified_linear", backend, ("reference", "native"), lambda: _best(x_BX, weight_YX, dropout))
    if form == "native":
        return _Rectified.apply(x_BX, weight_YX, bias_Y, dropout)
    return F.dropout(F.linear(x_BX, weight_YX, bias_Y).relu(), dropout)


def _best(x: Tensor, weight: Tensor, dropout: float) -> str:
    plain = x.ndim == 2 and x.dtype == weight.dtype == torch.float32 and dropout < 1
    if torch.compiler.is_compiling() or not plain or not can_run("rectify", x) or torch.is_autocast_enabled("cpu"):
        return "reference"
    return "native"


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BX: Tensor, weight_YX: Tensor, bias_Y: Tensor, dropout: float) -> Tensor:
        y_BY = x_BX @ weight_YX.T
        seed = int(torch.randint(2**63 - 1, ())) if dropout else 0
        kernels = library("rectify")
        assert kernels is not None
        scale = 1 / (1 - dropout)
        kernels.rectify_forward(
            _pointer(y_BY),
            _pointer(bias_Y.contiguous()),
            *map(ctypes.c_int64, y_BY.shape),
            ctypes.c_uint64(seed),
            ctypes.c_uint32(round(dropout * 2**32)),
            ctypes.c_float(scale),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x_BX, weight_YX, y_BY)
        ctx.scale = scale
        return y_BY

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BY: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_BX, weight_YX, y_BY = ctx.saved_tensors
        grad_BY = grad_BY.contiguous()
        inner_BY, bias_Y = torch.empty_like(grad_BY), weight_YX.new_empty(len(weight_YX))
        kernels = library("rectify")
        assert kernels is not None
        failed = kernels.rectify_backward(
            *map(_pointer, (grad_BY, y_BY, inner_BY, bias_Y)),
            *map(ctypes.c_int64, y_BY.shape),
            ctypes.c_float(ctx.scale),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("rectified_linear: no memory for a row of each thread")
        return inner_BY @ weight_YX if ctx.needs_input_grad[0] else None, inner_BY.T @ x_BX, bias_Y, None


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
