"""AutoInt checkpoints: FuxiCTR's (reczoo/FuxiCTR) and the authors' TensorFlow variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import load_strict, rename
from penstock.systems.recommendation.autoint.model import Activations, AutoInt, Dialect, InteractingLayer

Kind = Literal["ids", "numeric", "sequences"]
#: The parts of our input in their order.
_PARTS: tuple[Kind, ...] = ("ids", "numeric", "sequences")

_LAYER = {"W_q": "gate.query", "W_k": "gate.key", "W_v": "value", "W_res": "residual", "layer_norm": "norm"}
#: FuxiCTR's key -> ours. The tables of embeddings, one a field there, are one table here: see `FuxiFields`.
KEYS = [
    *((rf"^self_attention\.(\d+)\.{theirs}\.", rf"layers.\1.{ours}.") for theirs, ours in _LAYER.items()),
    (r"^dnn\.mlp\.", "dnn."),
]
#: Ours -> FuxiCTR's.
AUTHORS_KEYS = [
    *((rf"^layers\.(\d+)\.{re.escape(o)}\.", rf"self_attention.\1.{theirs}.") for theirs, o in _LAYER.items()),
    (r"^dnn\.", "dnn.mlp."),
]
_TABLE = "embedding_layer.embedding_layer.embedding_layers."
_WIDE = f"lr_layer.{_TABLE}"
#: A TensorFlow layer's projections in the order they are made, and its tensors -> FuxiCTR's.
_ROLES = ("q", "k", "v", "res")
_TENSORFLOW = {
    **{f"{role}.kernel": f"W_{role}.weight" for role in _ROLES},
    **{f"{role}.bias": f"W_{role}.bias" for role in _ROLES},
    "ln.gamma": "layer_norm.weight",
    "ln.beta": "layer_norm.bias",
}


@dataclass(frozen=True)
class FuxiFields:
    """The fields of a FuxiCTR model, and where they are in ours.

    Attributes:
        names: in FuxiCTR's order.
        kinds: what each is.
        rows: of each one's table; 1 for a number.
        width: of the embeddings.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    rows: tuple[int, ...]
    width: int

    @classmethod
    def read(
        cls, state: Mapping[str, Tensor], *, fields: Sequence[str] | None = None, sequences: Sequence[str] = ()
    ) -> FuxiFields:
        """The fields of a state dict.

        Args:
            state: FuxiCTR's.
            fields: their names in FuxiCTR's order; default the order of the state dict, which is the same.
            sequences: which of them are sequences: tables of categories look alike.

        Raises:
            UserError: if fields are missing or left over, or their embeddings are not all as wide as the layers read.
        """
        tables = {key.removeprefix(_TABLE)[: -len(".weight")]: v for key, v in state.items() if key.startswith(_TABLE)}
        first = state.get("self_attention.0.W_v.weight")
        if not tables or first is None:
            raise UserError(
                f"the checkpoint has no {_TABLE}<field>.weight or no self_attention.0.W_v.weight, nor TensorFlow's "
                "feature_embeddings: it is no AutoInt network"
            )
        names = tuple(tables if fields is None else fields)
        if sorted(names) != sorted(tables) or (unknown := set(sequences) - set(tables)):
            asked = sorted({*names, *sequences} ^ set(tables)) if sorted(names) != sorted(tables) else sorted(unknown)
            raise UserError(f"fields and checkpoint differ in {', '.join(asked)}; its fields are {', '.join(tables)}")
        width = first.shape[1]
        numeric = {name for name, table in tables.items() if table.shape == (width, 1)}
        for name in names:
            if name not in numeric and tables[name].shape[1] != width:
                raise UserError(
                    f"field {name} has embeddings of width {tables[name].shape[1]}, the first layer reads {width}: "
                    "fields of unequal width need a projection, which AutoInt does not have"
                )
        kinds = tuple(_kind(name in numeric, name in sequences) for name in names)
        return cls(names, kinds, tuple(1 if n in numeric else len(tables[n]) for n in names), width)

    @property
    def order(self) -> list[int]:
        """For each of our places, in the order ids, numbers, sequences, FuxiCTR's."""
        return _order(self.kinds)

    @property
    def offsets(self) -> dict[str, int]:
        """Each field's first row in our table."""
        found, total = {}, 0
        for place in self.order:
            found[self.names[place]] = total
            total += self.rows[place]
        return found

    def of(self, kind: Kind) -> list[str]:
        """The names of one part of our input, in order."""
        return [name for name, own in zip(self.names, self.kinds, strict=True) if own == kind]

    def inputs(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """FuxiCTR's batch as ours.

        Args:
            features: ids of each field's own table (B,) int64, numbers (B,), sequences (B, L) int64.

        Returns:
            ids (B, F), numeric (B, N) or ``None``, sequences (B, S, L) or ``None``, shorter ones padded at the end.

        Raises:
            ValueError: for ids outside a field's table, naming the field.
        """
        sizes, offsets = dict(zip(self.names, self.rows, strict=True)), self.offsets
        for name in (*self.of("ids"), *self.of("sequences")):
            low, high = features[name].aminmax()
            if low < 0 or high >= sizes[name]:
                worst = int(low if low < 0 else high)
                raise ValueError(f"field {name} has an id {worst}; its table has ids 0 .. {sizes[name] - 1}")
        rows = len(features[self.names[0]])
        ids = [features[name] + offsets[name] for name in self.of("ids")]
        numbers = [features[name] for name in self.of("numeric")]
        longest = max((features[name].shape[1] for name in self.of("sequences")), default=0)
        sequences = [
            torch.nn.functional.pad(features[name], (0, longest - features[name].shape[1])) + offsets[name]
            for name in self.of("sequences")
        ]
        return (
            torch.stack(ids, 1) if ids else torch.empty(rows, 0, dtype=torch.int64),
            torch.stack(numbers, 1) if numbers else None,
            torch.stack(sequences, 1) if sequences else None,
        )

    def joined(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        """Our table from FuxiCTR's, one a field; a number's vector is a column there."""
        tables = ((self.kinds[place], state[f"{prefix}{self.names[place]}.weight"]) for place in self.order)
        return torch.cat([table.T if kind == "numeric" else table for kind, table in tables])

    def split(self, table: Tensor, prefix: str) -> dict[str, Tensor]:
        """FuxiCTR's tables from ours."""
        parts = {}
        for name, kind, rows in zip(self.names, self.kinds, self.rows, strict=True):
            part = table[self.offsets[name] :][:rows]
            parts[f"{prefix}{name}.weight"] = part.T if kind == "numeric" else part
        return parts


def from_authors(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    dropout: float = 0.0,
    use_scale: bool = False,
    use_residual: bool | None = None,
    dnn_activations: Activations = "relu",
    fields: Sequence[str] | None = None,
    sequences: Sequence[str] = (),
    kinds: Sequence[Kind] | None = None,
    numeric_ids: Sequence[int] = (),
    padding_ids: Sequence[int] = (),
) -> AutoInt:
    """The model that a checkpoint was saved from, in its dtype.

    Args:
        state: FuxiCTR's state dict, or the variables of the authors' TensorFlow checkpoint by name.
        num_heads: which the tensors do not tell.
        dropout: of attention weights and perceptron, if it is to be trained further.
        use_scale: FuxiCTR: whether scores are scaled.
        use_residual: FuxiCTR: needed only if the first layer is as wide as the embeddings, where the residual path
            has no weights; default then that there is one.
        dnn_activations: FuxiCTR: of the perceptron.
        fields, sequences: FuxiCTR: see `FuxiFields.read`, which also turns batches into ours.
        kinds: TensorFlow: what each column of the index matrix is; default ids all. Our input has ids first, then
            numbers, then sequences.
        numeric_ids: TensorFlow: the feature of each numeric column, in order.
        padding_ids: TensorFlow: a feature that pads each sequence, in order.

    Raises:
        UserError: if the tensors are not those of an AutoInt, or options are given that do not go with them.
    """
    variables = {key.removesuffix(":0"): value for key, value in state.items()}
    if "feature_embeddings" in variables:
        if use_scale or use_residual is not None or fields is not None or sequences or dnn_activations != "relu":
            raise UserError(
                "a TensorFlow checkpoint always scales, tells its residual itself and has ReLU; its columns are told "
                "by kinds, numeric_ids and padding_ids, not by fields and sequences"
            )
        return _from_tensorflow(variables, num_heads, dropout, kinds, numeric_ids, padding_ids)
    if kinds is not None or numeric_ids or padding_ids:
        raise UserError("kinds, numeric_ids and padding_ids are of TensorFlow checkpoints; this one has named fields")
    found = FuxiFields.read(state, fields=fields, sequences=sequences)
    table = found.joined(state, _TABLE)
    if use_residual is None:
        same = state["self_attention.0.W_v.weight"].shape[0] == found.width
        use_residual = same or "self_attention.0.W_res.weight" in state
    # Fields start with a row of zeros for padding; a table without one has no padding.
    zero_ids = [found.offsets[name] for name in found.of("ids") if not table[found.offsets[name]].any()]
    ours = rename({k: v for k, v in state.items() if not k.startswith((_TABLE, _WIDE))}, KEYS)
    ours["embedding.table.weight"] = table
    if any(key.startswith(_WIDE) for key in state):
        ours["wide.weights.table.weight"] = found.joined(state, _WIDE)
    return _build(
        ours,
        found.order,
        dialect="fuxi",
        num_heads=num_heads,
        dropout=dropout,
        use_scale=use_scale,
        use_residual=use_residual,
        dnn_activations=dnn_activations,
        numeric_ids=[found.offsets[name] for name in found.of("numeric")],
        padding_ids=[found.offsets[name] for name in found.of("sequences")],
        zero_ids=zero_ids,
    )


def to_authors(state: Mapping[str, Tensor], fields: FuxiFields) -> dict[str, Tensor]:
    """FuxiCTR's state dict from ours (or, by the same names, gradients)."""
    theirs = rename({k: v for k, v in state.items() if not k.endswith("table.weight")}, AUTHORS_KEYS)
    inverse = torch.tensor(fields.order).argsort().tolist()
    _permute(theirs, inverse, ("fc.weight", "dnn.mlp.0.weight"))
    theirs |= fields.split(state["embedding.table.weight"], _TABLE)
    if "wide.weights.table.weight" in state:
        theirs |= fields.split(state["wide.weights.table.weight"], _WIDE)
    return theirs


def layer_from_authors(
    state: Mapping[str, Tensor], *, num_heads: int, use_scale: bool = False, use_residual: bool | None = None
) -> InteractingLayer:
    """One layer: FuxiCTR's ``W_q.weight`` ... or TensorFlow's ``q.kernel``, ``q.bias`` ... ``ln.gamma``, ``ln.beta``.

    Args:
        state: the layer's own keys.
        num_heads, use_scale, use_residual: as for `from_authors`.

    Raises:
        UserError: if the tensors are not those of a layer.
    """
    tensorflow = "q.kernel" in state
    named = _from_kernels(state) if tensorflow else dict(state)
    ours = rename({f"self_attention.0.{key}": value for key, value in named.items()}, KEYS)
    ours = {key.removeprefix("layers.0."): value for key, value in ours.items()}
    if "value.weight" not in ours:
        raise UserError(f"the checkpoint has no W_v.weight or v.kernel; it has {', '.join(sorted(state))}")
    output_dim, input_dim = ours["value.weight"].shape
    if use_residual is None or tensorflow:
        use_residual = "residual.weight" in ours or (not tensorflow and input_dim == output_dim)
    layer = InteractingLayer(
        input_dim,
        output_dim,
        num_heads,
        use_residual=use_residual,
        use_scale=tensorflow or use_scale,
        layer_norm="norm.weight" in ours,
        dialect="tf" if tensorflow else "fuxi",
    ).to(ours["value.weight"].dtype)
    load_strict(layer, ours)
    return layer


def _from_tensorflow(
    variables: Mapping[str, Tensor],
    num_heads: int,
    dropout: float,
    kinds: Sequence[Kind] | None,
    numeric_ids: Sequence[int],
    padding_ids: Sequence[int],
) -> AutoInt:
    """From the graph's variables, of which most have no name but the order in which the code makes them.

    ``Variable, Variable_1, ...`` are first the perceptron's matrices and biases (1, width) in turn, then beta and
    gamma of each layer's norm; ``dense, dense_1, ...`` are each layer's queries, keys, values and residual.
    """
    unnamed = [variables[key] for key in _numbered(variables, "Variable")]
    norms, deep = [v for v in unnamed if v.ndim == 1], [v for v in unnamed if v.ndim == 2]
    dense = _numbered(variables, "dense", "/kernel")
    if (
        "prediction" not in variables
        or not norms
        or len(norms) % 2
        or len(dense) not in (3 * len(norms) // 2, 2 * len(norms))
    ):
        raise UserError(
            f"feature_embeddings, but {len(dense)} dense layers, {len(norms)} vectors of norms and "
            f"{'a' if 'prediction' in variables else 'no'} prediction: an AutoInt has 3 or 4 dense layers for each 2 vectors"
        )
    layers = len(norms) // 2
    roles = _ROLES[: len(dense) // layers]
    ours: dict[str, Tensor] = {}
    for number in range(layers):
        own = {"ln.beta": norms[2 * number], "ln.gamma": norms[2 * number + 1]}
        for role, name in zip(roles, dense[number * len(roles) :], strict=False):
            own |= {
                f"{role}.{part}": variables[f"{name.removesuffix('/kernel')}/{part}"] for part in ("kernel", "bias")
            }
        ours |= {f"self_attention.{number}.{key}": value for key, value in _from_kernels(own).items()}
    for number in range(len(deep) // 2):
        matrix, bias = deep[2 * number : 2 * number + 2]
        ours |= {f"dnn.mlp.{2 * number}.weight": matrix.T, f"dnn.mlp.{2 * number}.bias": bias.flatten()}
        if f"bn_{number}/gamma" in variables:
            parts = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
            for theirs, name in parts.items():
                ours[f"dnn.mlp.{2 * number + 1}.{name}"] = variables[f"bn_{number}/{theirs}"]
            ours[f"dnn.mlp.{2 * number + 1}.num_batches_tracked"] = torch.tensor(0)
    if deep:
        ours |= {
            f"dnn.mlp.{len(deep)}.weight": variables["prediction_dense"].T,
            f"dnn.mlp.{len(deep)}.bias": variables["prediction_bias_dense"].reshape(1),
        }
    ours = rename(ours, KEYS)
    ours |= {"fc.weight": variables["prediction"].T, "fc.bias": variables["prediction_bias"].reshape(1)}
    ours["embedding.table.weight"] = variables["feature_embeddings"]
    if "feature_bias" in variables:
        ours["wide.weights.table.weight"] = variables["feature_bias"]
    num_fields = ours["fc.weight"].shape[1] // len(norms[-1])
    kinds = ["ids"] * num_fields if kinds is None else kinds
    counts = [kinds.count(kind) for kind in _PARTS]
    if len(kinds) != num_fields or counts[1:] != [len(numeric_ids), len(padding_ids)]:
        raise UserError(
            f"kinds={tuple(kinds)}: the checkpoint has {num_fields} fields; numeric_ids must name {counts[1]} features "
            f"and padding_ids {counts[2]}"
        )
    return _build(
        ours,
        _order(kinds),
        dialect="tf",
        num_heads=num_heads,
        dropout=dropout,
        use_scale=True,
        use_residual="res" in roles,
        dnn_activations="relu",
        numeric_ids=numeric_ids,
        padding_ids=padding_ids,
        zero_ids=(),
    )


def _from_kernels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A TensorFlow layer's tensors under FuxiCTR's names; kernels are (input, output) there."""
    if unknown := set(state) - set(_TENSORFLOW):
        raise UserError(f"{min(unknown)} is not a tensor of a layer; those are {', '.join(_TENSORFLOW)}")
    return {_TENSORFLOW[key]: value.T if key.endswith(".kernel") else value for key, value in state.items()}


def _numbered(variables: Mapping[str, Tensor], name: str, suffix: str = "") -> list[str]:
    """``name``, ``name_1``, ``name_2`` ... as far as there are any, in this order."""
    pattern = re.compile(rf"{name}(?:_(\d+))?{suffix}")
    found = {key: int(match[1] or 0) for key in variables if (match := pattern.fullmatch(key))}
    return sorted(found, key=found.__getitem__)


def _kind(numeric: bool, sequence: bool) -> Kind:
    return "numeric" if numeric else "sequences" if sequence else "ids"


def _order(kinds: Sequence[Kind]) -> list[int]:
    """Places of the fields, ids first, then numbers, then sequences."""
    return sorted(range(len(kinds)), key=lambda place: _PARTS.index(kinds[place]))


def _permute(state: dict[str, Tensor], order: Sequence[int], keys: Sequence[str]) -> None:
    """Bring the fields that matrices read flat into another order."""
    for key in keys:
        if key in state:
            state[key] = state[key].unflatten(1, (len(order), -1))[:, list(order)].flatten(1)


def _build(
    state: dict[str, Tensor],
    order: Sequence[int],
    *,
    dialect: Dialect,
    num_heads: int,
    dropout: float,
    use_scale: bool,
    use_residual: bool,
    dnn_activations: Activations,
    numeric_ids: Sequence[int],
    padding_ids: Sequence[int],
    zero_ids: Sequence[int],
) -> AutoInt:
    """The model of ``state``: our names, but fields in the authors' order and the perceptron numbered as theirs."""
    _permute(state, order, ("fc.weight", "dnn.0.weight"))
    table = state["embedding.table.weight"]
    values = [key for key in state if re.fullmatch(r"layers\.\d+\.value\.weight", key)]
    linear = {
        int(m[1]): len(v) for k, v in state.items() if (m := re.fullmatch(r"dnn\.(\d+)\.weight", k)) and v.ndim == 2
    }
    model = AutoInt(
        len(table),
        len(order),
        dim=table.shape[1],
        attention_dims=[len(state[f"layers.{number}.value.weight"]) for number in range(len(values))],
        num_heads=num_heads,
        dialect=dialect,
        use_residual=use_residual,
        use_scale=use_scale,
        layer_norm="layers.0.norm.weight" in state,
        use_wide="wide.weights.table.weight" in state,
        dnn_hidden_units=[linear[place] for place in sorted(linear)][:-1],
        dnn_activations=dnn_activations,
        batch_norm=any(re.fullmatch(r"dnn\.\d+\.running_mean", key) for key in state),
        dropout=dropout,
        dnn_dropout=dropout,
        numeric_ids=numeric_ids,
        padding_ids=padding_ids,
        zero_ids=zero_ids,
    ).to(table.dtype)
    # Layers without tensors, as dropout, may be there or not: so the perceptron's are matched in their order.
    theirs = sorted({int(m[1]) for key in state if (m := re.match(r"dnn\.(\d+)\.", key))})
    ours = sorted({int(m[1]) for key in model.state_dict() if (m := re.match(r"dnn\.(\d+)\.", key))})
    if len(theirs) != len(ours):
        raise UserError(
            f"the perceptron has {len(theirs)} layers with weights, with dnn_activations={dnn_activations!r} it would "
            f"have {len(ours)}"
        )
    places = dict(zip(theirs, ours, strict=True))
    load_strict(model, {re.sub(r"^dnn\.(\d+)", lambda m: f"dnn.{places[int(m[1])]}", k): v for k, v in state.items()})
    return model
