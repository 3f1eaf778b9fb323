"""Batches whose order is a function of (seed, epoch): resumable in the middle of an epoch, sharded over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Batches:
    """An iterable of batches fetched by index.

    Args:
        fetch: from indices (N,) int64 to a batch (any tree of tensors with N rows).
        size: how many samples there are.
        batch_size: samples a batch, over all processes together.
        shuffle: whether each epoch has its own order, drawn from ``seed`` and the epoch's number.
        seed: of the order.
        drop_last: leave out a last batch that is not full.
        steps: cut the samples into so many batches of even sizes instead: they are this process's own, and others have
            some, too.

    Without ``steps``, each process of a group takes every world-size-th sample of each batch, so that the global
    batches are those of a single process. `state_dict` says where the latest iterator is; the first iterator after
    `load_state_dict` goes on from there, every other one starts the next epoch.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor], Any],
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        steps: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        self.fetch, self.size, self.batch_size = fetch, size, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.drop_last = drop_last and size >= batch_size
        self.steps = steps
        self.epoch = -1
        self.position = 0
        self._restored = False

    def __len__(self) -> int:
        if self.steps:
            return self.steps
        return self.size // self.batch_size if self.drop_last else math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if not self._restored:
            self.epoch, self.position = self.epoch + 1, 0
        self._restored = False
        return self._from(self._order(), self.position)

    def _from(self, order: Tensor, start: int) -> Iterator[Any]:
        for batch in range(start, len(self)):
            self.position = batch + 1
            yield self.fetch(self._indices(order, batch))

    def _indices(self, order: Tensor, batch: int) -> Tensor:
        if self.steps:
            return order[batch * self.size // self.steps : (batch + 1) * self.size // self.steps]
        return self._share(order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.size, generator=generator)

    @staticmethod
    def _share(indices: Tensor) -> Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            return indices[rank::world] if len(indices) >= world else indices
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        # A finished epoch has nothing left to go on with.
        self._restored = self.position < len(self)
