"""FuxiCTR's vocabularies, for feeding a checkpoint of the authors: words by falling count, PAD 0, OOV last.

Penstock's own tables (`penstock.data.tables`) differ in that a missing value is id 0 and not the id of unseen words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PAD, OOV = "__PAD__", "__OOV__"


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a field's words.

    Attributes:
        words: those of ids 1 .. n; 0 is `PAD`, n + 1 is `OOV`.
        missing: the word for a missing value, which is no word: `OOV`, or `PAD` inside a sequence.
        separator: between the items of a sequence; "" for one word a row.
        max_length: of a sequence.
        padding: on which side short sequences are padded and long ones cut.
    """

    words: tuple[str, ...]
    missing: str = ""
    separator: str = ""
    max_length: int = 0
    padding: Literal["pre", "post"] = "pre"

    @classmethod
    def fit(
        cls,
        rows: Iterable[str],
        *,
        min_count: int = 1,
        max_words: int | None = None,
        missing: str = "",
        separator: str = "",
        max_length: int = 0,
        padding: Literal["pre", "post"] = "pre",
    ) -> Vocabulary:
        """Count the words of training rows.

        Args:
            rows: a string each.
            min_count: rarer words are left out.
            max_words: keep only so many of the most frequent, among which a missing value holds its place.
            missing, separator, padding: as the attributes.
            max_length: 0: that of the longest row.

        Raises:
            ValueError: for an unknown padding, or a length or count that cannot be.
        """
        if padding not in ("pre", "post"):
            raise ValueError(f"padding={padding!r}: it must be 'pre' or 'post'")
        if max_length < 0 or min_count < 0 or (max_words or 0) < 0:
            raise ValueError(f"max_length={max_length}, min_count={min_count}, max_words={max_words}: none below 0")
        lists = [row.split(separator) if separator else [row] for row in rows]
        counts = Counter(word for items in lists for word in items)
        # Sorting is stable: of two words seen as often the one seen first comes first.
        frequent = sorted(counts.items(), key=lambda item: -item[1])[: max_words or None]
        words = tuple(word for word, count in frequent if count >= min_count and word != missing)
        if separator:
            max_length = max_length or max(map(len, lists), default=0)
        return cls(words, missing, separator, max_length, padding)

    def __len__(self) -> int:
        return len(self.words) + 2

    def ids(self) -> dict[str, int]:
        """Every word's id, then those of `PAD` and `OOV`."""
        return {word: number for number, word in enumerate(self.words, 1)} | {PAD: 0, OOV: len(self.words) + 1}

    def encode(self, rows: Sequence[str]) -> NDArray[np.int64]:
        """The ids of rows: (rows,), or (rows, max_length) of sequences."""
        ids, unseen = self.ids(), len(self.words) + 1
        if not self.separator:
            return np.array([ids.get(row, unseen) for row in rows], np.int64)
        encoded = np.zeros((len(rows), self.max_length), np.int64)
        for row, text in zip(encoded, rows, strict=True):
            items = [0 if item == self.missing else ids.get(item, unseen) for item in text.split(self.separator)]
            if self.padding == "post":
                kept = items[: self.max_length]
                row[: len(kept)] = kept
            else:
                kept = items[max(len(items) - self.max_length, 0) :]
                row[len(row) - len(kept) :] = kept
        return encoded
