"""One leaderboard of several systems: the same data, the same budget and, where it can be had, the same size for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penstock.data.base import Data
from penstock.errors import UserError
from penstock.lab.cards import PLAIN_MODELS, card
from penstock.lab.config import override, untouched
from penstock.lab.progress import Reporter
from penstock.lab.run import Job, Options, command, environment, measured_of
from penstock.lab.store import RunFolder, write_atomically
from penstock.lab.system import System, system

#: The parts of `Training` that make up the budget; the rest (learning rate, schedule ...) stays each system's own.
_BUDGET = ("steps", "epochs", "batch_size")
#: And what decides a step's cost and not what is learned from it, where a task has it.
_COST = ("lazy_embeddings",)
#: The settings of the data, which hold for all.
_DATA = ("data", "table")
#: What the others take over from the first, where they can be built with it and still have its size.
_SHAPE = ("width", "depth", "dim", "mlp_dims")
#: Numbers of parameters this near to each other count as the same.
_TOLERANCE = 0.03


def compare(names: list[str], config: Any, options: Options) -> tuple[Path, dict[str, Any]]:
    """Train the gated arm of several systems, and the first one's ungated twin, on the same data with the same budget.

    Systems that name a `System.size_field` are given about as many parameters as the first, at its width and depth if
    they can.

    Args:
        names: of systems that share a task, and of plain models of that task (`PLAIN_MODELS`).
        config: the configuration of the first; its data settings and budget hold for all.
        options: data, seeds, folder.

    Returns:
        the folder and the leaderboard: one row a model, best first by the task's first metric, with its cost and,
        for sequence models, its speed by length.

    Raises:
        UserError: if the systems do not share a task, or the data cannot be used.
    """
    if len(set(names)) < len(names):
        raise UserError(f"compare {' '.join(names)}: a system is named twice")
    if options.resume is not None:
        raise UserError("compare cannot be resumed; --resume goes with `penstock run`")
    task = _shared_task(names)
    systems = [system(name) for name in names]
    if options.quick:
        config = override(config, untouched(config, systems[0].quick))
    reporter = Reporter()
    jobs = _jobs(systems, config, options, reporter)
    folder = RunFolder.create("compare", options.out)
    reporter.say(next(iter(jobs.values())).data.overview())
    try:
        rows = []
        for name, job in jobs.items():
            reporter.say(f"{name}:")
            part = RunFolder(folder.path / name)
            write_atomically(part.path / "config.yaml", job.about())
            results = job.execute(part)
            kind = job.system.task_for(job.data.spec)
            for arm, found in results["arms"].items():
                title = name if arm == "gated" else f"{name} ({arm})"
                rows.append(
                    {
                        "name": title,
                        "metrics": found["metrics"],
                        "cost": found["cost"],
                        "speed": kind.speed(partial(_build, job, arm), job.data.spec),
                        "failed": found.get("failed"),
                    }
                )
        metrics = measured_of(systems[0].task_for(next(iter(jobs.values())).data.spec).leaderboard, rows)
        first, mode = next(iter(metrics.items()))
        sign = -1 if mode == "max" else 1
        rows.sort(key=lambda row: sign * row["metrics"][first]["mean"] if first in row["metrics"] else float("inf"))
        board = {
            "systems": names,
            "task": task,
            "data": next(iter(jobs.values())).data.describe(),
            "budget": {k: getattr(config.train, k) for k in _BUDGET},
            "seeds": list(range(options.seeds)),
            "leaderboard": metrics,
            "rows": rows,
            "environment": environment(),
            "command": command(),
        }
        folder.write_json("results.json", board)
    finally:
        folder.release()
    return folder.path, board


def _shared_task(names: list[str]) -> str:
    """The first system's task or another of its, if all the others have it too."""
    tasks = {
        name: (PLAIN_MODELS[name],) if name in PLAIN_MODELS else (card(name).task, *card(name).also) for name in names
    }
    for task in tasks[names[0]]:
        if all(task in own for own in tasks.values()):
            return task
    raise UserError(
        "systems of different tasks cannot share data: "
        + ", ".join(f"{name} is {' or '.join(own)}" for name, own in tasks.items())
    )


def _jobs(systems: list[System[Any]], config: Any, options: Options, reporter: Reporter) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    data: Data | None = None
    size = 0
    for number, one in enumerate(systems):
        own = config if number == 0 else one.Config()
        # A system with simulated data of another sort keeps its settings: its part must open as a run of its own.
        shared = {k: getattr(config, k) for k in _DATA if hasattr(config, k) and hasattr(own, k)}
        own = dataclasses.replace(own, **{k: v for k, v in shared.items() if type(v) is type(getattr(own, k))})
        alike = [*_BUDGET, *(name for name in _COST if hasattr(config.train, name) and hasattr(own.train, name))]
        own = override(own, {f"train.{name}": getattr(config.train, name) for name in alike})
        if data is not None:
            shape = {name: getattr(config, name) for name in _SHAPE if hasattr(config, name) and hasattr(own, name)}
            own = _sized(one, override(own, shape), own, data.spec, size)
        arms = ("gated", "ungated") if number == 0 else ("gated",)
        job = Job.prepare(one, own, dataclasses.replace(options, arms=arms), reporter, data=data, judged=False)
        data, jobs[one.name] = job.data, job
        count = _parameters(one, own, data.spec)
        size = size or count
        if systems[0].size_field and abs(count / size - 1) > _TOLERANCE:
            reporter.say(
                f"{one.name} has {count:,} parameters, {systems[0].name} {size:,}: their sizes are not matched"
                + ("" if one.size_field else f" ({one.name} has no setting for it)")
            )
    return jobs


def _sized(one: System[Any], alike: Any, own: Any, spec: Mapping[str, Any], parameters: int) -> Any:
    """The configuration ``alike``, or ``own`` if that comes nearer to so many parameters, either resized."""
    if not one.size_field:
        return alike
    choices = [resized(one, config, spec, parameters) for config in (alike, own)]
    off = [max(abs(_parameters(one, config, spec) / parameters - 1), _TOLERANCE) for config in choices]
    return choices[off.index(min(off))]


def resized(one: System[Any], config: Any, spec: Mapping[str, Any], parameters: int) -> Any:
    """The configuration with which the gated arm has about so many parameters, by the system's `size_field` alone.

    Returns ``config`` itself where the system has no such field.
    """
    field = one.size_field
    if not field:
        return config
    low, high = 1, 1
    while high < 2**20 and _parameters(one, override(config, {field: high}), spec) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _parameters(one, override(config, {field: middle}), spec) < parameters:
            low = middle
        else:
            high = middle
    off = {size: abs(_parameters(one, override(config, {field: size}), spec) - parameters) for size in (low, high)}
    return override(config, {field: min(off, key=off.__getitem__)})


def _parameters(one: System[Any], config: Any, spec: Mapping[str, Any]) -> int:
    """Of the gated arm, built without memory; none where the sizes cannot be met."""
    try:
        with torch.device("meta"):
            model = one.arms(config, spec)["gated"]()
    except ValueError:
        return 0
    return sum(p.numel() for p in model.parameters())


def _build(job: Job, arm: str, spec: Mapping[str, Any]) -> nn.Module:
    return job.system.arms(job.config, spec)[arm]()
