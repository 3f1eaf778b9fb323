"""The engine under block-sparse and pyramid attention: each block of queries meets a list of small runs of keys.

Keys and values lie in *units*, runs of equally many tokens; a block of queries has a list of units. Blocks with lists
of about the same length are taken together: their units are gathered, and what follows is two matrix products and a
softmax over just those keys. The cost follows the lists. The backward pass computes the weights again.

Shape legend: B batch, H heads, G key/value heads, L query length, K head width, M query blocks of m queries,
R = B H M of them in all, U units of u tokens, E entries of all lists.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from penstock.ops.native import gemm, library
from penstock.ops.workspace import workspace

#: Bytes of gathered keys, values and weights that one group of blocks works on.
_GROUP_BYTES = 3 * 2**20
#: Lists may be this much longer than the shortest of their group, which is filled up.
_UNEVEN = 1.06
#: Where the last token of a unit that nobody may see is said to be.
NOWHERE = 2**62


@torch.library.custom_op("penstock::tile_attention", mutates_args=())
def tile_attention(
    q: Tensor,
    k_units: Tensor,
    v_units: Tensor,
    entries: Tensor,
    counts: Tensor,
    last: Tensor,
    bias: Tensor,
    block: int,
    causal: bool,
    scale: float,
    native: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of blocks of queries over their lists of units.

    Args:
        q: (B, H, L, K).
        k_units, v_units: (B, G, U, u, K).
        entries: (E,) int64, the lists one after the other; within a list, units that need a mask (below) stand last.
        counts: (R,) int64, how long each list is, at least 1.
        last: (U, u) int64, the position from which on a token may be seen; `NOWHERE`: never.
        bias: (U,) added to the scores of a unit's tokens.
        block: queries a block, m.
        causal: whether ``last`` is compared with the query's position; else only `NOWHERE` hides a token.
        scale: of the scores.
        native: whether the kernel in C runs (float32 on the CPU, see `penstock.ops.native.can_run`).

    Returns:
        (B, H, L, K), zeros for a query that sees nothing; and what the native backward pass needs.
    """
    if native:
        call = _Native(q, k_units, v_units, entries, counts, last, bias, block, causal, scale)
        return call.forward()
    plan = _Plan(q, k_units, v_units, entries, counts, last, bias, block, causal, scale, buffers=4)
    queries = plan.rows_of(q)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for group in plan.groups():
        weights = group.weights(group.take("queries", queries))
        result = group.buffer("queries", block, q.shape[-1])
        torch.bmm(weights, group.gather("values", plan.v_units), out=result)
        out.index_copy_(0, group.rows, result)
    return plan.like(out, q), q.new_empty(0)


@tile_attention.register_fake
def _(
    q: Tensor,
    k_units: Tensor,
    v_units: Tensor,
    entries: Tensor,
    counts: Tensor,
    last: Tensor,
    bias: Tensor,
    block: int,
    causal: bool,
    scale: float,
    native: bool,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3] if native else (0,))


@torch.library.custom_op("penstock::tile_attention_backward", mutates_args=())
def tile_attention_backward(
    grad: Tensor,
    out: Tensor,
    norm: Tensor,
    q: Tensor,
    k_units: Tensor,
    v_units: Tensor,
    entries: Tensor,
    counts: Tensor,
    last: Tensor,
    bias: Tensor,
    block: int,
    causal: bool,
    scale: float,
    native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of the units."""
    if native:
        call = _Native(q, k_units, v_units, entries, counts, last, bias, block, causal, scale)
        return call.backward(out, norm, grad.contiguous())
    plan = _Plan(q, k_units, v_units, entries, counts, last, bias, block, causal, scale, buffers=7)
    queries, grads = plan.rows_of(q), plan.rows_of(grad)
    dq = torch.empty_like(queries, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(plan.k_units), torch.zeros_like(plan.v_units)
    for group in plan.groups():
        here, do = group.take("queries", queries), group.take("grads", grads)
        weights = group.weights(here)
        written = group.buffer("written", group.tokens, q.shape[-1])
        dv.index_add_(0, group.units, torch.bmm(weights.mT, do, out=written).view(-1, *dv.shape[1:]))
        d_scores = group.buffer("d_scores", block, group.tokens)
        torch.bmm(do, group.gather("values", plan.v_units).mT, out=d_scores)
        torch._softmax_backward_data(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
        torch.baddbmm(written, d_scores.mT, here, beta=0, alpha=scale, out=written)
        dk.index_add_(0, group.units, written.view(-1, *dk.shape[1:]))
        torch.baddbmm(do, d_scores, group.gather("keys", plan.k_units), beta=0, alpha=scale, out=do)
        dq.index_copy_(0, group.rows, do)
    return plan.like(dq, q), dk.view(k_units.shape), dv.view(v_units.shape)


@tile_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, norm: Tensor, q: Tensor, k_units: Tensor, v_units: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k_units, v_units))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.causal, ctx.scale, ctx.native = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    settings = (ctx.block, ctx.causal, ctx.scale, ctx.native)
    return (*tile_attention_backward(grad, *ctx.saved_tensors, *settings), *[None] * 8)


tile_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.penstock.tile_attention, get_raw=True)
def _flops(
    q: Tensor, k_units: Tensor, v: Any, entries: Tensor, counts: Any, last: Any, bias: Any, block: int, *_: Any, out_val: Any = None, **__: Any
) -> int:  # fmt: skip
    return 4 * entries.numel() * k_units.shape[3] * k_units.shape[4] * block


@register_flop_formula(torch.ops.penstock.tile_attention_backward, get_raw=True)
def _backward_flops(
    grad: Any, out: Any, norm: Any, q: Any, k_units: Tensor, v: Any, entries: Tensor, counts: Any, last: Any, bias: Any, block: int, *_: Any, out_val: Any = None, **__: Any
) -> int:  # fmt: skip
    return 10 * entries.numel() * k_units.shape[3] * k_units.shape[4] * block


class _Call(ctypes.Structure):
    """``Call`` of tile_attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gemm", "q", "k", "v", "entries", "ends", "masked", "last", "bias")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "groups", "length", "width", "units", "size", "block", "causal", "threads")
        ),
        ("scale", ctypes.c_float),
    ]


class _Native:
    """A call of the kernel in C."""

    def __init__(
        self,
        q: Tensor,
        k_units: Tensor,
        v_units: Tensor,
        entries: Tensor,
        counts: Tensor,
        last: Tensor,
        bias: Tensor,
        block: int,
        causal: bool,
        scale: float,
    ) -> None:
        batch, heads, length, width = q.shape
        groups, units, size = k_units.shape[1:4]
        masked, _ = _sight(entries, counts, last, -(-length // block), block, causal)
        # Kept, since the structure holds bare addresses.
        self.q, self.k, self.v = q.contiguous(), k_units.contiguous(), v_units.contiguous()
        self._tensors = [entries.contiguous(), counts.cumsum(0), masked, last.contiguous()]
        if bool(bias.any()):
            self._tensors.append(bias.float().contiguous())
        kept = [x.data_ptr() for x in (self.q, self.k, self.v, *self._tensors)]
        addresses = (gemm(), *kept, *[None] * (8 - len(kept)))
        sizes = (batch, heads, groups, length, width, units, size, block, causal, torch.get_num_threads())
        self._call = _Call(*addresses, *sizes, scale)

    def forward(self) -> tuple[Tensor, Tensor]:
        out, norm = torch.empty_like(self.q), self.q.new_empty(self.q.shape[:3])
        self._run("forward", out, norm)
        return out, norm

    def backward(self, out: Tensor, norm: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        self._run("backward", out, norm, grad, dq, dk, dv)
        return dq, dk, dv

    def _run(self, direction: str, *tensors: Tensor) -> None:
        function = getattr(library("tile_attention"), f"tile_attention_{direction}")
        if function(ctypes.byref(self._call), *(ctypes.c_void_p(x.data_ptr()) for x in tensors)):
            raise MemoryError(f"tile_attention {direction}")


def _sight(
    entries: Tensor, counts: Tensor, last: Tensor, per_head: int, block: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """How many units of each list need a mask, and whether some query of the block may see nothing: (R,) both."""
    row = torch.arange(len(counts), device=counts.device)
    # A unit needs a mask where one of its tokens is hidden from the block's first query; a query may see nothing
    # where no token of the block's list is there for the first one.
    horizon = row % per_head * block if causal else torch.full_like(row, NOWHERE - 1)
    owner = torch.repeat_interleave(row, counts)
    hidden = last.amax(1)[entries] > horizon[owner]
    masked = torch.zeros_like(counts).index_add_(0, owner, hidden.to(counts.dtype))
    seen_from = torch.full_like(counts, NOWHERE).scatter_reduce(0, owner, last.amin(1)[entries], "amin")
    return masked, seen_from > horizon


class _Plan:
    """The lists of a call; blocks of queries are worked through in the order of the length of their lists."""

    def __init__(
        self,
        q: Tensor,
        k_units: Tensor,
        v_units: Tensor,
        entries: Tensor,
        counts: Tensor,
        last: Tensor,
        bias: Tensor,
        block: int,
        causal: bool,
        scale: float,
        *,
        buffers: int,
    ) -> None:
        _, heads, length, width = q.shape
        groups, units, size = k_units.shape[1:4]
        self.block, self.causal, self.scale, self.size, self.last = block, causal, scale, size, last
        self.per_head = -(-length // block)
        self.k_units, self.v_units = k_units.flatten(0, 2).contiguous(), v_units.flatten(0, 2).contiguous()
        self.entries = entries
        self.bias = bias.to(q.dtype) if bool(bias.any()) else None
        row = torch.arange(len(counts), device=q.device)
        first_query, owner = row % self.per_head * block, torch.repeat_interleave(row, counts)
        masked, blind = _sight(entries, counts, last, self.per_head, block, causal)
        # Head by head, so that its keys and values stay in the cache.
        head = row // self.per_head
        self.order = (head * (units + 1) + counts).argsort()
        self.counts, self.masked, self.blind = (x[self.order].tolist() for x in (counts, masked, blind))
        self.ends = counts.cumsum(0)[self.order]
        self.heads = head[self.order].tolist()
        self.units = entries + ((head // heads * groups + head % heads // (heads // groups)) * units)[owner]
        # Where every block meets its one diagonal tile alike, as with square tiles, all share one barrier.
        ahead = last[entries[self.ends - 1]] - first_query[self.order, None]
        alike = causal and set(self.masked) == {1} and bool((ahead == ahead[:1]).all())
        self.barrier = self.hide(self.order[:1], self.ends[:1, None] - 1).to(q.dtype) if alike else None
        self.block_bytes = (2 * size * width + block * size) * q.element_size()  # of one block of queries and one unit
        self.largest = max(_GROUP_BYTES, max(self.counts, default=1) * self.block_bytes) // q.element_size()
        self.memory = workspace(buffers * self.largest, q.dtype, q.device)

    def hide(self, rows: Tensor, place: Tensor) -> Tensor:
        """Minus infinity where a query of these blocks may not see a token of these entries, else zero."""
        last = self.last[self.entries[place]].flatten(1)[:, None]
        if self.causal:
            first = rows % self.per_head * self.block
            hidden = last - first[:, None, None] > torch.arange(self.block, device=last.device)[:, None]
        else:
            hidden = last == NOWHERE
        return torch.zeros(hidden.shape, device=last.device).masked_fill_(hidden, -math.inf)

    def rows_of(self, x: Tensor) -> Tensor:
        """(B, H, L, K) as (R, m, K), filled up with zeros."""
        missing = self.per_head * self.block - x.shape[2]
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(-1, self.block, x.shape[-1])

    def like(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inverse of `rows_of`, in the shape of ``x``."""
        return rows.view(*x.shape[:2], -1, x.shape[-1])[:, :, : x.shape[2]].contiguous()

    def groups(self) -> Iterator[_Group]:
        """Blocks with lists of similar length together, as many as fit the cache."""
        begin, total = 0, len(self.counts)
        while begin < total:
            end = begin + 1
            while end < total:
                longest = self.counts[end]
                fits = (end + 1 - begin) * longest * self.block_bytes <= _GROUP_BYTES
                if not fits or longest > _UNEVEN * self.counts[begin] or self.heads[end] != self.heads[begin]:
                    break
                end += 1
            yield _Group(self, begin, end)
            begin = end


class _Group:
    """Blocks of queries begin to end in the order of the work; their lists are aligned at the ends."""

    def __init__(self, plan: _Plan, begin: int, end: int) -> None:
        self.plan, self.at, self.number = plan, slice(begin, end), end - begin
        self.rows = plan.order[self.at]
        self.shortest, self.longest = plan.counts[begin], plan.counts[end - 1]
        self.tokens = self.longest * plan.size
        reach = torch.arange(-self.longest, 0, device=plan.ends.device)
        self.place = plan.ends[self.at, None] + reach
        if self.longest > self.shortest:
            self.place.clamp_(min=0)
        self.units = plan.units[self.place].flatten()
        self._names: list[str] = []

    def buffer(self, name: str, *shape: int) -> Tensor:
        """(blocks of queries, *shape) in the workspace, its content what was there."""
        if name not in self._names:
            self._names.append(name)
        start = self._names.index(name) * self.plan.largest
        return self.plan.memory[start : start + self.number * shape[0] * shape[1]].view(self.number, *shape)

    def take(self, name: str, rows: Tensor) -> Tensor:
        """These blocks of (R, m, K)."""
        out = self.buffer(name, *rows.shape[1:])
        return torch.index_select(rows, 0, self.rows, out=out)

    def gather(self, name: str, units: Tensor) -> Tensor:
        """The lists' keys or values, (blocks of queries, tokens, K)."""
        out = self.buffer(name, self.tokens, units.shape[-1])
        torch.index_select(units, 0, self.units, out=out.view(-1, *units.shape[1:]))
        return out

    def weights(self, queries: Tensor) -> Tensor:
        """The softmax over each list, (blocks of queries, m, tokens)."""
        plan = self.plan
        scores = self.buffer("weights", plan.block, self.tokens)
        torch.baddbmm(scores, queries, self.gather("keys", plan.k_units).mT, beta=0, alpha=plan.scale, out=scores)
        if plan.bias is not None:
            scores += plan.bias[plan.entries[self.place]].repeat_interleave(plan.size, 1)[:, None]
        if self.longest > self.shortest:
            unused = self.longest - torch.tensor(plan.counts[self.at], device=scores.device)
            place = torch.arange(self.longest - self.shortest, device=scores.device).repeat_interleave(plan.size)
            scores[:, :, : len(place)].masked_fill_((place < unused[:, None])[:, None], -math.inf)
        if masked := max(plan.masked[self.at]):
            # Added, since filling by a broadcast mask is several times slower.
            barrier = self._barrier(masked).to(scores.dtype) if plan.barrier is None else plan.barrier
            scores[:, :, self.tokens - masked * plan.size :].add_(barrier)
        blind = scores.amax(-1, keepdim=True) == -math.inf if any(plan.blind[self.at]) else None
        torch._softmax(scores, -1, False, out=scores)
        return scores if blind is None else scores.masked_fill_(blind, 0.0)

    def _barrier(self, masked: int) -> Tensor:
        """Minus infinity where a query may not see a token of the last units, else zero; (blocks, m, tokens)."""
        return self.plan.hide(self.rows, self.place[:, self.longest - masked :])
