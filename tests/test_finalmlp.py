"""FinalMLP: networks against a plain reading of the authors' layout, gates, plateaus, and the system end to end."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from penstock.data.base import Source
from penstock.errors import UserError
from penstock.gates import Table, force, twin, watch
from penstock.interop.create import load_authors
from penstock.lab.results import Results
from penstock.systems.recommendation.finalmlp.checkpoint import Features, features_of, from_authors, to_authors
from penstock.systems.recommendation.finalmlp.experiment import (
    PUBLISHED,
    SYSTEM,
    FinalMLPConfig,
    JointTask,
    StreamConfig,
    contexts_of,
    gate_gradients,
    gate_report,
    interventions,
    shift_report,
    value_figure,
)
from penstock.systems.recommendation.finalmlp.model import (
    BilinearFusion,
    DualMLP,
    Embedding,
    FinalMLP,
    Perceptron,
)
from penstock.systems.recommendation.finalmlp.products import ProductLog, ProductLogConfig
from penstock.systems.recommendation.finalmlp.vocabulary import Vocabulary
from penstock.tasks.base import Training
from penstock.tasks.click_prediction import ClickPrediction
from tests.golden_adapters.finalmlp import ADAPTERS

GOLDEN = Path(__file__).parent / "golden" / "finalmlp"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def model(**options: Any) -> FinalMLP:
    """A small network in float64 whose weights, biases included, are spread."""
    usual: dict[str, Any] = {"dim": 4, "hidden_1": (12, 8), "hidden_2": (16, 6), "gate_hidden": (5,), "num_heads": 2}
    net = FinalMLP([9, 7, 5, 1, 6], **{"num_numeric": 1, "num_sequences": 1} | usual | options).double().eval()
    spread(net)
    return net


def spread(net: nn.Module) -> None:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)


def rows(count: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Global ids of three fields, a number and a sequence of the fields of `model`; zeros of each among them."""
    ids = torch.stack([torch.randint(o, o + n, (count,)) for o, n in ((0, 9), (9, 7), (16, 5))], 1)
    return ids, torch.randn(count, 1).double(), torch.randint(22, 28, (count, 1, 3))


# -- hidden cases: any option of the authors' networks against a plain reading ---------------------------------

CASE: dict[str, Any] = {
    "learning_rate": 0.001,
    "embedding_dim": 4,
    "mlp1_hidden_units": [12, 8],
    "mlp1_hidden_activations": "relu",
    "mlp1_dropout": 0.1,
    "mlp1_batch_norm": True,
    "mlp2_hidden_units": [16, 6],
    "mlp2_hidden_activations": "relu",
    "mlp2_dropout": 0.0,
    "mlp2_batch_norm": False,
    "use_fs": True,
    "fs_hidden_units": [10, 7],
    "fs1_context": ["user"],
    "fs2_context": ["item", "ctx"],
    "num_heads": 2,
    "embedding_regularizer": 0.001,
    "net_regularizer": 0,
    "features": {"numeric": ["n1", "n2"], "categorical_vocab": {"user": 9, "item": 7, "ctx": 5}, "sequence": None},
}
SEQUENCE = CASE["features"] | {"sequence": ["hist", 8, 4]}


class Authors:
    """The authors' layout: a state dict drawn at random and the network's outputs, written from the equations."""

    def __init__(self, config: dict[str, Any], *, dual: bool = False) -> None:
        self.config, self.dual = config, dual
        told, dim = config["features"], config["embedding_dim"]
        self.sequence = told["sequence"][0] if told["sequence"] else None
        self.names = [*told["numeric"], *told["categorical_vocab"], *([self.sequence] if self.sequence else [])]
        self.sizes = told["categorical_vocab"] | ({self.sequence: told["sequence"][1]} if self.sequence else {})
        self.state: dict[str, Tensor] = {}
        width = dim * len(self.names)
        self._tables("embedding_layer.embedding_layer.embedding_layers.", self.names, dim)
        for n in (1, 2):
            self._stream(n, width)
            if config["use_fs"]:
                context = [name for name in self.names if name in config[f"fs{n}_context"]]
                if context:
                    self._tables(f"fs_module.fs{n}_ctx_emb.embedding_layer.embedding_layers.", context, dim)
                else:
                    self.state[f"fs_module.fs{n}_ctx_bias"] = self._draw(1, dim)
                widths = [dim * max(len(context), 1), *config["fs_hidden_units"], width]
                for place, (a, b) in enumerate(itertools.pairwise(widths)):
                    self._linear(f"fs_module.fs{n}_gate.mlp.{2 * place}", a, b)
        if not dual:
            p, q = (config[f"mlp{n}_hidden_units"][-1] for n in (1, 2))
            self._linear("fusion_module.w_x", p, 1)
            self._linear("fusion_module.w_y", q, 1)
            self.state["fusion_module.w_xy"] = self._draw(p * q // config["num_heads"], 1)
        for key, value in self.state.items():
            if value.is_floating_point() and "running" not in key:
                value.requires_grad_()

    @staticmethod
    def _draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64) * 0.4

    def _linear(self, key: str, a: int, b: int) -> None:
        self.state[f"{key}.weight"], self.state[f"{key}.bias"] = self._draw(b, a), self._draw(b)

    def _tables(self, prefix: str, names: list[str], dim: int) -> None:
        for name in names:
            if name in self.sizes:
                table = self._draw(self.sizes[name], dim)
                table[0] = 0
            else:
                table = self._draw(dim, 1)
            self.state[f"{prefix}{name}.weight"] = table

    def _per_layer(self, n: int, what: str) -> list[Any]:
        value, count = self.config[f"mlp{n}_{what}"], len(self.config[f"mlp{n}_hidden_units"])
        return value if isinstance(value, list) else [value] * count

    def _stream(self, n: int, width: int) -> None:
        """Draws the layers of a stream and keeps, in order, what each does."""
        layers: list[tuple[str, str]] = []

        def add(kind: str) -> str:
            layers.append((kind, f"mlp{n}.mlp.{len(layers)}"))
            return layers[-1][1]

        for units, act, rate in zip(
            self.config[f"mlp{n}_hidden_units"],
            self._per_layer(n, "hidden_activations"),
            self._per_layer(n, "dropout"),
            strict=True,
        ):
            self._linear(add("linear"), width, units)
            norms = [add("norm")] if self.config[f"mlp{n}_batch_norm"] else []
            if act is not None:
                key = add(act.lower())
                if act.lower() == "prelu":
                    self.state[f"{key}.weight"] = self._draw(units)
                if act.lower() == "dice":
                    self.state[f"{key}.alpha"] = self._draw(units)
                    norms.append(f"{key}.bn")
            for key in norms:
                self.state[f"{key}.running_mean"] = self._draw(units)
                self.state[f"{key}.running_var"] = self._draw(units).square() + 0.5
                self.state[f"{key}.num_batches_tracked"] = torch.tensor(3)
                if not key.endswith(".bn"):
                    self.state[f"{key}.weight"], self.state[f"{key}.bias"] = self._draw(units), self._draw(units)
            if rate > 0:
                add("dropout")
            width = units
        if self.dual:
            self._linear(add("linear"), width, 1)
        setattr(self, f"layers{n}", layers)

    def inputs(self, count: int = 9) -> dict[str, Tensor]:
        drawn = {name: torch.randn(count).double() for name in self.config["features"]["numeric"]}
        drawn |= {
            name: torch.randint(0, n, (count,)) for name, n in self.config["features"]["categorical_vocab"].items()
        }
        if self.sequence:
            length = self.config["features"]["sequence"][2]
            drawn[self.sequence] = torch.randint(0, self.sizes[self.sequence], (count, length))
            drawn[self.sequence][0] = 0
        return drawn | {"y": torch.randint(0, 2, (count,)).double()}

    def embed(self, prefix: str, names: list[str], x: dict[str, Tensor]) -> Tensor:
        parts = []
        for name in names:
            table = self.state[f"{prefix}{name}.weight"]
            if name == self.sequence:
                e = table[x[name]]
                kept = (e.sum(-1) != 0).double()
                parts.append(e.sum(1) / (kept.sum(1, keepdim=True) + 1e-12))
            elif name in self.sizes:
                parts.append(table[x[name]])
            else:
                parts.append(x[name][:, None] * table[:, 0])
        return torch.cat(parts, 1)

    def run(self, n: int, h: Tensor) -> Tensor:
        s = self.state
        plain = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": nn.functional.gelu}
        for kind, key in getattr(self, f"layers{n}"):
            if kind == "linear":
                h = h @ s[f"{key}.weight"].T + s[f"{key}.bias"]
            elif kind == "norm":
                h = (h - s[f"{key}.running_mean"]) / (s[f"{key}.running_var"] + 1e-5).sqrt()
                h = h * s[f"{key}.weight"] + s[f"{key}.bias"]
            elif kind == "softmax":
                h = h.exp() / h.exp().sum(1, keepdim=True)
            elif kind == "prelu":
                h = torch.where(h > 0, h, s[f"{key}.weight"] * h)
            elif kind == "dice":
                z = (h - s[f"{key}.bn.running_mean"]) / (s[f"{key}.bn.running_var"] + 1e-9).sqrt()
                p = 1 / (1 + (-z).exp())
                h = h * (p + s[f"{key}.alpha"] * (1 - p))
            elif kind != "dropout":
                h = plain[kind](h)
        return h

    def outputs(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        s, c = self.state, self.config
        e = self.embed("embedding_layer.embedding_layer.embedding_layers.", self.names, x)
        out: dict[str, Tensor] = {}
        streams = []
        for n in (1, 2):
            h = e
            if c["use_fs"]:
                context = [name for name in self.names if name in c[f"fs{n}_context"]]
                if context:
                    g = self.embed(f"fs_module.fs{n}_ctx_emb.embedding_layer.embedding_layers.", context, x)
                else:
                    g = s[f"fs_module.fs{n}_ctx_bias"].expand(len(e), -1)
                for place in range(len(c["fs_hidden_units"]) + 1):
                    g = torch.relu(g) if place else g
                    key = f"fs_module.fs{n}_gate.mlp.{2 * place}"
                    g = g @ s[f"{key}.weight"].T + s[f"{key}.bias"]
                out[f"half_gate{n}"] = 1 / (1 + (-g).exp())
                h = 2 * out[f"half_gate{n}"] * e
                if n == 1:
                    out["gated_feat1"] = h
            streams.append(self.run(n, h))
        if self.dual:
            y = (streams[0] + streams[1])[:, 0]
        else:
            out |= {"stream1": streams[0], "stream2": streams[1]}
            heads = c["num_heads"]
            p, q = streams[0].shape[1] // heads, streams[1].shape[1] // heads
            w = s["fusion_module.w_xy"].view(heads, p, q)
            y = s["fusion_module.w_x.bias"] + s["fusion_module.w_y.bias"]
            y = y + streams[0] @ s["fusion_module.w_x.weight"][0] + streams[1] @ s["fusion_module.w_y.weight"][0]
            for head in range(heads):
                a, b = streams[0][:, head * p : head * p + p], streams[1][:, head * q : head * q + q]
                y = y + ((a @ w[head]) * b).sum(1)
        prob = 1 / (1 + (-y).exp())
        bce = -(x["y"] * prob.log() + (1 - x["y"]) * (1 - prob).log()).mean()
        total = bce + self.penalty("embedding_regularizer", True) + self.penalty("net_regularizer", False)
        total.backward()
        grads = {f"grad.{k}": self._unpadded(k, v) for k, v in s.items() if v.requires_grad}
        return out | {"prob": prob[:, None], "bce": bce, "loss_total": total} | grads

    def _unpadded(self, key: str, value: Tensor) -> Tensor:
        """The gradient as an embedding with padding row 0 has it."""
        grad = torch.zeros_like(value) if value.grad is None else value.grad.clone()
        if key.split(".")[-2] in self.sizes:
            grad[0] = 0
        return grad

    def penalty(self, name: str, tables: bool) -> Tensor:
        terms = {
            None: [],
            0: [],
            0.001: [(2, 0.001)],
            "l1(0.01)": [(1, 0.01)],
            "l1_l2(0.01,0.02)": [(1, 0.01), (2, 0.02)],
        }
        weights = [v for k, v in self.state.items() if v.requires_grad and ("embedding_layers" in k) == tables]
        total = torch.zeros((), dtype=torch.float64)
        for power, weight in terms[self.config[name]]:
            for w in weights:
                total = total + weight / power * w.abs().pow(power).sum()
        return total


VARIED: dict[str, dict[str, Any]] = {
    "sequence in tables and context": {"features": SEQUENCE, "fs1_context": ["hist"], "fs2_context": ["ctx", "hist"]},
    "numeric contexts out of order": {"fs1_context": ["ctx", "n2"], "fs2_context": ["n1", "user", "n2"]},
    "all kinds": {
        "features": SEQUENCE,
        "fs1_context": ["hist", "user", "n1"],
        "fs2_context": [],
        "fs_hidden_units": [],
    },
    "one linear map": {"fs_hidden_units": [], "fs1_context": [], "fs2_context": ["n1", "item"]},
    "no gates": {"use_fs": False, "fs1_context": [], "fs2_context": [], "net_regularizer": 0.001},
    "prelu and dice": {"mlp1_hidden_activations": ["PReLU", "dice"], "mlp2_hidden_activations": ["Dice", "prelu"]},
    "parts left out": {
        "mlp1_hidden_activations": None,
        "mlp1_batch_norm": False,
        "mlp1_dropout": 0,
        "mlp2_hidden_activations": [None, "GELU"],
        "mlp2_dropout": [0.2, 0.0],
    },
    "other activations": {
        "mlp1_hidden_activations": ["Tanh", "SIGMOID"],
        "mlp2_hidden_activations": "softmax",
        "mlp2_batch_norm": True,
    },
    "regularisers": {"embedding_regularizer": "l1_l2(0.01,0.02)", "net_regularizer": "l1(0.01)", "features": SEQUENCE},
    "deep and many heads": {"mlp1_hidden_units": [7, 5, 6], "mlp2_hidden_units": [9], "num_heads": 3},
    "width one": {"embedding_dim": 1},
    "no numbers": {"features": CASE["features"] | {"numeric": []}},
    "no regulariser": {"embedding_regularizer": None, "net_regularizer": None},
}


@pytest.mark.parametrize("name", VARIED)
def test_any_network_of_the_authors_is_reproduced(name: str) -> None:
    _compare("model", Authors(CASE | VARIED[name]))


@pytest.mark.parametrize("name", ["prelu and dice", "parts left out", "regularisers", "deep and many heads"])
def test_any_dual_mlp_of_the_authors_is_reproduced(name: str) -> None:
    gates = ("use_fs", "fs_hidden_units", "fs1_context", "fs2_context", "num_heads")
    config = {k: v for k, v in (CASE | VARIED[name]).items() if k not in gates}
    authors = Authors(config | {"use_fs": False}, dual=True)
    authors.config = config | {"use_fs": False}
    _compare("dualmlp", authors, drop=("use_fs",))


def _compare(kind: str, authors: Authors, drop: tuple[str, ...] = ()) -> None:
    inputs = authors.inputs()
    expected = authors.outputs(inputs)
    config = {k: v for k, v in authors.config.items() if k not in drop}
    got = ADAPTERS[kind](config, {k: v.detach() for k, v in authors.state.items()}, inputs)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key].detach(), value.detach(), rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(("outputs", "heads"), [(1, 1), (3, 2), (2, 4)])
def test_fusion_follows_the_authors_views(outputs: int, heads: int) -> None:
    net = BilinearFusion(12, 8, output_dim=outputs, num_heads=heads).double()
    spread(net)
    x, y = torch.randn(7, 12).double(), torch.randn(7, 8).double()
    w = net.w_xy.view(heads, 12 // heads, 8 // heads * outputs)
    left = x.view(7, heads, 1, -1) @ w
    joined = left.view(7, heads, outputs, -1) @ y.view(7, heads, -1, 1)
    torch.testing.assert_close(net(x, y), net.w_x(x) + net.w_y(y) + joined.sum(1)[..., 0])


def test_golden_vocabulary() -> None:
    # tests/test_golden.py makes tensors of all arrays, which text cannot be.
    case = json.loads((GOLDEN / "vocab.json").read_text())
    arrays = np.load(GOLDEN / "vocab.npz", allow_pickle=False)
    inputs = {k.removeprefix("in."): arrays[k] for k in arrays.files if k.startswith("in.")}
    got = ADAPTERS["vocab"](case["config"], {}, inputs)
    expected = {k.removeprefix("out.") for k in arrays.files if k.startswith("out.")}
    assert got.keys() == expected
    for key in expected:
        assert np.asarray(got[key]).tolist() == arrays[f"out.{key}"].tolist(), key


def test_vocabulary_counts_cuts_and_pads_as_the_authors() -> None:
    words = ["b", "", "", "", "a", "b", "c", "a", "d"]
    assert Vocabulary.fit(words).words == ("b", "a", "c", "d")
    assert Vocabulary.fit(words, min_count=2).words == ("b", "a")
    assert Vocabulary.fit(words, max_words=3).words == ("b", "a"), "a missing value holds its place"
    assert Vocabulary.fit(words, missing="b").encode(["b", "", "x"]).tolist() == [5, 1, 5]
    lists = ["a^b^b", "c", "", "a^^d^b^e"]
    pre = Vocabulary.fit(lists, separator="^")
    assert (pre.words, pre.max_length) == (("b", "a", "c", "d", "e"), 5)
    assert pre.encode(["c^x", "", "a^^b"]).tolist() == [[0, 0, 0, 3, 6], [0] * 5, [0, 0, 2, 0, 1]]
    short = Vocabulary.fit(lists, separator="^", max_length=2)
    assert short.encode(["a^b^c"]).tolist() == [[1, 3]]
    post = Vocabulary.fit(lists, separator="^", max_length=2, padding="post")
    assert post.encode(["a^b^c", "c"]).tolist() == [[2, 1], [3, 0]]
    with pytest.raises(ValueError, match="padding='left'"):
        Vocabulary.fit(lists, separator="^", padding="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none below 0"):
        Vocabulary.fit(lists, separator="^", max_length=-1)


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True, "input"])
def test_checkpoints_go_out_and_in_again(norm: Any) -> None:
    net = model(batch_norm_1=norm, context_1=(0, 4), context_2=(3,))
    features = Features(("hist", "a", "n", "b", "c"), numeric=("n",), sequences=("hist",))
    assert features.ours == ("a", "b", "c", "n", "hist")
    state = to_authors(net, features)
    order = tuple(features.names)
    assert tuple(features_of(state, sequences=["hist"]).names) == order, "tables stand in the order of the list"
    again = load_authors("finalmlp", state, sequences=["hist"])
    assert isinstance(again, FinalMLP)
    x = rows()
    torch.testing.assert_close(again.eval()(*x), net(*x))
    other = to_authors(net, Features(("a", "b", "c", "n", "hist"), ("n",), ("hist",)))
    assert not torch.equal(other["fs_module.fs1_gate.mlp.2.weight"], state["fs_module.fs1_gate.mlp.2.weight"])


def test_wrong_checkpoints_are_refused() -> None:
    net = model()
    features = Features(("a", "b", "c", "n", "hist"), ("n",), ("hist",))
    state = to_authors(net, features)
    with pytest.raises(UserError, match="has no layers"):
        from_authors({"weight": torch.zeros(1)})
    with pytest.raises(UserError, match="has no tables"):
        from_authors({"mlp1.mlp.0.weight": torch.zeros(2, 2), "mlp2.mlp.0.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="fields names a, b; the checkpoint has tables of"):
        from_authors(state, fields=["a", "b"])
    with pytest.raises(UserError, match="sequences names z"):
        from_authors(state, sequences=["z"])
    with pytest.raises(UserError, match="do not divide"):
        from_authors({k: v for k, v in state.items() if not k.endswith((".b.weight", ".c.weight"))})
    with pytest.raises(UserError, match=r"the table of b is \(7, 3\)"):
        from_authors(state | {"embedding_layer.embedding_layer.embedding_layers.b.weight": torch.zeros(7, 3).double()})
    with pytest.raises(UserError, match=r"missing: stream_1\.0\.bias"):
        from_authors({k: v for k, v in state.items() if k != "mlp1.mlp.0.bias"}, sequences=["hist"])


# -- gates ---------------------------------------------------------------------------------------------------


def test_gates_start_at_one_and_open_is_the_ungated_network() -> None:
    fresh = FinalMLP([5, 6], dim=3, context_1=(0,))
    with watch(fresh, keep="values") as log:
        fresh(torch.tensor([[1, 7]]))
    for values in log.values().values():
        torch.testing.assert_close(values[0], torch.ones_like(values[0]), rtol=1e-3, atol=0)
    net, plain = model(context_1=(0,)), model(gated=False)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("gate_")})
    x = rows()
    with force(net, "open"):
        torch.testing.assert_close(net(*x), plain(*x))
    torch.testing.assert_close(twin(net)(*x), plain(*x))
    assert not torch.allclose(net(*x), plain(*x))


def test_shut_gates_leave_a_constant() -> None:
    net = model(context_1=(0,), context_2=(4,))
    with force(net, "closed"):
        out = net(*rows())
    torch.testing.assert_close(out, out[:1].expand(10))


def test_only_its_context_moves_a_gate() -> None:
    net = model(context_1=(1, 3), context_2=(4,))
    ids, numeric, sequences = rows()
    assert net.gate_1 is not None
    assert net.gate_2 is not None
    first, second = net.gate_1(ids, numeric, sequences), net.gate_2(ids, numeric, sequences)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 9
    assert torch.equal(net.gate_1(other, numeric, sequences), first)
    assert not torch.allclose(net.gate_1(ids, numeric + 1, sequences), first)
    assert torch.equal(net.gate_2(other, numeric + 1, sequences), second)
    assert bool(((first > 0) & (first < 2)).all())
    with watch(net) as log:
        net(ids, numeric, sequences)
    assert log["gate_1"].inputs == 10
    assert log["gate_1"].summary()["units"] == 20


def test_a_gate_without_context_is_static_and_scales_the_weights_as_it_would_the_inputs() -> None:
    net = model()
    ids, numeric, sequences = rows()
    with watch(net, keep="values") as log:
        out = net(ids, numeric, sequences)
    assert log["gate_1"].static
    g1, g2 = (log.values()[name][0] for name in ("gate_1", "gate_2"))
    e = net.embedding(ids, numeric, sequences).flatten(1)
    torch.testing.assert_close(out, net.fusion(net.stream_1(e * g1), net.stream_2(e * g2))[:, 0])
    normed = Perceptron(4, (3,), batch_norm="input").double().eval()
    x, g = torch.randn(5, 4).double(), torch.rand(4).double()
    torch.testing.assert_close(normed(x, g), normed(x * g))


def test_the_authors_gate_without_context_learns_nothing_but_its_last_bias() -> None:
    def trained(**options: Any) -> tuple[FinalMLP, dict[str, Tensor]]:
        torch.manual_seed(0)
        net = FinalMLP([9, 7], dim=4, hidden_1=(6,), hidden_2=(6,), gate_hidden=(5,), **options)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        x = torch.stack([torch.randint(0, 9, (64,)), torch.randint(9, 16, (64,))], 1)
        y = (x[:, 0] % 2).float()
        with watch(net) as log:
            for _ in range(50):
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
                optimizer.step()
        named = log.without_gradient()
        assert bool(named) == (not options)
        if named:
            last = {f"gate_{n}.net.2.bias" for n in (1, 2)}
            assert set(named) == {k for k, _ in net.named_parameters() if k.startswith("gate_")} - last
        return net, before

    dead, before = trained()
    for name, value in dead.state_dict().items():
        if name.startswith("gate_"):
            assert torch.equal(value, before[name]) == (not name.endswith("net.2.bias")), name
    alive, before = trained(ctx_init_std=0.1)
    assert not any(torch.equal(v, before[k]) for k, v in alive.state_dict().items() if k.startswith("gate_"))


def test_what_is_missing_is_zero_and_gets_no_gradient() -> None:
    table = Embedding([4, 3, 1, 5], 8, num_numeric=1, num_sequences=1)
    assert not table.table.weight[[0, 4, 8]].any()
    start = table.table.weight.detach()
    assert 0.2 < float(start[7].std()) < 1, "numbers start Xavier-normal"
    assert float(start[[1, 2, 3, 5, 6]].std()) < 1e-3
    nn.init.ones_(table.table.weight)
    table.table.clear_zeros()
    e = table(torch.tensor([[0, 5]]), torch.tensor([[3.0]]), torch.tensor([[[9, 10, 8]]]))
    assert e.sum(-1).tolist() == [[0, 8, 24, 8]]
    e.square().sum().backward()
    assert table.table.weight.grad is not None
    assert not table.table.weight.grad[[0, 4, 8]].any()


def test_rows_do_not_depend_on_their_batch_and_bad_ids_are_named() -> None:
    net = model(context_1=(0,), batch_norm_1=True)
    ids, numeric, sequences = rows()
    torch.testing.assert_close(net(ids, numeric, sequences)[4:5], net(ids[4:5], numeric[4:5], sequences[4:5]))
    ids[3, 2] = 99
    with pytest.raises(ValueError, match="id 99 of field 2"):
        net(ids, numeric, sequences)


def test_exported_models_take_any_batch() -> None:
    net = model(context_1=(0, 4), context_2=()).float()
    example = tuple(x.float() if x.is_floating_point() else x for x in rows())
    dim = torch.export.Dim("rows")
    exported = torch.export.export(net, example, dynamic_shapes=({0: dim}, {0: dim}, {0: dim})).module()
    more = tuple(x.float() if x.is_floating_point() else x for x in rows(23))
    torch.testing.assert_close(exported(*more), net(*more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, "num_heads=4 must divide the streams' output widths, 8 and 6"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"context_1": (1, 1)}, "one is named twice"),
        ({"context_2": (5,)}, "context field 5 is none of the 5 fields"),
        ({"hidden_1": ()}, "a perceptron needs a layer"),
        ({"hidden_2": (4, 0)}, "widths of 1 or more"),
        ({"activation_1": ["relu"]}, r"activations=\['relu'\]: one a hidden layer, and there are 2"),
        ({"dropout_2": (0.1,)}, "dropouts"),
        ({"activation_1": "rely"}, "activation 'rely'"),
        ({"activation_1": "Linear"}, "activation 'Linear'"),
        ({"num_numeric": 5}, "must not exceed the 5 fields"),
        ({"num_numeric": 2}, "a numeric field has one row of the table; given 5"),
        ({"ctx_init_std": -1.0}, "ctx_init_std=-1.0"),
        ({"embedding_regularizer": "l3(1)"}, "must be a number of 0 or more"),
        ({"net_regularizer": -1.0}, "must be a number of 0 or more"),
    ],
)
def test_impossible_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


# -- the system ----------------------------------------------------------------------------------------------

SMALL = replace(
    FinalMLPConfig(),
    dim=6,
    stream_1=StreamConfig((16, 8)),
    stream_2=StreamConfig((16, 8)),
    gate_hidden=(8,),
    data=ProductLogConfig(values=6, train_rows=3000, validation_rows=1000, test_rows=2000),
    train=Training(
        steps=0, epochs=6, batch_size=100, optimizer="adam", lr=5e-3, schedule="constant", clip_norm=10.0, patience=2
    ),
)


def trained(arm: str, config: FinalMLPConfig, source: Source) -> tuple[Any, Any]:
    """An arm after its stage, as the laboratory runs it."""
    data = SYSTEM.load_data(config, source)
    net = SYSTEM.arms(config, data.spec)[arm]()
    (make,) = SYSTEM.stages(arm, net, config, data)
    task = make().task
    trainer = L.Trainer(
        max_epochs=config.train.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data.train(config.train.batch_size, 0), data.validation(1000))
    task.eval()
    return task, data


def test_arms_and_what_they_measure() -> None:
    data = ProductLog(SMALL.data)
    assert list(SYSTEM.arms(SMALL, data.spec)) == ["gated", "ungated", "contextless", "dual_mlp", "mlp"]
    task, data = trained("gated", SMALL, Source())
    measured = SYSTEM.measure("gated", task, SMALL, data, 0)
    assert measured["auc_shut"] == 0.5
    assert set(measured) == {"auc_open", "auc_shuffled", "auc_shut", "field_margin"}
    assert interventions(task) == {k: v for k, v in measured.items() if k.startswith("auc_")}
    report = gate_report(task.model, data.test(100), data.schema)
    means = {row["field"]: row["mean"] for row in report}
    assert [row["mean"] for row in report] == sorted(means.values(), reverse=True)
    margin = min(means["signal_2"], means["signal_3"]) - max(means[name] for name in data.idle)
    assert measured["field_margin"] == pytest.approx(margin)
    drawn = {*ClickPrediction.figures(task), "Mean gate, by field"}
    assert set(task.figures()) == drawn | {f"Mean gate, by field and value of signal_{i}" for i in (0, 1)}

    by_value = gate_report(task.model, data.test(100), data.schema, by="signal_0")
    assert {row["value of signal_0"] for row in by_value} <= set(data.schema.fields[0].words)
    assert sum(row["rows"] for row in by_value) == 2000
    weighted = sum(row["rows"] * row["idle_1"] for row in by_value) / 2000
    assert weighted == pytest.approx(means["idle_1"], rel=1e-4)
    with pytest.raises(ValueError, match="did you mean 'signal_"):
        gate_report(task.model, data.test(100), data.schema, by="signal_9")
    with pytest.raises(ValueError, match="no gates"):
        gate_report(model(gated=False), data.test(100), data.schema)


def test_findings_are_by_field_and_by_value_of_the_context() -> None:
    data = ProductLog(SMALL.data)
    arms = SYSTEM.arms(SMALL, data.spec)
    found = SYSTEM.findings(arms["gated"]().eval(), SMALL, data)
    assert list(found) == ["Gate openness by field", *(f"Gate openness by value of signal_{i}" for i in (0, 1))]
    assert {row["field"] for row in found["Gate openness by field"]} == set(data.spec["fields"])
    assert {row["signal_0"] for row in found["Gate openness by value of signal_0"]} <= set(data.schema.fields[0].words)
    assert list(SYSTEM.findings(arms["contextless"]().eval(), SMALL, data)) == ["Gate openness by field"]
    assert SYSTEM.findings(arms["dual_mlp"](), SMALL, data) == {}


def test_a_value_is_told_by_the_fields_it_moves_most() -> None:
    gates = [{"city": 1.0, "hour": 0.5, "shop": 1.2}, {"city": 1.0, "hour": 1.5, "shop": 0.8}]
    report = Table({"value of city": name, "rows": 10} | row for name, row in zip(("a", "b"), gates, strict=True))
    first, second = shift_report(report, "city")
    assert first == {"city": "a", "rows": 10, "mean gate": 0.9} | {"opens": "shop +0.2", "closes": "hour -0.5"}
    assert (second["opens"], second["closes"]) == ("hour +0.5", "shop -0.2")
    assert shift_report(report, "city", shown=0)[0]["opens"] == "-"
    axes = value_figure(report, "city").axes[0]
    assert np.array_equal(axes.images[0].get_array(), [list(row.values()) for row in gates])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a (10)", "b (10)"]


def test_contextless_arm_is_dead_but_for_its_last_bias() -> None:
    task, data = trained("contextless", replace(SMALL, train=replace(SMALL.train, epochs=1)), Source())
    measured = SYSTEM.measure("contextless", task, SMALL, data, 0)
    assert measured["dead_gradient"] == 0.0 < measured["live_gradient"]
    assert all(p.grad is None for p in task.model.parameters())
    awake = SYSTEM.arms(replace(SMALL, ctx_init_std=0.1), data.spec)["contextless"]()
    task.model = awake
    assert gate_gradients(task, next(iter(data.test(100))))[0] > 0
    assert SYSTEM.measure("dual_mlp", trained_task("dual_mlp", data), SMALL, data, 0) == {}


def trained_task(arm: str, data: Any) -> Any:
    """The task of a fresh arm."""
    return SYSTEM.stages(arm, SYSTEM.arms(SMALL, data.spec)[arm](), SMALL, data)[0]().task


def test_gradients_carry_the_regulariser_and_the_loss_does_not() -> None:
    data = ProductLog(SMALL.data)
    task = trained_task("gated", data)
    task.model = SYSTEM.arms(replace(SMALL, embedding_regularizer="3", net_regularizer="0.5"), data.spec)["gated"]()
    task.eval()
    task.log = lambda *_, **__: None
    batch = next(iter(data.test(50)))
    loss, _ = task.step(batch)
    torch.testing.assert_close(task.training_step(batch, 0), loss)
    squares = {k: p.square().sum() for k, p in task.model.named_parameters()}
    assert sum("table" in k for k in squares) == 3
    (loss + sum((3 if "table" in k else 0.5) / 2 * v for k, v in squares.items())).backward()
    right = [p.grad for p in task.model.parameters()]
    task.model.zero_grad()
    task.step(batch)[0].backward()
    task.on_before_optimizer_step(None)
    torch.testing.assert_close([p.grad for p in task.model.parameters()], right)


def test_the_learning_rate_falls_after_an_epoch_without_a_better_score() -> None:
    data = ProductLog(SMALL.data)
    task = trained_task("dual_mlp", data)
    scores = iter([0.6, 0.7, 0.7, 0.65, 0.8, 0.8])
    rates: list[float] = []

    class Scripted(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task.derived = lambda metrics: {"auc": next(scores)}
    trainer = L.Trainer(
        max_epochs=6,
        limit_train_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Scripted()],
    )
    trainer.fit(task, data.train(100, 0), data.validation(1000))
    assert rates == pytest.approx([5e-3, 5e-3, 5e-3, 5e-4, 5e-5, 5e-5])
    cosine = SYSTEM.stages("mlp", task.model, replace(SMALL, train=replace(SMALL.train, schedule="cosine")), data)[0]()
    cosine.task.trainer = trainer
    assert cosine.task.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_the_joint_monitor_is_auc_minus_log_loss() -> None:
    data = ProductLog(SMALL.data)
    net = SYSTEM.arms(SMALL, data.spec)["mlp"]()
    task = SYSTEM.stages("mlp", net, replace(SMALL, monitor="auc_minus_log_loss"), data)[0]().task
    assert isinstance(task, JointTask)
    assert task.monitor == ("auc_minus_log_loss", "max")
    assert task.derived({"auc": 0.8, "loss": 0.3})["auc_minus_log_loss"] == pytest.approx(0.5)


def test_the_simulated_log_says_what_it_is() -> None:
    config = ProductLogConfig(seed=3)
    data = ProductLog(config)
    assert data.spec["contexts"] == [["signal_0"], ["signal_1"]]
    assert data.describe()["multiplied fields"] == ["signal_0 x signal_1", "signal_2 x signal_3"]
    rows_, labels = data.splits["test"].ids, data.splits["test"].label[:, 0]

    def explained(*fields: int) -> float:
        """Share of the label's variance between the cells of some fields, above what chance gives."""
        cell = np.unique(rows_[:, fields], axis=0, return_inverse=True)[1].ravel()
        count = np.bincount(cell)
        mean = np.bincount(cell, labels) / count
        between = float((count * (mean - labels.mean()) ** 2).sum())
        return (between - (len(count) - 1) * float(labels.var())) / (len(labels) * float(labels.var()))

    assert explained(0, 1) > 3 * (explained(0) + explained(1))
    assert explained(2, 3) > 0.05
    assert max(abs(explained(place)) for place in range(4, 8)) < 0.01
    assert abs(explained(4, 5)) < 0.02
    with pytest.raises(UserError, match="needs a product"):
        ProductLog(replace(config, products=0))


def test_contexts_are_columns_of_the_table() -> None:
    spec = {"fields": ["user", "item", "price"], "labels": ["click"]}
    assert contexts_of(SMALL, spec) == ([], [])
    assert contexts_of(replace(SMALL, context_1=("price", "user")), spec) == ([2, 0], [])
    for names, message in (
        (("users",), "--context-1 users: the table has no such field; did you mean 'user'"),
        (("click",), "--context-1 click: this is the label"),
        (("user", "user"), "names user twice"),
    ):
        with pytest.raises(UserError, match=message):
            contexts_of(replace(SMALL, context_1=names), spec)
    assert contexts_of(SMALL, ProductLog(SMALL.data).spec) == ([0], [1])
    assert contexts_of(replace(SMALL, context_1=()), ProductLog(SMALL.data).spec) == ([], [1])


@pytest.mark.parametrize("numeric", ["bucket", "standardize"])
def test_a_users_table_with_numbers_and_sequences(tmp_path: Path, numeric: Any) -> None:
    draw = np.random.default_rng(0)
    count = 2000
    price, city = draw.normal(size=count), draw.choice(["Oslo", "Rome", "Lima"], count)
    tags = ["|".join(draw.choice(["new", "sale", "old"], draw.integers(1, 4))) for _ in range(count)]
    logit = 2 * price + 2 * (city == "Rome") - 1 + 2 * np.array(["sale" in tag for tag in tags])
    table = pl.DataFrame(
        {"price": price, "city": city, "tags": tags, "bought": draw.random(count) < 1 / (1 + np.exp(-logit))}
    )
    path = tmp_path / "shop.parquet"
    table.write_parquet(path)
    config = replace(SMALL, context_1=("tags", "price"), context_2=("city",))
    config.table = replace(config.table, numeric=numeric)
    task, data = trained("gated", config, Source(path, label="bought"))
    assert data.spec["num_numeric"] == (numeric == "standardize")
    measured = SYSTEM.measure("gated", task, config, data, 0)
    assert set(measured) == {"auc_open", "auc_shuffled", "auc_shut"}
    plain = replace(config, context_1=None, context_2=None)
    assert list(SYSTEM.arms(plain, data.spec)) == ["gated", "ungated", "dual_mlp", "mlp"]

    new = tmp_path / "new.csv"
    table.drop("bought").write_csv(new)
    scores = ClickPrediction.predict_file(task.model, data.spec, new, batch_size=400)["score"].to_numpy()
    bought = table["bought"].to_numpy()
    assert (scores[bought][:, None] > scores[~bought][None]).mean() > 0.8
    assert {row["field"] for row in gate_report(task.model, data.test(100), data.schema)} == {"price", "city", "tags"}


def cells(gain: tuple[float, ...] = (0.012, 0.008, 0.009), **metrics: float) -> list[dict[str, Any]]:
    """Results of as many seeds as there are gains."""
    found = []
    for seed, one in enumerate(gain):
        auc = {"gated": 0.78 + one, "ungated": 0.78, "contextless": 0.779, "dual_mlp": 0.78}
        for arm, value in auc.items():
            own = {"auc": value}
            if arm == "gated":
                own |= {"auc_open": value - 0.02, "auc_shuffled": value - 0.01, "auc_shut": 0.5, "field_margin": 0.1}
            if arm == "contextless":
                own |= {"dead_gradient": 0.0, "live_gradient": 1e-4}
            found.append({"arm": arm, "seed": seed, "metrics": own | (metrics if arm == "gated" else {})})
    return found


def verdicts(found: list[dict[str, Any]], config: FinalMLPConfig = SMALL) -> dict[str, list[str]]:
    judged = SYSTEM.claims(config, Results(found, {}))
    return {k: [e.verdict for e in (v if isinstance(v, list) else [v])] for k, v in judged.items()}


def test_claims_are_judged_as_the_card_says() -> None:
    good = verdicts(cells(field_margin=0.1))
    assert set(good) == {"gain", "intervention", "fields", "dead_gate_net"}
    assert good["gain"] == ["holds"] * 2
    assert good["intervention"] == ["holds"] * 3
    assert good["dead_gate_net"] == ["holds"] * 2
    assert verdicts(cells((0.004, 0.003, 0.004)))["gain"] == ["holds", "does not hold"]
    assert verdicts(cells((0.02, -0.001, 0.02)))["gain"][0] == "undecided"
    assert verdicts(cells((-0.01, -0.02, -0.01)))["gain"] == ["does not hold"] * 2
    assert verdicts(cells((0.02,)))["gain"] == ["undecided"] * 2
    assert verdicts(cells(auc_shut=0.51))["intervention"][2] == "does not hold"
    assert "dead_gate_net" not in verdicts(cells(), replace(SMALL, ctx_init_std=0.1))
    assert "dead_gate_net" not in verdicts(cells(), replace(SMALL, gate_hidden=()))
    assert not verdicts([c for c in cells() if c["arm"] == "ungated"])


def test_published_settings_are_those_of_the_variants() -> None:
    assert len(PUBLISHED) == 6
    for name, config in PUBLISHED.items():
        assert config.train.lr == 1e-3
        assert (config.train.patience, config.monitor) == (
            (1, "auc_minus_log_loss") if name == "avazu_x4_001" else (2, "auc")
        )
        assert config.stream_1.hidden[-1] % config.num_heads == config.stream_2.hidden[-1] % config.num_heads == 0
    frappe = PUBLISHED["frappe_x1"]
    assert (frappe.context_1, frappe.context_2, frappe.embedding_regularizer) == (("user",), ("item",), "0.05")
    assert PUBLISHED["criteo_x1"].context_1 == tuple(f"I{i}" for i in range(1, 14))


def test_dual_mlp_is_the_sum_of_its_streams() -> None:
    net = DualMLP([5, 6], dim=3, hidden_1=(4,), hidden_2=(5, 2)).double()
    spread(net)
    x = torch.tensor([[1, 7], [0, 5]])
    e = net.embedding(x).flatten(1)
    assert net.stream_2 is not None
    torch.testing.assert_close(net(x), net.stream_1(e)[:, 0] + net.stream_2(e)[:, 0])
    single = DualMLP([5, 6], dim=3, hidden_1=(4,), hidden_2=None).double()
    single.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("stream_2")})
    torch.testing.assert_close(single(x), net.stream_1(e)[:, 0])
