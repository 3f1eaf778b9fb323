"""Convolutions over a sequence and the memory read, against their sums written out."""

from __future__ import annotations

import pytest
import torch

from penstock.ops import causal_depthwise_conv, last_backend, long_convolution, memory_read, slot_weights


def test_a_short_convolution_sees_the_last_taps() -> None:
    x, weight, bias = torch.randn(2, 9, 3).double(), torch.randn(3, 1, 4).double(), torch.randn(3).double()
    y, state = causal_depthwise_conv(x, weight, bias)
    seen = torch.cat([torch.zeros(2, 3, 3).double(), x], 1)
    right = torch.stack([(seen[:, t : t + 4] * weight[:, 0].T).sum(1) + bias for t in range(9)], 1)
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(state, x[:, -4:].transpose(1, 2))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_short_convolution_goes_on_from_its_state(cut: int) -> None:
    x, weight = torch.randn(2, 9, 3).double(), torch.randn(3, 1, 4).double()
    whole, last = causal_depthwise_conv(x, weight)
    first, state = causal_depthwise_conv(x[:, :cut], weight)
    second, state = causal_depthwise_conv(x[:, cut:], weight, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)


def test_a_short_convolution_passes_over_padding() -> None:
    x, weight, bias = torch.randn(1, 6, 3).double(), torch.randn(3, 1, 3).double(), torch.randn(3).double()
    real = torch.tensor([[False, True, True, False, True, True, False, True, True, False]])
    padded = torch.randn(1, 10, 3).double()
    padded[real] = x[0]
    for state in (None, torch.randn(1, 3, 3).double()):
        right, last = causal_depthwise_conv(x, weight, bias, state)
        y, ours = causal_depthwise_conv(padded, weight, bias, state, real)
        torch.testing.assert_close(y[real], right[0])
        torch.testing.assert_close(ours, last)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (7, 7), (50, 20), (100, 100), (20, 50)])
def test_both_forms_of_a_long_convolution_are_the_sum(length: int, taps: int) -> None:
    x, filters, skip = torch.randn(2, length, 3).double(), torch.randn(3, taps).double(), torch.randn(3).double()
    right = torch.stack(
        [sum(filters[:, s] * x[:, t - s] for s in range(min(t + 1, taps))) + skip * x[:, t] for t in range(length)], 1
    )
    for backend in ("fft", "direct"):
        torch.testing.assert_close(long_convolution(x, filters, skip, backend=backend), right)
        assert last_backend["long_convolution"] == backend


def test_long_convolutions_learn_alike() -> None:
    x, filters = torch.randn(1, 80, 2).double().requires_grad_(), torch.randn(2, 80).double().requires_grad_()
    grads = [
        torch.autograd.grad(long_convolution(x, filters, backend=b).square().sum(), (x, filters))
        for b in ("fft", "direct")
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_memory_read_is_a_softmax_over_slots() -> None:
    x, keys, values = torch.randn(2, 5, 4), torch.randn(7, 4), torch.randn(7, 4)
    right = (x @ keys.T * 0.5).softmax(-1) @ values
    for backend in ("reference", "fused"):
        torch.testing.assert_close(memory_read(x, keys, values, scale=0.5, backend=backend), right)
    torch.testing.assert_close(slot_weights(x, keys).sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_depthwise_conv(torch.zeros(1, 3, 2), torch.zeros(3, 1, 4)), "does not fit x"),
        (lambda: causal_depthwise_conv(torch.zeros(1, 3, 2), torch.zeros(2, 1, 4), None, torch.zeros(1, 2, 3)), "initial_state is"),
        (lambda: long_convolution(torch.zeros(1, 3, 2), torch.zeros(3, 3)), "they must be"),
        (lambda: memory_read(torch.zeros(1, 3), torch.zeros(2, 4)), "keys and values must be"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
