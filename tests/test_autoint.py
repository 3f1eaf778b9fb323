"""AutoInt: layers against loops in three dialects, checkpoints against a plain FuxiCTR, and what the claims rest on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.data.base import Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.tables import TableConfig
from penstock.errors import UserError
from penstock.gates import GateNotFoundError, force, named_gates, twin, watch
from penstock.lab.cards import card
from penstock.lab.results import Results
from penstock.nn.fuxictr import regularization
from penstock.systems.recommendation.autoint import crosses
from penstock.systems.recommendation.autoint.checkpoint import (
    FuxiFields,
    from_authors,
    layer_from_authors,
    to_authors,
)
from penstock.systems.recommendation.autoint.experiment import (
    PUBLISHED,
    SYSTEM,
    AutoIntConfig,
    AutoIntTask,
    _auc,
    attention_figure,
)
from penstock.systems.recommendation.autoint.model import (
    FM,
    VARIANTS,
    AutoInt,
    Dialect,
    FieldAttention,
    FirstOrder,
    InteractingLayer,
    attention_maps,
    attention_report,
)
from penstock.tasks.click_prediction import ClickPrediction
from tests.golden_adapters.autoint import ADAPTERS

DIALECTS = get_args(Dialect)
IDS, FIELDS = 30, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def spread(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with weights large enough for attention to differ."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.7)
    return module.eval()


def model(**options: Any) -> AutoInt:
    net = spread(AutoInt(IDS, FIELDS, **{"dim": 4, "attention_dims": (6, 8), "num_heads": 2} | options))
    assert isinstance(net, AutoInt)
    return net


def ids(rows: int = 7) -> Tensor:
    return torch.randint(0, IDS, (rows, FIELDS))


# -- the layer -----------------------------------------------------------------------------------------------


def by_loops(layer: InteractingLayer, x: Tensor, dialect: str, heads: int, scale: bool) -> tuple[Tensor, Tensor]:
    """A layer's output (B, M, D) and attention (B, H, M, M), a number at a time, from its weights alone."""
    state = layer.state_dict()

    def project(name: str, e: Tensor) -> Tensor:
        y = state[f"{name}.weight"] @ e
        return (y + state[f"{name}.bias"]).relu() if dialect == "tf" else y

    rows, fields, _ = x.shape
    width = len(state["value.weight"])
    part = width // heads
    attention = torch.zeros(rows, heads, fields, fields, dtype=x.dtype)
    out = torch.zeros(rows, fields, width, dtype=x.dtype)
    for b in range(rows):
        for m in range(fields):
            for h in range(heads):
                own = slice(h * part, (h + 1) * part)
                query = project("gate.query", x[b, m])[own]
                scores = torch.stack([query @ project("gate.key", x[b, k])[own] for k in range(fields)])
                weights = torch.exp(scores / math.sqrt(part) if scale else scores)
                attention[b, h, m] = weights / weights.sum()
                for k in range(fields):
                    out[b, m, own] += attention[b, h, m, k] * project("value", x[b, k])[own]
            if "residual.weight" in state:
                out[b, m] += project("residual", x[b, m])
            elif layer.residual is not None:
                out[b, m] += x[b, m]
            normed = out[b, m].relu() if dialect == "tf" else out[b, m]
            if "norm.weight" in state:
                eps = 1e-8 if dialect == "tf" else 1e-5
                normed = (normed - normed.mean()) / (normed.var(correction=0) + eps).sqrt()
                normed = normed * state["norm.weight"] + state["norm.bias"]
            out[b, m] = normed if dialect == "tf" else normed.relu()
    return out, attention


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("input_dim", "attention_dim", "heads"), [(3, 12, 2), (6, 6, 3), (8, 4, 1)])
@pytest.mark.parametrize("residual", [True, False])
def test_layers_are_their_equations(
    dialect: Dialect, input_dim: int, attention_dim: int, heads: int, residual: bool
) -> None:
    norm = residual if dialect != "tf" else None
    layer = InteractingLayer(input_dim, attention_dim, heads, use_residual=residual, layer_norm=norm, dialect=dialect)
    spread(layer)
    x = torch.randn(2, 4, input_dim).double()
    expected, attention = by_loops(layer, x, dialect, heads, scale=dialect == "tf")
    with watch(layer, keep="values") as log:
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(log.values()["gate"][0], attention)


def test_dialects_differ_where_the_table_says_so() -> None:
    paper, tf, fuxi = (InteractingLayer(6, 6, 2, dialect=dialect) for dialect in ("paper", "tf", "fuxi"))
    names = {name for name, _ in fuxi.named_parameters()}
    assert names == {"gate.query.weight", "gate.key.weight", "value.weight"}
    assert {name for name, _ in paper.named_parameters()} == names | {"residual.weight"}
    weights = {
        f"{part}.{kind}" for part in ("gate.query", "gate.key", "value", "residual") for kind in ("weight", "bias")
    }
    assert {name for name, _ in tf.named_parameters()} == weights | {"norm.weight", "norm.bias"}
    scales = [gate.scale for layer in (paper, tf, fuxi) for gate in [layer.gate] if isinstance(gate, FieldAttention)]
    assert scales == [1.0, 3**-0.5, 1.0]
    bias_free = InteractingLayer(6, 8, 2, dialect="fuxi", use_scale=True, layer_norm=True)
    assert isinstance(bias_free.gate, FieldAttention)
    assert bias_free.gate.scale == 0.5
    assert {name for name, _ in bias_free.named_parameters()} == names | {"residual.weight", "norm.weight", "norm.bias"}


def test_matrices_multiplied_first_change_no_gradient() -> None:
    layer = spread(InteractingLayer(3, 12, 2, use_scale=True))
    assert isinstance(layer, InteractingLayer)
    assert isinstance(layer.gate, FieldAttention)
    assert layer.gate.merged
    x = torch.randn(3, 5, 3).double().requires_grad_()
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), leaves)
    query, key, value = (
        F.linear(x, w).unflatten(-1, (2, 6)).transpose(1, 2)
        for w in (layer.gate.query.weight, layer.gate.key.weight, layer.value.weight)  # type: ignore[union-attr]
    )
    read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    plain = (read + F.linear(x, layer.residual.weight)).relu()  # type: ignore[union-attr,arg-type]
    for own, other in zip(ours, torch.autograd.grad(plain.square().sum(), leaves), strict=True):
        torch.testing.assert_close(own, other)


def test_attention_may_be_uniform_or_closed() -> None:
    learned = spread(InteractingLayer(4, 6, 2))
    assert isinstance(learned, InteractingLayer)
    x = torch.randn(3, 5, 4).double()
    for attention, how in (("uniform", "open"), ("closed", torch.zeros(1))):
        plain = InteractingLayer(4, 6, 2, attention=attention).double()  # type: ignore[arg-type]
        plain.load_state_dict({k: v for k, v in learned.state_dict().items() if k in plain.state_dict()}, strict=True)
        assert not any(isinstance(module, FieldAttention) for module in plain.modules())
        with force(learned, how):
            torch.testing.assert_close(learned(x), plain(x))
    assert "value.weight" not in plain.state_dict()


def test_forcing_a_field_makes_every_field_read_it() -> None:
    layer = spread(InteractingLayer(4, 6, 2, use_residual=False))
    assert isinstance(layer, InteractingLayer)
    x = torch.randn(3, 5, 4).double()
    with force(layer, 2):
        out = layer(x)
    torch.testing.assert_close(out, F.linear(x[:, 2:3], layer.value.weight).relu().expand_as(out))  # type: ignore[union-attr]
    for how in ("shuffle", "mean"):
        with force(layer, how):
            assert not torch.allclose(layer(x), out)


def test_dropout_is_on_what_the_gate_returned() -> None:
    layer = InteractingLayer(4, 6, 2, dropout=0.5, use_residual=False).train()
    with watch(layer, keep="values") as log:
        layer(torch.randn(20, 5, 4))
    torch.testing.assert_close(log.values()["gate"][0].sum(-1), torch.ones(20, 2, 5))
    with force(layer, torch.zeros(1)):
        assert not layer(torch.randn(20, 5, 4)).any()
    nothing = InteractingLayer(4, 6, 2, dropout=1.0, use_residual=False).train()
    assert not nothing(torch.randn(2, 5, 4)).any()


# -- the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_logit_is_the_sum_of_its_parts(dialect: Dialect) -> None:
    net = model(dialect=dialect, use_wide=True, dnn_hidden_units=(5, 3), batch_norm=True)
    x = ids()
    e = net.embedding.table.weight[x]
    hidden = e
    for layer in net.layers:
        hidden = layer(hidden)
    assert net.dnn is not None
    assert net.wide is not None
    expected = hidden.flatten(1) @ net.fc.weight[0] + net.fc.bias + net.dnn(e.flatten(1))[:, 0]
    expected = expected + net.wide.weights.table.weight[x][..., 0].sum(1)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(x)[3:4], net(x[3:4]))


def test_first_order_sums_sequences_and_weighs_numbers() -> None:
    part = FirstOrder(10, numeric_ids=[5], padding_ids=[6], zero_ids=[0]).double()
    nn.init.normal_(part.weights.table.weight)
    part.weights.table.clear_zeros()
    w = part.weights.table.weight[:, 0].detach()
    single, numeric = torch.tensor([[1, 4], [0, 2]]), torch.tensor([[2.0], [-0.5]]).double()
    sequences = torch.tensor([[[7, 8, 6]], [[6, 6, 6]]])
    out = part(single, numeric, sequences)
    torch.testing.assert_close(out, torch.stack([w[1] + w[4] + 2 * w[5] + w[7] + w[8], w[2] - 0.5 * w[5]]))
    out.sum().backward()
    assert part.weights.table.weight.grad.flatten().nonzero().flatten().tolist() == [1, 2, 4, 5, 7, 8]


def test_numbers_and_sequences_enter_the_attention() -> None:
    net = spread(AutoInt(12, 4, dim=4, attention_dims=(8,), numeric_ids=[9], padding_ids=[10]))
    single, numeric = torch.tensor([[1, 5], [2, 6]]), torch.tensor([[1.5], [-2.0]]).double()
    sequences = torch.tensor([[[11, 11, 10]], [[11, 10, 10]]])
    with watch(net, keep="values") as log:
        net(single, numeric, sequences)
        net(single, 2 * numeric, sequences)
    first, second = log.values()["layers.0.gate"]
    assert first.shape == (2, 2, 4, 4)
    assert bool((first != second).any(-1).all())


def test_baselines_are_their_formulas() -> None:
    lr, fm = spread(FM(IDS)), spread(FM(IDS, 3))
    x = ids()
    assert isinstance(fm, FM)
    assert fm.embedding is not None
    first = fm.wide.weights.table.weight[x][..., 0].sum(1) + fm.bias
    e = fm.embedding.table.weight[x]
    pairs = sum((e[:, a] * e[:, b]).sum(-1) for a in range(FIELDS) for b in range(a))
    torch.testing.assert_close(fm(x), first + pairs)
    assert isinstance(lr, FM)
    torch.testing.assert_close(lr(x), lr.wide.weights.table.weight[x][..., 0].sum(1) + lr.bias)


def test_initial_weights_follow_the_dialects() -> None:
    options: dict[str, Any] = {"numeric_ids": [7], "padding_ids": [8], "zero_ids": [0], "use_wide": True}
    options |= {"dim": 64, "attention_dims": (96,), "dnn_hidden_units": (128,)}
    fuxi, tf = (AutoInt(2000, 12, dialect=dialect, **options) for dialect in ("fuxi", "tf"))
    for net, std in ((fuxi, 1e-4), (tf, 0.01)):
        table = net.embedding.table.weight
        assert float(table[10:].detach().std()) == pytest.approx(std, rel=0.02)
        assert not table[[0, 8]].any()
    assert float(fuxi.embedding.table.weight[7].std()) == pytest.approx(math.sqrt(2 / 65), rel=0.3)
    assert float(tf.embedding.table.weight[7].std()) == pytest.approx(0.01, rel=0.3)
    glorot = math.sqrt(2 / (64 + 96))
    for net in (fuxi, tf):
        assert float(net.layers[0].value.weight.std()) == pytest.approx(glorot, rel=0.05)
    # Uniform in the authors' code, normal in FuxiCTR's.
    assert float(tf.layers[0].value.weight.abs().max()) <= glorot * math.sqrt(3)
    assert float(fuxi.layers[0].value.weight.abs().max()) > glorot * math.sqrt(3)
    assert not fuxi.dnn[0].bias.any()  # type: ignore[index]
    assert float(tf.dnn[0].bias.std()) == pytest.approx(math.sqrt(2 / (12 * 64 + 128)), rel=0.3)  # type: ignore[index]
    assert float(AutoInt(2000, 12, embedding_std=0.1).embedding.table.weight.std()) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fields": 1}, "num_fields=1: fields combine, so there must be 2 or more"),
        ({"num_fields": 2, "numeric_ids": [0, 1], "padding_ids": [2]}, "numeric and sequences included"),
        ({"attention_dims": (6,), "num_heads": 4}, "attention_dim=6 is the width of all heads together"),
        ({"attention_dims": ()}, "give the width of one interacting layer"),
        ({"dialect": "torch"}, "one of paper, tf, fuxi"),
        ({"attention": "open"}, "learned, uniform, closed"),
        ({"attention": "closed", "use_residual": False}, "lets nothing through"),
        ({"zero_ids": [IDS]}, rf"zero_ids must be from 0 to {IDS - 1}; {IDS} is not"),
        ({"dnn_hidden_units": (4, 0)}, "widths must be 1 or more"),
        ({"dnn_hidden_units": (4, 3), "dnn_activations": ["relu"]}, "give one name, or one for each"),
        ({"dnn_hidden_units": (4,), "dnn_activations": "swishy"}, "activation 'swishy'"),
        ({"dim": 0}, "dim=0"),
    ],
)
def test_impossible_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoInt(**{"num_ids": IDS, "num_fields": FIELDS} | options)


def test_bad_rows_are_refused() -> None:
    net = AutoInt(IDS, FIELDS, numeric_ids=[3])
    good, numbers = ids()[:, : FIELDS - 1], torch.randn(7, 1)
    numbers[4, 0] = math.nan
    with pytest.raises(ValueError, match=r"numeric field 0 is nan in row 4; fill in missing numbers"):
        net(good, numbers)
    bad = good.clone()
    bad[2, 1] = IDS
    with pytest.raises(ValueError, match=rf"id {IDS} of field 1 is outside"):
        net(bad, torch.randn(7, 1))


def test_the_twin_has_uniform_attention() -> None:
    net, plain = model(), model(attention="uniform")
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".gate." not in k})
    x = ids()
    torch.testing.assert_close(twin(net)(x), plain(x))
    with force(net, "open"):
        torch.testing.assert_close(net(x), plain(x))
    assert not torch.allclose(net(x), plain(x))
    with pytest.raises(GateNotFoundError):
        named_gates(plain)


def test_the_closed_twin_is_additive_and_nothing_else_is() -> None:
    x = [ids(40)]
    assert crosses.additivity_error(model(attention="closed", use_wide=True), x) < 1e-12
    for attention in ("learned", "uniform"):
        assert crosses.additivity_error(model(attention=attention), x) > 0.1
    net = AutoInt(12, 3, attention="closed", embedding_std=1.0, numeric_ids=[9], padding_ids=[10])
    mixed = [torch.randint(0, 9, (20, 1)), torch.randn(20, 1), torch.randint(10, 12, (20, 1, 3))]
    assert crosses.additivity_error(net, mixed) < 1e-12


@pytest.mark.parametrize("dialect", DIALECTS)
def test_compiled_and_exported_models_agree(dialect: Dialect) -> None:
    net = spread(AutoInt(12, 3, dim=4, attention_dims=(16,), dialect=dialect, numeric_ids=[9], use_wide=True)).float()
    inputs = (torch.randint(0, 9, (6, 2)), torch.randn(6, 1))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(net, inputs, dynamic_shapes=({0: rows}, {0: rows})).module()
    for run in (torch.compile(net, backend="eager", fullgraph=True), exported):
        torch.testing.assert_close(run(*inputs), net(*inputs))
    more = (torch.randint(0, 9, (9, 2)), torch.randn(9, 1))
    torch.testing.assert_close(exported(*more), net(*more))


# -- what a person asks --------------------------------------------------------------------------------------


def test_the_report_ranks_pairs_by_mean_attention() -> None:
    net = model()
    batches = [(ids(20),), (ids(11),)]
    names = [f"f{m}" for m in range(FIELDS)]
    with watch(net, keep="values") as log, torch.no_grad():
        for batch in batches:
            net(*batch)
    values = torch.cat(log.values()["layers.1.gate"]).mean(0)
    torch.testing.assert_close(attention_maps(net, batches)["layers.1.gate"], values)
    report = attention_report(net, batches, names, layer=1, head=1, shown=3)
    score = (values[1] + values[1].T) / 2
    best = max(((a, b) for a in range(FIELDS) for b in range(a + 1, FIELDS)), key=lambda pair: float(score[pair]))
    assert len(report) == 3
    assert report[0]["pair"] == f"f{best[0]} x f{best[1]}"
    assert report[0]["mean"] == pytest.approx(float(score[best]))
    assert report[0]["times uniform"] == pytest.approx(float(score[best]) * FIELDS)
    assert report[0]["first reads second"] == pytest.approx(float(values[1][best]))
    assert [row["mean"] for row in report] == sorted((row["mean"] for row in report), reverse=True)
    over_heads = attention_report(net, batches, names, layer=1)
    assert len(over_heads) == FIELDS * (FIELDS - 1) // 2
    assert sum(row["mean"] for row in over_heads) == pytest.approx(
        float(values.mean(0).triu(1).add(values.mean(0).tril(-1).T).sum() / 2)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layer": 2}, "layer=2: there are 2"), ({"head": 2}, "head=2: there are 2"), ({}, "3 names for 5 fields")],
)
def test_the_report_refuses_what_is_not_there(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_report(model(), [(ids(),)], ["a", "b", "c"], **options)


# -- checkpoints ---------------------------------------------------------------------------------------------

EMBEDDING = "embedding_layer.embedding_layer.embedding_layers"


class PlainDice(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(units, eps=1e-9, affine=False)
        self.alpha = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.bn(x))
        return p * x + (1 - p) * self.alpha * x


class PlainFuxi(nn.Module):
    """FuxiCTR's model a field at a time, under its own key names; fields in its order."""

    def __init__(self, config: dict[str, Any], dnn: nn.Sequential | None) -> None:
        super().__init__()
        self.config = config
        features = config["features"]
        width, layers, dim = config["attention_dim"], config["attention_layers"], config["embedding_dim"]

        def tables(d: int) -> nn.Module:
            made: dict[str, nn.Module] = {name: nn.Linear(1, d, bias=False) for name in features["numeric"]}
            rows = features["categorical_vocab"] | (
                {features["sequence"][0]: features["sequence"][1]} if features["sequence"] else {}
            )
            made |= {name: nn.Embedding(count, d, padding_idx=0) for name, count in rows.items()}
            return nn.ModuleDict({"embedding_layer": nn.ModuleDict({"embedding_layers": nn.ModuleDict(made)})})

        self.embedding_layer = tables(dim)
        if config["use_wide"]:
            self.lr_layer = nn.ModuleDict({"embedding_layer": tables(1)})
        if dnn is not None:
            self.dnn = nn.ModuleDict({"mlp": dnn})
        self.self_attention = nn.ModuleList()
        for number in range(layers):
            before = dim if number == 0 else width
            parts: dict[str, nn.Module] = {f"W_{name}": nn.Linear(before, width, bias=False) for name in "qkv"}
            if config["use_residual"] and before != width:
                parts["W_res"] = nn.Linear(before, width, bias=False)
            if config["layer_norm"]:
                parts["layer_norm"] = nn.LayerNorm(width)
            self.self_attention.append(nn.ModuleDict(parts))
        fields = len(features["numeric"]) + len(features["categorical_vocab"]) + bool(features["sequence"])
        self.fc = nn.Linear(fields * width, 1)
        for name, parameter in self.double().named_parameters():
            nn.init.normal_(parameter, std=0.6)
            if "embedding_layers" in name and isinstance(self.get_submodule(name.rpartition(".")[0]), nn.Embedding):
                nn.init.zeros_(parameter[0])
        for name, buffer in self.named_buffers():
            if "running" in name:
                nn.init.uniform_(buffer, 0.5, 1.5)
        self.eval()

    def embed(self, holder: Any, inputs: dict[str, Tensor], mean: bool) -> Tensor:
        features, found = self.config["features"], []
        for name, table in holder["embedding_layer"]["embedding_layers"].items():
            x = inputs[name]
            if name in features["numeric"]:
                found.append(table(x[:, None]))
            elif features["sequence"] and name == features["sequence"][0]:
                e = table(x)
                items = (e.sum(-1) != 0).sum(1, keepdim=True) + 1e-12
                found.append(e.sum(1) / items if mean else e.sum(1))
            else:
                found.append(table(x))
        return torch.stack(found, 1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        e = x = self.embed(self.embedding_layer, inputs, mean=True)
        heads, outputs = self.config["num_heads"], {}
        for number, parts in enumerate(self.self_attention):
            assert isinstance(parts, nn.ModuleDict)
            query, key, value = (parts[f"W_{name}"](x).chunk(heads, -1) for name in "qkv")
            read = []
            for q, k, v in zip(query, key, value, strict=True):
                scores = q @ k.transpose(1, 2)
                read.append(torch.softmax(scores / q.shape[-1] ** 0.5 if self.config["use_scale"] else scores, -1) @ v)
            y = torch.cat(read, -1)
            if self.config["use_residual"]:
                y = y + (parts["W_res"](x) if "W_res" in parts else x)
            if "layer_norm" in parts:
                y = parts["layer_norm"](y)
            x = outputs[f"layer{number}"] = y.relu()
        logit = self.fc(x.flatten(1))
        if "dnn" in self._modules:
            logit = logit + self.dnn["mlp"](e.flatten(1))  # type: ignore[index,operator]
        if "lr_layer" in self._modules:
            logit = logit + self.embed(self.lr_layer["embedding_layer"], inputs, mean=False).sum(1)  # type: ignore[index]
        prob = logit.sigmoid()
        bce = F.binary_cross_entropy(prob, inputs["y"][:, None])
        tables, rest = [], []
        for name, parameter in self.named_parameters():
            (tables if "embedding_layers" in name else rest).append(parameter)
        total = bce
        for group, weights in ((tables, self.config["powers"][0]), (rest, self.config["powers"][1])):
            for power, weight in weights.items():
                total = total + sum(weight / power * torch.norm(p, power) ** power for p in group)
        return outputs | {"prob": prob, "bce": bce, "loss_total": total}


CASES: dict[str, dict[str, Any]] = {
    "sequence, activations by layer, l1_l2": {
        "num_heads": 2,
        "use_residual": True,
        "use_scale": True,
        "layer_norm": True,
        "use_wide": True,
        "dnn_hidden_units": [5, 4],
        "dnn_activations": ["Dice", "PReLU"],
        "net_dropout": 0.2,
        "batch_norm": True,
        "embedding_regularizer": "l1_l2(0.01,0.02)",
        "net_regularizer": "l1(0.003)",
        "features": {"numeric": ["n"], "categorical_vocab": {"a": 5, "b": 6}, "sequence": ["s", 7, 4]},
    },
    "no residual, no numbers, heads wider than the embeddings": {
        "num_heads": 1,
        "use_residual": False,
        "use_scale": False,
        "layer_norm": False,
        "use_wide": False,
        "dnn_hidden_units": [5, 4],
        "dnn_activations": [None, "Tanh"],
        "net_dropout": 0.0,
        "batch_norm": False,
        "embedding_regularizer": None,
        "net_regularizer": 0.01,
        "features": {"numeric": [], "categorical_vocab": {"a": 5, "b": 6}, "sequence": ["s", 7, 4]},
    },
    "as wide as the embeddings, numbers alone": {
        "num_heads": 4,
        "attention_dim": 4,
        "attention_layers": 3,
        "use_residual": True,
        "use_scale": False,
        "layer_norm": True,
        "use_wide": True,
        "dnn_hidden_units": [],
        "dnn_activations": "relu",
        "net_dropout": 0.0,
        "batch_norm": False,
        "embedding_regularizer": "l2(0.1)",
        "net_regularizer": None,
        "features": {"numeric": ["p", "q", "r"], "categorical_vocab": {}, "sequence": None},
    },
}
POWERS = {
    "l1_l2(0.01,0.02)": {1: 0.01, 2: 0.02},
    "l1(0.003)": {1: 0.003},
    "l2(0.1)": {2: 0.1},
    0.01: {2: 0.01},
    None: {},
}


def plain_dnn(case: str) -> nn.Sequential | None:
    inputs = 4 * 4
    if case.startswith("sequence"):
        first = [nn.Linear(inputs, 5), nn.BatchNorm1d(5), PlainDice(5), nn.Dropout(0.2)]
        second = [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.PReLU(4), nn.Dropout(0.2)]
        return nn.Sequential(*first, *second, nn.Linear(4, 1))
    if case.startswith("no residual"):
        return nn.Sequential(nn.Linear(3 * 4, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    return None


def plain_case(case: str) -> tuple[dict[str, Any], PlainFuxi, dict[str, Tensor]]:
    config = {"embedding_dim": 4, "attention_dim": 8, "attention_layers": 2, "learning_rate": 1e-3} | CASES[case]
    powers = [POWERS[config[f"{part}_regularizer"]] for part in ("embedding", "net")]
    net = PlainFuxi(config | {"powers": powers}, plain_dnn(case))
    features = config["features"]
    inputs: dict[str, Tensor] = {name: torch.randn(9).double() for name in features["numeric"]}
    inputs |= {name: torch.randint(0, rows, (9,)) for name, rows in features["categorical_vocab"].items()}
    if features["sequence"]:
        name, rows, length = features["sequence"]
        inputs[name] = torch.randint(0, rows, (9, length))
        inputs[name][3] = 0
    return config, net, inputs | {"y": torch.randint(0, 2, (9,)).double()}


@pytest.mark.parametrize("case", CASES)
def test_any_fuxictr_model_is_reproduced_with_its_gradients(case: str) -> None:
    config, plain, inputs = plain_case(case)
    expected = plain(inputs)
    expected["loss_total"].backward()
    expected |= {f"grad.{name}": p.grad for name, p in plain.named_parameters()}
    got = ADAPTERS["model"](config, plain.state_dict(), inputs)
    assert set(expected) <= set(got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].detach(), value.detach(), rtol=1e-9, atol=1e-11, msg=name)


def test_fuxictr_defaults_are_an_autoint_plus() -> None:
    config = {"embedding_dim": 10, "attention_dim": 8, "attention_layers": 2, "num_heads": 1, "layer_norm": False}
    config |= {"use_residual": True, "use_scale": False, "use_wide": False, "powers": [{}, {}]}
    config["features"] = {"numeric": ["n"], "categorical_vocab": {"a": 5}, "sequence": None}
    units = (20, 64, 64, 64)
    hidden = [part for a, b in itertools.pairwise(units) for part in (nn.Linear(a, b), nn.ReLU())]
    plain = PlainFuxi(config, nn.Sequential(*hidden, nn.Linear(64, 1)))
    inputs = {"n": torch.randn(4).double(), "a": torch.tensor([1, 2, 0, 4]), "y": torch.ones(4).double()}
    got = ADAPTERS["model"]({"features": config["features"]}, plain.state_dict(), inputs)
    torch.testing.assert_close(got["prob"], plain(inputs)["prob"])


def test_an_adapter_refuses_what_it_does_not_know() -> None:
    for kind in ("model", "layer", "tf_layer"):
        with pytest.raises(ValueError, match="the adapter does not know"):
            ADAPTERS[kind]({"dropout_rates": 1}, {}, {})


def test_fuxictr_checkpoints_go_back_as_they_came() -> None:
    _, plain, inputs = plain_case("sequence, activations by layer, l1_l2")
    state = plain.state_dict()
    # Dropout has no tensors: a model loaded without it is the same.
    for dropout in (0.0, 0.2):
        net = from_authors(
            state, num_heads=2, use_scale=True, dropout=dropout, dnn_activations=["dice", "prelu"], sequences=["s"]
        )
        fields = FuxiFields.read(state, sequences=["s"])
        logit = net.eval()(*fields.inputs(inputs))
        torch.testing.assert_close(logit.sigmoid()[:, None], plain(inputs)["prob"])
    back = to_authors(net.state_dict(), fields)
    assert set(back) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value)
    assert fields.names == ("n", "a", "b", "s")
    assert fields.offsets == {"a": 0, "b": 5, "n": 11, "s": 12}


def test_rows_that_are_not_zero_are_no_padding() -> None:
    _, plain, inputs = plain_case("no residual, no numbers, heads wider than the embeddings")
    state = plain.state_dict()
    state[f"{EMBEDDING}.a.weight"][0] = 1.0
    net = from_authors(state, num_heads=1, use_residual=False, dnn_activations=[None, "tanh"], sequences=["s"])
    fields = FuxiFields.read(state, sequences=["s"])
    net(*fields.inputs(inputs | {"a": torch.zeros(9, dtype=torch.int64)})).sum().backward()
    assert bool(net.embedding.table.weight.grad[fields.offsets["a"]].any())  # type: ignore[index]
    assert not net.embedding.table.weight.grad[fields.offsets["b"]].any()  # type: ignore[index]


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    _, plain, inputs = plain_case("sequence, activations by layer, l1_l2")
    state = plain.state_dict()
    options: dict[str, Any] = {"num_heads": 2, "dnn_activations": ["dice", "prelu"], "sequences": ["s"]}
    for changed, own, message in (
        ({"x": torch.zeros(1)}, options, "it is no AutoInt network"),
        (state, options | {"sequences": ["t"]}, "differ in t; its fields are n, a, b, s"),
        (state, options | {"fields": ["n", "a", "s"]}, "differ in b"),
        (state, options | {"kinds": ["ids"]}, "of TensorFlow checkpoints"),
        (state, options | {"dnn_activations": "relu"}, "it would have 5"),
        (state | {f"{EMBEDDING}.a.weight": torch.zeros(5, 3)}, options, "unequal width need a projection"),
        ({k: v for k, v in state.items() if k != "fc.bias"}, options, "missing: fc.bias"),
    ):
        with pytest.raises(UserError, match=message):
            from_authors(changed, **own)
    with pytest.raises(ValueError, match="must divide by num_heads=3"):
        from_authors(state, **options | {"num_heads": 3})
    with pytest.raises(UserError, match=r"no W_v\.weight or v\.kernel"):
        layer_from_authors({"W_q.weight": torch.zeros(4, 4)}, num_heads=1)
    with pytest.raises(UserError, match=r"q\.gamma is not a tensor of a layer"):
        layer_from_authors({"q.kernel": torch.zeros(4, 4), "q.gamma": torch.zeros(4)}, num_heads=1)
    fields = FuxiFields.read(state, sequences=["s"])
    with pytest.raises(ValueError, match=r"field b has an id 6; its table has ids 0 .. 5"):
        fields.inputs(inputs | {"b": torch.full((9,), 6)})


def tensorflow(residual: bool, deep: bool, wide: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Variables of the authors' graph as its code makes them: 2 numbers, 2 ids, a genre; d = 3, blocks of 4 and 6."""
    state = {"feature_embeddings": torch.randn(12, 3).double(), "global_step": torch.tensor(7)}
    unnamed: list[Tensor] = []
    if deep:
        for number, (before, after) in enumerate(((5 * 3, 7), (7, 2))):
            unnamed += [torch.randn(before, after).double(), torch.randn(1, after).double()]
            state |= {
                f"bn_{number}/{part}": torch.rand(after).double() + 0.5
                for part in ("gamma", "beta", "moving_mean", "moving_variance")
            }
        state |= {"prediction_dense": torch.randn(2, 1).double(), "prediction_bias_dense": torch.randn(()).double()}
    dense = []
    for before, after in ((3, 4), (4, 6)):
        dense += [
            (torch.randn(before, after).double(), torch.randn(after).double()) for _ in range(4 if residual else 3)
        ]
        unnamed += [torch.randn(after).double(), torch.randn(after).double()]
    for number, (kernel, bias) in enumerate(dense):
        name = f"dense_{number}" if number else "dense"
        state |= {
            f"{name}/kernel": kernel,
            f"{name}/bias": bias,
            f"{name}/kernel/Adam": kernel,
            f"{name}/bias/Adam_1": bias,
        }
    state |= {f"Variable_{number}" if number else "Variable": value for number, value in enumerate(unnamed)}
    state |= {
        "prediction": torch.randn(5 * 6, 1).double(),
        "prediction_bias": torch.randn(()).double(),
        "beta1_power": torch.zeros(()),
    }
    if wide:
        state["feature_bias"] = torch.randn(12, 1).double()
    return state, ["numeric", "ids", "numeric", "ids", "sequences"]


@pytest.mark.parametrize(("residual", "deep", "wide"), [(True, True, True), (False, False, False), (True, False, True)])
def test_the_authors_variables_are_their_graph(residual: bool, deep: bool, wide: bool) -> None:
    state, kinds = tensorflow(residual, deep, wide)
    renamed = {f"{key}:0": value for key, value in state.items()}
    options: dict[str, Any] = {"num_heads": 2, "kinds": kinds, "numeric_ids": [4, 9], "padding_ids": [11]}
    net = from_authors(renamed, **options).eval()
    # index and value, as their feed has them: features 4 and 9 are numbers, genres are 5 and 6
    number = torch.randn(3, 2).double()
    index = torch.tensor([[4, 0, 9, 2], [4, 1, 9, 3], [4, 1, 9, 2]])
    value = torch.stack([number[:, 0], torch.ones(3), number[:, 1], torch.ones(3)], 1)
    genre, weight = (
        torch.tensor([[5, 6, 11], [6, 11, 11], [5, 5, 6]]),
        torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1]]),
    )
    table = state["feature_embeddings"]
    mean = (table[genre] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    e = x = torch.cat([table[index] * value[..., None], mean[:, None]], 1)
    roles = 4 if residual else 3
    for block in range(2):
        projected = []
        for role in range(roles):
            name = f"dense_{roles * block + role}" if roles * block + role else "dense"
            projected.append((x @ state[f"{name}/kernel"] + state[f"{name}/bias"]).relu())
        heads = [
            torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
            for q, k, v in zip(*(part.chunk(2, -1) for part in projected[:3]), strict=True)
        ]
        y = torch.cat(heads, -1)
        y = (y + projected[3] if residual else y).relu()
        first = (4 if deep else 0) + 2 * block
        beta, gamma = (state[f"Variable_{n}" if n else "Variable"] for n in (first, first + 1))
        x = gamma * (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-8).sqrt() + beta
    logit = x.flatten(1) @ state["prediction"] + state["prediction_bias"]
    if deep:
        h = e.flatten(1)
        for number_of in range(2):
            names = [f"Variable_{n}" if n else "Variable" for n in (2 * number_of, 2 * number_of + 1)]
            h = h @ state[names[0]] + state[names[1]]
            bn = {part: state[f"bn_{number_of}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")}
            h = ((h - bn["moving_mean"]) / (bn["moving_variance"] + 1e-3).sqrt() * bn["gamma"] + bn["beta"]).relu()
        logit = logit + h @ state["prediction_dense"] + state["prediction_bias_dense"]
    if wide:
        w = state["feature_bias"]
        logit = (
            logit + (w[index][..., 0] * value).sum(1, keepdim=True) + (w[genre][..., 0] * weight).sum(1, keepdim=True)
        )
    got = net(index[:, [1, 3]], number, genre[:, None])
    torch.testing.assert_close(got, logit[:, 0])
    for own, message in (
        ({"kinds": None}, "the checkpoint has 5 fields; numeric_ids must name 0"),
        ({"numeric_ids": [4]}, "numeric_ids must name 2 features"),
        ({"use_scale": True}, "always scales"),
    ):
        with pytest.raises(UserError, match=message):
            from_authors(state, **options | own)
    with pytest.raises(UserError, match="3 or 4 dense layers for each 2 vectors"):
        from_authors({k: v for k, v in state.items() if not k.startswith("dense_2/")}, **options)


# -- training ------------------------------------------------------------------------------------------------


SMALL = replace(
    AutoIntConfig(),
    data=ClickLogConfig(noise_values=20, train_rows=600, validation_rows=300, test_rows=300),
)
SMALL.train.epochs = 2


def fit(task: AutoIntTask, seed: int = 0) -> AutoIntTask:
    trainer = L.Trainer(
        max_epochs=task.train_config.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, task.data.train(100, seed), task.data.validation(300))
    task.eval()
    return task


def staged(arm: str, config: AutoIntConfig) -> AutoIntTask:
    data = SYSTEM.load_data(config, Source())
    torch.manual_seed(0)
    (stage,) = SYSTEM.stages(arm, SYSTEM.arms(config, data.spec)[arm](), config, data)
    task = stage().task
    assert isinstance(task, AutoIntTask)
    return task


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_penalties_are_trained_on_and_stay_out_of_the_reported_loss() -> None:
    task = staged("gated", replace(SMALL, embedding_regularizer=0.2, net_regularizer="l1(0.3)"))
    batch = next(iter(task.data.test(100)))
    loss, logits = task.step(batch)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, batch.label))
    torch.testing.assert_close(task.training_step(batch, 0), loss)
    (loss + regularization(task.model, embedding=0.2, net="l1(0.3)")).backward()
    right = [p.grad for p in task.model.parameters()]
    task.model.zero_grad()
    task.training_step(batch, 0).backward()
    task.on_before_optimizer_step(None)  # type: ignore[arg-type]
    torch.testing.assert_close([p.grad for p in task.model.parameters()], right)


def test_the_learning_rate_falls_after_each_epoch_without_a_better_auc() -> None:
    config = replace(SMALL, plateau=True, train=replace(SMALL.train, epochs=4, lr=1e-4))
    task = staged("gated", config)
    scores = iter((0.7, 0.8, 0.8, 0.6))
    task.derived = lambda metrics: {"log_loss": metrics["loss"], "auc": next(scores)}  # type: ignore[method-assign]
    rates = []
    task.on_train_epoch_start = lambda: rates.append(task.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign,union-attr]
    fit(task)
    rates.append(task.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 1e-5, 1e-6])
    with pytest.raises(ValueError, match="two rules for the learning rate"):
        SYSTEM.arms(replace(config, train=replace(config.train, schedule="cosine")), task.data.spec)


def test_first_order_weights_may_follow_their_plain_gradient() -> None:
    task = staged("gated", replace(SMALL, wide_lr=0.01, train=replace(SMALL.train, epochs=1)))
    assert isinstance(task.model, AutoInt)
    assert task.model.wide is not None
    weight = task.model.wide.weights.table.weight
    assert all(weight is not p for group in task.parameter_groups() for p in group["params"])
    seen: list[tuple[Tensor, Tensor]] = []
    task.on_after_backward = lambda: seen.append((weight.detach().clone(), weight.grad.clone()))  # type: ignore[method-assign,union-attr]
    fit(task)
    for (before, gradient), (after, _) in itertools.pairwise(seen):
        torch.testing.assert_close(after, before - 0.01 * gradient)
    assert len(seen) == 6
    assert bool(seen[0][1].any())


def test_arms_differ_only_in_the_attention() -> None:
    data = SYSTEM.load_data(SMALL, Source())
    arms = {name: build() for name, build in SYSTEM.arms(SMALL, data.spec).items()}
    assert list(arms) == ["gated", "ungated", "closed", "no_residual", "plus", "fm", "lr"]
    keys = {name: set(net.state_dict()) for name, net in arms.items()}
    gate = {"layers.0.gate.query.weight", "layers.0.gate.key.weight"}
    assert keys["gated"] - keys["ungated"] == gate
    assert keys["gated"] - keys["closed"] == gate | {"layers.0.value.weight"}
    assert keys["gated"] - keys["no_residual"] == {"layers.0.residual.weight"}
    assert keys["plus"] > keys["gated"]
    without = SYSTEM.arms(replace(SMALL, use_residual=False, dnn_hidden_units=(4,)), data.spec)
    assert list(without) == ["gated", "ungated", "fm", "lr"]
    with pytest.raises(ValueError, match="regularizer 'l3"):
        SYSTEM.arms(replace(SMALL, net_regularizer="l3(1)"), data.spec)


def test_what_is_measured_of_an_arm_is_an_intervention() -> None:
    task = fit(staged("gated", SMALL))
    measured = SYSTEM.measure("gated", task, SMALL, task.data, 0)
    assert set(measured) == {
        "additivity_error",
        "auc_heads_closed",
        "auc_attention_uniform",
        "auc_attention_shuffled",
        "pair_attention_times_uniform",
    }
    assert measured["additivity_error"] > 1e-3
    assert measured["auc_heads_closed"] == _auc(task, torch.zeros(1)) != _auc(task, lambda values: values)
    assert 0 < measured["pair_attention_times_uniform"] < 8
    assert set(task.figures()) >= {"Calibration (test)", "Attention between fields (test)"}
    closed = fit(staged("closed", SMALL))
    assert SYSTEM.measure("closed", closed, SMALL, closed.data, 0)["additivity_error"] < 1e-10
    with_dnn = replace(SMALL, dnn_hidden_units=(4,))
    assert "additivity_error" not in SYSTEM.measure("closed", closed, with_dnn, closed.data, 0)
    assert SYSTEM.measure("lr", staged("lr", SMALL), SMALL, closed.data, 0) == {}


def test_findings_are_the_fields_that_read_each_other_most() -> None:
    data = ClickLog(ClickLogConfig(train_rows=50, validation_rows=50, test_rows=50))
    config = AutoIntConfig()
    arms = SYSTEM.arms(config, data.spec)
    ((title, table),) = SYSTEM.findings(arms["gated"]().eval(), config, data).items()
    assert "read each other most" in title
    assert [row["mean"] for row in table] == sorted((row["mean"] for row in table), reverse=True)
    assert len(table) == 20
    assert SYSTEM.findings(arms["fm"](), config, data) == {}


def test_maps_of_many_fields_stand_below_each_other() -> None:
    def places(fields: int) -> list[tuple[float, float]]:
        maps = {f"layers.{i}.gate": torch.rand(2, fields, fields) for i in range(2)}
        figure = attention_figure(maps, [f"field {i}" for i in range(fields)])
        return [tuple(axes.get_subplotspec().get_geometry()[:2]) for axes in figure.axes if axes.images]

    assert places(8) == [(1, 2)] * 2
    assert places(40) == [(2, 1)] * 2


@pytest.mark.parametrize("numeric", ["bucket", "standardize"])
def test_a_users_table_with_numbers_and_sequences(tmp_path: Path, numeric: Any) -> None:
    draw = np.random.default_rng(0)
    rows = 1500
    price, city = draw.normal(size=rows), draw.choice(["Oslo", "Rome", "Lima"], rows)
    tags = ["|".join(draw.choice(["new", "sale", "old"], draw.integers(1, 4))) for _ in range(rows)]
    logit = 3 * price * np.where(city == "Rome", 1, -1) + np.array(["sale" in tag for tag in tags])
    table = pl.DataFrame(
        {"price": price, "city": city, "tags": tags, "bought": draw.random(rows) < 1 / (1 + np.exp(-logit))}
    )
    path = tmp_path / "shop.csv"
    table.write_csv(path)
    config = replace(SMALL, table=TableConfig(numeric=numeric), train=replace(SMALL.train, epochs=8))
    data = SYSTEM.load_data(config, Source(path, label="bought"))
    assert data.spec["num_numeric"] == (numeric == "standardize")
    assert not SYSTEM.trials_for(data.spec)
    net = SYSTEM.arms(config, data.spec)["gated"]()
    task = fit(AutoIntTask(net, config.train, data))
    assert "pair_attention_times_uniform" not in SYSTEM.measure("gated", task, config, data, 0)
    assert "Attention between fields (test)" in task.figures()
    scores = ClickPrediction.predict_file(net, data.spec, path, batch_size=400)["score"].to_numpy()
    label = table["bought"].to_numpy()
    # The signal is a product: what adds up over fields would be near 0.5.
    assert (scores[label][:, None] > scores[~label][None]).mean() > (0.75 if numeric == "standardize" else 0.6)


def test_a_table_with_one_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    pl.DataFrame({"city": ["a", "b"] * 50, "click": [0, 1, 1, 0] * 25}).write_csv(path)
    data = SYSTEM.load_data(SMALL, Source(path, label="click"))
    with pytest.raises(ValueError, match="num_fields=1: fields combine"):
        SYSTEM.arms(SMALL, data.spec)["gated"]()


# -- the claims ----------------------------------------------------------------------------------------------


def test_the_target_is_made_of_products_alone() -> None:
    (rows,) = crosses.draw(3, (200_000,))
    values = (rows.ids - 8 * torch.arange(6)).numpy()
    assert values.min() == 0
    assert values.max() == 7
    label = rows.label.numpy()
    for field in range(6):
        means = np.array([label[values[:, field] == v].mean() for v in range(8)])
        np.testing.assert_allclose(means, 0.5, atol=0.015)
    cells = values[:, 0] * 8 + values[:, 1]
    rates = np.array([label[cells == c].mean() for c in range(64)])
    low, high = rates[rates < 0.5], rates[rates > 0.5]
    assert len(low) == len(high) == 32
    expected = np.mean([1 / (1 + math.exp(-x)) for x in (3.0, 1.0)])
    np.testing.assert_allclose(high, expected, atol=0.05)
    np.testing.assert_allclose(low, 1 - expected, atol=0.05)
    assert torch.equal(crosses.draw(3, (50,))[0].ids, crosses.draw(3, (50,))[0].ids)
    assert not torch.equal(crosses.draw(3, (50,))[0].ids, crosses.draw(4, (50,))[0].ids)


def test_fitting_keeps_the_best_weights_and_stops_in_time() -> None:
    train, validation, _ = crosses.draw(0, (500, 500, 10))

    class Scripted(nn.Module):
        """Its validation AUC follows a script; its weight counts the epochs."""

        def __init__(self, scores: list[float]) -> None:
            super().__init__()
            self.epoch = nn.Parameter(torch.zeros(()), requires_grad=False)
            self.weight = nn.Parameter(torch.zeros(()))
            self.scores = scores

        def forward(self, ids: Tensor) -> Tensor:
            if self.training:
                return self.weight * torch.ones(len(ids))
            self.epoch += 1
            right = round(self.scores[int(self.epoch) - 1] * len(ids))
            sign = torch.where(torch.arange(len(ids)) < right, 1.0, -1.0)
            return (2 * validation.label - 1) * sign

    net = Scripted([0.6, 0.9, 0.8, 0.7, 1.0])
    crosses.fit(net, train, validation)
    assert float(net.epoch) == 2  # the best; the fifth epoch was never reached


def products(**changes: list[float]) -> Results:
    usual = {
        "learned_auc": [0.85, 0.9, 0.88],
        "uniform_auc": [0.851, 0.899, 0.88],
        "closed_auc": [0.498, 0.502, 0.5],
        "forced_closed_auc": [0.49, 0.5, 0.5],
        "closed_additivity_error": [1e-9, 2e-9, 0.0],
        "pair_attention": [0.22, 0.24, 0.23],
    } | changes
    trials = [dict(zip(usual, values, strict=True)) for values in zip(*usual.values(), strict=True)]
    return Results([], {"products": trials})


def verdicts(results: Results) -> dict[str, list[str]]:
    judged = SYSTEM.claims(SMALL, results)
    return {k: [e.verdict for e in (v if isinstance(v, list) else [v])] for k, v in judged.items()}


def test_claims_are_judged_on_the_target_of_products() -> None:
    assert set(verdicts(products())) == {claim.id for claim in card("autoint").claims}
    assert {v for one in verdicts(products()).values() for v in one} == {"holds"}
    assert verdicts(products(learned_auc=[0.85, 0.79, 0.88]))["interaction"] != ["holds", "holds"]
    assert verdicts(products(closed_auc=[0.5, 0.55, 0.5]))["interaction"][1] != "holds"
    assert verdicts(products(closed_additivity_error=[0.0, 1.0, 0.0]))["additive"] != ["holds"]
    assert verdicts(products(uniform_auc=[0.80, 0.85, 0.83]))["learned_attention"] == ["does not hold", "holds"]
    assert verdicts(products(pair_attention=[0.15, 0.14, 0.15]))["explainable"] == ["does not hold"]
    assert verdicts(products(forced_closed_auc=[0.9, 0.95, 0.93]))["intervention"] == ["does not hold"]


def test_claims_on_the_users_table_are_those_that_need_no_truth() -> None:
    cells = [
        {"arm": arm, "seed": seed, "metrics": {"auc": 0.8 + seed * 1e-4} | more}
        for seed in range(3)
        for arm, more in (
            ("gated", {"auc_heads_closed": 0.7 + seed * 1e-4}),
            ("ungated", {}),
            ("closed", {"additivity_error": 1e-12}),
        )
    ]
    judged = verdicts(Results(cells, {}))
    assert judged == {"additive": ["holds"], "intervention": ["holds"], "learned_attention": ["holds", "holds"]}
    assert not SYSTEM.claims(SMALL, Results([], {}))


def test_published_settings() -> None:
    assert PUBLISHED["criteo"].attention_dims == (64,) * 5
    assert PUBLISHED["frappe"].embedding_regularizer == 0.05
    assert PUBLISHED["avazu"].use_residual is False
    assert PUBLISHED["authors_criteo"].table.min_count == 11
    data = ClickLog(SMALL.data)
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            net = SYSTEM.arms(config, data.spec)["gated"]()
        assert isinstance(net, AutoInt), name
        assert net.layers[0].norm is None or config.layer_norm
    with torch.device("meta"):
        criteo = VARIANTS["autoint_criteo_authors"](num_ids=1000)
    layers = [4 * (a * 64 + 64) + 2 * 64 for a in (16, 64, 64)]
    assert sum(p.numel() for p in criteo.parameters()) == 1000 * 16 + sum(layers) + 39 * 64 + 1
