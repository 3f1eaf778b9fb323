"""Crosses: which row of a table belongs to two values that occur together (OptInter, sec. 5 of its code's preparation).

Every pair of fields owns a range of rows. A pair that was counted has a row for each combination seen often enough in
training and one, its first, for all others; a pair that was not counted, or holds too many, is hashed into its range.

Shape legend: B batch, F crossed fields, P = F(F-1)/2 pairs in lexicographic order, K combinations with a row of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations

import torch
from torch import Tensor, nn

_SENTINEL = torch.iinfo(torch.int64).max
_PRIME, _FACTOR = 2**31 - 1, 1_103_515_245


def all_pairs(num_fields: int) -> list[tuple[int, int]]:
    """(0, 1), (0, 2), ..., (1, 2), ...: the order of pairs everywhere."""
    return list(combinations(range(num_fields), 2))


def pair_bases(sizes: Sequence[int]) -> list[int]:
    """Where each pair's keys begin: the key of local ids (a, b) of pair p = (i, j) is base_p + a * size_j + b."""
    return [0, *accumulate(sizes[i] * sizes[j] for i, j in all_pairs(len(sizes)))][:-1]


class CrossVocabulary(nn.Module):
    """The cross-product feature of every pair of fields: ids (B, F) -> rows (B, P), both int64 and global.

    Args:
        offsets: the first id of each crossed field (F).
        sizes: how many ids each has (F).
        rows: how many rows each pair owns (P).
        exact: for each pair whether its combinations were counted (P): row 0 of its range is then everything rare,
            row 1 + k its k-th key. Otherwise the key itself, hashed where there are more keys than rows.

    The keys come with `fill`, or with the state; before, everything is rare.

    Raises:
        ValueError: for lists whose lengths do not go together, or a pair without rows.
    """

    keys: Tensor
    offset: Tensor
    size: Tensor
    first: Tensor
    second: Tensor
    stride: Tensor
    base: Tensor
    start: Tensor
    count: Tensor
    known: Tensor
    counted: Tensor
    crowded: Tensor

    def __init__(
        self, offsets: Sequence[int], sizes: Sequence[int], rows: Sequence[int], exact: Sequence[bool]
    ) -> None:
        super().__init__()
        pairs = all_pairs(len(sizes))
        if not pairs or len(offsets) != len(sizes) or not len(rows) == len(exact) == len(pairs):
            raise ValueError(
                f"{len(offsets)} offsets, {len(sizes)} sizes, {len(rows)} rows, {len(exact)} exact: crosses need two "
                f"categorical fields or more, and F fields have F(F-1)/2 pairs, here {len(pairs)}"
            )
        if min(*sizes, *rows) < 1:
            raise ValueError(f"sizes={tuple(sizes)} and rows={tuple(rows)} must be 1 or more")
        self.pairs = pairs
        self.rows = list(rows)
        self.exact = list(exact)
        known = [count - 1 if counted else 0 for count, counted in zip(rows, exact, strict=True)]
        products = [sizes[i] * sizes[j] for i, j in pairs]
        for name, values in (
            ("offset", offsets),
            ("size", sizes),
            ("first", [i for i, _ in pairs]),
            ("second", [j for _, j in pairs]),
            ("stride", [sizes[j] for _, j in pairs]),
            ("base", pair_bases(sizes)),
            ("start", [0, *accumulate(rows)][:-1]),
            ("count", rows),
            ("known", [0, *accumulate(known)][:-1]),
            ("counted", [bool(counted) for counted in exact]),
            ("crowded", [product > count for product, count in zip(products, rows, strict=True)]),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        # A sentinel ends the list, so that every search lands on an entry.
        self.register_buffer("keys", torch.full((sum(known) + 1,), _SENTINEL))

    @property
    def num_rows(self) -> int:
        """Rows of the table, over all pairs."""
        return sum(self.rows)

    def fill(self, keys_K: Tensor) -> None:
        """Set the combinations that have a row of their own.

        Args:
            keys_K: (K,) int64, rising; see `pair_bases`.

        Raises:
            ValueError: if there are not as many as the exact pairs have rows for.
        """
        if len(keys_K) != len(self.keys) - 1:
            raise ValueError(f"{len(keys_K)} keys: the exact pairs have rows for {len(self.keys) - 1}")
        self.keys[:-1].copy_(keys_K)

    def forward(self, ids_BF: Tensor) -> Tensor:
        local_BF = ids_BF - self.offset
        self._check(local_BF)
        key_BP = local_BF[:, self.first] * self.stride + local_BF[:, self.second]
        wanted_BP = self.base + key_BP
        place_BP = _lower_bound(self.keys, wanted_BP)
        seen_BP = self.keys[place_BP] == wanted_BP
        counted_BP = torch.where(seen_BP, place_BP - self.known + 1, 0)
        # Linear modulo a prime: below 2^62, and in operations that every runtime has.
        hash_BP = torch.where(self.crowded, key_BP % _PRIME * _FACTOR % _PRIME, key_BP) % self.count
        return self.start + torch.where(self.counted, counted_BP, hash_BP)

    def _check(self, local_BF: Tensor) -> None:
        """An id of another field would be taken for some other combination; on the CPU only, as `check_ids`."""
        if torch.compiler.is_compiling() or local_BF.device.type != "cpu":
            return
        wrong_BF = (local_BF < 0) | (local_BF >= self.size)
        if wrong_BF.any():
            row, field = wrong_BF.nonzero()[0].tolist()
            first, size = int(self.offset[field]), int(self.size[field])
            raise ValueError(
                f"id {int(local_BF[row, field]) + first} of field {field} is outside its range {first} .. "
                f"{first + size - 1}"
            )

    def locate(self, row: int) -> tuple[int, int, int]:
        """The pair and the local ids of its two values behind a row of its own in an exact pair.

        Raises:
            ValueError: for a row that many combinations share, or that there is not.
        """
        pair = int((self.start <= row).sum()) - 1
        place = row - int(self.start[pair]) - 1
        if not 0 <= row < self.num_rows or not self.exact[pair] or place < 0:
            raise ValueError(f"row {row} does not belong to one combination of values")
        key = int(self.keys[int(self.known[pair]) + place]) - int(self.base[pair])
        return pair, *divmod(key, int(self.stride[pair]))

    def only(self, kept_P: Tensor) -> tuple[CrossVocabulary, Tensor]:
        """The vocabulary in which all other pairs have a single row.

        Args:
            kept_P: (P,) bool.

        Returns:
            the smaller vocabulary, and the old row of each of its rows, (rows,) int64.
        """
        kept = kept_P.tolist()
        small = CrossVocabulary(
            self.offset.tolist(),
            self.size.tolist(),
            [rows if keep else 1 for rows, keep in zip(self.rows, kept, strict=True)],
            [exact or not keep for exact, keep in zip(self.exact, kept, strict=True)],
        ).to(self.keys.device)
        start = self.start.tolist()
        rows = [torch.arange(first, first + count) for first, count in zip(start, small.rows, strict=True)]
        own = self.known.tolist()
        ends = [*own[1:], len(self.keys) - 1]
        small.fill(
            torch.cat([self.keys[a:b] for a, b, keep in zip(own, ends, kept, strict=True) if keep] or [self.keys[:0]])
        )
        return small, torch.cat(rows).to(self.keys.device)


def _lower_bound(sorted_K: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted number the place of the first entry that is not below it."""
    if not torch.compiler.is_exporting():
        return torch.searchsorted(sorted_K, wanted)
    # ONNX has no search: the same by halving.
    place, step = torch.zeros_like(wanted), 1 << (len(sorted_K).bit_length() - 1)
    while step:
        ahead = (place + step).clamp_max(len(sorted_K))
        place = torch.where(sorted_K[ahead - 1] < wanted, ahead, place)
        step //= 2
    return place
