"""Columns that tell the label by themselves: most often they were not yet known when the row was made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penstock.data.parts import Peers
from penstock.data.rawtables import Chunk
from penstock.data.schema import Field, Label, encode_label

_ROWS, _CHUNK = 1 << 15, 1 << 11  # looked at in all, and of a chunk
_LEAST = 10  # rows of each class, below which a column may be perfect by chance


class Leaks:
    """Looks at some training rows for columns that alone have an AUC of 1 (or 0).

    Args:
        fields: what to look at; sequences are not.
        labels: those with two classes count.
    """

    def __init__(self, fields: Sequence[Field], labels: Sequence[Label]) -> None:
        self.fields = [one for one in fields if one.kind != "sequence"]
        self.labels = [label for label in labels if label.classes]
        self.seen: list[tuple[int, pl.DataFrame, NDArray[np.float32]]] = []

    def update(self, chunk: Chunk) -> None:
        """Add some rows of a chunk, evenly spaced."""
        if not self.labels or not chunk.frame.height or self._rows >= _ROWS:
            return
        some = chunk._replace(frame=chunk.frame.gather_every(-(-chunk.frame.height // _CHUNK)))
        columns = [
            some.numbers(f.name).alias(f.name) if f.kind == "numeric" else some.text(f.name).alias(f.name)
            for f in self.fields
        ]
        codes = np.stack([encode_label(label, some) for label in self.labels], 1)
        self.seen.append((chunk.place, pl.DataFrame(columns), codes))

    @property
    def _rows(self) -> int:
        return sum(len(codes) for _, _, codes in self.seen)

    def settle(self, together: Peers) -> None:
        """Keep of what all processes have seen what one alone would have: the first chunks of the table."""
        every = sorted(chain(*together.gather(self.seen)), key=lambda one: one[0])
        self.seen = []
        while every and self._rows < _ROWS:
            self.seen.append(every.pop(0))

    def notes(self) -> list[str]:
        """A warning for each column and label."""
        if not self.seen:
            return []
        frame = pl.concat([frame for _, frame, _ in self.seen])
        codes = np.concatenate([codes for _, _, codes in self.seen])
        found = []
        for place, label in enumerate(self.labels):
            ones = codes[:, place] == 1
            for one in self.fields:
                score = _numbers_score if one.kind == "numeric" else _words_score
                if (auc := score(frame[one.name], ones)) is not None:
                    found.append(
                        f"warning: {one.name} alone tells {label.name} in all {len(ones):,} training rows looked at "
                        f"(AUC {auc}); if it is not known before {label.name} is, drop it in a columns file"
                    )
        return found


def _numbers_score(numbers: pl.Series, ones: NDArray[np.bool_]) -> float | None:
    """1 or 0 if that is the AUC of numbers as scores, a missing one below all others."""
    x = numbers.fill_null(-np.inf).to_numpy()
    return _perfect(x, ones)


def _words_score(words: pl.Series, ones: NDArray[np.bool_]) -> float | None:
    """1 if that is the AUC, on half of the rows, of each word's share of ones in the other half."""
    half = np.random.default_rng(0).random(len(ones)) < 0.5
    frame = pl.DataFrame({"word": words, "one": ones.astype(np.float64), "half": half})
    share = frame.filter("half").group_by("word").agg(pl.col("one").mean().alias("share"))
    scored = frame.filter(~pl.col("half")).join(share, on="word", how="left", nulls_equal=True, maintain_order="left")
    unknown = float(frame["one"].mean())  # type: ignore[arg-type]
    return _perfect(scored["share"].fill_null(unknown).to_numpy(), scored["one"].to_numpy() == 1)


def _perfect(scores: NDArray[np.float64], ones: NDArray[np.bool_]) -> float | None:
    """1 if all ones have higher scores than all zeros, 0 if all have lower, else nothing."""
    high, low = scores[ones], scores[~ones]
    if min(len(high), len(low)) < _LEAST:
        return None
    if high.min() > low.max():
        return 1.0
    return 0.0 if high.max() < low.min() else None
