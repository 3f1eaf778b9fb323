"""The authors' checkpoints of FinalMLP and DualMLP (FuxiCTR, model_zoo/FinalMLP).

FuxiCTR keeps a table a field and lays the fields out in the order of its feature list; we keep one table, with fields of
ids first, then numeric ones, then sequences. So tables are joined, and what counts the flat embedding is reordered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.nn.checkpoints import load_strict, rename
from penstock.nn.fuxictr import Regularizer
from penstock.systems.recommendation.finalmlp.model import (
    Activations,
    Context,
    Dropouts,
    DualMLP,
    FeatureGate,
    FinalMLP,
    Norm,
    Perceptron,
)

#: The authors' key -> ours, but for tables.
KEYS = [
    (r"^fs_module\.fs([12])_ctx_bias$", r"gate_\1.constant"),
    (r"^fs_module\.fs([12])_gate\.mlp\.", r"gate_\1.net."),
    (r"^mlp([12])\.mlp\.", r"stream_\1."),
    (r"^fusion_module\.", "fusion."),
]
#: Ours -> the authors'.
AUTHORS_KEYS = [
    (r"^gate_([12])\.constant$", r"fs_module.fs\1_ctx_bias"),
    (r"^gate_([12])\.net\.", r"fs_module.fs\1_gate.mlp."),
    (r"^stream_([12])\.", r"mlp\1.mlp."),
    (r"^fusion\.", "fusion_module."),
]
#: Our table -> what stands before and after the field's name in the keys of the authors' tables.
TABLES = {
    "embedding.table.weight": ("embedding_layer.embedding_layer.embedding_layers.", ".weight"),
    "gate_1.context.embedding.table.weight": ("fs_module.fs1_ctx_emb.embedding_layer.embedding_layers.", ".weight"),
    "gate_2.context.embedding.table.weight": ("fs_module.fs2_ctx_emb.embedding_layer.embedding_layers.", ".weight"),
}
_MAIN = "embedding.table.weight"


@dataclass(frozen=True)
class Features:
    """FuxiCTR's feature list.

    Attributes:
        names: of all fields, in its order.
        numeric: those that are numbers.
        sequences: those that are sequences.
    """

    names: tuple[str, ...]
    numeric: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()

    @property
    def ours(self) -> tuple[str, ...]:
        """The names in the order of our batch: ids, numeric, sequences."""
        return tuple(sorted(self.names, key=lambda name: (name in self.numeric) + 2 * (name in self.sequences)))

    def among(self, chosen: Collection[str]) -> Features:
        """The list cut down to some fields."""
        parts = (tuple(n for n in part if n in chosen) for part in (self.names, self.numeric, self.sequences))
        return Features(*parts)

    def places(self, dim: int, *, inverse: bool = False) -> Tensor:
        """(X,) the place in their flat embedding of each element of ours; ``inverse``: the other way round."""
        order = torch.tensor([self.names.index(name) for name in self.ours], dtype=torch.int64)
        order = order.argsort() if inverse else order
        return (order[:, None] * dim + torch.arange(dim)).flatten()


def from_authors(
    state: Mapping[str, Tensor],
    *,
    fields: Sequence[str] | None = None,
    sequences: Collection[str] = (),
    activation_1: Activations = "relu",
    activation_2: Activations = "relu",
    dropout_1: Dropouts = 0.0,
    dropout_2: Dropouts = 0.0,
    embedding_regularizer: Regularizer = None,
    net_regularizer: Regularizer = None,
) -> FinalMLP | DualMLP:
    """The model that a checkpoint was saved from, in the checkpoint's dtype.

    It reads batches in our order (ids, numeric, sequences, each in the order of the feature list) with global ids: a
    field's own id plus the rows of the fields before it. `vocabulary.Vocabulary` gives the authors' ids of words.

    Args:
        state: the authors' state dict.
        fields: their feature list in order; default: the order of the tables in ``state``.
        sequences: which of them are sequences, which a table does not tell.
        activation_1, activation_2, dropout_1, dropout_2: of the streams, which the tensors do not tell.
        embedding_regularizer, net_regularizer: for `ClickMLP.penalty`, to train on.

    Raises:
        UserError: if it is no such network, or the tensors do not fit.
    """
    streams = [_stream(state, f"mlp{number}.mlp.") for number in (1, 2)]
    features = features_of(state, fields, sequences)
    dim = streams[0].inputs // len(features.names)
    tables = _tables(state, _MAIN)
    settings: dict[str, Any] = {
        "field_sizes": [1 if name in features.numeric else len(tables[name]) for name in features.ours],
        "num_numeric": len(features.numeric),
        "num_sequences": len(features.sequences),
        "dim": dim,
        "batch_norm_1": streams[0].norm,
        "batch_norm_2": streams[1].norm,
        "activation_1": activation_1,
        "activation_2": activation_2,
        "dropout_1": dropout_1,
        "dropout_2": dropout_2,
        "embedding_regularizer": embedding_regularizer,
        "net_regularizer": net_regularizer,
    }
    model: FinalMLP | DualMLP
    if "fusion_module.w_xy" in state:
        first, second = (
            [features.ours.index(name) for name in _tables(state, key)] for key in list(TABLES) if key != _MAIN
        )
        widths = [stream.widths for stream in streams]
        model = FinalMLP(
            **settings,
            hidden_1=widths[0],
            hidden_2=widths[1],
            gated=any(key.startswith("fs_module.") for key in state),
            gate_hidden=[len(weight) for weight in _linear(state, "fs_module.fs1_gate.mlp.").values()][:-1],
            context_1=first,
            context_2=second,
            num_heads=widths[0][-1] * widths[1][-1] // max(len(state["fusion_module.w_xy"]), 1),
        )
    else:
        model = DualMLP(**settings, hidden_1=streams[0].widths[:-1], hidden_2=streams[1].widths[:-1])
    model = model.to(next(iter(tables.values())).dtype)
    load_strict(model, _ours(model, features, state))
    return model


def features_of(
    state: Mapping[str, Tensor], fields: Sequence[str] | None = None, sequences: Collection[str] = ()
) -> Features:
    """The feature list behind a checkpoint; arguments and errors as `from_authors`."""
    tables = _tables(state, _MAIN)
    if not tables:
        raise UserError(f"the checkpoint has no tables {TABLES[_MAIN][0]}*: it is neither a FinalMLP nor a DualMLP")
    names = tuple(tables if fields is None else fields)
    if sorted(names) != sorted(tables):
        raise UserError(f"fields names {', '.join(names)}; the checkpoint has tables of {', '.join(tables)}")
    if strange := [name for name in sequences if name not in names]:
        raise UserError(f"sequences names {strange[0]}, which is none of the fields {', '.join(names)}")
    width = _stream(state, "mlp1.mlp.").inputs
    if width % len(names):
        raise UserError(f"{len(names)} fields do not divide the first layer's width {width}")
    numeric = tuple(name for name in names if tables[name].shape == (width // len(names), 1))
    return Features(names, numeric, tuple(name for name in names if name in sequences))


def to_authors(
    model: FinalMLP | DualMLP, features: Features, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A model's state dict under the authors' keys.

    Args:
        model: with two streams.
        features: the feature list it shall have there.
        state: tensors under our keys to be written so, as gradients; default: the model's own.
    """
    ours = dict(model.state_dict() if state is None else state)
    theirs: dict[str, Tensor] = {}
    for key, (before, after) in TABLES.items():
        if key in ours:
            chosen = _chosen(model, features, key)
            sizes = [model.field_sizes[features.ours.index(name)] for name in chosen.ours]
            parts = dict(zip(chosen.ours, ours.pop(key).split(sizes), strict=True))
            for name in chosen.names:
                theirs[before + name + after] = parts[name].T if name in features.numeric else parts[name]
    _reorder(ours, model, features, inverse=True)
    for key, value in ours.items():
        theirs[key] = value[None] if key.endswith(".constant") else value
    return rename(theirs, AUTHORS_KEYS)


# -- reading sizes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    inputs: int
    widths: list[int]
    norm: Norm


def _stream(state: Mapping[str, Tensor], prefix: str) -> _Stream:
    linear = _linear(state, prefix)
    if not linear:
        raise UserError(f"the checkpoint has no layers {prefix}*: it is neither a FinalMLP nor a DualMLP")
    norms = [key for key in state if re.fullmatch(re.escape(prefix) + r"\d+\.running_mean", key)]
    norm: Norm = "input" if norms == [f"{prefix}0.running_mean"] else bool(norms)
    return _Stream(next(iter(linear.values())).shape[1], [len(weight) for weight in linear.values()], norm)


def _linear(state: Mapping[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """The weights of linear maps by their place, in order."""
    found = {
        int(match[1]): value
        for key, value in state.items()
        if (match := re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", key)) and value.ndim == 2
    }
    return dict(sorted(found.items()))


def _tables(state: Mapping[str, Tensor], ours: str) -> dict[str, Tensor]:
    """The authors' tables by field that are one table of ours."""
    before, after = TABLES[ours]
    return {
        key.removeprefix(before).removesuffix(after): value
        for key, value in state.items()
        if key.startswith(before) and key.endswith(after)
    }


# -- joining and reordering ----------------------------------------------------------------------------------


def _ours(model: FinalMLP | DualMLP, features: Features, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state under our keys."""
    dim = model.embedding.table.embedding_dim
    left = dict(state)
    joined = {}
    for key, (before, after) in TABLES.items():
        if tables := _tables(state, key):
            for name in tables:
                del left[before + name + after]
            rows = {name: t.T if name in features.numeric else t for name, t in tables.items()}
            if wrong := [name for name, t in rows.items() if t.ndim != 2 or t.shape[1] != dim]:
                raise UserError(
                    f"the table of {wrong[0]} is {tuple(tables[wrong[0]].shape)}; embeddings are {dim} wide"
                )
            joined[key] = torch.cat([rows[name] for name in features.among(tables).ours])
    ours = rename(left, KEYS)
    for key, value in ours.items():
        if key.endswith(".constant"):
            ours[key] = value.flatten()
    _reorder(ours, model, features, inverse=False)
    return joined | ours


def _reorder(state: dict[str, Tensor], model: FinalMLP | DualMLP, features: Features, *, inverse: bool) -> None:
    """Bring the axes that count the flat embedding, or that of a context, into our order (``inverse``: into theirs)."""
    dim = model.embedding.table.embedding_dim
    for key, axis, chosen in _flat_axes(model, features):
        if key in state:
            state[key] = state[key].index_select(axis, chosen.places(dim, inverse=inverse))


def _flat_axes(model: FinalMLP | DualMLP, features: Features) -> Iterator[tuple[str, int, Features]]:
    for name, module in model.named_children():
        if isinstance(module, Perceptron):
            normed = isinstance(module[0], nn.BatchNorm1d)
            if normed:
                for part in ("weight", "bias", "running_mean", "running_var"):
                    yield f"{name}.0.{part}", 0, features
            yield f"{name}.{int(normed)}.weight", 1, features
        if isinstance(module, FeatureGate):
            last = len(module.net) - 1
            yield f"{name}.net.{last}.weight", 0, features
            yield f"{name}.net.{last}.bias", 0, features
            if module.context is not None:
                yield f"{name}.net.0.weight", 1, _chosen(model, features, f"{name}.context.embedding.table.weight")


def _chosen(model: FinalMLP | DualMLP, features: Features, table: str) -> Features:
    """The fields of one of our tables."""
    if table == _MAIN:
        return features
    context = model.get_submodule(table.removesuffix(".embedding.table.weight"))
    assert isinstance(context, Context)
    return features.among([features.ours[place] for place in context.places])
