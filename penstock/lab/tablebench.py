"""What it costs to train on a table that is kept on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch.nn import functional as F

from penstock.data.base import Source
from penstock.data.clicktable import CriteoLike
from penstock.data.schema import TableBatch
from penstock.data.tables import TableConfig, read_table
from penstock.lab.bench import Benchmark, Contest
from penstock.nn.click_models import CLICK_MODELS, ClickModel
from penstock.tasks.click_prediction import model_inputs

_ROWS, _BATCH, _DIM, _HIDDEN = 125_000, 10_000, 8, (64, 32)


def stream() -> Contest:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        path = Path(folder) / "clicks.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_batches(CriteoLike().blocks(0, _ROWS)), path)
        tables = [read_table(TableConfig(memory_mb=mb), Source(path, label="click")) for mb in (0, 1024)]
    disk, memory = (table.train(_BATCH, 0) for table in tables)
    ids, fields = tables[0].schema.num_ids, len(tables[0].schema.fields)
    step, ready = _step(ids, fields), list(memory)
    entries: dict[str, Callable[[], None]] = {
        "rows on disk": partial(_epoch, step, disk),
        "rows in memory": partial(_epoch, step, memory),
        "batches in memory": partial(_epoch, step, ready),
    }
    note = (
        f"An epoch of {len(ready)} steps of a DNN, batch {_BATCH:,}, {fields} fields, {ids:,} ids, width {_DIM}, "
        f"layers of {' and '.join(map(str, _HIDDEN))}, Adam."
    )
    return Contest(entries, note=note)


def _step(num_ids: int, num_fields: int) -> Callable[[TableBatch], None]:
    parts: dict[str, Any] = dict(CLICK_MODELS["dnn"](_HIDDEN))
    model = ClickModel(num_ids, num_fields, dim=_DIM, **parts)
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: TableBatch) -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(*model_inputs(batch)), batch.label).backward()
        optimizer.step()

    return step


def _epoch(step: Callable[[TableBatch], None], batches: Iterable[TableBatch]) -> None:
    for batch in batches:
        step(batch)


def benchmarks() -> dict[str, Benchmark]:
    return {"table_stream": Benchmark("Training on a table kept on disk, in memory, or as ready batches", stream)}
