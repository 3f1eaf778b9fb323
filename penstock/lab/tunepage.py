"""``tune.html``: one self-contained page of a search, and ``tune.json`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from penstock.lab.pictures import pictures
from penstock.lab.report import template
from penstock.lab.space import flags
from penstock.lab.store import RunFolder, write_atomically

#: Rows of the table of trials, the best first.
_MOST_LISTED = 300


def write_page(folder: RunFolder, result: dict[str, Any]) -> None:
    """Write ``tune.json`` and ``tune.html``.

    Args:
        folder: of the search.
        result: the content of ``tune.json``.
    """
    folder.write_json("tune.json", result)
    trials = ranked(result)
    page = template("tune.html.j2").render(
        result=result,
        trials=[trial | {"flags": " ".join(flags(trial["settings"]))} for trial in trials[:_MOST_LISTED]],
        more=len(trials) - _MOST_LISTED,
        counts={state: sum(t["state"] == state for t in trials) for state in ("complete", "pruned", "failed")},
        figures=pictures(lambda: _figures(result)),
    )
    write_atomically(folder.path / "tune.html", page)


def ranked(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Trials, the best first, then those stopped early, then those that failed."""
    sign = -1 if result["direction"] == "max" else 1
    order = ("complete", "pruned", "failed")

    def place(trial: Mapping[str, Any]) -> tuple[int, float, int]:
        value = 0.0 if trial["value"] is None else sign * trial["value"]
        return order.index(trial["state"]), value, trial["number"]

    return sorted(result["trials"], key=place)


def _figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    found = {"Validation score of each trial": history_figure(result)} if result["best"] else {}
    if result["importances"]:
        found["Importance of each setting"] = importance_figure(result["importances"])
    return found


def history_figure(result: Mapping[str, Any]) -> Figure:
    """Each trial's validation score, and the best so far."""
    trials = [trial for trial in result["trials"] if trial["value"] is not None]
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    for state, marker in (("complete", "o"), ("pruned", "x")):
        own = [trial for trial in trials if trial["state"] == state]
        if own:
            axes.scatter([t["number"] for t in own], [t["value"] for t in own], marker=marker, s=26, label=state)
    whole = [trial for trial in trials if trial["state"] == "complete"]
    best = np.maximum if result["direction"] == "max" else np.minimum
    so_far = best.accumulate([trial["value"] for trial in whole])
    axes.step([trial["number"] for trial in whole], so_far, where="post", color="C2", label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="trial", ylabel=f"validation {result['metric'].replace('_', ' ')}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def importance_figure(importances: Mapping[str, float]) -> Figure:
    """What share of being among the best trials each setting explains."""
    figure = Figure(figsize=(5.6, 0.9 + 0.3 * len(importances)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(importances), list(importances.values()))
    axes.set(xlim=(0, 1), xlabel="share of importance")
    axes.invert_yaxis()
    for place, value in enumerate(importances.values()):
        axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8)
    return figure
