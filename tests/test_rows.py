"""Looked-up rows, their gradients and Adam on them, and the layer with ReLU and dropout in one pass."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.nn.embeddings import MLP, FieldEmbedding, RowTable
from penstock.nn.lazy_adam import LazyAdam
from penstock.ops import dispatch
from penstock.ops.native import library
from penstock.ops.rectified_linear import half_products, rectified_linear
from penstock.ops.rows import adam_rows_, lookup, rows_of, sparse_rows, sum_rows
from penstock.tasks.click_prediction import clip_norm

native = pytest.mark.skipif(library("rows") is None, reason="needs a C compiler (apt-get install gcc)")


@native
@given(st.integers(0, 300), st.sampled_from([1, 7, 3000, 2**22 + 5, 2**31 - 1]), st.integers(1, 17), st.integers(1, 3))
def test_rows_that_share_an_id_are_added_up(count: int, size: int, width: int, threads: int) -> None:
    ids = torch.randint(size, (count,))
    values = torch.randn(count, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, sums = sum_rows(ids, values, size, backend="native")
    finally:
        torch.set_num_threads(before)
    right_rows, right_sums = sum_rows(ids, values, size, backend="reference")
    assert torch.equal(rows, right_rows)
    torch.testing.assert_close(sums, right_sums)


@native
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_on_rows_is_its_reference_and_leaves_other_rows(decoupled: bool) -> None:
    rows = torch.tensor([0, 3, 8])
    grads = torch.randn(3, 5)
    start = [torch.randn(9, 5), torch.randn(9, 5), torch.rand(9, 5)]
    ends = []
    for backend in ("reference", "native"):
        state = [x.clone() for x in start]
        options = {"step": 3, "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
        adam_rows_(rows, grads, *state, decoupled=decoupled, backend=backend, **options)  # type: ignore[arg-type]
        ends.append(state)
    torch.testing.assert_close(ends[0], ends[1])
    others = torch.tensor([1, 2, 4, 5, 6, 7])
    for before, after in zip(start, ends[0], strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[rows], after[rows])


@pytest.mark.parametrize("decoupled", [False, True])
def test_lazy_adam_is_adam_where_every_row_is_looked_up(decoupled: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    lazy, usual = nn.Parameter(torch.randn(20, 4)), nn.Parameter(torch.empty(20, 4))
    plain, plain_usual = nn.Parameter(torch.randn(3)), nn.Parameter(torch.empty(3))
    usual.data.copy_(lazy.data)
    plain_usual.data.copy_(plain.data)
    ours = LazyAdam([lazy, plain], lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled)
    theirs = kind([usual, plain_usual], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        ids = torch.cat([torch.randperm(20), torch.randint(20, (7,))])
        weight = torch.randn(27, 4)
        for table, other, optimizer, sparse in ((lazy, plain, ours, True), (usual, plain_usual, theirs, False)):
            optimizer.zero_grad()
            ((lookup(table, ids, sparse=sparse) * weight).sum() + other.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close((lazy, plain), (usual, plain_usual))


def test_lazy_adam_leaves_rows_alone_and_can_be_resumed() -> None:
    table = RowTable(10, 2, zero_ids=[0])
    table.sparse = True
    optimizer = LazyAdam(table.parameters(), lr=0.1, weight_decay=0.5)
    start = table.weight.detach().clone()

    def step(model: RowTable, optimizer: LazyAdam) -> None:
        optimizer.zero_grad()
        model(torch.tensor([[0, 2], [2, 5]])).square().sum().backward()
        optimizer.step()

    step(table, optimizer)
    assert (table.weight != start).any(1).nonzero().flatten().tolist() == [2, 5]
    assert not table.weight[0].any()
    again = deepcopy(table)
    other = LazyAdam(again.parameters(), lr=0.1, weight_decay=0.5)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(table, optimizer)
        step(again, other)
    assert torch.equal(table.weight, again.weight)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_looked_up_rows(sparse: bool) -> None:
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    ids, weight = torch.tensor([[1, 4, 1], [0, 4, 6]]), torch.randn(2, 3, 3, dtype=torch.float64)
    (right,) = torch.autograd.grad((F.embedding(ids, table) * weight).sum(), table)
    (lookup(table, ids, fixed=torch.tensor([0, 2]), sparse=sparse) * weight).sum().backward()
    assert table.grad is not None
    assert table.grad.is_sparse == sparse
    right[0] = 0
    torch.testing.assert_close(table.grad.to_dense(), right)


def test_fixed_rows_get_no_gradient_in_compiled_code_either() -> None:
    def loss(table: Tensor, ids: Tensor) -> Tensor:
        return lookup(table, ids, fixed=torch.tensor([2])).square().sum()

    table, ids = torch.randn(5, 2, requires_grad=True), torch.tensor([0, 2, 2, 4])
    (right,) = torch.autograd.grad(loss(table, ids), table)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(table, ids), table)
    torch.testing.assert_close(got, right)
    assert not got[2].any()


def test_clipping_counts_each_looked_up_row_once() -> None:
    parts = [torch.randn(4), sparse_rows(torch.tensor([1, 3]), torch.randn(2, 5), 9)]
    twice = torch.sparse_coo_tensor(torch.tensor([[3, 3]]), torch.randn(2, 5), (9, 5), check_invariants=False)
    dense = [x.to_dense().clone().requires_grad_() for x in (*parts, twice)]
    for x in dense:
        x.grad = x.detach().clone()
    torch.nn.utils.clip_grad_norm_(dense, 0.7)
    clip_norm([*parts, twice], 0.7)
    torch.testing.assert_close([x.to_dense() for x in (*parts, twice)], [x.grad for x in dense])
    rows, values = rows_of(twice)
    assert rows.tolist() == [3]
    assert values.shape == (1, 5)


@native
def test_a_rectified_layer_is_its_three_modules() -> None:
    x, weight, bias = torch.randn(33, 7), torch.randn(9, 7), torch.randn(9)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    torch.manual_seed(0)
    factor = torch.randn(33, 9)
    results = []
    for backend in ("reference", "native"):
        y = rectified_linear(x, weight, bias, backend=backend)  # type: ignore[arg-type]
        results.append((y, *torch.autograd.grad((y * factor).sum(), leaves)))
    torch.testing.assert_close(results[1], results[0])
    nan = x.detach().clone()
    nan[2] = torch.nan
    assert rectified_linear(nan, weight, bias, backend="native")[2].isnan().all()


@native
def test_dropout_of_a_rectified_layer() -> None:
    x, weight, bias = torch.randn(400, 20), torch.randn(300, 20, requires_grad=True), torch.randn(300)
    full = rectified_linear(x, weight, bias, backend="native")
    outputs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        outputs.append(rectified_linear(x, weight, bias, dropout=0.3, backend="native"))
        torch.set_num_threads(before)
    y = outputs[0]
    assert torch.equal(y, outputs[1]), "what is dropped does not depend on the threads"
    assert not torch.equal(y, rectified_linear(x, weight, bias, dropout=0.3, backend="native"))
    kept, open_ = y > 0, full > 0
    torch.testing.assert_close(y[kept] * 0.7, full[kept])
    # Six standard deviations around the mean of some 60,000 draws, and around those of rows and of columns.
    assert abs(float(kept.sum() / open_.sum()) - 0.7) < 6 * (0.21 / float(open_.sum())) ** 0.5
    for axis in (0, 1):
        number = open_.sum(axis)
        share = kept.sum(axis)[number > 0] / number[number > 0]
        assert float(((share - 0.7) * (number[number > 0] / 0.21).sqrt()).abs().max()) < 6
    pairs = (kept[:, 1:] & kept[:, :-1]).sum() / (open_[:, 1:] & open_[:, :-1]).sum()
    assert abs(float(pairs) - 0.49) < 0.02
    (grad,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(grad, (kept.float() / 0.7).T @ x)
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        rectified_linear(x, weight, bias, dropout=1.5)


def test_half_products_are_near_the_whole_and_only_without_gradients() -> None:
    x, weight, bias = torch.randn(50, 64), torch.randn(30, 64), torch.randn(30)
    full = rectified_linear(x, weight, bias)
    with half_products() as used:
        torch.testing.assert_close(rectified_linear(x, weight.requires_grad_(), bias), full)
        assert used.layers == 0
        with torch.no_grad():
            half = rectified_linear(x, weight, bias)
    assert used.layers == 1
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0, atol=0.02 * float(full.detach().abs().max()))


def test_a_perceptron_takes_the_fast_form_unless_someone_looks() -> None:
    net = MLP(6, (5, 4), dropout=0.5).eval()
    x = torch.randn(8, 6)
    y = net(x)
    if library("rectify") is not None:
        assert dispatch.last_backend["rectified_linear"] == "native"
    torch.testing.assert_close(y, nn.Sequential(*net)(x))
    seen: list[Tensor] = []
    handle = net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(net(x), y)
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), y)


def test_zero_rows_are_zero_and_named_if_they_cannot_be() -> None:
    table = FieldEmbedding(6, 3, zero_ids=[4, 0])
    assert not table.table.weight[[0, 4]].any()
    assert table.table.weight[[1, 2, 3, 5]].all()
    with pytest.raises(ValueError, match="zero_ids must be from 0 to 5; 6 is not"):
        FieldEmbedding(6, 3, zero_ids=[6])
