"""The finite state machine: its edges, its digits, its walks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from penstock.data.fsm import FSMConfig, FSMData, StateMachine, machine_of
from penstock.errors import UserError

SMALL = FSMConfig(sequences=200, test_sequences=50)


def test_every_state_has_its_number_of_distinct_ways_out() -> None:
    machine = StateMachine(FSMConfig())
    assert machine.edges_NN.sum(1).tolist() == [4] * 20
    assert all(machine.edges_NN[n, m] for n in range(20) for m in machine.next_NE[n])


def test_the_papers_machine_is_numpys_draw_row_by_row() -> None:
    machine = StateMachine(FSMConfig(states=100, edges=10, base=10))
    draw = np.random.default_rng(42)
    for state in range(100):
        assert set(machine.next_NE[state].tolist()) == set(draw.choice(100, size=10, replace=False).tolist())


@pytest.mark.parametrize(("states", "base", "digits"), [(20, 5, 2), (100, 10, 2), (25, 5, 2), (26, 5, 3), (4, 10, 1)])
def test_a_state_has_as_many_digits_as_its_number_needs(states: int, base: int, digits: int) -> None:
    machine = StateMachine(FSMConfig(states=states, edges=2, base=base))
    assert machine.num_digits == digits
    for state, written in enumerate(machine.digits_ND.tolist()):
        assert int("".join(np.base_repr(d, 36) for d in written), base) == state


def test_walks_follow_edges_and_are_read_back() -> None:
    machine = StateMachine(FSMConfig())
    walks = machine.walks(300, 9, seed=1)
    tokens = machine.write(walks)
    assert tokens.shape == (300, 19)
    assert (tokens[:, 0] == machine.start).all()
    assert tokens[:, 1:].max() < machine.base
    assert torch.equal(machine.read(tokens), walks)
    assert torch.equal(machine.read(tokens[:, :-1]), walks[:, :-1]), "a state that is cut is left out"
    assert machine.valid(walks).all()
    assert walks[:, 0].bincount(minlength=20).min() > 0
    used = machine.edges_NN.clone().fill_(False)
    used[walks[:, :-1].flatten(), walks[:, 1:].flatten()] = True
    assert torch.equal(used, machine.edges_NN), "every way out is taken"


def test_what_is_no_state_or_no_edge_is_no_valid_transition() -> None:
    machine = StateMachine(FSMConfig())
    start, good = machine.start, machine.next_NE[0, 0]
    bad = (~machine.edges_NN[0]).nonzero()[0, 0]
    first = torch.tensor([[start, 0, 0, 4, 4, 0, start]])  # 4 4 is number 24: there are 20 states
    assert machine.read(first).tolist() == [[0, -1, -1]]
    assert not machine.valid(machine.read(first)).any()
    assert machine.valid(torch.stack([torch.tensor([0, 0]), torch.stack([good, bad])], 1)).tolist() == [[True], [False]]


def test_batches_are_windows_of_walks() -> None:
    data = FSMData(SMALL)
    batches = list(data.train(64, seed=0))
    assert len(batches) == 3, "the last batch, not full, is left out"
    assert batches[0].shape == (64, 17)
    assert batches[0].dtype == torch.int64
    for split in (data.train(64, 0), data.validation(64), data.test(64)):
        tokens = torch.cat(list(split))
        assert data.machine.valid(data.machine.read(tokens)).all()
    assert not torch.equal(data.splits["validation"], data.splits["test"])
    again = list(FSMData(SMALL).train(64, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(next(iter(data.train(64, seed=1))), batches[0])


def test_an_odd_window_cuts_the_last_state() -> None:
    data = FSMData(FSMConfig(window=15, sequences=10, test_sequences=5))
    tokens = next(iter(data.test(5)))
    assert tokens.shape == (5, 16)
    assert data.machine.read(tokens).shape == (5, 7)


def test_the_machine_comes_back_from_the_stored_spec() -> None:
    data = FSMData(SMALL)
    spec = json.loads(json.dumps(data.spec))
    machine = machine_of(spec)
    assert machine is not None
    assert torch.equal(machine.next_NE, data.machine.next_NE)
    assert machine_of({"vocab_size": 256}) is None
    assert data.describe()["written as"] == "2 digits of base 5"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"edges": 21}, "--fsm.edges 21: must be from 1 to the number of states, 20"),
        ({"edges": 0}, "--fsm.edges 0"),
        ({"base": 1}, "--fsm.base 1: must be 2 or more"),
        ({"window": 3}, "--fsm.window 3: must be 4 or more"),
        ({"sequences": 0}, "must be 1 or more"),
    ],
)
def test_impossible_machines_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        FSMData(FSMConfig(**changes))
