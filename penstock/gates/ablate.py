"""Ablate: what each gate buys, by taking it away in three ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from penstock.gates.core import Pattern
from penstock.gates.force import GateWarning, force
from penstock.gates.watch import Table, watch

Intervention = Literal["open", "mean", "shuffle"]


def ablate(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]],
    pattern: Pattern = None,
    *,
    how: Sequence[Intervention] = ("open", "mean", "shuffle"),
    seed: int = 0,
) -> Table:
    """Measure the model with each gate open, at its mean, and shuffled over the batch.

    Open says what the gate buys at all; mean, whether it must change (is it dynamic?); shuffle, whether it reads
    its input. The means are those of the undisturbed evaluation.

    Args:
        model: any module tree with gates.
        evaluate: runs the model and returns a metric, or several by name.
        pattern: which gates (default all).
        how: which of the three.
        seed: of the shuffle.

    Returns:
        rows as a printable `Table`: the undisturbed model first, then one row a gate and intervention, then all
        gates together, each with the metrics and their change; ``note`` says where nothing could change.

    Raises:
        GateNotFoundError: if the pattern matches no gate, or there is none; the message lists the gates.

    Example:
        >>> import torch, penstock
        >>> gate, x = penstock.gates.ParameterGate(3), torch.ones(2, 3)
        >>> print(penstock.ablate(gate, lambda gate: (gate() * x).sum().item(), how=["open"]))
        gate          forced  metric  metric change
        (as trained)       -       3              -
        (model)         open       6              3
    """
    with watch(model, pattern) as log:
        base = _metrics(evaluate(model))
    gates, means = list(log), log.mean()
    rows = Table([{"gate": "(as trained)", "forced": "-"} | base])
    for name in [*gates, *([None] if len(gates) > 1 else [])]:
        chosen = gates if name is None else [name]
        for one in how:
            plan: dict[str, Any] = {g: means.get(g, "mean") if one == "mean" else one for g in chosen}
            with warnings.catch_warnings(), force(model, plan, seed=seed) as forcing:
                warnings.simplefilter("ignore", GateWarning)
                changed = _metrics(evaluate(model))
            row: dict[str, Any] = {"gate": "(all)" if name is None else name or "(model)", "forced": one} | changed
            row |= {f"{m} change": value - base[m] for m, value in changed.items()}
            if set(chosen) <= forcing.unchanged or (one == "mean" and all(log[g].static for g in chosen)):
                row["note"] = "nothing changes: no value depends on the sample"
            rows.append(row)
    return rows


def _metrics(measured: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(measured, Mapping):
        return {name: float(value) for name, value in measured.items()}
    return {"metric": float(measured)}
