"""Use a finished run: predict on new data, ablate the gates."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from penstock.errors import UserError
from penstock.gates import GateNotFoundError, Table, ablate
from penstock.lab.store import Run, open_run, write_atomically
from penstock.tasks.base import Task


def predict(run: Path, data: Path, *, arm: str | None = None, seed: int = 0) -> pl.DataFrame:
    """Apply a trained arm to a file or folder of the user's: one row a sample.

    Raises:
        UserError: if the run or the data cannot be used.
    """
    opened = open_run(run)
    model = opened.model(arm, seed=seed)
    with torch.no_grad():
        return opened.system.task_for(opened.spec).predict_file(model, opened.spec, data)


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write predictions as the ending of ``path`` says, whole or not at all.

    Raises:
        UserError: for an unknown ending or a missing folder.
    """
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist")
    buffer = io.BytesIO()
    writers = {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}
    if path.suffix not in writers:
        raise UserError(f"--output {path}: end it in {', '.join(writers)}")
    writers[path.suffix](buffer)  # type: ignore[operator]
    write_atomically(path, buffer.getvalue())


def task_of(run: Run, model: nn.Module) -> Task:
    """A task around a trained model, on the data of its run.

    Raises:
        UserError: if the run's data is not there any more.
    """
    data = run.system.load_data(run.config, run.source)
    return run.system.task_for(data.spec)(model, run.config.train, data).eval()


def ablate_run(
    run: Path, *, arm: str | None = None, seed: int = 0, pattern: str | None = None, batches: int = 20
) -> tuple[Table, dict[str, Table]]:
    """What each gate of a trained arm buys, measured on test batches.

    Returns:
        the table of interventions, and by title what the gates found (`System.findings`).

    Raises:
        UserError: if the run cannot be used, the arm has no gates, or the pattern matches none.
    """
    opened = open_run(run)
    model = opened.model(arm, seed=seed)
    task = task_of(opened, model)

    @torch.no_grad()
    def evaluate(_model: nn.Module) -> Mapping[str, float]:
        total, count = 0.0, 0
        metrics = task.new_metrics()
        for batch in islice(task.data.test(task.train_config.batch_size), batches):
            loss, outputs = task.step(batch)
            total += float(task.reported_loss(loss, outputs, batch)) * task.size(batch)
            count += task.size(batch)
            task.update(metrics, outputs, batch)
        return {"loss": total / count} | {name: float(v) for name, v in metrics.compute().items()}

    try:
        with torch.no_grad():
            return ablate(model, evaluate, pattern), opened.system.findings(model, opened.config, task.data)
    except GateNotFoundError as error:
        raise UserError(f"{run}: arm {arm or opened.arms[0]}: {error}") from None


def sample_inputs(run: Run, model: nn.Module, *, size: int) -> tuple[Any, ...]:
    """The model's arguments for the first test samples of the run's data."""
    task = task_of(run, model)
    return task.inputs(next(iter(task.data.test(size))))
