"""COMET: gates against their definitions, local search, the mixture, its data and its task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import penstock
from penstock.data.base import Source
from penstock.data.mixtures import LabelTask, MixtureConfig, MixtureData, PlantedAudience, PlantedMixture, load_mixture
from penstock.data.schema import TableBatch
from penstock.errors import UserError
from penstock.gates import Gate, Routing
from penstock.lab.cards import card
from penstock.lab.results import Results
from penstock.nn.experts import collect_losses
from penstock.ops.routing import smooth_step
from penstock.systems.experts.comet.checkpoint import from_authors, to_authors
from penstock.systems.experts.comet.experiment import SYSTEM, CometConfig, search_alone
from penstock.systems.experts.comet.model import (
    VARIANTS,
    CometGate,
    DSelectKGate,
    HashGate,
    MixtureOfExperts,
    SinkhornPermutation,
    SoftmaxGate,
    TopkGate,
)
from penstock.tasks.base import Training
from penstock.tasks.mixture_regression import ExpertUse, MixtureRegression, SquaredError

DOUBLE = torch.float64


def routed(gate: nn.Module, *args: Any) -> Tensor:
    """A gate's row over all experts, (B, N)."""
    routing = gate(*args)
    assert isinstance(routing, Routing)
    return routing.dense()


def spread(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode with normal parameters, so that its gates are neither flat nor all alike."""
    for parameter in module.double().eval().parameters():
        nn.init.normal_(parameter)
    return module


# -- the tree gate ---------------------------------------------------------------------------------------------


def tree_by_recursion(gate: CometGate, x_D: Tensor) -> Tensor:
    """One sample's gate row by the definition: walk each tree from its root, then one softmax over all leaves."""
    state = to_authors(gate, gate.state_dict())
    leaves: list[tuple[Tensor, Tensor]] = []

    def walk(node: int, path_K: Tensor) -> None:
        if node >= gate.num_experts - 1:
            leaves.append((x_D @ state[f"node.{node}.output.kernel"] + state[f"node.{node}.output.bias"], path_K))
            return
        logit = x_D @ state[f"node.{node}.selector.kernel"] + state[f"node.{node}.selector.bias"]
        left_K = smooth_step(logit, gate.gamma)
        walk(2 * node + 1, path_K * left_K)
        walk(2 * node + 2, path_K * (1 - left_K))

    walk(0, torch.ones(gate.top_k, dtype=DOUBLE))
    scores = [torch.where(path > 0, leaf + (path + 1e-8).log(), -torch.inf) for leaf, path in leaves]
    return torch.stack(scores, -1).flatten().softmax(0).view(gate.top_k, -1).sum(0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 17), st.integers(1, 3), st.sampled_from([0.5, 5.0, 100.0]), st.integers(0, 99))
def test_tree_gate_is_its_recursive_definition_for_any_number_of_experts(
    n: int, k: int, gamma: float, seed: int
) -> None:
    torch.manual_seed(seed)
    gate = spread(CometGate(3, n, min(k, n), gamma=gamma))
    x = torch.randn(4, 3, dtype=DOUBLE)
    row = routed(gate, x)
    for b in range(4):
        torch.testing.assert_close(row[b], tree_by_recursion(gate, x[b]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(row.sum(-1), torch.ones(4, dtype=DOUBLE))


def test_saturated_trees_open_at_most_k_experts_and_stop_learning() -> None:
    torch.manual_seed(0)
    gate = spread(CometGate(4, 11, 3, gamma=1e-3))
    row = routed(gate, torch.randn(64, 4, dtype=DOUBLE))
    assert ((row > 0).sum(-1) <= 3).all()
    (row * torch.randn_like(row)).sum().backward()
    gradient = gate.nodes_of(gate.nodes.weight.grad)  # type: ignore[arg-type]
    assert gradient[:, :10].abs().max() == 0  # splits
    assert gradient[:, 10:].abs().max() > 0  # leaves


def test_entropy_penalty_makes_the_tree_gate_sparse() -> None:
    torch.manual_seed(0)
    gate, x = CometGate(3, 8, 2, entropy_reg=1.0), torch.randn(256, 3)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    assert (routed(gate.eval(), x) > 1e-5).sum(-1).double().mean() == 8
    gate.train()
    for _ in range(60):
        with collect_losses() as losses:
            gate(x)
        optimizer.zero_grad()
        losses["entropy"].backward()
        optimizer.step()
    assert (routed(gate.eval(), x) > 1e-5).sum(-1).double().mean() < 3


def test_nan_inputs_do_not_look_like_a_decision() -> None:
    assert routed(CometGate(3, 5).eval(), torch.full((2, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize("gate", [CometGate(3, 5), DSelectKGate(3, 5)])
def test_gates_decide_in_float32_when_the_rest_is_coarse(gate: Gate) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    fine = routed(gate.eval().float(), x)
    coarse = routed(gate.bfloat16(), x.bfloat16())
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, fine, rtol=0.05, atol=0.05)


def test_penalties_are_added_in_training_only() -> None:
    gates: list[Gate] = [CometGate(3, 6, entropy_reg=1.0), DSelectKGate(3, 6, entropy_reg=1.0)]
    for gate, names in zip(gates, ({"entropy"}, {"entropy", "reachability"}), strict=True):
        with collect_losses() as training:
            gate.train()(torch.randn(4, 3))
        with collect_losses() as evaluation:
            gate.eval()(torch.randn(4, 3))
        assert set(training) == names
        assert not evaluation


# -- the other gates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 6, 8])
def test_dselect_k_reads_the_number_of_an_expert_bit_by_bit(n: int) -> None:
    torch.manual_seed(0)
    gate = spread(DSelectKGate(3, n, 2, gamma=8.0))
    x = torch.randn(5, 3, dtype=DOUBLE)
    bits = math.ceil(math.log2(n))
    z = smooth_step(gate.codes(x).unflatten(-1, (2, bits)), 8.0)
    expected = torch.zeros(5, n, dtype=DOUBLE)
    weights = gate.weights(x).softmax(-1)
    for expert in range(n):
        code = [int(digit) for digit in format(expert, f"0{bits}b")]
        factors = [z[..., b] if bit else 1 - z[..., b] for b, bit in enumerate(code)]
        expected[:, expert] = (weights * torch.stack(factors).prod(0)).sum(-1)
    row = routed(gate, x)
    torch.testing.assert_close(row, expected)
    assert bool((row.sum(-1) < 1 - 1e-6).any()) == (n == 6)  # numbers 6 and 7 name no expert


def test_static_dselect_k_is_the_same_for_every_sample_and_follows_the_permutation() -> None:
    torch.manual_seed(0)
    gate = spread(DSelectKGate(None, 4, 2))
    x = torch.randn(3, 7, dtype=DOUBLE)
    swap = torch.eye(4, dtype=DOUBLE)[[1, 0, 3, 2]].expand(2, 4, 4)
    row = routed(gate, x)
    assert torch.equal(row[0], row[2])
    torch.testing.assert_close(routed(gate, x, swap), row[:, [1, 0, 3, 2]])


def test_topk_keeps_a_logit_of_exactly_zero() -> None:
    gate = TopkGate(2, 3, 2).double()
    nn.init.zeros_(gate.proj.weight)
    gate.proj.bias.data = torch.tensor([0.0, -1.0, -2.0], dtype=DOUBLE)
    expected = torch.tensor([[0.0, -1.0]], dtype=DOUBLE).softmax(-1)
    torch.testing.assert_close(
        routed(gate, torch.ones(1, 2, dtype=DOUBLE)), torch.cat([expected, torch.zeros(1, 1)], -1)
    )


def test_jitter_is_noise_in_training_only() -> None:
    torch.manual_seed(0)
    gate, x = TopkGate(4, 6, 2, jitter=True), torch.randn(8, 4)
    assert not torch.equal(gate(x).logits, gate(x).logits)
    gate.eval()
    assert torch.equal(gate(x).logits, gate(x).logits)


def test_hash_gate_sends_a_key_to_its_expert() -> None:
    gate = HashGate(3, torch.tensor([2, 0, 0, 1]))
    assert gate(torch.tensor([0, 3, 1])).indices.tolist() == [[2], [1], [0]]
    for keys in ([4], [-1]):
        with pytest.raises(ValueError, match="must be from 0 to 3"):
            gate(torch.tensor(keys))
    with pytest.raises(ValueError, match="experts run from 0 to 3; they must be from 0 to 2"):
        HashGate(3, torch.tensor([0, 3]))


@pytest.mark.parametrize("gate", [TopkGate(3, 4, 2), SoftmaxGate(3, 4), CometGate(3, 4, 2), DSelectKGate(3, 4, 2)])
def test_what_a_position_holds_goes_to_the_expert_in_its_column(gate: Gate) -> None:
    torch.manual_seed(0)
    spread(gate)
    x = torch.randn(6, 3, dtype=DOUBLE)
    columns = [2, 0, 3, 1]
    hard = torch.eye(4, dtype=DOUBLE)[columns].expand(2, 4, 4)
    before, after = routed(gate, x), gate(x, hard)
    torch.testing.assert_close(after.dense()[:, columns], before)
    torch.testing.assert_close(after.logits[:, columns], gate(x).logits)


# -- local search ----------------------------------------------------------------------------------------------


def test_permutation_goes_from_soft_to_hard_and_evaluation_does_not_advance_it() -> None:
    torch.manual_seed(0)
    search = SinkhornPermutation(5, 3, steps=4, tau0=1.0, tau1=0.1, entropy_reg=0.0)
    assert torch.equal(search.eval()(), torch.eye(5).expand(3, 5, 5))
    search.train()
    for call in range(1, 7):
        matrix = search()
        assert matrix.shape == (3, 5, 5)
        torch.testing.assert_close(matrix.sum(-2), torch.ones(3, 5))
        assert matrix.requires_grad == (call < 4)
        assert bool(((matrix == 0) | (matrix == 1)).all()) == (call >= 4)
        search.eval()
        assert torch.equal(search(), search())
        assert int(search.train().calls) == call


def test_schedule_is_log_linear_in_temperature_and_linear_in_iterations() -> None:
    search = SinkhornPermutation(4, 1, steps=10)
    assert search.schedule(0) == pytest.approx((1e-3, 20))
    assert search.schedule(5) == pytest.approx((1e-5, 85))
    assert search.schedule(10) == pytest.approx((1e-7, 150))


def test_permutation_is_kept_in_the_state() -> None:
    torch.manual_seed(0)
    search = SinkhornPermutation(6, 2, steps=9, tau0=0.1, per_tree=True, entropy_reg=0.0).train()
    search()
    other = SinkhornPermutation(6, 2, steps=9, tau0=0.1, per_tree=True)
    other.load_state_dict(search.state_dict())
    assert torch.equal(other.eval()(), search.eval()())
    assert not torch.equal(search()[0], search()[1])  # each tree its own
    assert int(other.calls) == 1


def test_noise_explores() -> None:
    torch.manual_seed(0)
    search = SinkhornPermutation(4, 1, steps=50, tau0=1.0, tau1=0.5, noise=1.0, entropy_reg=0.0).train()
    assert (search() - search()).abs().max() > 0.05


def test_local_search_finds_the_planted_order_when_scores_and_temperature_agree() -> None:
    assert search_alone(0, tau0=1.0, tau1=1e-2) == pytest.approx({"matches": 1.0, "nmse": 0.0}, abs=1e-6)
    assert search_alone(0, tau0=1.0, tau1=1e-2, steps=0)["matches"] < 0.5


# -- the mixture -----------------------------------------------------------------------------------------------

GATES = ("comet", "dselect_k", "dselect_k_static", "topk", "hash", "softmax", "uniform")


def small(gate: str = "comet", **options: Any) -> MixtureOfExperts:
    settings: dict[str, Any] = {"num_numeric": 3, "num_experts": 6, "gamma": 4.0} | options
    return MixtureOfExperts(gate=gate, **settings)  # type: ignore[arg-type]


def inputs(batch: int = 8, *, fields: int = 0, ids: int = 1, width: int = 3, length: int = 0) -> tuple[Tensor, ...]:
    sequences = torch.randint(ids, (batch, 1, length)) if length else torch.zeros(batch, 0, 0, dtype=torch.int64)
    return torch.randint(ids, (batch, fields)), torch.randn(batch, width), sequences


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_serves_several_tasks_and_acts_when_forced(gate: str) -> None:
    torch.manual_seed(0)
    model = small(gate, num_tasks=2, expert_dim=5, head_dim=4, permutation_steps=3, tau0=0.1).eval()
    batch = inputs()
    y = model(*batch)
    assert y.shape == (8, 2)
    with penstock.force(model, 4):
        forced = model(*batch)
    outputs = model.experts(batch[1])
    for task, head in enumerate(model.heads):
        torch.testing.assert_close(forced[:, task], head(outputs[4])[:, 0])
    with penstock.force(model, "open"):
        opened = model(*batch)
    for task, head in enumerate(model.heads):
        torch.testing.assert_close(opened[:, task], head(outputs.mean(0))[:, 0])
    if gate != "uniform":
        assert not torch.allclose(forced, y)


@pytest.mark.parametrize("gate", GATES)
def test_a_sample_does_not_depend_on_its_batch_mates(gate: str) -> None:
    torch.manual_seed(0)
    model = spread(small(gate)).eval()
    batch = tuple(part.double() if part.is_floating_point() else part for part in inputs(16))
    alone = torch.cat([model(*(part[i : i + 1] for part in batch)) for i in range(16)])
    torch.testing.assert_close(model(*batch), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("search", [0, 1, 5])
def test_skipping_experts_changes_neither_output_nor_gradient(gate: str, search: int) -> None:
    """Dense and sparse training steps are equal: without local search, with a hard and with a soft permutation."""
    gradients = []
    for dispatch in ("dense", "sparse"):
        torch.manual_seed(0)
        model = spread(small(gate, permutation_steps=search, gamma=1.0, entropy_reg=0.1)).train()
        model.dispatch = dispatch  # type: ignore[assignment]
        ids, numeric, sequences = inputs(32)
        with collect_losses() as losses:
            y = model(ids, numeric.double(), sequences)
        (y.square().mean() + sum(losses.values())).backward()
        gradients.append([y, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-12)


def test_ungated_arm_is_the_open_gated_arm() -> None:
    torch.manual_seed(0)
    gated, ungated = small("comet").eval(), small("uniform").eval()
    ungated.experts.load_state_dict(gated.experts.state_dict())
    batch = inputs()
    with penstock.force(gated, "open"):
        torch.testing.assert_close(gated(*batch), ungated(*batch))
    torch.testing.assert_close(penstock.twin(gated)(*batch), ungated(*batch))


def test_twins_can_be_trained() -> None:
    twin = penstock.twin(small("comet", entropy_reg=1.0).train())
    with collect_losses() as losses:
        twin(*inputs()).sum().backward()
    assert not losses
    assert small("hash").train()(*inputs()).requires_grad
    assert penstock.twin(small("hash"))(*inputs()).shape == (8, 1)


def test_padding_of_a_sequence_does_not_count() -> None:
    model = MixtureOfExperts(num_ids=20, num_fields=1, sequence_offsets=(10,), embed_dim=4, num_experts=4)
    ids = torch.tensor([[1], [1], [1]])
    sequences = torch.tensor([[[11, 12, 10]], [[12, 11, 10]], [[10, 10, 10]]])
    features = model.features(ids, torch.zeros(3, 0), sequences)
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[0, 4:], model.embedding.weight[11:13].mean(0))  # type: ignore[union-attr]
    assert features[2, 4:].tolist() == [0.0] * 4


def test_hash_of_numbers_is_spread_over_experts_and_fixed() -> None:
    model = small("hash")
    numeric = torch.randn(4000, 3)
    keys = model.keys(torch.zeros(4000, 0), numeric)
    assert torch.equal(keys[7:8], model.keys(torch.zeros(1, 0), numeric[7:8]))
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 1024
    assert keys.bincount(minlength=1024).max() < 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 1}, "2 experts or more"),
        ({"top_k": 0}, "from 1 to num_experts=6"),
        ({"top_k": 7}, "from 1 to num_experts=6"),
        ({"gamma": 0.0}, "must be above 0"),
        ({"gamma": math.nan}, "must be above 0"),
        ({"num_numeric": 0}, "need an input"),
        ({"expert_dim": 4}, "give both"),
        ({"gate": "soft"}, "gate='soft' must be one of"),
        ({"permutation_steps": -1}, "1 training step or more"),
        ({"permutation_steps": 3, "tau1": 0.0}, "must be positive"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**({"gate": "comet"} | options))


def test_described_nets_have_the_parameters_of_the_card() -> None:
    assert set(VARIANTS) == set(card("comet").variants)
    for name, build in VARIANTS.items():
        with torch.device("meta"):
            model = build()
        assert sum(p.numel() for p in model.parameters()) == card("comet").variants[name]


def test_authors_layout_goes_both_ways_and_gaps_are_named() -> None:
    torch.manual_seed(0)
    for gate in (CometGate(3, 5, 2), DSelectKGate(3, 6, 2)):
        spread(gate)
        theirs = to_authors(gate, gate.state_dict())
        again = from_authors(theirs, num_experts=gate.num_experts)
        x = torch.randn(4, 3, dtype=DOUBLE)
        torch.testing.assert_close(routed(again, x), routed(gate, x))
    tree = to_authors(CometGate(3, 5, 2), CometGate(3, 5, 2).state_dict())
    with pytest.raises(UserError, match=r"no node\.3\.selector\.bias"):
        from_authors({k: v for k, v in tree.items() if k != "node.3.selector.bias"})
    with pytest.raises(UserError, match="not expected: node"):
        from_authors(tree | {"node.0.selector.gain": torch.ones(2)})
    with pytest.raises(UserError, match="no layer of COMET"):
        from_authors({"fc.weight": torch.ones(2)})


def test_static_dselect_k_and_a_stored_permutation_load() -> None:
    static = from_authors({"z_logits": torch.tensor([[[9.0, -9.0]], [[-9.0, -9.0]]]), "w_logits": torch.zeros(2, 1)})
    assert routed(static, torch.zeros(1, 3)).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    stored = torch.eye(3)[[1, 2, 0]][None]
    state = {"permutation_log_weights": torch.zeros(1, 3, 3), "log_weights": stored, "iterations": torch.tensor(7)}
    search = from_authors(state, top_k=2, steps=5).eval()
    assert torch.equal(search(), stored.expand(2, 3, 3))


# -- data ------------------------------------------------------------------------------------------------------


def test_planted_data_is_a_linear_map_in_each_region() -> None:
    data = load_mixture(MixtureConfig(train_size=500), Source())
    truth = data.truth
    assert isinstance(truth, PlantedMixture)
    rows = data.splits["train"]
    region = truth.region(rows.numeric)
    assert region.tolist() == [int(sum(2**i * (x[i] > 0) for i in range(3))) for x in rows.numeric]
    for r in range(8):
        mine = region == r
        fitted = np.linalg.lstsq(rows.numeric[mine], rows.label[mine, 0], rcond=None)[0]
        np.testing.assert_allclose(fitted, truth.maps[r], atol=1e-4)
    again = load_mixture(MixtureConfig(train_size=500), Source())
    np.testing.assert_array_equal(again.splits["test"].label, data.splits["test"].label)


def test_ratings_follow_the_planted_audience() -> None:
    data = load_mixture(MixtureConfig(kind="ratings", train_size=60_000), Source())
    truth = data.truth
    assert isinstance(truth, PlantedAudience)
    rows = data.splits["train"]
    watched, rating = rows.label.T
    assert set(np.unique(rating)) == {0, 1, 2, 3, 4, 5}
    np.testing.assert_array_equal(rating > 0, watched == 1)
    user, item = (rows.ids - np.array(data.spec["offsets"]) - 1).T
    chance = truth.watches(user, item)
    for low, high in ((0.0, 0.2), (0.4, 0.6), (0.8, 1.0)):
        inside = (chance > low) & (chance < high)
        assert watched[inside].mean() == pytest.approx(chance[inside].mean(), abs=0.02)
    seen = (watched == 1) & (np.abs(truth.liking(user, item) - 3) < 1)
    assert np.mean(rating[seen] - truth.liking(user, item)[seen]) == pytest.approx(0, abs=0.05)
    tasks = LabelTask.of(data.spec)
    assert [(t.name, t.kind, t.weight, t.masked) for t in tasks] == [
        ("watched", "binary", 0.1, False),
        ("rating", "regression", 0.9, True),
    ]
    assert tasks[1].mean == pytest.approx(rating[watched == 1].mean(), abs=1e-5)


@pytest.fixture
def own_table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    user, item = rng.integers(12, size=300), rng.integers(9, size=300)
    stars = np.where(rng.random(300) < 0.3, 0, rng.integers(1, 6, size=300))
    frame = pl.DataFrame(
        {
            "user_id": user,
            "item_id": item,
            "age": rng.normal(40, 9, size=300),
            "genres": ["drama|war" if u % 2 else "comedy" for u in user],
            "watched": np.where(stars > 0, "yes", "no"),
            "stars": stars,
            "price": 1e6 + 1e4 * rng.standard_normal(300),
        }
    )
    path = tmp_path / "own.csv"
    frame.write_csv(path)
    return path


def test_a_table_of_ones_own_trains_and_predicts_in_its_own_units(own_table: Path) -> None:
    config = CometConfig(data=MixtureConfig(zero_is_missing=("stars",)), train=Training(steps=3))
    data = SYSTEM.load_data(config, Source(own_table, label="watched,stars,price"))
    assert isinstance(data, MixtureData)
    model = SYSTEM.arms(config, data.spec)["local_search"]().eval()
    predicted = MixtureRegression.predict_file(model, data.spec, own_table, batch_size=64)
    assert predicted.columns == ["watched", "watched_probability", "stars", "price"]
    assert predicted.height == 300
    assert predicted["watched"].is_in(["yes", "no"]).all()
    assert ((predicted["watched_probability"] > 0.5) == (predicted["watched"] == "yes")).all()
    assert predicted["price"].mean() == pytest.approx(1e6, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_is_missing": ("watched",)}, "names 'watched'; the labels that are numbers are stars"),
        ({"task_weights": (1.0,)}, r"each label \(watched, stars\)"),
        ({"task_weights": (0.0, 0.0)}, "not all 0"),
    ],
)
def test_settings_that_do_not_fit_the_table_are_refused(own_table: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_mixture(MixtureConfig(**options), Source(own_table, label="watched,stars"))


def test_too_few_embedded_rows_are_refused() -> None:
    with pytest.raises(UserError, match="2 rows or more"):
        load_mixture(MixtureConfig(test_size=1), Source())


# -- the task --------------------------------------------------------------------------------------------------


def make_task(gate: str = "comet", config: MixtureConfig | None = None, **options: Any) -> MixtureRegression:
    data = load_mixture(config or MixtureConfig(), Source())
    spec = data.spec
    sizes = {"num_ids": spec["num_ids"], "num_fields": spec["num_id_fields"], "num_numeric": spec["num_numeric"]}
    model = small(gate, **(sizes | {"num_tasks": len(spec["tasks"])} | options))
    return MixtureRegression(model, Training(batch_size=64), data)


def test_regularisers_are_trained_on_and_not_reported() -> None:
    torch.manual_seed(0)
    task = make_task(entropy_reg=0.5)
    batch = next(iter(task.data.train(64, 0)))
    loss, outputs = task.train().step(batch)
    reported = task.reported_loss(loss, outputs, batch)
    assert loss.item() > reported.item() + 0.1
    loss.backward()
    penalised = task.model.gates[0].nodes.weight.grad.clone()  # type: ignore[union-attr,index]
    task.zero_grad()
    task.model.gates[0].entropy_reg = 0.0  # type: ignore[union-attr,index,assignment]
    free, outputs = task.step(batch)
    assert free.item() == pytest.approx(reported.item(), rel=1e-6)
    free.backward()
    assert not torch.allclose(task.model.gates[0].nodes.weight.grad, penalised)  # type: ignore[union-attr,index]


def test_labels_that_are_not_given_change_nothing() -> None:
    torch.manual_seed(0)
    task = make_task(config=MixtureConfig(kind="ratings", train_size=200)).eval()
    batch = next(iter(task.data.train(64, 0)))
    weights = {t.name: t.weight for t in task.label_tasks}
    predictions, _ = task.watched(batch)
    rated = batch.label[:, 1] > 0
    scale = task.label_tasks[1]
    expected = weights["watched"] * nn.functional.binary_cross_entropy_with_logits(predictions[:, 0], batch.label[:, 0])
    errors = predictions[rated, 1] - (batch.label[rated, 1] - scale.mean) / scale.std
    torch.testing.assert_close(
        task.label_loss(predictions, batch), expected + weights["rating"] * errors.square().mean()
    )
    none = TableBatch(batch.ids, batch.numeric, batch.sequences, batch.label * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(task.label_loss(predictions, none), expected)


def test_metrics_have_the_names_and_values_of_their_labels() -> None:
    torch.manual_seed(0)
    task = make_task("topk", config=MixtureConfig(kind="ratings", train_size=2000), top_k=3).eval()
    metrics = task.new_metrics()
    given, predicted = [], []
    for batch in task.data.train(500, 0):
        _, outputs = task.step(batch)
        task.update(metrics, outputs, batch)
        given.append(batch.label)
        predicted.append(outputs.predictions.detach())
    values = {k: float(v) for k, v in metrics.compute().items()}
    label, guess = torch.cat(given), torch.cat(predicted)
    scale = task.label_tasks[1]
    rated = label[:, 1] > 0
    error = (guess[rated, 1] * scale.std + scale.mean - label[rated, 1]).square().mean()
    assert values["rating_mse"] == pytest.approx(float(error), rel=1e-5)
    assert values["rating_nmse"] == pytest.approx(float(error / label[rated, 1].var(correction=0)), rel=1e-5)
    assert values["watched_accuracy"] == pytest.approx(float(((guess[:, 0] > 0) == label[:, 0]).double().mean()))
    assert 0 < values["watched_auc"] < 1
    assert values["experts_per_sample"] == 3
    assert values["share_within_k"] == 1


def test_expert_use_counts_open_values() -> None:
    use = ExpertUse(top_k=2)
    use.update([torch.tensor([[0.5, 0.5, 0.0, 1e-6], [0.3, 0.3, 0.4, 0.0]])])
    use.update([torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])])
    values = {k: float(v) for k, v in use.compute().items()}
    assert values == {"experts_per_sample": 1.75, "share_within_k": 0.75, "dead_experts": 0.25}


def test_squared_error_of_the_mean_is_one_variance() -> None:
    error, label = SquaredError(), torch.tensor([1.0, 2.0, 6.0])
    error.update(torch.full((3,), 3.0), label)
    values = {k: float(v) for k, v in error.compute().items()}
    assert values == pytest.approx({"mse": 14 / 3, "nmse": 1.0})


@pytest.mark.parametrize("arm", ["gated", "dselect_k", "local_search"])
def test_arms_learn_and_are_reproducible(arm: str) -> None:
    config = CometConfig(train=Training(steps=60, batch_size=256))
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        data = SYSTEM.load_data(config, Source())
        task = MixtureRegression(SYSTEM.arms(config, data.spec)[arm](), config.train, data)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(task.parameters(), lr=2e-2)
        steps = []
        for _, batch in zip(range(40), (b for _ in range(4) for b in data.train(256, 0)), strict=False):
            loss, outputs = task.step(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(outputs.loss.item())
        losses.append(steps)
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-5:]) < 0.75 * np.mean(losses[0][:5])


def test_local_search_needs_a_share_of_the_steps() -> None:
    spec = load_mixture(MixtureConfig(test_size=2), Source()).spec
    by_epochs = CometConfig(train=Training(steps=0, epochs=4, batch_size=256))
    model = SYSTEM.arms(by_epochs, spec)["local_search"]()
    assert model.permutation.steps == round(0.1 * 4 * 12)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="search_ratio=0"):
        SYSTEM.arms(CometConfig(search_ratio=0.0), spec)


def test_figures_show_experts_and_regions() -> None:
    task = make_task(config=MixtureConfig(test_size=300))
    assert set(task.figures()) == {"How much each expert is used", "Which expert answers in which planted region"}
    ratings = make_task(config=MixtureConfig(kind="ratings", train_size=50, test_size=300))
    assert [axes.get_title() for axes in ratings.figures()["How much each expert is used"].axes] == [
        "watched",
        "rating",
    ]


def test_claims_need_their_arms() -> None:
    cells = [
        {"arm": arm, "seed": seed, "metrics": {"nmse": nmse, "loss": nmse, "experts_per_sample": 3.0}}
        for arm, nmse in (("gated", 0.1), ("topk", 0.25), ("ungated", 0.75))
        for seed in (0, 1)
    ]
    trial = {"scaled_matches": 1.0, "authors_matches": 0.25, "none_matches": 0.125}
    claims = SYSTEM.claims(CometConfig(), Results(cells, {"local_search": [trial] * 3}))
    assert set(claims) == {"gates", "local_search"}
    assert [effect.values for effect in claims["gates"]] == [pytest.approx([0.4, 0.4]), pytest.approx([1 / 3, 1 / 3])]  # type: ignore[union-attr]
    assert SYSTEM.figures(CometConfig(), Results(cells, {"local_search": [trial] * 3}))
