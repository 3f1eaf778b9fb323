"""Every sort of gate through the same door: what `watch`, `force`, `ablate` and `twin` promise of any model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import penstock
from penstock.gates import GateWarning, named_gates, spec_of
from tests.models import EXAMPLES, Example, hooks_left

torch.set_num_threads(1)

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


@every_example
def test_watching_leaves_outputs_gradients_and_randomness_bit_equal(example: Example) -> None:
    model, x = example()
    before, before_gradients = model(x), gradients(model, x)
    state = torch.get_rng_state()
    with penstock.watch(model, keep="values") as log:
        assert torch.equal(model(x), before)
        assert same(gradients(model, x), before_gradients)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(log[name].calls >= 2 for name in log)
    assert hooks_left(model) == 0


@every_example
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode_gives_the_same_statistics(example: Example, mode: Any) -> None:
    model, x = example()
    with penstock.watch(model) as expected:
        model(x)
    with penstock.watch(model) as log:
        with mode():
            model(x)
        model(x)  # What was counted in inference mode can be added to outside it.
    for name, summary in log.to_dict().items():
        assert summary["calls"] == 2 * expected[name].calls
        assert summary["mean"] == pytest.approx(expected[name].summary()["mean"], rel=1e-12)


@every_example
def test_force_open_equals_the_twin_which_has_no_gate_parameters(example: Example) -> None:
    model, x = example(torch.float64)
    twin = penstock.twin(model)
    with penstock.force(model, "open"):
        opened = model(x)
    assert torch.equal(twin(x), opened)
    own = {id(p) for gate in named_gates(model).values() for p in gate.parameters()}
    kept = [name for name, p in model.named_parameters() if id(p) not in own]
    assert [name for name, _ in twin.named_parameters()] == kept
    assert len(named_gates(twin)) == len(named_gates(model)) - (example.name == "nested")
    with penstock.watch(twin) as log:
        assert torch.equal(twin(x), opened)
    assert all(log[name].calls for name in log)


@every_example
def test_twin_trains_and_its_state_loads(example: Example) -> None:
    model, x = example()
    twin = penstock.twin(model)
    original = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), 1e-3)
    twin(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        trained = twin(x)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    fresh = penstock.twin(model)
    with torch.no_grad():
        assert not torch.equal(fresh(x), trained)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), trained)
        assert torch.equal(pickle.loads(pickle.dumps(twin))(x), trained)
        assert torch.equal(copy.deepcopy(twin)(x), trained)


@every_example
def test_forcing_acts_and_leaving_restores(example: Example) -> None:
    model, x = example(torch.float64)
    before = model(x)
    for how in ["open", "closed", 0] if example.closes else ["open", 0]:
        with penstock.force(model, how):
            assert not torch.equal(model(x), before), how
        assert torch.equal(model(x), before)
    assert hooks_left(model) == 0


@every_example
def test_an_exception_restores_everything(example: Example) -> None:
    model, x = example()
    before = model(x)

    def fail(values: Any) -> Any:
        raise ZeroDivisionError

    def train() -> None:
        with penstock.watch(model), penstock.force(model, "open"), penstock.force(model, fail):
            model(x)

    with pytest.raises(ZeroDivisionError):
        train()
    assert hooks_left(model) == 0
    assert torch.equal(model(x), before)


@every_example
def test_a_shuffle_exchanges_samples_or_says_that_it_cannot(example: Example) -> None:
    model, x = example()
    with penstock.watch(model, keep="values") as own:
        model(x)
    if example.static:
        with (
            pytest.warns(GateWarning, match="does not depend on the input"),
            penstock.force(model, "shuffle") as forcing,
        ):
            model(x)
        assert forcing.unchanged == set(own)
        return
    last = list(own)[-1]
    with penstock.force(model, "shuffle", last) as forcing, penstock.watch(model, keep="values") as log:
        model(x)
    before, after = own.values()[last][0], log.values()[last][0]
    rows = [next(i for i, row in enumerate(before) if torch.equal(row, new)) for new in after]
    if not example.name.startswith(("early", "field")):  # Discrete gates have equal rows, found in the wrong place.
        assert sorted(rows) == list(range(len(before)))
        assert all(row != place for place, row in enumerate(rows))
    assert forcing.unchanged == set()


@every_example
def test_a_shuffle_of_one_sample_is_reported(example: Example) -> None:
    model, _ = example()
    x = example.inputs(1)
    if example.name == "experts":
        x = x[:, :1]  # Its router sees tokens, so one token is its single sample.
    with pytest.warns(GateWarning, match=r"changes nothing"), penstock.force(model, "shuffle") as forcing:
        model(x)
    assert forcing.unchanged == set(named_gates(model))


@every_example
def test_values_watched_on_one_input_can_be_forced_on_another(example: Example) -> None:
    model, x = example(torch.float64)
    other = x.flip(0) if x.is_floating_point() else 10 - x
    with penstock.watch(model, keep="values") as log:
        expected = model(x)
    with penstock.force(model, log.values()):
        assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    with penstock.force(model, log.values()), penstock.watch(model, keep="values") as seen:
        model(other)
    for name, values in log.values().items():
        assert all(torch.equal(a, b) for a, b in zip(values, seen.values()[name], strict=True))


@every_example
def test_freeze_keeps_the_first_values(example: Example) -> None:
    model, x = example(torch.float64)
    other = x.flip(0) if x.is_floating_point() else 10 - x
    with penstock.watch(model, keep="values") as log:
        model(x)
    first = {name: values[0] for name, values in log.values().items()}
    with penstock.force(model, "freeze"), penstock.watch(model, keep="values") as seen:
        model(x)
        model(other)
    for name, values in seen.values().items():
        if name != "gate.inner":
            assert all(torch.equal(value, first[name]) for value in values)


@every_example
def test_constants_cut_the_gradient_and_functions_let_it_through(example: Example) -> None:
    model, x = example(torch.float64)
    own = [p for gate in named_gates(model).values() for p in gate.parameters()]
    plain = gradients(model, x)
    with penstock.force(model, lambda values: values):
        assert same(gradients(model, x), plain)
    if own:
        with penstock.force(model, "open"):
            gradients(model, x)
        assert all(p.grad is None for p in own)


@every_example
def test_copies_keep_their_gates(example: Example) -> None:
    model, x = example()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert {n: spec_of(g) for n, g in named_gates(copied).items()} == {
            n: spec_of(g) for n, g in named_gates(model).items()
        }
        with penstock.force(copied, "open"):
            opened = copied(x)
        assert not torch.equal(model(x), opened)
        assert torch.equal(copied(x), model(x))


@every_example
def test_ablation_has_a_row_for_every_gate_and_intervention(example: Example) -> None:
    model, x = example()
    target = torch.randn_like(model(x))
    table = penstock.ablate(model, lambda m: (m(x) - target).square().mean().item())
    gates = list(named_gates(model))
    groups = [g or "(model)" for g in gates] + (["(all)"] if len(gates) > 1 else [])
    assert [(row["gate"], row["forced"]) for row in table] == [("(as trained)", "-")] + [
        (g, how) for g in groups for how in ("open", "mean", "shuffle")
    ]
    base = table[0]["metric"]
    assert all(row["metric change"] == row["metric"] - base for row in table[1:])
    for row in table[1:]:
        assert ("note" in row) == (example.static and row["forced"] != "open")
    assert hooks_left(model) == 0


@every_example
@pytest.mark.parametrize("when", ["inside", "before"])
def test_compiled_code_obeys_and_is_restored(example: Example, when: str) -> None:
    model, x = example(torch.float64)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager")
    before = model(x)
    if when == "before":
        assert torch.allclose(run(x), before, rtol=1e-12)
    with penstock.force(model, "open"), penstock.watch(model) as log:
        run = torch.compile(model, backend="eager") if when == "inside" else run
        opened = model(x)
        for _ in range(3):
            assert torch.allclose(run(x), opened, rtol=1e-12)
    calls = {name: log[name].calls for name in log}
    assert not torch.allclose(opened, before)
    assert all(count % 4 == 0 and count for count in calls.values())
    assert torch.allclose(run(x), before, rtol=1e-12)
    assert calls == {name: log[name].calls for name in log}
