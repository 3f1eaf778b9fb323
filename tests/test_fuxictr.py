"""FuxiCTR's activations and penalties against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from penstock.nn.embeddings import FieldEmbedding
from penstock.nn.fuxictr import Dice, activation, add_regularization, parse_regularizer, regularization


def test_activations_by_name() -> None:
    x = torch.randn(50, 3)
    dice = Dice(3).train()
    nn.init.constant_(dice.alpha, 0.25)
    p = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-9).sqrt()).sigmoid()
    torch.testing.assert_close(dice(x), x * (p + 0.25 * (1 - p)))
    torch.testing.assert_close(activation("PReLU", 3)(x), x.clamp_min(0) + 0.1 * x.clamp_max(0))
    assert isinstance(activation("GELU", 3), nn.GELU)
    for name in ("gelu", "Tensor", "Swishy"):
        with pytest.raises(ValueError, match=r"or an activation of torch\.nn"):
            activation(name, 3)


def test_regularizers_are_read_as_fuxictr_writes_them() -> None:
    assert parse_regularizer(None) == parse_regularizer(0) == parse_regularizer("0") == []
    assert parse_regularizer(1e-5) == parse_regularizer("1e-5") == parse_regularizer("l2(1e-5)") == [(2, 1e-5)]
    assert parse_regularizer("l1_l2(0.1, 0.2)") == [(1, 0.1), (2, 0.2)]
    for wrong in ("", "l1()", "l1(1", "l1_l2(1)", "l2(a)", "nan"):
        with pytest.raises(ValueError, match="must be a number of 0 or more"):
            parse_regularizer(wrong)


class Small(nn.Module):
    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(6, 3, zero_ids=[0])
        self.embedding.table.sparse = sparse
        self.out = nn.Linear(6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embedding(ids).flatten(1)).squeeze(1)


def test_a_penalty_is_its_sum_over_tables_and_over_the_rest() -> None:
    net = Small()
    table, rest = net.embedding.table.weight, [net.out.weight, net.out.bias]
    right = 0.1 * table.abs().sum() + 0.2 / 2 * table.square().sum() + 0.3 / 2 * sum(p.square().sum() for p in rest)
    torch.testing.assert_close(regularization(net, embedding="l1_l2(0.1, 0.2)", net=0.3), right)
    assert float(regularization(net)) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_a_penalty_are_added_lazily_where_the_gradient_is_sparse(sparse: bool) -> None:
    options = {"embedding": "l1_l2(0.1, 0.2)", "net": 0.3}
    torch.manual_seed(0)
    net, ids = Small(sparse=sparse), torch.tensor([[1, 4], [4, 3], [0, 1]])
    net(ids).square().sum().backward()
    plain = {name: p.grad.to_dense().clone() for name, p in net.named_parameters() if p.grad is not None}
    add_regularization(net, **options)
    penalties = torch.autograd.grad(regularization(net, **options), list(net.parameters()))
    for (name, p), own in zip(net.named_parameters(), penalties, strict=True):
        assert p.grad is not None
        if sparse and name == "embedding.table.weight":
            assert p.grad.is_sparse
            own = own * torch.tensor([1.0, 1, 0, 1, 1, 0])[:, None]
        torch.testing.assert_close(p.grad.to_dense(), plain[name] + own)
