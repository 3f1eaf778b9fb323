"""Every ready system through the same door: what any gated network here must do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import penstock
from penstock.data.base import Data, Source
from penstock.gates import Routing, named_gates, spec_of
from penstock.interop.create import create_model
from penstock.lab.cards import all_cards
from penstock.lab.config import from_dict, override, to_dict, untouched
from penstock.lab.system import system
from penstock.lab.train import seed_all

READY = [name for name, card in all_cards().items() if card.ready]


@dataclass
class Bench:
    """A system at its quick size, with one batch of its default data."""

    name: str
    config: Any
    data: Data
    batch: Any

    def build(self, arm: str = "gated", seed: int = 0) -> nn.Module:
        seed_all(seed)
        return system(self.name).arms(self.config, self.data.spec)[arm]()

    def task(self, model: nn.Module) -> Any:
        return system(self.name).task_for(self.data.spec)(model, self.config.train, self.data)

    def output(self, model: nn.Module) -> Tensor:
        inputs = self.task(model).inputs(self.batch)
        out = model(*inputs)
        return out if isinstance(out, Tensor) else next(iter(out.values() if isinstance(out, dict) else out))


@cache
def bench(name: str) -> Bench:
    found = system(name)
    config = override(found.Config(), untouched(found.Config(), found.quick))
    data = found.load_data(config, Source())
    return Bench(name, config, data, next(iter(data.test(8))))


def gate_names(model: nn.Module) -> list[str]:
    return list(named_gates(model))


@pytest.fixture(params=READY)
def at(request: pytest.FixtureRequest) -> Bench:
    return bench(request.param)


def trained(at: Bench, steps: int = 8, seed: int = 0) -> tuple[nn.Module, list[float]]:
    """A few steps of the system's own training, on the same batch."""
    model = at.build(seed=seed)
    task = at.task(model).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=at.config.train.lr)
    losses = []
    seed_all(seed + 1)
    for _ in range(steps):
        loss, _ = task.step(at.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.eval(), losses


def test_arms_build_with_the_gated_one_first(at: Bench) -> None:
    arms = system(at.name).arms(at.config, at.data.spec)
    assert list(arms)[:1] == ["gated"]
    assert "ungated" in arms
    assert gate_names(at.build("gated"))


def test_training_lowers_the_loss_and_repeats_with_the_seed(at: Bench) -> None:
    _, losses = trained(at, 12)
    assert min(losses[-3:]) < losses[0]
    assert trained(at, 12)[1] == losses


def test_watching_sees_every_gate_and_changes_nothing(at: Bench) -> None:
    model, _ = trained(at)
    with torch.no_grad():
        plain = at.output(model)
        with penstock.watch(model) as log:
            assert torch.equal(at.output(model), plain)
    assert [name for name in log if log[name].calls] == gate_names(model)
    low_high = {name: spec_of(gate).range for name, gate in named_gates(model).items()}  # type: ignore[union-attr]
    for name, summary in log.to_dict().items():
        low, high = low_high[name]
        assert low - 1e-6 <= summary["mean"] <= high + 1e-6, name
    assert all(not module._forward_hooks for module in model.modules())


def test_forcing_acts_on_every_gate(at: Bench) -> None:
    """No private copies: whatever a gate's values are replaced by reaches the output."""
    model, _ = trained(at)
    generator = torch.Generator().manual_seed(0)

    def other(values: Any) -> Any:
        if isinstance(values, Routing):
            dense = values.dense()
            return Routing.from_dense(
                torch.rand(dense.shape, generator=generator, dtype=dense.dtype).softmax(-1), values.logits
            )
        return values * torch.rand(values.shape, generator=generator, dtype=values.dtype)

    with torch.no_grad():
        plain = at.output(model)
        for name in gate_names(model):
            with penstock.force(model, other, name):
                assert not torch.equal(at.output(model), plain), name
        assert torch.equal(at.output(model), plain), "leaving restores everything"


def test_open_gates_are_the_twin(at: Bench) -> None:
    model, _ = trained(at)
    twin = penstock.twin(model)
    gates = {id(p) for gate in named_gates(model).values() for p in gate.parameters()}
    own = sum(p.numel() for p in model.parameters() if id(p) not in gates)
    assert sum(p.numel() for p in twin.parameters()) == own, "the twin differs in the gates only"
    with torch.no_grad(), penstock.force(model, "open"):
        torch.testing.assert_close(at.output(twin), at.output(model))


def test_a_sample_does_not_depend_on_its_batch_mates(at: Bench) -> None:
    model, _ = trained(at)
    with torch.no_grad():
        together = at.output(model)
        first = Bench(at.name, at.config, at.data, tree_map_only(Tensor, lambda x: x[:1], at.batch))
        torch.testing.assert_close(first.output(model), together[:1], rtol=1e-4, atol=1e-5)


def test_saving_and_loading_is_bit_equal(at: Bench) -> None:
    model, _ = trained(at)
    again = at.build(seed=7).eval()
    again.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(at.output(again), at.output(model))


def test_a_model_saved_for_the_hub_comes_back(at: Bench, tmp_path: Path) -> None:
    model, _ = trained(at)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(at.output(again), at.output(model))


def test_survives_compilation(at: Bench) -> None:
    model, _ = trained(at)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(at.output(compiled), at.output(model), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_configuration_survives_the_file(at: Bench) -> None:
    assert from_dict(type(at.config), to_dict(at.config)) == at.config


@pytest.mark.parametrize("name", [v for n in READY for v in all_cards()[n].variants])
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    count = next(card.variants[name] for card in all_cards().values() if name in card.variants)
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
