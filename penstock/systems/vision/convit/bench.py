"""Gated positional attention as it is run here, beside its definition and plain attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.lab.bench import Benchmark, Contest
from penstock.nn.vit import Attention
from penstock.systems.vision.convit.model import GPSA


def layer() -> Contest:
    torch.manual_seed(0)
    batch, grid, width, heads = 8, (14, 14), 432, 9
    gated, plain = GPSA(width, heads).eval(), Attention(width, heads).eval()
    x = torch.randn(batch, grid[0] * grid[1], width)

    def defined(x: Tensor) -> Tensor:
        """Both maps formed, mixed and applied, as the paper writes it."""
        v = gated.v(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        return gated.proj((gated.maps(x).mixed @ v).transpose(1, 2).flatten(2))

    def run(call: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def timed() -> None:
            with torch.no_grad():
                call(x)

        return timed

    return Contest(
        {"penstock GPSA": run(gated), "GPSA as defined": run(defined), "plain attention": run(plain)},
        note=f"The layer of ConViT-S, forward, batch {batch}, {grid[0]} x {grid[1]} patches, width {width}, {heads} heads.",
    )


def benchmarks() -> dict[str, Benchmark]:
    return {"gpsa": Benchmark("Gated positional self-attention", layer)}
