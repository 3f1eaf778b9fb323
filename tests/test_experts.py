"""Routing pieces, stacked experts, sparse dispatch against dense, balance losses."""

from __future__ import annotations

import itertools
import warnings
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from penstock.gates import Routing
from penstock.nn.experts import (
    Experts,
    add_loss,
    collect_losses,
    importance_loss,
    load_loss,
    mixture,
    mixtures,
    switch_loss,
    weighted_sum,
    z_loss,
)
from penstock.ops.routing import assignment, branch, entropy, grouped_matmul, sinkhorn, smooth_step

GateKind = Literal["topk", "relu", "softmax", "tensor"]


def gate_values(kind: GateKind, logits: Tensor, top_k: int) -> Tensor | Routing:
    """Gates whose zeros are flat, of every shape that `mixtures` takes."""
    if kind == "topk":
        kept, indices = logits.topk(top_k, -1)
        return Routing(kept.softmax(-1), indices, logits)
    if kind == "relu":
        return Routing.from_dense(logits.relu(), logits)
    return Routing.from_dense(logits.softmax(-1)) if kind == "softmax" else smooth_step(logits)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, GateKind, int, bool]:
    experts = draw(st.integers(1, 6))
    tokens, top_k = draw(st.integers(0, 9)), draw(st.integers(1, experts))
    return (
        experts,
        tokens,
        top_k,
        draw(st.sampled_from(get_args(GateKind))),
        draw(st.integers(0, 999)),
        draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_sparse_dispatch_gives_the_values_and_gradients_of_dense(
    case: tuple[int, int, int, GateKind, int, bool],
) -> None:
    num_experts, tokens, top_k, kind, seed, deep = case
    torch.manual_seed(seed)
    experts = Experts(num_experts, (3, 4, 2) if deep else (3, 2)).double()
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    # Whole numbers: ties among the logits, and experts that nobody chooses.
    logits = torch.randint(-2, 3, (tokens, num_experts), dtype=torch.float64, requires_grad=True)
    target = torch.randn(tokens, 2, dtype=torch.float64)
    results = []
    for dispatch in ("dense", "sparse", "auto"):
        y = mixture(experts, x, gate_values(kind, logits, top_k), dispatch=dispatch, saturated=True)
        results.append([y, *torch.autograd.grad(((y - target) ** 2).sum(), [x, logits, *experts.parameters()])])
    for dense, sparse, auto in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(auto, dense, rtol=1e-10, atol=1e-12)


def test_several_gates_over_the_same_experts_are_each_their_own_mixture() -> None:
    torch.manual_seed(0)
    experts = Experts(5, (3, 2)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    gates = [gate_values("topk", torch.randn(2, 4, 5, dtype=torch.float64), k) for k in (1, 2)]
    together = mixtures(experts, x, gates, dispatch="sparse")
    for y, gate in zip(together, gates, strict=True):
        assert y.shape == (2, 4, 2)
        torch.testing.assert_close(y, mixture(experts, x, gate, dispatch="dense"))


def test_experts_without_weight_are_not_evaluated() -> None:
    experts = Experts(4, (3, 2))
    with torch.no_grad():
        experts.layers[0].weight[2:] = torch.nan  # type: ignore[index,union-attr]
    values = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(6, 4)
    x = torch.randn(6, 3)
    assert mixture(experts, x, values, dispatch="sparse").isfinite().all()
    assert mixture(experts, x, Routing.from_dense(values)).isfinite().all()
    assert mixture(experts, x, values, dispatch="dense").isnan().all()


def test_auto_dispatch_loses_no_gradient_of_a_zero_weight() -> None:
    """A straight-through gate sends a gradient to experts at zero, so none may be skipped while it is trained."""
    torch.manual_seed(0)
    experts = Experts(4, (3, 1))
    logits = torch.randn(5, 4, requires_grad=True)
    hard = torch.zeros(5, 4).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    gradients = []
    for dispatch in ("auto", "dense"):
        soft = logits.softmax(-1)
        gate = hard + soft - soft.detach()
        y = mixture(experts, torch.ones(5, 3), gate, dispatch=dispatch)
        gradients.append(torch.autograd.grad(y.sum(), logits)[0])
    torch.testing.assert_close(*gradients)
    assert (gradients[0] != 0).all()


def test_stacked_experts_are_the_separate_networks_they_stand_for() -> None:
    torch.manual_seed(0)
    experts = Experts(3, (4, 6, 2), activation=nn.Tanh(), activate_output=True)
    x = torch.randn(5, 4)
    y = experts(x)
    first, second = experts.layers
    for e in range(3):
        h = torch.tanh(x @ first.weight[e] + first.bias[e])
        torch.testing.assert_close(y[e], torch.tanh(h @ second.weight[e] + second.bias[e]))
    torch.testing.assert_close(experts.grouped(torch.cat([x, x[:2]]), [5, 0, 2]), torch.cat([y[0], y[2, :2]]))


@pytest.mark.parametrize(("num_experts", "widths"), [(0, (2, 2)), (2, (2,)), (2, (2, 0))])
def test_impossible_experts_are_refused(num_experts: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one expert or more"):
        Experts(num_experts, widths)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_fused_grouped_product_is_the_loop(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    results = []
    x = torch.randn(sum(counts), 4, requires_grad=True)
    weight = torch.randn(len(counts), 4, 8, requires_grad=True)
    for backend in ("reference", "grouped_mm"):
        y = grouped_matmul(x, weight, counts, backend=backend)
        results.append([y, *torch.autograd.grad(y.sum(), [x, weight])])  # the sum's gradient is a broadcast one
    for loop, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, loop)


# -- pieces of routing -----------------------------------------------------------------------------------------


def test_smooth_step_is_exact_at_its_ends_and_flat_beyond() -> None:
    t = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    y = smooth_step(t, gamma=2.0)
    assert y.tolist()[:2] == [0.0, 0.0]
    assert y.tolist()[-2:] == [1.0, 1.0]
    inner = t[2:5]
    torch.testing.assert_close(y[2:5], -2 / 8 * inner**3 + 3 / 4 * inner + 0.5)  # the paper's cubic
    (gradient,) = torch.autograd.grad(y.sum(), t)
    assert gradient[[0, 1, 5, 6]].tolist() == [0.0] * 4
    assert (gradient[2:5] > 0).all()


def test_branching_keeps_the_mass() -> None:
    mass, left = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    children = branch(mass, left).unflatten(-1, (4, 2))
    torch.testing.assert_close(children.sum(-1), mass)
    torch.testing.assert_close(children[..., 0], mass * left)


def test_sinkhorn_normalises_rows_and_columns_and_survives_tiny_temperatures() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 5, 5, dtype=torch.float64)
    matrix = sinkhorn(scores, 60)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(-2), torch.ones(2, 5, dtype=torch.float64))
    assert sinkhorn((scores / 1e-7).float(), 150).isfinite().all()
    cold = sinkhorn(scores / 1e-3, 500)
    torch.testing.assert_close(cold, assignment(scores), rtol=0, atol=0.01)


def test_assignment_collects_the_largest_total() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 4)
    totals = {p: sum(scores[i, c].item() for i, c in enumerate(p)) for p in itertools.permutations(range(4))}
    best = max(totals, key=totals.__getitem__)
    assert assignment(scores).argmax(-1).tolist() == list(best)
    assert torch.equal(assignment(torch.zeros(3, 2, 2)), torch.eye(2).expand(3, 2, 2))
    with pytest.raises(ValueError, match="not numbers"):
        assignment(torch.full((2, 2), torch.nan))


def test_entropy_of_certainty_is_zero() -> None:
    assert entropy(torch.eye(3), eps=0.0).nan_to_num().tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(entropy(torch.full((4,), 0.25), eps=0.0), torch.tensor(4.0).log())


# -- auxiliary losses ------------------------------------------------------------------------------------------


def test_switch_loss_is_one_at_balance_whatever_k_and_e_at_collapse() -> None:
    for top_k in (1, 2):
        logits = torch.eye(4).repeat(2, 1)
        indices = torch.stack([(torch.arange(8) + i) % 4 for i in range(top_k)], -1)
        routing = Routing(torch.full(indices.shape, 1 / top_k), indices, logits)
        torch.testing.assert_close(switch_loss(routing), torch.tensor(1.0))
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1e3
    routing = Routing(torch.ones(8, 1), torch.full((8, 1), 2), collapsed)
    torch.testing.assert_close(switch_loss(routing), torch.tensor(4.0))


def test_switch_loss_reaches_experts_that_were_not_chosen() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    kept, indices = logits.topk(1, -1)
    (gradient,) = torch.autograd.grad(switch_loss(Routing(kept.softmax(-1), indices, logits)), logits)
    assert (gradient != 0).all()


def test_padding_does_not_count_in_balance_losses() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4)
    keep = torch.arange(5) < torch.tensor([[5], [2]])
    kept, indices = logits.topk(2, -1)
    whole = Routing(kept.softmax(-1), indices, logits)
    alone = Routing(*(part[keep] for part in whole))
    for loss in (switch_loss, z_loss, importance_loss):
        torch.testing.assert_close(loss(whole, keep), loss(alone))
        assert not torch.isclose(loss(whole), loss(alone))
        assert loss(whole, torch.zeros_like(keep)) == 0


def test_z_and_importance_losses_are_their_formulas() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    routing = Routing.from_dense(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]), logits)
    torch.testing.assert_close(z_loss(routing), logits.exp().sum(-1).log().square().mean())
    torch.testing.assert_close(importance_loss(routing), torch.tensor([1.0, 0.5, 0.5]).var(correction=0) / (2 / 3) ** 2)


def test_load_is_the_probability_of_being_chosen_with_new_noise() -> None:
    torch.manual_seed(0)
    clean, std = torch.randn(1, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64) + 0.5
    noisy = clean + std * torch.randn_like(clean)
    kept, indices = noisy.topk(2, -1)
    loss = load_loss(Routing(kept.softmax(-1), indices, noisy), clean, std)
    chance = []
    for e in range(4):
        drawn = noisy.repeat(200_000, 1)
        drawn[:, e] = clean[0, e] + std[0, e] * torch.randn(200_000, dtype=torch.float64)
        chance.append((drawn.topk(2, -1).indices == e).any(-1).double().mean())
    load = torch.stack(chance)
    torch.testing.assert_close(loss, load.var(correction=0) / load.mean() ** 2, rtol=2e-2, atol=1e-3)
    with pytest.raises(ValueError, match="top_k < num_experts"):
        load_loss(Routing.from_dense(noisy.softmax(-1), noisy), clean, std)


def test_losses_are_collected_by_name_and_never_lost_unnoticed() -> None:
    with collect_losses() as outer:
        add_loss("a", torch.tensor(1.0))
        with collect_losses() as inner:
            add_loss("a", torch.tensor(2.0))
            add_loss("a", torch.tensor(3.0))
            add_loss("b", torch.zeros((), device="meta"))
    assert {k: float(v) for k, v in outer.items()} == {"a": 1.0}
    assert {k: float(v) for k, v in inner.items()} == {"a": 5.0}
    with pytest.warns(UserWarning, match="'a' is not collected"):
        add_loss("a", torch.tensor(1.0, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_loss("a", torch.tensor(1.0))
        add_loss("b", torch.zeros((), device="meta"))


def test_weighted_sum_takes_a_tensor_or_a_routing() -> None:
    y = torch.randn(3, 5, 2)
    values = torch.rand(5, 3)
    torch.testing.assert_close(weighted_sum(y, values), (values.T[..., None] * y).sum(0))
    torch.testing.assert_close(weighted_sum(y, Routing.from_dense(values)), weighted_sum(y, values))
