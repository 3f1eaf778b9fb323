"""From queries and keys to the level of every tile: importance, quotas, similarity cap (PSA, Li et al. 2025).

A level map holds for each query block and key block how the keys are seen: 1 in full, 2, 4 or 8 averaged by so many,
0 not at all. Nothing here is learned and no gradient flows.

Shape legend: B batch, H heads, G key/value heads, L query length, T key length, K head width, M query blocks,
N key blocks, S sampled tokens of a block, R fold rows (strides of tokens), Z segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

#: Level -> (start, end), shares of the key blocks (quota mode) or of the importance (energy mode), in this order.
Ratios: TypeAlias = Mapping[int, tuple[float, float]]
MaskMode = Literal["topk", "thresholdbound"]
Sample = Literal["random", "all", "stride"]

#: Levels in the order of the list encoding's segments.
LIST_LEVELS = (1, 2, 4, 8, 0)
#: One query or key in so many is sampled.
_SAMPLED = 4
#: How many scores are held at a time while importance is estimated.
_CHUNK = 2**25


def ratios_from_ends(ends: tuple[float, ...]) -> dict[int, tuple[float, float]]:
    """The ratios of levels 1, 2, 4 and 8 that end at ``ends``; what is left is skipped."""
    edges = (0.0, *ends, 1.0)
    return {level: (edges[i], edges[i + 1]) for i, level in enumerate((*LIST_LEVELS[: len(ends)], 0))}


def check_ratios(ratios: Ratios) -> None:
    """Refuse ratios that do not cut 0 to 1 into one piece a level.

    Raises:
        ValueError: for an unknown level, or pieces that are not monotone or leave something out.
    """
    if unknown := set(ratios) - set(LIST_LEVELS):
        raise ValueError(f"mask_ratios has levels {sorted(unknown)}; known are {LIST_LEVELS}")
    before = 0.0
    for level, (start, end) in ratios.items():
        if not math.isclose(start, before, abs_tol=1e-9) or not start <= end <= 1.0:
            raise ValueError(
                f"mask_ratios[{level}]=({start}, {end}): it must start at {before}, where the one before ends, and "
                "end no earlier and at 1 at most"
            )
        before = end
    if not math.isclose(before, 1.0, abs_tol=1e-9):
        raise ValueError(f"mask_ratios end at {before}; they must cover everything up to 1 (level 0 skips the rest)")


# -- importance --------------------------------------------------------------------------------------------------


def pad_to_blocks(x_BHLK: Tensor, block: int) -> Tensor:
    """Whole blocks, by repeating the last token."""
    missing = -x_BHLK.shape[2] % block
    return torch.cat([x_BHLK, x_BHLK[:, :, -1:].expand(-1, -1, missing, -1)], 2) if missing else x_BHLK


def sample_blocks(x_BHLK: Tensor, block: int, how: Sample, seed: int = 0) -> Tensor:
    """A quarter of each block's tokens (or all of them), (B, H, N S, K), block after block.

    Random positions are drawn without replacement, once a head: they are the same in every block. The authors also
    draw anew for each batch entry; one draw for all keeps a sample independent of its batch mates.
    """
    if how == "random":
        draw = torch.rand(x_BHLK.shape[1], block, generator=torch.Generator().manual_seed(seed), device="cpu")
        places = draw.argsort(1)[:, : max(block // _SAMPLED, 1)]
    else:
        places = torch.arange(0, block, 1 if how == "all" else _SAMPLED, device="cpu")[None]
    blocks_BHNSK = pad_to_blocks(x_BHLK, block).unflatten(2, (-1, block))
    index = places.to(x_BHLK.device)[None, :, None, :, None]
    batch, heads, number, _, width = blocks_BHNSK.shape
    return blocks_BHNSK.gather(3, index.expand(batch, heads, number, -1, width)).flatten(2, 3)


def sampled_importance(
    q_BHSK: Tensor, k_BHSK: Tensor, samples_per_q_block: int, samples_per_k_block: int, *, scale: float | None = None
) -> Tensor:
    """Importance of tiles from sampled tokens: max of exp(score - largest score of the query), rows summing to one.

    The denominator of the softmax is not used: every sampled query is compared with its own best key.

    Args:
        q_BHSK, k_BHSK: sampled queries and keys, block after block; as many heads in both.
        samples_per_q_block, samples_per_k_block: how many of each make a block.
        scale: of the scores, default K^-1/2.

    Returns:
        (B, H, M, N), float32 at least.
    """
    (batch, heads), width = q_BHSK.shape[:2], q_BHSK.shape[3]
    scale = width**-0.5 if scale is None else scale
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    blocks = max(_CHUNK // (batch * heads * samples_per_q_block * k_BHSK.shape[2]), 1)
    rows = []
    for part in q_BHSK.split(blocks * samples_per_q_block, 2):
        scores = (part @ k_BHSK.mT).to(wide) * scale
        best = scores.unflatten(-1, (-1, samples_per_k_block)).amax(-1)
        share = (best - best.amax(-1, keepdim=True)).exp()
        rows.append(share.unflatten(2, (-1, samples_per_q_block)).amax(3))
    importance = torch.cat(rows, 2)
    return importance / importance.sum(-1, keepdim=True)


def antidiagonal_importance(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    *,
    block_size: int = 128,
    stride: int = 16,
    chunk_size: int = 4096,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
) -> Tensor:
    """Importance of the tiles of causal attention from antidiagonals of ``stride`` x ``stride`` squares (XAttention).

    ``stride`` keys make one fold row, and as many queries in reverse order; a product of two fold rows sums an
    antidiagonal of scores. Softmax over the rows up to the query's own, summed over each tile: the rows of a full
    block sum to block_size / stride.

    Args:
        q_BHLK, k_BHLK: as many heads and tokens in both.
        block_size: of queries and keys, a multiple of ``stride``.
        stride: tokens of a fold row.
        chunk_size: queries looked at together, a multiple of ``block_size``; only memory depends on it.
        scale: of the scores, default K^-1/2.
        lengths_B: how many tokens of each sample are real, if not all; the rest count as padding.

    Returns:
        (B, H, N, N) float32 at least; zero in the future.

    Raises:
        ValueError: if the sizes are no multiples of each other.
    """
    if block_size % stride or chunk_size % block_size:
        raise ValueError(f"stride={stride} must divide block_size={block_size}, and that chunk_size={chunk_size}")
    length, width = q_BHLK.shape[2:]
    device, wide = q_BHLK.device, torch.promote_types(q_BHLK.dtype, torch.float32)
    lengths_B = torch.full((1,), length, device=device) if lengths_B is None else lengths_B
    real_BL = torch.arange(length, device=device) < lengths_B[:, None]
    # Whole blocks will do where the authors fill a chunk: fold rows of nothing but padding count nowhere.
    fold_q, fold_k = (
        F.pad(x * real_BL[:, None, :, None], (0, 0, 0, -length % block_size)).unflatten(2, (-1, stride))
        for x in (q_BHLK, k_BHLK)
    )
    fold_q, fold_k = fold_q.flip(3).flatten(3), fold_k.flatten(3)
    row_R = torch.arange(fold_q.shape[2], device=device)
    filled_BR = row_R < -(-lengths_B // stride)[:, None]
    per_block, per_chunk = block_size // stride, chunk_size // stride
    scale = (width**-0.5 if scale is None else scale) / stride
    tiles = []
    for begin in range(0, len(row_R), per_chunk):
        here = slice(begin, begin + per_chunk)
        scores = (fold_q[:, :, here] @ fold_k.mT).to(wide) * scale
        visible = (row_R <= row_R[here, None]) & filled_BR[:, None, None]
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        weights = weights.masked_fill(~filled_BR[:, None, here, None], 0.0)
        tiles.append(weights.unflatten(-1, (-1, per_block)).unflatten(2, (-1, per_block)).sum((3, 5)))
    return torch.cat(tiles, 2)


# -- levels of tiles ---------------------------------------------------------------------------------------------


def _alignment(level: int, block_n: int, tile_n: int) -> int:
    """Blocks of a level that fill one tile of the kernel: averaged keys are few, so several blocks share one."""
    return max(math.ceil(level / (block_n // tile_n)), 1)


def quota_ends(num_blocks: int, ratios: Ratios, block_n: int, tile_n: int) -> list[int]:
    """Where each level's segment of the blocks, sorted by importance, ends: a fixed share of their number.

    A segment begins where the one before has ended; its length is rounded up to the level's alignment, or down where
    there are not enough blocks.
    """
    ends, before = [], 0
    for level, (_, share) in ratios.items():
        end = max(min(num_blocks, int(num_blocks * share)), before)
        step = _alignment(level, block_n, tile_n)
        end = before + math.ceil((end - before) / step) * step
        if end > num_blocks:
            end = before + (num_blocks - before) // step * step
        ends.append(end)
        before = end
    return ends


def energy_ends(
    shares_N: Tensor, ratios: Ratios, block_n: int, tile_n: int, min_full_attn_ratio: float = 0.06
) -> tuple[list[int], Tensor]:
    """Where segments end if each level has a share of the importance instead of a share of the blocks.

    The block that crosses a bound still belongs to the level, and level 1 gets a share ``min_full_attn_ratio`` of
    the blocks at least.

    Args:
        shares_N: (..., N) importance in descending order, cumulated, relative to the total.

    Returns:
        the levels by ascending bound, and the ends of their segments (..., Z) int64.
    """
    number = shares_N.shape[-1]
    before = torch.zeros(shares_N.shape[:-1], dtype=torch.int64, device=shares_N.device)
    levels, ends = [], []
    for level, (_, bound) in sorted(ratios.items(), key=lambda one: one[1][1]):
        count = (shares_N <= bound + 1e-6).sum(-1)
        end = torch.where(count > 0, count + 1, before)
        step = _alignment(level, block_n, tile_n)
        if step > 1:
            end = before - (before - end).clamp_max(0) // step * step  # rounded up
            end = torch.where(end >= number, before + (number - before) // step * step, end)
        else:
            end = torch.maximum(end.clamp_max(number), before)
            if level == 1:
                end = end.clamp_min(min(number, int(number * min_full_attn_ratio) + 1))
        levels.append(level)
        ends.append(end)
        before = end
    return levels, torch.stack(ends, -1)


@dataclass(frozen=True)
class Ranking:
    """Key blocks by importance, cut into segments of one level each.

    Attributes:
        order: (..., N) key blocks, most important first.
        levels: of the segments.
        ends: (..., Z) where each segment ends in ``order``; what lies behind the last is skipped.
    """

    order: Tensor
    levels: list[int]
    ends: Tensor

    def _segment(self) -> Tensor:
        """(..., N) the segment of each place in ``order``, Z behind the last."""
        place = torch.arange(self.order.shape[-1], device=self.order.device)
        return (self.ends[..., None, :] <= place[:, None]).sum(-1)

    def dense(self) -> Tensor:
        """The level map, (..., N) int64."""
        table = torch.tensor([*self.levels, 0], device=self.order.device)
        return torch.zeros_like(self.order).scatter(-1, self.order, table[self._segment()])

    def listed(self) -> Tensor:
        """The authors' list encoding, (..., N + 5) int64.

        Block numbers in descending importance, first those of level 1, then of 2, 4, 8 and 0, a -1 behind each
        level; zeros fill what is left.
        """
        number, last = self.order.shape[-1], len(LIST_LEVELS)
        slots = torch.tensor([*(LIST_LEVELS.index(level) for level in self.levels), last], device=self.order.device)
        slot = slots[self._segment()]
        grouped = slot.argsort(dim=-1, stable=True)
        slot, blocks = slot.gather(-1, grouped), self.order.gather(-1, grouped)
        place = torch.arange(number, device=self.order.device)
        row = torch.zeros(*slot.shape[:-1], number + last, dtype=torch.int64, device=self.order.device)
        row = row.scatter(-1, place + slot, torch.where(slot < last, blocks, 0))
        numbers = torch.arange(last, device=self.order.device)
        bars = (slot[..., None] <= numbers).sum(-2) + numbers
        return row.scatter(-1, bars, -1)


def rank_blocks(
    importance: Tensor,
    ratios: Ratios,
    mode: MaskMode = "topk",
    *,
    block_n: int = 128,
    tile_n: int = 32,
    min_full_attn_ratio: float = 0.06,
) -> Ranking:
    """Sort each row's key blocks by importance and give them levels, not causal.

    Args:
        importance: (..., M, N), 0 or more.
        ratios: see `Ratios`; quotas use the ends in the given order, energy in ascending order.
        mode: "topk", quotas of blocks, or "thresholdbound", shares of the importance.
        block_n, tile_n: keys of a block and of the kernel's tile, which set the alignment of segments.
        min_full_attn_ratio: see `energy_ends`.
    """
    ordered, order = importance.sort(dim=-1, descending=True, stable=True)
    if mode == "topk":
        ends = quota_ends(importance.shape[-1], ratios, block_n, tile_n)
        levels, edges = list(ratios), torch.tensor(ends, device=importance.device).expand(*order.shape[:-1], -1)
    else:
        shares = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
        levels, edges = energy_ends(shares, ratios, block_n, tile_n, min_full_attn_ratio)
    return Ranking(order, levels, edges)


def causal_bands(importance: Tensor, ratios: Ratios, mode: MaskMode = "topk") -> Tensor:
    """Levels of the tiles up to the diagonal: row r ranks its r + 1 blocks, without alignment.

    Quotas are bands of the rank, [int((r + 1) start), int((r + 1) end)) in float32. Shares of importance give a level
    to the blocks whose cumulated share, their own included, lies above its lower and up to its upper bound.

    Args:
        importance: (..., N, N).
        ratios, mode: see `rank_blocks`.

    Returns:
        (..., N, N) int64; nothing is forced yet, see `forced_tiles`.
    """
    number = importance.shape[-1]
    past = torch.ones(number, number, dtype=torch.bool, device=importance.device).tril()
    ordered, order = importance.masked_fill(~past, -1.0).sort(dim=-1, descending=True, stable=True)
    levels = torch.zeros_like(order)
    place = torch.arange(number, device=importance.device)
    available = torch.arange(1, number + 1, dtype=torch.float32, device=importance.device)[:, None]
    ordered = ordered.clamp_min(0.0)
    shares = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True).clamp_min(torch.finfo(ordered.dtype).tiny)
    before = 0.0
    for level, (start, end) in ratios.items():
        if mode == "topk":
            inside = (place >= (available * start).int()) & (place < (available * end).int())
        else:
            inside = (shares > max(start, before)) & (shares <= end)
        levels = torch.where(inside, level, levels)
        before = end
    return torch.zeros_like(order).scatter(-1, order, levels) * past


def forced_tiles(rows: int, columns: int, *, causal: bool, text_blocks: int = 0) -> Tensor:
    """Tiles that are seen in full whatever their importance, bool (M, N).

    Causal: the diagonal, the first column, and the last ``text_blocks`` rows and columns up to the diagonal. Else the
    last ``text_blocks`` columns.
    """
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    text = (column >= columns - text_blocks).expand(rows, columns)
    if not causal:
        return text
    return (text | (row >= rows - text_blocks) | (column == row) | (column == 0)) & (column <= row)


def similarity_cap(
    k_BGTK: Tensor, block_n: int = 128, thresholds: tuple[float, float, float] = (0.7, 0.65, 0.6)
) -> Tensor:
    """The coarsest level that each key block's smoothness allows, (B, G, N) int64, 1 at least.

    Level l passes where the mean cosine of the first and last of l consecutive keys exceeds its threshold; levels are
    tested each on its own. A ragged last block is filled by repeating the last key.

    Args:
        k_BGTK: keys.
        block_n: keys of a block, a multiple of 8.
        thresholds: of levels 2, 4 and 8.
    """
    keys = pad_to_blocks(k_BGTK, block_n)
    cap = torch.ones(*keys.shape[:2], keys.shape[2] // block_n, dtype=torch.int64, device=keys.device)
    for level, threshold in zip((2, 4, 8), thresholds, strict=True):
        alike = F.cosine_similarity(keys[:, :, ::level], keys[:, :, level - 1 :: level], -1)
        cap = torch.where(alike.unflatten(-1, (-1, block_n // level)).mean(-1) > threshold, level, cap)
    return cap


def binary_levels(importance: Tensor, levels: Tensor, forced: Tensor) -> Tensor:
    """The binary map of equal cost: as many of each row's tiles in full as ``levels`` cost together.

    Rounded to whole tiles, one at least.

    Args:
        importance: (..., M, N), -1 where a tile may not be kept.
        levels: (..., M, N).
        forced: bool (M, N), tiles kept first.
    """
    cost = resolution(levels).sum(-1, keepdim=True).round().clamp_min(1)
    ordered = importance.masked_fill(forced, math.inf).argsort(dim=-1, descending=True, stable=True)
    return (ordered.argsort(-1) < cost).long()


def resolution(levels: Tensor) -> Tensor:
    """1 / level, and 0 where a tile is skipped; float32."""
    return torch.where(levels > 0, 1.0 / levels.clamp_min(1), 0.0)


def nearest_levels(values: Tensor) -> Tensor:
    """Levels from resolutions of any value: the nearest known one on a log scale, skipped below 1/16."""
    exponent = values.clamp(0.125, 1.0).log2().neg().round()
    return torch.where(values < 0.0625, 0, exponent.exp2()).long()


def density(levels: Tensor, *, causal: bool = False) -> Tensor:
    """Share of the full computation that a map costs, (...) float64: the mean of 1 / level, 0 where skipped.

    Args:
        levels: (..., M, N).
        causal: count the lower triangle only.
    """
    share = torch.where(levels > 0, 1.0 / levels.clamp_min(1).double(), 0.0)
    if not causal:
        return share.mean((-2, -1))
    past = torch.ones(levels.shape[-2:], dtype=torch.bool, device=levels.device).tril()
    return (share * past).sum((-2, -1)) / past.sum()


def levels_from_list(listed: Tensor) -> Tensor:
    """The dense map (..., N) int64 of a list encoding (..., N + 5); see `Ranking.listed`.

    Raises:
        ValueError: if a row has not five separators.
    """
    bars = listed == -1
    if not (bars.sum(-1) == len(LIST_LEVELS)).all():
        raise ValueError(f"a row of the list encoding has {len(LIST_LEVELS)} separators (-1), one behind each level")
    number = listed.shape[-1] - len(LIST_LEVELS)
    table = torch.tensor([*LIST_LEVELS, 0], device=listed.device)
    level = table[bars.cumsum(-1)]
    # A cell of its own takes separators and what follows the last one.
    target = torch.where(bars | (level == 0), number, listed.long())
    dense = torch.zeros(*listed.shape[:-1], number + 1, dtype=torch.int64, device=listed.device)
    return dense.scatter(-1, target, level)[..., :number]


# -- all rules together ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapRules:
    """How a level map is made from queries and keys.

    Attributes:
        block_m, block_n: queries and keys of a tile; ``block_n`` a multiple of 8, equal if causal.
        tile_n: keys of a tile of the authors' kernel, which aligns segments (not causal); divides ``block_n``.
        mask_ratios: see `Ratios`.
        mask_mode: see `rank_blocks`.
        min_full_attn_ratio: see `energy_ends`.
        sim_thresholds: of `similarity_cap`; ``None``: no cap.
        causal: importance from antidiagonals and the causal rules.
        text_length: how many of the last tokens are text, seen in full.
        sample: which tokens importance is estimated from (not causal).
        seed: of the random sample.
        stride: of the antidiagonals (causal); divides the block.
        scale: of the scores, default K^-1/2.
        binary: replace the map by the binary one of equal cost.

    Raises:
        ValueError: for sizes or ratios that do not fit together, or an unknown mode.
    """

    block_m: int = 128
    block_n: int = 128
    tile_n: int = 32
    mask_ratios: Ratios = field(default_factory=lambda: ratios_from_ends((0.05, 0.15, 0.25, 0.5)))
    mask_mode: MaskMode = "topk"
    min_full_attn_ratio: float = 0.06
    sim_thresholds: tuple[float, float, float] | None = None
    causal: bool = False
    text_length: int = 0
    sample: Sample = "random"
    seed: int = 0
    stride: int = 16
    scale: float | None = None
    binary: bool = False

    def __post_init__(self) -> None:
        check_ratios(self.mask_ratios)
        if self.mask_mode not in ("topk", "thresholdbound"):
            raise ValueError(f"mask_mode={self.mask_mode!r}: it must be 'topk' or 'thresholdbound'")
        if self.sample not in ("random", "all", "stride"):
            raise ValueError(f"sample={self.sample!r}: it must be 'random', 'all' or 'stride'")
        if self.block_m < 1 or self.block_n < 1 or self.block_n % 8:
            raise ValueError(f"block_m={self.block_m}, block_n={self.block_n}: positive, block_n a multiple of 8")
        if self.text_length < 0:
            raise ValueError(f"text_length={self.text_length}: it must be 0 or more")
        if self.causal and self.block_m != self.block_n:
            raise ValueError(f"a causal map needs square tiles, not block_m={self.block_m}, block_n={self.block_n}")
        if self.causal and (self.stride < 1 or self.block_m % self.stride):
            raise ValueError(f"stride={self.stride} must divide the block of {self.block_m}")
        if not self.causal and (self.tile_n < 1 or self.block_n % self.tile_n):
            raise ValueError(f"tile_n={self.tile_n} must divide block_n={self.block_n}")

    @torch.no_grad()
    def importance(self, q_BHLK: Tensor, k_BGTK: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Estimated importance of every tile, (B, H, M, N); ``lengths_B`` as for `antidiagonal_importance`."""
        k_BHTK = k_BGTK.repeat_interleave(q_BHLK.shape[1] // k_BGTK.shape[1], 1)
        if self.causal:
            return antidiagonal_importance(
                q_BHLK,
                k_BHTK,
                block_size=self.block_m,
                stride=self.stride,
                chunk_size=max(4096 // self.block_m, 1) * self.block_m,
                scale=self.scale,
                lengths_B=lengths_B,
            )
        sampled_q = sample_blocks(q_BHLK, self.block_m, self.sample, self.seed)
        sampled_k = sample_blocks(k_BHTK, self.block_n, self.sample, self.seed + 1)
        per_q = sampled_q.shape[2] // math.ceil(q_BHLK.shape[2] / self.block_m)
        per_k = sampled_k.shape[2] // math.ceil(k_BHTK.shape[2] / self.block_n)
        return sampled_importance(sampled_q, sampled_k, per_q, per_k, scale=self.scale)

    def ranking(self, importance: Tensor) -> Ranking:
        """Key blocks in segments, not causal; see `rank_blocks`."""
        return rank_blocks(
            importance,
            self.mask_ratios,
            self.mask_mode,
            block_n=self.block_n,
            tile_n=self.tile_n,
            min_full_attn_ratio=self.min_full_attn_ratio,
        )

    def levels(self, importance: Tensor) -> Tensor:
        """The level map of an importance (B, H, M, N), without the similarity cap, int64."""
        forced = self._forced(importance)
        if self.causal:
            levels = causal_bands(importance, self.mask_ratios, self.mask_mode)
        else:
            levels = self.ranking(importance).dense()
        return levels.masked_fill(forced, 1)

    @torch.no_grad()
    def level_map(self, q_BHLK: Tensor, k_BGTK: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Levels of all tiles, (B, H, M, N) int64: importance, rules, cap, and the binary map if asked for."""
        importance = self.importance(q_BHLK, k_BGTK, lengths_B)
        levels = self.levels(importance)
        if self.sim_thresholds is not None:
            cap = similarity_cap(k_BGTK, self.block_n, self.sim_thresholds)
            levels = torch.minimum(levels, cap.repeat_interleave(q_BHLK.shape[1] // k_BGTK.shape[1], 1)[:, :, None])
        if self.binary:
            if self.causal:
                future = torch.ones_like(importance, dtype=torch.bool).triu(1)
                importance = importance.masked_fill(future, -1.0)
            levels = binary_levels(importance, levels, self._forced(importance))
        return levels

    def _forced(self, importance: Tensor) -> Tensor:
        text_blocks = math.ceil(self.text_length / self.block_n)
        forced = forced_tiles(*importance.shape[-2:], causal=self.causal, text_blocks=text_blocks)
        return forced.to(importance.device)
