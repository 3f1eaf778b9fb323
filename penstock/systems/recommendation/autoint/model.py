"""AutoInt: click models whose fields attend to each other (Song et al. 2019, CIKM, arXiv 1810.11921).

Every field, numbers included, is a vector; in each interacting layer a field reads all fields, itself among them, with
weights that the sample's own vectors decide, and keeps a residual path of its own (eq. 5 to 8). The last layer's
vectors go to one linear map. With a perceptron on the embeddings beside it, it is called AutoInt+.

Three models go by this name. `Dialect` selects one: "paper" as its equations have it; "tf", the authors' TensorFlow
code; "fuxi", FuxiCTR's re-implementation, whose results are the ones published by the BARS benchmark.

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence,
M = F + N + S fields, I width of a layer's input, D width of its output over all heads, H heads, P = D / H head width,
V rows of the table of embeddings, E their width, X flat width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from penstock.gates import Gate, Table, named_gates, observed, watch
from penstock.nn.embeddings import FieldEmbedding, factorization, run_layers
from penstock.nn.fuxictr import activation
from penstock.ops.field_attention import field_attention, merges_values

Dialect = Literal["paper", "tf", "fuxi"]
Attention = Literal["learned", "uniform", "closed"]
#: One name for all hidden layers, or one each; ``None`` is no activation.
Activations = str | None | Sequence[str | None]


class Projection(nn.Linear):
    """A layer's linear map: without a bias, or, as in the authors' code, with one and a ReLU: (..., I) -> (..., D)."""

    def __init__(self, input_dim: int, output_dim: int, *, rectified: bool) -> None:
        super().__init__(input_dim, output_dim, bias=rectified)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.relu() if self.rectified else y


class FieldAttention(Gate):
    """How much of each field every field reads: softmax_k <W_q e_m, W_k e_k> in each head (eq. 5).

    Args:
        input_dim: I.
        attention_dim: D, over all heads.
        num_heads: H, a divisor of D; heads are contiguous blocks of the D axis.
        use_scale: whether scores are divided by sqrt(P).
        rectified: whether queries and keys have a bias and a ReLU, so that no score is below zero.

    Shapes: (B, M, I) -> (B, H, M, M), each row a simplex over the fields that are read.
    """

    passes = "feature"
    kind = "simplex"
    unit_dims = 3

    def __init__(self, input_dim: int, attention_dim: int, num_heads: int, *, use_scale: bool, rectified: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = attention_dim // num_heads
        self.scale = head_dim**-0.5 if use_scale else 1.0
        self.query = Projection(input_dim, attention_dim, rectified=rectified)
        self.key = Projection(input_dim, attention_dim, rectified=rectified)
        self.merged = not rectified and merges_values(input_dim, attention_dim, num_heads)

    def logits(self, e_BMI: Tensor) -> Tensor:
        """(B, H, M, M) scores before the softmax."""
        if self.merged:
            # <W_q a, W_k b> = a' (W_q' W_k) b: one square matrix a head, smaller than the two it is made of.
            query_HPI, key_HPI = (w.weight.unflatten(0, (self.num_heads, -1)) for w in (self.query, self.key))
            product_HII = query_HPI.mT @ key_HPI
            query_BHMI = _heads(e_BMI @ product_HII.movedim(0, 1).flatten(1), self.num_heads)
            return (query_BHMI * self.scale) @ e_BMI[:, None].mT
        query_BHMP, key_BHMP = (_heads(project(e_BMI), self.num_heads) for project in (self.query, self.key))
        return (query_BHMP * self.scale) @ key_BHMP.mT

    def forward(self, e_BMI: Tensor) -> Tensor:
        return self.logits(e_BMI).softmax(-1)


def _heads(x_BMX: Tensor, num_heads: int) -> Tensor:
    """(B, M, X) -> (B, H, M, X / H)."""
    return x_BMX.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class InteractingLayer(nn.Module):
    """Each field becomes a combination of all fields, beside its residual path (sec. 4.4): (B, M, I) -> (B, M, D).

    The fields share all weights; nothing tells their positions apart and nothing is masked.

    Args:
        input_dim: I.
        attention_dim: D, the total over heads; default I.
        num_heads: H.
        dropout: of the attention weights.
        use_residual: a linear map of the input is added; in the dialect "fuxi" the input itself where I = D.
        use_scale: divide scores by sqrt(D / H). Default: in "tf" only.
        layer_norm: normalise, in "tf" after the ReLU and elsewhere before it. Default: in "tf" only.
        dialect: see the module.
        attention: "learned"; "uniform" gives every field 1 / M and has no gate; "closed" sets what heads read to zero.

    Raises:
        ValueError: if D does not divide by H, or with neither heads nor residual.
    """

    def __init__(
        self,
        input_dim: int,
        attention_dim: int | None = None,
        num_heads: int = 1,
        *,
        dropout: float = 0.0,
        use_residual: bool = True,
        use_scale: bool | None = None,
        layer_norm: bool | None = None,
        dialect: Dialect = "fuxi",
        attention: Attention = "learned",
    ) -> None:
        super().__init__()
        attention_dim = input_dim if attention_dim is None else attention_dim
        if min(input_dim, attention_dim, num_heads) < 1 or attention_dim % num_heads:
            raise ValueError(
                f"attention_dim={attention_dim} is the width of all heads together and must divide by "
                f"num_heads={num_heads} (input_dim={input_dim}; all 1 or more)"
            )
        if dialect not in get_args(Dialect) or attention not in get_args(Attention):
            raise ValueError(
                f"dialect={dialect!r}, attention={attention!r}: they must be one of {', '.join(get_args(Dialect))} "
                f"and one of {', '.join(get_args(Attention))}"
            )
        if attention == "closed" and not use_residual:
            raise ValueError("attention='closed' with use_residual=False lets nothing through")
        original = dialect == "tf"
        self.num_heads, self.attention, self.dialect = num_heads, attention, dialect
        self.gate: nn.Module | None = None
        if attention == "learned":
            self.gate = FieldAttention(
                input_dim,
                attention_dim,
                num_heads,
                use_scale=original if use_scale is None else use_scale,
                rectified=original,
            )
        self.dropout = nn.Dropout(dropout)
        self.value = None if attention == "closed" else Projection(input_dim, attention_dim, rectified=original)
        self.residual: nn.Module | None = None
        if use_residual:
            same = dialect == "fuxi" and input_dim == attention_dim
            self.residual = nn.Identity() if same else Projection(input_dim, attention_dim, rectified=original)
        self.norm: nn.Module | None = None
        if original if layer_norm is None else layer_norm:
            self.norm = nn.LayerNorm(attention_dim, eps=1e-8 if original else 1e-5)

    def forward(self, e_BMI: Tensor) -> Tensor:
        if isinstance(self.gate, FieldAttention) and self.value is not None and self._unseen():
            u_BMD = field_attention(
                e_BMI,
                self.gate.query.weight,
                self.gate.key.weight,
                self.value.weight,
                self.residual.weight if isinstance(self.residual, Projection) else None,
                num_heads=self.num_heads,
                scale=self.gate.scale,
                identity=isinstance(self.residual, nn.Identity),
                rectify=self.norm is None,
            )
            return u_BMD if self.norm is None else self.norm(u_BMD).relu()
        parts = []
        if self.value is not None:
            parts.append(self.read(e_BMI))
        if self.residual is not None:
            parts.append(self.residual(e_BMI))
        u_BMD = sum(parts[1:], parts[0])
        if self.norm is None:
            return u_BMD.relu()
        return self.norm(u_BMD.relu()) if self.dialect == "tf" else self.norm(u_BMD).relu()

    def _unseen(self) -> bool:
        """Whether the fused form gives the same: nothing non-linear or random in the way, and nobody looking."""
        random = self.training and self.dropout.p > 0
        return self.dialect != "tf" and not random and not any(map(observed, self.modules()))

    def read(self, e_BMI: Tensor) -> Tensor:
        """What the heads bring to each field, (B, M, D), all heads' sums side by side (eq. 6 and 7)."""
        value = self.value
        assert value is not None
        if self.gate is None:
            return value(e_BMI).mean(1, keepdim=True)
        weights_BHMM = self.dropout(self.gate(e_BMI))
        if not value.rectified and merges_values(value.in_features, value.out_features, self.num_heads):
            # Mixed first, while it is narrow, and projected then.
            mixed_BHMI = weights_BHMM @ e_BMI[:, None]
            value_HPI = value.weight.unflatten(0, (self.num_heads, -1))
            return torch.einsum("bhmi,hpi->bmhp", mixed_BHMI, value_HPI).flatten(2)
        return (weights_BHMM @ _heads(value(e_BMI), self.num_heads)).transpose(1, 2).flatten(2)


class FirstOrder(nn.Module):
    """A weight for each feature value, added up (the "wide" part, without bias).

    A number counts with its weight times itself. A sequence adds its items' weights, where an embedding takes their
    mean.

    Args:
        num_ids: V.
        numeric_ids, padding_ids, zero_ids: as in `AutoInt`.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> (B,).
    """

    def __init__(
        self,
        num_ids: int,
        *,
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
        zero_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.weights = FieldEmbedding(num_ids, 1, numeric_ids=numeric_ids, padding_ids=padding_ids, zero_ids=zero_ids)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        w_BM = self.weights(ids_BF, numeric_BN, sequences_BSL).squeeze(-1)
        if sequences_BSL is None:
            return w_BM.sum(1)
        items_BS = (sequences_BSL != self.weights.padding_ids[:, None]).sum(-1)
        alone = w_BM.shape[1] - items_BS.shape[1]
        return w_BM[:, :alone].sum(1) + (w_BM[:, alone:] * items_BS).sum(1)


def perceptron(
    dim: int,
    hidden_units: Sequence[int],
    *,
    activations: Activations,
    dropout: float,
    norm: Callable[..., nn.Module] | None,
) -> nn.Sequential:
    """Linear, [norm], [activation], [dropout] for each hidden layer, then a linear map to one: (B, X) -> (B, 1).

    What is left out takes no place, so that the layers' numbers are those of FuxiCTR's checkpoints.

    Raises:
        ValueError: for widths below 1 or activations that are not one a layer.
    """
    names = [activations] * len(hidden_units) if activations is None or isinstance(activations, str) else activations
    if len(names) != len(hidden_units):
        raise ValueError(f"dnn_activations={tuple(names)}: give one name, or one for each of {tuple(hidden_units)}")
    if min(hidden_units) < 1:
        raise ValueError(f"dnn_hidden_units={tuple(hidden_units)}: widths must be 1 or more")
    layers: list[nn.Module] = []
    for width, name in zip(hidden_units, names, strict=True):
        layers.append(nn.Linear(dim, width))
        if norm is not None:
            layers.append(norm(width))
        if name is not None:
            layers.append(activation(name, width))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        dim = width
    return nn.Sequential(*layers, nn.Linear(dim, 1))


class AutoInt(nn.Module, PyTorchModelHubMixin):
    """A click model of stacked interacting layers.

    Args:
        num_ids: rows V of the table, over all fields.
        num_fields: fields M, 2 or more.
        dim: width E of the embeddings.
        attention_dims: width D of each interacting layer, over all its heads.
        num_heads: H, a divisor of each D.
        dialect, use_residual, use_scale, layer_norm, attention: of the layers, see `InteractingLayer`.
        use_wide: add the first-order part.
        dnn_hidden_units: hidden widths of a perceptron on the flat embeddings (AutoInt+); none, no perceptron.
        dnn_activations: of it.
        batch_norm: whether it normalises.
        dropout: of the attention weights.
        embedding_dropout: of the embeddings, as the layers and the perceptron see them.
        dnn_dropout: of the perceptron.
        embedding_std: of the embeddings at the start. Default: 0.01 in "tf", else 1e-4 (FuxiCTR's).
        numeric_ids: the row of each numeric field (N).
        padding_ids: the id that pads each sequence field (S).
        zero_ids: ids whose embeddings and weights are zero and never learn (the padding of every field in FuxiCTR).

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> logits (B,).

    Raises:
        ValueError: for sizes that cannot be; in `forward` for ids outside the table and numbers that are not finite.
    """

    def __init__(
        self,
        num_ids: int,
        num_fields: int,
        *,
        dim: int = 16,
        attention_dims: Sequence[int] = (64, 64, 64),
        num_heads: int = 2,
        dialect: Dialect = "fuxi",
        use_residual: bool = True,
        use_scale: bool | None = None,
        layer_norm: bool | None = None,
        attention: Attention = "learned",
        use_wide: bool = False,
        dnn_hidden_units: Sequence[int] = (),
        dnn_activations: Activations = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        dnn_dropout: float = 0.0,
        embedding_std: float | None = None,
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
        zero_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if num_fields < max(2, len(numeric_ids) + len(padding_ids)):
            raise ValueError(
                f"num_fields={num_fields}: fields combine, so there must be 2 or more, numeric and sequences included"
            )
        if not attention_dims:
            raise ValueError("attention_dims=(): give the width of one interacting layer or more")
        self.num_fields = num_fields
        self.embedding = FieldEmbedding(
            num_ids, dim, numeric_ids=numeric_ids, padding_ids=padding_ids, zero_ids=zero_ids
        )
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.layers = nn.ModuleList(
            InteractingLayer(
                before,
                after,
                num_heads,
                dropout=dropout,
                use_residual=use_residual,
                use_scale=use_scale,
                layer_norm=layer_norm,
                dialect=dialect,
                attention=attention,
            )
            for before, after in itertools.pairwise((dim, *attention_dims))
        )
        self.fc = nn.Linear(num_fields * attention_dims[-1], 1)
        self.dnn: nn.Sequential | None = None
        if dnn_hidden_units:
            # The TensorFlow layer that the authors call has constants of its own.
            norm = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.005) if dialect == "tf" else nn.BatchNorm1d
            self.dnn = perceptron(
                num_fields * dim,
                dnn_hidden_units,
                activations=dnn_activations,
                dropout=dnn_dropout,
                norm=norm if batch_norm else None,
            )
        self.wide: FirstOrder | None = None
        if use_wide:
            self.wide = FirstOrder(num_ids, numeric_ids=numeric_ids, padding_ids=padding_ids, zero_ids=zero_ids)
        self._start(dialect, embedding_std, numeric_ids, (*padding_ids, *zero_ids))

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        if numeric_BN is not None:
            check_numbers(numeric_BN)
        e_BME = self.embedding_dropout(self.embedding(ids_BF, numeric_BN, sequences_BSL))
        x_BMD = e_BME
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        logit_B = self.fc(x_BMD.flatten(1)).squeeze(1)
        if self.dnn is not None:
            logit_B = logit_B + run_layers(self.dnn, e_BME.flatten(1)).squeeze(1)
        if self.wide is not None:
            logit_B = logit_B + self.wide(ids_BF, numeric_BN, sequences_BSL)
        return logit_B

    @torch.no_grad()
    def _start(self, dialect: Dialect, std: float | None, numeric_ids: Sequence[int], zero_ids: Sequence[int]) -> None:
        """Draw initial weights as the dialect's code does ("paper" says nothing and follows "fuxi")."""
        original = dialect == "tf"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                rectified = isinstance(module, Projection) and module.rectified
                (nn.init.xavier_uniform_ if rectified else nn.init.xavier_normal_)(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                    if original and not rectified:
                        fans = module.in_features + module.out_features
                        nn.init.normal_(module.bias, std=1.0 if module.out_features == 1 else math.sqrt(2 / fans))
        tables = [(self.embedding.table, (0.01 if original else 1e-4) if std is None else std)]
        if self.wide is not None:
            tables.append((self.wide.weights.table, 0.001 if original else 1e-4))
        zeros = torch.tensor(zero_ids, dtype=torch.int64, device=tables[0][0].weight.device)
        for table, spread in tables:
            nn.init.normal_(table.weight, std=spread)
            if not original:
                # FuxiCTR keeps the vector of a number as a linear layer, and starts it as one.
                for row in numeric_ids:
                    nn.init.normal_(table.weight[row], std=math.sqrt(2 / (1 + table.embedding_dim)))
            table.weight.index_fill_(0, zeros, 0)


class FM(nn.Module, PyTorchModelHubMixin):
    """What AutoInt is compared with: a factorisation machine (Rendle 2010), or logistic regression.

    Args:
        num_ids: V.
        dim: width of the factors; 0 leaves them out, which is logistic regression.
        embedding_std: of the factors at the start.
        numeric_ids, padding_ids: as in `AutoInt`.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> logits (B,).
    """

    def __init__(
        self,
        num_ids: int,
        dim: int = 0,
        *,
        embedding_std: float = 0.01,
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.wide = FirstOrder(num_ids, numeric_ids=numeric_ids, padding_ids=padding_ids)
        self.bias = nn.Parameter(torch.zeros(()))
        self.embedding: FieldEmbedding | None = None
        if dim:
            self.embedding = FieldEmbedding(num_ids, dim, numeric_ids=numeric_ids, padding_ids=padding_ids)
            nn.init.normal_(self.embedding.table.weight, std=embedding_std)
        nn.init.zeros_(self.wide.weights.table.weight)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        logit_B = self.wide(ids_BF, numeric_BN, sequences_BSL) + self.bias
        if self.embedding is None:
            return logit_B
        return logit_B + factorization(self.embedding(ids_BF, numeric_BN, sequences_BSL))


def check_numbers(numeric_BN: Tensor) -> None:
    """Raise `ValueError` naming the first number that is not finite, as `penstock.nn.embeddings.check_ids` does ids."""
    if torch.compiler.is_compiling() or numeric_BN.device.type != "cpu":
        return
    if not (finite_BN := numeric_BN.isfinite()).all():
        row, place = (~finite_BN).nonzero()[0].tolist()
        raise ValueError(
            f"numeric field {place} is {numeric_BN[row, place].item()} in row {row}; fill in missing numbers (0 is the mean)"
        )


def attention_maps(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Mean attention over a slice of data, layer by layer.

    Args:
        model: with learned attention.
        batches: the model's inputs.

    Returns:
        (H, M, M) by name of the gate: what row m reads of column k.

    Raises:
        GateNotFoundError: if attention is not learned.
    """
    with torch.no_grad(), watch(model, lambda name, gate: isinstance(gate, FieldAttention)) as log:
        for inputs in batches:
            model(*inputs)
    return {name: log[name].unit_means.cpu() for name in log}


def attention_report(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    fields: Sequence[str],
    *,
    head: int | None = None,
    layer: int = 0,
    shown: int = 10,
) -> Table:
    """The pairs of fields that read each other most, on average over a slice of data.

    Only the first layer's fields are single fields; in later ones each holds what it has read before.

    Args:
        model: an `AutoInt` with learned attention.
        batches: the model's inputs.
        fields: names of the M fields in the order of the model's input: ids, numbers, sequences.
        head: which; default the mean of all.
        layer: which interacting layer.
        shown: how many pairs.

    Returns:
        a printable table, the strongest pair first: the attention from each to the other, their mean, and the mean as
        a multiple of uniform attention.

    Raises:
        ValueError: if there is no such layer or head, or the fields are not as many as the model's.
        GateNotFoundError: if attention is not learned.
    """
    gates = list(named_gates(model, lambda name, gate: isinstance(gate, FieldAttention)).items())
    if not 0 <= layer < len(gates):
        raise ValueError(f"layer={layer}: there are {len(gates)}, from 0")
    name, gate = gates[layer]
    assert isinstance(gate, FieldAttention)
    if head is not None and not 0 <= head < gate.num_heads:
        raise ValueError(f"head={head}: there are {gate.num_heads}, from 0")
    map_HMM = attention_maps(model, batches)[name]
    map_MM = map_HMM.mean(0) if head is None else map_HMM[head]
    if len(fields) != len(map_MM):
        raise ValueError(f"{len(fields)} names for {len(map_MM)} fields")
    rows = Table()
    for a, b in itertools.combinations(range(len(fields)), 2):
        forth, back = float(map_MM[a, b]), float(map_MM[b, a])
        mean = (forth + back) / 2
        rows.append(
            {"pair": f"{fields[a]} x {fields[b]}", "first reads second": forth, "second reads first": back}
            | {"mean": mean, "times uniform": mean * len(fields)}
        )
    rows.sort(key=lambda row: -row["mean"])
    del rows[shown:]
    return rows


def _bars(num_fields: int, **options: Any) -> Callable[..., nn.Module]:
    return partial(AutoInt, num_fields=num_fields, **options)


#: The published settings. Where the vocabulary is known from the number of parameters it is given; the others need
#: ``num_ids``. "authors" are the TensorFlow code's, the rest the BARS benchmark's.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "autoint_frappe": _bars(10, num_ids=5389, dim=10, attention_dims=(128,) * 6, num_heads=4),
    "autoint_frappe_plus": _bars(
        10,
        num_ids=5389,
        dim=10,
        attention_dims=(128,) * 5,
        num_heads=4,
        use_scale=True,
        layer_norm=True,
        dnn_hidden_units=(400,) * 3,
        batch_norm=True,
        dropout=0.1,
        dnn_dropout=0.1,
    ),
    "autoint_movielens": _bars(
        3,
        num_ids=90239,
        dim=10,
        attention_dims=(128,) * 2,
        num_heads=4,
        use_scale=True,
        layer_norm=True,
        use_wide=True,
    ),
    "autoint_criteo": _bars(39, dim=16, attention_dims=(64,) * 5, num_heads=1),
    "autoint_criteo_plus": _bars(
        39, dim=16, attention_dims=(64,) * 5, num_heads=1, use_wide=True, dnn_hidden_units=(1000,) * 5
    ),
    "autoint_avazu": _bars(24, dim=16, attention_dims=(128,) * 7, num_heads=1, use_residual=False, use_wide=True),
    "autoint_criteo_authors": _bars(39, dim=16, attention_dims=(64,) * 3, num_heads=2, dialect="tf"),
    "autoint_criteo_authors_plus": _bars(
        39, dim=16, attention_dims=(64,) * 3, num_heads=2, dialect="tf", dnn_hidden_units=(400,) * 2
    ),
}
