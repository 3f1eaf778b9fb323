"""Softmax attention over part of the attention map: tiles kept or skipped, or seen at a coarser resolution.

The map is cut into tiles of ``block_size`` queries by ``block_size`` keys. Block-sparse attention keeps some tiles;
pyramid attention gives each a level l: 1 is full resolution, 2, 4 or 8 averages that many neighbouring keys and
values into one, which then counts l times in the softmax, and 0 skips the tile.

Shape legend: B batch, H heads, G key/value heads, L query length, T key length, K head width, M query blocks,
N key blocks.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.ops.dispatch import choose
from penstock.ops.flex_tiles import flex_tiles
from penstock.ops.native import can_run
from penstock.ops.tile_attention import NOWHERE, tile_attention

BlockSize = int | tuple[int, int]
Backend = Literal["reference", "gather", "native", "flex"]
#: Resolutions of a tile, 0 being none.
LEVELS = (0, 1, 2, 4, 8)


def block_sparse_attention(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    block_mask: Tensor,
    *,
    block_size: BlockSize = 64,
    causal: bool = True,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Softmax attention over the keys of the tiles that ``block_mask`` keeps; the cost follows the kept tiles.

    Args:
        q_BHLK: queries.
        k_BGTK, v_BGTK: keys and values; G divides H, T equals L if causal.
        block_mask: bool (M, N), (H, M, N) or (B, H, M, N), M = ceil(L / block of queries), N = ceil(T / block of keys).
        block_size: of queries and keys, one number or two.
        causal: a query sees no later key; kept tiles wholly in the future have no effect.
        scale: of the scores, default K^-1/2.
        backend: "reference" is the definition, under a dense mask; "native" a kernel in C (float32 on the CPU, needs
            a C compiler), "gather" the same in PyTorch; "flex" is FlexAttention. Default: "flex" on CUDA for blocks
            of whole 128s, else "native" where it can run, else "gather".

    Returns:
        (B, H, L, K).

    Raises:
        ValueError: if shapes do not fit, or a block of queries keeps no tile.
    """
    check_tiles(q_BHLK, k_BGTK, v_BGTK, block_mask, block_size, causal)
    form = _form("block_sparse_attention", backend, q_BHLK, block_size)
    if form in ("reference", "flex"):
        attend = reference_pyramid_attention if form == "reference" else _flex
        return attend(q_BHLK, k_BGTK, v_BGTK, block_mask.bool(), block_size, causal, scale)
    return _listed(q_BHLK, k_BGTK, v_BGTK, block_mask.bool(), block_size, causal, scale, native=form == "native")


def pyramid_attention(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    levels: Tensor,
    *,
    block_size: BlockSize = 128,
    causal: bool = False,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Softmax attention in which each tile is seen at its own resolution.

    Keys and values are padded to whole blocks by repeating the last token; averages may hold copies of it, full
    resolution does not see them. An averaged token is visible to the queries from its last member on, if causal.

    Args:
        q_BHLK, k_BGTK, v_BGTK, block_size, causal, scale, backend: see `block_sparse_attention`; the block of keys is
            a multiple of 8.
        levels: integers (M, N), (H, M, N) or (B, H, M, N), each 0 (skipped), 1, 2, 4 or 8.

    Returns:
        (B, H, L, K); a query that sees no key at all gets zeros.

    Raises:
        ValueError: if shapes do not fit, a level is none of these, or a block of queries has no tile.

    Source: PSA (Li et al. 2025), sec. 3.
    """
    check_tiles(q_BHLK, k_BGTK, v_BGTK, levels, block_size, causal)
    form = _form("pyramid_attention", backend, q_BHLK, block_size)
    if form in ("reference", "flex"):
        attend = reference_pyramid_attention if form == "reference" else _flex
        return attend(q_BHLK, k_BGTK, v_BGTK, levels, block_size, causal, scale)
    return _listed(q_BHLK, k_BGTK, v_BGTK, levels, block_size, causal, scale, native=form == "native")


def pooled_attention_map(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    *,
    block_size: BlockSize = 64,
    pool: Literal["max", "mean", "sum"] = "max",
    causal: bool = True,
    scale: float | None = None,
    backend: Literal["rows", "triton"] | None = None,
) -> Tensor:
    """The attention map pooled over tiles, without ever holding the map: what SeerAttention's gates learn.

    Args:
        q_BHLK, k_BGTK, block_size, causal, scale: see `block_sparse_attention`.
        pool: over the probabilities of a tile. SeerAttention takes the maximum.
        backend: "rows" takes one block of queries at a time; "triton" (CUDA) keeps nothing but the result. Default:
            "triton" on CUDA where installed.

    Returns:
        (B, H, M, N) in float32 at least, not normalised; no gradient. Of the map itself there is never more than one
        block of queries.

    Raises:
        ValueError: for an unknown ``pool`` or backend.

    Source: SeerAttention (Gao et al. 2024), sec. 3.2.
    """
    if pool not in ("max", "mean", "sum"):
        raise ValueError(f"pool={pool!r} must be 'max', 'mean' or 'sum'")
    size_q, size_k = _sizes(block_size)
    form = choose("pooled_attention_map", backend, ("rows", "triton"), lambda: _pooling(q_BHLK))
    if form == "triton":
        from penstock.ops.triton_pooled_map import triton_pooled_map

        factor = q_BHLK.shape[-1] ** -0.5 if scale is None else scale
        sizes, largest = (size_q, size_k), pool == "max"
        pooled = triton_pooled_map(q_BHLK, k_BGTK, sizes, largest=largest, causal=causal, scale=factor)
        return pooled / (size_q * size_k) if pool == "mean" else pooled
    (batch, heads, length, width), groups, total = q_BHLK.shape, k_BGTK.shape[1], k_BGTK.shape[2]
    wide = torch.promote_types(q_BHLK.dtype, torch.float32)
    q = q_BHLK.detach() * (width**-0.5 if scale is None else scale)
    shape = (batch, heads, math.ceil(length / size_q), math.ceil(total / size_k))
    pooled = q.new_zeros(shape, dtype=wide)
    for number in range(shape[2]):
        first = number * size_q
        rows = q[:, :, first : first + size_q]
        seen = min(total, first + rows.shape[2]) if causal else total
        # Heads that share keys are taken as further rows: (B, G, H/G m, seen).
        keys = k_BGTK.detach()[:, :, :seen].mT
        scores = (rows.unflatten(1, (groups, -1)).flatten(2, 3) @ keys).to(wide).view(batch, heads, -1, seen)
        if causal:
            corner = scores[..., first:]
            future = torch.ones(corner.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            corner.masked_fill_(future, -math.inf)
        weights = F.pad(scores.softmax(-1), (0, -seen % size_k)).unflatten(-1, (-1, size_k))
        part = weights.amax(-1).amax(-2) if pool == "max" else weights.sum((-3, -1))
        pooled[:, :, number, : part.shape[-1]] = part
    return pooled / (size_q * size_k) if pool == "mean" else pooled


def _pooling(q: Tensor) -> Literal["rows", "triton"]:
    there = q.is_cuda and q.dtype != torch.float64 and find_spec("triton") is not None
    return "triton" if there else "rows"


def attention_probabilities(q_BHLK: Tensor, k_BGTK: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """The whole attention map (B, H, L, T), for reference."""
    k_BHTK = k_BGTK.repeat_interleave(q_BHLK.shape[1] // k_BGTK.shape[1], 1)
    scores = (q_BHLK @ k_BHTK.mT).mul(q_BHLK.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def pool_keys(x_BGTK: Tensor, block: int, level: int) -> Tensor:
    """Means over ``level`` consecutive tokens, after repeating the last token up to whole blocks."""
    missing = -x_BGTK.shape[2] % block
    padded = torch.cat([x_BGTK, x_BGTK[:, :, -1:].expand(-1, -1, missing, -1)], 2) if missing else x_BGTK
    return padded if level == 1 else padded.unflatten(2, (-1, level)).mean(3)


def _present(levels: Tensor) -> list[int]:
    """The levels that some tile has, and 1 in any case; of a binary map 1 alone."""
    if levels.dtype == torch.bool:
        return [1]
    if torch.compiler.is_exporting():
        return list(LEVELS[1:])
    return [level for level in LEVELS[1:] if level == 1 or bool((levels == level).any())]


def reference_pyramid_attention(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    levels: Tensor,
    block_size: BlockSize,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """The definition: all levels side by side under one dense mask; memory L x 1.9 T."""
    size_q, size_k = _sizes(block_size)
    (batch, heads, length, width), groups, total = q_BHLK.shape, k_BGTK.shape[1], k_BGTK.shape[2]
    levels = levels.expand(batch, heads, -1, -1)
    per_query = levels.repeat_interleave(size_q, 2)[:, :, :length]
    at = torch.arange(length, device=q_BHLK.device)[:, None]
    keys, values, biases = [], [], []
    for level in _present(levels):
        keys.append(pool_keys(k_BGTK, size_k, level))
        values.append(pool_keys(v_BGTK, size_k, level))
        chosen = (per_query == level).repeat_interleave(size_k // level, 3)
        last = torch.arange(chosen.shape[-1], device=q_BHLK.device) * level + level - 1
        if level == 1:
            chosen = chosen & (last < total)
        if causal:
            chosen = chosen & (last <= at)
        bias = torch.full(chosen.shape, math.log(level), dtype=q_BHLK.dtype, device=q_BHLK.device)
        biases.append(bias.masked_fill(~chosen, -math.inf))
    repeat = heads // groups
    k = torch.cat(keys, 2).repeat_interleave(repeat, 1)
    v = torch.cat(values, 2).repeat_interleave(repeat, 1)
    bias = torch.cat(biases, 3)
    scores = q_BHLK @ k.mT * (width**-0.5 if scale is None else scale) + bias
    blind = bias.amax(-1, keepdim=True) == -math.inf
    weights = scores.masked_fill(blind, 0.0).softmax(-1)
    return weights.masked_fill(blind, 0.0) @ v


def _form(operation: str, backend: Backend | None, q: Tensor, block_size: BlockSize) -> str:
    if backend is None and torch.compiler.is_exporting():
        backend = "reference"  # which lists of tiles there are is not known before the map is
    form = choose(operation, backend, get_args(Backend), lambda: _default(q, block_size))
    if form == "native" and not can_run("tile_attention", q):
        raise ValueError(
            f"{operation}: the native backend needs float32 or less on the CPU and a C compiler; leave backend to choose"
        )
    return form


def _default(q: Tensor, block_size: BlockSize) -> Backend:
    if q.is_cuda and all(size % 128 == 0 for size in _sizes(block_size)):
        return "flex"  # smaller tiles than its own it does not skip
    return "native" if can_run("tile_attention", q) else "gather"


def _flex(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    levels: Tensor,
    block_size: BlockSize,
    causal: bool,
    scale: float | None,
) -> Tensor:
    sizes = _sizes(block_size)
    present = _present(levels)
    keys, values = ({level: pool_keys(x, sizes[1], level) for level in present} for x in (k_BGTK, v_BGTK))
    levels = levels.expand(*q_BHLK.shape[:2], -1, -1).contiguous()
    scale = q_BHLK.shape[-1] ** -0.5 if scale is None else scale
    return flex_tiles(q_BHLK, keys, values, levels, sizes, k_BGTK.shape[2], causal, scale)


def _listed(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    levels: Tensor,
    block_size: BlockSize,
    causal: bool,
    scale: float | None,
    *,
    native: bool,
) -> Tensor:
    """By lists of units: a tile at level l is its keys averaged, a run of block / l tokens.

    Half precision is computed in float32: a softmax over many keys needs it, and no kernel here is faster below.
    """
    if q_BHLK.dtype in (torch.bfloat16, torch.float16):
        q, k, v = q_BHLK.float(), k_BGTK.float(), v_BGTK.float()
        return _listed(q, k, v, levels, block_size, causal, scale, native=native).to(q_BHLK.dtype)
    size_q, size_k = _sizes(block_size)
    batch, heads, _, width = q_BHLK.shape
    total = k_BGTK.shape[2]
    levels = levels.expand(batch, heads, -1, -1)
    if causal:
        first_key = torch.arange(levels.shape[3], device=levels.device) * size_k
        last_query = (torch.arange(levels.shape[2], device=levels.device) + 1) * size_q - 1
        levels = levels * (first_key <= last_query[:, None])
    rows = levels.flatten(0, 2)
    plain, present = levels.dtype == torch.bool, _present(levels)
    unit = size_k // present[-1]
    keys, values, last, biases, owners, entries = [], [], [], [], [], []
    offset = 0
    for level in present:
        keys.append(pool_keys(k_BGTK, size_k, level).unflatten(2, (-1, unit)))
        values.append(pool_keys(v_BGTK, size_k, level).unflatten(2, (-1, unit)))
        count = keys[-1].shape[2]
        seen_from = torch.arange(count * unit, device=levels.device) * level + level - 1
        if level == 1:
            seen_from = seen_from.masked_fill(seen_from >= total, NOWHERE)
        last.append(seen_from.view(count, unit))
        biases.append(torch.full((count,), math.log(level), dtype=torch.float64, device=levels.device))
        owner, tile = (rows if plain else rows == level).nonzero(as_tuple=True)
        each = size_k // level // unit
        if each > 1:
            owner = owner.repeat_interleave(each)
            tile = (tile[:, None] * each + torch.arange(each, device=levels.device)).flatten()
        owners.append(owner)
        entries.append(tile + offset)
        offset += count
    owner, entry, seen_from = torch.cat(owners), torch.cat(entries), torch.cat(last)
    if len(present) > 1:
        # Units that need a mask go to the end of their list.
        late = seen_from.amax(1)[entry] > (owner % levels.shape[2] * size_q if causal else NOWHERE - 1)
        order = (owner * 2 + late).argsort(stable=True)
        owner, entry = owner[order], entry[order]
    counts = torch.bincount(owner, minlength=len(rows))
    out, _ = tile_attention(
        q_BHLK,
        keys[0] if len(keys) == 1 else torch.cat(keys, 2),
        values[0] if len(values) == 1 else torch.cat(values, 2),
        entry,
        counts,
        seen_from,
        torch.cat(biases),
        size_q,
        causal,
        width**-0.5 if scale is None else scale,
        native,
    )
    return out


def check_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, block_size: BlockSize, causal: bool) -> None:
    """Refuse shapes that do not fit, unknown levels, and blocks of queries that see nothing.

    Raises:
        ValueError: saying what was given and what would be right.
    """
    size_q, size_k = _sizes(block_size)
    if size_q < 1 or size_k < 1:
        raise ValueError(f"block_size={block_size} must be positive")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must be (B, H, L, K) and twice (B, G, T, K)"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key/value heads do not divide {q.shape[1]} query heads")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many keys as queries, not {k.shape[2]} and {q.shape[2]}")
    need = (math.ceil(q.shape[2] / size_q), math.ceil(k.shape[2] / size_k))
    leading = tiles.shape[:-2]
    if (
        tiles.shape[-2:] != need
        or len(leading) > 2
        or any(
            given not in (1, right) for given, right in zip(reversed(leading), (q.shape[1], q.shape[0]), strict=False)
        )
    ):
        raise ValueError(
            f"the map of tiles is {tuple(tiles.shape)}; with blocks of {block_size} it must be ([B, H,] {need[0]}, {need[1]})"
        )
    if tiles.dtype != torch.bool and size_k % 8:
        raise ValueError(f"block_size={block_size}: the block of keys must be a multiple of 8")
    if torch.compiler.is_compiling():
        return  # what follows looks at values
    kept = tiles
    if tiles.dtype != torch.bool:
        kept = tiles > 0
        if not torch.isin(tiles, torch.tensor(LEVELS, device=tiles.device)).all():
            raise ValueError(f"levels must be among {LEVELS}")
    if causal:
        first_key = torch.arange(need[1], device=tiles.device) * size_k
        last_query = (torch.arange(need[0], device=tiles.device) + 1) * size_q - 1
        kept = kept & (first_key <= last_query[:, None])
    if not (rows := kept.any(-1)).all():
        raise ValueError(f"{int((~rows).sum())} blocks of queries keep no tile; keep at least the diagonal one")


def _sizes(block_size: BlockSize) -> tuple[int, int]:
    return (block_size, block_size) if isinstance(block_size, int) else block_size
