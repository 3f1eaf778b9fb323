"""OptInter: gate and crosses against loops, both stages against the authors' rules, and the system end to end."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.data.base import Source
from penstock.data.clicks import ClickLog, ClickLogConfig
from penstock.data.schema import Field, Label, Schema
from penstock.data.tables import TableConfig
from penstock.errors import UserError
from penstock.gates import ClosedError, force, twin, watch
from penstock.lab.results import Results
from penstock.lab.train import seed_all
from penstock.systems.recommendation.optinter import vocabulary
from penstock.systems.recommendation.optinter.checkpoint import MODES, from_authors, to_authors
from penstock.systems.recommendation.optinter.crossed import (
    CrossConfig,
    CrossedTable,
    Crosses,
    PlantedLog,
    count_crosses,
    megabytes,
)
from penstock.systems.recommendation.optinter.experiment import (
    PUBLISHED,
    SYSTEM,
    InteractionRetrain,
    InteractionSearch,
    MethodSearch,
    OptInterConfig,
)
from penstock.systems.recommendation.optinter.model import (
    METHODS,
    VARIANTS,
    InteractionNet,
    MethodGate,
    OptInterModel,
)
from penstock.systems.recommendation.optinter.reading import (
    choice_report,
    chosen_crosses,
    methods_figure,
    pair_report,
    size_figure,
)
from penstock.systems.recommendation.optinter.vocabulary import CrossVocabulary, all_pairs
from penstock.tasks.click_prediction import ClickPrediction
from tests.golden_adapters.optinter import ADAPTERS

IDS, FIELDS, NUMBERS, CROSSES = 14, 3, 2, 9
PAIRS = all_pairs(FIELDS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def net(method: Any = "search", **options: Any) -> InteractionNet:
    """A small network in float64 with two numeric fields, whose methods are undecided but unlike."""
    sizes: dict[str, Any] = {"dim": 4, "pair_dim": 3, "mlp_dims": (6, 5), "numeric_ids": range(NUMBERS)}
    return InteractionNet(IDS, FIELDS, CROSSES, method=method, **sizes | options).double()


def batch(rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, crosses and numbers."""
    ids, crosses = torch.randint(NUMBERS, IDS, (rows, FIELDS)), torch.randint(0, CROSSES, (rows, len(PAIRS)))
    return ids, crosses, torch.randn(rows, NUMBERS).double()


# -- the gate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "temperature"), [(0, 1.0), (3000, 0.85), (19_800, 0.01), (10**6, 0.01)])
def test_temperature_falls_to_a_hundredth_in_float32(step: int, temperature: float) -> None:
    gate = MethodGate(4).double()
    gate.step.fill_(step)
    assert gate.temperature().dtype == torch.float32
    assert float(gate.temperature()) == pytest.approx(float(np.float32(temperature)), rel=1e-7)
    t = float(gate.temperature())
    alpha = gate.alpha.detach()
    weights = torch.exp((alpha - alpha.amax(1, keepdim=True)) / t)
    torch.testing.assert_close(gate().detach(), weights / weights.sum(1, keepdim=True))


def test_hard_gates_are_one_hot_and_do_not_learn() -> None:
    gate = MethodGate(5)
    gate.harden()
    assert torch.equal(gate(), F.one_hot(gate.alpha.argmax(1), 3).float())
    assert not gate().requires_grad
    equal = MethodGate(2, init="zeros")
    assert equal.choice().tolist() == [0, 0]
    assert equal.margin().tolist() == [0.0, 0.0]


def test_where_alpha_starts() -> None:
    std = float(MethodGate(20_000).alpha.detach().std())
    assert std == pytest.approx(math.sqrt(2 / 20_003), rel=0.02)
    assert not MethodGate(3, init="zeros").alpha.any()
    gate = MethodGate(5000)
    gate.decide_at_random()
    assert gate.hard
    assert 0 <= float(gate.alpha.min()) < float(gate.alpha.max()) <= 1
    assert min(Counter(gate.choice().tolist()).values()) > 1500


def test_gumbel_noise_draws_methods_by_their_probability_in_training_only() -> None:
    gate = MethodGate(20_000, init="zeros", gumbel=True)
    gate.alpha.data += torch.tensor([1.0, 0.0, -1.0])
    drawn = F.one_hot(gate().argmax(1), 3).double().mean(0)
    torch.testing.assert_close(drawn, torch.tensor([1.0, 0.0, -1.0]).double().softmax(0), atol=0.015, rtol=0)
    gate.eval()
    assert torch.equal(gate(), gate())
    torch.testing.assert_close(gate()[0], torch.tensor([1.0, 0.0, -1.0]).softmax(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"num_pairs": 2, "tau": -1e-5}, "tau=-1e-05 must not be below 0"),
        ({"num_pairs": 2, "tau": math.nan}, "tau=nan"),
        ({"num_pairs": 2, "init": "ones"}, "zeros or xavier"),
    ],
)
def test_impossible_gates_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodGate(**options)


# -- the network ---------------------------------------------------------------------------------------------


def by_hand(model: InteractionNet, choice: Sequence[Sequence[float]], row: int, inputs: tuple[Tensor, ...]) -> Tensor:
    """The logit of one row, field by field and pair by pair."""
    ids, crosses, numbers = (x[row] for x in inputs)
    values = model.embedding.table.weight
    parts = [numbers[c] * values[c] for c in range(NUMBERS)] + [values[ids[f]] for f in range(FIELDS)]
    for p, (i, j) in enumerate(PAIRS):
        v = torch.zeros(3).double()
        if model.cross_table is not None:
            v = v + choice[p][0] * model.cross_table.weight[crosses[p]]
        if model.factor_table is not None:
            v = v + choice[p][1] * model.factor_table.weight[ids[i]] * model.factor_table.weight[ids[j]]
        parts.append(v)
    x = torch.cat(parts)
    for linear, norm in zip(model.mlp.linears, model.mlp.norms, strict=True):
        x = linear.weight @ x + linear.bias
        x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5) * norm.weight + norm.bias
        x = x.clamp_min(0)
    return (model.mlp.output.weight @ x + model.mlp.output.bias)[0]


@pytest.mark.parametrize("method", ["search", "hard", *METHODS])
def test_the_network_is_its_equations(method: str) -> None:
    model = net("search" if method == "hard" else method)
    for norm in model.mlp.norms:
        nn.init.normal_(norm.weight)
    choice = [[1.0, 1.0, 0.0]] * len(PAIRS)
    if model.gate is not None:
        if method == "hard":
            model.gate.harden()
        choice = model.gate().tolist()
    inputs = batch()
    got = model(*inputs)
    torch.testing.assert_close(got, torch.stack([by_hand(model, choice, row, inputs) for row in range(7)]))


def test_columns_of_pairs_stay_where_nothing_is_modelled() -> None:
    model = net("naive")
    ids, _, numbers = batch()
    model(ids, None, numbers).sum().backward()
    columns = (NUMBERS + FIELDS) * 4
    grad = model.mlp.linears[0].weight.grad
    assert grad.shape[1] == columns + len(PAIRS) * 3
    assert grad[:, :columns].any()
    assert not grad[:, columns:].any()


@pytest.mark.parametrize(("entry", "method"), enumerate(METHODS))
def test_forcing_an_entry_is_the_network_of_that_method(entry: int, method: Any) -> None:
    model, alone = net(), net(method)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k in alone.state_dict()})
    inputs = batch()
    with force(model, entry):
        torch.testing.assert_close(model(*inputs), alone(*inputs))
    assert not torch.allclose(model(*inputs), alone(*inputs))


def test_the_gate_can_be_watched_forced_and_opened() -> None:
    model = net()
    inputs = batch(16)
    plain = model(*inputs)
    with watch(model) as log:
        assert torch.equal(model(*inputs), plain)
    assert log["gate"].summary()["units"] == 3 * len(PAIRS)
    assert log["gate"].static
    with force(model, torch.full((3,), 1 / 3).double()):
        opened = model(*inputs)
    torch.testing.assert_close(twin(model)(*inputs), opened)
    assert not torch.allclose(opened, plain)
    with pytest.raises(ClosedError, match="force an entry"), force(model, "closed"):
        model(*inputs)


def test_some_pairs_only() -> None:
    model = net(pairs=[(0, 2), (1, 2)])
    ids, crosses, numbers = batch()
    assert model.gate is not None
    assert model.gate().shape == (2, 3)
    assert model(ids, crosses[:, :2], numbers).shape == (7,)
    for wrong in ([(1, 2), (0, 1)], [(0, 1), (0, 1)], [(1, 0)], [(0, 3)], []):
        with pytest.raises(ValueError, match="lexicographic order"):
            net(pairs=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "it must be one of search, memorise, factorise, naive"),
        ({"num_fields": 0}, "a pair needs 2 categorical fields or more"),
        ({"num_fields": 1}, "a pair needs 2"),
        ({"num_crosses": 0}, "num_crosses=0"),
        ({"pair_dim": 0}, "pair_dim=0"),
        ({"mlp_dims": (4, 0)}, "widths must be 1 or more"),
        ({"tau": -1.0}, "tau=-1.0"),
        ({"numeric_ids": [99]}, "99 is not"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InteractionNet(**{"num_ids": IDS, "num_fields": FIELDS, "num_crosses": CROSSES} | options)


def test_wrong_inputs_are_refused() -> None:
    model = net()
    ids, crosses, numbers = batch()
    with pytest.raises(ValueError, match="crosses: given 2; the model has 3 pairs"):
        model(ids, crosses[:, :2], numbers)
    with pytest.raises(ValueError, match="crosses: given none"):
        model(ids, None, numbers)
    with pytest.raises(ValueError, match="ids have 2 fields; the model was built for 3"):
        model(ids[:, :2], crosses, numbers)
    with pytest.raises(ValueError, match="numeric has 1 fields; the model was built for 2"):
        model(ids, crosses, numbers[:, :1])
    for place, what in ((0, ids), (1, crosses)):
        bad = what.clone()
        bad[2, 1] = 99
        with pytest.raises(ValueError, match="id 99 of field"):
            model(*(bad if place == k else x for k, x in enumerate((ids, crosses, numbers))))


def test_weights_are_drawn_as_the_authors_draw_them() -> None:
    model = InteractionNet(3000, 4, 3000, dim=5, pair_dim=3, mlp_dims=(64, 32))
    for table in (model.embedding.table, model.factor_table, model.cross_table):
        assert float(table.weight.detach().std()) == pytest.approx(1, rel=0.05)
    alpha = model.gate.alpha.detach().clone()
    model.mlp.norms[0].weight.data.fill_(3.0)
    model.reset_weights("retrain")
    for table, width in ((model.embedding.table, 4 * 5), (model.factor_table, 4 * 3), (model.cross_table, 6 * 3)):
        bound = (3 / width) ** 2
        assert 0.95 * bound < float(table.weight.abs().max()) <= bound
    for linear in model.mlp.linears:
        assert float(linear.weight.abs().max()) == pytest.approx(math.sqrt(6 / sum(linear.weight.shape)), rel=0.05)
    assert bool((model.mlp.norms[0].weight == 1).all())
    assert torch.equal(model.gate.alpha, alpha)


def test_what_the_optimiser_trains() -> None:
    model = net()
    weights, tables, gate = model.parameter_groups(weight_decay=0.1, gate_lr=0.02)
    assert {id(p) for p in tables["params"]} == {id(model.cross_table.weight), id(model.factor_table.weight)}
    assert (tables["weight_decay"], weights["weight_decay"], gate["weight_decay"]) == (0.1, 0.0, 0.0)
    assert gate["params"][0] is model.gate.alpha
    assert gate["lr"] == 0.02
    norms = {id(p) for p in model.mlp.norms.parameters()}
    assert not norms & {id(p) for p in weights["params"]}
    everything = model.parameter_groups(weight_decay=0.1, gate_lr=0.02, train_layernorm=True)
    assert {id(p) for group in everything for p in group["params"]} == {id(p) for p in model.parameters()}
    model.gate.harden()
    assert len(model.parameter_groups(weight_decay=0.1, gate_lr=0.02)) == 2
    assert len(net("naive").parameter_groups(weight_decay=0.1, gate_lr=0.02)) == 1


# -- crosses -------------------------------------------------------------------------------------------------

OFFSETS, SIZES = (0, 4, 9), (4, 5, 3)


def schema(sizes: Sequence[int] = SIZES) -> Schema:
    fields = [Field(f"f{n}", "categorical", words=tuple(f"w{k}" for k in range(s - 2))) for n, s in enumerate(sizes)]
    return Schema.lay_out(fields, [Label("click", ("0", "1"), number=True)])


def some_ids(rows: int) -> Tensor:
    return torch.stack(
        [torch.randint(first, first + size, (rows,)) for first, size in zip(OFFSETS, SIZES, strict=True)], 1
    )


def vocabulary_of(crosses: Crosses) -> CrossVocabulary:
    made = CrossVocabulary(OFFSETS, SIZES, crosses.rows, crosses.exact)
    made.fill(crosses.keys)
    return made


@pytest.mark.parametrize("min_count", [1, 3, 5, 1000])
def test_crosses_are_counted_and_found(min_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.systems.recommendation.optinter.crossed._CHUNK", 13)
    train, new = some_ids(60), some_ids(200)
    found = vocabulary_of(count_crosses(train.numpy().astype(np.int32), schema(), CrossConfig(min_count=min_count)))
    first = 0
    expected = []
    for i, j in PAIRS:
        seen = Counter((a, b) for a, b in train[:, [i, j]].tolist())
        frequent = sorted(pair for pair, times in seen.items() if times >= min_count)
        rows = {pair: first + 1 + place for place, pair in enumerate(frequent)}
        expected.append(torch.tensor([rows.get((a, b), first) for a, b in new[:, [i, j]].tolist()]))
        for (a, b), row in rows.items():
            assert found.locate(row) == (PAIRS.index((i, j)), a - OFFSETS[i], b - OFFSETS[j])
        first += 1 + len(frequent)
    assert torch.equal(found(new), torch.stack(expected, 1))
    assert found.num_rows == first


def test_pairs_with_too_many_crosses_are_hashed() -> None:
    train = some_ids(500)
    crosses = count_crosses(train.numpy().astype(np.int32), schema(), CrossConfig(min_count=1, hash_above=13))
    assert crosses.exact == [False, True, False]  # 20, 12 and 15 combinations
    assert crosses.rows == [13, 13, 13]
    rows = vocabulary_of(crosses)(train)
    for pair in range(3):
        assert set(rows[:, pair].tolist()) <= set(range(13 * pair, 13 * pair + 13))
    same = (train[:, None, :2] == train[None, :, :2]).all(-1)
    assert bool((rows[:, None, 0] == rows[None, :, 0])[same].all())
    assert len(rows[:, 0].unique()) > 6


def test_hashing_spreads() -> None:
    big = CrossVocabulary((0, 1000), (1000, 1000), [500], [False])
    ids = torch.stack([torch.arange(1000).repeat_interleave(100), 1000 + torch.arange(100).repeat(1000)], 1)
    load = torch.bincount(big(ids)[:, 0], minlength=500).double()
    assert float(load.std() / load.mean()) < 0.3
    assert float(load.min()) > 0


def test_uncounted_crosses_each_have_a_row_where_there_is_room() -> None:
    crosses = Crosses.of({"schema": schema().to_dict()})
    assert crosses.exact == [False] * 3
    assert crosses.rows == [20, 12, 15]
    every = torch.tensor(list(itertools.product(range(4), range(4, 9), range(9, 12))))
    rows = vocabulary_of(crosses)(every)
    for (i, j), column in zip(PAIRS, rows.T, strict=True):
        assert (
            len(column.unique())
            == SIZES[i] * SIZES[j]
            == len(torch.cat([every[:, [i, j]], column[:, None]], 1).unique(dim=0))
        )


def test_searching_by_halving_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 8, 21):
        keys = torch.cat([torch.randint(0, 60, (count - 1,)).unique(), torch.tensor([2**62])])
        wanted = torch.arange(-1, 62).reshape(9, 7)
        expected = torch.searchsorted(keys, wanted)
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "is_exporting", lambda: True)
            assert torch.equal(vocabulary._lower_bound(keys, wanted), expected)


def test_ids_of_another_field_are_refused() -> None:
    crosses = vocabulary_of(Crosses.of({"schema": schema().to_dict()}))
    bad = some_ids(5)
    bad[3, 1] = 9
    with pytest.raises(ValueError, match=r"id 9 of field 1 is outside its range 4 \.\. 8"):
        crosses(bad)


def test_impossible_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="two categorical fields or more"):
        CrossVocabulary((), (), (), ())
    with pytest.raises(ValueError, match="here 3"):
        CrossVocabulary(OFFSETS, SIZES, (3, 3), (True, True))
    with pytest.raises(ValueError, match="must be 1 or more"):
        CrossVocabulary(OFFSETS, SIZES, (3, 0, 3), (True, True, True))
    crosses = CrossVocabulary(OFFSETS, SIZES, (3, 1, 3), (True, True, False))
    with pytest.raises(ValueError, match="3 keys: the exact pairs have rows for 2"):
        crosses.fill(torch.arange(3))
    for shared in (0, 3, 5, 7, -1):
        with pytest.raises(ValueError, match="does not belong to one combination"):
            crosses.locate(shared)


def test_crosses_survive_json() -> None:
    crosses = Crosses([5, 1, 9], [True, True, False], torch.tensor([0, 3, 7, 10**15]))
    back = Crosses.of({"crosses": json.loads(json.dumps(crosses.to_spec()))})
    assert (back.rows, back.exact) == (crosses.rows, crosses.exact)
    assert torch.equal(back.keys, crosses.keys)
    empty = Crosses.of({"crosses": Crosses([1], [True], torch.empty(0, dtype=torch.int64)).to_spec()})
    assert len(empty.keys) == 0


def whole(min_count: int = 1, hash_above: int = 1000, **options: Any) -> OptInterModel:
    """A model with the crosses of forty rows."""
    config = CrossConfig(min_count=min_count, hash_above=hash_above)
    crosses = count_crosses(some_ids(40).numpy().astype(np.int32), schema(), config)
    sizes: dict[str, Any] = {"dim": 4, "pair_dim": 3, "mlp_dims": (6,)}
    model = OptInterModel(12, OFFSETS, SIZES, crosses.rows, crosses.exact, **sizes | options).double().eval()
    model.crosses.fill(crosses.keys)
    return model


@pytest.mark.parametrize("hash_above", [10, 1000])
@pytest.mark.parametrize("choice", itertools.product(range(3), repeat=3))
def test_compaction_changes_nothing_but_the_size(choice: tuple[int, ...], hash_above: int) -> None:
    model = whole(hash_above=hash_above)
    with pytest.raises(ValueError, match=r"call gate\.harden"):
        model.compact()
    model.gate.alpha.data.copy_(F.one_hot(torch.tensor(choice), 3))
    model.gate.harden()
    small = model.compact()
    ids = some_ids(100)
    torch.testing.assert_close(small(ids), model(ids))
    kept = sum(rows if entry == 0 else 1 for rows, entry in zip(model.crosses.rows, choice, strict=True))
    assert small.net.cross_table.weight.shape == (kept, 3)
    assert not small.gate.alpha.requires_grad


def test_a_compacted_model_can_be_saved(tmp_path: Path) -> None:
    model = whole()
    model.gate.decide_at_random()
    small = model.compact().float()
    small.save_pretrained(tmp_path)
    ids = some_ids(20)
    assert torch.equal(OptInterModel.from_pretrained(tmp_path).eval()(ids), small(ids))


def test_models_without_a_gate_say_so() -> None:
    with pytest.raises(ValueError, match="no gate: it was built with method='memorise'"):
        _ = whole(method="memorise").gate


def test_compiled_and_exported_models_follow_the_gates_state() -> None:
    model = whole().float()
    ids = some_ids(9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exported = torch.export.export(model, (ids,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(ids), model(ids))
    more = some_ids(30)
    torch.testing.assert_close(exported(more), model(more))
    model.gate.harden()
    torch.testing.assert_close(compiled(ids), model(ids))


# -- the authors' checkpoints --------------------------------------------------------------------------------


def test_authors_checkpoints_of_both_stages_go_in_and_out() -> None:
    inputs = batch()
    for mode, method in enumerate(MODES):
        for hard in (True, False) if method == "search" else (True,):
            model = net(method)
            if model.gate is not None:
                model.gate.step.fill_(500)
                if hard:
                    model.gate.harden()
            state = to_authors(model)
            assert ("orig_embeddings_table.weight" in state) == (not hard)
            assert ("comb_embeddings_table.weight" in state) == (mode in (0, 1))
            assert any(key.startswith("addition_embedding") for key in state) == (mode in (0, 2))
            arch = state.pop("arch_parameters", None)
            back = from_authors(state, num_fields=FIELDS, num_numeric=NUMBERS, arch=arch, step=500)
            assert back.method == method
            assert torch.equal(back(*inputs), model(*inputs))


def test_wrong_checkpoints_are_refused() -> None:
    state = to_authors(net())
    sizes: dict[str, Any] = {"num_fields": FIELDS, "num_numeric": NUMBERS}
    with pytest.raises(UserError, match="it is not an OptInter network"):
        from_authors({"weight": torch.zeros(1)}, **sizes)
    with pytest.raises(UserError, match=r"arch.* is nothing; it must be \(3, 3\)"):
        from_authors({k: v for k, v in state.items() if k != "arch_parameters"}, **sizes)
    with pytest.raises(UserError, match=r"arch.* is \(2, 3\); it must be \(3, 3\)"):
        from_authors(state | {"arch_parameters": torch.zeros(2, 3)}, **sizes)
    with pytest.raises(UserError, match=r"mlp\.linears\.0\.weight is \(6, 29\), must be \(6, 50\)"):
        from_authors(state | {"arch_parameters": torch.zeros(10, 3)}, num_fields=5)
    with pytest.raises(UserError, match=r"no output_layer\.weight"):
        from_authors({k: v for k, v in state.items() if k != "output_layer.weight"}, **sizes)
    with pytest.raises(UserError, match=r"missing: mlp\.norms\.1\.bias"):
        from_authors({k: v for k, v in state.items() if k != "norm_layers.1.bias"}, **sizes)
    with pytest.raises(UserError, match="other num_fields or num_numeric"):
        from_authors(to_authors(net("naive")), num_fields=FIELDS, num_numeric=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", range(4))
def test_the_adapter_of_other_cases(mode: int, dtype: torch.dtype) -> None:
    """Hidden cases: other modes, no numeric fields, some pairs only, one hidden layer."""
    pairs = [(0, 1), (1, 2)]
    model = InteractionNet(IDS, FIELDS, CROSSES, pairs=pairs, method=MODES[mode], dim=4, pair_dim=2, mlp_dims=(5,)).to(
        dtype
    )
    ids, crosses, _ = batch()
    arch = F.one_hot(torch.tensor([2, 0]), 3)
    if model.gate is not None:
        model.gate.alpha.data.copy_(arch)
        model.gate.harden()
    params = {k: v for k, v in to_authors(model).items() if k != "arch_parameters"}
    inputs = {"cates": ids, "combs": crosses[:, :2], "conts": torch.zeros(7, 0, dtype=dtype)}
    inputs |= {"y": torch.randint(2, (7, 1)).to(dtype), "arch_onehot": arch.to(dtype)}
    config = {"cont_field": 0, "cate_field": FIELDS, "comb_field": 2, "cate_cont_feature": IDS, "hidden_dims": [5]}
    config |= {"comb_feature": CROSSES, "orig_embedding_dim": 4, "comb_embedding_dim": 2, "selected_pairs": pairs}
    got = ADAPTERS["retrain"](config | {"alpha_mode": mode}, params, inputs)
    assert got["prob"].dtype == dtype
    torch.testing.assert_close(got["prob"][:, 0], model(ids, crosses[:, :2]).sigmoid())
    assert {name.removeprefix("grad.") for name in got if name.startswith("grad.")} - {"arch_parameters"} == set(params)
    if mode == 0:
        assert not got["grad.addition_embeddings_table.weight"].any(), "no pair is factorised"
    with pytest.raises(ValueError, match="does not know"):
        ADAPTERS["retrain"](config | {"alpha_mode": mode, "dropout": 0.5}, params, inputs)


def test_the_adapter_of_a_search_far_on() -> None:
    model = net()
    ids, crosses, numbers = batch()
    inputs = {"cates": ids, "combs": crosses, "conts": numbers, "y": torch.ones(7, 1).double()}
    config = {"cont_field": NUMBERS, "cate_field": FIELDS, "orig_embedding_dim": 4, "comb_embedding_dim": 3}
    config |= {"hidden_dims": [6, 5], "selected_pairs": PAIRS, "tau": 1e-3}
    sizes = {"comb_field": 3, "cate_cont_feature": IDS, "comb_feature": CROSSES}
    params = to_authors(model)
    got = ADAPTERS["search"](config | sizes | {"step_k": 10**5}, params, inputs)
    alpha = model.gate.alpha.detach()
    torch.testing.assert_close(got["gate_step0"], alpha.softmax(1))
    torch.testing.assert_close(got["gate_stepk"], (alpha / float(np.float32(0.01))).softmax(1))
    assert got["grad.arch_parameters"].shape == (3, 3)
    rates = {"lr": 0.01, "arch_lr": 0.1, "start_step": 998, "weight_decay_on_pair_tables": 0.0}
    after = ADAPTERS["search_steps"](config | rates, params, inputs)
    assert after["losses"][0] > after["losses"][-1]
    for name in ("norm_layers.0.weight", "norm_layers.1.bias"):
        assert torch.equal(after[f"after.{name}"], params[name])


# -- the system ----------------------------------------------------------------------------------------------

SMALL = OptInterConfig(
    dim=4,
    pair_dim=4,
    mlp_dims=(16,),
    search=MethodSearch(epochs=4),
    data=ClickLogConfig(
        informative_values=12,
        noise_fields=0,
        effect_std=0.3,
        pair_rank=2,
        pair_scale=0.5,
        train_rows=6000,
        validation_rows=1000,
        test_rows=2000,
    ),
)
SMALL.train.epochs = 4
SMALL.train.batch_size = 200


def fit(task: ClickPrediction, data: Any, config: OptInterConfig, seed: int) -> None:
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


def trained(arm: str, config: OptInterConfig, source: Source, seed: int = 0) -> tuple[OptInterModel, Any, Any]:
    """An arm after its stages, as the laboratory runs them."""
    data = SYSTEM.load_data(config, source)
    seed_all(seed)
    model = SYSTEM.arms(config, data.spec)[arm]()
    task: Any = None
    for make in SYSTEM.stages(arm, model, config, data):
        task = make().task
        fit(task, data, config, seed)
    assert isinstance(model, OptInterModel)
    return model.eval(), task.eval(), data


def test_both_stages_end_to_end() -> None:
    model, task, data = trained("gated", SMALL, Source())
    assert isinstance(task, InteractionRetrain)
    assert int(model.gate.step) == 4 * 30, "a step colder for each batch of the search and for no other"
    assert set(model.gate().unique().tolist()) == {0.0, 1.0}
    assert bool((model.net.mlp.norms[0].weight == 1).all()), "norms are not trained"
    measured = SYSTEM.measure("gated", task, SMALL, data, 0)
    assert measured["table_pair_memorised"] == 1
    assert sum(measured[f"pairs_{method}"] for method in METHODS) == 6
    small = model.compact()
    assert measured["parameters_after_compaction"] == sum(p.numel() for p in small.parameters())
    assert set(task.figures()) == {"Calibration (test)", "How each pair is modelled"}

    report = pair_report(model, data.schema)
    assert len(report) == 6
    assert {"first", "second", "method", "margin", "rows"} == set(report[0])
    table = next(row for row in report if (row["first"], row["second"]) == data.table.table_pair)
    assert table["method"] == "memorised"
    found = SYSTEM.findings(model, SMALL, data)
    assert found == {"Pairs by choice": choice_report(report), "How each pair is modelled": report}
    assert [row["choice"] for row in found["Pairs by choice"]] == ["memorised", "factorised", "ignored"]
    assert sum(row["pairs"] for row in found["Pairs by choice"]) == 6
    assert found["Pairs by choice"][0]["surest first"].startswith(f"{report[0]['first']} x {report[0]['second']}")
    assert choice_report(report * 4)[0]["surest first"].endswith(" more")
    assert SYSTEM.findings(SYSTEM.arms(SMALL, data.spec)["ungated"](), SMALL, data) == {}
    chosen = chosen_crosses(model, data.schema)
    kept = sum(row["rows"] - 1 for row in report if row["method"] == "memorised")
    assert len(chosen) == kept
    one = chosen.filter(pl.col("first_field") == "signal_2", pl.col("second_field") == "signal_3").row(5, named=True)
    ids = data.splits["train"].ids[:1].astype(np.int64).copy()
    for column, value in ((2, one["first_value"]), (3, one["second_value"])):
        field = data.schema.fields[column]
        ids[0, column] = field.offset + 1 + field.words.index(value)
    assert int(model.crosses(torch.from_numpy(ids))[0, -1]) == one["row"]


def test_a_second_stage_starts_from_the_same_new_weights_whatever_was_drawn() -> None:
    data = SYSTEM.load_data(SMALL, Source())
    starts = []
    for draws in (0, 5):
        seed_all(3)
        model = SYSTEM.arms(SMALL, data.spec)["gated"]()
        search = InteractionSearch(model, SMALL, data)
        search.seed = 1
        torch.rand(draws)
        before = torch.get_rng_state()
        InteractionRetrain(model, SMALL, data, search)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    assert float(starts[0]["net.cross_table.weight"].abs().max()) <= (3 / 24) ** 2


def test_evaluation_cools_only_if_asked() -> None:
    data = SYSTEM.load_data(SMALL, Source())
    batch = next(iter(data.validation(100)))
    for counts in (False, True):
        config = replace(SMALL, search=replace(SMALL.search, count_eval_calls=counts))
        model = SYSTEM.arms(config, data.spec)["gated"]()
        task = InteractionSearch(model, config, data)
        task.validation_step(batch, 0)
        assert int(model.gate.step) == counts


def test_the_search_stage_has_its_own_budget() -> None:
    data = SYSTEM.load_data(SMALL, Source())
    config = replace(SMALL, search=MethodSearch(epochs=9, patience=1, lr=0.1, weight_decay=0.2, gate_lr=0.3))
    task = InteractionSearch(SYSTEM.arms(config, data.spec)["gated"](), config, data)
    train = task.train_config
    assert (train.epochs, train.patience, train.lr, train.weight_decay) == (9, 1, 0.1, 0.2)
    assert [group.get("lr") for group in task.parameter_groups()] == [None, None, 0.3]
    assert task.parameter_groups()[1]["weight_decay"] == 0.2
    assert SMALL.train.lr == 3e-3


def test_arms() -> None:
    data = SYSTEM.load_data(SMALL, Source())
    arms = SYSTEM.arms(SMALL, data.spec)
    assert list(arms) == ["gated", "ungated", "factorised", "naive", "random"]
    models = {name: make() for name, make in arms.items()}
    assert [m.net.method for m in models.values()] == ["search", "memorise", "factorise", "naive", "search"]
    assert models["random"].gate.hard
    assert {len(SYSTEM.stages(name, m, SMALL, data)) for name, m in models.items() if name != "gated"} == {1}
    assert len(SYSTEM.stages("gated", models["gated"], SMALL, data)) == 2
    for name in ("ungated", "random"):
        bound = (3 / 24) ** 2
        assert float(models[name].net.cross_table.weight.abs().max()) <= bound, "starts as retraining does"
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in arms.items()}
    assert sizes["gated"] - sizes["ungated"] == data.schema.num_ids * 4 + 18
    for wrong, message in ((MethodSearch(epochs=0), "search.epochs=0"), (MethodSearch(patience=-1), "patience=-1")):
        with pytest.raises(ValueError, match=message):
            SYSTEM.arms(replace(SMALL, search=wrong), data.spec)


def test_too_many_crosses_are_refused_before_they_are_allocated() -> None:
    data = SYSTEM.load_data(SMALL, Source())
    rows = sum(data.spec["crosses"]["rows"])
    assert f"{rows:,} rows, {megabytes(rows, 4):,.1f} MB in training" in data.overview()
    assert data.describe()["rows of crosses"] == rows
    assert megabytes(2**20, 2) == 32
    big = replace(SMALL, pair_dim=10**6)
    with pytest.raises(UserError, match=r"rows of crosses take .* above crosses.memory_mb=4096"):
        SYSTEM.arms(big, data.spec)
    with pytest.raises(UserError, match=r"crosses\.min_count=0 must be 1 or more"):
        SYSTEM.load_data(replace(SMALL, crosses=CrossConfig(min_count=0)), Source())


def test_the_log_has_its_two_pairs() -> None:
    config = replace(SMALL.data, effect_std=0.0, train_rows=60_000)
    log = PlantedLog(config, table_scale=3.0)
    ids, label = log.splits["train"].ids, log.splits["train"].label[:, 0]

    def explained(i: int, j: int) -> float:
        """How much of the label the combinations of two fields explain beyond either field, in shares of its variance."""
        sums, counts = np.zeros((12, 12)), np.zeros((12, 12))
        first, second = (ids[:, field] - log.schema.fields[field].offset - 1 for field in (i, j))
        np.add.at(sums, (first, second), label)
        np.add.at(counts, (first, second), 1)
        means = sums / counts
        alone = means - means.mean(0, keepdims=True) - means.mean(1, keepdims=True) + means.mean()
        return float(alone.var() / label.var())

    by_pair = {(i, j): explained(i, j) for i, j in all_pairs(4)}
    assert by_pair[2, 3] > 0.3
    assert 0.01 < by_pair[0, 1] < by_pair[2, 3]
    assert all(value < by_pair[0, 1] for pair, value in by_pair.items() if pair not in ((0, 1), (2, 3)))
    assert log.pair(log.table_pair) == 5
    assert log.describe()["table pair"] == ["signal_2", "signal_3"]
    with pytest.raises(UserError, match="two pairs are planted, which takes four fields"):
        PlantedLog(replace(config, informative_fields=3), 1.0)


@pytest.mark.parametrize("numeric", ["bucket", "standardize"])
def test_a_users_table_with_numbers_and_sequences(tmp_path: Path, numeric: Any) -> None:
    draw = np.random.default_rng(0)
    rows = 3000
    price = draw.normal(size=rows)
    city, shop = draw.choice(["Oslo", "Rome", "Lima"], rows), draw.choice(["a", "b", "c"], rows)
    tags = ["|".join(draw.choice(["new", "sale", "old"], draw.integers(1, 4))) for _ in range(rows)]
    logit = 2 * price + 3 * ((city == "Rome") == (shop == "b")) - 2 + 2 * np.array(["sale" in tag for tag in tags])
    table = pl.DataFrame(
        {
            "price": price,
            "city": city,
            "shop": shop,
            "tags": tags,
            "bought": draw.random(rows) < 1 / (1 + np.exp(-logit)),
        }
    )
    path = tmp_path / "shop.csv"
    table.write_csv(path)
    config = replace(SMALL, table=TableConfig(numeric=numeric))
    model, task, data = trained("gated", config, Source(path, label="bought"))
    assert len(model.crosses.pairs) == (3 if numeric == "bucket" else 1)
    measured = SYSTEM.measure("gated", task, config, data, 0)
    assert "cross_rows_kept" in measured
    assert "table_pair_memorised" not in measured
    assert "How each pair is modelled" in task.figures()

    new = tmp_path / "new.csv"
    table.drop("bought").write_csv(new)
    scores = ClickPrediction.predict_file(model, data.spec, new, batch_size=400)["score"].to_numpy()
    bought = table["bought"].to_numpy()
    assert float((scores[bought][:, None] > scores[~bought][None]).mean()) > 0.8
    assert {(row["first"], row["second"]) for row in pair_report(model, data.schema)} >= {("city", "shop")}


def test_a_table_with_one_category_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    draw = np.random.default_rng(0)
    pl.DataFrame(
        {"city": draw.choice(["x", "y"], 300), "price": draw.normal(size=300), "label": draw.integers(0, 2, 300)}
    ).write_csv(path)
    config = replace(SMALL, table=TableConfig(numeric="standardize"))
    with pytest.raises(UserError, match=r"one\.csv: categorical fields: city; a pair needs two or more"):
        SYSTEM.load_data(config, Source(path))


def test_a_table_read_by_another_system_can_be_used() -> None:
    """As `penstock compare` does: nobody counted its crosses."""
    data = ClickLog(ClickLogConfig(informative_values=5, noise_values=9, train_rows=500))
    model = SYSTEM.arms(SMALL, data.spec)["gated"]()
    assert isinstance(model, OptInterModel)
    assert not any(model.crosses.exact)
    task = ClickPrediction(model, SMALL.train, data)
    batch = next(iter(data.train(100, 0)))
    loss, _ = task.step(batch)
    loss.backward()
    model.gate.harden()
    assert "table_pair_memorised" not in SYSTEM.measure("gated", task, SMALL, data, 0)
    other = SYSTEM.load_data(SMALL, Source())
    assert isinstance(other, CrossedTable)
    assert {"fields", "num_ids", "schema", "crosses"} <= set(other.spec)


def cells(**metrics: float) -> list[dict[str, Any]]:
    auc = {"gated": 0.84, "ungated": 0.842, "factorised": 0.81, "naive": 0.74, "random": 0.8}
    own = {"parameters_after_compaction": 1000.0}
    return [
        {"arm": arm, "seed": seed, "metrics": {"auc": value + seed * 1e-4} | own | (metrics if arm == "gated" else {})}
        for arm, value in auc.items()
        for seed in range(3)
    ]


def test_claims_are_judged_and_left_out_without_truth() -> None:
    known = Results(cells(table_pair_memorised=1.0, cross_rows_kept=0.6), {})
    judged = SYSTEM.claims(SMALL, known)
    assert set(judged) == {"method_found", "accuracy", "naive_worst", "size"}
    verdicts = [effect.verdict for one in judged.values() for effect in (one if isinstance(one, list) else [one])]
    assert verdicts == ["holds"] * 6
    lost = SYSTEM.claims(SMALL, Results(cells(table_pair_memorised=0.0, cross_rows_kept=1.0), {}))
    assert [lost[name].verdict for name in ("method_found", "size")] == ["does not hold"] * 2
    assert set(SYSTEM.claims(SMALL, Results(cells(cross_rows_kept=0.6), {}))) == {"accuracy", "naive_worst", "size"}
    assert not SYSTEM.claims(SMALL, Results([c for c in cells() if c["arm"] == "gated"], {}))
    assert set(SYSTEM.figures(SMALL, known)) == {"Accuracy against size"}
    axes = size_figure(known).axes[0]
    assert len(axes.collections) == 5


def test_the_heat_map_shows_the_choice_and_the_names() -> None:
    model = whole()
    model.gate.alpha.data = torch.tensor([[0.0, 2.5, 0.0], [1.0, 0.0, 0.25], [0.0, 0.0, 3.0]]).double()
    axes = methods_figure(model, ["city", "shop", "hour"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["city", "shop"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["shop", "hour"]
    shown = axes.images[0].get_array()
    assert np.array_equal(np.ma.filled(shown, -1), [[1, -1], [0, 2]])
    assert sorted(text.get_text() for text in axes.texts) == ["0.75", "2.50", "3.00"]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["memorised", "factorised", "ignored"]


def test_the_heat_map_of_many_fields_has_names_and_colours_only() -> None:
    fields = [f"field_{i}" for i in range(40)]
    pairs = 40 * 39 // 2
    model = OptInterModel(
        80, range(0, 80, 2), [2] * 40, [1] * pairs, [False] * pairs, method="search", dim=2, pair_dim=2, mlp_dims=(4,)
    )
    figure = methods_figure(model, fields)
    axes = figure.axes[0]
    assert not axes.texts
    assert len(axes.get_xticklabels()) == len(axes.get_yticklabels()) == 39
    assert figure.get_size_inches().max() < 14, "a page can show it"


def test_published_settings() -> None:
    criteo, avazu = PUBLISHED["criteo"], PUBLISHED["avazu"]
    assert (criteo.dim, criteo.pair_dim, criteo.mlp_dims) == (20, 10, (700,) * 5)
    assert (criteo.search.lr, criteo.search.gate_lr, criteo.search.weight_decay) == (1e-4, 1e-3, 3e-8)
    assert (avazu.search.lr, avazu.search.gate_lr, avazu.search.weight_decay) == (1e-3, 1e-3, 0.0)
    assert (criteo.table.min_count, criteo.crosses.min_count) == (20, 20)
    assert (avazu.table.min_count, avazu.crosses.min_count) == (5, 1)
    for config, sizes in ((criteo, (21_037_504, 10)), (avazu, (240_329_481, 4))):
        config.search.check()
        assert (config.train.batch_size, config.train.lr, config.train.weight_decay) == (2000, 1e-3, 3e-8)
        assert megabytes(*sizes) < config.crosses.memory_mb
        assert (config.search.tau, config.search.alpha_init, config.search.patience) == (5e-5, "xavier", 1)
    with torch.device("meta"):
        big = VARIANTS["optinter_criteo"](1_000_000, 26, 21_037_178 + 325 + 1, numeric_ids=range(13))
    flat = 39 * 20 + 325 * 10
    perceptron = flat * 700 + 4 * 700 * 700 + 5 * 3 * 700 + 701
    assert sum(p.numel() for p in big.parameters()) == 1_000_000 * 30 + 21_037_504 * 10 + perceptron + 325 * 3
