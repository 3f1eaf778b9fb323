"""Topic switching: an attention layer whose important tiles cannot be seen by pooling its queries and keys.

Sequences change their topic every 12 to 39 tokens and return to topics they have had. The frozen teacher attends to tokens
of the query's topic, wherever they are; but each head's keys are turned by a fixed rotation that only the teacher undoes,
so that pooled queries and pooled keys of one topic have nothing to do with each other until a gate has learned that rotation.

Shape legend: B batch, L length, H heads, K head width, N blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.ops import pooled_attention_map
from penstock.systems.sequence.seer_attention.gates import AttnGate, parse_gate_type
from penstock.systems.sequence.seer_attention.tiles import (
    causal_tiles,
    distillation_loss,
    ground_truth,
    sink_local_scores,
    tile_recall,
)

_TOPICS, _LENGTH, _BLOCK, _HEADS, _WIDTH = 8, 256, 16, 2, 16
#: Tokens of a topic lie around its vector, whose entries have variance one.
_NOISE = 0.5
#: The score is the bilinear form itself, so that attention settles on a few tokens of the topic.
_SCALE = 1.0
#: Earlier rows have so few tiles that a quarter of them is one.
_FIRST_ROW = 4


class Teacher(NamedTuple):
    """topics (H, topics, K): where each head sees each topic; rotations (H, K, K): of its keys."""

    topics: Tensor
    rotations: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator) -> Teacher:
        topics = torch.randn(_HEADS, _TOPICS, _WIDTH, generator=generator)
        return cls(topics, torch.linalg.qr(torch.randn(_HEADS, _WIDTH, _WIDTH, generator=generator)).Q)

    def sample(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, L, H, K) of fresh sequences, the keys still turned."""
        labels = torch.stack([_segments(generator) for _ in range(size)])
        noise = torch.randn(2, size, _LENGTH, _HEADS, _WIDTH, generator=generator) * _NOISE
        q_BLHK, straight_BLHK = self.topics[:, labels].permute(1, 2, 0, 3) + noise
        return q_BLHK, torch.einsum("blhk,hkm->blhm", straight_BLHK, self.rotations)

    def straighten(self, k_BLHK: Tensor) -> Tensor:
        """Keys (B, L, H, K) as the teacher's scores q R k see them, (B, H, L, K)."""
        return torch.einsum("blhm,hkm->bhlk", k_BLHK, self.rotations)


def _segments(generator: torch.Generator) -> Tensor:
    """The topic of each token of one sequence, (L,)."""
    labels: list[int] = []
    while len(labels) < _LENGTH:
        length, topic = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((12, 40), (0, _TOPICS))
        )
        labels += [topic] * length
    return torch.tensor(labels[:_LENGTH])


def topic_gate(
    seed: int, *, steps: int = 150, batch_size: int = 4, lr: float = 1e-2, test_size: int = 64
) -> dict[str, float]:
    """Distil a gate from the teacher and measure the attention inside a quarter of the tiles.

    Returns, for learned, oracle (the truth's own best), sink_local (the first block and the nearest), random and
    average_pool (the untrained product of means) tiles: the share of the teacher's attention inside them.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    teacher = Teacher.draw(generator)
    q_pool, k_pool = parse_gate_type("Qavg_Kmaxminavg")
    gate = AttnGate(_WIDTH, _HEADS, _HEADS, block_size=_BLOCK, q_pool=q_pool, k_pool=k_pool, rotary=False)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        q, k = teacher.sample(batch_size, generator)
        queries, keys = q.transpose(1, 2), teacher.straighten(k)
        loss = distillation_loss(gate.logits(q, k), queries, keys, block_size=_BLOCK, scale=_SCALE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    plain = average_pool_gate(_WIDTH, _HEADS, _HEADS, block_size=_BLOCK, rotary=False)
    with torch.no_grad():
        q, k = teacher.sample(test_size, torch.Generator().manual_seed(seed + 2))
        queries, keys = q.transpose(1, 2), teacher.straighten(k)
        scores = {
            "learned": gate.logits(q, k),
            "oracle": ground_truth(queries, keys, block_size=_BLOCK, scale=_SCALE),
            "sink_local": sink_local_scores(_LENGTH // _BLOCK, q.device).expand(test_size, _HEADS, -1, -1),
            "random": torch.rand(test_size, _HEADS, *[_LENGTH // _BLOCK] * 2, generator=generator),
            "average_pool": plain.logits(q, k),
        }
        mass = pooled_attention_map(queries, keys, block_size=_BLOCK, pool="sum", scale=_SCALE)[:, :, _FIRST_ROW:]
        return {name: float(tile_recall(best_quarter(s)[:, :, _FIRST_ROW:], mass).mean()) for name, s in scores.items()}


@torch.no_grad()
def average_pool_gate(head_dim: int, num_q_heads: int, num_k_heads: int, *, block_size: int, rotary: bool) -> AttnGate:
    """A gate that has learned nothing: its scores are products of mean queries and mean keys."""
    gate = AttnGate(head_dim, num_q_heads, num_k_heads, block_size=block_size, k_pool=("avg",), rotary=rotary)
    gate.key_map.weight.copy_(torch.eye(head_dim).expand_as(gate.key_map.weight))
    return gate


def best_quarter(scores_BHNN: Tensor) -> Tensor:
    """In each row the quarter of its causal tiles with the largest scores, at least one, bool."""
    num = scores_BHNN.shape[-1]
    causal = causal_tiles(num, scores_BHNN.device)
    ranks = scores_BHNN.masked_fill(~causal, -torch.inf).argsort(-1, descending=True).argsort(-1)
    quota = (torch.arange(1, num + 1, device=ranks.device) / 4).round().clamp(min=1)
    return (ranks < quota[:, None]) & causal
