"""What gates answer to single inputs: a small table a gate, from one batch, for the report.

Shape legend: ``I`` inputs, ``U`` units; ``...`` any axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock.gates import watch
from penstock.gates.core import CHOICES, GateNotFoundError, Spec
from penstock.gates.watch import GateStats
from penstock.tasks.base import Task


def gate_sample(task: Task, batch: Any, limit: int = 32) -> dict[str, dict[str, Any]]:
    """The values of every gate for the first inputs of a batch, in evaluation mode.

    Inputs are the samples, or the positions of the first ones where the gate sees positions. A gate of more than
    ``limit`` units is averaged over its last axes (a router: over its first) until they fit, or cut off where it has
    one axis only. Of a gate called several times the first call is shown; one that sees no input is left out.

    Args:
        task: with its trained model.
        batch: of the test split.
        limit: of inputs and of units, 1 or more.

    Returns:
        by the gate's name: ``rows`` and ``columns``, what inputs and units are, and ``values``, (I, U) numbers of
        three digits.
        Empty for a model without gates.

    Raises:
        ValueError: for a limit below one.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: it must be 1 or more")
    try:
        log = watch(task.model, keep="values")
    except GateNotFoundError:
        return {}
    training = task.training
    task.eval()
    with torch.no_grad(), log:
        task.step(batch)
    task.train(training)
    kept = {name: calls[0] for name, calls in log.values().items() if calls[0].numel() and not log[name].static}
    return {name: _table(log[name], values, limit, task.size(batch)) for name, values in kept.items()}


def _table(stats: GateStats, values: Tensor, limit: int, samples: int) -> dict[str, Any]:
    # Units that varied in number from call to call leave only the batch to go by.
    leading = 1 if stats.merged else values.ndim - len(stats.shape)
    inputs, units = values.shape[:leading], values.shape[leading:]
    values_IU = values.reshape(-1, *units)[:limit].double().cpu()
    values_IU, columns = _fewer(values_IU, stats.spec, limit)
    if leading == 1:
        # A gate may have flattened samples and positions into one axis.
        rows = "sample" if inputs[0] == samples else "position"
    else:
        rows = "position of the first sample" if inputs[-1] >= limit else "position"
    rounded = [[float(f"{value:.3g}") for value in row] for row in values_IU.tolist()]
    return {"rows": rows, "columns": columns, "values": rounded}


def _fewer(values: Tensor, spec: Spec, limit: int) -> tuple[Tensor, str]:
    """(I, ...) values as (I, U) with ``limit`` units at most, and what the units are."""
    columns: str = spec.passes
    # The entries of a choice sum to one: their mean would say nothing, so the axes before them go.
    while values.ndim > 2 and values[0].numel() > limit:
        values = values.mean(1 if spec.kind in CHOICES else -1)
        columns = f"{spec.passes}, averaged"
    values = values.reshape(len(values), -1)
    if values.shape[1] > limit:
        columns = f"{columns} (the first {limit} of {values.shape[1]})"
    return values[:, :limit], columns
