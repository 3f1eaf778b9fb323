"""Attention between the few vectors of each of many samples, with its residual path and ReLU.

As PyTorch operations it reads and writes the whole batch some twenty times a layer; in C a few samples go through all of
it while they are in the cache.

Shape legend: B samples, M fields, I width of the input, D width of the output over all heads, H heads, P = D / H.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from penstock.ops.dispatch import choose
from penstock.ops.native import can_run, gemm, library


def field_attention(
    x_BMI: Tensor,
    query_DI: Tensor,
    key_DI: Tensor,
    value_DI: Tensor,
    residual_DI: Tensor | None = None,
    *,
    num_heads: int,
    scale: float = 1.0,
    identity: bool = False,
    rectify: bool = True,
    backend: Literal["reference", "native"] | None = None,
) -> Tensor:
    """relu(softmax(scale (x Wq^T)(x Wk^T)^T) (x Wv^T) + residual), the heads side by side: (B, M, I) -> (B, M, D).

    Args:
        x_BMI: the fields of each sample.
        query_DI, key_DI, value_DI: weights; heads are contiguous blocks of D.
        residual_DI: weight of the residual path; ``None``: there is none, or the input itself.
        num_heads: H, a divisor of D.
        scale: of the scores.
        identity: whether the input itself is added (I = D).
        rectify: whether the ReLU is taken.
        backend: "native" is one pass in C, which computes the attention again on the way back. Default: it, for float32
            on the CPU where it can run, not while compiling or in autocast.

    Raises:
        ValueError: for widths that do not fit.

    Source: Song et al. 2019, AutoInt, eq. 5 to 8.
    """
    width, inner = value_DI.shape
    if width % num_heads or x_BMI.shape[-1] != inner or (identity and (width != inner or residual_DI is not None)):
        raise ValueError(
            f"x {tuple(x_BMI.shape)}, weights {tuple(value_DI.shape)}, num_heads={num_heads}, identity={identity}: heads "
            "must divide the output, and an input that is added must be as wide, with no residual weight beside it"
        )
    form = choose("field_attention", backend, ("reference", "native"), lambda: _best(x_BMI, value_DI))
    if form == "reference":
        query, key, value = ((x_BMI @ w.T).unflatten(-1, (num_heads, -1)) for w in (query_DI, key_DI, value_DI))
        weights_BHMM = torch.einsum("bmhp,bnhp->bhmn", query * scale, key).softmax(-1)
        u_BMD = torch.einsum("bhmn,bnhp->bmhp", weights_BHMM, value).flatten(2)
        if identity or residual_DI is not None:
            u_BMD = u_BMD + (x_BMI if residual_DI is None else x_BMI @ residual_DI.T)
        return u_BMD.relu() if rectify else u_BMD
    merged = merges_scores(inner, width, num_heads, x_BMI.shape[1])
    key = None if merged else key_DI.T
    if merged:
        # <Wq a, Wk b> = a' (Wq' Wk) b: a square matrix a head, and the fields are their own keys.
        query_HPI, key_HPI = (w.unflatten(0, (num_heads, -1)) for w in (query_DI, key_DI))
        query = torch.einsum("hpi,hpj->ihj", query_HPI * scale, key_HPI).flatten(1)
    else:
        query = query_DI.T * scale
    residual = None if residual_DI is None else residual_DI.T
    return _forward(x_BMI, query, key, value_DI.T, residual, num_heads, identity, rectify)


def merges_scores(input_dim: int, attention_dim: int, num_heads: int, num_fields: int) -> bool:
    """Whether it is cheaper to multiply a head's query and key matrices with each other than to project with both."""
    merged = num_heads * input_dim * (input_dim + num_fields)
    return merged < attention_dim * (2 * input_dim + num_fields)


def merges_values(input_dim: int, attention_dim: int, num_heads: int) -> bool:
    """Whether it is cheaper to mix the fields first and project then: where a head is wider than its input."""
    return input_dim * num_heads < attention_dim


def _best(x: Tensor, weight: Tensor) -> str:
    plain = x.ndim == 3 and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if torch.compiler.is_compiling() or not plain or not can_run("field_attention", x):
        return "reference"
    return "reference" if torch.is_autocast_enabled("cpu") else "native"


@torch.library.custom_op("penstock::field_attention_forward", mutates_args=())
def _forward(
    x: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    residual: Tensor | None,
    num_heads: int,
    identity: bool,
    rectify: bool,
) -> Tensor:
    """The output, (B, M, D)."""
    call = _Call(x, query, key, value, residual, num_heads, identity, rectify)
    out = x.new_empty(*x.shape[:2], value.shape[1])
    call.run("forward", out)
    return out


@torch.library.custom_op("penstock::field_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    residual: Tensor | None,
    num_heads: int,
    identity: bool,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the input and of the weights; of absent ones empty."""
    call = _Call(x, query, key, value, residual, num_heads, identity, rectify)
    like = (query, key, value, residual)
    grads = [x.new_zeros(0 if w is None else w.shape) for w in like]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    call.run("backward", out, grad.contiguous(), dx, *grads)
    return dx, grads[0], grads[1], grads[2], grads[3]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.identity, ctx.rectify = inputs
    ctx.save_for_backward(*tensors, output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, out = ctx.saved_tensors
    dx, query, key, value, residual = _backward(grad, out, *tensors, ctx.num_heads, ctx.identity, ctx.rectify)
    absent = [w is None for w in tensors]
    return dx, query, None if absent[2] else key, value, None if absent[4] else residual, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def forward_flops(x: Any, query: Any, key: Any, value: Any, residual: Any, num_heads: int, *_: Any, **__: Any) -> int:
    """Of shapes, as PyTorch counts: two for a multiplication and an addition."""
    samples, fields, inner = x
    projections = inner * sum(w[1] for w in (query, key, value, residual) if w is not None)
    mixed = num_heads * inner if merges_values(inner, value[1], num_heads) else value[1]
    return int(2 * samples * fields * (projections + fields * (query[1] + mixed)))


def backward_flops(grad: Any, out: Any, *inputs: Any, **options: Any) -> int:
    """Twice the forward's; what is computed again is not counted, as for PyTorch's fused attention."""
    return 2 * forward_flops(*inputs, **options)


register_flop_formula(torch.ops.penstock.field_attention_forward)(forward_flops)
register_flop_formula(torch.ops.penstock.field_attention_backward)(backward_flops)


class _Fields(ctypes.Structure):
    """``Call`` of field_attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gemm", "x", "query", "key", "value", "residual")),
        *(
            (name, ctypes.c_int64)
            for name in ("samples", "fields", "input", "width", "heads", "key_width", "late", "identity", "rectify")
        ),
        ("threads", ctypes.c_int64),
    ]


class _Call:
    """A call of the kernel."""

    def __init__(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        residual: Tensor | None,
        num_heads: int,
        identity: bool,
        rectify: bool,
    ) -> None:
        samples, fields, inner = x.shape
        # Kept, since the structure holds bare addresses.
        self._tensors = [None if w is None else w.contiguous() for w in (x, query, key, value, residual)]
        self._fields = _Fields(
            gemm(),
            *(None if w is None else w.data_ptr() for w in self._tensors),
            *(samples, fields, inner, value.shape[1], num_heads, query.shape[1] // num_heads),
            merges_values(inner, value.shape[1], num_heads),
            identity,
            rectify,
            torch.get_num_threads(),
        )

    def run(self, direction: str, *tensors: Tensor) -> None:
        function = getattr(library("field_attention"), f"field_attention_{direction}")
        if function(ctypes.byref(self._fields), *(ctypes.c_void_p(x.data_ptr()) for x in tensors)):
            raise MemoryError(f"field_attention, {direction}")
