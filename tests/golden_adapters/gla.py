"""Golden cases of gla: the operator with its gradients, one layer (fla's, the original), the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.gates import watch
from penstock.nn.causal_lm import Span, State
from penstock.ops import gated_linear_attention
from penstock.systems.sequence.gla.checkpoint import from_authors, load_layer
from penstock.systems.sequence.gla.model import GatedLinearAttention
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

#: After how many tokens less than all the case looks at the state.
_STEPS = 3


def op(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"B", "H", "K", "T", "V", "gate_logit_normalizer", "gate_logit_scale", "scale"})
    names = ("q", "k", "v", "gk", "initial_state")
    leaves = {name: inputs[name].clone().requires_grad_() for name in names if name in inputs}
    o, final = gated_linear_attention(leaves["q"], leaves["k"], leaves["v"], leaves["gk"], leaves.get("initial_state"))
    ((o * inputs["grad_o"]).sum() + (final * inputs["grad_state"]).sum()).backward()
    return {"o": o, "final_state": final} | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def _full_pass(layer: GatedLinearAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    with watch(layer, "decay_gate", keep="values") as log:
        y = layer(x)
    return y, log.values()["decay_gate"][0].flatten(2)


def layer(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {
        "clamp_min", "conv_size", "feature_map", "gate_logit_normalizer", "hidden_size", "layer_idx", "num_heads",
        "num_kv_heads", "use_short_conv",
    })  # fmt: skip
    options = {key: value for key, value in config.items() if key != "layer_idx"}  # it only numbers the layer
    ours, x = load_layer(params, **options).eval(), inputs["hidden_states"]
    y, log_decay = _full_pass(ours, x)
    length = x.shape[1]
    states: list[State] = [{}]
    with torch.no_grad():
        pieces = [ours(x[:, : length - _STEPS], Span(torch.arange(length - _STEPS), states=states))]
        prefill = {name: value.clone() for name, value in states[0].items()}
        for t in range(length - _STEPS, length):
            pieces.append(ours(x[:, t : t + 1], Span(torch.arange(t, t + 1), states=states)))
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=1e-8, atol=1e-8)
    outputs = {"output": y, "log_decay": log_decay, "state_final": states[0]["recurrent_state"]}
    return outputs | {
        "state_after_prefill" if name == "recurrent_state" else name: value for name, value in prefill.items()
    }


def layer_original(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"d_model", "n_head"})
    ours = load_layer(params, "paper", hidden_size=config["d_model"], num_heads=config["n_head"]).eval()
    y, log_decay = _full_pass(ours, inputs["x"])
    return {"y": y, "log_decay": log_decay}


def lm(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(
        config, {"hidden_size", "intermediate_size", "norm_eps", "num_heads", "num_hidden_layers", "vocab_size"}
    )
    model, tokens = from_authors(params, config=config).eval(), inputs["input_ids"]
    assert (model.vocab_size, model.num_layers) == (config["vocab_size"], config["num_hidden_layers"])
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return {"logits": logits, "loss": loss.reshape(1)}


ADAPTERS = {"op": op, "layer": layer, "layer_original": layer_original, "lm": lm}
