"""Checkpoints of HazyResearch/zoology: their key names, and which mixer a layer's keys belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import State, load_strict, rename
from penstock.systems.sequence.zoology.mixers import Mixer
from penstock.systems.sequence.zoology.model import LanguageModel, make_mixer

#: Names of the model around the mixers; a hybrid's layers add ``.mixer`` to their mixer's keys.
KEYS = [
    (r"^backbone\.embeddings\.", ""),
    (r"^backbone\.layers\.(\d+)\.sequence_mixer\.(?:mixer\.)?", r"layers.\1.mixer."),
    (r"^backbone\.", ""),
]

#: Names within each mixer.
MIXER_KEYS = {
    "BaseConv": [
        (r"^projection\.", "gate.proj."),
        (r"^conv\.conv\.", "conv."),
        (r"^conv\.pos_emb\.z$", "conv.features"),
    ],
    "H3": [
        (r"^q_proj\.", "query_gate.proj."),
        (r"^ssm_k_kernel\.kernel\.", "shift."),
        (r"^ssm_k_D$", "shift.D"),
        (r"^kernel\.kernel\.", "diagonal."),
        (r"^D$", "diagonal.D"),
    ],
    "Hyena": [
        (r"^filter_fn\.bias$", "filter.skip"),
        (r"^filter_fn\.pos_emb\.z$", "filter.features"),
        (r"^filter_fn\.pos_emb\.t$", "filter.times"),
        (r"^filter_fn\.modulation\.deltas$", "filter.deltas"),
        (r"^filter_fn\.implicit_filter\.[135]\.freq$", "filter.frequencies"),  # one parameter under three names
        (r"^filter_fn\.implicit_filter\.0\.", "filter.layers.0."),
        (r"^filter_fn\.implicit_filter\.2\.", "filter.layers.1."),
        (r"^filter_fn\.implicit_filter\.4\.", "filter.layers.2."),
        (r"^filter_fn\.implicit_filter\.6\.", "filter.output."),
    ],
    "MHA": [],
    "RWKVTimeMixer": [(r"^receptance\.", "receptance.proj.")],
    "SigmoidLookups": [(r"^selecting\.", "gate.proj."), (r"^(Wqkv|out_proj)\.", r"attention.\1.")],
}

#: Of Hyena's joint projection and short filter, which rows are whose.
_HYENA_ROWS = ("pre_gate.projection", "post_gate.projection", "value")

#: A key that only this mixer has, asked for in this order.
_SIGNS = {
    "BaseConv": "projection.weight",
    "H3": "ssm_k_D",
    "Hyena": "short_filter.weight",
    "RWKVTimeMixer": "time_decay",
    "SigmoidLookups": "selecting.weight",
    "MHA": "Wqkv.weight",
}


def mixer_state(name: str, state: State) -> dict[str, Tensor]:
    """One mixer's tensors under our names and in our shapes."""
    ours: dict[str, Tensor] = {}
    for key, value in rename(state, MIXER_KEYS[name]).items():
        joint = re.fullmatch(r"(in_proj|short_filter)\.(weight|bias)", key) if name == "Hyena" else None
        if joint:
            part = "proj" if joint[1] == "in_proj" else "conv"
            for owner, rows in zip(_HYENA_ROWS, value.chunk(3), strict=True):
                ours[f"{owner}.{part}.{joint[2]}"] = rows
        else:
            ours[key] = value
    # The authors keep broadcasting axes of size one in front, or behind the times.
    flat = {
        "H3": ("shift.C", "diagonal.C"),
        "Hyena": ("filter.features", "filter.times"),
        "BaseConv": ("conv.features",),
    }.get(name, ())
    ours |= {key: ours[key].squeeze(0) for key in flat if key in ours}
    vectors = ("filter.deltas", "filter.frequencies", "time_mix_k", "time_mix_v", "time_mix_r")
    return ours | {key: ours[key].flatten() for key in vectors if key in ours}


def load_mixer(name: str, state: State, d_model: int, *, layer_idx: int = 0, **arguments: Any) -> Mixer:
    """One mixer from its own keys, in the dtype of the checkpoint.

    Args:
        name: as in `penstock.systems.sequence.zoology.model.MIXERS`.
        state: under the authors' names (``projection.weight`` ...).
        d_model: width D.
        layer_idx: of the layer.
        arguments: the mixer's others.

    Raises:
        UserError: if tensors are missing, left over or misshapen.
    """
    mixer = make_mixer({"name": name, **arguments}, d_model, layer_idx).to(next(iter(state.values())).dtype)
    load_strict(mixer, mixer_state(name, state), source=f"the {name} layer")
    return mixer


def from_authors(state: State, *, mixers: Sequence[Mapping[str, Any]] | None = None) -> LanguageModel:
    """The language model of a checkpoint.

    Args:
        state: under the authors' names (``backbone.layers.0.sequence_mixer.projection.weight`` ...).
        mixers: what the tensors do not tell (heads of attention, which count as one, look-ups, ``use_act``, ``l_max`` of
            H3): layer i has ``mixers[i % len(mixers)]``, with the mixer's ``name`` and arguments. Default: as the
            tensors tell.

    Raises:
        UserError: if a layer's mixer is not known, or tensors are missing, left over or misshapen.
    """
    renamed = rename(state, KEYS)
    if "word_embeddings.weight" not in renamed:
        raise UserError("the checkpoint has no backbone.embeddings.word_embeddings.weight; it is none of zoology's")
    count = 1 + max((int(m[1]) for key in renamed if (m := re.match(r"layers\.(\d+)\.", key))), default=-1)
    settings, ours = [], {key: value for key, value in renamed.items() if ".mixer." not in key}
    for i in range(count):
        prefix = f"layers.{i}.mixer."
        own = {key.removeprefix(prefix): value for key, value in renamed.items() if key.startswith(prefix)}
        chosen = dict(mixers[i % len(mixers)]) if mixers else _told_by(own, i, count)
        if (name := chosen.get("name")) not in MIXER_KEYS:
            raise UserError(f"layer {i}: mixer {name!r} is none of zoology's; they are {', '.join(MIXER_KEYS)}")
        settings.append(chosen)
        ours |= {prefix + key: value for key, value in mixer_state(name, own).items()}
    embedding = ours["word_embeddings.weight"]
    head = ours.setdefault("lm_head.weight", embedding)
    positions, hidden = ours.get("position_embeddings.weight"), ours.get("layers.0.state_mixer.fc1.weight")
    model = LanguageModel(
        len(embedding),
        embedding.shape[1],
        count,
        mixers=settings,
        mlp_hidden=0 if hidden is None else len(hidden),
        max_position_embeddings=0 if positions is None else len(positions),
        learnable_word_embeddings=head is embedding or bool((head == embedding).all()),
    ).to(embedding.dtype)
    load_strict(model, ours)
    return model


def _told_by(own: State, layer: int, num_layers: int) -> dict[str, Any]:
    """A mixer's name and the arguments that its tensors' shapes tell."""
    name = next((name for name, sign in _SIGNS.items() if sign in own), None)
    if name is None:
        raise UserError(f"layer {layer}: no known mixer has {', '.join(sorted(own)[:3]) or 'no tensors'}")
    told: dict[str, Any] = {"name": name}
    if name == "BaseConv":
        told |= _base_conv(own)
    elif name == "Hyena":
        told["l_max"] = own["filter_fn.pos_emb.z"].shape[1]
        told["filter_order"] = len(own["filter_fn.implicit_filter.0.weight"])
        told["short_filter_order"] = own["short_filter.weight"].shape[-1]
    elif name == "H3":
        told["d_state"] = own["ssm_k_kernel.kernel.C"].shape[-1]
        told["head_dim"] = len(own["ssm_k_D"]) // len(own["D"])
    elif name == "RWKVTimeMixer":
        told["n_layer"] = max(num_layers, 2)
    else:
        told["bias"] = "Wqkv.bias" in own
    return told


def _base_conv(own: State) -> dict[str, Any]:
    if "conv.conv.weight" in own:
        taps = own["conv.conv.weight"].shape[-1]
        return {"l_max": taps, "kernel_size": taps}
    if "conv.filter" in own:
        return {"l_max": own["conv.filter"].shape[-1], "kernel_size": -1, "implicit_long_conv": False}
    return {"l_max": own["conv.pos_emb.z"].shape[1], "kernel_size": -1}
