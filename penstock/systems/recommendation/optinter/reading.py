"""What the search decided, for people: tables of pairs and of chosen crosses, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from penstock.data.schema import Schema
from penstock.gates import Table
from penstock.lab.results import Results
from penstock.systems.recommendation.optinter.model import METHODS, OptInterModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The most fields whose pairs have their margins written into the heat map.
_MOST_NUMBERED = 16
#: As a person reads them.
_WORDS = ("memorised", "factorised", "ignored")


def pair_report(model: OptInterModel, schema: Schema) -> Table:
    """How each pair of fields is modelled, those to be memorised first, the surest first.

    Args:
        model: with a gate.
        schema: of the table it was trained on.

    Returns:
        a printable table with one row a pair: its fields, the method, the margin (how far alpha of the method is above
        the next), and how many rows its crosses have.
    """
    fields = [f.name for f in schema.of("ids")]
    choice, margin = model.gate.choice().tolist(), model.gate.margin().tolist()
    rows = [
        {"first": fields[i], "second": fields[j], "method": _WORDS[choice[p]], "margin": margin[p], "rows": count}
        for p, ((i, j), count) in enumerate(zip(model.crosses.pairs, model.crosses.rows, strict=True))
    ]
    return Table(sorted(rows, key=lambda row: (_WORDS.index(row["method"]), -row["margin"])))


def choice_report(report: Table, *, shown: int = 6) -> Table:
    """How many pairs of a `pair_report` are memorised, factorised and ignored, and the surest of each by name."""
    rows = Table()
    for method in _WORDS:
        own = [row for row in report if row["method"] == method]
        names = [f"{row['first']} x {row['second']}" for row in own]
        more = [f"... {len(names) - shown} more"] if len(names) > shown else []
        crosses = sum(row["rows"] for row in own)
        rows.append(
            {"choice": method, "pairs": len(own), "rows of crosses": crosses}
            | {"surest first": ", ".join(names[:shown] + more) or "-"}
        )
    return rows


def chosen_crosses(model: OptInterModel, schema: Schema) -> pl.DataFrame:
    """The combinations of values that are memorised, to be used as features elsewhere.

    Args:
        model: with a gate.
        schema: of the table it was trained on.

    Returns:
        ``first_field``, ``first_value``, ``second_field``, ``second_value`` and ``row``, where its embedding is in the
        cross table. Pairs that are hashed have no list of combinations and are left out, as are rare ones.
    """
    fields, crosses = schema.of("ids"), model.crosses
    starts = [0, *accumulate(crosses.rows)]
    found = []
    for pair, memorised in enumerate(model.memorised().tolist()):
        if memorised and crosses.exact[pair]:
            first, second = (fields[field] for field in crosses.pairs[pair])
            for row in range(starts[pair] + 1, starts[pair + 1]):
                _, a, b = crosses.locate(row)
                found.append((first.name, first.value(a), second.name, second.value(b), row))
    names = ("first_field", "first_value", "second_field", "second_value")
    return pl.DataFrame(found, schema=dict.fromkeys(names, pl.String) | {"row": pl.Int64}, orient="row")


def methods_figure(model: OptInterModel, fields: Sequence[str]) -> Figure:
    """A heat map of the method of each pair, with the fields' names.

    Args:
        model: with a gate.
        fields: names of the crossed fields.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = len(fields)
    method = np.full((count, count), np.nan)
    margin = np.full((count, count), np.nan)
    for (i, j), chosen, gap in zip(
        model.crosses.pairs, model.gate.choice().tolist(), model.gate.margin().tolist(), strict=True
    ):
        method[j, i], margin[j, i] = chosen, gap
    # Numbers fit into the cells of few fields; of many, colours and names are what can be read.
    named = count <= _MOST_NUMBERED
    side = 2.2 + (0.42 if named else 0.22) * count
    figure = Figure(figsize=(side + 1.4, side), layout="constrained")
    axes = figure.subplots()
    colours = [colormaps["viridis"](shade) for shade in (0.85, 0.5, 0.1)]
    axes.imshow(np.ma.masked_invalid(method[1:, :-1]), cmap=ListedColormap(colours), vmin=-0.5, vmax=2.5)
    for j, i in zip(*np.nonzero(~np.isnan(margin)), strict=True) if named else ():
        shade = "black" if method[j, i] == 0 else "white"
        axes.text(i, j - 1, f"{margin[j, i]:.2f}", ha="center", va="center", fontsize=7, color=shade)
    turned = {"rotation": 45, "ha": "right"} if named else {"rotation": 90}
    axes.set_xticks(range(count - 1), fields[:-1], **turned)
    axes.set_yticks(range(count - 1), fields[1:])
    if named:
        axes.set_title("number: margin of alpha", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    shown = [Patch(color=colour, label=word) for colour, word in zip(colours, _WORDS, strict=True)]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(METHODS), frameon=False)
    return figure


def size_figure(results: Results) -> Figure:
    """Test AUC against the parameters that are left, a point an arm and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(cell["arm"] for cell in results.cells):
        sizes = results.metric(arm, "parameters_after_compaction")
        axes.scatter(sizes, results.metric(arm, "auc"), label=arm)
    axes.set(xscale="log", xlabel="parameters, unused rows of crosses left out", ylabel="test AUC")
    figure.legend(loc="outside right upper", frameon=False)
    return figure
