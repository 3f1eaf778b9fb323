"""OptFS: the gate against its equations, the networks against loops, and the search end to end."""

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

from penstock.data.base import Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.schema import Field, Label, Rows, Schema
from penstock.data.tables import TableConfig, TableData
from penstock.errors import UserError
from penstock.gates import GateWarning, force, twin, watch
from penstock.lab.results import Results
from penstock.lab.run import Options
from penstock.lab.run import run as run_system
from penstock.lab.store import load
from penstock.nn.embeddings import MLP, CrossNetwork, FieldEmbedding, factorization, pairwise_products
from penstock.systems.recommendation.optfs.checkpoint import from_authors, to_authors
from penstock.systems.recommendation.optfs.experiment import (
    PUBLISHED,
    SYSTEM,
    OptFSConfig,
    field_report,
    load_compacted,
    penalty_weight,
)
from penstock.systems.recommendation.optfs.model import VARIANTS, Backbone, FeatureGate, OptFSModel
from penstock.tasks.click_prediction import ClickPrediction, calibration_figure
from penstock.tasks.search import Search

BACKBONES = get_args(Backbone)
IDS, FIELDS = 30, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def model(backbone: Backbone = "deepfm", **options: Any) -> OptFSModel:
    """A small network in float64 whose gates are spread."""
    net = OptFSModel(IDS, FIELDS, backbone=backbone, dim=4, mlp_dims=(6, 3), **options).double().eval()
    if net.embedding.gate is not None:
        nn.init.normal_(net.gate.logit)
    return net


def ids(rows: int = 7) -> Tensor:
    return torch.randint(0, IDS, (rows, FIELDS))


# -- the gate ------------------------------------------------------------------------------------------------


def test_gates_start_exactly_open() -> None:
    for initial in (-0.3, 0.0, 0.5, 3.0):
        gate = FeatureGate(IDS, initial=initial)
        torch.testing.assert_close(gate(ids()), torch.ones(7, FIELDS, 1), rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 7.5, 200.0])
def test_soft_gates_and_their_gradient_follow_the_equations(temperature: float) -> None:
    net = model(initial=0.2)
    net.set_temperature(temperature)
    rows = torch.arange(IDS)[None]
    values = net.gate(rows)
    g = net.gate.logit.detach().squeeze(1)
    scale = 1 / torch.sigmoid(torch.tensor(0.2).double())
    sigma = 1 / (1 + torch.exp(-temperature * g))
    torch.testing.assert_close(values.flatten(), scale * sigma)
    values.sum().backward()
    torch.testing.assert_close(net.gate.logit.grad.flatten(), scale * temperature * sigma * (1 - sigma))


def test_hard_gates_keep_the_scale_and_shut_at_zero() -> None:
    gate = FeatureGate(3, initial=0.5).double()
    gate.logit.data = torch.tensor([[-0.1], [0.0], [1e-9]]).double()
    gate.hard.fill_(True)
    values = gate(torch.tensor([[0, 1, 2]]))
    assert values.flatten().tolist() == pytest.approx([0.0, 0.0, 1 + math.exp(-0.5)])
    values.sum().backward()
    assert not gate.logit.grad.any()
    assert gate.kept().tolist() == [False, False, True]


def test_a_hot_soft_gate_is_the_hard_gate() -> None:
    net = model()
    net.set_temperature(1e6)
    soft = net(x := ids())
    net.harden()
    torch.testing.assert_close(soft, net(x))


def test_penalty_counts_every_value_in_or_out_of_the_batch() -> None:
    summed, averaged = model(reg="sum"), model(reg="mean")
    averaged.load_state_dict(summed.state_dict())
    for net in (summed, averaged):
        net.set_temperature(3.0)
    g = summed.gate.logit.detach()
    torch.testing.assert_close(summed.penalty(), (3 * g).sigmoid().sum())
    torch.testing.assert_close(averaged.penalty() * IDS, summed.penalty())
    summed.penalty().backward()
    assert bool((summed.gate.logit.grad != 0).all())


def test_nonzero_share_sees_underflow() -> None:
    gate = FeatureGate(4)
    gate.logit.data = torch.tensor([[1.0], [-0.4], [-0.6], [-2.0]])
    gate.temperature.fill_(200.0)
    assert gate.nonzero_share() == 0.5


def test_prune_reopens_what_is_open_and_leaves_the_rest() -> None:
    gate = FeatureGate(3, initial=0.5)
    gate.logit.data = torch.tensor([[0.1], [0.01], [-0.1]])
    gate.temperature.fill_(20.0)
    gate.prune()
    torch.testing.assert_close(gate.logit.detach().flatten(), torch.tensor([0.5, 0.2, -2.0]))


def test_shuffle_keeps_the_number_and_depends_on_the_seed() -> None:
    one, same, other = (FeatureGate(IDS) for _ in range(3))
    logits = torch.randn(IDS, 1)
    for gate, seed in ((one, 1), (same, 1), (other, 2)):
        gate.logit.data.copy_(logits)
        gate.shuffle(seed)
    assert torch.equal(one.logit, same.logit)
    assert not torch.equal(one.kept(), other.kept())
    assert one.kept().sum() == other.kept().sum() == (logits > 0).sum()


# -- the networks --------------------------------------------------------------------------------------------


def test_factorization_and_products_are_those_of_all_pairs() -> None:
    e = torch.randn(3, FIELDS, 4).double()
    pairs = list(itertools.combinations(range(FIELDS), 2))
    loops = torch.stack([(e[:, i] * e[:, j]).sum(-1) for i, j in pairs], 1)
    torch.testing.assert_close(pairwise_products(e), loops)
    torch.testing.assert_close(factorization(e), loops.sum(1))


def test_cross_network_follows_its_recursion() -> None:
    cross = CrossNetwork(6, 2).double()
    for bias in cross.biases:
        nn.init.normal_(bias)
    x0 = torch.randn(4, 6).double()
    x = x0
    for weight, bias in zip(cross.weights, cross.biases, strict=True):
        x = torch.stack([x0[b] * (weight.weight[0] @ x[b]) + bias + x[b] for b in range(4)])
    torch.testing.assert_close(cross(x0), x)


def test_perceptron_layers_stand_where_checkpoints_expect_them() -> None:
    plain, normed = MLP(5, (4, 3)), MLP(5, (4, 3), batch_norm=True)
    assert [type(m).__name__ for m in plain] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [type(m).__name__ for m in normed] == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert MLP(5, (4, 3), output=0).width == 3
    with pytest.raises(ValueError, match="widths must be 1 or more"):
        MLP(5, (4, 0))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_open_is_the_ungated_network(backbone: Backbone) -> None:
    gated, plain = model(backbone), model(backbone, gated=False)
    weights = {k: v for k, v in gated.state_dict().items() if not k.startswith("embedding.gate.")}
    plain.load_state_dict(weights)
    x = ids()
    expected = plain(x)
    with force(gated, "open"):
        assert torch.equal(gated(x), expected)
    assert torch.equal(twin(gated)(x), expected)
    assert not torch.allclose(gated(x), expected)
    assert not list(plain.gate_parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_closing_a_value_removes_it_and_its_interactions(backbone: Backbone) -> None:
    net = model(backbone)
    x = torch.arange(FIELDS)[None]
    with torch.no_grad():
        net.gate.logit[2] = -1.0
        net.gate.hard.fill_(True)
        before = net(x)
        net.embedding.table.weight[2] += 5.0
        assert torch.equal(net(x), before)
        net.embedding.table.weight[1] += 5.0
        net.gate.logit[1] = 1.0
        assert not torch.equal(net(x), before)


def test_forcing_any_value_acts() -> None:
    net = model()
    x = ids(16)
    for how in ("open", "closed", "shuffle", "mean", 0.3):
        plain = net(x)
        with force(net, how):
            assert not torch.allclose(net(x), plain)
        assert torch.equal(net(x), plain)


def test_watch_counts_fields_as_units() -> None:
    net = model()
    with watch(net) as log:
        net(ids(50))
    summary = log["embedding.gate"].summary()
    assert summary["units"] == FIELDS
    assert summary["inputs"] == 50
    assert log["embedding.gate"].spec.range == (0.0, net.gate.scale)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_row_does_not_depend_on_its_batch(backbone: Backbone) -> None:
    net = model(backbone, batch_norm=backbone == "deepfm")
    x = ids(9)
    torch.testing.assert_close(net(x)[4:5], net(x[4:5]))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_number_of_parameters(backbone: Backbone) -> None:
    count = sum(p.numel() for p in model(backbone).parameters())
    flat, pairs = FIELDS * 4, FIELDS * (FIELDS - 1) // 2
    table = IDS * 4 + IDS

    def perceptron(width: int) -> int:
        return width * 6 + 6 + 6 * 3 + 3

    expected = {
        "fm": 0,
        "deepfm": perceptron(flat) + 4,
        "dcn": perceptron(flat) + 3 * (2 * flat) + flat + 3,
        "ipnn": perceptron(flat + pairs) + 4,
    }
    assert count == table + expected[backbone]


def test_numbers_and_sequences_are_fields() -> None:
    embedding = FieldEmbedding(10, 3, numeric_ids=[5], padding_ids=[6], gate=FeatureGate(10)).double()
    nn.init.normal_(embedding.gate.logit)
    rows = embedding.gate(torch.arange(10)[None])[0] * embedding.table.weight
    single, numeric = torch.tensor([[1, 4], [0, 0]]), torch.tensor([[2.0], [-0.5]])
    sequences = torch.tensor([[[7, 8, 6]], [[6, 6, 6]]])
    e = embedding(single, numeric, sequences)
    assert e.shape == (2, 4, 3)
    torch.testing.assert_close(e[0], torch.stack([rows[1], rows[4], 2 * rows[5], (rows[7] + rows[8]) / 2]))
    torch.testing.assert_close(e[1], torch.stack([rows[0], rows[0], -0.5 * rows[5], torch.zeros(3).double()]))
    with pytest.raises(ValueError, match="numeric has 0 fields; the model was built for 1"):
        embedding(single, None, sequences)


def test_ids_are_checked() -> None:
    net = model()
    bad = ids()
    bad[3, 2] = IDS
    with pytest.raises(ValueError, match=rf"id {IDS} of field 2 is outside the table's 0 \.\. {IDS - 1}"):
        net(bad)
    bad[3, 2] = -1
    with pytest.raises(ValueError, match="id -1 of field 2"):
        net(bad)
    with pytest.raises(ValueError, match="must be whole numbers"):
        net(bad.double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "lr"}, "it must be one of fm, deepfm, dcn, ipnn"),
        ({"num_ids": 0}, "num_ids=0"),
        ({"dim": 0}, "dim=0"),
        ({"num_fields": 1, "backbone": "ipnn"}, "ipnn needs 2 or more"),
        ({"num_fields": 1, "numeric_ids": [0], "padding_ids": [1]}, "numeric and sequence fields included"),
        ({"reg": "max"}, "reg is sum or mean"),
        ({"numeric_ids": [99]}, "99 is not"),
    ],
)
def test_impossible_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptFSModel(**{"num_ids": IDS, "num_fields": FIELDS, "mlp_dims": (4,)} | options)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_and_exported_models_follow_the_gates_state(backbone: Backbone) -> None:
    net = model(backbone).float()
    x = ids()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(x), net(x))
    more = ids(12)
    torch.testing.assert_close(exported(more), net(more))
    net.harden()
    torch.testing.assert_close(compiled(x), net(x))


# -- search and after ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_rewind_restores_all_but_the_gates(backbone: Backbone) -> None:
    net = model(backbone, batch_norm=True).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    snapshot = net.snapshot()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (net(ids(16)).square().sum() + net.penalty()).backward()
        optimizer.step()
    moved = {k: v.clone() for k, v in net.state_dict().items()}
    net.rewind(snapshot)
    for name, value in net.state_dict().items():
        gate = name.startswith("embedding.gate.")
        assert torch.equal(value, (moved if gate else before)[name]), name
    assert not torch.equal(moved["embedding.gate.logit"], before["embedding.gate.logit"])
    assert not torch.equal(moved["embedding.table.weight"], before["embedding.table.weight"])


def test_the_authors_quirks_are_switches() -> None:
    assert any("cross.biases" in name for name in model("dcn").snapshot())
    assert not any("cross.biases" in name for name in model("dcn", compat="authors").snapshot())
    ours, theirs = model("ipnn"), model("ipnn", compat="authors")
    theirs.load_state_dict(ours.state_dict())
    x = ids()
    torch.testing.assert_close(ours(x), theirs(x))
    before = theirs(x)
    for net in (ours, theirs):
        net.set_temperature(50.0)
        net.harden()
    assert torch.equal(theirs(x), before)
    assert not torch.allclose(ours(x), before)
    with pytest.raises(ValueError, match="only hard gates drop values"):
        theirs.compact()


def test_hardening_warns_where_nothing_was_decided() -> None:
    net = model()
    net.gate.logit.data.fill_(0.5)
    with pytest.warns(GateWarning, match="kept every feature value: try a larger penalty"):
        net.harden()
    net.gate.logit.data.fill_(-0.5)
    with pytest.warns(GateWarning, match="kept no feature value: try a smaller penalty"):
        net.harden()
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        net.set_temperature(0)
    with pytest.raises(ValueError, match="no gates"):
        _ = model(gated=False).gate


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compaction_changes_nothing_but_the_size(backbone: Backbone) -> None:
    net = OptFSModel(IDS, 4, backbone=backbone, dim=4, mlp_dims=(6,), numeric_ids=[20, 21], padding_ids=[22]).double()
    nn.init.normal_(net.gate.logit)
    with torch.no_grad():
        net.gate.logit[torch.tensor([3, 20, 22, 25])] = -1.0  # a number, the padding and an item among what is dropped
        net.gate.logit[torch.tensor([4, 21, 24])] = 1.0
    with pytest.raises(ValueError, match="call harden"):
        net.compact()
    net.harden()
    small, new_ids = net.compact()
    single, numeric = torch.randint(0, 20, (50, 1)), torch.randn(50, 2)
    sequences = torch.randint(22, IDS, (50, 1, 6))
    torch.testing.assert_close(small(new_ids[single], numeric, new_ids[sequences]), net(single, numeric, sequences))
    kept = int(net.gate.kept().sum())
    assert small.embedding.table.weight.shape == (kept + 2, 4)  # and the row of zeros and the padding
    assert small.embedding.num_ids == kept + 2
    assert net.embedding.table.weight.shape == (IDS, 4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_authors_checkpoints_go_in_and_out(backbone: Backbone, batch_norm: bool) -> None:
    net = model(backbone, batch_norm=batch_norm, initial=0.3, compat="authors")
    net.set_temperature(4.0)
    state = to_authors(net, net.snapshot())
    assert torch.equal(state["mask_embedding.init_weight"], net.embedding.table.weight)
    fields = FIELDS if backbone == "fm" else None
    back = from_authors(state, backbone=backbone, num_fields=fields, initial=0.3, temperature=4.0)
    x = ids()
    assert torch.equal(back(x) if not batch_norm else back.eval()(x), net(x))
    assert to_authors(back, net.snapshot()).keys() == state.keys()


def test_wrong_checkpoints_are_refused() -> None:
    state = to_authors(model("deepfm"))
    with pytest.raises(UserError, match="fits no number of fields"):
        from_authors(state | {"dnn.mlp.0.weight": torch.zeros(6, 21)}, backbone="deepfm")
    with pytest.raises(UserError, match="give num_fields"):
        from_authors(to_authors(model("fm")), backbone="fm")
    with pytest.raises(UserError, match="no first layer of a dcn"):
        from_authors(state, backbone="dcn")
    with pytest.raises(UserError, match="it is not an OptFS network"):
        from_authors({"weight": torch.zeros(1)}, backbone="fm")
    with pytest.raises(UserError, match=r"missing: backbone\.mlp\.6\.bias"):
        from_authors({k: v for k, v in state.items() if k != "dnn.mlp.6.bias"}, backbone="deepfm")


# -- the system ----------------------------------------------------------------------------------------------

SMALL = replace(
    OptFSConfig(),
    dim=4,
    mlp_dims=(8,),
    penalty=0.4,
    data=ClickLogConfig(noise_values=60, train_rows=3000, validation_rows=1000, test_rows=1000),
    search=Search(epochs=6, rewind_epoch=1, final_temperature=200.0),
)
SMALL.train.epochs = 3
SMALL.train.batch_size = 128
SMALL.train.lr = 0.005


def trained(arm: str, config: OptFSConfig, source: Source, seed: int = 0) -> tuple[OptFSModel, ClickPrediction, Any]:
    """An arm after its stages, as the laboratory runs them."""
    data = SYSTEM.load_data(config, source)
    torch.manual_seed(seed)
    net = SYSTEM.arms(config, data.spec)[arm]()
    task: Any = None
    for make in SYSTEM.stages(arm, net, config, data):
        task = make().task
        task.seed = seed
        trainer = L.Trainer(
            max_epochs=task.train_config.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(task, data.train(config.train.batch_size, seed), data.validation(1000))
    assert isinstance(net, OptFSModel)
    net.eval()
    return net, task, data


def test_the_search_drops_noise_and_the_random_arm_as_much() -> None:
    gated, task, data = trained("gated", SMALL, Source())
    measured = SYSTEM.measure("gated", task, SMALL, data, 0)
    assert measured["kept_noise"] < 0.2 < 0.7 < measured["kept_informative"]
    small = gated.compact().model
    assert measured["parameters_after_compaction"] == sum(p.numel() for p in small.parameters())
    figures = task.figures()
    assert set(figures) == {"Calibration (test)", "What the search kept", "Values kept, by field"}
    random, _, _ = trained("random", SMALL, Source())
    assert random.kept_share() == gated.kept_share()
    assert not torch.equal(random.gate.kept(), gated.gate.kept())

    report = field_report(gated, data.schema)
    assert [row["field"] for row in report] == data.spec["fields"]
    assert sum(row["kept"] for row in report) == int(gated.gate.kept().sum())
    assert "(unseen)" in next(row["dropped"] for row in report if row["field"] == "signal_0")


def test_a_person_is_told_which_fields_and_values_were_kept() -> None:
    field = Field("city", "categorical", words=tuple(f"town {i} " + "x" * 40 for i in range(100_000)))
    schema = Schema.lay_out([field, Field("hour", "categorical", words=("1", "2"))], [Label("click", ("0", "1"))])
    net = OptFSModel(schema.num_ids, 2, backbone="fm", dim=2)
    net.gate.logit.data[:] = -1.0
    net.gate.logit.data[[5, 9, 7]] = 1.0
    rows = np.array([[9, 100_003]] * 3 + [[5, 100_003]] * 2 + [[70, 100_003]])
    labels = np.zeros((6, 1), np.float32)
    split = Rows(rows.astype(np.int32), np.empty((6, 0), np.float32), np.empty((6, 0, 0), np.int32), labels)
    data = TableData(schema, {"train": split, "validation": split, "test": split}, "made up")
    fields, values = SYSTEM.findings(net, OptFSConfig(), data).values()
    assert [(row["field"], row["kept"], row["values kept"]) for row in fields] == [
        ("city", "some", 3),
        ("hour", "dropped", 0),
    ]
    assert fields[0]["share of rows"] == pytest.approx(5 / 6)
    named = {row["field"]: row for row in values}
    places = [name.split()[1] for name in named["city"]["kept, most frequent first"].split(", ")]
    assert places == ["8", "4", "6"], "the most frequent first"
    assert named["city"]["dropped"].startswith("town 69 x")
    assert named["city"]["dropped"].endswith("... 99,993 more")
    assert max(len(text) for row in values for text in row.values()) < 250
    assert named["hour"]["kept, most frequent first"] == "-"


def test_a_run_writes_the_compacted_model_and_the_map_of_ids(tmp_path: Path) -> None:
    config = replace(SMALL, train=replace(SMALL.train, epochs=1, lr=0.03), search=Search(epochs=2))
    folder, results = run_system("optfs", config, Options(arms=("gated", "ungated"), out=tmp_path / "run"))
    assert sorted(p.name for p in (folder.path / "models" / "gated").iterdir()) == [
        *("compact.safetensors", "config.json", "id_map.parquet", "model.safetensors")
    ]
    assert not (folder.path / "models" / "ungated" / "compact.safetensors").exists()
    whole, data = load(folder.path), ClickLog(config.data)
    assert isinstance(whole, OptFSModel)
    small, new_ids = load_compacted(folder.path / "models" / "gated")
    ids = next(iter(data.test(500))).ids
    assert torch.equal(small(new_ids[ids]), whole(ids))
    assert 0 < int(whole.gate.kept().sum()) < data.schema.num_ids
    assert small.embedding.num_ids == int(whole.gate.kept().sum()) + 1

    id_map = pl.read_parquet(folder.path / "models" / "gated" / "id_map.parquet")
    assert id_map.columns == ["field", "value", "old_id", "new_id"]
    for field, value, old, new in id_map.sample(50, seed=0).iter_rows():
        assert data.schema.locate(old) == (field, value)
        assert (new is not None) == bool(whole.gate.kept()[old])
    found = results["arms"]["gated"]["findings"]
    assert set(found) == {"Fields kept and dropped", "Values kept and dropped, by field"}
    assert sum(row["values kept"] for row in found["Fields kept and dropped"]) == int(whole.gate.kept().sum())
    with pytest.raises(UserError, match=r"compact\.safetensors: there is no such"):
        load_compacted(folder.path / "models" / "ungated")


def test_arms_differ_only_in_the_gate() -> None:
    data = ClickLog(SMALL.data)
    arms = SYSTEM.arms(SMALL, data.spec)
    assert list(arms) == ["gated", "ungated", "random"]
    gated, plain = arms["gated"](), arms["ungated"]()
    assert set(gated.state_dict()) - set(plain.state_dict()) == {
        f"embedding.gate.{name}" for name in ("logit", "temperature", "hard")
    }
    assert [make().name for make in SYSTEM.stages("ungated", plain, SMALL, data)] == ["retrain"]
    assert len(SYSTEM.stages("gated", gated, SMALL, data)) == 2
    with pytest.raises(ValueError, match=r"rewind_epoch=9"):
        SYSTEM.arms(replace(SMALL, search=Search(rewind_epoch=9)), data.spec)


@pytest.mark.parametrize("numeric", ["bucket", "standardize"])
def test_a_users_table_with_numbers_and_sequences(tmp_path: Path, numeric: Any) -> None:
    draw = np.random.default_rng(0)
    rows = 3000
    price, city = draw.normal(size=rows), draw.choice(["Oslo", "Rome", "Lima"], rows)
    tags = ["|".join(draw.choice(["new", "sale", "old"], draw.integers(1, 4))) for _ in range(rows)]
    logit = 2 * price + 2 * (city == "Rome") - 1 + 2 * np.array(["sale" in tag for tag in tags])
    table = pl.DataFrame(
        {"price": price, "city": city, "tags": tags, "bought": draw.random(rows) < 1 / (1 + np.exp(-logit))}
    )
    path = tmp_path / "shop.csv"
    table.write_csv(path)
    config = replace(SMALL, penalty=None, table=TableConfig(numeric=numeric))
    net, task, data = trained("gated", config, Source(path, label="bought"))
    assert data.spec["num_numeric"] == (numeric == "standardize")
    assert data.spec["num_sequences"] == 1
    assert penalty_weight(config, data) == 0.03
    assert penalty_weight(replace(config, reg="sum"), data) == 0.03 / data.spec["num_ids"]
    assert set(SYSTEM.measure("gated", task, config, data, 0)) == {"kept", "parameters_after_compaction"}

    new = tmp_path / "new.csv"
    table.drop("bought").write_csv(new)
    scores = ClickPrediction.predict_file(net, data.spec, new, batch_size=400)
    assert scores.columns == ["row", "score"]
    assert scores["row"].to_list() == list(range(1, rows + 1))
    auc_by_hand = _auc(scores["score"].to_numpy(), table["bought"].to_numpy())
    assert auc_by_hand > 0.8
    assert "price" in str(field_report(net, Schema.from_dict(data.spec["schema"])))


def _auc(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The share of (one, zero) pairs in the right order."""
    return float((scores[labels][:, None] > scores[~labels][None]).mean())


def test_metrics_are_exact() -> None:
    data = ClickLog(SMALL.data)
    task = ClickPrediction(model(), SMALL.train, data)
    metrics = task.new_metrics()
    batch = next(iter(data.test(1000)))
    logits = torch.randn(1000)
    for part in (slice(0, 300), slice(300, 1000)):
        task.update(metrics, logits[part], batch._replace(label=batch.label[part]))
    assert float(metrics.compute()["auc"]) == pytest.approx(_auc(logits.numpy(), batch.label.bool().numpy()), abs=1e-6)
    assert task.derived({"loss": 0.4}) == {"log_loss": 0.4}


def test_calibration_figure_of_a_calibrated_model_is_the_diagonal() -> None:
    scores = np.linspace(0.01, 0.99, 20_000)
    labels = np.random.default_rng(0).random(20_000) < scores
    axes = calibration_figure(scores, labels).axes[0]
    predicted, observed = (axes.lines[1].get_xdata(), axes.lines[1].get_ydata())
    np.testing.assert_allclose(observed, predicted, atol=0.05)


def cells(**metrics: float) -> list[dict[str, Any]]:
    auc = {"gated": 0.80, "ungated": 0.795, "random": 0.6}
    return [
        {"arm": arm, "seed": seed, "metrics": {"auc": value + seed * 1e-4} | metrics}
        for arm, value in auc.items()
        for seed in range(3)
    ]


def test_claims_are_judged_and_left_out_without_truth() -> None:
    judged = SYSTEM.claims(SMALL, Results(cells(kept_noise=0.05, kept_informative=0.95), {}))
    assert set(judged) == {"selection", "accuracy", "not_any_subset"}
    verdicts = [effect.verdict for one in judged.values() for effect in (one if isinstance(one, list) else [one])]
    assert verdicts == ["holds"] * 4
    lost = SYSTEM.claims(SMALL, Results(cells(kept_noise=0.5, kept_informative=0.95), {}))["selection"]
    assert isinstance(lost, list)
    assert lost[0].verdict == "does not hold"
    assert set(SYSTEM.claims(SMALL, Results(cells(), {}))) == {"accuracy"}
    assert not SYSTEM.claims(SMALL, Results([c for c in cells() if c["arm"] == "gated"], {}))


def test_published_settings() -> None:
    assert len(PUBLISHED) == 12
    deepfm = PUBLISHED["deepfm_criteo"]
    assert (deepfm.train.lr, deepfm.train.weight_decay, deepfm.penalty) == (3e-4, 3e-5, 5e-9)
    assert deepfm.search == Search(15, 1, 200)
    for config in PUBLISHED.values():
        config.search.check()
    with torch.device("meta"):
        net = VARIANTS["optfs_deepfm"](num_ids=1_000_000, num_fields=39)
    flat = 39 * 16
    perceptron = flat * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 256 + 1
    assert sum(p.numel() for p in net.parameters()) == 1_000_000 * 17 + perceptron
