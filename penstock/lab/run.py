"""A run: every arm with the same budget and seeds, tested, costed, watched, and the claims judged."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn

from penstock._version import __version__
from penstock.data.base import Data, Source
from penstock.data.parts import Peers, processes, reading_together
from penstock.errors import UserError
from penstock.gates import watch
from penstock.gates.core import GateNotFoundError
from penstock.lab.cards import PLAIN_MODELS, card
from penstock.lab.config import from_dict, override, to_dict, untouched
from penstock.lab.cost import cost
from penstock.lab.gatesample import gate_sample
from penstock.lab.jsontext import plain_json
from penstock.lab.progress import Reporter
from penstock.lab.results import Judgement, Results, loss_spikes
from penstock.lab.store import FORMAT, RunFolder, write_atomically
from penstock.lab.system import System, system
from penstock.lab.train import (
    Hardware,
    NonFiniteError,
    Trained,
    check_budget,
    hush,
    restore_stage,
    seed_all,
    test,
    train_stage,
    validate,
)
from penstock.ops.workspace import keep_freed_memory
from penstock.tasks.pretrained import start_from_vectors

#: Batches of the test split on which gates are watched for the final statistics.
_WATCHED_BATCHES = 20
#: Rows of the longest table of findings that ``results.json`` holds.
_MOST_FOUND = 100


@dataclass
class Options:
    """What every run can be told, beside the system's own configuration."""

    data: Path | None = None
    """Your own data; default: the embedded data set."""
    test: Path | None = None
    """A test set of your own; default: a part of the data."""
    label: str | None = None
    """The column that holds the label, for tables."""
    seeds: int = 1
    """Train every arm this many times; verdicts need at least 2, better 3."""
    quick: bool = False
    """A smaller budget (under a minute), the same mechanism."""
    arms: tuple[str, ...] = ()
    """Train only these arms (default all)."""
    out: Path | None = None
    """The run folder; default runs/<name>-<time>."""
    resume: Path | None = None
    """Go on with this run folder."""
    json: bool = False
    """Print results.json on standard output and nothing else."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)

    @property
    def source(self) -> Source:
        return Source(self.data, self.test, self.label)


@dataclass
class Job:
    """Everything a run needs, checked before anything is written."""

    system: System[Any]
    config: Any
    options: Options
    data: Data
    arms: dict[str, Callable[[], nn.Module]]
    reporter: Reporter
    judged: bool = True
    """Whether the system's claims, and the side experiments they need, are part of the job."""

    @classmethod
    def prepare(
        cls,
        found: System[Any],
        config: Any,
        options: Options,
        reporter: Reporter,
        *,
        data: Data | None = None,
        judged: bool = True,
    ) -> Job:
        """Read the data (unless given) and try every arm's sizes.

        Raises:
            UserError: for data that cannot be used or sizes that cannot be met.
        """
        if options.seeds < 1:
            raise UserError(f"--seeds {options.seeds}: at least 1")
        with _user_errors():
            several = options.hardware.devices * options.hardware.num_nodes > 1
            with reporter.reading(), reading_together(processes() if several else Peers()):
                data = data or found.load_data(config, options.source)
            arms = found.arms(config, data.spec)
            if unknown := set(options.arms) - set(arms):
                raise UserError(
                    f"--arms {' '.join(sorted(unknown))}: there is no such arm; there are {', '.join(arms)}"
                )
            chosen = {name: build for name, build in arms.items() if not options.arms or name in options.arms}
            for build in chosen.values():
                with torch.device("meta"):
                    model = build()
                start_from_vectors(model, data)
            check_budget(config.train, len(data.train(config.train.batch_size, 0)))
        return cls(found, config, options, data, chosen, reporter, judged)

    def about(self) -> str:
        """The content of ``config.yaml``: what is needed to go on with the run and to use it."""
        about = {
            "format": FORMAT,
            "system": self.system.name,
            "version": __version__,
            "command": command(),
            "seeds": self.options.seeds,
            "quick": self.options.quick,
            "arms": list(self.options.arms),
            "data": self.options.source.to_dict(),
            "described": json.loads(plain_json(self.data.describe())),
            "hardware": vars(self.options.hardware),
            "config": to_dict(self.config),
        }
        return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)

    def execute(self, folder: RunFolder) -> dict[str, Any]:
        """Train, test and judge; returns what stands in ``results.json``."""
        hush()
        keep_freed_memory()
        with threads(self.options.hardware.threads or self.system.threads):
            return self._execute(folder)

    def _execute(self, folder: RunFolder) -> dict[str, Any]:
        cells, trials = [], {}
        if main_process():
            folder.write_json("data.json", self.data.spec)
        for seed in range(self.options.seeds):
            for arm in self.arms:
                cells.append(self._cell(folder, arm, seed))
        for name, trial in self.system.trials_for(self.data.spec).items() if self.judged else ():
            trials[name] = [
                self._trial(folder, name, seed)
                for seed in range(1 if self.options.quick else max(trial.seeds, self.options.seeds))
            ]
        results = self.summarise(Results([c for c in cells if "failed" not in c], trials), cells)
        if main_process():
            folder.write_log(row for cell in cells for row in cell.get("curves", []))
            folder.write_json("results.json", results)
        return results

    def _cell(self, folder: RunFolder, arm: str, seed: int) -> dict[str, Any]:
        path = folder.cell(arm, seed)
        if path.exists():
            return json.loads(path.read_text())
        model = self._built(arm, seed)
        try:
            trained, seconds = self._train(folder, arm, seed, model)
        except NonFiniteError as error:
            self.reporter.say(f"{arm} seed {seed} stopped: {error}")
            cell: dict[str, Any] = {"arm": arm, "seed": seed, "failed": str(error)}
        else:
            task = trained[-1].task
            name = f"{arm} seed {seed}"
            metrics = test(task, self.options.hardware, reporter=self.reporter, title=f"{name} test")
            task.eval()
            with self.reporter.bar(f"{name} measure", 0, announce=False):
                metrics |= self.system.measure(arm, task, self.config, self.data, seed)
            losses = [row["value"] for row in trained[-1].rows if row["metric"] == "train/loss"]
            metrics["loss_spikes"] = float(loss_spikes(losses))
            batch = next(iter(self.data.test(task.train_config.batch_size)))
            cell = {
                "arm": arm,
                "seed": seed,
                "metrics": metrics,
                "cost": cost(task, batch) | {"train_seconds": seconds},
                "gates": self._watched(task),
                "gate_history": [step for stage in trained for step in stage.gate_history],
                "gate_sample": gate_sample(task, batch),
                "findings": self._findings(task),
                "curves": [row for stage in trained for row in stage.rows],
            }
            if main_process():
                folder.save_model(arm, seed, model)
                self.system.artifacts(arm, model, self.data, folder.path / "models" / arm, seed)
        if main_process():
            folder.write_json(str(path.relative_to(folder.path)), cell)
        return cell

    def _built(self, arm: str, seed: int) -> nn.Module:
        seed_all(seed)
        with _user_errors():
            model = self.arms[arm]()
            start_from_vectors(model, self.data)
            return model

    def validated(self, folder: RunFolder, arm: str, seed: int, callbacks: Sequence[Callback] = ()) -> dict[str, float]:
        """Train an arm and measure it on the validation split alone."""
        trained, _ = self._train(folder, arm, seed, self._built(arm, seed), callbacks)
        return validate(trained[-1].task, self.options.hardware)

    def _train(
        self, folder: RunFolder, arm: str, seed: int, model: nn.Module, callbacks: Sequence[Callback] = ()
    ) -> tuple[list[Trained], float]:
        done: list[Trained] = []
        stages = self.system.stages(arm, model, self.config, self.data)
        seconds = 0.0
        for number, make in enumerate(stages):
            stage = make()
            stage.task.seed = seed
            path = folder.path / "checkpoints" / f"{arm}.seed{seed}.{stage.name}.ckpt"
            mark = path.with_suffix(".done")
            if mark.exists():
                done.append(restore_stage(stage, path))
                done[-1].seconds = float(mark.read_text())
            else:
                seed_all(seed * 1000 + number + 1)
                done.append(
                    train_stage(
                        stage,
                        path,
                        {"arm": arm, "seed": seed},
                        seed=seed,
                        hardware=self.options.hardware,
                        reporter=self.reporter,
                        extra=callbacks,
                    )
                )
                if main_process():
                    write_atomically(mark, f"{done[-1].seconds}\n")
            seconds += done[-1].seconds
        return done, seconds

    def _watched(self, task: Any) -> dict[str, Any]:
        try:
            log = watch(task.model)
        except GateNotFoundError:
            return {}
        with torch.no_grad(), log:
            for number, batch in enumerate(self.data.test(task.train_config.batch_size)):
                if number == _WATCHED_BATCHES:
                    break
                task.step(batch)
        return log.to_dict()

    def _findings(self, task: Any) -> dict[str, Any]:
        """What the gates found, but for long tables: `report.html` and `penstock ablate` have these."""
        with torch.no_grad():
            found = self.system.findings(task.model, self.config, self.data)
        return {title: table for title, table in found.items() if len(table) <= _MOST_FOUND}

    def _trial(self, folder: RunFolder, name: str, seed: int) -> dict[str, float]:
        path = folder.path / "trials" / f"{name}.seed{seed}.json"
        if path.exists():
            return json.loads(path.read_text())
        trial = self.system.trials[name]
        seed_all(seed)
        with self.reporter.bar(f"{trial.what}, seed {seed}", 0), threads(1):
            measured = trial.run(self.config, seed)
        if main_process():
            folder.write_json(str(path.relative_to(folder.path)), measured)
        return measured

    def summarise(self, results: Results, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """``results.json``: arms with means over seeds, gates, trials, and the claims' verdicts."""
        arms: dict[str, Any] = {}
        for arm in self.arms:
            own = [c for c in results.cells if c["arm"] == arm]
            failed = {c["seed"]: c["failed"] for c in cells if c["arm"] == arm and "failed" in c}
            if own:
                arms[arm] = {
                    "metrics": {name: _spread([c["metrics"][name] for c in own]) for name in own[0]["metrics"]},
                    "cost": {name: statistics.fmean(c["cost"][name] for c in own) for name in own[0]["cost"]},
                    "gates": [{"name": name} | gate for name, gate in own[0]["gates"].items()],
                    "gate_history": own[0]["gate_history"],
                    "gate_sample": own[0]["gate_sample"],
                    "findings": own[0].get("findings", {}),
                }
                arms[arm]["cost"]["parameters"] = own[0]["cost"]["parameters"]
            else:
                arms[arm] = {"metrics": {}, "cost": {}, "gates": []}
            if failed:
                arms[arm]["failed"] = failed
        says = {claim.id: claim.says for claim in card(self.system.name).claims} if self.judged else {}
        measured = self.system.claims(self.config, results) if self.judged else {}
        judgements = [Judgement(k, says[k], e if isinstance(e, list) else [e]) for k, e in measured.items()]
        return {
            "system": self.system.name,
            "version": __version__,
            "config": to_dict(self.config),
            "seeds": list(range(self.options.seeds)),
            "quick": self.options.quick,
            "data": self.data.describe(),
            "leaderboard": measured_of(self.system.task_for(self.data.spec).leaderboard, arms.values()),
            "arms": arms,
            "trials": results.trials,
            "claims": [j.to_dict() for j in judgements],
            "not_judged": [k for k in says if k not in measured],
            "environment": environment(),
            "command": command(),
        }


def run(
    name: str, config: Any, options: Options, *, reporter: Reporter | None = None
) -> tuple[RunFolder, dict[str, Any]]:
    """Run a system as ``penstock run`` does.

    Args:
        name: of the system.
        config: its configuration, a ``System.Config``.
        options: data, seeds, folder, hardware.

    Returns:
        the run folder and the content of ``results.json``.

    Raises:
        UserError: for anything the user can mend; nothing is written then.
    """
    reporter = reporter or Reporter()
    found, judged = system(name), name not in PLAIN_MODELS
    if options.resume is not None:
        folder = RunFolder.open(options.resume, write=main_process())
        try:
            config, options = _resumed(found, folder, options)
            job = Job.prepare(found, config, options, reporter, judged=judged)
            if _content(folder.about["described"]) != _content(json.loads(plain_json(job.data.describe()))):
                raise UserError(
                    f"{folder.path}: the data is not what it was when the run began; run it again from the start"
                )
        except UserError:
            folder.release()
            raise
    else:
        if options.quick:
            config = override(config, untouched(config, found.quick))
        job = Job.prepare(found, config, options, reporter, judged=judged)
        folder = _new_folder(name, options)
        if main_process():
            write_atomically(folder.path / "config.yaml", job.about())
    reporter.say(job.data.overview())
    try:
        results = job.execute(folder)
        if main_process():
            from penstock.lab.report import write_report

            # Of a divided table it shows this process's rows, where it looks at rows; `penstock report` reads them all.
            with reporter.bar("report", 0, announce=False):
                write_report(folder, job.data)
    finally:
        folder.release()
    return folder, results


def _content(described: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of data but for where it is: a relative path is kept as an absolute one."""
    return {name: value for name, value in described.items() if name != "source"}


def _new_folder(name: str, options: Options) -> RunFolder:
    """A folder of our own, or, in the other processes of a distributed run, the first one's."""
    if main_process():
        return RunFolder.create(name, options.out)
    return RunFolder(options.out or Path("runs") / name)


def _resumed(found: System[Any], folder: RunFolder, options: Options) -> tuple[Any, Options]:
    about = folder.about
    if about["system"] != found.name:
        raise UserError(f"--resume {folder.path}: is a run of {about['system']}, not of {found.name}")
    source = Source.from_dict(about["data"])
    resumed = Options(
        source.data,
        source.test,
        source.label,
        seeds=max(about["seeds"], options.seeds),
        quick=about["quick"],
        arms=tuple(about["arms"]),
        resume=folder.path,
        json=options.json,
        hardware=Hardware(**about["hardware"]),
    )
    return from_dict(found.Config, about["config"], where=str(folder.path / "config.yaml")), resumed


def main_process() -> bool:
    """Whether this process writes the run's files."""
    return os.environ.get("RANK", "0") == "0"


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "processor": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def command() -> str:
    """The command line that started this process, as one would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join(["penstock" if program in ("__main__.py", "penstock") else program, *sys.argv[1:]])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` CPU threads inside the context; 0 leaves them.

    For a tiny model a second thread spends its time waiting, and on a busy machine much more than that.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured_of(
    board: Mapping[str, Literal["min", "max"]], rows: Iterable[Mapping[str, Any]]
) -> dict[str, Literal["min", "max"]]:
    """The metrics of a leaderboard that the data allowed (AUC within groups needs these), or all if there are none."""
    measured = {name for row in rows for name in row["metrics"]}
    return {name: mode for name, mode in board.items() if name in measured or not measured}


def _spread(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": values}


@contextmanager
def _user_errors() -> Iterator[None]:
    """Impossible sizes are ValueErrors of the models: to the command line they are the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
