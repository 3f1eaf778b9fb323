"""A table read by several processes at once: each reads some of its parts, and what all saw is brought together.

A process that cannot go on sends its error in the place of what the others wait for, so that all end together.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch.distributed.rendezvous import rendezvous

from penstock.data.rawtables import RawTable
from penstock.errors import UserError

T = TypeVar("T")

#: Of waiting for another process, which may have far more to read; one that has died is noticed at once.
_PATIENCE = timedelta(days=7)
_rounds = count()


class Peers:
    """A process that reads by itself.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """What each process gives, in the order of their ranks; all must call it equally often.

        Raises:
            UserError: if another process cannot go on.
        """
        return [value]


#: Who reads tables together with this process; the laboratory sets it.
peers: ContextVar[Peers] = ContextVar("peers", default=Peers())  # noqa: B039 - it has no state


class _ElsewhereError(UserError):
    """What another process has raised, and all know of."""


class _Failure(NamedTuple):
    message: str


class Processes(Peers):
    """Several processes, in a group of their own, since Lightning makes its later.

    Args:
        store: where they find each other.
        rank, size: as of `Peers`.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._group = ProcessGroupGloo(store, rank, size, _PATIENCE)

    def gather(self, value: T) -> list[T]:
        every = self._exchange(value)
        for one in every:
            if isinstance(one, _Failure):
                raise _ElsewhereError(one.message)
        return every

    def _exchange(self, value: T) -> list[T]:
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = [int(length) for length in self._all(torch.tensor([len(mine)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = mine
        every = zip(self._all(padded), lengths, strict=True)
        return [pickle.loads(one[:length].numpy().tobytes()) for one, length in every]

    def _all(self, mine: Tensor) -> list[Tensor]:
        every = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            self._group.allgather([every], [mine]).wait()  # type: ignore[attr-defined]
        except RuntimeError:
            raise _ElsewhereError("another process of this run ended while the table was read") from None
        return every


def processes() -> Peers:
    """Those that torchrun, or another launcher like it, has started, or this one alone."""
    if not _are_several():
        return Peers()
    store, rank, size = next(rendezvous("env://"))
    return Processes(PrefixStore(f"penstock/data/{next(_rounds)}", store), rank, size)


def _are_several() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_to_end() -> bool:
    """Whether this process, which is about to end early, is the first of a run to do so: it says why, the others need not."""
    if not _are_several() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    # The launcher stops all processes as soon as one has ended, this one perhaps before it could say anything.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store, _, _ = next(rendezvous("env://"))
    return bool(PrefixStore("penstock/end", store).add("first", 1) == 1)


@contextmanager
def reading_together(together: Peers) -> Iterator[None]:
    """Tables read inside, by all, are divided between the processes.

    Raises:
        UserError: what any of them could not go on from, in all of them.
    """
    token = peers.set(together)
    try:
        yield
        together.gather(None)  # no one goes on while another may still fail
    except _ElsewhereError:
        raise
    except ValueError as error:
        together.gather(_Failure(str(error)))
        raise
    finally:
        peers.reset(token)


def can_be_divided(raw: RawTable, hands: int) -> bool:
    """Whether a table, as it lies on disk, can be read by several processes, each some parts of it."""
    return type(raw) is RawTable and len(raw.part_rows) >= hands


def is_even(rows: Sequence[int]) -> bool:
    """Whether no process has less than half of the rows that it would have if all had the same."""
    return min(rows) * 2 * len(rows) >= sum(rows)


def deal(rows: Sequence[int], hands: int) -> list[list[int]]:
    """Divide parts so that rows are as even as a simple rule makes them: the largest first, to who has the fewest rows.

    Args:
        rows: of each part.
        hands: how many receive some, no more than there are parts.

    Returns:
        for each, its parts by rising number.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    held = [0] * hands
    for part in sorted(range(len(rows)), key=lambda part: -rows[part]):
        least = min(range(hands), key=lambda hand: (held[hand], len(dealt[hand])))
        dealt[least].append(part)
        held[least] += rows[part]
    return [sorted(own) for own in dealt]


@dataclass(frozen=True)
class Share:
    """Which of a split's rows are here, where each process holds the rows of its own parts.

    Attributes:
        rank: of this process.
        rows: of each process.
        means: of each label over all rows.
    """

    rank: int
    rows: tuple[int, ...]
    means: tuple[float, ...]

    def steps(self, batch_size: int) -> int:
        """Batches of ``batch_size`` rows over all processes, as many as for one that has all rows unless a process has
        too few to give some to each."""
        return min(-(-sum(self.rows) // batch_size), min(self.rows))

    def weight(self, rows: int, batch_size: int) -> float:
        """Weight of the ``rows`` of a batch that are here, with which each row of the split counts alike in an epoch,
        though processes have batches of different sizes and their gradients are averaged."""
        return rows * len(self.rows) * self.steps(batch_size) / sum(self.rows)
