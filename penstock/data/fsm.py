"""TokFSM: walks through a random finite state machine, each state written as a few digits.

Tamkin, Taufeeque and Goodman, "Codebook Features" (2023), sec. 4. The machine is known, so that what a model has learnt of
it can be checked: which transitions it holds possible, and where it keeps the state it is in.

Shape legend: N states, E edges a state, D digits a state, B batch, L window, S states of a walk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.data.base import Data
from penstock.data.loader import Batches
from penstock.errors import UserError

_SPLITS = ("train", "validation", "test")


@dataclass
class FSMConfig:
    """Which machine, and how much of it is seen."""

    states: int = 20
    """States N."""
    edges: int = 4
    """Ways out of each state, all equally likely."""
    base: int = 5
    """Of the digits; a state has as many as its number needs (20 states in base 5: two)."""
    window: int = 16
    """Tokens a training sample sees at once: the start token and then digits."""
    sequences: int = 65_536
    """Walks in the training split."""
    test_sequences: int = 2_048
    """Walks in the test split, and as many in the validation split."""
    seed: int = 42
    """Of the machine; with 100 states, 10 edges and base 10 the default is the paper's own machine."""


class StateMachine:
    """A random machine: every state has as many distinct next states, drawn uniformly.

    Args:
        config: its size and seed.

    Attributes:
        next_NE: the next states of each, in order, int64.
        edges_NN: whether one state can follow another, boolean.
        digits_ND: how each state is written, int64; the most significant digit comes first.
        start: the token every walk begins with (the end token of the text); tokens below it are digits.

    Raises:
        UserError: for impossible sizes.
    """

    def __init__(self, config: FSMConfig) -> None:
        size, base = config.states, config.base
        if size < 1 or not 1 <= config.edges <= size:
            raise UserError(f"--fsm.edges {config.edges}: must be from 1 to the number of states, {size}")
        if base < 2:
            raise UserError(f"--fsm.base {base}: must be 2 or more")
        self.base = self.start = base
        draw = np.random.default_rng(config.seed)
        rows = [np.sort(draw.choice(size, size=config.edges, replace=False)) for _ in range(size)]
        self.next_NE = torch.from_numpy(np.stack(rows).astype(np.int64))
        self.edges_NN = torch.zeros(size, size, dtype=torch.bool).scatter_(1, self.next_NE, True)
        width = 1
        while base**width < size:
            width += 1
        powers = base ** torch.arange(width - 1, -1, -1)
        self.digits_ND = torch.arange(size)[:, None] // powers % base

    @property
    def num_states(self) -> int:
        return len(self.digits_ND)

    @property
    def num_digits(self) -> int:
        """Digits a state D."""
        return self.digits_ND.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.base + 1

    def walks(self, number: int, length: int, seed: int) -> Tensor:
        """Random walks from uniform first states, (number, length) int64."""
        generator = torch.Generator().manual_seed(seed)
        states = [torch.randint(self.num_states, (number,), generator=generator)]
        for _ in range(length - 1):
            edge = torch.randint(self.next_NE.shape[1], (number,), generator=generator)
            states.append(self.next_NE[states[-1], edge])
        return torch.stack(states, 1)

    def write(self, states_BS: Tensor) -> Tensor:
        """The start token and the states' digits, (B, 1 + S D)."""
        return torch.cat([torch.full_like(states_BS[:, :1], self.start), self.digits_ND[states_BS].flatten(1)], 1)

    def read(self, tokens_BL: Tensor) -> Tensor:
        """The states in tokens that begin with the start token, (B, S); -1 where they are none; a cut one is left out."""
        digits_BSD = tokens_BL[:, 1:].unfold(1, self.num_digits, self.num_digits)
        powers = self.base ** torch.arange(self.num_digits - 1, -1, -1)
        states_BS = (digits_BSD * powers).sum(-1)
        return states_BS.masked_fill((digits_BSD >= self.base).any(-1) | (states_BS >= self.num_states), -1)

    def valid(self, states_BS: Tensor) -> Tensor:
        """Whether each transition is an edge of the machine, (B, S - 1)."""
        before, after = states_BS[:, :-1], states_BS[:, 1:]
        return self.edges_NN[before, after] & (before >= 0) & (after >= 0)


class FSMData(Data):
    """Walks as windows of ``window + 1`` tokens, (B, L + 1) int64: a model reads the first L and predicts the last L.

    The last state may be cut in the middle. Its ``spec`` says under "fsm" which machine it is, see `machine_of`.

    Raises:
        UserError: for impossible sizes.
    """

    def __init__(self, config: FSMConfig) -> None:
        self.machine = StateMachine(config)
        if config.window < 2 * self.machine.num_digits:
            least = 2 * self.machine.num_digits
            raise UserError(f"--fsm.window {config.window}: must be {least} or more, to hold a transition")
        if min(config.sequences, config.test_sequences) < 1:
            raise UserError("--fsm.sequences and --fsm.test-sequences: must be 1 or more")
        self.spec = {
            "vocab_size": self.machine.vocab_size,
            "window": config.window,
            "bytes_per_token": 1.0,
            "tokenizer": "digits",
            "column": "text",
            "fsm": asdict(config),
        }
        sizes = (config.sequences, config.test_sequences, config.test_sequences)
        self.splits = {
            split: self._tokens(size, config.seed + number)
            for number, (split, size) in enumerate(zip(_SPLITS, sizes, strict=True), 1)
        }

    def _tokens(self, walks: int, seed: int) -> Tensor:
        length = self.spec["window"] + 1
        states_BS = self.machine.walks(walks, -(-length // self.machine.num_digits), seed)
        return self.machine.write(states_BS)[:, :length].to(torch.int16)

    def _batches(self, split: str, batch_size: int, *, seed: int | None = None) -> Batches:
        tokens = self.splits[split]
        shuffle = seed is not None
        return Batches(
            lambda rows: tokens[rows].long(),
            len(tokens),
            batch_size,
            shuffle=shuffle,
            seed=seed or 0,
            drop_last=shuffle,
        )

    def train(self, batch_size: int, seed: int) -> Batches:
        return self._batches("train", batch_size, seed=seed)

    def validation(self, batch_size: int) -> Batches:
        return self._batches("validation", batch_size)

    def test(self, batch_size: int) -> Batches:
        return self._batches("test", batch_size)

    def describe(self) -> dict[str, Any]:
        fsm = self.spec["fsm"]
        return {
            "origin": f"walks through a random finite state machine (seed {fsm['seed']})",
            "states": fsm["states"],
            "edges a state": fsm["edges"],
            "written as": f"{self.machine.num_digits} digits of base {fsm['base']}",
            "walks": {split: len(tokens) for split, tokens in self.splits.items()},
            "window": self.spec["window"],
        }


def machine_of(spec: Mapping[str, Any]) -> StateMachine | None:
    """The machine that data of this ``spec`` comes from; ``None`` if it is other data."""
    return StateMachine(FSMConfig(**spec["fsm"])) if "fsm" in spec else None
