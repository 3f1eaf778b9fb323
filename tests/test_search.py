"""The search driver on a model of its own: schedule, penalty, rewind, and resuming in the middle of either stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.gates import Gate
from penstock.tasks.base import Training
from penstock.tasks.click_prediction import ClickRetrain, ClickSearch
from penstock.tasks.search import Search, Searchable

torch.set_num_threads(1)

DATA = ClickLog(ClickLogConfig(noise_values=20, train_rows=320, validation_rows=200, test_rows=200))
TRAIN = Training(
    steps=0, epochs=4, batch_size=64, optimizer="adam", lr=0.02, weight_decay=0.01, schedule="constant", clip_norm=0.0
)
SEARCH = Search(epochs=4, rewind_epoch=1, final_temperature=27.0)


class FieldGate(Gate):
    """One soft or hard gate a field."""

    temperature: Tensor
    hard: Tensor

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((fields,), 0.3))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("hard", torch.tensor(False))

    def forward(self) -> Tensor:
        soft = (self.temperature * self.logit).sigmoid()
        return torch.where(self.hard, (self.logit > 0).to(soft.dtype), soft)


class Linear(nn.Module):
    """A logistic regression whose fields are gated: the smallest `Searchable`."""

    def __init__(self) -> None:
        super().__init__()
        self.effect = nn.Embedding(DATA.spec["num_ids"], 1)
        self.bias = nn.Parameter(torch.zeros(()))
        self.gate = FieldGate(len(DATA.spec["fields"]))

    def forward(self, ids_BF: Tensor) -> Tensor:
        return (self.gate() * self.effect(ids_BF).squeeze(-1)).sum(1) + self.bias

    def gate_parameters(self) -> Iterable[nn.Parameter]:
        return self.gate.parameters()

    def set_temperature(self, temperature: float) -> None:
        self.gate.temperature.fill_(temperature)

    def penalty(self) -> Tensor:
        return self.gate().mean()

    def kept_share(self) -> float:
        return float((self.gate.logit > 0).double().mean())

    def harden(self) -> None:
        self.gate.hard.fill_(True)

    def snapshot(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.state_dict().items() if not k.startswith("gate.")}

    def rewind(self, snapshot: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(snapshot), strict=False)


def model() -> Linear:
    torch.manual_seed(0)
    return Linear()


def searching(net: Linear | None = None, **changes: Any) -> ClickSearch:
    return ClickSearch(net or model(), TRAIN, DATA, SEARCH, penalty_weight=changes.get("penalty_weight", 0.5))


class At(L.Callback):
    """Calls a function after some optimiser steps."""

    def __init__(self, steps: int, act: Callable[[L.Trainer], None]) -> None:
        self.steps, self.act = steps, act

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            self.act(trainer)


def fit(task: ClickSearch | ClickRetrain, *callbacks: L.Callback, checkpoint: Path | None = None) -> None:
    trainer = L.Trainer(
        max_epochs=task.train_config.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    batches = DATA.train(TRAIN.batch_size, seed=0)
    resumed: dict[str, Any] = {} if checkpoint is None else {"ckpt_path": str(checkpoint), "weights_only": True}
    trainer.fit(task, batches, DATA.validation(TRAIN.batch_size), **resumed)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_temperature_rises_geometrically_to_the_last_epoch() -> None:
    temperatures = [SEARCH.temperature(epoch) for epoch in range(4)]
    torch.testing.assert_close(temperatures, [1.0, 3.0, 9.0, 27.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "epochs=1: the temperature needs 2"),
        ({"rewind_epoch": 8}, r"rewind_epoch=8 must be from 0 to 7"),
        ({"rewind_epoch": -1}, r"rewind_epoch=-1 must be"),
        ({"final_temperature": 0.0}, r"final_temperature=0\.0 must be above 0"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClickSearch(model(), TRAIN, DATA, Search(**changes), penalty_weight=1.0)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="penalty_weight=-1"):
        searching(penalty_weight=-1.0)
    with pytest.raises(TypeError, match="Linear does not offer what a search needs"):
        ClickSearch(nn.Linear(2, 1), TRAIN, DATA, SEARCH, penalty_weight=1.0)
    assert isinstance(model(), Searchable)


def test_temperatures_and_record_follow_the_epochs() -> None:
    task = searching()
    seen: list[float] = []
    record = At(0, lambda trainer: None)
    record.on_train_batch_end = lambda *args: seen.append(float(task.model.gate.temperature))  # type: ignore[method-assign]
    fit(task, record)
    kept = task.searched.kept_share()
    task.finish()
    assert seen == pytest.approx([1.0] * 5 + [3.0] * 5 + [9.0] * 5 + [27.0] * 5)
    assert [one["epoch"] for one in task.record] == [0, 1, 2, 3]
    assert [one["temperature"] for one in task.record] == pytest.approx([1.0, 3.0, 9.0, 27.0])
    assert task.record[-1]["kept"] == kept


def test_the_penalty_closes_gates_and_is_not_reported() -> None:
    kept, losses = [], []
    for weight in (0.0, 100.0):
        task = searching(penalty_weight=weight)
        fit(task)
        kept.append(float(task.model.gate.logit.detach().mean()))
        losses.append(float(task.trainer.callback_metrics["train/loss"]))
    assert kept[1] < kept[0] - 0.1
    assert losses[1] < 1.5  # cross-entropy alone: the penalty would add tens


def test_weights_decay_and_gates_do_not() -> None:
    weights, gates = searching().parameter_groups()
    assert weights["weight_decay"] == 0.01
    assert gates["weight_decay"] == 0.0
    assert {p.shape for p in weights["params"]} == {torch.Size([DATA.spec["num_ids"], 1]), torch.Size([])}
    assert {p.shape for p in gates["params"]} == {torch.Size([8])}


def test_finishing_rewinds_weights_and_hardens_gates() -> None:
    task = searching()
    at_rewind: dict[str, Tensor] = {}
    fit(task, At(5, lambda trainer: at_rewind.update(state(task.model))))  # five steps an epoch: the start of epoch 1
    searched = state(task.model)
    assert not torch.equal(searched["effect.weight"], at_rewind["effect.weight"])
    retrain = ClickRetrain(task.model, TRAIN, DATA, task)
    rewound = state(task.model)
    for name in ("effect.weight", "bias"):
        assert torch.equal(rewound[name], at_rewind[name])
    assert torch.equal(rewound["gate.logit"], searched["gate.logit"])
    assert rewound["gate.hard"]
    assert retrain.record == task.record
    assert "What the search kept" in retrain.figures()


def test_retraining_leaves_gates_alone() -> None:
    task = searching()
    fit(task)
    retrain = ClickRetrain(task.model, TRAIN, DATA, task)
    (group,) = retrain.parameter_groups()
    assert not any(p is task.model.gate.logit for p in group["params"])
    before = state(task.model)
    fit(retrain)
    after = state(task.model)
    assert torch.equal(after["gate.logit"], before["gate.logit"])
    assert not torch.equal(after["effect.weight"], before["effect.weight"])


def test_a_twin_is_retrained_without_a_search() -> None:
    retrain = ClickRetrain(model(), TRAIN, DATA)
    before = state(retrain.model)
    fit(retrain)
    assert not retrain.model.gate.hard
    assert not torch.equal(before["effect.weight"], retrain.model.effect.weight)
    assert set(retrain.figures()) == {"Calibration (test)"}


@pytest.mark.parametrize("steps", [3, 5, 7, 12])
def test_a_search_resumes_where_it_was(tmp_path: Path, steps: int) -> None:
    """Before, at and after the rewind epoch, in the middle and at the end of an epoch."""
    path = tmp_path / "search.ckpt"
    whole = searching()
    fit(whole, At(steps, lambda trainer: trainer.save_checkpoint(path)))
    whole.finish()

    resumed = searching()
    fit(resumed, checkpoint=path)
    resumed.finish()
    assert equal(state(resumed.model), state(whole.model))
    assert resumed.record == whole.record


def test_retraining_resumes_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "retrain.ckpt"
    task = searching()
    fit(task)
    whole = ClickRetrain(task.model, TRAIN, DATA, task)
    fit(whole, At(8, lambda trainer: trainer.save_checkpoint(path)))

    # As in a new process: the model is built anew and knows of the search only through the checkpoint.
    resumed = ClickRetrain(model(), TRAIN, DATA)
    fit(resumed, checkpoint=path)
    assert resumed.model.gate.hard
    assert equal(state(resumed.model), state(whole.model))
    assert resumed.record == task.record
