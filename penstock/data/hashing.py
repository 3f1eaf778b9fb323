"""Numbers that stand for words, the same on every machine and under every version of every library."""

from __future__ import annotations

import zlib

import numpy as np
import polars as pl
from numpy.typing import NDArray


def hashed(words: pl.Series, seed: int = 0) -> NDArray[np.uint64]:
    """(rows,) a hash of each word: its CRC-32, mixed by the finaliser of splitmix64 (Steele et al. 2014).

    Args:
        words: text; null has the hash of "".
        seed: chooses among hashes that have nothing to do with each other.
    """
    words = words.fill_null("").alias("word")
    unique = words.unique()
    codes = pl.Series("code", [zlib.crc32(word.encode()) for word in unique], dtype=pl.UInt64)
    table = pl.DataFrame([unique, codes])
    found = words.to_frame().join(table, on="word", how="left", maintain_order="left")["code"].to_numpy()
    x = found + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
