"""Plain models that `penstock compare` takes beside the systems: what people use today, without a gate or a claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from penstock.data.base import Data, Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.schema import Schema
from penstock.data.tables import TableConfig, read_table
from penstock.lab.results import Effect, Results
from penstock.lab.space import Around, Choice, OneOf, Range
from penstock.lab.system import System
from penstock.nn.click_models import CLICK_MODELS, ClickModel
from penstock.tasks.click_prediction import ClickPrediction, ClickTraining


@dataclass
class ClickModelConfig:
    """A click model small enough to train in seconds."""

    dim: int = 8
    """Width of the embeddings."""
    mlp_dims: tuple[int, ...] = (32, 16)
    """Hidden widths of the perceptron, where the model has one."""
    dropout: float = 0.0
    """Of the perceptron."""
    batch_norm: bool = False
    """Whether the perceptron normalises."""
    data: ClickLogConfig = field(default_factory=ClickLogConfig)
    table: TableConfig = field(default_factory=TableConfig)
    """Your own table."""
    train: ClickTraining = field(
        default_factory=lambda: ClickTraining(
            steps=0,
            epochs=15,
            batch_size=256,
            optimizer="adam",
            lr=3e-3,
            weight_decay=1e-5,
            schedule="constant",
            clip_norm=0.0,
            patience=1,
        )
    )


#: What is searched of the models that have a perceptron.
_PERCEPTRON: Mapping[str, Choice] = {
    "mlp_dims": Around(2),
    "dropout": Range(0.0, 0.5),
    "batch_norm": OneOf((False, True)),
}


class PlainClickModel(System[ClickModelConfig]):
    """One of `CLICK_MODELS`; its one arm is called "gated" like every system's first, though it has no gate."""

    Config = ClickModelConfig
    task = ClickPrediction
    threads = 1

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        searched: dict[str, Choice] = {} if name == "logistic_regression" else {"dim": Around(2)}
        if "mlp_dims" in CLICK_MODELS[name](()):
            searched |= _PERCEPTRON
        self.space = searched  # type: ignore[misc]

    def load_data(self, config: ClickModelConfig, source: Source) -> Data:
        return ClickLog(config.data) if source.data is None else read_table(config.table, source)

    def arms(self, config: ClickModelConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        schema = Schema.from_dict(spec["schema"])
        parts: dict[str, Any] = dict(CLICK_MODELS[self.name](config.mlp_dims))
        build = partial(
            ClickModel,
            schema.num_ids,
            len(schema.fields),
            dim=config.dim,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            numeric_ids=[f.offset for f in schema.of("numeric")],
            padding_ids=[f.offset for f in schema.of("sequences")],
            **parts,
        )
        return {"gated": build}

    def claims(self, config: ClickModelConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        return {}


#: Every plain model by name.
PLAIN: Mapping[str, System[Any]] = {name: PlainClickModel(name) for name in CLICK_MODELS}
