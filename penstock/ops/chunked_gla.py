"""The chunk form of gated linear attention, forward and backward, mostly ordinary matrix products.

Tokens are cut into chunks of C. With b the sum of log gates from a chunk's start on, S the state entering it:

    o = scale (A V + (Q e^b) S),      A_ij = sum_c q_ic k_jc e^(b_ic - b_jc) for i >= j
    S' = e^(b_C) S + (K e^(b_C - b))^T V

With r half of b_C, the factors of A are Q e^(b - r) and K e^(r - b): while those are far from overflow (gentle gates:
nearly always), A is one product, and the same two factors serve the state, as e^r (e^r S + (K e^(r - b))^T V). Otherwise A is put together from smaller blocks (the secondary chunks of sec. 4.3,
here by halving): between the later and the earlier half of a block every exponent, taken from the boundary between
them, is at most zero, so that nothing overflows however strong the decay; blocks in which e^-b is harmless are one
product again. Sums of strong log gates are kept in float64, since small differences of them count.

The backward pass computes all this again from the states that entered the chunks. The gate's gradient needs no
derivative of its own: d b = q dq - k dk (elementwise), plus what reaches a chunk's last token through the state.

Shape legend: B batch, L length, H heads, K key width, V value width, N chunks, C tokens a chunk, M = B N H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from penstock.ops.workspace import workspace

#: Exponents up to this many nats are taken at once: e^60 times anything sensible is far from float32's end.
GENTLE = 60.0
#: A stronger log gate forgets no more in any precision; clamped to it, -inf takes part in sums.
_STRONGEST = -1e4
#: Bytes of one operand that are worked on at a time, so that the next step finds them in the cache.
_SEGMENT_BYTES = 2**20


def chunked(
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
    chunk = chunk_for(q, chunk_size)
    given = (q, k, v, log_gate, *(() if initial_state is None else (initial_state,)))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if bounds is None:
        output, final, _ = gla_forward(q, k, v, log_gate, initial_state, scale, chunk, [0], keep)
        return output, final
    place, starts = whole_chunks(bounds, chunk, q.device)
    q, k, v, log_gate = (spread(x, place, starts[-1] * chunk) for x in (q, k, v, log_gate))
    output, final, _ = gla_forward(q, k, v, log_gate, initial_state, scale, chunk, starts[:-1], keep)
    return output[:, place], final


def chunk_for(q: Tensor, chunk_size: int) -> int:
    """Tokens a chunk: a short sequence does not fill up a long one."""
    return min(chunk_size, max(16, 1 << (q.shape[1] - 1).bit_length()))


def whole_chunks(bounds: list[int], chunk: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Where tokens of packed sequences go so that each has whole chunks, and each sequence's first chunk (and the end)."""
    places, starts = [], [0]
    for a, b in pairwise(bounds):
        places.append(torch.arange(b - a, device=device) + starts[-1] * chunk)
        starts.append(starts[-1] + -(-(b - a) // chunk))
    return torch.cat(places), starts


def spread(x: Tensor, place: Tensor, length: int) -> Tensor:
    """Move (1, L, H, K) to its places; a token added between neither decays nor writes."""
    return x.new_zeros(1, length, *x.shape[2:]).index_copy(1, place, x)


@torch.library.custom_op("penstock::gla_forward", mutates_args=())
def gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk: int,
    starts: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final states, and (if ``keep``) the states that entered each chunk and left the last, (B, N + 1, H, K, V).

    ``starts`` are the chunks at which a sequence begins; with more than one the batch is one.
    """
    room = _Room(q, v, chunk, 7)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = room.new(room.batch, (room.count if keep else min(room.step, room.count)) + 1, *room.state)
    at = states.unbind(1)
    finals = []
    base = 0  # the chunk whose entering state is at[0]
    for a, b in room.segments():
        if not keep and a:
            at[0].copy_(at[a - base])
            base = a
        part = room.part(b - a).load(a, q, k, v, log_gate)
        update, written = part.buffer("update", *room.state[1:])
        torch.bmm(part.k_out.mT, part.v, out=update)
        if part.gentle:
            update.mul_(part.half)
        for n in range(b - a):
            entering = at[a + n - base]
            if a + n in starts:
                if a + n:
                    finals.append(entering.clone())
                _begin(entering, initial_state, starts, a + n)
            torch.addcmul(written[n], part.decays[n], entering, out=at[a + n - base + 1])
        o, _ = part.buffer("out", chunk, v.shape[-1])
        torch.bmm(part.weights(), part.v, out=o)
        entered = part.as_read(states[:, a - base : b - base], update)
        torch.baddbmm(o, part.q_in, entered, beta=scale, alpha=scale, out=o)
        room.write(o, output, a)
    finals.append(at[room.count - base].clone())
    return output, torch.cat(finals), states if keep else states.new_empty(0)


@gla_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk: int,
    starts: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    state = (heads, width, v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = batch if len(starts) == 1 else len(starts)
    kept = (batch, -(-length // chunk) + 1, *state) if keep else (0,)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    return output, q.new_empty(rows, *state, dtype=wide), q.new_empty(kept, dtype=wide)


@torch.library.custom_op("penstock::gla_backward", mutates_args=())
def gla_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    states: Tensor,
    finals: Tensor,
    scale: float,
    chunk: int,
    starts: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log gate and the initial states."""
    room = _Room(q, v, chunk, 13)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_gate)]
    grad_initial = torch.empty_like(finals)
    packed = len(starts) > 1
    ends = [*(start - 1 for start in starts[1:]), room.count - 1]
    carried = torch.zeros_like(states[:, 0])
    for a, b in reversed(list(room.segments())):
        part = room.part(b - a).load(a, q, k, v, log_gate)
        do = part.read("grad", grad_output, a)
        read, reads = part.buffer("read", *room.state[1:])
        torch.baddbmm(read, part.q_in.mT, do, beta=0, alpha=scale, out=read)
        if part.gentle:
            read.mul_(part.half)
        leaving, each = part.buffer("leaving", *room.state[1:])  # gradients of the states that leave the chunks
        left = states[:, a + 1 : b + 1]
        left = left.clone() if packed else left  # what one sequence left, the next one's start has been written over
        each[-1].copy_(carried)
        for n in reversed(range(b - a)):
            if a + n in ends:
                rows = slice(ends.index(a + n), ends.index(a + n) + 1) if packed else slice(None)
                each[n].zero_() if grad_final is None else each[n].copy_(grad_final[rows])
                if packed:
                    left[:, n] = finals[rows]
            before = each[n - 1] if n else carried
            torch.addcmul(reads[n], part.decays[n], each[n], out=before)
            if a + n in starts:
                rows = slice(starts.index(a + n), starts.index(a + n) + 1) if packed else slice(None)
                grad_initial[rows] = before
        last = torch.mul(room.by_chunk(leaving), left, out=room.by_chunk(read)).sum(-1).flatten(0, 2)
        if part.gentle:
            leaving.mul_(part.half)
        weights = part.weights()
        dv, _ = part.buffer("dv", chunk, v.shape[-1])
        torch.bmm(weights.mT, do, out=dv)
        torch.baddbmm(dv, part.k_out, leaving, beta=scale, out=dv)
        d_weights = torch.baddbmm(weights, do, part.v.mT, beta=0, alpha=scale, out=weights)
        dq, dk, db = (part.buffer(name, chunk, q.shape[-1])[0] for name in ("dq", "dk", "db"))
        torch.baddbmm(dq, do, part.as_read(states[:, a:b], read).mT, beta=0, alpha=scale, out=dq)
        torch.bmm(part.v, leaving.mT, out=dk)
        part.backward(d_weights, dq, dk, db)
        db[:, -1] += last
        for target, source in _cumulative(db, reverse=True):
            target.add_(source)
        for grad, value in zip(grads, (dq, dk, dv, db), strict=True):
            room.write(value, grad, a)
    return (*grads, grad_initial)  # type: ignore[return-value]


@gla_backward.register_fake
def _(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    states: Tensor,
    finals: Tensor,
    scale: float,
    chunk: int,
    starts: list[int],
) -> tuple[Tensor, ...]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_gate)]
    return (*like, torch.empty_like(finals))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_gate, initial_state, ctx.scale, ctx.chunk, ctx.starts, _ = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, log_gate, output[2], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_gate, states, finals = ctx.saved_tensors
    grad_output = torch.zeros_like(v) if grad_output is None else grad_output
    *grads, initial = gla_backward(
        grad_output, grad_final, q, k, v, log_gate, states, finals, ctx.scale, ctx.chunk, ctx.starts
    )
    return (*grads, None if ctx.initial_dtype is None else initial.to(ctx.initial_dtype), *[None] * 4)


gla_forward.register_autograd(_backward, setup_context=_setup)


def forward_flops(
    q: Any, k: Any, v: Any, log_gate: Any, initial: Any, scale: Any, chunk: int, *_: Any, **__: Any
) -> int:
    batch, length, heads, width = q
    return batch * length * heads * 2 * (chunk * (width + v[-1]) + 2 * width * v[-1])


def backward_flops(
    grad: Any, final: Any, q: Any, k: Any, v: Any, log_gate: Any, states: Any, finals: Any, scale: Any, chunk: int, *_: Any, **__: Any
) -> int:  # fmt: skip
    batch, length, heads, width = q
    return batch * length * heads * 2 * (chunk * (3 * width + 2 * v[-1]) + 4 * width * v[-1])


register_flop_formula(torch.ops.penstock.gla_forward)(forward_flops)
register_flop_formula(torch.ops.penstock.gla_backward)(backward_flops)


class _Room:
    """The sizes of a call, and buffers that all its segments share."""

    def __init__(self, q: Tensor, v: Tensor, chunk: int, buffers: int) -> None:
        self.batch, self.length, self.heads, width = q.shape
        self.state = (self.heads, width, v.shape[-1])
        self.chunk, self.count = chunk, -(-self.length // chunk)
        self.dtype, self.device = torch.promote_types(q.dtype, torch.float32), q.device
        rows = self.batch * self.heads
        self.step = max(1, _SEGMENT_BYTES // (4 * rows * chunk * max(width, v.shape[-1])))
        self.size = rows * min(self.step, max(self.count, 1)) * max(chunk, width) * max(chunk, width, v.shape[-1])
        self.memory = workspace(buffers * self.size, self.dtype, self.device)
        self.triangle = torch.ones(chunk, chunk, dtype=self.dtype, device=self.device).tril_()
        self._parts: dict[int, _Part] = {}

    def new(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that fit the cache; the last chunk, if not full, is on its own."""
        whole = self.length // self.chunk
        yield from ((a, min(a + self.step, whole)) for a in range(0, whole, self.step))
        if whole < self.count:
            yield whole, self.count

    def part(self, count: int) -> _Part:
        """The workplace for ``count`` chunks; segments of one length share it and its views."""
        if count not in self._parts:
            self._parts[count] = _Part(self, count)
        return self._parts[count]

    def by_chunk(self, x: Tensor) -> Tensor:
        """(M, ...) as (B, N, H, ...)."""
        return x.view(self.batch, -1, self.heads, *x.shape[1:])

    def chunks_of(self, x: Tensor, a: int, count: int) -> Tensor:
        """Some chunks of (B, L, H, K) from number a on, as (B, N, H, C, K): a view, or a copy filled up with zeros."""
        part = x[:, a * self.chunk : (a + count) * self.chunk]
        missing = count * self.chunk - part.shape[1]
        if missing:
            part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, missing))
        return part.unflatten(1, (count, self.chunk)).transpose(2, 3)

    def write(self, x: Tensor, out: Tensor, a: int) -> None:
        """Put (M, C, K) into (B, L, H, K) from chunk a on, without what fills up the last one."""
        tokens = self.by_chunk(x).transpose(2, 3)
        target = out[:, a * self.chunk : (a + tokens.shape[1]) * self.chunk]
        if target.shape[1] == tokens.shape[1] * self.chunk:
            target.unflatten(1, (-1, self.chunk)).copy_(tokens)
        else:
            target.copy_(tokens[:, 0, : target.shape[1]])


class _Part:
    """Some consecutive chunks, ready for products; tensors are (M, C, K or V) in float32 at least.

    Attributes:
        gentle: whether one factor for each of q and k serves all.
        v: values.
        q_in: queries as they read the state that enters the chunk.
        k_out: keys as they write into the state that leaves it.
        scale: what ``q_in`` is beside q: e^b, or if ``gentle`` e^(b - r).
        half: (M, K, 1), e^r; if ``gentle``, both what is read from the state and what is written to it lack it.
        decays: (B, H, K, 1) for each chunk: e^(b_C), from its start to its end.
    """

    gentle: bool

    def __init__(self, room: _Room, count: int) -> None:
        self.room, self.count = room, count
        self.rows = room.batch * count * room.heads
        self._buffers: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        _, width, values = room.state
        self.scale, self.q_in, self.k_out = (self.buffer(name, room.chunk, width)[0] for name in ("b", "q", "k"))
        self.v = self.buffer("v", room.chunk, values)[0]
        self._map = self.buffer("map", room.chunk, room.chunk)[0]
        self._sums = _cumulative(self.scale)
        self.half = self.scale[:, -1, :, None]
        self._decay = torch.empty_like(self.half)
        self.decays = self._decay.unflatten(0, (room.batch, count, room.heads)).unbind(1)
        self.levels: list[_Level] = []

    def buffer(self, name: str, *shape: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The buffer of this name as (M, *shape), and its view for each chunk, (B, H, *shape); its content is what was there."""
        if name not in self._buffers:
            place = len(self._buffers) * self.room.size
            flat = self.room.memory[place : place + self.rows * shape[0] * shape[1]].view(self.rows, *shape)
            self._buffers[name] = (flat, self.room.by_chunk(flat).unbind(1))
        return self._buffers[name]

    def read(self, name: str, x: Tensor, a: int) -> Tensor:
        """The chunks from number a on of (B, L, H, K), in the buffer ``name``."""
        out, _ = self.buffer(name, self.room.chunk, x.shape[-1])
        self.room.by_chunk(out).copy_(self.room.chunks_of(x, a, self.count))
        return out

    def load(self, a: int, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> _Part:
        """Get ready for the chunks from number a on."""
        room = self.room
        self.read("b", log_gate, a)
        for target, source in self._sums:
            target.add_(source)
        self.read("v", v, a)
        q, k = room.chunks_of(q, a, self.count), room.chunks_of(k, a, self.count)
        self.gentle = float(self.scale[:, -1].amin()) >= -2 * GENTLE
        if self.gentle:
            self.scale.sub_(self.scale[:, -1:] * 0.5).exp_()
            torch.mul(self.half, self.half, out=self._decay)
            scale = room.by_chunk(self.scale)
            torch.mul(q, scale, out=room.by_chunk(self.q_in))
            torch.div(k, scale, out=room.by_chunk(self.k_out))
            return self
        self.q, self.k = (x.to(room.dtype).flatten(0, 2) for x in (q, k))
        exact = room.chunks_of(log_gate, a, self.count).flatten(0, 2).to(torch.float64, copy=True)
        exact.clamp_(min=_STRONGEST)
        for target, source in _cumulative(exact):
            target.add_(source)
        torch.exp(exact.to(room.dtype), out=self.scale)
        self._decay.copy_(self.scale[:, -1, :, None])
        self.rest = (exact[:, -1:] - exact).to(room.dtype).exp()
        torch.mul(self.q, self.scale, out=self.q_in)
        torch.mul(self.k, self.rest, out=self.k_out)
        self.levels = list(_levels(self.q, self.k, exact))
        return self

    def as_read(self, states: Tensor, out: Tensor) -> Tensor:
        """(B, N, H, K, V) states that entered the chunks as ``q_in`` meets them, (M, K, V); ``out`` may be written over."""
        if not self.gentle:
            return states.flatten(0, 2)
        half = self.half.unflatten(0, states.shape[:3])
        torch.mul(states, half, out=self.room.by_chunk(out))
        return out

    def weights(self) -> Tensor:
        """The map within each chunk, (M, C, C), lower triangular."""
        whole = self._map
        if self.gentle:
            return torch.bmm(self.q_in, self.k_out.mT, out=whole).tril_()  # above, the product may overflow
        whole.zero_()
        for level in self.levels:
            block = torch.bmm(level.q.flatten(0, 1), level.k.flatten(0, 1).mT)
            if not level.half:
                block.mul_(self.room.triangle[: level.size, : level.size])
            level.blocks(whole).copy_(block.unflatten(0, (self.rows, -1)))
        return whole

    def backward(self, d_weights: Tensor, dq: Tensor, dk: Tensor, db: Tensor) -> None:
        """From the gradients of ``q_in`` and ``k_out`` to those of q and k, adding what the map says, and of b."""
        if self.gentle:
            d_weights.mul_(self.room.triangle)
            torch.baddbmm(dq, d_weights, self.k_out, out=dq)
            torch.baddbmm(dk, d_weights.mT, self.q_in, out=dk)
            torch.mul(self.q_in, dq, out=db).addcmul_(self.k_out, dk, value=-1)
            dq.mul_(self.scale)
            dk.div_(self.scale)
            return
        dq.mul_(self.scale)
        dk.mul_(self.rest)
        for level in self.levels:
            block = level.blocks(d_weights).flatten(0, 1)
            if not level.half:
                block = block * self.room.triangle[: level.size, : level.size]
            shape = (self.rows, -1)
            level.rows(dq).addcmul_(torch.bmm(block, level.k.flatten(0, 1)).unflatten(0, shape), level.q_scale)
            level.columns(dk).addcmul_(torch.bmm(block.mT, level.q.flatten(0, 1)).unflatten(0, shape), level.k_scale)
        torch.mul(self.q, dq, out=db).addcmul_(self.k, dk, value=-1)


@dataclass
class _Level:
    """Equal blocks along the diagonal of a chunk's map, as products of two factors (M, blocks, rows, K).

    Attributes:
        size: tokens a block.
        half: where rows begin and columns end; 0: both are the whole block, of which the lower triangle counts.
        q, k: the factors; q_scale, k_scale: what they are beside queries and keys.
    """

    size: int
    half: int
    q: Tensor
    k: Tensor
    q_scale: Tensor
    k_scale: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The part of (M, C, K) that the rows are, a view."""
        return x.unflatten(1, (-1, self.size))[:, :, self.half :]

    def columns(self, x: Tensor) -> Tensor:
        """The part of (M, C, K) that the columns are, a view."""
        return x.unflatten(1, (-1, self.size))[:, :, : self.half or self.size]

    def blocks(self, weights: Tensor) -> Tensor:
        """The blocks of a map (M, C, C): (M, blocks, rows, columns), a view."""
        count = weights.shape[1] // self.size
        tiles = weights.unflatten(2, (count, -1)).unflatten(1, (count, -1)).diagonal(0, 1, 3).movedim(-1, 1)
        return tiles[:, :, self.half :, : self.half or self.size]


def _levels(q: Tensor, k: Tensor, total: Tensor) -> Iterator[_Level]:
    """Halve blocks until e^-b is harmless within each (at one token it always is)."""
    size = q.shape[1]
    while True:
        blocks = total.unflatten(1, (-1, size))
        harmless = size == 1 or float((blocks[:, :, 0] - blocks[:, :, -1]).amax()) <= GENTLE
        half = 0 if harmless else size // 2
        edge = blocks[:, :, :1] if harmless else blocks[:, :, half - 1 : half]
        q_scale = (blocks[:, :, half:] - edge).to(q.dtype).exp_()
        k_scale = (edge - blocks[:, :, : half or size]).to(q.dtype).exp_()
        level = _Level(size, half, q, k, q_scale, k_scale)
        level.q, level.k = level.rows(q) * q_scale, level.columns(k) * k_scale
        yield level
        if harmless:
            return
        size = half


def _begin(state: Tensor, initial_state: Tensor | None, starts: list[int], at: int) -> None:
    """Write the state with which the sequence that starts at chunk ``at`` begins."""
    if initial_state is None:
        state.zero_()
    elif len(starts) == 1:
        state.copy_(initial_state)
    else:
        state.copy_(initial_state[starts.index(at)][None])


def _cumulative(x: Tensor, *, reverse: bool = False) -> list[tuple[Tensor, Tensor]]:
    """The additions, target += source in this order, that turn (M, C, K) into its cumulative sums over C, a power of two.

    Two levels of about sqrt(C) steps over whole slices: PyTorch's cumsum over such an axis is several times slower.
    """
    inner = 1 << (x.shape[1].bit_length() - 1) // 2
    rows = x.unflatten(1, (-1, inner))
    within = rows.unbind(2)[:: -1 if reverse else 1]
    ends = within[-1].unbind(1)[:: -1 if reverse else 1]
    steps = [(target, source) for source, target in (*pairwise(within), *pairwise(ends))]
    if reverse:
        return [*steps, (rows[:, :-1, 1:], rows[:, 1:, :1])]
    return [*steps, (rows[:, 1:, :-1], rows[:, :-1, -1:])]
