"""Zoology's mixers beside attention at equal width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from penstock.lab.bench import Benchmark, Contest
from penstock.nn.conditional import evaluate_everything
from penstock.systems.sequence.zoology.convolutions import H3, BaseConv, Hyena
from penstock.systems.sequence.zoology.lookups import MHA, Lookups
from penstock.systems.sequence.zoology.rwkv import RWKVTimeMixer

_BATCH, _LENGTH, _WIDTH = 2, 1024, 128


def _training_pass(mixer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        mixer.zero_grad()
        mixer(x).square().mean().backward()

    return call


def mixers() -> Contest:
    torch.manual_seed(0)
    x = torch.randn(_BATCH, _LENGTH, _WIDTH)
    built: dict[str, nn.Module] = {
        "attention (scaled_dot_product_attention)": MHA(_WIDTH),
        "BaseConv, 3 taps": BaseConv(_WIDTH, _LENGTH),
        "BaseConv, long": BaseConv(_WIDTH, _LENGTH, kernel_size=-1),
        "Hyena": Hyena(_WIDTH, _LENGTH),
        "H3": H3(_WIDTH),
        "RWKV-4": RWKVTimeMixer(_WIDTH),
    }
    return Contest(
        {name: _training_pass(mixer, x) for name, mixer in built.items()},
        note=f"Forward and backward, batch {_BATCH}, length {_LENGTH}, width {_WIDTH}, one head, float32.",
    )


def lookups() -> Contest:
    torch.manual_seed(0)
    x = torch.randn(_BATCH, _LENGTH, _WIDTH)
    mixer = Lookups(_WIDTH).eval()

    def sparse() -> None:
        with torch.no_grad():
            mixer(x)

    def dense() -> None:
        with torch.no_grad(), evaluate_everything():
            mixer(x)

    return Contest(
        {"32 positions attend": sparse, "all attend, 32 are kept": dense},
        note=f"Forward in evaluation, batch {_BATCH}, length {_LENGTH}, width {_WIDTH}, one head, float32; same result.",
    )


def benchmarks() -> dict[str, Benchmark]:
    return {
        "zoology_mixers": Benchmark("Training passes of token mixers at equal width", mixers),
        "zoology_lookups": Benchmark("What leaving shut look-up gates out of the computation saves", lookups),
    }
