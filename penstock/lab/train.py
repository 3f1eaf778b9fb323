"""Train one arm with one seed: Lightning's trainer, with checkpoints that lose nothing."""

from __future__ import annotations

import logging
import math
import random
import time
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers.logger import Logger

from penstock.data.base import Data
from penstock.errors import UserError
from penstock.gates import watch
from penstock.gates.core import GateNotFoundError
from penstock.lab.progress import Reporter
from penstock.lab.system import Stage, System
from penstock.tasks.base import Task, Training
from penstock.tasks.pretrained import start_from_vectors


@dataclass
class Hardware:
    """Where and in which precision to train; handed to Lightning's Trainer."""

    accelerator: str = "auto"
    """cpu, gpu, auto ..."""
    devices: int = 1
    """Processes (or GPUs) a machine."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """ddp, fsdp ... where there are several devices."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    """Of the arithmetic."""
    threads: int = 0
    """CPU threads; 0: what suits the system."""


class NonFiniteError(RuntimeError):
    """The loss became NaN or infinite; the message names the step, learning rate and last finite checkpoint."""


@dataclass
class Curves(Logger):
    """Collects everything Lightning logs as rows of ``log.csv``."""

    labels: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def name(self) -> str:
        return "penstock"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows += [
            self.labels | {"step": step, "metric": k, "value": float(v)} for k, v in metrics.items() if k != "epoch"
        ]


class Keeper(Callback):
    """Saves often, restores exactly: weights, optimiser, position in the data, random state, curves, best weights.

    Args:
        path: of the checkpoint of this stage, if there is to be one; saving takes at most a twentieth of the time.
        validate_every: steps between validations (0: at the ends of epochs). A step that ends with one is not saved:
            going on from there, Lightning would leave the validation out.
        curves: restored with the rest, so that a resumed run has whole curves.
        best: keep the weights of the best validation and put them back at the end.
    """

    def __init__(self, path: Path | None, validate_every: int, curves: Curves, *, best: bool) -> None:
        self.path, self.validate_every, self.curves, self.best = path, validate_every, curves, best
        self._next_save = 0.0
        self._random: dict[str, Any] | None = None
        self.best_score: float | None = None
        self.best_state: dict[str, torch.Tensor] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random["torch"])
            random.setstate(_tuples(self._random["python"]))
            kind, keys, *rest = self._random["numpy"]
            np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
            self._random = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None and not math.isfinite(float(loss)):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            saved = self.path is not None and self.path.exists()
            kept = f"last finite checkpoint: {self.path}" if saved else "there is no checkpoint yet"
            raise NonFiniteError(
                f"the loss is {float(loss)} at step {trainer.global_step} (learning rate {rate:.3g}); {kept}"
            )
        validates = trainer.is_last_batch or (self.validate_every and trainer.global_step % self.validate_every == 0)
        if not validates and self._is_due(trainer):
            self.save(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether it is time to save; clocks differ, and all processes must save together or wait for ever."""
        due = time.monotonic() > self._next_save
        return due if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(due, all=False)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.best or trainer.sanity_checking:
            return
        assert isinstance(module, Task)
        name, mode = module.monitor
        score = float(trainer.callback_metrics[f"val/{name}"])
        if self.best_score is None or (score > self.best_score if mode == "max" else score < self.best_score):
            self.best_score = score
            self.best_state = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.best_state is not None:
            module.load_state_dict(self.best_state)
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        if self.path is None:
            return
        start = time.monotonic()
        trainer.save_checkpoint(self.path)  # Lightning writes to a temporary file and renames it
        now = time.monotonic()
        self._next_save = now + max(1.0, 20 * (now - start))

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = typing.cast("tuple[Any, ...]", np.random.get_state())
        return {
            "random": {
                "torch": torch.get_rng_state(),
                "python": random.getstate(),
                "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
            },
            "curves": self.curves.rows,
            "best_score": self.best_score,
            "best_state": self.best_state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
        self.curves.rows[:] = state_dict["curves"]
        self.best_score, self.best_state = state_dict["best_score"], state_dict["best_state"]


class GateHistory(Callback):
    """Each gate's unit means on the first validation batch, at every validation."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Task)
        try:
            log = watch(module.model)
        except GateNotFoundError:
            return
        batch = next(iter(module.data.validation(module.train_config.batch_size)))
        with torch.no_grad(), log:
            module.step(trainer.strategy.batch_to_device(batch))
        means = {name: log[name].mean.tolist() for name in log if log[name].calls}
        self.history.append({"step": trainer.global_step, "means": {k: v[:64] for k, v in means.items()}})

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


class Show(Callback):
    """Tells the reporter how far training is."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % 5 == 0:
            loss = trainer.callback_metrics.get("train/loss")
            self.reporter.advance(trainer.global_step, "" if loss is None else f"loss {float(loss):.4f}")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx % 5 == 4:
            self.reporter.advance(trainer.global_step, f"validation {batch_idx + 1}/{trainer.num_val_batches[0]}")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.reporter.advance(batch_idx + 1, "")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        shown = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        figures = (f"{k} {v:.4f}" for k, v in shown.items() if not k.endswith("_error"))
        self.reporter.milestone(f"step {trainer.global_step}: {', '.join(figures)}")


@dataclass
class Trained:
    """What training one stage gave."""

    task: Task
    rows: list[dict[str, Any]]
    gate_history: list[dict[str, Any]]
    seconds: float


def check_budget(train: Training, batches: int) -> int:
    """How many optimiser steps a stage takes.

    Raises:
        UserError: if that is none, or a setting is negative.
    """
    for name in ("steps", "epochs", "lr", "weight_decay", "clip_norm", "patience"):
        if getattr(train, name) < 0:
            raise UserError(f"train.{name}={getattr(train, name)} must be 0 or more")
    if not train.steps and not train.epochs:
        raise UserError("--train.steps and --train.epochs are both 0: one must be positive")
    if batches == 0:
        raise UserError("the training split is empty")
    return train.steps or train.epochs * batches


def train_stage(
    stage: Stage,
    path: Path | None,
    labels: dict[str, Any],
    *,
    seed: int,
    hardware: Hardware,
    reporter: Reporter,
    extra: Sequence[Callback] = (),
) -> Trained:
    """Train one stage, going on from the checkpoint at ``path`` if there is one; without a path none is written.

    ``extra`` callbacks come last.

    Raises:
        NonFiniteError: if the loss is NaN or infinite.
        UserError: if the settings give no budget.
    """
    task, train = stage.task, stage.task.train_config
    batches = task.data.train(train.batch_size, seed)
    total = check_budget(train, len(batches))
    curves = Curves(labels | {"stage": stage.name})
    every = train.validate_every or (max(total // 10, 1) if train.steps else 0)
    validation: dict[str, Any] = {"check_val_every_n_epoch": 1}
    if every:
        validation = {"check_val_every_n_epoch": None, "val_check_interval": every}
    keeper = Keeper(path, every, curves, best=train.patience > 0)
    gates = GateHistory()
    # The keeper comes before early stopping and after everything whose state it must save.
    callbacks: list[Callback] = [gates, Show(reporter), keeper]
    if train.patience:
        name, mode = task.monitor
        callbacks.append(EarlyStopping(f"val/{name}", patience=train.patience, mode=mode, check_finite=False))
    callbacks += extra
    trainer = make_trainer(
        hardware,
        max_steps=train.steps or -1,
        max_epochs=-1 if train.steps else train.epochs,
        limit_val_batches=train.validate_batches or 1.0,
        gradient_clip_val=train.clip_norm or None,
        callbacks=callbacks,
        logger=curves,
        log_every_n_steps=max(total // 1000, 1),
        **validation,
    )
    saved = path is not None and path.exists()
    start = time.monotonic()
    title = f"{labels['arm']} seed {labels['seed']} {stage.name}"
    with reporter.bar(title, total), _interruptible(trainer):
        trainer.fit(
            task,
            batches,
            task.data.validation(train.batch_size),
            ckpt_path=str(path) if saved else None,
            weights_only=True if saved else None,
        )
    return Trained(task, curves.rows, gates.history, time.monotonic() - start)


def train_arm(
    found: System[Any], config: Any, data: Data, arm: str, *, seed: int, hardware: Hardware, reporter: Reporter
) -> list[Trained]:
    """Train all stages of one arm from fresh weights, as a run does but without a folder; the last holds the model.

    Seeds Python, NumPy and PyTorch.

    Raises:
        NonFiniteError: if the loss is NaN or infinite.
        UserError: if the settings give no budget.
        ValueError: for impossible sizes.
    """
    seed_all(seed)
    model = found.arms(config, data.spec)[arm]()
    start_from_vectors(model, data)
    done: list[Trained] = []
    for number, make in enumerate(found.stages(arm, model, config, data)):
        stage = make()
        stage.task.seed = seed
        seed_all(seed * 1000 + number + 1)
        labels = {"arm": arm, "seed": seed}
        done.append(train_stage(stage, None, labels, seed=seed, hardware=hardware, reporter=reporter))
    return done


@contextmanager
def _interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Lightning turns Ctrl-C into an exit of its own; callers want to know what happened."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def restore_stage(stage: Stage, path: Path) -> Trained:
    """A stage that had been finished, from its last checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    stage.task.on_load_checkpoint(checkpoint)
    stage.task.load_state_dict(checkpoint["state_dict"])
    callbacks = checkpoint["callbacks"]
    return Trained(stage.task, callbacks["Keeper"]["curves"], callbacks["GateHistory"]["history"], 0.0)


def test(task: Task, hardware: Hardware, *, reporter: Reporter, title: str) -> dict[str, float]:
    """The test metrics of a trained task; ``title`` is shown meanwhile."""
    trainer = make_trainer(hardware, logger=False, callbacks=[Show(reporter)])
    batches = task.data.test(task.train_config.batch_size)
    with reporter.bar(title, len(batches), announce=False):
        (metrics,) = trainer.test(task, batches, verbose=False)
    return {name.removeprefix("test/"): value for name, value in metrics.items()}


def validate(task: Task, hardware: Hardware) -> dict[str, float]:
    """The validation metrics of a trained task, on as many batches as while it was trained."""
    train = task.train_config
    trainer = make_trainer(hardware, logger=False, limit_val_batches=train.validate_batches or 1.0)
    (metrics,) = trainer.validate(task, task.data.validation(train.batch_size), verbose=False)
    return {name.removeprefix("val/"): value for name, value in metrics.items()}


def make_trainer(hardware: Hardware, **options: Any) -> L.Trainer:
    """Lightning's trainer without its banners, tips and summaries."""
    hush()
    return L.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=hardware.strategy,
        precision=hardware.precision,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


def hush() -> None:
    """Keep third parties' banners, tips and warnings off the user's terminal."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch.distributed", "torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics|onnxscript|copyreg).*")


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
