"""Hyper-parameter search: trials on one reading of the data, judged by validation alone, kept in a database.

The database is Optuna's: a file in the search's folder, or one that many machines share. Nothing is lost when a process
ends: what it had finished stays, what it was at is tried again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shlex
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from penstock._version import __version__
from penstock.data.base import Data, Source
from penstock.data.loader import Batches
from penstock.errors import UserError
from penstock.lab.config import from_dict, override, to_dict, untouched
from penstock.lab.jsontext import plain_json
from penstock.lab.progress import Reporter
from penstock.lab.report import write_report
from penstock.lab.run import Job, Options, command, environment, threads
from penstock.lab.show import number
from penstock.lab.space import (
    Around,
    Choice,
    OneOf,
    Settled,
    flags,
    label,
    parse_space,
    plain_space,
    read_space,
    settings_of,
    settle,
)
from penstock.lab.store import FORMAT, RunFolder, write_atomically
from penstock.lab.system import System, system
from penstock.lab.train import Hardware
from penstock.lab.tunepage import write_page

try:
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    raise UserError("penstock tune needs Optuna: pip install 'penstock[tune]'") from None

#: A trial whose process was lost is tried again so often.
_RETRIES = 2
#: A process on another machine that has not been heard of for so many seconds is taken for lost.
_HEARTBEAT, _GRACE = 30, 120
#: So many finished trials are needed before importance says anything.
_ENOUGH = 4


@dataclass
class TuneOptions(Options):
    """What a search can be told, beside the system's own configuration, whose flags are fixed for all trials."""

    seeds: int = 1
    """Train the best setting so many times in the end; trials have one seed, the same for all."""
    arms: tuple[str, ...] = ()
    """The first is tuned (default the gated one); all are trained with the best setting in the end."""
    out: Path | None = None
    """The folder of the search; default runs/tune-<name>-<time>. One that holds this search already goes on."""
    resume: Path | None = None
    """Go on with the search in this folder."""
    json: bool = False
    """Print tune.json on standard output and nothing else."""
    trials: int | None = None
    """Settings to try in all, those tried before included; default 30, or as many as the search to go on with had."""
    search: Path | None = None
    """A YAML file of what to search, in place of the system's own space: `train.lr: {low: 1e-4, high: 1e-2, log: true}`,
    `dim: [8, 16, 32]`."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Stop a trial that does worse than half of the others at the same validation, by successive halving, or never."""
    storage: str = ""
    """A database that many machines share, as postgresql://host/name; default study.db in the folder. It is written
    into the folder: keep passwords out of it."""
    study: str = ""
    """The name of the search in a shared database: every machine that gives it takes part."""
    search_only: bool = False
    """Do not train the best setting in the end."""

    @property
    def wanted(self) -> int:
        """How many trials there shall be."""
        return 30 if self.trials is None else self.trials


class TuneFolder(RunFolder):
    """The files of a search."""

    ABOUT: ClassVar[str] = "tune.yaml"


class Pruning(Callback):
    """Reports every validation of a trial and ends it if it is not worth going on.

    Validations are counted over all stages of a training: the third of one trial is set against the third of others,
    whatever their batch size. Where a stage stopped early, the next goes on from where it would have ended.

    Args:
        trial: that is being tried.
        metric: the validation metric to report.
    """

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.count = self.planned = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.count = self.planned
        every = trainer.val_check_interval
        steps = int(trainer.estimated_stepping_batches)
        self.planned += steps // every if isinstance(every, int) else int(trainer.max_epochs or 0)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.count += 1
        value = float(trainer.callback_metrics[f"val/{self.metric}"])
        if math.isfinite(value):
            self.trial.report(value, self.count)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def default_space(found: System[Any], config: Any) -> dict[str, Choice]:
    """What is searched of a system unless a person says otherwise.

    The learning rate and weight decay of every system, its batch size where the budget counts epochs (counting steps, a
    larger batch would be a larger budget), and what the system itself declares.
    """
    decays = (0.0, 1e-3, 1e-2, 1e-1) if config.train.optimizer == "adamw" else (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
    space: dict[str, Choice] = {"train.lr": Around(10), "train.weight_decay": OneOf(decays)}
    if not config.train.steps:
        space["train.batch_size"] = Around(4)
    return space | dict(found.space)


def tune(
    name: str,
    config: Any,
    options: TuneOptions,
    *,
    given: Collection[str] = (),
    reporter: Reporter | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Search a system's settings as ``penstock tune`` does.

    Args:
        name: of a system or plain model.
        config: its configuration; what is not searched stays as it is.
        options: data, trials, folder, database.
        given: settings by dotted name that a person gave, and that are therefore not searched.

    Returns:
        the folder and the content of ``tune.json``.

    Raises:
        UserError: for anything the user can mend; nothing is written then.
        KeyboardInterrupt: after what was found so far has been written.
    """
    reporter = reporter or Reporter()
    found = system(name)
    if options.resume is not None:
        config, options, space = _resumed(found, options)
    else:
        if options.quick:
            config = override(config, untouched(config, found.quick))
        space = _space(found, config, options, given)
    _check(options)
    arm = options.arms[0] if options.arms else "gated"
    job = Job.prepare(found, config, replace(options, arms=(arm,)), reporter, judged=False)
    about = _about(name, config, options, space, job.data)
    folder = _folder(name, options, about)
    try:
        reporter.say(job.data.overview())
        with _database(options.storage or str(folder.path / "study.db")):
            search = _Search(job, arm, space, options, folder.path)
            write_atomically(folder.path / TuneFolder.ABOUT, yaml.safe_dump(about, sort_keys=False, allow_unicode=True))
            try:
                with threads(options.hardware.threads or found.threads):
                    search.run()
            except KeyboardInterrupt:
                write_page(folder, search.result())
                raise
            result = search.result()
        if result["best"] is not None and not options.search_only:
            result |= _train_best(job, search.best_config(), options, folder.path)
        write_page(folder, result)
    finally:
        folder.discard()
    return folder.path, result


def _check(options: TuneOptions) -> None:
    if options.wanted < 1:
        raise UserError(f"--trials {options.trials}: at least 1")
    if options.hardware.devices * options.hardware.num_nodes > 1:
        raise UserError(
            "a trial is trained by one process: give --devices 1, and for more at once start `penstock tune` several "
            "times with the same --storage and --study"
        )
    if bool(options.storage) != bool(options.study):
        raise UserError(
            "--storage and --study go together: the database, and the name all machines give the search in it"
        )


def _space(found: System[Any], config: Any, options: TuneOptions, given: Collection[str]) -> dict[str, Settled]:
    if options.search is not None:
        space = read_space(options.search, config, found.shared)
        if both := [name for name in space if name in given]:
            raise UserError(f"--search {options.search}: {both[0]} is in the file and given as a flag too; give one")
        return space
    space = settle(default_space(found, config), config)
    space = {name: choice for name, choice in space.items() if name not in given}
    if not space:
        raise UserError("every setting that would be searched is given as a flag; leave one out or give --search FILE")
    return space


# -- the folder ----------------------------------------------------------------------------------------------


def _about(name: str, config: Any, options: TuneOptions, space: Mapping[str, Settled], data: Data) -> dict[str, Any]:
    """The content of ``tune.yaml``: what is needed to go on, and to see whether it is the same search."""
    return {
        "format": FORMAT,
        "system": name,
        "version": __version__,
        "command": command(),
        "trials": options.wanted,
        "seeds": options.seeds,
        "quick": options.quick,
        "arms": list(options.arms),
        "data": options.source.to_dict(),
        "described": _digest(data),
        "hardware": vars(options.hardware),
        "pruner": options.pruner,
        "storage": options.storage,
        "study": options.study,
        "config": to_dict(config),
        "space": plain_space(space),
    }


def _digest(data: Data) -> str:
    """A fingerprint of what the data is, wherever it lies."""
    described = {name: value for name, value in data.describe().items() if name not in ("source", "origin")}
    return hashlib.sha256(plain_json(described).encode()).hexdigest()[:16]


def _folder(name: str, options: TuneOptions, about: Mapping[str, Any]) -> TuneFolder:
    """A new folder, or the one that holds this search."""
    there = options.resume or options.out
    if there is None or not (there / TuneFolder.ABOUT).is_file():
        return TuneFolder.create(f"tune-{name}", options.out)
    opened = TuneFolder.open(there, write=True)
    may_differ = ("command", "trials", "seeds", "version")
    known = {key: value for key, value in opened.about.items() if key not in may_differ}
    if differ := [key for key, value in known.items() if json.loads(plain_json(about[key])) != value]:
        opened.release()
        what = {"described": "data", "config": "configuration"}.get(differ[0], differ[0])
        raise UserError(f"{there}: holds a search with other {what}; give another --out, or only --resume {there}")
    return opened


def _resumed(found: System[Any], options: TuneOptions) -> tuple[Any, TuneOptions, dict[str, Settled]]:
    assert options.resume is not None
    about = TuneFolder.open(options.resume).about
    where = str(options.resume / TuneFolder.ABOUT)
    if about["system"] != found.name:
        raise UserError(f"--resume {options.resume}: is a search of {about['system']}, not of {found.name}")
    source = Source.from_dict(about["data"])
    resumed = replace(
        options,
        data=source.data,
        test=source.test,
        label=source.label,
        trials=about["trials"] if options.trials is None else options.trials,
        seeds=max(about["seeds"], options.seeds),
        quick=about["quick"],
        arms=tuple(about["arms"]),
        hardware=Hardware(**about["hardware"]),
        pruner=about["pruner"],
        storage=about["storage"],
        study=about["study"],
    )
    config = from_dict(found.Config, about["config"], where=where)
    return config, resumed, parse_space(about["space"], config, found.shared, where=where)


# -- the search ----------------------------------------------------------------------------------------------


class _Search:
    """A study being worked on by this process.

    Args:
        job: with the base configuration; its data is shared by all trials.
        arm: to be tuned.
        space: what is drawn.
        options: of the search.
        path: of the folder.
    """

    def __init__(self, job: Job, arm: str, space: Mapping[str, Settled], options: TuneOptions, path: Path) -> None:
        self.job, self.arm, self.space, self.options = job, arm, space, options
        self.data = _without_test(job.data)
        self.metric, self.mode = _monitor(job, arm, self.data)
        self.worker = f"{socket.gethostname()}:{path.resolve()}"
        self._retry = RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)
        storage = RDBStorage(
            options.storage or f"sqlite:///{path.resolve() / 'study.db'}",
            heartbeat_interval=_HEARTBEAT,
            grace_period=_GRACE,
            heartbeat_stale_trial_callback=self._retry,
        )
        pruners: dict[str, optuna.pruners.BasePruner] = {
            "median": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
            "hyperband": optuna.pruners.HyperbandPruner(),
            "none": optuna.pruners.NopPruner(),
        }
        self.study = optuna.create_study(
            storage=storage,
            study_name=options.study or f"tune {job.system.name}",
            direction="maximize" if self.mode == "max" else "minimize",
            load_if_exists=True,
            pruner=pruners[options.pruner],
        )
        self._join()
        # From the same seed, machines that share a search, and a search that goes on, would try the same again.
        seed = None if options.storage else len(self.study.get_trials(deepcopy=False))
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=bool(options.storage))

    def _join(self) -> None:
        """Make sure that all who work on the study mean the same by it."""
        own = {
            "system": self.job.system.name,
            "arm": self.arm,
            "metric": self.metric,
            "data": _digest(self.job.data),
            "space": plain_space(self.space),
            "configuration": to_dict(self.job.config),
        }
        own = json.loads(plain_json(own))
        known = self.study.user_attrs.get("penstock")
        if known is None:
            self.study.set_user_attr("penstock", own)
            default = {name: value for name, (_, value) in settings_of(self.job.config).items()}
            self.study.enqueue_trial(
                {
                    name: _drawn(default[name], choice)
                    for name, choice in self.space.items()
                    if _holds(choice, default[name])
                }
            )
        elif differ := [key for key in own if known.get(key) != own[key]]:
            raise UserError(
                f"the study {self.study.study_name!r} is a search with other {differ[0]}: give the same settings "
                "as when it began, or another --study"
            )

    def run(self) -> None:
        """Try settings until there are as many finished trials as asked for."""
        self._bury()
        reporter = self.job.reporter
        with reporter.bar(f"tune {self.job.system.name}", self.options.wanted):
            while (done := len(self.finished())) < self.options.wanted:
                reporter.advance(done, "")
                # What a setting cannot be built or trained with is its own failure and not the search's.
                self.study.optimize(self._try, n_trials=1, catch=(ValueError, RuntimeError), callbacks=[self._tell])

    def finished(self) -> list[FrozenTrial]:
        """Trials that are over; those lost with their process and tried again are not counted."""
        trials = self.study.get_trials(deepcopy=False)
        again = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
        return [trial for trial in trials if trial.state.is_finished() and trial.number not in again]

    def settings(self, trial: optuna.Trial | FrozenTrial) -> dict[str, Any]:
        """What a trial tries, by dotted name."""
        return {name: _suggested(trial, name, choice) for name, choice in self.space.items()}

    def best_config(self) -> Any:
        """The configuration of the best trial."""
        return override(self.job.config, self.settings(self.study.best_trial))

    def _bury(self) -> None:
        """The folder is ours: a trial that still runs in it was lost with its process."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("worker", None if self.options.storage else self.worker) == self.worker:
                self.study.tell(trial.number, state=TrialState.FAIL)
                self._retry(self.study, trial)

    def _try(self, trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", self.worker)
        config = override(self.job.config, self.settings(trial))
        try:
            job = Job.prepare(
                self.job.system, config, self.job.options, Reporter(quiet=True), data=self.data, judged=False
            )
            with TemporaryDirectory(prefix="penstock-tune-") as scratch, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                metrics = job.validated(RunFolder(Path(scratch)), self.arm, 0, [Pruning(trial, self.metric)])
            if not math.isfinite(metrics[self.metric]):
                raise ValueError(f"the validation {self.metric} is {metrics[self.metric]}")
        except (ValueError, RuntimeError) as error:
            trial.set_user_attr("failed", " ".join(str(error).split())[:500])
            raise
        except KeyboardInterrupt:
            self._retry(self.study, self.study.get_trials(deepcopy=False)[trial.number])
            raise
        trial.set_user_attr("metrics", metrics)
        return metrics[self.metric]

    def _tell(self, study: optuna.Study, trial: FrozenTrial) -> None:
        row = self._row(trial)
        value = "" if row["value"] is None else f"{self.metric} {number(row['value'])}"
        said = {
            "complete": value + (" (best)" if study.best_trial.number == trial.number else "")
            if trial.state == TrialState.COMPLETE
            else "",
            "pruned": f"stopped after validation {row['validations']}, {value}",
            "failed": f"failed: {row['reason']}",
        }
        settings = " ".join(flags(self.settings(trial)))
        self.job.reporter.say(f"trial {trial.number}: {said[row['state']]}, {row['seconds']:.0f} s: {settings}")

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
        failed = trial.state == TrialState.FAIL
        return {
            "number": trial.number,
            "state": states.get(trial.state, "failed"),
            "value": trial.value,
            "settings": self.settings(trial) if set(self.space) <= set(trial.params) else {},
            "validations": len(trial.intermediate_values),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "reason": trial.user_attrs.get("failed", "its process was lost") if failed else None,
        }

    def result(self) -> dict[str, Any]:
        """The content of ``tune.json``, before the best setting has been trained."""
        finished = self.finished()
        complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        best = None
        if complete:
            found = self.study.best_trial
            best = {
                "trial": found.number,
                "value": found.value,
                "metrics": found.user_attrs["metrics"],
                "settings": self.settings(found),
                "command": _command(self.job.system, self.best_config(), self.options),
            }
        values = {trial.value for trial in complete}
        importances: dict[str, float] = {}
        if len(complete) >= _ENOUGH and len(values) > 1:
            importances = optuna.importance.get_param_importances(self.study)
        return {
            "system": self.job.system.name,
            "version": __version__,
            "arm": self.arm,
            "metric": self.metric,
            "direction": self.mode,
            "study": self.study.study_name,
            "storage": self.options.storage or "study.db",
            "pruner": self.options.pruner,
            "quick": self.options.quick,
            "space": {name: str(choice) for name, choice in self.space.items()},
            "data": self.job.data.describe(),
            "trials": [self._row(trial) for trial in finished],
            "best": best,
            "importances": importances,
            "best_run": None,
            "test": None,
            "environment": environment(),
            "command": command(),
        }


@contextmanager
def _database(where: str) -> Iterator[None]:
    """Optuna without its own lines on the terminal, and its database's errors as the user's to mend."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", module=r"optuna\..*")
            yield
    except ImportError as error:
        raise UserError(f"--storage {where}: the database's driver is not installed ({error})") from None
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise UserError(f"--storage {where}: {str(error).splitlines()[0]}") from None
    finally:
        optuna.logging.set_verbosity(verbosity)


def _without_test(data: Data) -> Data:
    """The same data, whose test split cannot be read: a search must not see it."""

    def refuse(batch_size: int) -> Batches:
        raise AssertionError("a trial asked for the test split")

    sealed = copy.copy(data)
    sealed.test = refuse  # type: ignore[method-assign]
    return sealed


def _monitor(job: Job, arm: str, data: Data) -> tuple[str, Literal["min", "max"]]:
    """The validation metric that trials are judged by, and whether more is better."""
    with torch.device("meta"):
        model = job.arms[arm]()
    return job.system.stages(arm, model, job.config, data)[0]().task.monitor


def _suggested(trial: optuna.Trial | FrozenTrial, name: str, choice: Settled) -> Any:
    if isinstance(choice, OneOf):
        # As text: the database knows no tuples.
        by_label = {label(value): value for value in choice.values}
        return by_label[trial.suggest_categorical(name, list(by_label))]
    if choice.whole:
        return trial.suggest_int(name, int(choice.low), int(choice.high), log=choice.log)
    # What is shown, and typed again, is exactly what was tried.
    return float(f"{trial.suggest_float(name, choice.low, choice.high, log=choice.log):.3g}")


def _holds(choice: Settled, value: Any) -> bool:
    if isinstance(choice, OneOf):
        return value in choice.values
    return value is not None and choice.low <= value <= choice.high


def _drawn(value: Any, choice: Settled) -> Any:
    """A value as Optuna holds it."""
    return label(value) if isinstance(choice, OneOf) else value


def _command(found: System[Any], config: Any, options: TuneOptions) -> str:
    """The command that trains a configuration, from the preset nearest to it."""
    own = {name: value for name, (_, value) in settings_of(config).items()}

    def changes(base: Any) -> dict[str, Any]:
        return {name: own[name] for name, (_, value) in settings_of(base).items() if own[name] != value}

    preset, base = min(
        {"": found.Config(), **found.presets}.items(), key=lambda pair: len(changes(pair[1])) + bool(pair[0])
    )
    source = {name: value for name, value in options.source.to_dict().items() if value is not None}
    return shlex.join(
        [
            "penstock",
            "run",
            found.name,
            *flags(source),
            *(["--preset", preset] if preset else []),
            *flags(changes(base)),
        ]
    )


def _train_best(job: Job, config: Any, options: TuneOptions, path: Path) -> dict[str, Any]:
    """Train the best setting as a run of its own in ``best/``; an older best is moved aside.

    Returns:
        where it is, and the test metrics of its arms: the only look at the test split.
    """
    options = replace(options, arms=options.arms or tuple(job.arms), resume=None)
    best = Job.prepare(job.system, config, options, job.reporter, data=job.data, judged=False)
    place = path / "best"
    if (place / RunFolder.ABOUT).is_file():
        same = RunFolder.open(place).about
        if (same["config"], same["seeds"]) != (to_dict(config), options.seeds):
            count = sum(1 for _ in path.glob("best.*"))
            os.rename(place, path / f"best.{count + 1}")
    if (place / RunFolder.ABOUT).is_file():
        folder = RunFolder.open(place, write=True)
    else:
        folder = RunFolder.create(job.system.name, place)
        write_atomically(place / RunFolder.ABOUT, best.about())
    try:
        job.reporter.say(f"training the best setting in {place}, and testing it once")
        results = best.execute(folder)
        write_report(folder)
    finally:
        folder.release()
    return {"best_run": str(place), "test": {name: arm["metrics"] for name, arm in results["arms"].items()}}
