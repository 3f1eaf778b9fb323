"""What the search dropped, for people: tables by field, a picture, and the compacted model with its map of ids."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.torch import save as safetensors_bytes

from penstock.data.schema import Schema
from penstock.data.tables import TableData
from penstock.gates import Table
from penstock.lab.store import write_atomically
from penstock.systems.recommendation.optfs.model import OptFSModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Validation rows in which values are counted: batches, and rows of each.
_BATCHES, _ROWS = 100, 8192
_LONGEST_NAME = 30


def value_counts(data: TableData) -> NDArray[np.int64]:
    """(num_ids,) how often each value stands in the first validation rows; padding is not counted."""
    counts = np.zeros(data.schema.num_ids, np.int64)
    for batch in islice(data.validation(_ROWS), _BATCHES):
        for part in (batch.ids, batch.sequences):
            counts += np.bincount(part.numpy().ravel(), minlength=len(counts))
    for one in data.schema.of("sequences"):
        counts[one.offset] = 0
    return counts


def field_report(
    model: OptFSModel, schema: Schema, counts: NDArray[np.int64] | None = None, *, shown: int = 6
) -> Table:
    """What the search kept and dropped, by field.

    Args:
        model: a gated model.
        schema: of the table it was trained on.
        counts: (num_ids,) how often each value is seen; with it, frequent values are named first.
        shown: how many values to name.

    Returns:
        a printable table with one row a field: its values, how many are kept, the share of rows whose value is kept (with
        ``counts``), and the names of kept and of dropped values.
    """
    kept = model.gate.kept().cpu().numpy()
    rows = Table()
    for one in schema.fields:
        own = kept[one.offset : one.offset + one.size]
        seen = np.zeros(one.size, np.int64) if counts is None else counts[one.offset : one.offset + one.size]
        order, values = np.argsort(-seen, kind="stable"), one.values
        row: dict[str, Any] = {"field": one.name, "values": one.size, "kept": int(own.sum())}
        if counts is not None:
            row["rows kept"] = float(seen[own].sum() / seen.sum()) if seen.any() else None
        row["named"] = _named(values, order[own[order]], shown)
        row["dropped"] = _named(values, order[~own[order]], shown)
        rows.append(row)
    return rows


def _named(values: Sequence[str], order: NDArray[np.int64], shown: int) -> str:
    names = [values[place] for place in order[:shown]]
    names = [f"{name[: _LONGEST_NAME - 1]}…" if len(name) > _LONGEST_NAME else name for name in names]
    more = [f"... {len(order) - shown:,} more"] if len(order) > shown else []
    return ", ".join([*names, *more]) or "-"


def findings(model: OptFSModel, data: TableData) -> dict[str, Table]:
    """Which fields, and which of their values, the search kept; see `System.findings`."""
    report = field_report(model, data.schema, value_counts(data))
    fields = Table(
        {
            "field": row["field"],
            "kept": "all" if row["kept"] == row["values"] else "some" if row["kept"] else "dropped",
            "values": row["values"],
            "values kept": row["kept"],
            "share of values": row["kept"] / row["values"],
            "share of rows": row["rows kept"],
        }
        for row in report
    )
    values = Table(
        {"field": row["field"], "kept, most frequent first": row["named"], "dropped": row["dropped"]} for row in report
    )
    return {
        "Fields kept and dropped": Table(sorted(fields, key=lambda row: -row["share of values"])),
        "Values kept and dropped, by field": values,
    }


def field_figure(report: Table) -> Figure:
    """The share of values kept in each field of a `field_report`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.8 + 0.3 * len(report)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["field"] for row in report], [row["kept"] / row["values"] for row in report])
    for place, row in enumerate(report):
        axes.text(1.01, place, f"{row['kept']} of {row['values']}", va="center", fontsize=8)
    axes.set(xlim=(0, 1), xlabel="share of values kept")
    axes.invert_yaxis()
    return figure


def compact_files(seed: int) -> tuple[str, str]:
    """Names of the compacted weights and of the map of ids of a training."""
    mark = f".seed{seed}" if seed else ""
    return f"compact{mark}.safetensors", f"id_map{mark}.parquet"


def write_compact(model: OptFSModel, schema: Schema, folder: Path, seed: int) -> None:
    """Write the compacted model and the way from old ids to new ones.

    Args:
        model: with hard gates.
        schema: of its table.
        folder: of the arm.
        seed: of the training.
    """
    small, new_ids = model.compact()
    dropped = small.embedding.num_ids - 1
    # By field, so that ids that several fields share are found under each.
    old = np.concatenate([one.offset + np.arange(one.size) for one in schema.fields])
    new = new_ids.cpu().numpy()[old]
    frame = pl.DataFrame(
        {
            "field": np.repeat([one.name for one in schema.fields], [one.size for one in schema.fields]),
            "value": [value for one in schema.fields for value in one.values],
            "old_id": old,
            "new_id": pl.Series(np.where(new == dropped, -1, new)).replace(-1, None),
        }
    )
    table = io.BytesIO()
    frame.write_parquet(table)
    weights, id_map = (folder / name for name in compact_files(seed))
    state = {name: value.detach().cpu().clone().contiguous() for name, value in small.state_dict().items()}
    write_atomically(weights, safetensors_bytes(state))
    write_atomically(id_map, table.getvalue())
