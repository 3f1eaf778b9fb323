"""Checkpoints of gated attention: the authors' (qiuzh20/gated_attention) and Qwen3-Next's full-attention layers.

Both keep the gate's rows inside ``q_proj``, in different orders:

- authors, per key/value head: its query rows (g K), then its gate rows (g headwise, g K elementwise), where g is
  the number of query heads that share it;
- Qwen3-Next, per query head: K query rows, then K gate rows (elementwise only).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import State, load_strict, rename
from penstock.systems.sequence.gated_attention.model import GatedAttention, GatedAttentionLM, Granularity

Layout = Literal["authors", "qwen3_next"]

KEYS = [(r"^model\.", "")]


def split_queries(
    rows: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, gate: Granularity | None, layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """Query rows and gate rows of a ``q_proj`` weight or bias, each in order of heads.

    Raises:
        UserError: if the number of rows is not the layout's, naming both.
    """
    width = {"headwise": 1, "elementwise": head_dim, None: 0}[gate]
    groups = num_heads if layout == "qwen3_next" else num_kv_heads
    expected = num_heads * (head_dim + width)
    if rows.shape[0] != expected:
        raise UserError(
            f"q_proj has {rows.shape[0]} rows; {_guess(rows.shape[0], num_heads, head_dim)}, and {gate or 'no'} gate needs {expected}"
        )
    if gate is None:
        return rows, None
    grouped = rows.unflatten(0, (groups, -1))
    queries, gates = grouped.split([num_heads // groups * head_dim, num_heads // groups * width], 1)
    return queries.flatten(0, 1), gates.flatten(0, 1)


def join_queries(queries: Tensor, gates: Tensor | None, num_heads: int, num_kv_heads: int, layout: Layout) -> Tensor:
    """The inverse of `split_queries`."""
    if gates is None:
        return queries
    groups = num_heads if layout == "qwen3_next" else num_kv_heads
    return torch.cat([queries.unflatten(0, (groups, -1)), gates.unflatten(0, (groups, -1))], 1).flatten(0, 1)


def _guess(rows: int, num_heads: int, head_dim: int) -> str:
    known = {num_heads * head_dim: "that is a layer without a gate", num_heads * (head_dim + 1): "that is a headwise gate",
             2 * num_heads * head_dim: "that is an elementwise gate"}  # fmt: skip
    return known.get(rows, f"with {num_heads} heads of {head_dim} that is no known layout")


def attention_options(config: Mapping[str, Any], layout: Layout = "authors") -> dict[str, Any]:
    """`GatedAttention`'s arguments from a transformers-style configuration.

    Raises:
        UserError: if both gate flags are set, or the rotary scaling is not the default.
    """
    heads = config["num_attention_heads"]
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim", 128),
        "eps": config.get("rms_norm_eps", 1e-6),
        "dropout": config.get("attention_dropout", 0.0),
    }
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rotary scaling {rope['rope_type']!r} is not supported; only 'default' is")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if layout == "qwen3_next":
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
        return options | {
            "gate": "elementwise", "rope_theta": theta, "rotary_fraction": partial, "zero_centred_norm": True,
            "bias": config.get("attention_bias", False),
        }  # fmt: skip
    headwise, elementwise = (
        config.get("headwise_attn_output_gate", False),
        config.get("elementwise_attn_output_gate", False),
    )
    if headwise and elementwise:
        raise UserError("headwise_attn_output_gate and elementwise_attn_output_gate are both set; set one")
    return options | {
        "gate": "headwise" if headwise else "elementwise" if elementwise else None,
        "rope_theta": theta,
        "bias": config.get("qkv_bias", False),
        "qk_norm": config.get("use_qk_norm", True),
    }


def load_layer(state: State, config: Mapping[str, Any], layout: Layout = "authors") -> GatedAttention:
    """One attention layer from its own keys (``q_proj.weight`` ...), in the dtype of the checkpoint."""
    options = attention_options(config, layout)
    layer = GatedAttention(config["hidden_size"], **options).to(next(iter(state.values())).dtype)
    load_strict(layer, _split_all(state, options, layout), source="the attention layer")
    return layer


def from_authors(state: State, *, config: Mapping[str, Any]) -> GatedAttentionLM:
    """The language model of a published checkpoint.

    Args:
        state: under the authors' names (``model.layers.0.self_attn.q_proj.weight`` ...).
        config: its ``config.json``.

    Raises:
        UserError: if tensors are missing, left over or misshapen, or the configuration cannot be met.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported; the published models use 'silu'")
    options = attention_options(config)
    tied = config.get("tie_word_embeddings", False)
    model = GatedAttentionLM(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        intermediate_size=config["intermediate_size"],
        tie_embeddings=tied,
        **options,
    ).to(next(iter(state.values())).dtype)
    ours = _split_all(rename(state, KEYS), options, "authors")
    if tied:
        ours.setdefault("lm_head.weight", ours.get("embed_tokens.weight", torch.empty(0)))
    load_strict(model, ours)
    return model


def to_authors(model: GatedAttentionLM) -> dict[str, Tensor]:
    """The model's state dict under the authors' names and row layout."""
    ours = {k: v for k, v in model.state_dict().items() if ".gate.proj." not in k}
    for index, attention in enumerate(model.attentions):
        gate = attention.gate
        if gate is not None and gate.proj is not None:
            for part, rows in gate.proj.named_parameters():
                key = f"layers.{index}.self_attn.q_proj.{part}"
                ours[key] = join_queries(
                    ours[key], rows.detach(), attention.num_heads, attention.num_kv_heads, "authors"
                )
    return {key if key.startswith("lm_head") else f"model.{key}": value for key, value in ours.items()}


def _split_all(state: State, options: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
    ours = {}
    for key, value in state.items():
        ours[key] = value
        owner, _, part = key.rpartition("q_proj.")
        if part and key.endswith(f"q_proj.{part}") and part in ("weight", "bias"):
            queries, gates = split_queries(
                value, options["num_heads"], options["num_kv_heads"], options["head_dim"], options["gate"], layout
            )
            ours[key] = queries
            if gates is not None:
                ours[f"{owner}gate.proj.{part}"] = gates
    return ours
