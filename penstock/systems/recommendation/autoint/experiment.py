"""AutoInt beside uniform and closed attention, with a perceptron and without a residual path, and beside FM and LR."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from penstock.data.base import Data, Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.schema import Schema
from penstock.data.tables import TableConfig, TableData, WholeNumbers, read_table
from penstock.gates import Table, force
from penstock.lab.results import Effect, Results
from penstock.lab.space import Around, Choice, OneOf, Range
from penstock.lab.system import Stage, System, Trial
from penstock.nn.fuxictr import add_regularization, parse_regularizer
from penstock.systems.recommendation.autoint import crosses
from penstock.systems.recommendation.autoint.model import (
    FM,
    Attention,
    AutoInt,
    Dialect,
    FieldAttention,
    attention_maps,
    attention_report,
)
from penstock.tasks.base import Task, Training
from penstock.tasks.click_prediction import ClickPrediction, ClickTraining, falling_on_plateaus, model_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Rows on which attention is averaged for the report, and rows on which additivity is checked.
_MAP_BATCHES, _ADDITIVITY_ROWS = 10, 500
#: The most fields whose attention maps stand beside each other.
_FEW = 12


def _training(**changes: Any) -> ClickTraining:
    """Adam at a flat rate, early stopping after two epochs without a better AUC."""
    usual: dict[str, Any] = {"steps": 0, "epochs": 25, "batch_size": 250, "optimizer": "adam", "lr": 1e-2}
    usual |= {"schedule": "constant", "clip_norm": 0.0, "patience": 2}
    return ClickTraining(**usual | changes)


@dataclass
class AutoIntConfig:
    """One interacting layer, small enough to train in seconds."""

    dialect: Dialect = "fuxi"
    """Whose model: the paper's equations, the authors' TensorFlow code (biases and ReLU on queries, keys and values,
    normalised after the ReLU), or FuxiCTR, the default."""
    dim: int = 8
    """Width of the embeddings."""
    attention_dims: tuple[int, ...] = (16,)
    """Width of each interacting layer, over all its heads."""
    num_heads: int = 2
    """Heads of each layer."""
    use_scale: bool = True
    """Divide attention scores by the root of a head's width; without it wide heads saturate."""
    use_residual: bool = True
    """Each field's own path around the attention."""
    layer_norm: bool = False
    """Normalise in each layer."""
    use_wide: bool = True
    """Add a first-order part: a weight for each feature value."""
    dnn_hidden_units: tuple[int, ...] = ()
    """Hidden widths of a perceptron beside the layers (AutoInt+) in every arm; the arm "plus" has one anyhow."""
    plus_hidden_units: tuple[int, ...] = (32, 16)
    """Of the arm "plus"."""
    batch_norm: bool = False
    """Whether the perceptron normalises."""
    dropout: float = 0.0
    """Of the attention weights."""
    embedding_dropout: float = 0.0
    """Of the embeddings."""
    dnn_dropout: float = 0.0
    """Of the perceptron."""
    embedding_std: float | None = 0.1
    """Of the embeddings at the start; none: the dialect's own (0.0001 of FuxiCTR, 0.01 of the authors)."""
    embedding_regularizer: float | str = 0.0
    """Of embeddings and first-order weights: the factor of half their squares, or l1(x), l2(x), l1_l2(x,y)."""
    net_regularizer: float | str = 0.0
    """Of everything else."""
    plateau: bool = False
    """Divide the learning rate by ten after each epoch without a better AUC (FuxiCTR)."""
    wide_lr: float = 0.0
    """Learning rate of plain gradient descent for the first-order weights (the authors: 0.01); 0: like the rest."""
    data: ClickLogConfig = field(default_factory=ClickLogConfig)
    table: TableConfig = field(default_factory=TableConfig)
    """Your own table."""
    train: ClickTraining = field(default_factory=_training)


def _bars(
    batch_size: int, min_count: int, regularizer: float, whole: WholeNumbers = "categorical", **options: Any
) -> AutoIntConfig:
    """A setting of the BARS benchmark, trained by FuxiCTR's rules."""
    usual: dict[str, Any] = {"use_scale": False, "use_wide": False, "embedding_std": None, "plateau": True}
    train = _training(epochs=100, batch_size=batch_size, lr=1e-3, clip_norm=10.0)
    table = TableConfig(min_count=min_count, whole_numbers=whole)
    return AutoIntConfig(**usual | options, embedding_regularizer=regularizer, table=table, train=train)


def _authors(epochs: int, whole: WholeNumbers = "categorical", **options: Any) -> AutoIntConfig:
    """A setting of the authors' code: three blocks of width 64, two heads."""
    usual: dict[str, Any] = {"dialect": "tf", "dim": 16, "attention_dims": (64,) * 3, "num_heads": 2}
    usual |= {"layer_norm": True, "use_wide": False, "embedding_std": None, "dnn_dropout": 0.5}
    train = _training(epochs=epochs, batch_size=1024, lr=1e-3, patience=4)
    # They keep values seen more than ten times, and numbers as numbers.
    table = TableConfig(min_count=11, numeric="standardize", whole_numbers=whole)
    return AutoIntConfig(**usual | options, table=table, train=train)


#: The published settings, for ``--preset criteo``; the data are the user's to bring.
PUBLISHED: dict[str, AutoIntConfig] = {
    "criteo": _bars(10_000, 10, 1e-5, "inferred", dim=16, attention_dims=(64,) * 5, num_heads=1),
    "criteo_plus": _bars(
        10_000,
        10,
        1e-5,
        "inferred",
        dim=16,
        attention_dims=(64,) * 5,
        num_heads=1,
        use_wide=True,
        dnn_hidden_units=(1000,) * 5,
    ),
    "avazu": _bars(10_000, 2, 1e-6, dim=16, attention_dims=(128,) * 7, num_heads=1, use_residual=False, use_wide=True),
    "frappe": _bars(4096, 1, 0.05, dim=10, attention_dims=(128,) * 6, num_heads=4),
    "frappe_plus": _bars(
        4096,
        1,
        0.1,
        dim=10,
        attention_dims=(128,) * 5,
        num_heads=4,
        use_scale=True,
        layer_norm=True,
        dnn_hidden_units=(400,) * 3,
        batch_norm=True,
        dropout=0.1,
        dnn_dropout=0.1,
    ),
    "movielens": _bars(
        4096, 1, 0.01, dim=10, attention_dims=(128,) * 2, num_heads=4, use_scale=True, layer_norm=True, use_wide=True
    ),
    "authors_criteo": _authors(3, "inferred"),
    "authors_criteo_plus": _authors(3, "inferred", dnn_hidden_units=(400, 400), dnn_dropout=0.0),
    "authors_avazu": _authors(1),
    "authors_movielens": _authors(50, dropout=0.4, embedding_dropout=0.1),
}


class AutoIntTask(ClickPrediction):
    """Click prediction with FuxiCTR's penalty and its rule for the learning rate, or the authors' two optimisers.

    Args:
        model, train, data: as of every task.
        embedding_regularizer, net_regularizer: see `regularization`.
        plateau: divide the learning rate by ten, down to 1e-6, after each epoch without a better validation AUC.
        wide_lr: above zero, first-order weights follow their plain gradient at this rate.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Training,
        data: Data,
        *,
        embedding_regularizer: float | str = 0.0,
        net_regularizer: float | str = 0.0,
        plateau: bool = False,
        wide_lr: float = 0.0,
    ) -> None:
        super().__init__(model, train, data)
        self.embedding_regularizer, self.net_regularizer = embedding_regularizer, net_regularizer
        self.plateau, self.wide_lr = plateau, wide_lr

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        add_regularization(self.model, embedding=self.embedding_regularizer, net=self.net_regularizer)

    def _first_order(self) -> list[nn.Parameter]:
        """What has an optimiser of its own."""
        wide = getattr(self.model, "wide", None)
        return list(wide.parameters()) if self.wide_lr and wide is not None else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = {id(p) for p in self._first_order()}
        groups = [
            group | {"params": [p for p in group["params"] if id(p) not in own]} for group in super().parameter_groups()
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return falling_on_plateaus(optimizer, self) if self.plateau else optimizer

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for parameter in self._first_order():
                if parameter.grad is not None:
                    parameter.sub_(self.wide_lr * parameter.grad)
                    parameter.grad = None

    def figures(self) -> dict[str, Figure]:
        figures = super().figures()
        if _has_attention(self.model):
            assert isinstance(self.data, TableData)
            maps = attention_maps(self.model, _inputs(self, _MAP_BATCHES))
            names = [f.name for f in self.data.schema.fields]
            figures["Attention between fields (test)"] = attention_figure(maps, names)
        return figures


class AutoIntSystem(System[AutoIntConfig]):
    """See card.toml."""

    name = "autoint"
    threads = 1
    Config = AutoIntConfig
    task = AutoIntTask
    presets = PUBLISHED
    size_field = "dim"
    quick: ClassVar[Mapping[str, Any]] = {"data.validation_rows": 2000, "data.test_rows": 4000, "train.epochs": 6}
    space: ClassVar[Mapping[str, Choice]] = {
        "dim": Around(2),
        "attention_dims": Around(2),
        "num_heads": OneOf((1, 2, 4)),
        "layer_norm": OneOf((False, True)),
        "dnn_hidden_units": Around(2),
        "dropout": Range(0.0, 0.5),
        "embedding_regularizer": OneOf((0.0, 1e-6, 1e-5, 1e-4, 1e-3)),
    }

    def load_data(self, config: AutoIntConfig, source: Source) -> Data:
        if source.data is not None:
            return read_table(config.table, source)
        data = ClickLog(config.data)
        data.spec["simulated"] = True
        return data

    def trials_for(self, spec: Mapping[str, Any]) -> Mapping[str, Trial[Any]]:
        """The target of products is simulated; on the user's table the arms themselves are judged."""
        return self.trials if spec.get("simulated") else {}

    def arms(self, config: AutoIntConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        for how in (config.embedding_regularizer, config.net_regularizer):
            parse_regularizer(how)
        if config.plateau and config.train.schedule != "constant":
            raise ValueError(
                f"train.schedule={config.train.schedule!r} beside plateau: two rules for the learning rate; "
                "give --train.schedule constant"
            )
        schema = Schema.from_dict(spec["schema"])
        rows: dict[str, Any] = {
            "numeric_ids": [f.offset for f in schema.of("numeric")],
            "padding_ids": [f.offset for f in schema.of("sequences")],
        }

        def autoint(
            attention: Attention = "learned",
            *,
            use_residual: bool = config.use_residual,
            dnn_hidden_units: Sequence[int] = config.dnn_hidden_units,
        ) -> Callable[[], nn.Module]:
            return lambda: AutoInt(
                schema.num_ids,
                len(schema.fields),
                dim=config.dim,
                attention_dims=config.attention_dims,
                num_heads=config.num_heads,
                dialect=config.dialect,
                use_residual=use_residual,
                use_scale=config.use_scale,
                layer_norm=config.layer_norm,
                attention=attention,
                use_wide=config.use_wide,
                dnn_hidden_units=dnn_hidden_units,
                batch_norm=config.batch_norm,
                dropout=config.dropout,
                embedding_dropout=config.embedding_dropout,
                dnn_dropout=config.dnn_dropout,
                embedding_std=config.embedding_std,
                **rows,
            )

        arms = {"gated": autoint(), "ungated": autoint("uniform")}
        if config.use_residual:
            arms |= {"closed": autoint("closed"), "no_residual": autoint(use_residual=False)}
        if not config.dnn_hidden_units:
            arms["plus"] = autoint(dnn_hidden_units=config.plus_hidden_units)
        std = 0.01 if config.embedding_std is None else config.embedding_std
        return arms | {
            "fm": lambda: FM(schema.num_ids, config.dim, embedding_std=std, **rows),
            "lr": lambda: FM(schema.num_ids, **rows),
        }

    def stages(self, arm: str, model: nn.Module, config: AutoIntConfig, data: Data) -> list[Callable[[], Stage]]:
        task = partial(
            AutoIntTask,
            embedding_regularizer=config.embedding_regularizer,
            net_regularizer=config.net_regularizer,
            plateau=config.plateau,
            wide_lr=config.wide_lr,
        )
        return [lambda: Stage(task(model, config.train, data))]

    def measure(self, arm: str, task: Task, config: AutoIntConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        measured: dict[str, float] = {}
        if arm in ("gated", "closed") and not config.dnn_hidden_units:
            rows = [part[:_ADDITIVITY_ROWS] for part in next(_inputs(task, 1))]
            measured["additivity_error"] = crosses.additivity_error(model, rows)
        if _has_attention(model):
            measured["auc_heads_closed"] = _auc(task, torch.zeros(1))
            measured["auc_attention_uniform"] = _auc(task, "open")
            measured["auc_attention_shuffled"] = _auc(task, "shuffle")
            if isinstance(data, ClickLog):
                measured["pair_attention_times_uniform"] = _pair_attention(task, data)
        return measured

    @staticmethod
    def _products(config: AutoIntConfig, seed: int) -> dict[str, float]:
        return dict(crosses.measure(seed))

    trials: ClassVar[Mapping[str, Trial[Any]]] = {
        "products": Trial(
            _products, "a target of products of two fields, with learned, uniform and closed attention", 5
        )
    }

    def findings(self, model: nn.Module, config: AutoIntConfig, data: Data) -> dict[str, Table]:
        if not _has_attention(model):
            return {}
        assert isinstance(data, TableData)
        batches = _test_inputs(model, data, config.train.batch_size, _MAP_BATCHES)
        names = [f.name for f in data.schema.fields]
        return {"Fields that read each other most (first layer)": attention_report(model, batches, names, shown=20)}

    def claims(self, config: AutoIntConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        products = partial(results.trial, "products")
        if learned := products("learned_auc"):
            uniform, forced = products("uniform_auc"), products("forced_closed_auc")
            pair = [attention - 1 / crosses.FIELDS for attention in products("pair_attention")]
            # "In every seed" is about the seeds that were run and not about their mean; one seed decides nothing.
            every = len(learned) > 1
            off = [abs(value - 0.5) for value in products("closed_auc")]
            return {
                "interaction": [
                    Effect(learned, ">", 0.8, "test AUC, learned attention, every seed", every),
                    Effect(off, "<", 0.02, "test AUC of the closed twin, distance from 0.5, every seed", every),
                ],
                "additive": _additive(products("closed_additivity_error")),
                "intervention": _intervention(learned, forced),
                "learned_attention": _no_difference([a - b for a, b in zip(learned, uniform, strict=True)]),
                "explainable": Effect(pair, ">", 0.0, "mean attention within the strongest pair - uniform"),
            }
        # On the user's table nobody knows which fields interact, nor what there is to be found.
        judged: dict[str, Effect | list[Effect]] = {}
        if errors := results.metric("closed", "additivity_error"):
            judged["additive"] = _additive(errors)
        if trained := results.metric("gated", "auc"):
            judged["intervention"] = _intervention(trained, results.metric("gated", "auc_heads_closed"))
        if difference := results.difference("gated", "ungated", "auc"):
            judged["learned_attention"] = _no_difference(difference)
        return judged


def _additive(errors: list[float]) -> Effect:
    return Effect(errors, "<", 1e-5, "closed twin, change of logits when fields are swapped", exact=True)


def _intervention(trained: list[float], closed: list[float]) -> Effect:
    lost = [a - b for a, b in zip(trained, closed, strict=True)]
    return Effect(lost, ">", 0.0, "test AUC, as trained - heads forced to zero")


def _no_difference(values: list[float]) -> list[Effect]:
    what = "test AUC, learned - uniform attention"
    return [Effect(values, "<", 0.005, what), Effect(values, ">", -0.005, what)]


def _has_attention(model: nn.Module) -> bool:
    return any(isinstance(module, FieldAttention) for module in model.modules())


def _inputs(task: Task, batches: int) -> Iterator[tuple[Tensor, ...]]:
    return _test_inputs(task.model, task.data, task.train_config.batch_size, batches)


def _test_inputs(model: nn.Module, data: Data, batch_size: int, batches: int) -> Iterator[tuple[Tensor, ...]]:
    """The model's inputs for the first batches of the test split."""
    device = next(model.parameters()).device
    for batch in islice(data.test(batch_size), batches):
        yield tuple(x.to(device) for x in model_inputs(batch))


@torch.no_grad()
def _auc(task: Task, how: Any) -> float:
    """Test AUC with every attention forced."""
    metrics = task.new_metrics()
    device = next(task.model.parameters()).device
    with force(task.model, how):
        for batch in task.data.test(task.train_config.batch_size):
            logits = task.model(*(x.to(device) for x in task.inputs(batch)))
            task.update(metrics, logits.cpu(), batch)
    return float(metrics.compute()["auc"])


def _pair_attention(task: Task, data: ClickLog) -> float:
    """Mean attention within the pair of fields that interact, in the first layer, as a multiple of uniform."""
    names = [f.name for f in data.schema.fields]
    a, b = (names.index(name) for name in data.truth.pair)
    map_HMM = next(iter(attention_maps(task.model, _inputs(task, _MAP_BATCHES)).values()))
    return float((map_HMM[:, a, b] + map_HMM[:, b, a]).mean() / 2) * len(names)


def attention_figure(maps: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """A map a layer, mean over heads: how much of each field (column) every field (row) reads."""
    from matplotlib.figure import Figure

    size = 1.5 + (0.28 if len(names) <= _FEW else 0.2) * len(names)
    # Large maps stand below each other, so that their names can still be read.
    shape = (1, len(maps)) if len(names) <= _FEW else (len(maps), 1)
    figure = Figure(figsize=(size * shape[1], size * shape[0]), layout="constrained")
    for axes, (name, map_HMM) in zip(figure.subplots(*shape, squeeze=False).flat, maps.items(), strict=True):
        image = axes.imshow(map_HMM.mean(0), vmin=0)
        places = range(len(names))
        axes.set(xticks=places, yticks=places, title=name.removesuffix(".gate"), xlabel="read", ylabel="reading")
        axes.set_xticklabels(names, rotation=90, fontsize=7)
        axes.set_yticklabels(names, fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.7)
    return figure


SYSTEM = AutoIntSystem()
