"""Columns of times, as numbers."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penstock.data.rawtables import Chunk


def are_dates(chunk: Chunk, column: str) -> bool:
    """Whether most values of a column are no numbers."""
    words = chunk.text(column).drop_nulls()
    return words.cast(pl.Float64, strict=False).null_count() > len(words) / 2


def times(chunk: Chunk, column: str) -> NDArray[np.float64]:
    """(rows,) a column's times: numbers as they are, ISO dates as seconds since 1970 (in UTC unless they say otherwise).

    Raises:
        UserError: at the first cell that is missing, or no time of the sort that most are.
    """
    words = chunk.text(column)
    if (gaps := words.is_null().arg_true()).len():
        raise chunk.error(gaps[0], column, "the time is missing; a split by time needs one in every row")
    if are_dates(chunk, column):
        unique = words.unique()
        seconds = pl.Series([_seconds(word) for word in unique], dtype=pl.Float64)
        numbers = words.replace_strict(unique, seconds, return_dtype=pl.Float64)
        right = "an ISO date, as 2024-05-31 or 2024-05-31 12:30:00"
    else:
        numbers = words.cast(pl.Float64, strict=False)
        right = "a number, as seconds since 1970, like most of the column"
    if (bad := (~numbers.is_finite()).fill_null(True).arg_true()).len():
        raise chunk.error(bad[0], column, f"{words[bad[0]]!r} is no time; it must be {right}")
    return numbers.to_numpy()


def _seconds(word: str) -> float | None:
    try:
        moment = datetime.fromisoformat(word.removesuffix(" UTC"))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
