"""OptFS against the same network without gates and against a random choice of feature values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import nn

from penstock.data.base import Data, Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.schema import Schema
from penstock.data.tables import TableConfig, TableData, read_table
from penstock.gates import Table
from penstock.lab.results import Effect, Results
from penstock.lab.space import Around, Choice, Range
from penstock.lab.store import open_run
from penstock.lab.system import Stage, System
from penstock.nn.checkpoints import load_strict, read_state
from penstock.systems.recommendation.optfs.model import Backbone, Compacted, OptFSModel
from penstock.systems.recommendation.optfs.reading import (
    compact_files,
    field_figure,
    field_report,
    findings,
    write_compact,
)
from penstock.tasks.base import Task
from penstock.tasks.click_prediction import ClickPrediction, ClickRetrain, ClickSearch, ClickTraining
from penstock.tasks.search import Search

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _training(**changes: Any) -> ClickTraining:
    """Adam with decay in the gradient, flat rate, early stopping after one epoch without a better AUC."""
    usual: dict[str, Any] = {"steps": 0, "epochs": 15, "batch_size": 256, "optimizer": "adam", "lr": 3e-3}
    usual |= {"weight_decay": 1e-5, "schedule": "constant", "clip_norm": 0.0, "patience": 1}
    return ClickTraining(**usual | changes)


@dataclass
class OptFSConfig:
    """A DeepFM small enough to search and train in seconds."""

    backbone: Backbone = "deepfm"
    """fm, deepfm, dcn or ipnn; none has a first-order term."""
    dim: int = 8
    """Width of the embeddings."""
    mlp_dims: tuple[int, ...] = (32, 16)
    """Hidden widths of the perceptron (not fm)."""
    dropout: float = 0.0
    """Of the perceptron."""
    batch_norm: bool = False
    """Whether the perceptron normalises."""
    cross_layers: int = 3
    """Of dcn."""
    initial: float = 0.5
    """Where every gate starts, before the sigmoid."""
    reg: Literal["sum", "mean"] = "mean"
    """Whether the penalty is the mean openness of all gates, whose weight suits any vocabulary, or their sum as in the
    paper (whose weight is that of the mean divided by the number of values)."""
    penalty: float | None = None
    """Weight of the penalty: more keeps less. Default, as a mean: 0.9 on the simulated click log, where steps are few
    and most values are noise, and 0.03 on your own table, a start to be tuned by validation AUC and the share kept."""
    search: Search = field(default_factory=Search)
    data: ClickLogConfig = field(default_factory=ClickLogConfig)
    table: TableConfig = field(default_factory=TableConfig)
    """Your own table."""
    train: ClickTraining = field(default_factory=_training)


#: The published choices (authors' README): learning rate, l2, lambda, final temperature, search epochs, rewind epoch.
_CHOICES: dict[str, dict[Backbone, tuple[float, float, float, float, int, int]]] = {
    "criteo": {
        "fm": (3e-4, 1e-5, 2e-9, 1000, 10, 1),
        "deepfm": (3e-4, 3e-5, 5e-9, 200, 15, 1),
        "dcn": (3e-4, 3e-6, 1e-8, 10000, 5, 2),
        "ipnn": (3e-4, 3e-6, 5e-9, 2000, 10, 1),
    },
    "avazu": {
        "fm": (3e-4, 1e-6, 2e-9, 5000, 5, 4),
        "deepfm": (3e-4, 3e-6, 2e-9, 5000, 5, 3),
        "dcn": (3e-4, 3e-6, 2e-9, 5000, 5, 2),
        "ipnn": (3e-4, 3e-6, 2e-9, 5000, 5, 2),
    },
    "kdd12": {
        "fm": (3e-5, 1e-5, 2e-9, 1000, 10, 0),
        "deepfm": (3e-5, 1e-5, 2e-9, 1000, 10, 0),
        "dcn": (3e-5, 1e-5, 5e-9, 1000, 5, 2),
        "ipnn": (3e-5, 1e-5, 2e-9, 1000, 10, 2),
    },
}

#: The published settings, for ``--preset deepfm_criteo``; the data are the user's to bring.
PUBLISHED: dict[str, OptFSConfig] = {
    f"{backbone}_{dataset}": OptFSConfig(
        backbone=backbone,
        dim=16,
        mlp_dims=(1024, 512, 256),
        reg="sum",
        penalty=weight,
        search=Search(epochs, rewind, temperature),
        table=TableConfig(whole_numbers="inferred" if dataset == "criteo" else "categorical"),
        train=_training(epochs=20, batch_size=4096, lr=lr, weight_decay=l2),
    )
    for dataset, choices in _CHOICES.items()
    for backbone, (lr, l2, weight, temperature, epochs, rewind) in choices.items()
}


class OptFSRetrain(ClickRetrain):
    """Retraining that also shows what each field lost."""

    def figures(self) -> dict[str, Figure]:
        figures = super().figures()
        assert isinstance(self.model, OptFSModel)
        assert isinstance(self.data, TableData)
        if self.model.embedding.gate is not None:
            figures["Values kept, by field"] = field_figure(field_report(self.model, self.data.schema))
        return figures


class OptFS(System[OptFSConfig]):
    """See card.toml."""

    name = "optfs"
    threads = 1
    Config = OptFSConfig
    task = ClickPrediction
    presets = PUBLISHED
    quick: ClassVar[Mapping[str, Any]] = {"data.validation_rows": 2000, "data.test_rows": 4000, "train.epochs": 6}
    space: ClassVar[Mapping[str, Choice]] = {
        "penalty": Around(30, start=0.1),
        "dim": Around(2),
        "mlp_dims": Around(2),
        "dropout": Range(0.0, 0.5),
    }

    def load_data(self, config: OptFSConfig, source: Source) -> Data:
        return ClickLog(config.data) if source.data is None else read_table(config.table, source)

    def arms(self, config: OptFSConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        config.search.check()

        def builder(gated: bool) -> Callable[[], nn.Module]:
            return lambda: build(config, spec, gated=gated)

        return {"gated": builder(True), "ungated": builder(False), "random": builder(True)}

    def stages(self, arm: str, model: nn.Module, config: OptFSConfig, data: Data) -> list[Callable[[], Stage]]:
        searches: list[ClickSearch] = []

        def search() -> Stage:
            weight = penalty_weight(config, data)
            searches.append(ClickSearch(model, config.train, data, config.search, penalty_weight=weight))
            return Stage(searches[-1], "search")

        def retrain() -> Stage:
            task = OptFSRetrain(model, config.train, data, searches[-1] if searches else None)
            if arm == "random":
                assert isinstance(model, OptFSModel)
                model.gate.shuffle(searches[-1].seed)
            return Stage(task, "retrain")

        return [retrain] if arm == "ungated" else [search, retrain]

    def measure(self, arm: str, task: Task, config: OptFSConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        assert isinstance(model, OptFSModel)
        if arm == "ungated":
            return {}
        kept = model.gate.kept().cpu().numpy()
        small = model.compact().model
        measured = {
            "kept": float(kept.mean()),
            "parameters_after_compaction": float(sum(p.numel() for p in small.parameters())),
        }
        if isinstance(data, ClickLog):
            measured["kept_informative"] = float(kept[data.truth.informative].mean())
            measured["kept_noise"] = float(kept[data.truth.noise].mean())
        return measured

    def findings(self, model: nn.Module, config: OptFSConfig, data: Data) -> dict[str, Table]:
        assert isinstance(model, OptFSModel)
        assert isinstance(data, TableData)
        return findings(model, data) if model.embedding.gate is not None else {}

    def artifacts(self, arm: str, model: nn.Module, data: Data, folder: Path, seed: int) -> None:
        """The compacted model and its map of ids; `load_compacted` reads them."""
        assert isinstance(model, OptFSModel)
        if model.embedding.gate is not None:
            write_compact(model, Schema.from_dict(data.spec["schema"]), folder, seed)

    def claims(self, config: OptFSConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        arms = {cell["arm"] for cell in results.cells}
        truth_is_known = any("kept_noise" in cell["metrics"] for cell in results.cells)
        judged: dict[str, Effect | list[Effect]] = {}
        if "gated" in arms and truth_is_known:
            judged["selection"] = [
                Effect(results.metric("gated", "kept_noise"), "<", 0.15, "share of useless values kept"),
                Effect(results.metric("gated", "kept_informative"), ">", 0.9, "share of useful values kept"),
            ]
        if {"gated", "ungated"} <= arms:
            judged["accuracy"] = Effect(
                results.difference("gated", "ungated", "auc"), ">", 0.0, "test AUC, gated - ungated"
            )
        if {"gated", "random"} <= arms and truth_is_known:
            judged["not_any_subset"] = Effect(
                results.difference("gated", "random", "auc"), ">", 0.1, "test AUC, gated - random subset"
            )
        return judged


def build(config: OptFSConfig, spec: Mapping[str, Any], *, gated: bool, num_ids: int = 0) -> OptFSModel:
    """The configured model for a table's ``spec``, with rows for all its values or for ``num_ids``."""
    schema = Schema.from_dict(spec["schema"])
    return OptFSModel(
        num_ids or schema.num_ids,
        len(schema.fields),
        backbone=config.backbone,
        dim=config.dim,
        mlp_dims=config.mlp_dims,
        dropout=config.dropout,
        batch_norm=config.batch_norm,
        cross_layers=config.cross_layers,
        initial=config.initial,
        gated=gated,
        reg=config.reg,
        numeric_ids=[f.offset for f in schema.of("numeric")],
        padding_ids=[f.offset for f in schema.of("sequences")],
    )


def penalty_weight(config: OptFSConfig, data: Data) -> float:
    """The configured weight of the penalty, or what suits the data."""
    if config.penalty is not None:
        return config.penalty
    weight = 0.9 if isinstance(data, ClickLog) else 0.03
    return weight if config.reg == "mean" else weight / int(data.spec["num_ids"])


def load_compacted(folder: Path, *, seed: int = 0) -> Compacted:
    """The compacted model of a run and the new id of every old one.

    Args:
        folder: ``models/<arm>`` of a run.
        seed: of which training.

    Returns:
        the model, which reads ``new_ids[ids]`` where the run's own reads ``ids``, and ``new_ids``.

    Raises:
        UserError: if the folder has no compacted model.
    """
    run = open_run(folder.parent.parent)
    weights, id_map = (folder / name for name in compact_files(seed))
    state = read_state(weights)
    rows = len(state["embedding.table.weight"])
    small = build(run.config, run.spec, gated=True, num_ids=rows)
    load_strict(small, state, source=str(weights))
    new_ids = torch.from_numpy(pl.read_parquet(id_map)["new_id"].fill_null(rows - 1).to_numpy().copy())
    return Compacted(small.eval(), new_ids)


SYSTEM = OptFS()
