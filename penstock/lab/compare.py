"""One leaderboard of several systems: the same data and the same budget for all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from penstock.data.base import Data
from penstock.errors import UserError
from penstock.lab.cards import card
from penstock.lab.config import override, untouched
from penstock.lab.progress import Reporter
from penstock.lab.run import Job, Options, command, environment
from penstock.lab.store import RunFolder, write_atomically
from penstock.lab.system import System, system

#: The parts of `Training` that make up the budget; the rest (learning rate, schedule ...) stays each system's own.
_BUDGET = ("steps", "epochs", "batch_size")


def compare(names: list[str], config: Any, options: Options) -> tuple[Path, dict[str, Any]]:
    """Train the gated arm of several systems, and the first one's ungated twin, on the same data with the same budget.

    Args:
        names: of systems that share a task.
        config: the configuration of the first; its data settings and budget hold for all.
        options: data, seeds, folder.

    Returns:
        the folder and the leaderboard: one row a model, best first by the task's first metric.

    Raises:
        UserError: if the systems do not share a task, or the data cannot be used.
    """
    if len(set(names)) < len(names):
        raise UserError(f"compare {' '.join(names)}: a system is named twice")
    if options.resume is not None:
        raise UserError("compare cannot be resumed; --resume goes with `penstock run`")
    tasks = {name: card(name).task for name in names}
    if len(set(tasks.values())) > 1:
        raise UserError(
            "systems of different tasks cannot share data: " + ", ".join(f"{n} is {t}" for n, t in tasks.items())
        )
    systems = [system(name) for name in names]
    if options.quick:
        config = override(config, untouched(config, systems[0].quick))
    reporter = Reporter()
    jobs = _jobs(systems, config, options, reporter)
    folder = RunFolder.create("compare", options.out)
    try:
        rows = []
        for name, job in jobs.items():
            part = RunFolder(folder.path / name)
            write_atomically(part.path / "config.yaml", job.about())
            results = job.execute(part)
            for arm, found in results["arms"].items():
                title = name if arm == "gated" else f"{name} ({arm})"
                rows.append(
                    {"name": title, "metrics": found["metrics"], "cost": found["cost"], "failed": found.get("failed")}
                )
        metrics = dict(systems[0].task.leaderboard)
        first, mode = next(iter(metrics.items()))
        sign = -1 if mode == "max" else 1
        rows.sort(key=lambda row: sign * row["metrics"][first]["mean"] if first in row["metrics"] else float("inf"))
        board = {
            "systems": names,
            "task": tasks[names[0]],
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


def _jobs(systems: list[System[Any]], config: Any, options: Options, reporter: Reporter) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    data: Data | None = None
    for number, one in enumerate(systems):
        own = config if number == 0 else one.Config()
        own = dataclasses.replace(own, data=config.data)
        own = override(own, {f"train.{name}": getattr(config.train, name) for name in _BUDGET})
        arms = ("gated", "ungated") if number == 0 else ("gated",)
        job = Job.prepare(one, own, dataclasses.replace(options, arms=arms), reporter, data=data, judged=False)
        data = job.data
        jobs[one.name] = job
    return jobs
