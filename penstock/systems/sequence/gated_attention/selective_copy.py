"""Selective copy: a task on which an ungated head can only say nothing by parking its attention on the first token.

A learned first vector, then tokens that carry an id, a value and a flag. Flagged tokens must output the value of
the latest earlier token with the same id, all others exactly zero. One attention layer without a residual path
must do both, so that "nothing" has to come from somewhere: a gate, or a sink on the first vector.

Shape legend: B batch, L length (the first vector included), D width, H heads, K head width, I ids, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import watch
from penstock.nn.decoder import RMSNorm
from penstock.systems.sequence.gated_attention.model import GatedAttention, Granularity

_IDS, _VALUES, _LENGTH, _WIDTH, _HEADS = 12, 8, 24, 32, 2


class CopyBatch(NamedTuple):
    """tokens (B, L - 1, I + V + 1), targets (B, L - 1, V), active (B, L - 1) boolean."""

    tokens: Tensor
    targets: Tensor
    active: Tensor


def copy_batch(size: int, generator: torch.Generator, *, active_ratio: float = 0.3) -> CopyBatch:
    """Random sequences; a token can be active only where its id has occurred before."""
    ids = torch.randint(_IDS, (size, _LENGTH), generator=generator)
    values = torch.randn(size, _LENGTH, _VALUES, generator=generator)
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    latest = (same * torch.arange(1, _LENGTH + 1)).amax(-1) - 1  # -1 where the id is new
    active = (torch.rand(size, _LENGTH, generator=generator) < active_ratio) & (latest >= 0)
    source = values.gather(1, latest.clamp_min(0)[..., None].expand_as(values))
    tokens = torch.cat([F.one_hot(ids, _IDS).float(), values, active[..., None].float()], -1)
    return CopyBatch(tokens, source * active[..., None], active)


class CopyModel(nn.Module):
    """Embedding, learned positions, norm, one attention layer, read-out; no residual path."""

    def __init__(self, gate: Granularity | None) -> None:
        super().__init__()
        self.embed = nn.Linear(_IDS + _VALUES + 1, _WIDTH)
        self.first = nn.Parameter(torch.randn(_WIDTH) * 0.5)
        self.positions = nn.Parameter(torch.randn(_LENGTH + 1, _WIDTH) * 0.1)
        self.norm = RMSNorm(_WIDTH)
        self.attention = GatedAttention(_WIDTH, _HEADS, gate=gate, qk_norm=False, rotary_fraction=0.0)
        self.head = nn.Linear(_WIDTH, _VALUES)

    def attention_input(self, tokens: Tensor) -> Tensor:
        first = self.first.expand(len(tokens), 1, -1)
        return self.norm(torch.cat([first, self.embed(tokens)], 1) + self.positions)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attention(self.attention_input(tokens)))[:, 1:]


def selective_copy(gate: Granularity | None, seed: int, *, steps: int = 700, batch_size: int = 64) -> dict[str, float]:
    """Train on selective copy and measure where "nothing" comes from.

    Returns mse; sink, the share of attention on the first vector at inactive queries; and for a gated model
    gate_inactive and gate_active, its mean value there.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = CopyModel(gate)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = copy_batch(batch_size, generator)
        loss = F.mse_loss(model(batch.tokens), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    batch = copy_batch(1024, torch.Generator().manual_seed(seed + 2))
    with torch.no_grad():
        x = model.attention_input(batch.tokens)
        share = model.attention.attention_map(x)[:, :, 1:, 0].mean(1)
        measured = {
            "mse": float(F.mse_loss(model(batch.tokens), batch.targets)),
            "sink": float(share[~batch.active].mean()),
        }
        if gate is not None:
            with watch(model, keep="values") as log:
                model(batch.tokens)
            values = log.values()["attention.gate"][0][:, 1:].mean((-1, -2))
            measured |= {
                "gate_inactive": float(values[~batch.active].mean()),
                "gate_active": float(values[batch.active].mean()),
            }
    return measured


def merged_projection_error(gate: Granularity | None, seed: int) -> float:
    """How much a layer's output changes when each head's value and output projections are merged into one linear map.

    A gate is replaced by its mean over the input, the best a constant can do. Relative to the output, float64.
    """
    torch.manual_seed(seed)
    layer = GatedAttention(_WIDTH, _HEADS, gate=gate, qk_norm=False).double().eval()
    x_BLD = torch.randn(4, 16, _WIDTH, dtype=torch.float64)
    with torch.no_grad():
        attention_BHLL = layer.attention_map(x_BLD)
        mean_HK = torch.ones(_HEADS, layer.head_dim, dtype=torch.float64)
        if layer.gate is not None:
            mean_HK = layer.gate(x_BLD).mean((0, 1)).expand(_HEADS, layer.head_dim)
        value_HKD = layer.v_proj.weight.unflatten(0, (_HEADS, layer.head_dim)) * mean_HK[..., None]
        merged_HDD = torch.einsum("hkd,ohk->hod", value_HKD, layer.o_proj.weight.unflatten(1, (_HEADS, layer.head_dim)))
        y = layer(x_BLD)
        merged = torch.einsum("bhqj,bjd,hod->bqo", attention_BHLL, x_BLD, merged_HDD)
        return float((merged - y).norm() / y.norm())
