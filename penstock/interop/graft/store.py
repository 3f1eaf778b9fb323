"""Grafts in a small file of their own, without the model they were grafted onto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from penstock.errors import UserError
from penstock.interop.graft.layout import Layout
from penstock.interop.graft.main import graft
from penstock.interop.graft.records import grafts_of
from penstock.nn.checkpoints import State, load_strict, read_state, rename
from penstock.systems.sequence.seer_attention.checkpoint import KEYS
from penstock.systems.sequence.seer_attention.tiles import TileRule

_METADATA = "penstock.graft"
#: Attention gates have their authors' names in the file.
_TO_AUTHORS = [
    (r"attn_gate\.query_map\.", "attn_gate.mask_linear_q."),
    (r"attn_gate\.key_map\.", "attn_gate.mask_linear_k."),
]
_FROM_AUTHORS = [(r"attn_gate\." + theirs, "attn_gate." + ours) for theirs, ours in KEYS]


def save_gates(model: nn.Module, path: str | Path) -> None:
    """Write what was grafted, and how, to a ``.safetensors`` file; nothing of the model itself.

    Attention gates are under the names of their authors (``model.layers.0.self_attn.attn_gate.mask_linear_k.weight``).

    Args:
        model: with grafts.
        path: of the file.

    Raises:
        UserError: if nothing was grafted.
    """
    from safetensors.torch import save_file

    state = {
        f"{name}.{key}": value.contiguous()
        for name, module in _grafted(model).items()
        for key, value in module.state_dict().items()
    }
    how = [{"what": one.what, "layers": one.layers, **one.options} for one in grafts_of(model)]
    save_file(rename(state, _TO_AUTHORS), path, {_METADATA: json.dumps(how)})


def load_gates(model: nn.Module, source: str | Path | State, *, layout: Layout | None = None) -> None:
    """Load what `save_gates` wrote, grafting it first onto a model that has no grafts; also the authors' attention gates.

    Args:
        model: the base model; or one with grafts like those in the file.
        source: the file, or a state dict. One that `save_gates` has not written (the authors' ``attn_gate_weights.pth``, a
            checkpoint of the whole model) does not tell what to graft, so it needs a model that is grafted already; of a
            whole model's only the gates are read.
        layout: for a class that `graft` does not know.

    Raises:
        UserError: if tensors are missing, left over or misshapen, or the file cannot be read.
    """
    state = rename(read_state(source), _FROM_AUTHORS)
    if not grafts_of(model):
        for how in _instructions(source):
            graft(model, layout=layout, **how)
    grafted = _grafted(model)
    left = set(state)
    for name, module in grafted.items():
        own = {key.removeprefix(f"{name}."): state[key] for key in state if key.startswith(f"{name}.")}
        load_strict(module, own, source=f"the file's {name}")
        left -= {f"{name}.{key}" for key in own}
    if left := left - set(model.state_dict()):
        raise UserError(f"the file has {', '.join(sorted(left)[:3])}, which nothing in the model is called")


def _grafted(model: nn.Module) -> dict[str, nn.Module]:
    """What was grafted by dotted name."""
    names = {module: name for name, module in model.named_modules()}
    found = {names[module]: module for one in grafts_of(model) for module in one.modules}
    if not found:
        raise UserError(f"nothing was grafted onto this {type(model).__name__}: penstock.graft(model, ...) first")
    return found


def _instructions(source: str | Path | State) -> list[dict[str, Any]]:
    """How the file's grafts were made, as arguments of `graft`."""
    from safetensors import safe_open

    known = None
    if isinstance(source, str | Path) and Path(source).suffix == ".safetensors":
        with safe_open(source, "pt") as file:
            known = (file.metadata() or {}).get(_METADATA)
    if known is None:
        raise UserError("the file does not say what was grafted: penstock.graft(model, ...) first, then load it")
    found: list[dict[str, Any]] = json.loads(known)
    for how in found:
        if "rule" in how:
            rule = how["rule"]
            if isinstance(rule["threshold"], list):
                rule["threshold"] = tuple(rule["threshold"])
            how["rule"] = TileRule(**rule)
    return found
