"""Use a finished run: predict on new data, ablate the gates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl
import pyarrow.parquet
import torch
from torch import nn

from penstock.errors import UserError
from penstock.gates import GateNotFoundError, Table, ablate
from penstock.lab.store import Run, open_run, written_whole
from penstock.ops.rectified_linear import half_products
from penstock.tasks.base import Task

Precision = Literal["32", "bf16"]

_GROUP_ROWS = 1 << 16


def predict(
    run: Path, data: Path, *, arm: str | None = None, seed: int = 0, precision: Precision = "32"
) -> pl.DataFrame:
    """Apply a trained arm to a file or folder of the user's: one row a sample.

    Args:
        run: a run folder.
        data: what to predict.
        arm, seed: which training.
        precision: "bf16" takes the products of hidden layers of click models in bfloat16, see `half_products`.

    Raises:
        UserError: if the run or the data cannot be used, or the model has no layer that the precision would change.
    """
    return pl.concat(predict_frames(run, data, arm=arm, seed=seed, precision=precision))


def predict_frames(
    run: Path, data: Path, *, arm: str | None = None, seed: int = 0, precision: Precision = "32"
) -> Iterator[pl.DataFrame]:
    """The same piece by piece, for data that may not fit in memory."""
    opened = open_run(run)
    model = opened.model(arm, seed=seed)
    frames = opened.system.task_for(opened.spec).predict_frames(model, opened.spec, data)
    if precision == "32":
        yield from frames
        return
    with half_products() as used:
        for frame in frames:
            if frame.height and not used.layers:
                raise UserError(f"--precision bf16: {opened.system.name} has no layer that would be quicker with it")
            yield frame


def write_frames(frames: Iterable[pl.DataFrame], path: Path) -> int:
    """Write predictions as the ending of ``path`` says, piece by piece, and yet whole or not at all.

    Returns:
        how many rows.

    Raises:
        UserError: for an unknown ending or a missing folder, before the first piece is asked for.
    """
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist")
    writers = {".csv": _write_csv, ".parquet": _write_parquet, ".jsonl": _write_jsonl}
    if path.suffix not in writers:
        raise UserError(f"--output {path}: end it in {', '.join(writers)}")
    with written_whole(path) as file:
        return writers[path.suffix](frames, file)


def _write_csv(frames: Iterable[pl.DataFrame], file: IO[bytes]) -> int:
    rows = 0
    for number, frame in enumerate(frames):
        frame.write_csv(file, include_header=number == 0)
        rows += frame.height
    return rows


def _write_jsonl(frames: Iterable[pl.DataFrame], file: IO[bytes]) -> int:
    rows = 0
    for frame in frames:
        frame.write_ndjson(file)
        rows += frame.height
    return rows


def _write_parquet(frames: Iterable[pl.DataFrame], file: IO[bytes]) -> int:
    rows = 0
    with ExitStack() as stack:
        writer: pyarrow.parquet.ParquetWriter | None = None
        for frame in _gathered(frames):
            table = frame.to_arrow()
            writer = writer or stack.enter_context(pyarrow.parquet.ParquetWriter(file, table.schema))
            writer.write_table(table)
            rows += table.num_rows
    return rows


def _gathered(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Fewer, larger pieces, as row groups of Parquet should be."""
    held: list[pl.DataFrame] = []
    for frame in frames:
        held.append(frame)
        if sum(one.height for one in held) >= _GROUP_ROWS:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)


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
        found = {name: float(v) for name, v in metrics.compute().items() if not name.endswith("_error")}
        return {"loss": total / count} | found

    try:
        with torch.no_grad():
            return ablate(model, evaluate, pattern), opened.system.findings(model, opened.config, task.data)
    except GateNotFoundError as error:
        raise UserError(f"{run}: arm {arm or opened.arms[0]}: {error}") from None


def sample_inputs(run: Run, model: nn.Module, *, size: int) -> tuple[Any, ...]:
    """The model's arguments for the first test samples of the run's data."""
    task = task_of(run, model)
    return task.inputs(next(iter(task.data.test(size))))
