"""What a gate a feature value costs a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.lab.bench import Benchmark, Contest, training_step
from penstock.systems.recommendation.optfs.model import OptFSModel


def step() -> Contest:
    torch.manual_seed(0)
    batch, fields, values = 4096, 39, 100_000
    ids = torch.randint(values, (batch, fields))
    entries: dict[str, Callable[[], None]] = {}
    for name, gated in (("gated DeepFM", True), ("ungated DeepFM", False)):
        model = OptFSModel(values, fields, dim=16, mlp_dims=(256, 128), gated=gated)
        entries[name] = training_step(model, ids)
    return Contest(
        entries, note=f"Training step, batch {batch}, {fields} fields, {values:,} values, width 16, dense optimiser."
    )


def benchmarks() -> dict[str, Benchmark]:
    return {"optfs": Benchmark("A gate for each of many feature values", step)}
