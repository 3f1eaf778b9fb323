"""FuxiCTR's activations and penalties against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.nn.fuxictr import Dice, activation, parse_regularizer, penalty


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


def test_a_penalty_is_its_sum() -> None:
    a, b = torch.randn(3, 2), torch.randn(4)
    right = 0.1 * (a.abs().sum() + b.abs().sum()) + 0.2 / 2 * (a.square().sum() + b.square().sum())
    torch.testing.assert_close(penalty([a, b], parse_regularizer("l1_l2(0.1, 0.2)")), right)
    assert penalty([a], []) == 0
