"""Attention between fields in one pass, against its formula: values, gradients, and who is looking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from penstock.gates import force, watch
from penstock.ops import dispatch
from penstock.ops.field_attention import field_attention, merges_scores, merges_values
from penstock.ops.native import library
from penstock.systems.recommendation.autoint.model import InteractingLayer

native = pytest.mark.skipif(library("field_attention") is None, reason="needs a C compiler (apt-get install gcc)")


def drawn(
    samples: int, fields: int, inner: int, width: int, residual: str, *, strength: float = 1.0
) -> tuple[list[Tensor], bool]:
    """Input, query, key, value and, if there is one, residual weights, all to be differentiated; whether x is added."""
    tensors = [torch.randn(samples, fields, inner), *(torch.randn(width, inner) * strength for _ in range(3))]
    if residual == "weight":
        tensors.append(torch.randn(width, inner))
    return [x.requires_grad_() for x in tensors], residual == "input"


@native
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 45),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(["weight", "input", "none"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_the_native_form_is_the_reference(
    samples: int, fields: int, inner: int, each: int, heads: int, residual: str, rectify: bool, threads: int
) -> None:
    width = each * heads
    if residual == "input":
        inner = width
    tensors, identity = drawn(samples, fields, inner, width, residual, strength=inner**-0.5)
    factor = torch.randn(samples, fields, width)
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for backend, leaves in (
            ("reference", [x.detach().double().requires_grad_() for x in tensors]),
            ("native", tensors),
        ):
            y = field_attention(
                *leaves, num_heads=heads, scale=0.7, identity=identity, rectify=rectify, backend=backend
            )  # type: ignore[arg-type,misc]
            results.append([y, *torch.autograd.grad((y * factor).sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for ours, right in zip(results[1], results[0], strict=True):
        # A ReLU may fall on the other side where an output is all but zero.
        off = (ours - right).abs() / right.abs().max().clamp_min(1e-3)
        assert float(off.max()) < 1e-4 or (rectify and float(off.mean()) < 1e-3)


@native
def test_attention_may_be_as_sharp_as_it_likes() -> None:
    tensors, _ = drawn(6, 9, 4, 8, "none", strength=60.0)
    y = field_attention(*tensors, num_heads=2, backend="native")
    grads = torch.autograd.grad(y.sum(), tensors)
    assert all(x.isfinite().all() for x in (y, *grads))
    right = field_attention(*(x.detach().double() for x in tensors), num_heads=2)
    torch.testing.assert_close(y, right.float(), rtol=1e-3, atol=1e-2)


def test_the_reference_is_differentiated_rightly() -> None:
    tensors, _ = drawn(2, 3, 4, 6, "weight")
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *xs: field_attention(*xs, num_heads=2, scale=0.5, rectify=False), leaves, check_batched_grad=False
    )


def test_widths_that_do_not_fit_are_refused() -> None:
    (x, query, key, value), _ = drawn(2, 3, 4, 6, "none")
    for options in ({"num_heads": 4}, {"num_heads": 2, "identity": True}):
        with pytest.raises(ValueError, match="heads must divide the output"):
            field_attention(x, query, key, value, **options)  # type: ignore[arg-type]


def test_matrices_are_merged_where_that_is_cheaper() -> None:
    assert merges_scores(64, 64, 1, 39)
    assert merges_scores(16, 64, 2, 39)
    assert not merges_scores(64, 64, 4, 39)
    assert merges_values(16, 64, 1)
    assert not merges_values(64, 64, 1)


@native
def test_operations_are_counted() -> None:
    (x, query, key, value), _ = drawn(5, 7, 8, 8, "none")
    with FlopCounterMode(display=False) as counter:
        field_attention(x, query, key, value, num_heads=2, backend="native").sum().backward()
    # Two heads of width 4: four maps of 8 x 8 would be merged into more, so three, and twice 7 x 7 x 8 for the mixing.
    forward = 2 * 5 * 7 * (3 * 8 * 8 + 2 * 7 * 8)
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"use_residual": False}, {"use_scale": True}])
def test_a_layer_is_the_same_seen_and_unseen(options: dict[str, bool]) -> None:
    layer = InteractingLayer(8, 12, 3, **options)  # type: ignore[arg-type]
    x = torch.randn(5, 6, 8, requires_grad=True)
    unseen = layer(x)
    if library("field_attention") is not None:
        assert dispatch.last_backend["field_attention"] == "native"
    right = torch.autograd.grad(unseen.square().sum(), [x, *layer.parameters()])
    with watch(layer) as log:
        seen = layer(x)
    torch.testing.assert_close(seen, unseen)
    torch.testing.assert_close(torch.autograd.grad(seen.square().sum(), [x, *layer.parameters()]), right)
    assert log["gate"].calls == 1
    with force(layer, "open"):
        assert not torch.allclose(layer(x), unseen)
    assert torch.equal(layer(x), unseen)
