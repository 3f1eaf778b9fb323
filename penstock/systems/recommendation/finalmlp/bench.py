"""What two gates on the flat embedding cost a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penstock.lab.bench import Benchmark, Contest, training_step
from penstock.lab.fuxictr_peer import contests, global_ids, our_step
from penstock.lab.fuxictr_peer import finalmlp as peer
from penstock.systems.recommendation.finalmlp.model import CRITEO_X4, VARIANTS, FinalMLP

_BATCH, _FIELDS, _ROWS = 10_000, 39, 2564
_SIZES: dict[str, Any] = {"dim": 10, "hidden_1": (64,), "hidden_2": (64,), "gate_hidden": (64,), "num_heads": 8}


class Plain(FinalMLP):
    """Multiplies the embedding by each gate, as the equations are written."""

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        assert self.gate_1 is not None
        assert self.gate_2 is not None
        e_BX = self.embedding(ids_BF).flatten(1)
        x_BP, y_BQ = self.stream_1(e_BX * self.gate_1(ids_BF)), self.stream_2(e_BX * self.gate_2(ids_BF))
        return self.fusion(x_BP, y_BQ).squeeze(1)


def step() -> Contest:
    torch.manual_seed(0)
    ids = torch.randint(_ROWS, (_BATCH, _FIELDS)) + torch.arange(_FIELDS) * _ROWS
    sizes = [_ROWS] * _FIELDS
    entries: dict[str, Callable[[], None]] = {
        "constant gates, in the weights": training_step(FinalMLP(sizes, **_SIZES), ids),
        "constant gates, on the activations": training_step(Plain(sizes, **_SIZES), ids),
        "gates by context": training_step(FinalMLP(sizes, context_1=(0,), context_2=(1,), **_SIZES), ids),
        "without gates": training_step(FinalMLP(sizes, gated=False, **_SIZES), ids),
    }
    note = f"Training step, batch {_BATCH:,}, {_FIELDS} fields, {_FIELDS * _ROWS:,} values, width 10, streams of 64."
    return Contest(entries, note=note)


def _beside_fuxictr() -> tuple[Contest, Contest]:
    torch.manual_seed(0)
    return contests(VARIANTS["finalmlp_criteo_x4_001"], peer, CRITEO_X4, "FinalMLP")


def updates() -> Contest:
    """The same batches from vocabularies of several sizes: what a step costs by rows touched and by rows there are."""
    torch.manual_seed(0)
    batch, fields, few, many = 4096, 39, 10_000, 1_000_000
    sizes: dict[str, Any] = {"dim": 16, "hidden_1": (64,), "hidden_2": (64,), "gated": False, "num_heads": 8}
    labels_B = (torch.rand(batch) < 0.25).float()
    few_BF = torch.stack([torch.randint(1, few // fields, (batch,)) for _ in range(fields)], 1)
    entries: dict[str, Callable[[], None]] = {}
    for name, vocabulary, spread, lazy in (
        (f"{few:,} ids", few, 1, True),
        (f"{many:,} ids, as many rows touched", many, many // few, True),
        (f"{many:,} ids, drawn evenly", many, 0, True),
        (f"{many:,} ids, whole tables", many, many // few, False),
    ):
        each = [vocabulary // fields] * fields
        ids_BF = few_BF * spread if spread else torch.randint(1, vocabulary // fields, (batch, fields))
        entries[name] = our_step(FinalMLP(each, **sizes), global_ids(ids_BF, each), labels_B, lazy=lazy)
    note = (
        f"Training step of two streams of 64, batch {batch:,}, {fields} fields, width 16; the last updates every row."
    )
    return Contest(entries, note=note)


def benchmarks() -> dict[str, Benchmark]:
    return {
        "finalmlp": Benchmark("Gates on the flat embedding of two streams", step),
        "finalmlp_training": Benchmark("FinalMLP beside FuxiCTR's: training", lambda: _beside_fuxictr()[0]),
        "finalmlp_scores": Benchmark("FinalMLP beside FuxiCTR's: scores", lambda: _beside_fuxictr()[1]),
        "embedding_updates": Benchmark("A step's cost by rows touched, not by the vocabulary", updates),
    }
