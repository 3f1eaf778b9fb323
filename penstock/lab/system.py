"""What a system tells the laboratory; one subclass a paper, in its ``experiment.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import nn

from penstock.data.base import Data, Source
from penstock.gates import Table
from penstock.lab.results import Effect, Results
from penstock.lab.space import Choice
from penstock.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

C = TypeVar("C")


@dataclass(frozen=True)
class Stage:
    """One training run of a model; most systems have one, two-stage papers have two.

    Attributes:
        task: what Lightning trains. A later stage's `task` is built after the earlier one has finished.
        name: shown while it trains and used in checkpoint names.
    """

    task: Task
    name: str = "train"


@dataclass(frozen=True)
class Trial(Generic[C]):
    """A side experiment that a claim needs and that no arm of the main job shows.

    Attributes:
        run: from (config, seed) to named numbers; trains what it needs.
        seeds: how many are run whatever ``--seeds`` says (it takes seconds).
        what: one line for the progress display.
    """

    run: Callable[[C, int], dict[str, float]]
    what: str
    seeds: int = 3


class System(ABC, Generic[C]):
    """A published system, ready to be run beside its ungated twin.

    Class attributes:
        Config: a dataclass with every size and setting; it must have a field ``train: Training`` and usually
            ``data``. Its fields become command-line flags; their docstrings become the help.
        task: the task class its arms are trained by, unless `task_for` says otherwise for some data.
        quick: what ``--quick`` changes, by dotted field name: a smaller budget, the same mechanism.
        trials: side experiments by name; `trials_for` says which belong to a run.
        presets: the paper's own settings as whole configurations, for ``--preset NAME``.
        threads: CPU threads that serve it best; 0 takes all. A miniature is too small for a second one to help.
        size_field: the whole number in ``Config`` (dotted) that `penstock compare` may change to give its systems the
            same number of parameters, as "mlp_hidden".
        space: what `penstock tune` searches beside the learning rate, weight decay and batch size, by dotted field name.
        shared: the settings of the data (first part of their name), which no search may change: all trials share it.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    task: ClassVar[type[Task]]
    quick: ClassVar[Mapping[str, Any]] = {}
    trials: ClassVar[Mapping[str, Trial[Any]]] = {}
    presets: ClassVar[Mapping[str, Any]] = {}
    threads: ClassVar[int] = 0
    size_field: ClassVar[str] = ""
    space: ClassVar[Mapping[str, Choice]] = {}
    shared: ClassVar[tuple[str, ...]] = ("data", "table")

    def task_for(self, spec: Mapping[str, Any]) -> type[Task]:
        """The task its arms are trained by on data of this ``spec``."""
        return self.task

    def trials_for(self, spec: Mapping[str, Any]) -> Mapping[str, Trial[Any]]:
        """The side experiments of a run on data of this ``spec``."""
        return self.trials

    @abstractmethod
    def load_data(self, config: C, source: Source) -> Data:
        """The embedded default, or the user's own.

        Raises:
            UserError: if the user's data cannot be used.
        """

    @abstractmethod
    def arms(self, config: C, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        """Named builders of the models to train: "gated" first, then "ungated" and the paper's baselines.

        Args:
            config: the system's configuration.
            spec: the data's ``spec``.

        Raises:
            ValueError: for impossible sizes.
        """

    def stages(self, arm: str, model: nn.Module, config: C, data: Data) -> list[Callable[[], Stage]]:
        """How an arm is trained: one stage by its task, unless the paper does it otherwise."""
        return [lambda: Stage(self.task_for(data.spec)(model, config.train, data))]  # type: ignore[attr-defined]

    def measure(self, arm: str, task: Task, config: C, data: Data, seed: int) -> dict[str, float]:
        """Further numbers of a trained arm (interventions, sinks), added to its test metrics.

        All processes of a run call it, and each has its own rows; torchmetrics' metrics bring them together.
        """
        return {}

    def findings(self, model: nn.Module, config: C, data: Data) -> dict[str, Table]:
        """What the gates of a trained arm found, for people: tables by title, with names from the data.

        Args:
            model: the arm, in evaluation mode.
            config: of the run.
            data: of the run; statistics are of its first test batches, which in a run of several processes are those of
                the first one.
        """
        return {}

    def artifacts(self, arm: str, model: nn.Module, data: Data, folder: Path, seed: int) -> None:
        """Write further files of a trained arm into its ``models/<arm>`` folder, each whole or not at all."""

    @abstractmethod
    def claims(self, config: C, results: Results) -> dict[str, Effect | list[Effect]]:
        """What each claim of the card comes to, by its id. A claim that needs arms or data not in this run is left out."""

    def figures(self, config: C, results: Results) -> dict[str, Figure]:
        """Pictures of the whole run for the report, by title."""
        return {}


@dataclass
class Registry:
    """Loads systems by name; nothing is imported before it is asked for."""

    loaded: dict[str, System[Any]] = field(default_factory=dict)

    def __call__(self, name: str) -> System[Any]:
        """The system, or plain model, called ``name``.

        Raises:
            UserError: if there is none, or it is not built yet.
        """
        from importlib import import_module

        from penstock.errors import UserError
        from penstock.lab.cards import PLAIN_MODELS, card

        if name in PLAIN_MODELS:
            from penstock.lab.plain import PLAIN

            return PLAIN[name]
        found = card(name)
        if not found.ready:
            raise UserError(f"{name} has a card but is not built yet; `penstock list` shows what is ready")
        if name not in self.loaded:
            self.loaded[name] = import_module(f"{found.module}.experiment").SYSTEM
        return self.loaded[name]


system = Registry()
