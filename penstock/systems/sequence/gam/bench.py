"""The paper's speed table at two of its lengths: a GAM block beside a transformer block of the same width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from penstock.lab.bench import Benchmark, Contest
from penstock.systems.sequence.gam.baseline import TransformerBlock
from penstock.systems.sequence.gam.model import GAMBlock

#: The paper's width and slots. It has batches of 16 on a GPU; one sequence keeps this to seconds on a CPU.
_WIDTH, _SLOTS, _HEADS = 512, 512, 8
_LENGTHS = (512, 2048)


def block(length: int) -> Contest:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_BLD = torch.randn(1, length, _WIDTH, device=device, requires_grad=True)
    gam = GAMBlock(_WIDTH, _SLOTS, dropout=0.0).to(device)
    transformer = TransformerBlock(_WIDTH, _HEADS, dropout=0.0).to(device)
    forward = 2 * length * _WIDTH * (2 * _SLOTS + (2 + 8) * _WIDTH + 3)
    return Contest(
        {"penstock GAM block": _pass(gam, x_BLD), "transformer block": _pass(transformer, x_BLD)},
        flops=3 * forward,
        note=f"Forward and backward, one sequence of {length}, width {_WIDTH}, float32; the transformer's attention is "
        "PyTorch's fused one, where the paper's stores its attention map.",
    )


def _pass(module: nn.Module, x_BLD: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        module.zero_grad()
        x_BLD.grad = None
        module(x_BLD).square().mean().backward()

    return call


def benchmarks() -> dict[str, Benchmark]:
    return {
        f"gam_{length}": Benchmark(f"A GAM block and a transformer block over {length} tokens", partial(block, length))
        for length in _LENGTHS
    }
