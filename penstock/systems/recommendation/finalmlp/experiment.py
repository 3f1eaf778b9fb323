"""FinalMLP against its streams without gates, without context, without fusion, and a single perceptron."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from penstock.data.base import Data, Source
from penstock.data.rawtables import did_you_mean
from penstock.data.schema import Schema, TableBatch
from penstock.data.tables import TableConfig, TableData, read_table
from penstock.errors import UserError
from penstock.gates import Table, force, watch
from penstock.lab.results import Effect, Results
from penstock.lab.space import Around, Choice, OneOf, Range
from penstock.lab.system import Stage, System
from penstock.systems.recommendation.finalmlp.model import DualMLP, FinalMLP
from penstock.systems.recommendation.finalmlp.products import ProductLog, ProductLogConfig
from penstock.tasks.base import Task, Training
from penstock.tasks.click_prediction import ClickPrediction, ClickTraining, falling_on_plateaus, model_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Test rows on which gates are read for people, and columns of a context that get a table of their own.
_READ_ROWS, _MOST_CONTEXTS = 200_000, 3


def _training(**changes: Any) -> ClickTraining:
    """Adam without decay, gradients clipped at 10, early stopping after two epochs without a better score."""
    usual: dict[str, Any] = {"steps": 0, "epochs": 20, "batch_size": 250, "optimizer": "adam", "lr": 3e-3}
    usual |= {"schedule": "constant", "clip_norm": 10.0, "patience": 2}
    return ClickTraining(**usual | changes)


@dataclass
class StreamConfig:
    """One perceptron."""

    hidden: tuple[int, ...] = (64, 32)
    """Hidden widths; the last is the stream's output."""
    activation: str = "relu"
    """relu, sigmoid, tanh, softmax, prelu, dice, or a class of torch.nn."""
    dropout: float = 0.1
    """After each hidden layer."""
    batch_norm: bool = False
    """Whether hidden layers normalise before the activation."""


@dataclass
class FinalMLPConfig:
    """A FinalMLP small enough to train in seconds."""

    dim: int = 8
    """Width of the embeddings."""
    stream_1: StreamConfig = field(default_factory=StreamConfig)
    """The first stream; alone it is the arm mlp."""
    stream_2: StreamConfig = field(default_factory=StreamConfig)
    """The second."""
    gate_hidden: tuple[int, ...] = (32,)
    """Hidden widths of the gates' networks; may be empty."""
    context_1: tuple[str, ...] | None = None
    """Columns that drive the first stream's gate, as your user columns. Default: none on your own table, where the gate
    is then one learned vector for all rows; signal_0 on the simulated click log."""
    context_2: tuple[str, ...] | None = None
    """Columns that drive the second stream's gate, as your item columns. Default: none, and signal_1 on the simulated log."""
    ctx_init_std: float = 0.0
    """Of the learned constant that stands in for a context. At 0, the authors' choice, a gate without context learns
    nothing but its last bias; a little above wakes its network."""
    num_heads: int = 4
    """Of the bilinear fusion; divides the last widths of both streams."""
    embedding_regularizer: str = "1e-5"
    """Added to every step's loss, over whole tables: a number x for x/2 of the squares, "l1(x)" or "l1_l2(x,y)"."""
    net_regularizer: str = "0"
    """The same of all other parameters."""
    monitor: Literal["auc", "auc_minus_log_loss"] = "auc"
    """What early stopping and the fall of the learning rate follow on the validation split."""
    data: ProductLogConfig = field(default_factory=ProductLogConfig)
    table: TableConfig = field(default_factory=TableConfig)
    """Your own table."""
    train: ClickTraining = field(default_factory=_training)
    """Under the constant schedule the rate falls tenfold after each epoch without a better validation score."""


def _published(
    table: TableConfig,
    streams: tuple[StreamConfig, StreamConfig],
    *,
    dim: int,
    gate: int,
    heads: int,
    regularizer: str,
    contexts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    batch_size: int = 4096,
    patience: int = 2,
    monitor: Literal["auc", "auc_minus_log_loss"] = "auc",
) -> FinalMLPConfig:
    return FinalMLPConfig(
        dim=dim,
        stream_1=streams[0],
        stream_2=streams[1],
        gate_hidden=(gate,),
        context_1=contexts[0],
        context_2=contexts[1],
        num_heads=heads,
        embedding_regularizer=regularizer,
        monitor=monitor,
        table=table,
        train=_training(epochs=100, batch_size=batch_size, lr=1e-3, patience=patience),
    )


#: The settings of the benchmark's run logs (BARS), for ``--preset frappe_x1``; the data are the user's to bring. The two x4
#: runs were made without gates (use_fs False): there the arm "ungated" is what was published.
PUBLISHED: dict[str, FinalMLPConfig] = {
    "criteo_x1": _published(
        TableConfig(min_count=1, numeric="standardize", validation_ratio=0.2, test_ratio=0.1),
        (
            StreamConfig((400, 400, 400), dropout=0.2, batch_norm=True),
            StreamConfig((1000,), dropout=0.3, batch_norm=True),
        ),
        dim=10,
        gate=800,
        heads=200,
        regularizer="1e-5",
        contexts=(tuple(f"I{i}" for i in range(1, 14)), ("C6",)),
    ),
    "avazu_x1": _published(
        TableConfig(min_count=1, validation_ratio=0.1, test_ratio=0.2, whole_numbers="categorical"),
        (
            StreamConfig((400, 400, 400), dropout=0.3, batch_norm=True),
            StreamConfig((800,), dropout=0.3, batch_norm=True),
        ),
        dim=10,
        gate=800,
        heads=10,
        regularizer="0.05",
    ),
    "movielenslatest_x1": _published(
        TableConfig(min_count=1, validation_ratio=0.2, test_ratio=0.1, whole_numbers="categorical"),
        (StreamConfig((400,), dropout=0.4, batch_norm=True), StreamConfig((800,), dropout=0.2, batch_norm=True)),
        dim=10,
        gate=800,
        heads=10,
        regularizer="0.01",
    ),
    "frappe_x1": _published(
        TableConfig(min_count=1, validation_ratio=0.2, test_ratio=0.1, whole_numbers="categorical"),
        (StreamConfig((400,), dropout=0.4, batch_norm=True), StreamConfig((100,), dropout=0.4, batch_norm=True)),
        dim=10,
        gate=400,
        heads=5,
        regularizer="0.05",
        contexts=(("user",), ("item",)),
    ),
    "criteo_x4_001": _published(
        TableConfig(min_count=10),
        (StreamConfig((1000,) * 5, dropout=0.2), StreamConfig((500,), dropout=0.1)),
        dim=16,
        gate=1000,
        heads=50,
        regularizer="1e-5",
        batch_size=10_000,
    ),
    "avazu_x4_001": _published(
        TableConfig(min_count=2, whole_numbers="categorical"),
        (StreamConfig((2000,) * 3, dropout=0.0, batch_norm=True), StreamConfig((500,), dropout=0.0)),
        dim=16,
        gate=1000,
        heads=20,
        regularizer="1e-9",
        batch_size=10_000,
        patience=1,
        monitor="auc_minus_log_loss",
    ),
}


class FinalMLPTask(ClickPrediction):
    """Click prediction with the regulariser of whole tables in every step, and a learning rate that falls on plateaus."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(self.model, FinalMLP | DualMLP)
        self.model.add_penalty()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return falling_on_plateaus(optimizer, self) if self.train_config.schedule == "constant" else optimizer

    def figures(self) -> dict[str, Figure]:
        figures = super().figures()
        if isinstance(self.model, FinalMLP) and self.model.gate_1 is not None and isinstance(self.data, TableData):
            schema, train = self.data.schema, self.train_config
            figures["Mean gate, by field"] = gate_figure(
                gate_report(self.model, _read_batches(self.data, train), schema)
            )
            for by in context_columns(self.model, schema):
                report = gate_report(self.model, _read_batches(self.data, train), schema, by=by)
                figures[f"Mean gate, by field and value of {by}"] = value_figure(report, by)
        return figures


class JointTask(FinalMLPTask):
    """The same, following AUC minus log loss."""

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("auc_minus_log_loss", "max")

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return super().derived(metrics) | {"auc_minus_log_loss": metrics["auc"] - metrics["loss"]}


class FinalMLPSystem(System[FinalMLPConfig]):
    """See card.toml."""

    name = "finalmlp"
    threads = 1
    Config = FinalMLPConfig
    task = FinalMLPTask
    presets = PUBLISHED
    quick: ClassVar[Mapping[str, Any]] = {
        "data.train_rows": 4000,
        "data.validation_rows": 2000,
        "data.test_rows": 4000,
        "train.epochs": 6,
    }
    space: ClassVar[Mapping[str, Choice]] = {
        "dim": Around(2),
        "stream_1.hidden": Around(2),
        "stream_2.hidden": Around(2),
        "stream_1.dropout": Range(0.0, 0.5),
        "stream_2.dropout": Range(0.0, 0.5),
        "num_heads": OneOf((1, 2, 4, 8)),
        "embedding_regularizer": OneOf(("0", "1e-6", "1e-5", "1e-4", "1e-3")),
    }

    def load_data(self, config: FinalMLPConfig, source: Source) -> Data:
        return ProductLog(config.data) if source.data is None else read_table(config.table, source)

    def arms(self, config: FinalMLPConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        contexts = contexts_of(config, spec)

        def final(**options: Any) -> Callable[[], nn.Module]:
            return lambda: build(config, spec, **options)

        arms = {"gated": final(contexts=contexts), "ungated": final(gated=False)}
        if any(contexts):
            arms["contextless"] = final()
        return arms | {
            "dual_mlp": lambda: build_plain(config, spec, streams=2),
            "mlp": lambda: build_plain(config, spec, streams=1),
        }

    def stages(self, arm: str, model: nn.Module, config: FinalMLPConfig, data: Data) -> list[Callable[[], Stage]]:
        task = FinalMLPTask if config.monitor == "auc" else JointTask
        return [lambda: Stage(task(model, config.train, data))]

    def measure(self, arm: str, task: Task, config: FinalMLPConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        if not isinstance(model, FinalMLP) or model.gate_1 is None or model.gate_2 is None:
            return {}
        measured: dict[str, float] = {}
        if model.gate_1.context is None and model.gate_2.context is None:
            dead, live = gate_gradients(task, next(iter(data.train(config.train.batch_size, seed))))
            measured |= {"dead_gradient": dead, "live_gradient": live}
        else:
            measured |= interventions(task)
        if isinstance(data, ProductLog) and (margin := field_margin(task, data)) is not None:
            measured["field_margin"] = margin
        return measured

    def findings(self, model: nn.Module, config: FinalMLPConfig, data: Data) -> dict[str, Table]:
        if not isinstance(model, FinalMLP) or model.gate_1 is None:
            return {}
        assert isinstance(data, TableData)
        found = {"Gate openness by field": gate_report(model, _read_batches(data, config.train), data.schema)}
        for by in context_columns(model, data.schema):
            report = gate_report(model, _read_batches(data, config.train), data.schema, by=by)
            found[f"Gate openness by value of {by}"] = shift_report(report, by)
        return found

    def claims(self, config: FinalMLPConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        judged: dict[str, Effect | list[Effect]] = {}
        margins = results.metric("gated", "field_margin")
        if gains := results.difference("gated", "dual_mlp", "auc"):
            what, several = "test AUC, gated - DualMLP", len(gains) > 1
            judged["gain"] = [
                _in_every_seed(gains, ">", 0.0, what),
                # The size is that of the simulated log; no one can say what it should be on other data.
                Effect([statistics.fmean(gains)], ">", 0.005 if margins else 0.0, f"{what}, mean", exact=several),
            ]
        trained = results.metric("gated", "auc")
        if shut := results.metric("gated", "auc_shut"):
            judged["intervention"] = [
                *(
                    _in_every_seed(
                        [a - b for a, b in zip(results.metric("gated", f"auc_{how}"), trained, strict=True)],
                        "<",
                        -0.008,
                        f"test AUC, gates {how} - as trained",
                    )
                    for how in ("open", "shuffled")
                ),
                Effect(
                    [abs(value - 0.5) for value in shut], "<", 1e-9, "test AUC, gates shut, away from 0.5", exact=True
                ),
            ]
        if margins:
            judged["fields"] = Effect(
                margins, ">", 0.0, "lowest mean gate of a signal field that is no context - highest of an idle field"
            )
        if config.gate_hidden and not config.ctx_init_std:
            arm = "contextless" if results.metric("contextless", "dead_gradient") else "gated"
            if dead := results.metric(arm, "dead_gradient"):
                live = results.metric(arm, "live_gradient")
                judged["dead_gate_net"] = [
                    Effect(dead, "<", 1e-300, "largest gradient of the gates but for their last biases", exact=True),
                    Effect(live, ">", 0.0, "largest gradient of their last biases", exact=True),
                ]
        return judged


def _in_every_seed(values: list[float], must_be: Literal["<", ">"], threshold: float, what: str) -> Effect:
    """Holds if every seed is on the right side, does not if none is; one seed alone decides nothing."""
    return Effect(values, must_be, threshold, f"{what}, in every seed", exact=len(values) > 1)


# -- from names to models ------------------------------------------------------------------------------------


def contexts_of(config: FinalMLPConfig, spec: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The fields that drive each gate, as places in the row.

    Raises:
        UserError: for a column that is no field of the table, or one named twice.
    """
    first, second = spec.get("contexts", ((), ()))
    asked = (config.context_1, config.context_2)
    given = [usual if own is None else own for own, usual in zip(asked, (first, second), strict=True)]
    return _places("context-1", given[0], spec), _places("context-2", given[1], spec)


def _places(flag: str, names: Sequence[str], spec: Mapping[str, Any]) -> list[int]:
    fields: list[str] = spec["fields"]
    for name in names:
        if name in spec["labels"]:
            raise UserError(f"--{flag} {name}: this is the label; a gate may see only what is known before")
        if name not in fields:
            raise UserError(f"--{flag} {name}: the table has no such field; {did_you_mean(name, fields)}")
        if list(names).count(name) > 1:
            raise UserError(f"--{flag} names {name} twice; once is enough")
    return [fields.index(name) for name in names]


def build(
    config: FinalMLPConfig,
    spec: Mapping[str, Any],
    *,
    gated: bool = True,
    contexts: tuple[list[int], list[int]] = ([], []),
) -> FinalMLP:
    """The configured model for a table's ``spec``; ``contexts`` as of `contexts_of`."""
    first, second = config.stream_1, config.stream_2
    return FinalMLP(
        spec["field_sizes"],
        offsets=spec["offsets"],
        num_numeric=spec["num_numeric"],
        num_sequences=spec["num_sequences"],
        dim=config.dim,
        hidden_1=first.hidden,
        hidden_2=second.hidden,
        activation_1=first.activation,
        activation_2=second.activation,
        dropout_1=first.dropout,
        dropout_2=second.dropout,
        batch_norm_1=first.batch_norm,
        batch_norm_2=second.batch_norm,
        gated=gated,
        gate_hidden=config.gate_hidden,
        context_1=contexts[0],
        context_2=contexts[1],
        ctx_init_std=config.ctx_init_std,
        num_heads=config.num_heads,
        embedding_regularizer=config.embedding_regularizer,
        net_regularizer=config.net_regularizer,
    )


def build_plain(config: FinalMLPConfig, spec: Mapping[str, Any], *, streams: Literal[1, 2]) -> DualMLP:
    """The same streams without gates and fusion, or the first stream alone."""
    first, second = config.stream_1, config.stream_2
    return DualMLP(
        spec["field_sizes"],
        offsets=spec["offsets"],
        num_numeric=spec["num_numeric"],
        num_sequences=spec["num_sequences"],
        dim=config.dim,
        hidden_1=first.hidden,
        hidden_2=second.hidden if streams == 2 else None,
        activation_1=first.activation,
        activation_2=second.activation,
        dropout_1=first.dropout,
        dropout_2=second.dropout,
        batch_norm_1=first.batch_norm,
        batch_norm_2=second.batch_norm,
        embedding_regularizer=config.embedding_regularizer,
        net_regularizer=config.net_regularizer,
    )


# -- what the gates do ---------------------------------------------------------------------------------------


@torch.no_grad()
def auc_on_test(task: Task) -> float:
    """AUC of a task's model on the test split, in evaluation mode."""
    metrics = task.new_metrics().to(task.device)
    for batch in task.data.test(task.train_config.batch_size):
        _, outputs = task.step(TableBatch(*(part.to(task.device) for part in batch)))
        task.update(metrics, outputs, batch._replace(label=batch.label.to(task.device)))
    return float(metrics.compute()["auc"])


def interventions(task: Task) -> dict[str, float]:
    """Test AUC of a trained model with its gates open (one), shut, and shuffled over the rows of each batch.

    Only gates with a context are shuffled: the others are the same for all rows.
    """
    model = task.model
    contextual = [name for name, gate in model.named_children() if getattr(gate, "context", None) is not None]
    with force(model, "open"):
        measured = {"auc_open": auc_on_test(task)}
    with force(model, "shuffle", contextual):
        measured["auc_shuffled"] = auc_on_test(task)
    with force(model, "closed"):
        measured["auc_shut"] = auc_on_test(task)
    return measured


def gate_gradients(task: Task, batch: TableBatch) -> tuple[float, float]:
    """Largest absolute gradient of a batch's loss in the gates: of all but their last biases, and of these."""
    gates = [gate for name, gate in task.model.named_children() if name in ("gate_1", "gate_2")]
    task.zero_grad()
    loss, _ = task.step(TableBatch(*(part.to(task.device) for part in batch)))
    loss.backward()
    largest = {False: 0.0, True: 0.0}
    for gate in gates:
        last = gate.get_submodule("net")[-1].bias  # type: ignore[index]
        for parameter in gate.parameters():
            assert parameter.grad is not None
            is_last = parameter is last
            largest[is_last] = max(largest[is_last], float(parameter.grad.abs().max()))
    task.zero_grad()
    return largest[False], largest[True]


def field_margin(task: Task, data: ProductLog) -> float | None:
    """How far the mean gates of signal fields outside the context lie above those of all idle fields.

    Returns:
        the lowest of the first minus the highest of the second, above zero if all the first rank before the second;
        ``None`` if there are no fields of either sort.
    """
    assert isinstance(task.model, FinalMLP)
    gates = (task.model.gate_1, task.model.gate_2)
    context = {p for gate in gates if gate is not None and gate.context is not None for p in gate.context.places}
    report = gate_report(task.model, data.test(task.train_config.batch_size), data.schema)
    means = {row["field"]: row["mean"] for row in report}
    signal = [means[name] for name in data.signal if data.spec["fields"].index(name) not in context]
    idle = [means[name] for name in data.idle]
    return min(signal) - max(idle) if signal and idle else None


@torch.no_grad()
def gate_report(
    model: FinalMLP, batches: Iterable[TableBatch], schema: Schema, *, by: str | None = None, shown: int = 20
) -> Table:
    """Which fields the gates favour.

    Args:
        model: a gated model.
        batches: rows to look at.
        schema: of their table.
        by: a column with ids, as one of the context: then one row for each of its values.
        shown: how many of these values, the most frequent.

    Returns:
        a printable table. One row a field, the most favoured first: the mean gate over rows, embedding and both streams,
        that of each stream, and how much the gate varies between rows (standard deviation). With ``by``, one row a
        value: its name under "value of <by>", how many rows have it, and each field's mean gate on them.

    Raises:
        ValueError: if the model has no gates, or ``by`` is no column with ids.
    """
    if model.gate_1 is None:
        raise ValueError("the model has no gates: it was built with gated=False")
    return _by_field(model, batches, schema) if by is None else _by_value(model, batches, schema, by, shown)


def _by_field(model: FinalMLP, batches: Iterable[TableBatch], schema: Schema) -> Table:
    fields = len(schema.fields)
    with watch(model, ["gate_1", "gate_2"]) as log:
        _apply(model, batches)
    means = [log[name].unit_means.view(fields, -1).mean(1) for name in log]
    spreads = [(log[name].squares / max(log[name].inputs, 1)).sqrt().view(fields, -1).mean(1) for name in log]
    rows = Table()
    for place, one in enumerate(schema.fields):
        first, second = (float(mean[place]) for mean in means)
        spread = statistics.fmean(float(own[place]) for own in spreads)
        rows.append(
            {"field": one.name, "mean": (first + second) / 2, "stream 1": first, "stream 2": second, "spread": spread}
        )
    return Table(sorted(rows, key=lambda row: -row["mean"]))


def _by_value(model: FinalMLP, batches: Iterable[TableBatch], schema: Schema, by: str, shown: int) -> Table:
    columns = [one.name for one in schema.of("ids")]
    if by not in columns:
        raise ValueError(f"by={by!r}: it must be a column with ids; {did_you_mean(by, columns)}")
    place = columns.index(by)
    one = schema.of("ids")[place]
    total, count = torch.zeros(one.size, len(schema.fields)), torch.zeros(one.size)
    for batch in batches:
        with watch(model, ["gate_1", "gate_2"], keep="values") as log:
            _apply(model, [batch])
        gates = [kept[0].cpu().expand(len(batch.ids), -1) for kept in log.values().values()]
        mean_BM = torch.stack(gates).mean(0).unflatten(1, (len(schema.fields), -1)).mean(2)
        value_B = batch.ids[:, place].cpu() - one.offset
        total.index_add_(0, value_B, mean_BM)
        count.index_add_(0, value_B, torch.ones(len(value_B)))
    frequent = count.argsort(descending=True, stable=True)[:shown]
    # The column itself is among the fields: the names of its values need a key of their own.
    return Table(
        {f"value of {by}": one.value(value), "rows": int(count[value])}
        | {f.name: float(total[value, m] / count[value]) for m, f in enumerate(schema.fields)}
        for value in frequent.tolist()
        if count[value]
    )


def _read_batches(data: TableData, train: Training) -> Iterator[TableBatch]:
    """The test rows that reports look at."""
    return islice(data.test(train.batch_size), max(_READ_ROWS // train.batch_size, 1))


def context_columns(model: FinalMLP, schema: Schema) -> list[str]:
    """The columns with ids that drive a gate, at most three."""
    contexts = [gate.context for gate in (model.gate_1, model.gate_2) if gate is not None and gate.context is not None]
    places = dict.fromkeys(place for context in contexts for place in context.places)
    return [schema.fields[place].name for place in places if schema.fields[place].part == "ids"][:_MOST_CONTEXTS]


def shift_report(report: Table, by: str, *, shown: int = 4) -> Table:
    """A `gate_report` by value in few columns: for each value, the fields whose mean gate it moves most.

    Args:
        report: one row a value, a column a field.
        by: the column of the values.
        shown: fields to name, of those opened and of those closed.

    Returns:
        a printable table: the value, how many rows have it, the mean gate, and which fields it opens and closes against
        their mean over all rows of the report.
    """
    total = sum(row["rows"] for row in report) or 1
    fields = list(report[0])[2:] if report else []
    usual = {name: sum(row["rows"] * row[name] for row in report) / total for name in fields}
    rows = Table()
    for row in report:
        moved = sorted(fields, key=lambda name: row[name] - usual[name])
        opened = [name for name in reversed(moved) if row[name] > usual[name]][:shown]
        closed = [name for name in moved if row[name] < usual[name]][:shown]
        said = [", ".join(f"{name} {row[name] - usual[name]:+.2g}" for name in names) for names in (opened, closed)]
        mean = statistics.fmean(row[name] for name in fields)
        named = {by: row[f"value of {by}"], "rows": row["rows"], "mean gate": mean}
        rows.append(named | {"opens": said[0] or "-", "closes": said[1] or "-"})
    return rows


def _apply(model: FinalMLP, batches: Iterable[TableBatch]) -> None:
    device = next(model.parameters()).device
    for batch in batches:
        model(*(part.to(device) for part in model_inputs(batch)))


def gate_figure(report: Table) -> Figure:
    """The mean gates of a `gate_report` by field, of both streams; one leaves a field as it is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.8 + 0.35 * len(report)), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(report))
    for shift, stream in ((-0.2, "stream 1"), (0.2, "stream 2")):
        axes.barh(places + shift, [row[stream] for row in report], height=0.4, label=stream)
    axes.axvline(1.0, linestyle=":", color="grey")
    axes.set_yticks(places, [row["field"] for row in report])
    axes.set(xlim=(0, 2), xlabel="mean gate")
    axes.invert_yaxis()
    axes.legend()
    return figure


def value_figure(report: Table, by: str) -> Figure:
    """The mean gates of a `gate_report` by field (column) and by value (row); one leaves a field as it is."""
    from matplotlib.figure import Figure

    fields = list(report[0])[2:]
    figure = Figure(figsize=(2.6 + 0.24 * len(fields), 1.6 + 0.24 * len(report)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow([[row[name] for name in fields] for row in report], aspect="auto")
    axes.set_xticks(range(len(fields)), fields, rotation=90, fontsize=7)
    axes.set_yticks(range(len(report)), [f"{row[f'value of {by}']} ({row['rows']:,})" for row in report], fontsize=7)
    axes.set(ylabel=f"{by} (rows)")
    figure.colorbar(image, ax=axes, shrink=0.7, label="mean gate")
    return figure


SYSTEM = FinalMLPSystem()
