"""Golden cases of gated_attention: one layer (authors', Qwen3-Next) and the whole language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from penstock.gates import watch
from penstock.nn.causal_lm import Span
from penstock.nn.decoder import rotary_tables
from penstock.systems.sequence.gated_attention.checkpoint import Layout, from_authors, join_queries, load_layer
from penstock.systems.sequence.gated_attention.model import first_token_attention, max_activation
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

_SHARED = {"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias",
           "num_hidden_layers", "max_position_embeddings", "vocab_size"}  # fmt: skip
_AUTHORS = _SHARED | {
    "attention_dropout", "elementwise_attn_output_gate", "headwise_attn_output_gate", "hidden_act", "initializer_range",
    "intermediate_size", "max_window_layers", "qkv_bias", "rope_scaling", "rope_theta", "sliding_window",
    "tie_word_embeddings", "use_cache", "use_qk_norm", "use_sliding_window",
}  # fmt: skip


def _layer(config: dict[str, Any], params: Tensors, inputs: Tensors, layout: Layout) -> Tensors:
    refuse_unknown(
        config,
        _AUTHORS if layout == "authors" else _SHARED | {"rope_parameters", "rope_theta", "partial_rotary_factor"},
    )
    layer = load_layer(params, config, layout).eval()
    x = inputs["hidden_states"].clone().requires_grad_()
    positions = inputs["position_ids"]
    heads: list[Tensor] = []
    handle = layer.o_proj.register_forward_pre_hook(lambda _module, args: heads.append(args[0]))
    if layer.gate is None:
        y = layer(x, Span(positions))
    else:
        with watch(layer, "gate", keep="values") as log:
            y = layer(x, Span(positions))
    handle.remove()
    cos, sin = rotary_tables(positions, layer.rotary_dim, layer.rope_theta, x.dtype)
    outputs = {
        "attn_output": y, "attn_weights": layer.attention_map(x, positions), "gated_heads_flat": heads[0], "cos": cos, "sin": sin,
    }  # fmt: skip
    if layer.gate is not None:
        outputs["gate"] = log.values()["gate"][0]
    if "grad_out" in inputs:
        (y * inputs["grad_out"]).sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("gate.")}
        if layer.gate is not None:
            for part, rows in layer.gate.proj.named_parameters():
                grads[f"q_proj.{part}"] = join_queries(
                    grads[f"q_proj.{part}"], rows.grad, layer.num_heads, layer.num_kv_heads, layout
                )
        outputs |= {f"grad.{name}": grad for name, grad in grads.items()} | {"grad_hidden_states": x.grad}
    return outputs


def attn(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    return _layer(config, params, inputs, "authors")


def qwen3next_attn(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    return _layer(config, params, inputs, "qwen3_next")


def lm(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _AUTHORS)
    model = from_authors(params, config=config).eval()
    tokens = inputs["input_ids"]
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return {
        "logits": logits,
        "loss": loss.reshape(1),
        "first_token_attention": first_token_attention(model, tokens),
        "max_abs_hidden": max_activation(model, tokens),
        **{f"hidden_{i}": state for i, state in enumerate(model.hidden_states(tokens))},
    }


ADAPTERS = {"attn": attn, "lm": lm, "qwen3next_attn": qwen3next_attn}
