"""A made-up click log of any length in the shape of Criteo's: 13 counts, 26 columns of hashed words, a planted truth.

Blocks of rows are drawn one after the other, so that a table far larger than the memory can be written. Counts are
skewed and often missing; words are Zipf-distributed, and each column has about as many that occur often as the
published log has. Whether a row is a click depends on every column, and on a few pairs of columns.

Shape legend: B rows of a block, V words of a column, R rank of a pair's effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock.data.rawtables import CRITEO
from penstock.errors import UserError

#: Rows of a block, which is a row group of the file.
BLOCK_ROWS = 1 << 16

# Words seen ten times or more in the 46 million rows of Criteo_x4 (reczoo/Criteo_x4 on the Hugging Face hub).
_WORDS = (
    *(1444, 552, 157_337, 117_820, 304, 16, 11_880, 628, 3, 39_528, 5129, 156_654, 3174, 26, 11_041, 148_911, 10, 4558),
    *(2001, 3, 154_562, 16, 15, 53_029, 80, 40_953),
)
_LARGE = 100_000  # columns with more words have a long tail of rare ones beside them
_TAIL = 8
_GAPS = (0.45, 0.0, 0.21, 0.21, 0.03, 0.22, 0.04, 0.001, 0.04, 0.45, 0.04, 0.77, 0.21)  # share of missing counts
_MEDIANS = (1, 3, 6, 4, 1900, 32, 3, 8, 38, 1, 1, 1, 4)
_PAIRS = ((1, 4), (8, 16), (24, 7), (0, 13))  # columns of words that matter together
_RANK = 4
_CLICKS = 0.2562  # share of clicks in Criteo_x4


class _Column(NamedTuple):
    """A column of words: the words by falling frequency, and what each adds to a row's logit."""

    words: pa.StringArray
    effects: NDArray[np.float32]


class CriteoLike:
    """The truth behind a made-up click log, and rows drawn from it.

    Args:
        seed: of the truth and of all rows.

    Attributes:
        columns: the 26 columns of words.

    Raises:
        UserError: if the seed is negative.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise UserError(f"seed={seed} must not be below 0")
        self.seed = seed
        draw = np.random.default_rng([seed, 0])
        self.columns = [_column(place, size, draw) for place, size in enumerate(_WORDS)]
        self._slopes = draw.normal(0, 0.12, len(_GAPS))
        self._gap_effects = draw.normal(0, 0.2, len(_GAPS))
        self._factors = [
            tuple(draw.normal(0, 0.45, (len(self.columns[place].words), _RANK)).astype(np.float32) for place in pair)
            for pair in _PAIRS
        ]
        self._bias = 0.0
        # The share of clicks is right if the mean probability of some rows is.
        logits = self._draw(np.random.default_rng([seed, 1]), BLOCK_ROWS)[1]
        for _ in range(20):
            share = 1 / (1 + np.exp(-logits - self._bias))
            self._bias += float((_CLICKS - share.mean()) / (share * (1 - share)).mean())

    def blocks(self, part: int, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of one part, at most `BLOCK_ROWS` at a time; parts and blocks are independent of each other."""
        for block, first in enumerate(range(0, rows, BLOCK_ROWS)):
            draw = np.random.default_rng([self.seed, 2, part, block])
            columns, logits_B = self._draw(draw, min(BLOCK_ROWS, rows - first))
            clicks = draw.random(len(logits_B)) < 1 / (1 + np.exp(-logits_B - self._bias))
            names = ["click", *CRITEO[1:]]
            yield pa.record_batch([pa.array(clicks.astype(np.int8)), *columns], names=names)

    def _draw(self, draw: np.random.Generator, rows: int) -> tuple[list[pa.Array], NDArray[np.float64]]:
        """Columns of counts and words, and the rows' logits without the bias."""
        columns: list[pa.Array] = []
        logits_B = np.zeros(rows)
        for gap, median, slope, gap_effect in zip(_GAPS, _MEDIANS, self._slopes, self._gap_effects, strict=True):
            spread = draw.standard_normal(rows)
            missing = draw.random(rows) < gap
            logits_B += np.where(missing, gap_effect, slope * spread)
            columns.append(pa.array((median * np.exp(1.3 * spread)).astype(np.int32), mask=missing))
        ranks = [_zipf(draw.random(rows), len(column.words)) for column in self.columns]
        for rank_B, column in zip(ranks, self.columns, strict=True):
            logits_B += column.effects[rank_B]
            columns.append(column.words.take(pa.array(rank_B)))
        for pair, (left_VR, right_VR) in zip(_PAIRS, self._factors, strict=True):
            logits_B += (left_VR[ranks[pair[0]]] * right_VR[ranks[pair[1]]]).sum(1)
        return columns, logits_B


def _column(place: int, size: int, draw: np.random.Generator) -> _Column:
    size *= _TAIL if size > _LARGE else 1
    # An odd factor permutes the 32-bit numbers: no two words of a column are alike.
    hashed = np.arange(1, size + 1, dtype=">u4") * np.uint32(2_654_435_761) ^ np.uint32(place * 0x9E3779B1 & 0xFFFFFFFF)
    text = hashed.astype(">u4").tobytes().hex()
    offsets = np.arange(0, 8 * size + 1, 8, dtype=np.int32)
    words = pa.StringArray.from_buffers(size, pa.py_buffer(offsets), pa.py_buffer(text.encode()))
    return _Column(words, draw.normal(0, 0.3, size).astype(np.float32))


def _zipf(lot_B: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Ranks 0 .. size - 1, rank r with a probability of about 1 / (r + 1), from numbers in [0, 1)."""
    return np.minimum(np.exp(lot_B * np.log(size + 1)).astype(np.int64), size) - 1
