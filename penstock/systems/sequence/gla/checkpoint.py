"""Checkpoints of gated linear attention: flash-linear-attention's (fla-hub) and the authors' first code.

Sizes come from the shapes of the tensors; what shapes do not tell is read from the checkpoint's ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import State, load_strict, rename
from penstock.systems.sequence.gla.model import GLALM, GatedLinearAttention, Variant

Names = list[tuple[str, str]]

#: Beginnings of keys within a layer, theirs and ours.
_LAYER: dict[Variant, Names] = {
    "fla": [
        ("gk_proj.", "decay_gate.proj."),
        ("g_proj.", "readout_gate.proj."),
        ("g_norm_swish_gate.", "readout_norm."),
        ("g_norm.", "readout_norm."),
        ("", ""),
    ],
    "paper": [
        ("k_gate.", "decay_gate.proj."),
        ("g_proj.", "readout_gate.proj."),
        ("out_proj.", "o_proj."),
        ("", ""),
    ],
}
#: The same around the layers; # is a layer's number.
_MODEL: dict[Variant, Names] = {
    "fla": [
        ("model.embeddings.", "embed_tokens."),
        ("model.norm.", "norm."),
        ("model.layers.#.attn_norm.", "layers.#.input_layernorm."),
        ("model.layers.#.mlp_norm.", "layers.#.post_attention_layernorm."),
        ("model.layers.#.mlp.", "layers.#.mlp."),
    ],
    "paper": [
        ("transformer.wte.", "embed_tokens."),
        ("transformer.ln_f.", "norm."),
        ("transformer.h.#.ln_1.", "layers.#.input_layernorm."),
        ("transformer.h.#.ln_2.", "layers.#.post_attention_layernorm."),
        ("transformer.h.#.w1.", "layers.#.mlp.gate_proj."),
        ("transformer.h.#.w2.", "layers.#.mlp.down_proj."),
        ("transformer.h.#.w3.", "layers.#.mlp.up_proj."),
    ],
}
_ATTENTION: dict[Variant, str] = {"fla": "model.layers.#.attn.", "paper": "transformer.h.#.attn."}


def _model_names(variant: Variant) -> Names:
    inside = [(_ATTENTION[variant] + theirs, f"layers.#.self_attn.{ours}") for theirs, ours in _LAYER[variant]]
    return _MODEL[variant] + inside


def _table(names: Sequence[tuple[str, str]]) -> Names:
    """Regular expressions and replacements for `rename`."""
    return [("^" + re.escape(a).replace(r"\#", r"(\d+)"), b.replace("#", r"\1")) for a, b in names]


def _sizes(layer: State, variant: Variant, num_heads: int) -> dict[str, Any]:
    """`GatedLinearAttention`'s arguments as far as the shapes of its tensors, under our names, tell them.

    Raises:
        UserError: if a tensor that tells a size is missing, or the sizes do not agree with the number of heads.
    """
    try:
        key_dim, hidden = layer["q_proj.weight"].shape
        value_dim = layer["o_proj.weight"].shape[1]
        group_keys = layer["k_proj.weight"].shape[0]
        rank = layer["decay_gate.proj.0.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"the checkpoint has no {error.args[0]} in its first layer; is it a {variant} checkpoint?"
        ) from None
    if num_heads < 1 or key_dim % num_heads or group_keys % (key_dim // num_heads):
        raise UserError(f"num_heads={num_heads} does not fit a layer of {key_dim} query and {group_keys} key channels")
    convolution = layer.get("q_conv1d.weight")
    return {
        "hidden_size": hidden,
        "expand_k": key_dim / hidden,
        "expand_v": value_dim / hidden,
        "num_heads": num_heads,
        "num_kv_heads": group_keys // (key_dim // num_heads),
        "use_short_conv": convolution is not None,
        "conv_size": 4 if convolution is None else convolution.shape[-1],
        "conv_bias": "q_conv1d.bias" in layer,
        "use_output_gate": "readout_gate.proj.weight" in layer,
        "elementwise_affine": "readout_norm.weight" in layer,
        "gate_low_rank_dim": rank,
        "variant": variant,
    }


def _num_heads(layer: State, config: Mapping[str, Any]) -> int:
    given = config.get("num_heads", config.get("n_head"))
    if given is not None:
        return int(given)
    norm = layer.get("readout_norm.weight")
    if norm is None:
        raise UserError(
            "the tensors do not tell the number of heads; give config={'num_heads': ...} (original: n_head)"
        )
    return layer["o_proj.weight"].shape[1] // len(norm)


#: What a config.json can say of a layer that no shape tells.
_SETTINGS = ("feature_map", "clamp_min", "gate_logit_normalizer", "fuse_norm")


def load_layer(state: State, variant: Variant = "fla", **options: Any) -> GatedLinearAttention:
    """One layer from its own keys (``q_proj.weight`` ...), in the dtype of the checkpoint.

    Args:
        state: under the authors' names.
        variant: whose.
        options: arguments of `GatedLinearAttention` that the shapes do not tell; ``num_heads`` where there is no
            weight of the read-out norm.
    """
    ours = rename(state, _table(_LAYER[variant]))
    sizes = _sizes(ours, variant, _num_heads(ours, options))
    layer = GatedLinearAttention(**(sizes | options)).to(next(iter(ours.values())).dtype)
    load_strict(layer, ours, source="the layer")
    return layer


def from_authors(state: State, *, config: Mapping[str, Any] | None = None) -> GLALM:
    """The language model of a published checkpoint.

    Args:
        state: under the names of flash-linear-attention (``model.layers.0.attn.gk_proj.0.weight`` ...) or of the
            authors' first code (``transformer.h.0.attn.k_gate.0.weight`` ...).
        config: its ``config.json``, for what shapes do not tell: ``num_heads`` (``n_head``), ``norm_eps``,
            ``feature_map``, ``clamp_min``, ``hidden_act``.

    Raises:
        UserError: if tensors are missing, left over or misshapen, or the model has parts that are not here
            (layers of softmax attention, value gates, another activation).
    """
    config = config or {}
    variant: Variant = "paper" if any(key.startswith("transformer.") for key in state) else "fla"
    if config.get("attn"):
        raise UserError(f"attn={config['attn']}: hybrids with layers of softmax attention are not supported")
    if config.get("use_gv") or not config.get("use_gk", True):
        raise UserError("only the decay gate of key channels is supported (use_gk=True, use_gv=False)")
    activation = config.get("hidden_act", "swish")  # of the MLP and the read-out gate alike
    if activation not in ("swish", "silu"):
        raise UserError(f"hidden_act={activation!r} is not supported; the published models use 'swish'")
    ours = rename(state, _table(_model_names(variant)))
    numbers = {int(found[1]) for key in ours if (found := re.match(r"layers\.(\d+)\.", key))}
    first = {k.removeprefix("layers.0.self_attn."): v for k, v in ours.items() if k.startswith("layers.0.self_attn.")}
    for key in ("embed_tokens.weight", "layers.0.mlp.gate_proj.weight"):
        if key not in ours:
            raise UserError(
                f"the checkpoint has no {key} under any name known here; it has {', '.join(list(state)[:3])} ..."
            )
    options = _sizes(first, variant, _num_heads(first, config))
    options |= {key: config[key] for key in _SETTINGS if key in config}
    tied = "lm_head.weight" not in ours
    if tied:
        ours["lm_head.weight"] = ours["embed_tokens.weight"]
    model = GLALM(
        len(ours["embed_tokens.weight"]),
        num_layers=len(numbers),
        intermediate_size=len(ours["layers.0.mlp.gate_proj.weight"]),
        norm_eps=config.get("norm_eps", 1e-5 if variant == "paper" else 1e-6),
        gate_fn=activation,
        tie_embeddings=tied,
        **options,
    ).to(next(iter(ours.values())).dtype)
    load_strict(model, ours)
    return model


def to_authors(model: GLALM) -> dict[str, Tensor]:
    """The model's state dict under the names of flash-linear-attention, or for the paper's variant of its first code."""
    layer = model.blocks[0].self_attn
    assert isinstance(layer, GatedLinearAttention)
    fused = layer.fuse_norm and layer.gate_fn == "swish" and layer.readout_gate is not None
    left_out = "g_norm." if fused else "g_norm_swish_gate."
    back = [(ours, theirs) for theirs, ours in _model_names(layer.variant) if not theirs.endswith(left_out)]
    return rename(model.state_dict(), _table(back))


def state_from_authors(
    recurrent_state: Tensor, conv_state: Sequence[Tensor] | None = None, *, state_v_first: bool
) -> dict[str, Tensor]:
    """What a layer of flash-linear-attention remembers, as our layer's entry in ``Cache.layers``.

    Args:
        recurrent_state: (B, H, V, K) if ``state_v_first``, as its caches keep it now, else (B, H, K, V).
        conv_state: of queries, keys and values, (B, C, W) each, newest last; ``None`` without short convolutions.
        state_v_first: which of the two.

    Raises:
        UserError: if the state has not four axes or no floating point numbers.
    """
    if recurrent_state.ndim != 4 or not recurrent_state.is_floating_point():
        raise UserError(
            f"the recurrent state is {recurrent_state.dtype} {tuple(recurrent_state.shape)}; it must be floating point "
            "[B, H, K, V], or transposed [B, H, V, K] with state_v_first=True"
        )
    wide = torch.promote_types(recurrent_state.dtype, torch.float32)
    state = {"recurrent_state": (recurrent_state.mT if state_v_first else recurrent_state).to(wide).contiguous()}
    if conv_state is not None:
        state |= {f"conv_state_{name}": part for name, part in zip("qkv", conv_state, strict=True)}
    return state
