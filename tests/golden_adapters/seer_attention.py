"""Golden cases of seer_attention: the prefill gate, the decode gate with its cache, the target and its loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penstock.nn.decoder import rotary_tables
from penstock.ops import block_sparse_attention
from penstock.systems.sequence.seer_attention.checkpoint import from_authors
from penstock.systems.sequence.seer_attention.gates import AttnGate, DecodeGate, parse_gate_type
from penstock.systems.sequence.seer_attention.model import distillation_loss, ground_truth
from penstock.systems.sequence.seer_attention.tiles import Method, TileRule, pool_blocks
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

_GATE = {"block_size", "gate_hidden_size", "head_dim", "num_k_head", "num_q_head", "rope_theta", "threshold"}


def _tables(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Rotary tables with angles in float64, where these cases have theirs (`rotary_tables` has float32)."""
    angles = positions[..., None] * base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def gate_prefill(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _GATE | {"T", "force_double", "gate_type", "nz_ratio"})
    (gate,) = from_authors(
        params, num_kv_heads=config["num_k_head"], block_size=config["block_size"], gate_type=config["gate_type"]
    ).gates
    assert isinstance(gate, AttnGate)
    q_pool, k_pool = parse_gate_type(config["gate_type"])
    shortcut = len(q_pool) == 1 and config["gate_hidden_size"] == config["head_dim"] and not config["force_double"]
    assert (gate.query_map is None) == shortcut
    assert (gate.num_q_heads, gate.head_dim, gate.width) == (
        config["num_q_head"], config["head_dim"], config["gate_hidden_size"],
    )  # fmt: skip
    q, k = inputs["q"], inputs["k"]
    assert q.shape[1] == config["T"]
    cos, sin = _tables(inputs["block_position_ids"], gate.width, config["rope_theta"])
    tables = cos.to(q.dtype), sin.to(q.dtype)
    logits = gate.logits(q, k, tables)

    def mask(method: Method, last: bool) -> Tensor:
        gate.rule = TileRule(
            method, config["threshold"], config["nz_ratio"], last_block_dense=last, force_diagonal=False
        )
        return gate(q, k, tables) > 0.5

    return {
        "q_pooled": pool_blocks(q, gate.block_size, q_pool),
        "k_pooled": pool_blocks(k, gate.block_size, k_pool),
        "gate_logits_causal_zeroed": logits.tril(),
        "gate_scores": logits.softmax(-1),
        "mask_threshold": mask("threshold", False),
        "mask_threshold_last_dense": mask("threshold", True),
        "mask_nz_ratio": mask("nz_ratio", False),
        "mask_nz_ratio_last_dense": mask("nz_ratio", True),
    }


def gate_decode(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _GATE | {"block_budget", "prefill", "q_head_pooling_type", "steps", "use_qk_norm"})
    size, prefill, steps = config["block_size"], config["prefill"], config["steps"]
    (gate,) = from_authors(
        params,
        num_heads=config["num_q_head"],
        block_size=size,
        query_pooling=config["q_head_pooling_type"],
        compat=True,
    ).gates
    assert isinstance(gate, DecodeGate)
    assert isinstance(gate.query_norm, torch.nn.Identity) != config["use_qk_norm"]
    q, k = inputs["q"], inputs["k"]
    batch = len(q)

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, gate.width, config["rope_theta"], q.dtype)

    state: dict[str, Tensor] = {}
    gate.prefill(state, k[:, :prefill], torch.full((batch,), prefill), tables(torch.arange(0, prefill, size)))
    outputs = {"k_compressed_after_prefill": state["compressed"]}
    rules = {
        "masks_budget": replace(gate.rule, method="token_budget", token_budget=config["block_budget"] * size),
        "masks_threshold": replace(gate.rule, method="threshold", threshold=config["threshold"]),
    }
    widest = -(-(prefill + steps) // size)
    masks = {name: torch.zeros(batch, steps, gate.num_k_heads, widest, dtype=torch.bool) for name in rules}
    num_blocks = []
    for step in range(steps):
        at = torch.full((batch,), prefill + step)
        num_blocks.append(-(-(prefill + step + 1) // size))
        entry = tables(gate.entry_positions(at[:, None]))
        gate.append(state, k[:, prefill + step], at, torch.ones_like(at, dtype=torch.bool), num_blocks[-1], entry)
        for name, rule in rules.items():
            gate.rule = rule
            values = gate(q[:, prefill + step], state["compressed"], at // size, tables(at[:, None]))
            masks[name][:, step, :, : values.shape[-1]] = values > 0.5
    return outputs | masks | {
        "k_compressed_final": state["compressed"],
        "k_remainder_final": state["recent"],
        "num_blocks": torch.tensor(num_blocks),
    }  # fmt: skip


def ground_truth_and_loss(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"T", "block_size", "head_dim", "num_heads", "num_kv_heads", "threshold_for_mask"})
    assert not params
    q, k, v, size = inputs["q"], inputs["k"], inputs["v"], config["block_size"]
    assert (q.shape[1:], k.shape[1]) == (
        (config["num_heads"], config["T"], config["head_dim"]), config["num_kv_heads"],
    )  # fmt: skip
    logits = inputs["gate_logits"].clone().requires_grad_()
    loss = distillation_loss(logits, q, k, block_size=size)
    (gradient,) = torch.autograd.grad(loss, logits)
    everything = torch.ones_like(inputs["block_mask"])
    return {
        "attn_output": block_sparse_attention(q, k, v, everything, block_size=size),
        "ground_truth": ground_truth(q, k, block_size=size),
        "kl_loss": loss.reshape(1),
        "grad_gate_logits": gradient,
        "sparse_attn_output": block_sparse_attention(q, k, v, inputs["block_mask"], block_size=size),
    }


ADAPTERS = {
    "gate_decode": gate_decode,
    "gate_prefill": gate_prefill,
    "ground_truth_and_loss": ground_truth_and_loss,
}
