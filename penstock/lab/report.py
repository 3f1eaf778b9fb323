"""``report.html``: one self-contained page of a finished run, in light and dark, that fetches and runs nothing."""

from __future__ import annotations

import csv
import json
import pickle
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from penstock.data.base import Data
from penstock.errors import UserError
from penstock.gates import Table
from penstock.gates.core import CHOICES
from penstock.lab.cards import PLAIN_MODELS, Card, ClaimCard, card
from penstock.lab.config import from_dict
from penstock.lab.pictures import (
    DARK,
    DASHES,
    LIGHT,
    Curve,
    Picture,
    Values,
    curve_figure,
    limits,
    picture,
    pictures,
    printable,
    tile,
)
from penstock.lab.results import Effect, Results
from penstock.lab.show import number
from penstock.lab.store import RunFolder, open_run, write_atomically
from penstock.lab.system import System, system
from penstock.lab.train import restore_stage
from penstock.tasks.base import Task

#: How many gates of an arm have their pictures on the page, and how many their row in the table.
_MOST_PICTURED, _MOST_LISTED = 48, 400
_NEEDED = ("system", "config", "seeds", "data", "leaderboard", "arms", "trials", "claims", "environment")


def write_report(folder: RunFolder, data: Data | None = None) -> Path:
    """Write ``report.html`` of a finished run, from its results, log, configuration, cells and checkpoints.

    Args:
        folder: of the run.
        data: of the run, where it is at hand; else it is read again.

    Returns:
        the path of the page.

    Raises:
        UserError: if the run has not finished or one of its files is broken; nothing is written then.
    """
    page = template("report.html.j2").render(_content(folder, data))
    path = folder.path / "report.html"
    write_atomically(path, page)
    return path


@cache
def template(name: str) -> jinja2.Template:
    """A page of this folder, to be rendered."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "words": _words, "plain": _plain, "cell": _cell}
    environment.globals |= {"light": LIGHT, "dark": DARK, "dashes": DASHES}
    return environment.get_template(name)


def _content(folder: RunFolder, data: Data | None) -> dict[str, Any]:
    about = _printable(folder.about)
    results = _printable(folder.read_json("results.json"))
    missing = [name for name in _NEEDED if name not in results] if isinstance(results, dict) else list(_NEEDED)
    if missing:
        raise UserError(f"{folder.path / 'results.json'}: is not of a run (it has no {', '.join(missing)})")
    found = system(results["system"])
    its_card = None if found.name in PLAIN_MODELS else card(found.name)
    own, findings, notes = _own(folder, about, results, found, data)
    return {
        "card": its_card,
        "results": results,
        "about": about,
        "date": _date(results["environment"].get("date")),
        "data": _flat(results["data"]),
        "sizes": _sizes(results["data"]),
        "config": _flat(results["config"]),
        "standings": _standings(results),
        "best": _best(results),
        "verdicts": Counter(claim["verdict"] for claim in results["claims"]),
        "claims": [_claim(claim, its_card) for claim in results["claims"]],
        "not_judged": [(name, _claim_card(its_card, name)) for name in results.get("not_judged", [])],
        "curves": _curves(folder, results),
        "gated": [_gated(name, arm) for name, arm in results["arms"].items() if arm["gates"]],
        "own": own,
        "findings": findings,
        "notes": notes,
        "costs": _costs(results),
        "trials": _trials(results, found),
    }


def _printable(value: Any) -> Any:
    """``value`` with every string, keys too, fit for HTML."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, list) else value


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def _cell(value: Any) -> str:
    return _number(value) if value is None or isinstance(value, int | float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _date(text: str | None) -> str | None:
    if text is None:
        return None
    date = datetime.fromisoformat(text)
    return f"{date.day} {date:%B %Y, %H:%M}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += (
            _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(f"{prefix}{name}", value)]
        )
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sizes(data: Mapping[str, Any]) -> str | None:
    """How much is in the splits, where the data says so."""
    for what, splits in [("samples", data), *data.items()]:
        if isinstance(splits, Mapping) and isinstance(splits.get("train"), int):
            sizes = [f"{splits[split]:,} {split}" for split in ("train", "validation", "test") if split in splits]
            return f"{what}: {', '.join(sizes)}"
    return None


# -- how the arms compare ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """A row of the leaderboard: an arm, its metrics in the leaderboard's order, and what stopped it, by seed."""

    arm: str
    metrics: list[dict[str, Any] | None]
    best: list[bool]
    others: list[tuple[str, dict[str, Any]]]
    failed: dict[str, str]


def _mean(arm: Mapping[str, Any], metric: str) -> float | None:
    return arm["metrics"].get(metric, {}).get("mean")


def _ranked(results: Mapping[str, Any], metric: str, mode: str) -> list[str]:
    """Arms with a finite value of ``metric``, best first."""
    means = {name: _mean(arm, metric) for name, arm in results["arms"].items()}
    known = {name: mean for name, mean in means.items() if mean is not None}
    return sorted(known, key=lambda name: known[name], reverse=mode == "max")


def _standings(results: Mapping[str, Any]) -> list[Standing]:
    board, arms = results["leaderboard"], results["arms"]
    bests = {m: {_mean(arms[n], m) for n in _ranked(results, m, mode)[:1]} for m, mode in board.items()}
    order = _ranked(results, *next(iter(board.items()))) if board else []
    return [
        Standing(
            arm=name,
            metrics=[arms[name]["metrics"].get(m) for m in board],
            best=[len(arms) > 1 and _mean(arms[name], m) in bests[m] for m in board],
            others=[(m, v) for m, v in arms[name]["metrics"].items() if m not in board],
            failed=arms[name].get("failed", {}),
        )
        for name in [*order, *(name for name in arms if name not in order)]
    ]


@dataclass(frozen=True)
class Best:
    """Which arm is best by the first metric of the leaderboard, and how sure that is."""

    metric: str
    better: str
    arm: str
    spread: dict[str, Any]
    next: str | None = None
    next_spread: dict[str, Any] | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def beyond_chance(self) -> bool:
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def _best(results: Mapping[str, Any]) -> Best | None:
    if not results["leaderboard"]:
        return None
    metric, mode = next(iter(results["leaderboard"].items()))
    order = _ranked(results, metric, mode)
    if not order:
        return None
    arms, better = results["arms"], "higher" if mode == "max" else "lower"
    first = arms[order[0]]["metrics"][metric]
    if len(order) == 1:
        return Best(metric, better, order[0], first)
    ours, theirs = (_by_seed(results, name, metric) for name in order[:2])
    effect = Effect([ours[seed] - theirs[seed] for seed in ours if seed in theirs], ">")
    return Best(
        metric, better, order[0], first, order[1], arms[order[1]]["metrics"][metric], effect.mean, effect.interval
    )


def _by_seed(results: Mapping[str, Any], name: str, metric: str) -> dict[int, float]:
    arm = results["arms"][name]
    seeds = [seed for seed in results["seeds"] if str(seed) not in arm.get("failed", {})]
    values = zip(seeds, arm["metrics"][metric]["values"], strict=True)
    return {seed: value for seed, value in values if value is not None}


# -- claims --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A small bar on an axis from 0 to 100: the side that counts, the threshold, the interval, the mean, the seeds."""

    good: tuple[float, float]
    threshold: float
    mean: float
    interval: tuple[float, float] | None
    seeds: list[float]


@dataclass(frozen=True)
class Part:
    """One measurement of a claim."""

    what: str
    measured: float | None
    interval: list[float] | None
    must_be: str
    verdict: str
    seeds: int
    strip: Strip | None


@dataclass(frozen=True)
class ClaimView:
    """A claim with what the card says about it."""

    id: str
    says: str
    measures: str
    verdict: str
    parts: list[Part]


def _claim_card(its_card: Card | None, name: str) -> ClaimCard | None:
    return next((claim for claim in its_card.claims if claim.id == name), None) if its_card else None


def _claim(claim: Mapping[str, Any], its_card: Card | None) -> ClaimView:
    about = _claim_card(its_card, claim["id"])
    parts = [
        Part(
            what=part["what"],
            measured=part["measured"],
            interval=part["interval"],
            must_be=part["must_be"],
            verdict=part["verdict"],
            seeds=len(part["values"]),
            strip=_strip(part),
        )
        for part in claim["parts"]
    ]
    return ClaimView(claim["id"], claim["says"], about.measures if about else "", claim["verdict"], parts)


def _strip(part: Mapping[str, Any]) -> Strip | None:
    if part["measured"] is None:
        return None
    side, bound = part["must_be"].split()
    threshold = float(bound)
    values = [value for value in part["values"] if value is not None]
    interval = part["interval"] if part["interval"] and None not in part["interval"] else None
    shown = [threshold, part["measured"], *values, *(interval or [])]
    low, high = min(shown), max(shown)
    width = (high - low) or 1.0

    def at(value: float) -> float:
        return round(6 + 88 * (value - low) / width, 2)

    return Strip(
        good=(at(threshold), 100.0 - at(threshold)) if side == ">" else (0.0, at(threshold)),
        threshold=at(threshold),
        mean=at(part["measured"]),
        interval=(at(interval[0]), at(interval[1])) if interval else None,
        seeds=[at(value) for value in values],
    )


# -- learning curves -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvePicture:
    """A picture of one logged number, with where each arm ends."""

    metric: str
    picture: Picture
    ends: list[tuple[str, float, float]]


def _curves(folder: RunFolder, results: Mapping[str, Any]) -> list[CurvePicture]:
    """The training loss, then the validation loss and the first metric of the leaderboard."""
    log = _log(folder)
    wanted = dict.fromkeys(["train/loss", "val/loss", *(f"val/{name}" for name in list(results["leaderboard"])[:1])])
    found = []
    for metric in wanted:
        curves = [_curve(log[metric].get(arm, {})) for arm in results["arms"]] if metric in log else []
        if any(curves):
            ends = [
                (arm, float(curve.steps[-1]), float(curve.mean[-1]))
                for arm, curve in zip(results["arms"], curves, strict=True)
                if curve is not None
            ]
            found.append(CurvePicture(metric, _curve_picture(curves), ends))
    return found


def _curve_picture(curves: Sequence[Curve | None]) -> Picture:
    return picture(lambda: curve_figure(curves))


def _log(folder: RunFolder) -> dict[str, dict[str, dict[int, list[float]]]]:
    """``log.csv`` by metric, arm and step, with one finite value a seed; stages of a training follow one another.

    Raises:
        UserError: if it is missing or a row is broken, naming it.
    """
    path = folder.path / "log.csv"
    log: dict[str, dict[str, dict[int, list[float]]]] = {}
    # Of each training: its stage, how many steps were done before, and how many have been done.
    clocks: dict[tuple[str, str], tuple[str, int, int]] = {}
    for line, row in _rows(path):
        try:
            who, stage, metric = (row["arm"], row["seed"]), row["stage"], row["metric"]
            # Lightning counts steps from 0.
            step, value = int(row["step"]) + 1, float(row["value"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: row {line} is broken; it must have arm, seed, stage, step, metric and value"
            ) from None
        at_stage, start, last = clocks.get(who, (stage, 0, 0))
        if stage != at_stage:
            start = last
        clocks[who] = (stage, start, max(last, start + step))
        if np.isfinite(value):
            log.setdefault(metric, {}).setdefault(printable(row["arm"]), {}).setdefault(start + step, []).append(value)
    return log


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from enumerate(csv.DictReader(file), 2)
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: the run has no log.csv; it did not finish (go on with --resume {path.parent})"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV file ({error})") from None


def _curve(steps: Mapping[int, list[float]]) -> Curve | None:
    if not steps:
        return None
    order = sorted(steps)
    return Curve(
        np.array(order, np.float64),
        np.array([statistics.fmean(steps[step]) for step in order]),
        np.array([statistics.stdev(steps[step]) if len(steps[step]) > 1 else 0.0 for step in order]),
    )


# -- gates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A heat map with units as rows; what its columns are stands below it."""

    picture: Picture
    columns: str
    rows: str
    scale: tuple[float, float]


@dataclass(frozen=True)
class GateView:
    """One gate: its statistics, in words too, and its pictures."""

    name: str
    stats: dict[str, Any]
    says: str
    history: Tile | None = None
    sample: Tile | None = None


@dataclass(frozen=True)
class Gated:
    """The gates of one arm."""

    arm: str
    gates: list[GateView]
    columns: list[str]
    pictured: list[GateView]
    more: int


_COLUMNS = (
    *("units", "mean", "std", "below_05", "above_95", "from_input", "effective", "dead"),
    *("entropy", "load_cv", "unused"),
)


def _gated(name: str, arm: Mapping[str, Any]) -> Gated:
    shown = arm["gates"][:_MOST_LISTED]
    history, samples = arm.get("gate_history", []), arm.get("gate_sample", {})
    gates = [
        _gate(stats, history, samples.get(stats["name"])) if place < _MOST_PICTURED else _gate(stats, [], None)
        for place, stats in enumerate(shown)
    ]
    columns = [column for column in _COLUMNS if any(gate.stats.get(column) is not None for gate in gates)]
    return Gated(name, gates, columns, gates[:_MOST_PICTURED], len(arm["gates"]) - len(shown))


def _gate(stats: dict[str, Any], history: Sequence[Mapping[str, Any]], sample: Mapping[str, Any] | None) -> GateView:
    name = stats["name"]
    means = [(moment["step"], moment["means"][name]) for moment in history if name in moment["means"]]
    over = _matrix([units for _, units in means]).T
    by = _matrix(sample["values"]).T if sample else _matrix([])
    scale = limits(np.concatenate([over.ravel(), by.ravel()]), choice=stats["kind"] in CHOICES)
    return GateView(
        name=name or "(the model itself)",
        stats=stats,
        says=_says(stats),
        history=_tile(over, scale, _steps([step for step, _ in means]), stats["passes"]) if over.size else None,
        sample=_tile(by, scale, f"{sample['rows']} 1 to {by.shape[1]}", sample["columns"]) if sample else None,
    )


def _steps(steps: Sequence[int]) -> str:
    """From which step to which, anew for each stage: a later one begins at 0 again."""
    starts = [0, *(place for place in range(1, len(steps)) if steps[place] <= steps[place - 1]), len(steps)]
    return "step " + ", then ".join(f"{steps[a]:,} to {steps[b - 1]:,}" for a, b in pairwise(starts))


def _tile(values: Values, scale: tuple[float, float], columns: str, units: str) -> Tile:
    return Tile(tile(values, scale), columns, f"{len(values)} × {units}" if len(values) > 1 else units, scale)


def _matrix(rows: Sequence[Sequence[float | None]]) -> Values:
    """Rows of numbers as a matrix; what is missing or of no number is NaN."""
    matrix = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for place, row in enumerate(rows):
        matrix[place, : len(row)] = [np.nan if value is None else value for value in row]
    return matrix


def _says(stats: Mapping[str, Any]) -> str:
    """What the statistics come to, in a sentence or two."""
    if not stats["calls"]:
        return "It was not called on the test batches."
    share = stats["from_input"]
    if stats["static"]:
        text = "It does not see the input: its values are learned constants."
    elif share is None:
        text = "Its values do not vary, or vary in number from input to input."
    elif share < 0.01:
        text = "Almost none of its variance comes from the input: it acts as a constant."
    else:
        text = f"{share:.0%} of its variance comes from the input, the rest is between units."
    if stats["dead"]:
        text += f" {stats['dead']:,} of {stats['units']:,} units never open."
    return text


# -- figures of the system and of its task -------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A table of what gates found, cut off where it would be too long to read."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    more: int


def _own(
    folder: RunFolder, about: Mapping[str, Any], results: Mapping[str, Any], found: System[Any], data: Data | None
) -> tuple[dict[str, Picture], list[Finding], list[str]]:
    """What the system draws of the whole run, what it and its task say of the first gated arm; and what is missing."""
    config = from_dict(found.Config, about["config"], where=str(folder.path / "config.yaml"))
    drawn: dict[str, Picture] = {}
    findings: list[Finding] = []
    notes = []
    cells = [folder.cell(arm, seed) for seed in results["seeds"] for arm in results["arms"]]
    cells = [cell for cell in cells if cell.is_file()]
    if cells:
        read = [folder.read_json(str(cell.relative_to(folder.path))) for cell in cells]
        both = Results([cell for cell in read if "failed" not in cell], results["trials"])
        drawn = pictures(lambda: found.figures(config, both))
    else:
        notes.append("The system's own figures are left out: the run's cells/ are not there.")
    arm = next((name for name, arm in results["arms"].items() if arm["gates"]), None)
    if arm is not None:
        try:
            task = _restored(folder, arm, data)
            with torch.no_grad():
                findings = [
                    _finding(title, table) for title, table in found.findings(task.model, config, task.data).items()
                ]
                drawn |= {f"{title}: {arm}": one for title, one in pictures(task.figures).items()}
        except UserError as error:
            notes.append(f"Figures of the task are left out: {error}.")
    return drawn, findings, notes


def _finding(title: str, table: Table) -> Finding:
    columns = list(dict.fromkeys(name for row in table for name in row))
    rows = [[_printable(row.get(name)) for name in columns] for row in table[:_MOST_LISTED]]
    return Finding(printable(title), _printable(columns), rows, len(table) - len(rows))


def _restored(folder: RunFolder, arm: str, data: Data | None) -> Task:
    """The task of the arm's first training, brought back from its checkpoints.

    Raises:
        UserError: if the checkpoints or the data are not there any more, or do not fit.
    """
    checkpoints = folder.path / "checkpoints"
    if not any(checkpoints.glob("*.ckpt")):
        raise UserError("the run's checkpoints/ are not there")
    run = open_run(folder.path)
    data = data or run.system.load_data(run.config, run.source)
    model = run.system.arms(run.config, run.spec)[arm]()
    # A later stage takes over from an earlier one, so that all are gone through.
    for make in run.system.stages(arm, model, run.config, data):
        stage = make()
        stage.task.seed = 0
        path = checkpoints / f"{arm}.seed0.{stage.name}.ckpt"
        if not path.is_file():
            raise UserError(f"{path} is not there")
        try:
            restore_stage(stage, path)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            raise UserError(f"{path} is broken or of another version of the model") from None
    return stage.task.eval()


# -- cost and trials -----------------------------------------------------------------------------------------

_COSTS = {
    "parameters": "parameters",
    "gate_parameters": "of these in gates",
    "flops": "FLOPs a sample",
    "flops_spent": "FLOPs really spent",
    "latency_ms": "latency (ms)",
    "peak_memory_mb": "peak memory (MiB)",
    "train_seconds": "training (s)",
}


@dataclass(frozen=True)
class Costs:
    """The cost table: headings, and rows of an arm with (value, ratio to the ungated twin)."""

    columns: list[str]
    rows: list[tuple[str, list[tuple[float | None, float | None]]]]
    batch: int | None


def _costs(results: Mapping[str, Any]) -> Costs:
    arms = {name: arm["cost"] for name, arm in results["arms"].items() if arm["cost"]}
    used = [key for key in _COSTS if any(cost.get(key) is not None for cost in arms.values())]
    twin = arms.get("ungated", {})
    rows = []
    for name, cost in arms.items():
        values = [cost.get(key) for key in used]
        ratios = [
            value / twin[key] if value and twin.get(key) and name != "ungated" else None
            for key, value in zip(used, values, strict=True)
        ]
        rows.append((name, list(zip(values, ratios, strict=True))))
    batch = next((int(cost["batch"]) for cost in arms.values() if cost.get("batch")), None)
    return Costs([_COSTS[key] for key in used], rows, batch)


@dataclass(frozen=True)
class TrialView:
    """A side experiment: what it is, and each measure's mean and values."""

    name: str
    what: str
    measures: list[tuple[str, float | None, list[float | None]]]


def _trials(results: Mapping[str, Any], found: System[Any]) -> list[TrialView]:
    views = []
    for name, runs in results["trials"].items():
        measures = []
        for measure in runs[0] if runs else []:
            values = [run.get(measure) for run in runs]
            finite = [value for value in values if value is not None]
            measures.append((measure, statistics.fmean(finite) if finite else None, values))
        views.append(TrialView(name, found.trials[name].what if name in found.trials else "", measures))
    return views
