"""Evaluating only the experts with weight, beside evaluating all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.lab.bench import Benchmark, Contest
from penstock.nn.conditional import evaluate_everything
from penstock.systems.experts.comet.model import VARIANTS


def dispatch() -> Contest:
    torch.manual_seed(0)
    batch = 512
    model = VARIANTS["topk_movielens"]().eval()
    users, movies = torch.randint(6040, (batch,)), torch.randint(3952, (batch,)) + 6040
    inputs = torch.stack([users, movies], -1), torch.empty(batch, 0), torch.empty(batch, 0, 0, dtype=torch.int64)

    def sparse() -> None:
        with torch.no_grad():
            model(*inputs)

    def dense() -> None:
        with torch.no_grad(), evaluate_everything():
            model(*inputs)

    entries: dict[str, Callable[[], None]] = {"only experts with weight": sparse, "all 16 experts": dense}
    return Contest(
        entries, note=f"The MovieLens net of the paper with a top-2 gate, forward, batch {batch}; outputs are equal."
    )


def benchmarks() -> dict[str, Benchmark]:
    return {"experts": Benchmark("Sparse dispatch to experts", dispatch)}
