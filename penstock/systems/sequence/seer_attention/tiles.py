"""Tiles of an attention map: pooling over blocks, which tiles to keep, and what a gate learns to predict.

SeerAttention (Gao et al. 2024) cuts the map into tiles of b queries by b keys; its sequel for decoding (SeerAttention-R,
Gao et al. 2025) into strips of one query by b keys. Nothing here knows of a model.

Shape legend: B batch, L length, H query heads, G key/value heads, K head width, M query blocks, N key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.ops import pooled_attention_map

Pool = Literal["max", "min", "avg"]
Method = Literal["threshold", "nz_ratio", "token_budget"]
TargetPool = Literal["max", "mean", "sum"]


@dataclass(frozen=True)
class TileRule:
    """How scores become a decision.

    Attributes:
        method: "threshold" keeps tiles whose share of the row's softmax exceeds `threshold`; "nz_ratio" as many a row
            as give that share of the whole causal map; "token_budget" as many a row as hold that many keys.
        threshold: from 0 (keep all) to below 1; one number, or one a head of the gate.
        nz_ratio: above 0, at most 1.
        token_budget: keys a query may attend to, at least one block.
        last_block_dense: the last two block rows keep everything: an answer is generated from there (prefill only).
        force_diagonal: a block always sees itself. The authors' rule does not, and can leave a row with nothing. By ratio
            or budget the diagonal takes one place of the quota, so that the cost stays what was asked for.

    Raises:
        ValueError: for an unknown method or a number out of range.
    """

    method: Method = "threshold"
    threshold: float | tuple[float, ...] = 2e-3
    nz_ratio: float = 0.25
    token_budget: int = 4096
    last_block_dense: bool = True
    force_diagonal: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r}: it must be one of {', '.join(get_args(Method))}")
        if not all(0 <= value < 1 for value in self.thresholds):
            raise ValueError(f"threshold={self.threshold}: a share of the softmax, from 0 to below 1")
        if not 0 < self.nz_ratio <= 1:
            raise ValueError(f"nz_ratio={self.nz_ratio} must be above 0 and at most 1")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for all heads, or one a head."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)

    def check(self, block_size: int, num_heads: int) -> None:
        """Raise `ValueError` if the rule does not suit a gate of so many heads and blocks of this size."""
        if self.method == "token_budget" and self.token_budget < block_size:
            raise ValueError(f"token_budget={self.token_budget} is below one block of {block_size}")
        if len(self.thresholds) not in (1, num_heads):
            raise ValueError(f"{len(self.thresholds)} thresholds for {num_heads} heads; give one, or one a head")

    def quota(self, num_blocks: int, block_size: int) -> int:
        """Tiles a row keeps in a map of ``num_blocks`` block rows.

        Rows near the top have fewer tiles than that and keep them all, hence the square root: with the quota
        (1 - sqrt(1 - r)) n the share r of the lower triangle is kept.
        """
        if self.method == "nz_ratio":
            return max(1, int((1 - math.sqrt(1 - self.nz_ratio)) * num_blocks))
        return self.token_budget // block_size

    def over_threshold(self, logits: Tensor) -> Tensor:
        """Which shares of the softmax over the last axis exceed the threshold; logits are (B, heads, ..., N)."""
        # Compared in float32 at least: in half precision a threshold of 5e-4 is among the roundings.
        shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        limits = torch.tensor(self.thresholds, dtype=shares.dtype, device=shares.device)
        return shares > limits.view(-1, *[1] * (logits.ndim - 2))


def pool_blocks(x_BLHK: Tensor, block_size: int, pools: Sequence[Pool], mask_BL: Tensor | None = None) -> Tensor:
    """Pool each block of tokens, one way after the other: (B, L, H, K) -> (B, N, H, K * len(pools)).

    Args:
        x_BLHK: queries or keys.
        block_size: b; the last block may be shorter and is pooled over its own tokens.
        pools: any of "max", "min", "avg"; their results are side by side in this order.
        mask_BL: which tokens are real; the others are left out, and a block without any becomes zero.
    """
    missing = -x_BLHK.shape[1] % block_size
    blocks = F.pad(x_BLHK, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block_size))
    if mask_BL is None and not missing:
        reduced = {"max": lambda: blocks.amax(2), "min": lambda: blocks.amin(2), "avg": lambda: blocks.mean(2)}
        return torch.cat([reduced[pool]() for pool in pools], -1)
    if mask_BL is None:
        mask_BL = torch.ones(1, x_BLHK.shape[1], dtype=torch.bool, device=x_BLHK.device)
    real = F.pad(mask_BL, (0, missing)).unflatten(1, (-1, block_size))[..., None, None]
    pooled = []
    for pool in pools:
        if pool == "avg":
            pooled.append(blocks.masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1))
        else:
            worst, best = (-math.inf, torch.amax) if pool == "max" else (math.inf, torch.amin)
            pooled.append(best(blocks.masked_fill(~real, worst), 2).masked_fill(~real.any(2), 0))
    return torch.cat(pooled, -1)


def causal_tiles(num_blocks: int, device: torch.device) -> Tensor:
    """The lower triangle of tiles with its diagonal, bool (N, N)."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device).tril()


def select_tiles(logits_BHNN: Tensor, rule: TileRule, *, block_size: int, real_BN: Tensor | None = None) -> Tensor:
    """The tiles a rule keeps, bool (B, H, N, N), none of them above the diagonal.

    Args:
        logits_BHNN: any scores of tiles, lowest above the diagonal; by threshold the logits of a softmax.
        rule: which to keep.
        block_size: b, for a budget in tokens.
        real_BN: which blocks hold a token that is no padding; quotas count these only.

    Source: SeerAttention (the rules of the authors' code).
    """
    num = logits_BHNN.shape[-1]
    causal = causal_tiles(num, logits_BHNN.device)
    diagonal = torch.eye(num, dtype=torch.bool, device=logits_BHNN.device)
    if rule.method == "threshold":
        kept = rule.over_threshold(logits_BHNN)
    else:
        ranked = logits_BHNN.masked_fill(diagonal, math.inf) if rule.force_diagonal else logits_BHNN
        kept = _largest(ranked, rule, block_size, None if real_BN is None else real_BN.sum(1))
    if rule.force_diagonal:
        kept = kept | diagonal
    if rule.last_block_dense:
        real = torch.ones(1, num, dtype=torch.bool, device=kept.device) if real_BN is None else real_BN
        after = real.sum(1, keepdim=True) - real.cumsum(1)
        kept = kept | (after < 2)[:, None, :, None]
    kept = kept & causal
    return kept if real_BN is None else kept & real_BN[:, None, None, :]


def _largest(scores: Tensor, rule: TileRule, block_size: int, counts_B: Tensor | None) -> Tensor:
    """The quota of largest scores along the last axis, as a bool tensor; each sample has its own number of blocks."""
    num = scores.shape[-1]
    most = min(rule.quota(num, block_size), num)
    chosen = scores.topk(most, -1).indices
    within = torch.ones_like(chosen, dtype=torch.bool)
    if counts_B is not None:
        quotas = torch.tensor([rule.quota(n, block_size) for n in range(num + 1)], device=scores.device)
        own = quotas[counts_B].view(-1, *[1] * (scores.ndim - 1))
        within = within & (torch.arange(most, device=scores.device) < own)
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(-1, chosen, within)


def open_tiles(values_BHNN: Tensor) -> Tensor:
    """Which tiles to compute, from a gate's values: those above one half.

    A row that would be left without any keeps its diagonal one, since a softmax over nothing means nothing.
    """
    kept = values_BHNN > 0.5
    causal = causal_tiles(kept.shape[-1], kept.device)
    blind = ~(kept & causal).any(-1, keepdim=True)
    return kept | (blind & torch.eye(kept.shape[-1], dtype=torch.bool, device=kept.device))


def density(kept_BHNN: Tensor) -> Tensor:
    """Share of the causal tiles that are kept, (B, H)."""
    num = kept_BHNN.shape[-1]
    return kept_BHNN.tril().sum((-2, -1)) / (num * (num + 1) / 2)


def tile_recall(kept_BHNN: Tensor, mass_BHNN: Tensor) -> Tensor:
    """Share of the mass on the map that lies in the kept tiles, (B, H)."""
    return (mass_BHNN * kept_BHNN).sum((-2, -1)) / mass_BHNN.sum((-2, -1))


@torch.no_grad()
def ground_truth(
    q_BHLK: Tensor, k_BGLK: Tensor, *, block_size: int, pool: TargetPool = "max", scale: float | None = None
) -> Tensor:
    """What a gate is to predict: the true attention map pooled over tiles, each row summing to one, (B, H, N, N).

    Args:
        q_BHLK, k_BGLK: queries and keys as attention sees them, positions applied.
        block_size: b.
        pool: over the probabilities in a tile; the authors take the maximum.
        scale: of the scores, default K^-1/2.

    Source: SeerAttention, with the pooling of the authors' code.
    """
    pooled = pooled_attention_map(q_BHLK, k_BGLK, block_size=block_size, pool=pool, scale=scale)
    return pooled / pooled.sum(-1, keepdim=True)


def distillation_loss(
    logits_BHNN: Tensor,
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    *,
    block_size: int,
    pool: TargetPool = "max",
    scale: float | None = None,
) -> Tensor:
    """KL divergence of a gate's scores from the true tiles, mean over all entries of all but the first quarter of rows.

    The first rows have few tiles, and any gate is right about them.

    Args:
        logits_BHNN: of the gate, causal mask included.
        q_BHLK, k_BGLK, block_size, pool, scale: see `ground_truth`; whole sequences without padding.

    Returns:
        (); gradients flow into the logits alone.

    Source: SeerAttention, with the reduction of the authors' code.
    """
    target = ground_truth(q_BHLK, k_BGLK, block_size=block_size, pool=pool, scale=scale)
    first = target.shape[-2] // 4
    return _divergence(target[:, :, first:], logits_BHNN[:, :, first:])


def earlier_blocks(length: int, block_size: int, device: torch.device) -> Tensor:
    """The blocks that are complete before a query's own begins, bool (L, N)."""
    own = torch.arange(length, device=device) // block_size
    return torch.arange(math.ceil(length / block_size), device=device) < own[:, None]


def decode_distillation_loss(
    logits_BGLN: Tensor,
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    loss_slice_ratio: float = 0.5,
) -> Tensor:
    """KL divergence of a decode gate's scores from the largest attention of any head of the group on each block.

    Args:
        logits_BGLN: of every query token, blocks that are not complete before its own masked.
        q_BHLK, k_BGLK, block_size, scale: see `ground_truth`.
        loss_slice_ratio: the share of each sequence, from its beginning, that does not count.

    Returns:
        (); gradients flow into the logits alone.

    Source: SeerAttention-R, with the masks and the reduction of the authors' code.
    """
    with torch.no_grad():
        pooled = pooled_attention_map(q_BHLK, k_BGLK, block_size=(1, block_size), scale=scale)
        target = pooled.unflatten(1, (logits_BGLN.shape[1], -1)).amax(2)
        target = target.masked_fill(~earlier_blocks(q_BHLK.shape[2], block_size, q_BHLK.device), 0.0)
        target = target / (target.sum(-1, keepdim=True) + 1e-9)
    first = int(q_BHLK.shape[2] * loss_slice_ratio)
    return _divergence(target[:, :, first:], logits_BGLN[:, :, first:])


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL divergence, the mean over all elements and not over rows."""
    predicted = logits.log_softmax(-1, dtype=target.dtype)
    return (torch.xlogy(target, target) - target * predicted).mean()


def sink_local_scores(num_blocks: int, device: torch.device) -> Tensor:
    """Scores (N, N) that prefer a row's own block, then the first, then the nearest."""
    blocks = torch.arange(num_blocks, device=device)
    nearness = (blocks - blocks[:, None]).float()
    nearness[:, 0] = -0.5
    nearness[0, 0] = 0.0
    return nearness
