"""The authors' OptFS checkpoints (fuyuanlyu/OptFS)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import load_strict, rename
from penstock.systems.recommendation.optfs.model import Backbone, Compat, OptFSModel

#: The authors' key -> ours. Temperature and ticket are no tensors there; `init_weight` is the rewind snapshot of the
#: table, which a trainer keeps and not the model.
KEYS = [
    (r"^mask_embedding\.embedding$", "embedding.table.weight"),
    (r"^mask_embedding\.mask_weight$", "embedding.gate.logit"),
    (r"^dnn\.mlp\.", "backbone.mlp."),
    (r"^cross\.w\.", "backbone.cross.weights."),
    (r"^cross\.b\.", "backbone.cross.biases."),
    (r"^combination\.", "backbone.combination."),
]
#: Ours -> the authors'.
AUTHORS_KEYS = [
    (r"^embedding\.table\.weight$", "mask_embedding.embedding"),
    (r"^embedding\.gate\.logit$", "mask_embedding.mask_weight"),
    (r"^backbone\.mlp\.", "dnn.mlp."),
    (r"^backbone\.cross\.weights\.", "cross.w."),
    (r"^backbone\.cross\.biases\.", "cross.b."),
    (r"^backbone\.combination\.", "combination."),
]
_SNAPSHOT = "mask_embedding.init_weight"


def from_authors(
    state: Mapping[str, Tensor],
    *,
    backbone: Backbone,
    num_fields: int | None = None,
    initial: float = 0.5,
    temperature: float = 1.0,
    ticket: bool = False,
    dropout: float = 0.0,
    compat: Compat = "authors",
) -> OptFSModel:
    """The model that a checkpoint was saved from, in the checkpoint's dtype.

    Args:
        state: the authors' state dict.
        backbone: which of the four networks it is; a DeepFM cannot be told from an IPNN by its tensors.
        num_fields: needed for fm only, which has no weights that tell it.
        initial: the value gates started at (``mask_initial``), which fixes their scale.
        temperature: of the soft gates (``temp``).
        ticket: whether gates are hard.
        dropout: of the perceptron.
        compat: "authors" as their code runs, "paper" without its quirks.

    Raises:
        UserError: if the tensors do not fit the backbone.
    """
    if "mask_embedding.embedding" not in state:
        raise UserError("the checkpoint has no mask_embedding.embedding: it is not an OptFS network")
    table = state["mask_embedding.embedding"]
    num_ids, dim = table.shape
    linear = {
        int(match[1]): value
        for key, value in state.items()
        if (match := re.fullmatch(r"dnn\.mlp\.(\d+)\.weight", key)) and value.ndim == 2
    }
    widths = [len(linear[place]) for place in sorted(linear)]
    if num_fields is None:
        num_fields = _num_fields(backbone, dim, state)
    model = OptFSModel(
        num_ids,
        num_fields,
        backbone=backbone,
        dim=dim,
        mlp_dims=widths if backbone == "dcn" else widths[:-1],
        dropout=dropout,
        batch_norm=any(key.endswith("running_mean") for key in state),
        cross_layers=sum(key.startswith("cross.b.") for key in state),
        initial=initial,
        compat=compat,
    ).to(table.dtype)
    ours = rename({key: value for key, value in state.items() if key != _SNAPSHOT}, KEYS)
    ours |= {
        "embedding.gate.temperature": torch.tensor(temperature, dtype=table.dtype),
        "embedding.gate.hard": torch.tensor(ticket),
    }
    load_strict(model, ours)
    return model


def to_authors(model: OptFSModel, snapshot: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of a gated model under the authors' keys.

    Args:
        model: with gates.
        snapshot: of `OptFSModel.snapshot`, to fill the rewind snapshot; without, it is zeros as before a snapshot.
    """
    state = {
        k: v for k, v in model.state_dict().items() if k not in ("embedding.gate.temperature", "embedding.gate.hard")
    }
    table = state["embedding.table.weight"]
    saved = torch.zeros_like(table) if snapshot is None else snapshot["embedding.table.weight"]
    return rename(state, AUTHORS_KEYS) | {_SNAPSHOT: saved}


def _num_fields(backbone: Backbone, dim: int, state: Mapping[str, Tensor]) -> int:
    """How many fields the first layer was made for."""
    if backbone == "fm":
        raise UserError("a factorisation machine's checkpoint does not tell its fields: give num_fields")
    first = state.get("cross.w.0.weight" if backbone == "dcn" else "dnn.mlp.0.weight")
    if first is None:
        raise UserError(f"the checkpoint has no first layer of a {backbone}")
    width = first.shape[1]
    for fields in range(1, width + 1):
        pairs = fields * (fields - 1) // 2 if backbone == "ipnn" else 0
        if fields * dim + pairs == width:
            return fields
    raise UserError(f"a first layer of width {width} fits no number of fields of width {dim} in a {backbone}")
