"""OptInter against one method for every pair (memorise, factorise, naive) and against a random choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from penstock.data.base import Data, Source
from penstock.data.clicks import ClickLogConfig
from penstock.data.schema import Schema, TableBatch
from penstock.data.tables import TableConfig, TableData, read_table
from penstock.errors import UserError
from penstock.gates import Table
from penstock.lab.results import Effect, Results
from penstock.lab.space import Around, Choice
from penstock.lab.system import Stage, System
from penstock.systems.recommendation.optinter.crossed import (
    CrossConfig,
    CrossedTable,
    Crosses,
    PlantedLog,
    megabytes,
)
from penstock.systems.recommendation.optinter.model import (
    FACTORISE,
    MEMORISE,
    METHODS,
    AlphaInit,
    Method,
    OptInterModel,
)
from penstock.systems.recommendation.optinter.reading import choice_report, methods_figure, pair_report, size_figure
from penstock.tasks.base import Task, Training
from penstock.tasks.click_prediction import ClickPrediction, ClickTraining
from penstock.tasks.pretrained import start_from_vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The method of each arm.
_ARMS: dict[str, Method] = {
    "gated": "search",
    "ungated": "memorise",
    "factorised": "factorise",
    "naive": "naive",
    "random": "search",
}


def _training(**changes: Any) -> ClickTraining:
    """Adam with L2 on the tables of pairs, flat rate, early stopping after one epoch without a better AUC."""
    usual: dict[str, Any] = {"steps": 0, "epochs": 10, "batch_size": 250, "optimizer": "adam", "lr": 3e-3}
    usual |= {"weight_decay": 0.0, "schedule": "constant", "clip_norm": 0.0, "patience": 1}
    return ClickTraining(**usual | changes)


def _log() -> ClickLogConfig:
    """Four fields of 30 values: one pair a product of rank 2, one a table, four empty."""
    return ClickLogConfig(
        informative_values=30, noise_fields=0, effect_std=0.3, pair_rank=2, pair_scale=1.0, train_rows=12_000
    )


@dataclass
class MethodSearch:
    """How methods are searched for."""

    epochs: int = 6
    """Passes over the training split, at most."""
    patience: int = 0
    """Stop after so many epochs without a better AUC and keep the best (the authors: 1); 0 searches to the end."""
    lr: float = 3e-3
    """Learning rate of the weights."""
    gate_lr: float = 3e-2
    """Of alpha."""
    weight_decay: float = 0.0
    """L2 on the two tables of pairs."""
    tau: float = 2e-3
    """How much the temperature falls a step, from 1 to no less than 0.01 (the authors: 5e-5, for long searches)."""
    alpha_init: AlphaInit = "zeros"
    """No preference, or the authors' "xavier", a random one that a short search hardly leaves."""
    gumbel: bool = False
    """Add Gumbel noise to alpha in training, as the paper describes; the authors' code does not."""
    count_eval_calls: bool = False
    """Whether evaluation cools too, as in the authors' code."""

    def check(self) -> None:
        """Raise `ValueError` for settings that give no search."""
        if self.epochs < 1:
            raise ValueError(f"search.epochs={self.epochs} must be 1 or more")
        if self.patience < 0:
            raise ValueError(f"search.patience={self.patience} must not be below 0")


@dataclass
class OptInterConfig:
    """A network small enough to search and train in seconds."""

    dim: int = 8
    """Width of a value's embedding."""
    pair_dim: int = 6
    """Width of a pair's interaction."""
    mlp_dims: tuple[int, ...] = (32, 32)
    """Hidden widths of the perceptron."""
    train_layernorm: bool = False
    """Whether the perceptron's norms learn their scale and shift; the authors leave them out of the optimiser."""
    search: MethodSearch = field(default_factory=MethodSearch)
    crosses: CrossConfig = field(default_factory=CrossConfig)
    data: ClickLogConfig = field(default_factory=_log)
    table_scale: float = 2.0
    """Size of the interaction of signal_2 and signal_3 in the simulated click log, which only memorising expresses."""
    table: TableConfig = field(default_factory=TableConfig)
    """Your own table."""
    train: ClickTraining = field(default_factory=_training)


#: The published settings, for ``--preset criteo``; the data are the user's to bring. Continuous fields are standardised
#: here where the authors scale them to 0 .. 1; the batch of avazu is taken to be that of criteo.
PUBLISHED: dict[str, OptInterConfig] = {
    "criteo": OptInterConfig(
        dim=20,
        pair_dim=10,
        mlp_dims=(700,) * 5,
        search=MethodSearch(10, 1, 1e-4, 1e-3, 3e-8, 5e-5, "xavier", count_eval_calls=True),
        crosses=CrossConfig(min_count=20, hash_above=10**9),
        table=TableConfig(min_count=20, numeric="standardize"),
        train=_training(batch_size=2000, lr=1e-3, weight_decay=3e-8),
    ),
    "avazu": OptInterConfig(
        dim=40,
        pair_dim=4,
        mlp_dims=(500,) * 5,
        search=MethodSearch(10, 1, 1e-3, 1e-3, 0.0, 5e-5, "xavier", count_eval_calls=True),
        crosses=CrossConfig(min_count=1, hash_above=10**9, memory_mb=16_384),
        table=TableConfig(min_count=5, numeric="standardize", whole_numbers="categorical"),
        train=_training(batch_size=2000, lr=1e-3, weight_decay=3e-8),
    ),
}


class _InteractionTask(ClickPrediction):
    """What both stages share: the authors' groups of the optimiser.

    Args:
        model: of the arm.
        config: of the run.
        train: of the stage.
        data: what on.
    """

    def __init__(self, model: OptInterModel, config: OptInterConfig, train: Training, data: Data) -> None:
        super().__init__(model, train, data)
        self.interaction = model
        self.config = config

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.interaction.net.parameter_groups(
            weight_decay=self.train_config.weight_decay,
            gate_lr=self.config.search.gate_lr,
            train_layernorm=self.config.train_layernorm,
        )


class InteractionSearch(_InteractionTask):
    """First stage: weights and alpha from the same loss, while the temperature falls a step at a time."""

    def __init__(self, model: OptInterModel, config: OptInterConfig, data: Data) -> None:
        search = config.search
        train = replace(
            config.train,
            steps=0,
            epochs=search.epochs,
            validate_every=0,
            patience=search.patience,
            lr=search.lr,
            weight_decay=search.weight_decay,
        )
        super().__init__(model, config, train, data)

    def training_step(self, batch: TableBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        # Here and not after the batch, so that a checkpoint written then has counted it.
        self.interaction.gate.advance()
        return loss

    def validation_step(self, batch: TableBatch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.config.search.count_eval_calls:
            self.interaction.gate.advance()


class InteractionRetrain(_InteractionTask):
    """Second stage: new weights, trained with the methods as they are.

    Args:
        model: of the arm.
        config: of the run.
        data: what on.
        search: the first stage, which is finished here; ``None`` for arms that are not searched.
    """

    def __init__(
        self, model: OptInterModel, config: OptInterConfig, data: Data, search: InteractionSearch | None = None
    ) -> None:
        super().__init__(model, config, config.train, data)
        if search is not None:
            model.gate.harden()
            # From the seed of the run, whatever was drawn before: a resumed run starts from the same weights.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(search.seed)
                model.net.reset_weights("retrain")
            start_from_vectors(model, data)

    def figures(self) -> dict[str, Figure]:
        figures = super().figures()
        if self.interaction.net.gate is not None:
            fields = self.data.spec["fields"][: self.data.spec["num_id_fields"]]
            figures["How each pair is modelled"] = methods_figure(self.interaction, fields)
        return figures


class OptInter(System[OptInterConfig]):
    """See card.toml."""

    name = "optinter"
    threads = 1
    Config = OptInterConfig
    task = ClickPrediction
    presets = PUBLISHED
    quick: ClassVar[Mapping[str, Any]] = {
        "data.validation_rows": 2000,
        "data.test_rows": 4000,
        "train.epochs": 5,
        "search.epochs": 4,
    }
    space: ClassVar[Mapping[str, Choice]] = {
        "dim": Around(2),
        "pair_dim": Around(2),
        "mlp_dims": Around(2),
        "search.lr": Around(5),
        "search.gate_lr": Around(5),
    }
    shared = ("data", "table", "crosses", "table_scale")

    def load_data(self, config: OptInterConfig, source: Source) -> Data:
        table: TableData
        if source.data is None:
            table = PlantedLog(config.data, config.table_scale)
        else:
            table = read_table(config.table, source)
        return CrossedTable(table, config.crosses, config.pair_dim)

    def arms(self, config: OptInterConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        config.search.check()
        crosses = Crosses.of(spec)
        needed = megabytes(sum(crosses.rows), config.pair_dim)
        if needed > config.crosses.memory_mb:
            raise UserError(
                f"the {sum(crosses.rows):,} rows of crosses take {needed:,.0f} MB in training, above "
                f"crosses.memory_mb={config.crosses.memory_mb}: raise it, count fewer (crosses.min_count), hash "
                "(crosses.hash_above) or drop columns (table.columns)"
            )

        def builder(arm: str) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                model = build(config, spec, crosses, method=_ARMS[arm])
                if arm == "random":
                    model.gate.decide_at_random()
                    model.net.reset_weights("retrain")
                return model

            return make

        return {arm: builder(arm) for arm in _ARMS}

    def stages(self, arm: str, model: nn.Module, config: OptInterConfig, data: Data) -> list[Callable[[], Stage]]:
        assert isinstance(model, OptInterModel)
        searches: list[InteractionSearch] = []

        def search() -> Stage:
            searches.append(InteractionSearch(model, config, data))
            return Stage(searches[-1], "search")

        def retrain() -> Stage:
            return Stage(InteractionRetrain(model, config, data, searches[-1] if searches else None), "retrain")

        return [search, retrain] if arm == "gated" else [retrain]

    def measure(self, arm: str, task: Task, config: OptInterConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        assert isinstance(model, OptInterModel)
        if model.net.gate is None:
            return {"parameters_after_compaction": float(sum(p.numel() for p in model.parameters()))}
        choice = model.gate.choice()
        small = model.compact()
        memorised = model.memorised().tolist()
        kept = sum(rows for rows, keep in zip(model.crosses.rows, memorised, strict=True) if keep)
        measured = {f"pairs_{name}": float((choice == place).sum()) for place, name in enumerate(METHODS)}
        measured |= {
            "cross_rows_kept": kept / model.crosses.num_rows,
            "parameters_after_compaction": float(sum(p.numel() for p in small.parameters())),
        }
        if isinstance(data, CrossedTable) and isinstance(log := data.table, PlantedLog):
            table, product = log.pair(log.table_pair), log.pair(log.product_pair)
            measured["table_pair_memorised"] = float(choice[table] == MEMORISE)
            measured["table_pair_margin"] = float(model.gate.margin()[table])
            measured["product_pair_factorised"] = float(choice[product] == FACTORISE)
        return measured

    def findings(self, model: nn.Module, config: OptInterConfig, data: Data) -> dict[str, Table]:
        assert isinstance(model, OptInterModel)
        if model.net.gate is None:
            return {}
        report = pair_report(model, Schema.from_dict(data.spec["schema"]))
        return {"Pairs by choice": choice_report(report), "How each pair is modelled": report}

    def claims(self, config: OptInterConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        arms = {cell["arm"] for cell in results.cells}
        judged: dict[str, Effect | list[Effect]] = {}
        if found := results.metric("gated", "table_pair_memorised"):
            judged["method_found"] = Effect(found, ">", 0.99, "share of seeds in which the table's pair is memorised")
        if {"gated", "factorised"} <= arms:
            judged["accuracy"] = Effect(
                results.difference("gated", "factorised", "auc"), ">", 0.0, "test AUC, searched - all factorised"
            )
        if {"gated", "naive", "ungated", "factorised"} <= arms:
            judged["naive_worst"] = [
                Effect(results.difference("gated", "naive", "auc"), ">", 0.0, "test AUC, searched - naive"),
                Effect(results.difference("naive", "ungated", "auc"), "<", 0.0, "test AUC, naive - all memorised"),
                Effect(results.difference("naive", "factorised", "auc"), "<", 0.0, "test AUC, naive - all factorised"),
            ]
        if kept := results.metric("gated", "cross_rows_kept"):
            judged["size"] = Effect(kept, "<", 1.0, "share of the rows of crosses that are kept")
        return judged

    def figures(self, config: OptInterConfig, results: Results) -> dict[str, Figure]:
        return {"Accuracy against size": size_figure(results)} if results.cells else {}


def build(config: OptInterConfig, spec: Mapping[str, Any], crosses: Crosses, *, method: Method) -> OptInterModel:
    """The configured model for a table's ``spec``, with the vocabulary of its crosses."""
    schema = Schema.from_dict(spec["schema"])
    crossed = schema.of("ids")
    model = OptInterModel(
        schema.num_ids,
        [f.offset for f in crossed],
        [f.size for f in crossed],
        crosses.rows,
        crosses.exact,
        method=method,
        dim=config.dim,
        pair_dim=config.pair_dim,
        mlp_dims=config.mlp_dims,
        tau=config.search.tau,
        alpha_init=config.search.alpha_init,
        gumbel=config.search.gumbel,
        numeric_ids=[f.offset for f in schema.of("numeric")],
        padding_ids=[f.offset for f in schema.of("sequences")],
    )
    model.crosses.fill(crosses.keys)
    return model


SYSTEM = OptInter()
