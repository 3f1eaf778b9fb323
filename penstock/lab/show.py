"""Results on the terminal: tables where there is one, plain aligned lines elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

_MARKS = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


def number(value: Any) -> str:
    """A figure as a person reads it."""
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1e4):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def show_results(results: dict[str, Any], folder: Path) -> None:
    """Arms with metrics and cost, gates, claims, and where the report is."""
    console = Console(highlight=False, soft_wrap=False, width=None if Console().is_terminal else 170)
    seeds = len(results["seeds"])
    board = results["leaderboard"]
    columns = ["parameters", "flops", "latency_ms", "peak_memory_mb", "train_seconds"]
    if any(abs(a["cost"].get("flops_spent", 0) - a["cost"].get("flops", 0)) > 0.5 for a in results["arms"].values()):
        columns.insert(2, "flops_spent")
    table = _table(f"{results['system']}: {seeds} seed{'s' if seeds > 1 else ''}", ["arm", *board, *columns])
    for name, arm in results["arms"].items():
        if arm.get("failed") and not arm["metrics"]:
            table.add_row(Text(name), Text("stopped: " + next(iter(arm["failed"].values())), style="red"))
            continue
        metrics = [_spread(arm["metrics"], m) for m in board]
        table.add_row(Text(name), *metrics, *(number(arm["cost"].get(c)) for c in columns))
    console.print(table)
    gated = next((arm for arm in results["arms"].values() if arm["gates"]), None)
    if gated:
        console.print(_gate_table(gated["gates"]))
    if results["claims"]:
        console.print(_claim_table(results["claims"]))
    for claim in results["not_judged"]:
        console.print(f"not judged in this run (it needs other data or arms): {claim}")
    if seeds < 2:
        console.print("one seed gives no interval, so comparisons of arms stay undecided: add --seeds 3")
    report = folder / "report.html"
    console.print(f"report: {report}" if report.exists() else f"run folder: {folder}", soft_wrap=True)


def show_leaderboard(board: dict[str, Any], folder: Path) -> None:
    """The rows of a comparison."""
    console = Console(highlight=False, width=None if Console().is_terminal else 190)
    metrics = list(board["leaderboard"])
    extra = [
        k for k in ("parameters", "flops", "latency_ms", "train_seconds") if any(k in r["cost"] for r in board["rows"])
    ]
    speeds = list(dict.fromkeys(name for row in board["rows"] for name in row["speed"]))
    table = _table(
        "leaderboard",
        ["system", *metrics, *extra, *(name.replace("tokens_per_s_at_", "tokens/s at ") for name in speeds)],
    )
    for row in board["rows"]:
        table.add_row(
            Text(row["name"]),
            *(_spread(row["metrics"], m) for m in metrics),
            *(number(row["cost"].get(c)) for c in extra),
            *(number(row["speed"].get(name)) for name in speeds),
        )
    console.print(table)
    console.print(f"run folder: {folder}", soft_wrap=True)


def show_tuning(result: dict[str, Any], folder: Path) -> None:
    """The best trials of a search, what to type for the best, and what the test said."""
    from penstock.lab.space import flags
    from penstock.lab.tunepage import ranked

    console = Console(highlight=False, width=None if Console().is_terminal else 190)
    trials = ranked(result)
    table = _table(f"{result['system']}: trials", ["trial", result["metric"], "state", "seconds", "settings"])
    table.columns[-1].justify = "left"
    for trial in trials[:10]:
        settings = trial["reason"] or " ".join(flags(trial["settings"]))
        figures = number(trial["value"]), trial["state"], number(trial["seconds"])
        table.add_row(str(trial["number"]), *figures, Text(settings))
    console.print(table)
    if len(trials) > 10:
        console.print(f"... and {len(trials) - 10} more in {folder / 'tune.json'}", soft_wrap=True)
    for name, share in result["importances"].items():
        console.print(f"{share:6.2f}  importance of {name}")
    if result["best"]:
        console.print(f"best, by validation {result['metric']} {number(result['best']['value'])}:")
        console.print(Text(result["best"]["command"]), soft_wrap=True)
    if result["test"]:
        for arm, metrics in result["test"].items():
            names = [name for name in metrics if name != "loss_spikes" and not name.endswith("_error")]
            shown = ", ".join(f"{name} {_spread(metrics, name)}" for name in names)
            console.print(f"test of {arm}, the only look at the test split: {shown}", soft_wrap=True)
        console.print(f"run folder of the best: {result['best_run']}", soft_wrap=True)
    console.print(f"report: {folder / 'tune.html'}", soft_wrap=True)


def _table(title: str, columns: list[str]) -> RichTable:
    table = RichTable(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    return table


def _spread(metrics: dict[str, Any], name: str) -> str:
    """Mean and standard deviation over seeds; of one seed, the 95% interval over test rows where there is one."""
    metric, error = metrics.get(name), metrics.get(f"{name}_error")
    if metric is None:
        return "-"
    mean = metric["mean"]
    if len(metric["values"]) > 1:
        return f"{number(mean)} ± {metric['std']:.2g}"
    if error is None or not math.isfinite(error["mean"]):
        return number(mean)
    return f"{number(mean)} [{number(mean - 1.96 * error['mean'])}, {number(mean + 1.96 * error['mean'])}]"


def _gate_table(gates: list[dict[str, Any]]) -> RichTable:
    columns = ["mean", "std", "below_05", "above_95", "from_input", "effective", "dead", "entropy", "load_cv", "unused"]
    used = [c for c in columns if any(g.get(c) is not None for g in gates)]
    table = _table("gates of the gated arm", ["gate", "kind", *used])
    for gate in gates[:24]:
        table.add_row(Text(gate["name"] or "(model)"), gate["kind"], *(number(gate.get(c)) for c in used))
    if len(gates) > 24:
        table.add_row(f"... and {len(gates) - 24} more (all in results.json)")
    return table


def _claim_table(claims: list[dict[str, Any]]) -> RichTable:
    table = _table("claims", ["claim", "measured", "mean", "95% interval", "must be", "verdict"])
    for claim in claims:
        for place, part in enumerate(claim["parts"]):
            interval = part["interval"]
            between = f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "-"
            verdict = Text(claim["verdict"], style=_MARKS[claim["verdict"]]) if place == 0 else Text("")
            table.add_row(
                Text(claim["id"] if place == 0 else ""),
                Text(part["what"]),
                number(part["measured"]),
                Text(between),
                part["must_be"],
                verdict,
            )
    return table
