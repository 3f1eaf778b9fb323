"""The gates of SeerAttention: one for prefilling (block by block) and one for decoding (token by block).

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024), and "SeerAttention-R: Sparse
Attention Adaptation for Long Reasoning" (2025). Both read an attention layer's queries and keys before rotary positions
(after their norms, where the model has such) and know nothing of the layer, so that they fit any model's attention.

Shape legend: B batch, L length, H query heads, G key/value heads, K head width, W gate width, N blocks, R rotating
channels, b block size.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from penstock.gates import Gate
from penstock.nn.causal_lm import State
from penstock.nn.decoder import RMSNorm, rotate
from penstock.systems.sequence.seer_attention.tiles import (
    Pool,
    TileRule,
    causal_tiles,
    earlier_blocks,
    pool_blocks,
    select_tiles,
)

QueryPooling = Literal["Qproj", "Qavgproj", "Qavg"]
#: Cosines and sines of rotary positions, (..., R) each, as `penstock.nn.decoder.rotary_tables` gives them.
Tables: TypeAlias = tuple[Tensor, Tensor]

_POOLS: tuple[Pool, ...] = get_args(Pool)
#: By the name they have in a gate's type: "avg", "maxmin", "maxminavg" ...
POOLINGS: dict[str, tuple[Pool, ...]] = {
    "".join(pools): pools for size in (1, 2, 3) for pools in itertools.combinations(_POOLS, size)
}


def parse_gate_type(name: str) -> tuple[tuple[Pool, ...], tuple[Pool, ...]]:
    """The pools of queries and of keys in a name as "Qavg_Kmaxminavg".

    Raises:
        ValueError: for an unknown name, listing what there is.
    """
    found = re.fullmatch(r"Q(\w+?)_K(\w+)", name)
    if found is None or not set(found.groups()) <= set(POOLINGS):
        raise ValueError(f"gate type {name!r}: it must be Q<pools>_K<pools>, each of {', '.join(POOLINGS)}")
    return POOLINGS[found[1]], POOLINGS[found[2]]


class HeadLinear(nn.Module):
    """A linear map a head, without bias: (..., H, I) -> (..., H, O); weight (H, I, O)."""

    def __init__(self, num_heads: int, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, size, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...hi,hio->...ho", x, self.weight)


class GroupLinear(nn.Module):
    """A linear map a query head, summed over the heads of a group: (..., H, I) -> (..., G, O); weight (G, H/G, I, O)."""

    def __init__(self, num_groups: int, group: int, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, group, size, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gji,gjio->...go", x.unflatten(-2, self.weight.shape[:2]), self.weight)


class _TileGate(Gate):
    """What both gates share: heads, widths, and the rule that makes a decision of the scores."""

    passes = "block"
    kind = "mask"

    def __init__(
        self,
        head_dim: int,
        num_q_heads: int,
        num_k_heads: int,
        *,
        block_size: int,
        gate_hidden_size: int | None,
        rotary: bool,
        rule: TileRule,
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be positive")
        if num_k_heads < 1 or num_q_heads % num_k_heads:
            raise ValueError(f"num_k_heads={num_k_heads} must divide num_q_heads={num_q_heads}")
        self.head_dim, self.num_q_heads, self.num_k_heads = head_dim, num_q_heads, num_k_heads
        self.block_size, self.rotary = block_size, rotary
        self.width = head_dim if gate_hidden_size is None else gate_hidden_size
        if rotary and self.width % 2:
            raise ValueError(f"gate_hidden_size={self.width} must be even for rotary positions")
        self.rule = rule

    @property
    def rule(self) -> TileRule:
        """How scores become a decision; may be replaced at any time, also between calls of a trained gate."""
        return self._rule

    @rule.setter
    def rule(self, rule: TileRule) -> None:
        rule.check(self.block_size, self.num_heads)
        self._rule = rule

    @property
    def num_heads(self) -> int:
        """Heads that decide on their own."""
        raise NotImplementedError

    def _turn(self, x_BNHW: Tensor, tables: Tables | None) -> Tensor:
        """Rotary positions on the first R channels."""
        if not self.rotary:
            return x_BNHW
        if tables is None:
            raise ValueError(f"{type(self).__name__} needs rotary tables of the positions (or rotary=False)")
        if tables[0].shape[-1] > self.width:
            raise ValueError(f"rotary tables of {tables[0].shape[-1]} channels for a gate of {self.width}")
        return rotate(x_BNHW.transpose(1, 2), *tables).transpose(1, 2)

    def _check(self, q_BLHK: Tensor, k_BLGK: Tensor) -> None:
        own = (self.num_q_heads, self.head_dim), (self.num_k_heads, self.head_dim)
        if (q_BLHK.shape[2:], k_BLGK.shape[2:]) != own or q_BLHK.shape[:2] != k_BLGK.shape[:2]:
            raise ValueError(
                f"queries {tuple(q_BLHK.shape)} and keys {tuple(k_BLGK.shape)}: they must be (B, L, {self.num_q_heads}, "
                f"{self.head_dim}) and (B, L, {self.num_k_heads}, {self.head_dim})"
            )


class AttnGate(_TileGate):
    """Which tiles of the attention map to compute while prefilling: 1 keeps a tile, 0 skips it.

    Queries and keys are pooled over blocks, mapped head by head, rotated by the position of their block's first token and
    multiplied. With queries pooled one way and a gate as wide as the heads, the map of queries is left out and the one
    of keys is a query head's own, unless ``force_double``: a product of two maps would say no more.

    Within a block, the decision for a query depends on the later queries of its block, which are pooled with it (in the
    original as here): it sees no later *token*, but which of the earlier ones it sees can depend on them.

    Args:
        head_dim: K.
        num_q_heads, num_k_heads: H and G, a divisor of H.
        block_size: b.
        gate_hidden_size: W, default K.
        q_pool, k_pool: see `pool_blocks`.
        force_double: keep the map of queries where it could be left out.
        rotary: rotate by the blocks' positions.
        rule: how scores become a decision.

    Shapes: (B, L, H, K), (B, L, G, K) -> (B, H, N, N) of zeros and ones, N = ceil(L / b), rows are query blocks.

    Raises:
        ValueError: for sizes that do not fit.

    Source: SeerAttention, sec. 3; the maps are those of the authors' code.
    """

    unit_dims = 3

    def __init__(
        self,
        head_dim: int,
        num_q_heads: int,
        num_k_heads: int,
        *,
        block_size: int = 64,
        gate_hidden_size: int | None = None,
        q_pool: tuple[Pool, ...] = ("avg",),
        k_pool: tuple[Pool, ...] = ("max", "min", "avg"),
        force_double: bool = False,
        rotary: bool = True,
        rule: TileRule | None = None,
    ) -> None:
        super().__init__(
            head_dim,
            num_q_heads,
            num_k_heads,
            block_size=block_size,
            gate_hidden_size=gate_hidden_size,
            rotary=rotary,
            rule=rule or TileRule(),
        )
        self.q_pool, self.k_pool = q_pool, k_pool
        shortcut = len(q_pool) == 1 and self.width == head_dim and not force_double
        self.query_map = None if shortcut else HeadLinear(num_q_heads, head_dim * len(q_pool), self.width)
        self.key_map = HeadLinear(num_q_heads if shortcut else num_k_heads, head_dim * len(k_pool), self.width)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    @property
    def num_heads(self) -> int:
        return self.num_q_heads

    def logits(
        self, q_BLHK: Tensor, k_BLGK: Tensor, tables: Tables | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """Scores of tiles (B, H, N, N), the smallest number there is above the diagonal and on blocks of padding.

        Args:
            q_BLHK, k_BLGK: before rotary positions.
            tables: of each block's first token, (N, R) or (B, N, R) with R up to W: the base model's, with its scaling.
            mask_BL: which tokens are real, left or right padded; ``None``: all. Blocks are cut where the tensor begins.

        Raises:
            ValueError: for tensors of other heads, or no tables where the gate rotates.
        """
        self._check(q_BLHK, k_BLGK)
        queries = pool_blocks(q_BLHK, self.block_size, self.q_pool, mask_BL)
        keys = pool_blocks(k_BLGK, self.block_size, self.k_pool, mask_BL)
        group = self.num_q_heads // self.num_k_heads
        if self.query_map is None:
            keys = self.key_map(keys.repeat_interleave(group, 2))
        else:
            queries, keys = self.query_map(queries), self.key_map(keys).repeat_interleave(group, 2)
        queries, keys = self._turn(queries, tables), self._turn(keys, tables)
        logits = torch.einsum("bmhw,bnhw->bhmn", queries, keys) / math.sqrt(self.width)
        seen = causal_tiles(logits.shape[-1], logits.device)
        if mask_BL is not None:
            seen = seen & self._real(mask_BL)[:, None, None, :]
        return logits.masked_fill(~seen, torch.finfo(logits.dtype).min)

    def forward(
        self, q_BLHK: Tensor, k_BLGK: Tensor, tables: Tables | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """The tiles to compute, from the arguments of `logits`; see the class."""
        if q_BLHK.shape[1] < self.block_size:
            warnings.warn(
                f"{q_BLHK.shape[1]} tokens are less than a block of {self.block_size}: one tile, which stays dense",
                stacklevel=2,
            )
        logits = self.logits(q_BLHK, k_BLGK, tables, mask_BL)
        real = None if mask_BL is None else self._real(mask_BL)
        return select_tiles(logits, self.rule, block_size=self.block_size, real_BN=real).to(logits.dtype)

    def _real(self, mask_BL: Tensor) -> Tensor:
        """Which blocks hold a real token, (B, N)."""
        missing = -mask_BL.shape[1] % self.block_size
        return nn.functional.pad(mask_BL, (0, missing)).unflatten(1, (-1, self.block_size)).any(-1)


class DecodeGate(_TileGate):
    """Which blocks of the past a new token attends to, one decision a key/value head: 1 keeps a block, 0 skips it.

    Keys are compressed block by block as they come and kept beside the cache: `prefill` compresses a prompt, `append` adds
    a token, and the gate's call scores what there is. A block that is not complete has a compressed key of zeros, which
    takes part in the scores; the newest block is kept in any case, on top of what the rule chooses.

    Args:
        head_dim, num_q_heads, num_k_heads, block_size, gate_hidden_size, rotary, rule: see `AttnGate`. By "nz_ratio" a
            token keeps that share of the blocks there are.
        query_pooling: how the heads of a group become one query: "Qproj" maps each and adds them up, "Qavgproj" maps
            their mean, "Qavg" is their mean (then W is K).
        k_pool: see `pool_blocks`.
        use_qk_norm: RMS norm of both, over W.
        compat: rotate a block completed while decoding by its *last* token, as the authors' code does, although it
            rotates the blocks of a prompt by their first.

    Shapes: (B, H, K) and (B, N, G, W) -> (B, G, N) of zeros and ones.

    Raises:
        ValueError: for sizes that do not fit or an unknown pooling.

    Source: SeerAttention-R.
    """

    unit_dims = 2

    def __init__(
        self,
        head_dim: int,
        num_q_heads: int,
        num_k_heads: int,
        *,
        block_size: int = 64,
        gate_hidden_size: int | None = None,
        query_pooling: QueryPooling = "Qproj",
        k_pool: tuple[Pool, ...] = ("max", "min", "avg"),
        use_qk_norm: bool = True,
        rotary: bool = True,
        compat: bool = False,
        rule: TileRule | None = None,
    ) -> None:
        super().__init__(
            head_dim,
            num_q_heads,
            num_k_heads,
            block_size=block_size,
            gate_hidden_size=gate_hidden_size,
            rotary=rotary,
            rule=rule or TileRule(method="token_budget"),
        )
        if query_pooling not in get_args(QueryPooling):
            raise ValueError(f"query_pooling={query_pooling!r}: it must be one of {', '.join(get_args(QueryPooling))}")
        if query_pooling == "Qavg" and self.width != head_dim:
            raise ValueError(f"Qavg maps nothing: gate_hidden_size={self.width} must be head_dim={head_dim}")
        self.query_pooling, self.k_pool, self.compat = query_pooling, k_pool, compat
        self.query_map: GroupLinear | HeadLinear | None = None
        if query_pooling == "Qproj":
            self.query_map = GroupLinear(num_k_heads, num_q_heads // num_k_heads, head_dim, self.width)
        elif query_pooling == "Qavgproj":
            self.query_map = HeadLinear(num_k_heads, head_dim, self.width)
        self.key_map = HeadLinear(num_k_heads, head_dim * len(k_pool), self.width)
        for weight in self.parameters():
            # Xavier's bound for each head's matrix, inputs of a group counted together.
            bound = math.sqrt(6 / (weight[0].numel() / self.width + self.width))
            nn.init.uniform_(weight, -bound, bound)
        self.query_norm = RMSNorm(self.width) if use_qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.width) if use_qk_norm else nn.Identity()

    @property
    def num_heads(self) -> int:
        return self.num_k_heads

    def queries(self, q_BLHK: Tensor, tables: Tables | None) -> Tensor:
        """One query a group, (B, L, G, W); tables are of the tokens' positions."""
        if self.query_pooling != "Qproj":
            q_BLHK = q_BLHK.unflatten(2, (self.num_k_heads, -1)).mean(3)
        if self.query_map is not None:
            q_BLHK = self.query_map(q_BLHK)
        return self._turn(self.query_norm(q_BLHK), tables)

    def compress(self, k_BLGK: Tensor, tables: Tables | None) -> Tensor:
        """One key a block, (B, N, G, W), a shorter last block included; tables are of the blocks' positions."""
        return self._turn(self.key_norm(self.key_map(pool_blocks(k_BLGK, self.block_size, self.k_pool))), tables)

    def logits(
        self, q_BLHK: Tensor, k_BLGK: Tensor, tables: Tables | None = None, block_tables: Tables | None = None
    ) -> Tensor:
        """Scores (B, G, L, N) of every token of a sequence at once, for distillation; see `decode_distillation_loss`.

        A token sees only blocks complete before its own; the others have the smallest number there is.

        Args:
            q_BLHK, k_BLGK: before rotary positions.
            tables, block_tables: rotary tables of the tokens and of the blocks' first tokens.

        Raises:
            ValueError: for tensors of other heads, or no tables where the gate rotates.
        """
        self._check(q_BLHK, k_BLGK)
        logits = self._score(self.queries(q_BLHK, tables), self.compress(k_BLGK, block_tables))
        seen = earlier_blocks(q_BLHK.shape[1], self.block_size, logits.device)
        return logits.masked_fill(~seen, torch.finfo(logits.dtype).min)

    def forward(self, q_BHK: Tensor, compressed_BNGW: Tensor, newest_B: Tensor, tables: Tables | None = None) -> Tensor:
        """The blocks that one new token attends to.

        Args:
            q_BHK: its queries before rotary positions.
            compressed_BNGW: of `prefill` and `append`, this token's block included.
            newest_B: the number of the block that the token is in; later ones are no blocks.
            tables: rotary tables of the token's position, (B, 1, R) or (1, R).
        """
        logits = self._score(self.queries(q_BHK[:, None], tables), compressed_BNGW)[:, :, 0]
        blocks = torch.arange(logits.shape[-1], device=logits.device)
        seen = (blocks <= newest_B[:, None])[:, None]
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        kept = self._choose(logits, newest_B) & seen
        return (kept | (blocks == newest_B[:, None])[:, None]).to(logits.dtype)

    def _choose(self, logits_BGN: Tensor, newest_B: Tensor) -> Tensor:
        if self.rule.method == "threshold":
            return self.rule.over_threshold(logits_BGN)
        num = logits_BGN.shape[-1]
        if self.rule.method == "token_budget":
            most = min(self.rule.token_budget // self.block_size, num)
            quotas_B = torch.full_like(newest_B, most)
        else:
            shares = [max(1, int(self.rule.nz_ratio * (newest + 1))) for newest in range(num)]
            most, quotas_B = shares[-1], torch.tensor(shares, device=newest_B.device)[newest_B]
        chosen = logits_BGN.topk(most, -1).indices
        within = (torch.arange(most, device=chosen.device) < quotas_B[:, None, None]).expand(chosen.shape)
        return torch.zeros_like(logits_BGN, dtype=torch.bool).scatter(-1, chosen, within)

    def _score(self, q_BLGW: Tensor, k_BNGW: Tensor) -> Tensor:
        return torch.einsum("blgw,bngw->bgln", q_BLGW, k_BNGW) / math.sqrt(self.width)

    def prefill(self, state: State, k_BLGK: Tensor, counts_B: Tensor, block_tables: Tables | None = None) -> None:
        """Compress the keys of a prompt into ``state``, "compressed" (B, N, G, W) and "recent" (B, b, G, K).

        Args:
            state: of the layer, written to.
            k_BLGK: before rotary positions, real tokens first.
            counts_B: how many are real.
            block_tables: rotary tables of the blocks' first tokens.
        """
        size, length = self.block_size, k_BLGK.shape[1]
        whole_B = counts_B // size
        compressed = self.compress(k_BLGK, block_tables)
        complete = torch.arange(compressed.shape[1], device=k_BLGK.device) < whole_B[:, None]
        state["compressed"] = compressed.masked_fill(~complete[..., None, None], 0.0)
        # Token t has slot t mod b; only the unfinished block's are wanted.
        slots = whole_B[:, None] * size + torch.arange(size, device=k_BLGK.device)
        wanted = (slots < counts_B[:, None])[..., None, None]
        index = slots.clamp(max=length - 1)[..., None, None].expand(-1, -1, *k_BLGK.shape[2:])
        state["recent"] = k_BLGK.gather(1, index).masked_fill(~wanted, 0.0)

    def append(
        self,
        state: State,
        k_BGK: Tensor,
        positions_B: Tensor,
        real_B: Tensor,
        num_blocks: int,
        entry_tables: Tables | None = None,
    ) -> None:
        """Add one token's key to what `prefill` has left in ``state``.

        Args:
            state: of the layer, overwritten.
            k_BGK: before rotary positions.
            positions_B: of the token among the sample's real ones, from 0.
            real_B: whether it is one.
            num_blocks: how many blocks there are to be now.
            entry_tables: rotary tables of `entry_positions`, (B, 1, R) or (1, R).
        """
        slot_B = positions_B % self.block_size
        recent, compressed = state["recent"], state["compressed"]
        here = (torch.arange(self.block_size, device=recent.device) == slot_B[:, None]) & real_B[:, None]
        recent = torch.where(here[..., None, None], k_BGK[:, None], recent)
        if num_blocks > compressed.shape[1]:
            fresh = compressed.new_zeros(len(compressed), num_blocks - compressed.shape[1], *compressed.shape[2:])
            compressed = torch.cat([compressed, fresh], 1)
        complete_B = slot_B == self.block_size - 1
        entry = self.compress(recent, entry_tables)
        target = torch.arange(compressed.shape[1], device=recent.device) == (positions_B // self.block_size)[:, None]
        written = (target & complete_B[:, None])[..., None, None]
        state["recent"], state["compressed"] = recent, torch.where(written, entry, compressed)

    def entry_positions(self, positions_B: Tensor) -> Tensor:
        """The position that a block completed by this token is rotated by: its first one's (`compat`: its last one's)."""
        return positions_B if self.compat else positions_B // self.block_size * self.block_size
