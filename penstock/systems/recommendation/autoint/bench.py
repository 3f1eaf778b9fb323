"""A training step of AutoInt, and its layer beside PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from penstock.lab.bench import Benchmark, Contest, training_step
from penstock.lab.fuxictr_peer import autoint as peer
from penstock.lab.fuxictr_peer import contests
from penstock.systems.recommendation.autoint.model import VARIANTS, Attention, AutoInt, InteractingLayer

_FIELDS, _DIM, _IDS = 39, 16, 1_000_000


class PyTorchLayer(nn.Module):
    """The same layer around `torch.nn.MultiheadAttention`, which reads and writes one width: so it is projected first.

    Args:
        input_dim: width of the fields.
        attention_dim: width over all heads.
        num_heads: heads.
        need_weights: whether the attention weights are formed, as our gate's are, or a fused kernel may do without.
    """

    def __init__(self, input_dim: int, attention_dim: int, num_heads: int, *, need_weights: bool) -> None:
        super().__init__()
        self.residual = nn.Linear(input_dim, attention_dim, bias=False)
        self.attention = nn.MultiheadAttention(attention_dim, num_heads, bias=False, batch_first=True)
        self.need_weights = need_weights

    def forward(self, e_BMI: Tensor) -> Tensor:
        r_BMD = self.residual(e_BMI)
        u_BMD, _ = self.attention(r_BMD, r_BMD, r_BMD, need_weights=self.need_weights, average_attn_weights=False)
        return (u_BMD + r_BMD).relu()


def step() -> Contest:
    torch.manual_seed(0)
    batch, values = 10_000, 100_000
    ids = torch.randint(values, (batch, _FIELDS))
    kinds: dict[str, Attention] = {"learned attention": "learned", "uniform attention": "uniform"}
    entries: dict[str, Callable[[], Any]] = {}
    for name, attention in kinds.items():
        model = AutoInt(values, _FIELDS, dim=_DIM, attention_dims=(_DIM,), num_heads=1, attention=attention)
        entries[name] = training_step(model, ids)
    return Contest(
        entries,
        note=f"Training step, batch {batch:,}, {_FIELDS} fields, {values:,} values, width {_DIM}, one layer, one head.",
    )


def layer() -> Contest:
    torch.manual_seed(0)
    batch, width, heads = 500, 64, 2
    e_BMI = torch.randn(batch, _FIELDS, _DIM)
    ours = InteractingLayer(_DIM, width, heads)
    entries = {
        "matrices multiplied first": training_step(ours, e_BMI),
        "MultiheadAttention": training_step(PyTorchLayer(_DIM, width, heads, need_weights=True), e_BMI),
        "MultiheadAttention, fused": training_step(PyTorchLayer(_DIM, width, heads, need_weights=False), e_BMI),
    }
    return Contest(
        entries,
        note=f"Training step of one layer, batch {batch:,}, {_FIELDS} fields, width {_DIM} to {width}, {heads} heads; "
        "PyTorch's attention reads one width only, so its input is projected first; fused, it shows no weights.",
    )


def _beside_fuxictr() -> tuple[Contest, Contest]:
    torch.manual_seed(0)
    sizes = [_IDS // _FIELDS] * _FIELDS
    return contests(partial(VARIANTS["autoint_criteo"], num_ids=sum(sizes)), peer, sizes, "AutoInt")


def benchmarks() -> dict[str, Benchmark]:
    return {
        "autoint_training": Benchmark("AutoInt beside FuxiCTR's: training", lambda: _beside_fuxictr()[0]),
        "autoint_scores": Benchmark("AutoInt beside FuxiCTR's: scores", lambda: _beside_fuxictr()[1]),
        "autoint": Benchmark("What attention between fields costs a click model", step),
        "autoint_layer": Benchmark("The interacting layer beside PyTorch's attention", layer),
    }
