"""Encoded rows, in memory or, where they are too many, in nameless files that are read a window at a time."""

from __future__ import annotations

import errno
import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.data.loader import Batches
from penstock.data.schema import Rows, Schema, TableBatch
from penstock.errors import UserError

_DTYPES = (np.int32, np.float32, np.int32, np.float32, np.int64)
_BLOCK_BYTES = 1 << 19  # of rows that lie together: reading one costs little more than finding it
_WINDOW = 512  # blocks whose rows are mixed, a quarter of a gigabyte
_AHEAD = 16  # blocks read at a time where they are wanted in order


class Store:
    """Collects the encoded rows of a split.

    Args:
        schema: of the table.
        rows: how many there will be.
        folder: for the files, which may be unlinked after `finish`; ``None``: in memory.
    """

    def __init__(self, schema: Schema, rows: int, folder: Path | None) -> None:
        self.layout = list(zip(schema.shapes(rows), _DTYPES, strict=True))
        self.filled = 0
        self.arrays = [] if folder else [np.empty(shape, dtype) for shape, dtype in self.layout]
        self.paths = [folder / name for name in Rows._fields[: len(_DTYPES)]] if folder else []
        if folder:
            folder.mkdir()

    def append(self, rows: Rows) -> None:
        """Add the next rows."""
        parts = [part for part in rows if part is not None]
        for array, part in zip(self.arrays, parts, strict=False):
            array[self.filled : self.filled + len(part)] = part
        for path, part in zip(self.paths, parts, strict=False):
            with room(path.parent.parent), path.open("ab") as file:
                file.write(np.ascontiguousarray(part).tobytes())
        self.filled += len(rows.label)

    def finish(self) -> Rows:
        """All rows; those in files are mapped."""
        if self.paths:
            # An empty file cannot be mapped.
            self.arrays = [
                np.memmap(path, dtype, "r", shape=shape) if math.prod(shape) else np.empty(shape, dtype)
                for path, (shape, dtype) in zip(self.paths, self.layout, strict=True)
            ]
        return Rows(*self.arrays)


class DiskBatches(Batches):
    """Batches of mapped rows, as `TableBatch`, of which one window is in memory at a time.

    Reading single rows all over a file is slow. So an epoch takes the rows in blocks of half a megabyte, the blocks in
    random order, and mixes the rows within windows of 512 blocks. The rows are a ring that is cut into blocks at a random
    place, so that they are other blocks in each epoch. Without shuffling, windows are short and in order.

    Args:
        rows: what `Store.finish` gave.
        batch_size, shuffle, seed, steps: as for `Batches`.
    """

    def __init__(self, rows: Rows, batch_size: int, *, shuffle: bool = False, seed: int = 0, steps: int = 0) -> None:
        super().__init__(self._read, len(rows.label), batch_size, shuffle=shuffle, seed=seed, steps=steps)
        self.rows = rows
        row_bytes = sum(array[:1].nbytes for array in rows if array is not None)
        self.block = max(_BLOCK_BYTES // row_bytes, 1)
        self.window = self.block * (_WINDOW if shuffle else _AHEAD)
        self._held = (-1, -1)  # epoch and number of the window in memory
        self._window: Rows | None = None
        self._places = torch.empty(0, dtype=torch.int64)  # in the window, of the rows in the order of the epoch

    def _order(self) -> Tensor:
        """Places in the epoch; `_read` knows which rows have them."""
        return torch.arange(self.size)

    def _read(self, places: Tensor) -> TableBatch:
        parts = []
        numbers = places // self.window
        for number in numbers.unique().tolist():
            window = self._load(number)
            here = self._places[places[numbers == number] - number * self.window]
            parts.append(window.batch(here.numpy()))
        return TableBatch(*map(torch.cat, zip(*parts, strict=True)))

    def _load(self, number: int) -> Rows:
        """Bring a window into memory, its blocks one after the other, and mix the places of its rows."""
        if self._window is not None and self._held == (self.epoch, number):
            return self._window
        start, stop = number * self.window, min((number + 1) * self.window, self.size)
        blocks, shift, seed = self._cut()
        if self._window is None:
            most = min(self.window, self.size)
            parts = [part for part in self.rows if part is not None]
            self._window = Rows(*[np.empty((most, *part.shape[1:]), part.dtype) for part in parts])
        filled = 0
        for block in blocks[start // self.block : -(-stop // self.block)].tolist():
            first = (block * self.block + shift) % self.size
            length = min(self.block, self.size - block * self.block)
            # A block may go over the end of the ring.
            for low, high in ((first, min(first + length, self.size)), (0, first + length - self.size)):
                if high > low:
                    self._copy(self._window, filled, low, high)
                    filled += high - low
        self._places = torch.arange(filled)
        if self.shuffle:
            self._places = torch.randperm(filled, generator=torch.Generator().manual_seed(seed + number))
        self._held = (self.epoch, number)
        return self._window

    def _copy(self, window: Rows, place: int, low: int, high: int) -> None:
        for target, source in zip(window, self.rows, strict=True):
            if target is not None and source is not None:
                target[place : place + high - low] = source[low:high]
        release(self.rows)

    def _cut(self) -> tuple[Tensor, int, int]:
        """This epoch's order of blocks, the row at which the first begins, and the seed of its windows."""
        full = self.size // self.block
        if not self.shuffle:
            return torch.arange(full + 1), 0, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shift, seed = torch.randint(2**62, (2,), generator=generator).tolist()
        # A shorter block stays the last, so that the places of the others are known.
        return torch.cat([torch.randperm(full, generator=generator), torch.tensor([full])]), shift % self.size, seed


def batches(rows: Rows, batch_size: int, *, shuffle: bool = False, seed: int = 0, steps: int = 0) -> Batches:
    """Batches of encoded rows, as `TableBatch`; rows in memory are shuffled all together, others as `DiskBatches` does."""
    if _maps(rows):
        return DiskBatches(rows, batch_size, shuffle=shuffle, seed=seed, steps=steps)
    size = len(rows.label)
    return Batches(lambda index: rows.batch(index.numpy()), size, batch_size, shuffle=shuffle, seed=seed, steps=steps)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """What is written inside must fit on the disk of a temporary folder.

    Raises:
        UserError: if it does not.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{folder}: the disk is full; set TMPDIR to a folder on a larger one") from None


def release(rows: Iterable[NDArray[Any] | None]) -> None:
    """Take what was read of mapped arrays, as those of `Rows`, off the process's memory; it is read again when it is wanted."""
    for one in _maps(rows):
        one.madvise(mmap.MADV_DONTNEED)


def _maps(rows: Iterable[NDArray[Any] | None]) -> list[mmap.mmap]:
    return [base for array in rows if isinstance(base := getattr(array, "base", None), mmap.mmap)]
