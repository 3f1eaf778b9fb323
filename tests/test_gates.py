"""The Gate contract: what gates say of themselves, and what `watch`, `force`, `ablate` and `twin` make of it."""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import tracemalloc
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import penstock
from penstock.gates import (
    ClosedError,
    FunctionGate,
    Gate,
    GateNotFoundError,
    GateStats,
    GateWarning,
    OpenGate,
    ParameterGate,
    Routing,
    SigmoidGate,
    Spec,
    TopKRouter,
    named_gates,
)
from penstock.gates.core import input_dims
from tests.models import GPT, Experts, Gated, NestedGate, Recurrence, Shared, SignedGate, Static, hooks_left

torch.set_num_threads(1)

INF = float("inf")


def identity(**declared: Any) -> FunctionGate:
    """A gate whose values are what it is given."""
    gate = FunctionGate(lambda values: values)
    for name, value in declared.items():
        setattr(gate, name, value)
    return gate


def watched(*batches: Tensor, unit_dims: int = 1, **declared: Any) -> dict[str, Any]:
    """The summary of a gate that gave these values."""
    gate = identity(unit_dims=unit_dims, **declared)
    with penstock.watch(gate) as log:
        for batch in batches:
            gate(batch)
    return log[""].summary()


class Model(nn.Module):
    """Two sigmoid gates and a router, to be told apart by pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated(4, SigmoidGate(4, 4)) for _ in range(2))
        self.experts = Experts(4, num_experts=3)

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.experts(x_BLD)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# What a gate declares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "closed", "opened"),
    [
        ({}, [0, 0, 0], [1, 1, 1]),
        ({"range": (0.0, 2.0)}, [0, 0, 0], [1, 1, 1]),
        ({"range": (-1.0, 1.0)}, [0, 0, 0], [1, 1, 1]),
        ({"range": (-INF, INF)}, [0, 0, 0], [1, 1, 1]),
        ({"range": (0.0, 0.5)}, [0, 0, 0], [0.5] * 3),
        ({"range": (0.5, 1.0)}, [0.5] * 3, [1, 1, 1]),
        ({"neutral": (-1.0, 3.0)}, [-1, -1, -1], [3, 3, 3]),
        ({"kind": "mask"}, [0, 0, 0], [1, 1, 1]),
        ({"kind": "decay"}, [0, 0, 0], [1, 1, 1]),
        ({"kind": "decay", "range": (-INF, 0.0)}, [-INF] * 3, [0, 0, 0]),
        ({"kind": "decay", "range": (-INF, 0.0), "neutral": (-30.0, 0.0)}, [-30] * 3, [0, 0, 0]),
        ({"kind": "simplex"}, None, [1 / 3] * 3),
        ({"kind": "one-hot"}, None, [1 / 3] * 3),
        ({"kind": "k-hot"}, [0, 0, 0], [1, 1, 1]),
        ({"kind": "ordinal"}, [1, 0, 0], [0, 0, 1]),
    ],
)
def test_open_and_closed_follow_from_kind_and_range(
    declared: dict[str, Any], closed: list[float] | None, opened: list[float]
) -> None:
    gate, x = identity(**declared), torch.rand(5, 2, 3)
    with penstock.force(gate, "open"):
        assert torch.equal(gate(x), torch.tensor(opened).expand(5, 2, 3))
    if closed is not None:
        with penstock.force(gate, "closed"):
            assert torch.equal(gate(x), torch.tensor(closed).expand(5, 2, 3).float())


@pytest.mark.parametrize("kind", ["simplex", "one-hot"])
def test_closing_what_cannot_close_names_gate_and_alternatives(kind: str) -> None:
    model = nn.ModuleDict({"router": identity(kind=kind, passes="expert")})
    with pytest.raises(ClosedError) as caught:
        penstock.force(model, "closed")
    for word in ("router", kind, "expert", "'open'", "'shuffle'", "'mean'", "number", "tensor"):
        assert word in str(caught.value)


def test_an_unknown_kind_is_refused_where_it_is_declared() -> None:
    with pytest.raises(TypeError, match=r"Odd\.kind is 'sigmoid'; it must be one of .*'scale'"):
        type("Odd", (Gate,), {"kind": "sigmoid"})
    with pytest.raises(TypeError, match=r"Odd\.passes is 'water'"):
        type("Odd", (Gate,), {"passes": "water"})
    with pytest.raises(ValueError, match="kind='sigmoid'"):
        penstock.watch(identity(kind="sigmoid"))
    with pytest.raises(ValueError, match="passes='water'"):
        penstock.mark(nn.Sigmoid(), kind="scale", passes="water")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"range=\(1\.0, 0\.0\)"):
        penstock.mark(nn.Sigmoid(), kind="scale", passes="channel", range=(1.0, 0.0))
    with pytest.raises(ValueError, match="names no indices"):
        penstock.mark(nn.Linear(2, 2), kind="simplex", passes="expert", output=("logits", "weights"))


def test_a_routing_as_a_dense_row_and_back() -> None:
    weights = torch.tensor([[0.7, 0.3], [0.4, 0.6]], requires_grad=True)
    routing = Routing(weights, torch.tensor([[2, 0], [1, 2]]), torch.randn(2, 4))
    dense = routing.dense()
    assert torch.equal(dense, torch.tensor([[0.3, 0, 0.7, 0], [0, 0.4, 0.6, 0]]))
    assert torch.equal(Routing.from_dense(dense).dense(), dense)
    assert routing.num_experts == 4
    dense[:, 2].sum().backward()
    assert torch.equal(weights.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize(
    ("given", "values", "declared", "leading"),
    [
        ((5, 4), (5, 4), {}, 1),
        ((5, 4), (5, 1), {}, 1),
        ((5, 7, 4), (5, 7, 4), {}, 2),
        ((5, 7, 4), (5, 7, 3, 1), {}, 2),
        ((5, 7, 4), (5, 7, 4, 1), {}, 2),  # as many heads as features
        ((5, 7, 4), (5, 7), {}, 2),
        ((5, 7, 4), (35, 6), {"kind": "simplex"}, 1),  # a router that flattens its tokens
        ((5, 7, 4), (5, 7), {"kind": "k-hot"}, 1),
        ((5, 6, 8, 9), (5, 6, 1, 1), {}, 1),
        ((5, 6, 8, 9), (5, 6), {}, 1),
        ((5, 6, 3, 8, 9), (5, 6, 1, 1, 1), {}, 1),
        ((5, 7, 4), (3, 3), {}, 0),
        ((5, 7, 4), (5, 7, 4), {"unit_dims": 2}, 1),
        ((5,), (5, 3), {"kind": "one-hot"}, 1),
    ],
)
def test_which_axes_number_inputs(
    given: tuple[int, ...], values: tuple[int, ...], declared: dict[str, Any], leading: int
) -> None:
    spec = Spec("feature", declared.pop("kind", "scale"), (0.0, 1.0), **declared)
    assert input_dims(spec, [torch.zeros(given)], torch.zeros(values)) == leading
    assert input_dims(spec, ((), {"levels": [torch.zeros(given)]}), torch.zeros(values)) == leading


def test_ids_have_no_features() -> None:
    spec = Spec("token", "scale", (0.0, 1.0))
    assert input_dims(spec, [torch.zeros(5, 7, dtype=torch.long)], torch.zeros(5, 7, 3)) == 2
    assert input_dims(spec, [None, 3], torch.zeros(5, 7)) == 0


# Finding gates -------------------------------------------------------------------------------------------------


def test_patterns_names_lists_and_predicates_find_gates() -> None:
    model = Model()
    everything = ["blocks.0.gate", "blocks.1.gate", "experts.router"]
    assert list(named_gates(model)) == everything
    assert list(named_gates(model, "blocks.*.gate")) == everything[:2]
    assert list(named_gates(model, "blocks.1.gate")) == everything[1:2]
    assert list(named_gates(model, ["*router", "blocks.0*"])) == ["experts.router", "blocks.0.gate"]
    assert list(named_gates(model, lambda name, gate: isinstance(gate, TopKRouter))) == everything[2:]


def test_any_name_of_a_shared_gate_finds_it_once() -> None:
    model = Shared()
    for pattern in ("left.gate", "right.gate", "left.again", "*"):
        assert list(named_gates(model, pattern)) == ["left.gate"]
    x = torch.randn(3, 4)
    with penstock.force(model, "open", "right.gate"), penstock.watch(model) as log:
        assert torch.allclose(model(x), model.left.proj(x) + model.right.proj(x) + 1)
    assert log["left.gate"].calls == 3


def test_names_with_the_letters_of_patterns_are_names() -> None:
    model = nn.ModuleDict({"price[usd]": SigmoidGate(2, 2), "a*": SigmoidGate(2, 2)})
    assert list(named_gates(model, "price[usd]")) == ["price[usd]"]
    assert list(named_gates(model, ["a*"])) == ["a*"]


@pytest.mark.parametrize("pattern", ["blocks.2.gate", ["*", "gate"], [], lambda name, gate: False])
def test_a_pattern_without_a_gate_is_an_error_that_lists_the_gates(pattern: Any) -> None:
    for call in (named_gates, penstock.watch, penstock.twin, lambda m, p: penstock.force(m, "open", p)):
        with pytest.raises(
            GateNotFoundError, match=r"matches no gate.*blocks\.0\.gate, blocks\.1\.gate, experts\.router"
        ):
            call(Model(), pattern)
    with pytest.raises(GateNotFoundError, match=r"blocks\.0\.gate, blocks\.1\.gate"):
        penstock.force(Model(), {"blocks.*.gate": "open", "blocks.*.gat": "closed"})


def test_a_model_without_gates_is_an_error_that_says_what_to_do() -> None:
    for call in (named_gates, penstock.watch, penstock.twin, lambda m: penstock.force(m, "open")):
        with pytest.raises(GateNotFoundError, match=r"no gates.*penstock\.mark"):
            call(nn.Linear(2, 2))


# Statistics ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    units=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    offset=st.sampled_from([0.0, 1e-6, 0.3]),
    scale=st.sampled_from([1e-7, 0.5]),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_any_split_into_batches_gives_the_statistics_of_the_whole(
    rows: int, units: int, dtype: torch.dtype, offset: float, scale: float, cuts: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (offset + scale * torch.rand(rows, units, generator=generator)).to(dtype)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    summary = watched(*(values[a:b] for a, b in pairwise(edges)))
    x = values.double().numpy()
    within, between = x.var(0).mean(), x.mean(0).var()

    def close(expected: Any) -> Any:
        return pytest.approx(expected, rel=1e-10, abs=1e-13)

    assert summary["inputs"] == rows
    assert summary["units"] == units
    assert summary["mean"] == close(x.mean())
    assert summary["unit_means"] == close(x.mean(0).tolist())
    assert summary["std"] ** 2 == close(x.var())
    if x.var() > 1e-16:
        assert summary["from_input"] == pytest.approx(within / (within + between), rel=1e-8, abs=1e-8)
    assert summary["histogram"] == close((np.histogram(x, 20, (0.0, 1.0))[0] / x.size).tolist())
    assert summary["below_05"] == close((x < 0.05).mean())
    assert summary["above_95"] == close((x >= 0.95).mean())
    assert summary["effective"] == close((x.sum(1) ** 2 / np.maximum((x**2).sum(1), 1e-300)).mean())
    assert summary["dead"] == int((x.max(0) < 1e-5).sum())


def test_large_gates_are_counted_in_parts_exactly() -> None:
    values = torch.rand(3, 1001, 331)
    summary = watched(values, unit_dims=1)
    x = values.double().numpy().reshape(-1, 331)
    assert summary["std"] == pytest.approx(x.std(), rel=1e-12)
    assert summary["unit_means"] == pytest.approx(x.mean(0).tolist(), rel=1e-12)
    assert sum(summary["histogram"]) == pytest.approx(1, rel=1e-12)
    assert summary["below_05"] == (x < 0.05).mean()


def test_shares_below_and_above_are_of_the_range() -> None:
    values = torch.tensor([[0.0, 0.04, 0.06], [0.94, 0.96, 1.0]], dtype=torch.float64)
    assert [watched(values)[key] for key in ("below_05", "above_95")] == [2 / 6, 2 / 6]
    twice = watched(2 * values, range=(0.0, 2.0))
    assert [twice["below_05"], twice["above_95"]] == [2 / 6, 2 / 6]
    signed = watched(2 * values - 1, range=(-1.0, 1.0))
    assert [signed["below_05"], signed["above_95"]] == [2 / 6, 2 / 6]
    decay = watched(values.log(), kind="decay", range=(-INF, 0.0))
    assert [decay["below_05"], decay["above_95"]] == [2 / 6, 2 / 6]
    just_below = np.nextafter(np.float32(0.95), np.float32(0))
    assert watched(torch.tensor([[just_below]]))["above_95"] == 0


@pytest.mark.parametrize(
    ("range", "values", "below", "above"),
    [
        ((0.0, INF), [0.01, 0.5, 1.5, 80.0], 1, 2),
        ((-INF, INF), [-3.0, 0.0, 0.99, 7.0], 1, 2),
        ((2.0, INF), [2.0, 2.5, 3.0, 9.0], 1, 2),
    ],
)
def test_a_range_without_end_counts_to_one(
    range: tuple[float, float], values: list[float], below: int, above: int
) -> None:
    summary = watched(torch.tensor([values]), range=range)
    assert (summary["below_05"], summary["above_95"]) == (below / 4, above / 4)
    assert summary["mean"] == pytest.approx(np.float32(values).mean(dtype=np.float64))


def test_variance_is_split_between_inputs_and_units() -> None:
    rows, units = torch.rand(50, 1, dtype=torch.float64), torch.rand(1, 6, dtype=torch.float64)
    by_input, by_unit = rows.expand(50, 6), units.expand(50, 6)
    assert watched(by_input)["from_input"] == pytest.approx(1, abs=1e-12)
    assert watched(by_unit)["from_input"] == pytest.approx(0, abs=1e-12)
    both = watched(by_input + by_unit, range=(0.0, 2.0))
    a, b = rows.var(correction=0).item(), units.var(correction=0).item()
    assert both["from_input"] == pytest.approx(a / (a + b), rel=1e-12)
    assert watched(torch.full((50, 6), 0.3))["from_input"] is None
    # A gate that only learns, and never looks at its input, is static however its values move.
    gate = ParameterGate(3)
    with penstock.watch(gate) as log:
        for value in (0.0, 1.0):
            gate.logit.data.fill_(value)
            gate()
    assert log[""].summary()["from_input"] is None
    assert log[""].summary()["static"]


def test_positions_are_inputs_and_heads_are_units() -> None:
    model, ids = GPT(), torch.randint(0, 11, (3, 5))
    with penstock.watch(model, "blocks.0.gate", keep="values") as log:
        model(ids)
        model(ids[:2, :4])
    first, second = log.values()["blocks.0.gate"]
    x = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])[..., 0].double()
    summary = log["blocks.0.gate"].summary()
    assert (summary["inputs"], summary["units"]) == (3 * 5 + 2 * 4, 4)
    assert summary["unit_means"] == pytest.approx(x.mean(0).tolist(), rel=1e-12)
    within, between = x.var(0, correction=0).mean(), x.mean(0).var(correction=0)
    assert summary["from_input"] == pytest.approx(float(within / (within + between)), rel=1e-10)


def test_units_that_change_in_number_are_counted_as_one() -> None:
    calls = [
        torch.rand(4, 6, dtype=torch.float64),
        torch.rand(3, 9, dtype=torch.float64),
        torch.rand(2, 6, dtype=torch.float64),
    ]
    summary = watched(*calls)
    x = torch.cat([call.flatten() for call in calls]).numpy()
    assert (summary["units"], summary["inputs"], summary["calls"]) == (1, x.size, 3)
    assert summary["mean"] == pytest.approx(x.mean(), rel=1e-12)
    assert summary["std"] == pytest.approx(x.std(), rel=1e-12)
    assert summary["from_input"] is None
    effective = torch.cat([c.sum(1).square() / c.square().sum(1) for c in calls]).mean()
    assert summary["effective"] == pytest.approx(effective.item(), rel=1e-12)
    assert summary["histogram"] == pytest.approx((np.histogram(x, 20, (0.0, 1.0))[0] / x.size).tolist(), rel=1e-12)
    # The same number of other units is a change too.
    assert watched(torch.rand(2, 3, 4), torch.rand(2, 4, 3), unit_dims=2)["units"] == 1


def test_a_changing_number_of_choices_keeps_its_row_statistics() -> None:
    calls = [torch.rand(4, 6).double().softmax(-1), torch.rand(5, 3).double().softmax(-1)]
    summary = watched(*calls, kind="simplex", unit_dims=None)
    entropies = torch.cat([torch.special.entr(call).sum(-1) for call in calls])
    assert summary["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-12)
    assert summary["effective"] == pytest.approx(entropies.exp().mean().item(), rel=1e-12)
    assert len(summary["load"]) == 1


def test_router_statistics_against_their_definitions() -> None:
    router = TopKRouter(8, 6, 2)
    with torch.no_grad():
        router.proj.weight[5] = 0  # An expert that is never among the best two ...
        router.proj.weight[4] = router.proj.weight[3]
    tokens = torch.rand(40, 8)
    with torch.no_grad():
        router.proj.weight[0] = 1.0  # ... because two others always win.
        router.proj.weight[1] = 0.9
    with penstock.watch(router) as log:
        for batch in tokens.split(13):
            router(batch)
    logits = (tokens @ router.proj.weight.T).detach().double().numpy()
    order = np.argsort(-logits, 1)[:, :2]
    top = np.take_along_axis(logits, order, 1)
    weights = np.exp(top - top.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    load = np.bincount(order.flatten(), minlength=6) / 40
    entropy = -(weights * np.log(weights)).sum(1)
    summary = log[""].summary()
    assert summary["load"] == pytest.approx(load.tolist())
    assert summary["load_cv"] == pytest.approx(load.std() / load.mean())
    assert summary["unused"] == pytest.approx((load == 0).mean())
    assert summary["unused"] > 0
    assert summary["dead"] == (load == 0).sum()
    assert summary["entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert summary["effective"] == pytest.approx(np.exp(entropy).mean(), rel=1e-5)


def test_masks_have_the_entropy_and_the_effective_number_of_what_they_keep() -> None:
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    summary = watched(mask, kind="k-hot")
    assert summary["effective"] == pytest.approx((3 + 1 + 0) / 3)
    assert summary["entropy"] == pytest.approx(math.log(3) / 3)
    assert summary["load"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])
    assert watched(torch.eye(4), kind="one-hot")["entropy"] == 0


def test_dead_and_effective_count_what_passes_whatever_its_sign() -> None:
    values = torch.tensor([[0.0, -1.0, 1.0], [0.0, -1.0, -1.0]])
    summary = watched(values, range=(-1.0, 1.0))
    assert summary["dead"] == 1
    assert summary["effective"] == pytest.approx(2)
    decay = watched(torch.tensor([[-40.0, 0.0], [-50.0, -1.0]]), kind="decay", range=(-INF, 0.0))
    assert decay["dead"] == 1


def test_values_that_are_not_numbers_or_not_there_break_nothing() -> None:
    summary = watched(torch.zeros(0, 3), torch.full((2, 3), 0.5), torch.zeros(0, 3))
    assert (summary["calls"], summary["inputs"], summary["mean"]) == (1, 2, 0.5)
    assert math.isnan(watched(torch.tensor([[0.5, math.nan]]))["mean"])
    assert watched(torch.tensor([[True, False]]), kind="mask")["mean"] == 0.5
    assert watched(torch.zeros(0, 3)) == {"passes": "feature", "kind": "scale", "calls": 0}
    assert watched(torch.tensor(0.25), unit_dims=0)["mean"] == 0.25


def test_every_nth_call_is_looked_at() -> None:
    gate = identity()
    with penstock.watch(gate, every=3, keep="values") as log:
        for number in range(8):
            gate(torch.full((1, 1), float(number)))
    assert [value.item() for value in log.values()[""]] == [0, 3, 6]
    assert log[""].calls == 3
    with pytest.raises(ValueError, match="every=0"):
        penstock.watch(gate, every=0)


def test_kept_values_are_of_use_outside_inference_mode_and_after_the_model_wrote_into_them() -> None:
    gate, x = SigmoidGate(3, 3), torch.randn(4, 3)
    own = gate(x)
    with penstock.watch(gate, keep="values") as log, torch.inference_mode():
        gate(x).zero_()
    (kept,) = log.values()[""]
    assert torch.equal(kept, own)
    weight = torch.ones(3, requires_grad=True)
    (weight * kept * log.mean()[""]).sum().backward()
    assert torch.allclose(weight.grad, own.sum(0) * own.mean(0))


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    gates = nn.ModuleList([SigmoidGate(4, 4), TopKRouter(4, 3, 2)])

    def held() -> tuple[int, int]:
        gc.collect()
        floats = sum(v.numel() for name in log for v in vars(log[name]).values() if isinstance(v, Tensor))
        return floats, tracemalloc.get_traced_memory()[0]

    seen = []
    with torch.no_grad(), penstock.watch(gates) as log:
        tracemalloc.start()
        for batch in range(1000):
            for gate in gates:
                gate(torch.randn(8, 4))
            if batch % 200 == 199:
                seen.append(held())
        tracemalloc.stop()
    assert log["0"].calls == 1000
    assert len({floats for floats, _ in seen}) == 1
    # PyTorch fills pools of its own at first; what grows with the batches would grow every time.
    assert min(later - earlier for (_, earlier), (_, later) in pairwise(seen)) < 200 * 8


def test_the_log_reads_as_table_dictionary_picture_and_mean() -> None:
    model, x = Model().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    with penstock.watch(model) as log:
        model(x)
    assert json.loads(json.dumps(log.to_dict())).keys() == set(log)
    table = log.table()
    assert [row["gate"] for row in table] == list(log)
    lines = str(table).splitlines()
    assert len(lines) == 4
    assert all(word in lines[0] for word in ("gate", "mean", "below_05", "from_input", "load_cv", "unused"))
    assert lines[1].startswith("blocks.0.gate")
    assert len(log.plot().axes) == 3
    means = log.mean()
    assert means["blocks.0.gate"].dtype == torch.float64
    assert torch.allclose(means["blocks.0.gate"], model.blocks[0].gate(x).mean((0, 1)), rtol=1e-12)
    with pytest.raises(ValueError, match="keep="):
        log.values()
    with pytest.raises(ValueError, match="keep='everything'"):
        penstock.watch(model, keep="everything")  # type: ignore[arg-type]


def test_a_gate_can_be_held_at_its_watched_mean() -> None:
    model, x = Model().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    with penstock.watch(model) as log:
        model(x)
    with penstock.force(model, log.mean()), penstock.watch(model) as held:
        model(torch.randn(2, 3, 4, dtype=torch.float64))
    for name in log:
        assert held[name].summary()["unit_means"] == pytest.approx(log[name].summary()["unit_means"], rel=1e-12)
        assert held[name].summary()["from_input"] == pytest.approx(0, abs=1e-12)


def test_a_log_can_be_opened_again_but_not_twice_at_once() -> None:
    gate = SigmoidGate(2, 2)
    log = penstock.watch(gate)
    for _ in range(2):
        with log:
            gate(torch.randn(3, 2))
            with pytest.raises(RuntimeError, match="open already"):
                log.__enter__()
    assert log[""].calls == 2
    assert hooks_left(gate) == 0


# Gradients of gates --------------------------------------------------------------------------------------------


def trained(model: nn.Module, x: Tensor) -> list[str]:
    with penstock.watch(model) as log:
        model(x).square().sum().backward()
    assert hooks_left(model) == 0
    return log.without_gradient()


def test_gate_parameters_that_get_no_gradient_are_named() -> None:
    x = torch.randn(3, 4)
    learning = Gated(4, SigmoidGate(4, 4))
    assert trained(learning, x) == []

    class Detached(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) * self.gate(x).detach()

    assert trained(Detached(4, SigmoidGate(4, 4)), x) == ["gate.proj.bias", "gate.proj.weight"]


def test_a_gradient_of_nothing_but_zeros_is_none() -> None:
    model = Gated(4, SigmoidGate(4, 4))
    model.gate.proj.bias.data.fill_(-1e4)  # The sigmoid is saturated: shut for good.
    assert trained(model, torch.randn(3, 4)) == ["gate.proj.bias", "gate.proj.weight"]


def test_nothing_is_named_without_training_or_for_frozen_parameters() -> None:
    model = Gated(4, SigmoidGate(4, 4))
    with penstock.watch(model) as log:
        model(torch.randn(3, 4))
    assert log.without_gradient() == []
    model.gate.proj.bias.requires_grad_(False)
    assert trained(model, torch.randn(3, 4)) == []


def test_nested_gates_name_a_parameter_once() -> None:
    model = Gated(4, NestedGate(4))
    assert trained(model, torch.randn(3, 4)) == []
    model.gate.outer.weight.data.zero_()  # Nothing of the inner gate arrives.
    assert trained(model, torch.randn(3, 4)) == ["gate.inner.proj.bias", "gate.inner.proj.weight"]


# Forcing -------------------------------------------------------------------------------------------------------


def test_gates_are_forced_differently_by_pattern() -> None:
    model, x = Model(), torch.randn(2, 3, 4)
    with (
        penstock.force(model, {"blocks.0.*": 0.25, ("blocks.1.gate",): "closed", "*router": 1}),
        penstock.watch(model, keep="values") as log,
    ):
        model(x)
    values = log.values()
    assert torch.equal(values["blocks.0.gate"][0], torch.full((2, 3, 4), 0.25))
    assert torch.equal(values["blocks.1.gate"][0], torch.zeros(2, 3, 4))
    assert torch.equal(values["experts.router"][0], torch.tensor([0.0, 1.0, 0.0]).expand(6, 3))


def test_of_two_patterns_for_a_gate_the_later_has_the_last_word() -> None:
    model, x = Model(), torch.randn(2, 3, 4)
    with penstock.force(model, {"*": "open", "blocks.1.gate": 0.5}), penstock.watch(model) as log:
        model(x)
    assert [log[name].summary()["mean"] for name in log] == pytest.approx([1.0, 0.5, 1 / 3])


def test_the_inner_context_has_the_last_word_and_a_watch_sees_what_came_before_it() -> None:
    gate, x = SigmoidGate(3, 3), torch.randn(5, 3)
    own = gate(x).double().mean().item()
    with penstock.watch(gate) as outside, penstock.force(gate, 0.25), penstock.watch(gate) as between:
        with penstock.force(gate, lambda values: 2 * values), penstock.watch(gate) as inside:
            assert torch.equal(gate(x), torch.full((5, 3), 0.5))
        assert torch.equal(gate(x), torch.full((5, 3), 0.25))
    assert outside[""].summary()["mean"] == pytest.approx(own)
    assert between[""].summary()["mean"] == 0.25
    assert inside[""].summary()["mean"] == 0.5
    assert hooks_left(gate) == 0


def test_contexts_may_close_in_any_order() -> None:
    gate, x = SigmoidGate(3, 3), torch.randn(5, 3)
    first, second = penstock.force(gate, 0.25), penstock.force(gate, 0.5)
    run = torch.compile(nn.Sequential(gate), backend="eager")
    own = run(x)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(gate(x), torch.full((5, 3), 0.5))
    assert torch.equal(run(x), torch.full((5, 3), 0.5))
    second.__exit__(None, None, None)
    assert hooks_left(gate) == 0
    assert torch.equal(run(x), own)


def test_a_hook_of_the_users_own_stays() -> None:
    gate, x = SigmoidGate(3, 3), torch.randn(5, 3)
    seen: list[Tensor] = []
    handle = gate.register_forward_hook(lambda module, args, output: seen.append(output))
    with penstock.force(gate, "open"), penstock.watch(gate):
        gate(x)
    gate(x)
    assert len(seen) == 2
    handle.remove()
    assert hooks_left(gate) == 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        (1, [1, 1, 1]),
        (torch.tensor([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        (torch.tensor([[0.7]], dtype=torch.float64), [0.7, 0.7, 0.7]),
        (lambda values: 0 * values + 2, [2, 2, 2]),
    ],
)
def test_numbers_tensors_and_functions(how: Any, expected: list[float]) -> None:
    gate = SigmoidGate(3, 3)
    with penstock.force(gate, how):
        values = gate(torch.randn(4, 3))
    assert torch.equal(values, torch.tensor(expected).float().expand(4, 3))


def test_a_forced_tensor_is_a_constant_even_if_it_could_learn() -> None:
    gate, given = SigmoidGate(3, 3), torch.ones(3, requires_grad=True)
    for how in (given, [given]):
        with penstock.force(gate, how):
            assert not gate(torch.randn(4, 3)).requires_grad


@pytest.mark.parametrize("kind", ["simplex", "k-hot", "one-hot", "ordinal"])
def test_a_number_names_the_entry_of_a_gate_that_chooses(kind: str) -> None:
    gate = identity(kind=kind)
    with penstock.force(gate, 1):
        assert torch.equal(gate(torch.rand(2, 3)), torch.tensor([[0.0, 1.0, 0.0]] * 2))
    with penstock.force(gate, -1):
        assert torch.equal(gate(torch.rand(2, 3)), torch.tensor([[0.0, 0.0, 1.0]] * 2))
    with penstock.force(gate, 3), pytest.raises(ValueError, match=r"no entry 3: the gate chooses among 3 \(0 to 2\)"):
        gate(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"0\.5 names no entry"):
        penstock.force(gate, 0.5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("opened", "cannot force 'opened': it must be one of open, closed, shuffle, mean, freeze"),
        (True, "cannot force a bool"),
        (None, "cannot force a NoneType"),
        ([0.1, 0.2], "cannot force a list"),
        ([], "cannot force a list"),
        (np.zeros(3), "cannot force a ndarray"),
    ],
)
def test_what_cannot_be_forced_is_refused_at_once(how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        penstock.force(SigmoidGate(3, 3), how)


def test_a_mapping_brings_its_own_patterns() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0"):
        penstock.force(Model(), {"*": "open"}, "blocks.0.gate")
    with pytest.raises(GateNotFoundError, match="empty mapping"):
        penstock.force(Model(), {})


def test_what_does_not_fit_is_an_error_with_gate_and_shapes() -> None:
    model, x = nn.ModuleDict({"gate": SigmoidGate(3, 3)}), torch.randn(4, 3)
    for how in (torch.zeros(2), torch.zeros(1, 4, 3), lambda values: torch.zeros(5)):
        with (
            penstock.force(model, how),
            pytest.raises(ValueError, match=r"gate gate: .* does not broadcast .*\(4, 3\)"),
        ):
            model["gate"](x)
    with penstock.force(model, lambda values: None), pytest.raises(ValueError, match=r"gate gate: .* NoneType"):
        model["gate"](x)
    with penstock.force(model, "freeze"):
        model["gate"](x)
        with pytest.raises(ValueError, match=r"\(4, 3\) does not broadcast .*\(2, 3\)"):
            model["gate"](x[:2])
    with penstock.force(model, [torch.zeros(3)]):
        model["gate"](x)
        with pytest.raises(ValueError, match=r"more often .* tensors to force \(1\)"):
            model["gate"](x)
    assert hooks_left(model) == 0


def test_an_error_in_the_users_function_arrives_as_it_is() -> None:
    gate = SigmoidGate(3, 3)

    def broken(values: Tensor) -> Tensor:
        raise ValueError("of the user")

    with penstock.force(gate, broken), pytest.raises(ValueError, match=r"^of the user$"):
        gate(torch.randn(2, 3))


def test_a_forcing_is_open_once_at_a_time_and_starts_anew() -> None:
    gate = SigmoidGate(3, 3)
    forcing = penstock.force(gate, "freeze")
    with forcing, pytest.raises(RuntimeError, match="open already"):
        forcing.__enter__()
    for _ in range(2):
        x = torch.randn(4, 3)
        with forcing:
            assert torch.equal(gate(x), gate(-x))
        assert not torch.equal(gate(x), gate(-x))


@pytest.mark.parametrize(
    ("where", "forced"),
    [
        (1, [1]),
        (-1, [3]),
        (slice(0, 2), [0, 1]),
        ([0, 3], [0, 3]),
        (torch.tensor([2, 1]), [1, 2]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([False, False, True, False], [2]),
    ],
)
def test_where_restricts_to_entries_of_the_last_axis(where: Any, forced: list[int]) -> None:
    gate, x = SigmoidGate(3, 4), torch.randn(5, 3)
    own = gate(x)
    with penstock.force(gate, "closed", where=where):
        values = gate(x)
    others = [i for i in range(4) if i not in forced]
    assert torch.equal(values[:, forced], torch.zeros(5, len(forced)))
    assert torch.equal(values[:, others], own[:, others])


def test_where_may_be_a_mask_of_positions_or_a_function_of_the_values() -> None:
    gate, x = SigmoidGate(3, 4), torch.randn(5, 3)
    own = gate(x)
    rows = torch.tensor([True, False, True, False, False])[:, None]
    with penstock.force(gate, 2.0, where=rows):
        assert torch.equal(gate(x), torch.where(rows, 2.0, own))
    with penstock.force(gate, "closed", where=lambda values: values < 0.5):
        assert torch.equal(gate(x), torch.where(own < 0.5, 0.0, own))
    with penstock.force(gate, lambda values: 3 * values, where=0):
        assert torch.equal(gate(x)[:, 0], 3 * own[:, 0])


@pytest.mark.parametrize("where", [4, [0, 9], slice(7, 9), [], torch.zeros(3, dtype=torch.bool)])
def test_where_outside_the_gate_is_an_error(where: Any) -> None:
    gate = SigmoidGate(3, 4)
    with penstock.force(gate, "open", where=where), pytest.raises(ValueError, match=r"where.*4"):
        gate(torch.randn(5, 3))


def test_what_where_leaves_alone_still_learns() -> None:
    model = Gated(4, SigmoidGate(4, 4))
    with penstock.force(model, "open", where=[0, 1]):
        model(torch.randn(3, 4)).sum().backward()
    gradient = model.gate.proj.bias.grad
    assert torch.equal(gradient[:2], torch.zeros(2))
    assert (gradient[2:] != 0).all()


def test_the_mean_is_of_each_unit_over_batch_and_positions() -> None:
    model, ids = GPT(), torch.randint(0, 11, (3, 5))
    with penstock.watch(model, "blocks.0.gate", keep="values") as own:
        model(ids)
    with penstock.force(model, "mean"), penstock.watch(model, "blocks.0.gate", keep="values") as log:
        model(ids)
    (before,), (after,) = own.values()["blocks.0.gate"], log.values()["blocks.0.gate"]
    assert torch.allclose(after, before.mean((0, 1)).expand(3, 5, 4, 1))


def test_a_shuffle_is_one_cycle_alike_in_all_gates_and_set_by_its_seed() -> None:
    a, b, x = identity(), identity(), torch.arange(9.0)[:, None]
    model = nn.ModuleDict({"a": a, "b": b})
    with penstock.force(model, "shuffle"):
        order = a(x).flatten()
        assert torch.equal(b(x).flatten(), order)
    place, visited = 0, []
    for _ in range(9):
        place = int(order[place])
        visited.append(place)
    assert sorted(visited) == list(range(9))
    assert visited[-1] == 0
    with penstock.force(model, "shuffle", seed=1):
        assert not torch.equal(a(x).flatten(), order)


def test_a_shuffle_recomputed_by_checkpointing_is_the_same() -> None:
    model, x = Gated(4, SigmoidGate(4, 4)).double(), torch.randn(6, 4, dtype=torch.float64)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        with penstock.force(model, "shuffle"):
            run(x).square().sum().backward()
        gradients.append(model.proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_gate_counts_as_unchanged_only_if_no_batch_changed() -> None:
    gate, x = SigmoidGate(3, 3), torch.randn(5, 3)
    with warnings.catch_warnings(), penstock.force(gate, "shuffle") as forcing:
        warnings.simplefilter("error")
        gate(x)
        gate(x[:1])  # The last batch of an epoch may be a single sample.
        assert forcing.unchanged == set()
    with penstock.force(gate, "shuffle") as forcing:
        with pytest.warns(GateWarning, match="single sample"):
            gate(x[:1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gate(x[:1])  # Said once.
            assert forcing.unchanged == {""}
            gate(x)
            assert forcing.unchanged == set()
    with pytest.warns(GateWarning, match="same values"), penstock.force(gate, "shuffle") as forcing:
        gate(x[:1].expand(4, 3))
    assert forcing.unchanged == {""}


def test_a_model_that_writes_into_gate_values_spoils_nothing() -> None:
    gate, given = SigmoidGate(3, 3), torch.full((4, 3), 0.5)
    for how in (given, given[:1], "freeze", [given] * 2):
        with penstock.force(gate, how):
            values = [gate(torch.zeros(4, 3)).clone()]
            gate(torch.zeros(4, 3)).mul_(3)
            if not isinstance(how, list):
                values.append(gate(torch.zeros(4, 3)))
        assert all(torch.equal(value, values[0]) for value in values)
    assert torch.equal(given, torch.full((4, 3), 0.5))


# Routers -------------------------------------------------------------------------------------------------------


def test_a_forced_expert_takes_every_token() -> None:
    model, x = Experts(), torch.randn(2, 3, 8)
    for number, expert in enumerate(model.experts):
        with penstock.force(model, number):
            assert torch.allclose(model(x), expert(x), atol=1e-6)


def test_an_open_router_averages_all_experts() -> None:
    model, x = Experts().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    with penstock.force(model, "open"):
        assert torch.allclose(model(x), torch.stack([expert(x) for expert in model.experts]).mean(0), rtol=1e-12)


def test_a_router_takes_dense_rows_routings_and_functions() -> None:
    model, x = Experts().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    outputs = [expert(x) for expert in model.experts]
    row = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    expected = 0.5 * outputs[0] + 0.25 * (outputs[2] + outputs[3])
    with penstock.force(model, row):
        assert torch.allclose(model(x), expected, rtol=1e-12)
    with penstock.force(model, lambda routing: row):
        assert torch.allclose(model(x), expected, rtol=1e-12)

    def first_choice(routing: Routing) -> Routing:
        return Routing(torch.ones_like(routing.weights[:, :1]), routing.indices[:, :1], routing.logits)

    with penstock.force(model, first_choice), penstock.watch(model) as log:
        model(x)
    assert log["router"].summary()["effective"] == pytest.approx(1)
    own = model.router(x.flatten(0, 1)).dense()
    with penstock.force(model, torch.tensor(0.0), where=3), penstock.watch(model, keep="values") as log:
        model(x)
    assert torch.equal(log.values()["router"][0], own * torch.tensor([1, 1, 1, 0]))
    with penstock.force(model, first_choice, where=[0, 1]):
        row = model.router(x.flatten(0, 1)).dense()
    assert torch.equal(row[:, :2], (own[:, :2] > 0.5).double())
    assert torch.equal(row[:, 2:], own[:, 2:])


def test_a_functions_gradient_reaches_the_router() -> None:
    model, x = Experts(), torch.randn(2, 3, 8)
    with penstock.force(model, lambda routing: routing.dense() * 0.5):
        model(x).square().sum().backward()
    assert model.router.proj.weight.grad.any()


# Twins ---------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A model with a noisy router, a static gate and normalisation, to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.experts.router = TopKRouter(8, 4, 2, noise=True)
        self.scale = ParameterGate(8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD = self.experts(x_BLD) * self.scale()
        return self.norm(y_BLD.flatten(0, 1)).view_as(y_BLD)


class Bilinear(Gate):
    """A gate that PyTorch lets run in one dtype only: (B, D) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, x_BD: Tensor) -> Tensor:
        return torch.einsum("bd,de->be", x_BD, self.weight).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_twin_follows_the_model_to_other_precisions(dtype: torch.dtype) -> None:
    twin = penstock.twin(Static()).to(dtype)
    assert twin(torch.randn(3, 4, dtype=dtype)).dtype == dtype
    for gate in (SigmoidGate(4, 4), Bilinear(4), FunctionGate(torch.sigmoid)):
        twin = penstock.twin(Gated(4, gate)).to(dtype)
        x = torch.randn(3, 4, dtype=dtype)
        assert torch.equal(twin(x), twin.proj(x))
        assert twin(x).dtype == dtype


def test_a_twin_runs_under_autocast() -> None:
    model, x = Gated(4, nn.Sequential(nn.LayerNorm(4), SigmoidGate(4, 4))), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(penstock.twin(model)(x), model.proj(x))


def test_a_static_gate_of_a_twin_follows_the_model_to_its_device() -> None:
    assert penstock.twin(Static()).to("meta")(torch.zeros(3, 4, device="meta")).is_meta


def test_a_twin_keeps_the_mode_of_each_part_and_draws_no_noise() -> None:
    model = Noisy()
    model.norm.eval()
    model.scale.eval()
    twin = penstock.twin(model)
    assert [twin.training, twin.norm.training, twin.scale.training] == [True, False, False]
    state = torch.get_rng_state()
    twin(torch.randn(0, 3, 8))
    twin.experts(torch.zeros(2, 3, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_gate_reports_while_training_its_open_constant_does_not() -> None:
    reported: list[Tensor] = []

    def gate(x: Tensor) -> Tensor:
        reported.append(x)
        return x.sigmoid()

    class Reporting(Gate):
        def forward(self, x: Tensor) -> Tensor:
            return gate(x) if self.training else x.sigmoid()

    penstock.twin(Gated(4, Reporting()))(torch.randn(2, 4))
    assert reported == []


def test_a_twin_answers_for_the_settings_of_its_gates() -> None:
    twin = penstock.twin(Noisy())
    assert (twin.experts.router.num_experts, twin.experts.router.top_k) == (4, 2)
    with pytest.raises(AttributeError):
        _ = twin.experts.router.unheard_of
    with pytest.raises(AttributeError):  # As when it is unpickled, before it has anything.
        _ = OpenGate.__new__(OpenGate).top_k


def test_the_flops_of_a_twin_are_without_its_gates() -> None:
    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(3, 4))
        return counter.get_total_flops()

    model = Gated(4, SigmoidGate(4, 4))
    assert flops(model) == 2 * flops(penstock.twin(model)) == 4 * 3 * 4 * 4


def test_some_gates_can_be_replaced_and_others_kept() -> None:
    model, x = Model(), torch.randn(2, 3, 4)
    twin = penstock.twin(model, "blocks.*")
    assert isinstance(twin.experts.router, TopKRouter)
    with penstock.force(model, "open", "blocks.*"):
        assert torch.equal(twin(x), model(x))
    shared = Shared()
    assert not [name for name, _ in penstock.twin(shared).named_parameters() if "gate" in name or "again" in name]


def test_a_gate_alone_has_no_twin() -> None:
    with pytest.raises(ValueError, match="itself is the gate"):
        penstock.twin(SigmoidGate(2, 2))


def test_a_twin_made_while_watching_is_not_watched() -> None:
    model, x = nn.Sequential(Model(), Gated(4, NestedGate(4))), torch.randn(2, 3, 4)
    with penstock.watch(model) as log, penstock.force(model, "closed", "0.blocks.*"):
        twin = penstock.twin(model)
        y = twin(x)
    assert all(log[name].calls == 0 for name in log)
    with penstock.force(model, "open"):
        assert torch.equal(model(x), y)


# Ablation ------------------------------------------------------------------------------------------------------


def test_ablation_measures_what_each_gate_buys() -> None:
    model = Gated(4, SigmoidGate(4, 4)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    target = model(x).detach()

    def evaluate(m: nn.Module) -> dict[str, float]:
        errors = torch.cat(
            [(m(batch) - goal).square() for batch, goal in zip(x.split(21), target.split(21), strict=True)]
        )
        return {"mse": errors.mean().item(), "worst": errors.max().item()}

    table = penstock.ablate(model, evaluate)
    assert (table[0]["gate"], table[0]["mse"]) == ("(as trained)", 0.0)
    gate = model.gate(x)
    expected = {"open": model.proj(x), "mean": model.proj(x) * gate.mean(0)}
    for row in table[1:]:
        assert row["mse change"] > 0
        assert "note" not in row  # The last batch has one sample, but others were shuffled.
        if row["forced"] in expected:
            assert row["mse"] == pytest.approx((expected[row["forced"]] - target).square().mean().item(), rel=1e-9)
    assert penstock.ablate(model, evaluate) == table


# Compiled models -----------------------------------------------------------------------------------------------


def test_a_compiled_model_is_refused_and_says_what_to_give() -> None:
    compiled = torch.compile(Model(), backend="eager")
    for call in (penstock.watch, penstock.twin, lambda m: penstock.force(m, "open")):
        with pytest.raises(TypeError, match=r"_orig_mod.*compile inside the context"):
            call(compiled)


@pytest.mark.parametrize("how", ["open", "mean", 0.5, torch.tensor([0.5]), lambda values: 2 * values])
def test_forcing_without_memory_is_compiled_whole(how: Any) -> None:
    torch._dynamo.reset()
    model, x = Gated(4, SigmoidGate(4, 4)), torch.randn(3, 4)
    with penstock.force(model, how):
        run = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(run(x), model(x))
    assert torch.allclose(run(x), model(x))


@pytest.mark.parametrize("how", ["shuffle", "freeze", [torch.full((4,), 0.1 * call) for call in range(12)]])
def test_forcing_with_memory_is_compiled_once(how: Any) -> None:
    torch._dynamo.reset()
    model, batches = Gated(4, SigmoidGate(4, 4)), torch.randn(12, 3, 4)
    with penstock.force(model, how):
        expected = [model(x) for x in batches]
    with penstock.force(model, how), torch._dynamo.config.patch(error_on_recompile=True):
        run = torch.compile(model, backend="eager")
        assert all(torch.allclose(run(x), y) for x, y in zip(batches, expected, strict=True))


@pytest.mark.parametrize("place", ["model", "block", "gate", "in place"])
def test_parts_compiled_before_obey(place: str) -> None:
    torch._dynamo.reset()
    model, x = Gated(4, SigmoidGate(4, 4)), torch.randn(3, 4)
    own, open_ = model(x), model.proj(x)
    run: nn.Module = nn.Sequential(model)
    if place == "model":
        run = torch.compile(model, backend="eager")
    elif place == "block":
        run = nn.Sequential(torch.compile(model, backend="eager"))
    elif place == "gate":
        model.gate = torch.compile(model.gate, backend="eager")
    else:
        model.compile(backend="eager")
    for _ in range(2):
        assert torch.allclose(run(x), own)
        with penstock.force(model, "open"):
            assert torch.allclose(run(x), open_)
            with penstock.force(model, 0.5), penstock.watch(model) as log:
                assert torch.allclose(run(x), open_ / 2)
            assert torch.allclose(run(x), open_)
        assert [log[name].calls for name in log] == [1]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_the_default_compiler_inside_the_context_watches_forces_and_trains() -> None:
    torch._dynamo.reset()
    model, x = Gated(4, SigmoidGate(4, 4)), torch.randn(5, 4)
    own = model(x)
    with penstock.watch(model) as log:
        run = torch.compile(model)
        assert torch.allclose(run(x), own, atol=1e-6)
        run(x).sum().backward()
    assert log["gate"].calls == 2
    assert log["gate"].summary()["mean"] == pytest.approx(model.gate(x).mean().item())
    assert log.without_gradient() == []
    with penstock.force(model, "shuffle"):
        run = torch.compile(model)
        assert torch.allclose(run(x), model(x), atol=1e-6)
        assert not torch.allclose(run(x), own, atol=1e-3)
    assert torch.allclose(run(x), own, atol=1e-6)


def test_statistics_of_a_fresh_gate_are_empty() -> None:
    assert GateStats(Spec("head", "scale", (0.0, 1.0))).summary()["calls"] == 0
    assert str(penstock.watch(SigmoidGate(2, 2)).table()) == "(empty)"


def test_a_recurrence_remembers_all_or_nothing() -> None:
    model, x = Recurrence().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    with penstock.force(model, "open"):
        assert torch.allclose(model(x), model.proj(x).cumsum(1), rtol=1e-12)
    with penstock.force(model, "closed"):
        assert torch.allclose(model(x), model.proj(x), rtol=1e-12)


def test_forcing_the_original_leaves_a_copy_alone() -> None:
    gate = SignedGate(3)
    copied, x = copy.deepcopy(gate), torch.randn(2, 3)
    with penstock.force(gate, "open"):
        assert torch.equal(copied(x), copied.proj(x).tanh())
