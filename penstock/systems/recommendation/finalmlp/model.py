"""FinalMLP: two perceptrons, each on its own gated view of the features, fused bilinearly (Mao et al. 2023, arXiv 2304.00902).

Two plain perceptrons side by side on the same field embeddings are hard to beat (DualMLP). Here each stream has a gate on
every scalar of the flat embedding, driven by chosen context fields or by a learned constant, and the two streams meet in
a bilinear form of several heads. Follows the authors' code (FuxiCTR, model_zoo/FinalMLP).

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence,
M = F + N + S fields in this order, K rows of the table looked up, D embedding width, X = M D flat width,
P, Q widths of the two streams' outputs, H heads, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from penstock.gates import Gate
from penstock.nn.embeddings import FieldEmbedding, run_layers
from penstock.nn.fuxictr import Regularizer, activation, add_regularization, parse_regularizer, regularization

#: One activation for all hidden layers, or one each; ``None`` leaves it out.
Activations: TypeAlias = str | Sequence[str | None] | None
#: One dropout probability for all hidden layers, or one each.
Dropouts: TypeAlias = float | Sequence[float]
#: None, after each hidden layer's linear map, or once on the input.
Norm: TypeAlias = bool | Literal["input"]

_EMBEDDING_STD = 1e-4


# -- fields --------------------------------------------------------------------------------------------------


class Embedding(FieldEmbedding):
    """The authors' field embeddings in one table: what is missing is zero and stays so.

    Ids start at N(0, 1e-4), the vectors of numeric fields at Xavier-normal, some 10^4 times larger.

    Args:
        field_sizes: rows of each field (M), the first of a field being its missing value; a numeric field has one.
        dim: width D.
        num_numeric: how many fields are numeric, N.
        num_sequences: how many are sequences, S.
        offsets: the first row of each field (M), which fields may share; default: one field's after the other's.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> (B, M, D).
    """

    def __init__(
        self,
        field_sizes: Sequence[int],
        dim: int,
        *,
        num_numeric: int = 0,
        num_sequences: int = 0,
        offsets: Sequence[int] | None = None,
    ) -> None:
        check_fields(field_sizes, num_numeric, num_sequences)
        starts = first_rows(field_sizes) if offsets is None else list(offsets)
        rows = max(start + size for start, size in zip(starts, field_sizes, strict=True))
        single = len(field_sizes) - num_numeric - num_sequences
        numeric, sequences = starts[single : single + num_numeric], starts[single + num_numeric :]
        missing = starts[:single] + sequences
        super().__init__(
            rows,
            dim,
            numeric_ids=numeric,
            padding_ids=sequences,
            zero_ids=missing,
        )
        with torch.no_grad():
            self.table.weight.normal_(0, _EMBEDDING_STD)
            self.table.clear_zeros()
            self.table.weight[numeric] = torch.randn(num_numeric, dim) * (2 / (1 + dim)) ** 0.5


class Context(nn.Module):
    """The embeddings of some fields from tables of their own, side by side.

    Args:
        places: the fields, as places among the M.
        field_sizes, dim, num_numeric, num_sequences, offsets: of the whole row, as for `Embedding`.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> (B, len(places) D), in the row's order.
    """

    shift: Tensor

    def __init__(
        self,
        places: Sequence[int],
        field_sizes: Sequence[int],
        dim: int,
        *,
        num_numeric: int,
        num_sequences: int,
        offsets: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        own = sorted(places)
        if len(set(own)) < len(own):
            raise ValueError(f"context fields {list(places)}: one is named twice")
        if outside := [p for p in own if not 0 <= p < len(field_sizes)]:
            raise ValueError(f"context field {outside[0]} is none of the {len(field_sizes)} fields (from 0)")
        single = len(field_sizes) - num_numeric - num_sequences
        self.places = own
        self.ids = [p for p in own if p < single]
        self.numeric = [p - single for p in own if single <= p < single + num_numeric]
        self.sequences = [p - single - num_numeric for p in own if p >= single + num_numeric]
        before = first_rows(field_sizes) if offsets is None else list(offsets)
        sizes = {before[p]: field_sizes[p] for p in own}  # of what is shared, once
        here = dict(zip(sizes, first_rows(list(sizes.values())), strict=True))
        self.embedding = Embedding(
            [field_sizes[p] for p in own],
            dim,
            num_numeric=len(self.numeric),
            num_sequences=len(self.sequences),
            offsets=[here[before[p]] for p in own],
        )
        shift = [here[before[p]] - before[p] for p in own]
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        ids = ids_BF[:, self.ids] + self.shift[: len(self.ids)]
        numeric = None if numeric_BN is None else numeric_BN[:, self.numeric]
        sequences = None
        if sequences_BSL is not None and self.sequences:
            sequences = sequences_BSL[:, self.sequences] + self.shift[-len(self.sequences) :, None]
        return self.embedding(ids, numeric, sequences).flatten(1)


def first_rows(field_sizes: Sequence[int]) -> list[int]:
    """Where each field's rows begin when they lie end to end."""
    return [0, *accumulate(field_sizes)][:-1]


def check_fields(field_sizes: Sequence[int], num_numeric: int, num_sequences: int) -> None:
    """Raise `ValueError` unless the sizes can be those of a row's fields."""
    if not field_sizes or min(field_sizes) < 1:
        raise ValueError(f"field_sizes={list(field_sizes)}: there must be a field, and each has 1 row or more")
    if min(num_numeric, num_sequences) < 0 or num_numeric + num_sequences > len(field_sizes):
        raise ValueError(
            f"num_numeric={num_numeric} and num_sequences={num_sequences} must not exceed the {len(field_sizes)} fields"
        )
    single = len(field_sizes) - num_numeric - num_sequences
    if wrong := [size for size in field_sizes[single : single + num_numeric] if size != 1]:
        raise ValueError(f"a numeric field has one row of the table; given {wrong[0]}")


# -- perceptrons ---------------------------------------------------------------------------------------------


class Perceptron(nn.Sequential):
    """Linear, [BatchNorm], [activation], [Dropout] for each hidden layer, then, if asked for, a linear output.

    A part that is not wanted has no module, as in the authors' checkpoints. Weights start Xavier-normal, biases at zero.

    Args:
        dim: input width X.
        hidden: widths of the hidden layers.
        output: width Y of the output; 0 leaves it out, so that Y is the last hidden width.
        activations: of the hidden layers.
        dropouts: probabilities.
        batch_norm: whether and where to normalise.

    Shapes: (B, X) -> (B, Y).

    Raises:
        ValueError: for widths below one, or a list that does not have one entry a hidden layer.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        output: int = 0,
        *,
        activations: Activations = "relu",
        dropouts: Dropouts = 0.0,
        batch_norm: Norm = False,
    ) -> None:
        if any(width < 1 for width in (dim, *hidden)) or not (hidden or output):
            raise ValueError(f"a perceptron needs a layer, and widths of 1 or more; given {dim} and {list(hidden)}")
        names = [activations] * len(hidden) if isinstance(activations, str | None) else list(activations)
        rates = [float(dropouts)] * len(hidden) if isinstance(dropouts, int | float) else list(dropouts)
        for what, given in (("activations", names), ("dropouts", rates)):
            if len(given) != len(hidden):
                raise ValueError(f"{what}={given}: one a hidden layer, and there are {len(hidden)}")
        layers: list[nn.Module] = [nn.BatchNorm1d(dim)] if batch_norm == "input" else []
        for width, name, rate in zip(hidden, names, rates, strict=True):
            layers.append(nn.Linear(dim, width))
            if batch_norm is True:
                layers.append(nn.BatchNorm1d(width))
            if name is not None:
                layers.append(activation(name, width))
            if rate > 0:
                layers.append(nn.Dropout(rate))
            dim = width
        if output:
            layers.append(nn.Linear(dim, output))
        super().__init__(*layers)
        self.width = output or dim
        for layer in self:
            if isinstance(layer, nn.Linear):
                init_linear(layer)

    def forward(self, x_BX: Tensor, scale: Tensor | None = None) -> Tensor:
        """Of x, or of x times ``scale``, (X,) or (B, X)."""
        first = self[0]
        if scale is None:
            return run_layers(self, x_BX)
        if scale.ndim == 1 and isinstance(first, nn.Linear):
            # W (g x) = (W g) x: scaling the weights spares several passes over the batch, forwards and backwards.
            return run_layers(self, x_BX, first.weight * scale)
        return run_layers(self, x_BX * scale)


def init_linear(layer: nn.Linear) -> None:
    """Xavier-normal weight, zero bias."""
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)


# -- the paper's two modules ---------------------------------------------------------------------------------


class FeatureGate(Gate):
    """One stream's gate on every scalar of the flat embedding: twice a sigmoid, so that 1 is neutral (sec. 4.1).

    Without context the input is a learned constant that starts, as all biases do, at zero. Behind a hidden layer with ReLU
    neither the constant nor any weight then ever gets a gradient: only the last bias learns, and the gate is a
    vector of constants. This is what the authors' code does; ``ctx_init_std`` wakes the gate.

    Args:
        dim: width D of an embedding.
        num_gated: flat width X.
        hidden: widths of the hidden layers.
        context: the fields that drive it; ``None``: the constant.
        ctx_init_std: of the constant's start.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> (B, X), or (X,) without context; values in [0, 2].
    """

    passes = "feature"
    kind = "scale"
    range = (0.0, 2.0)
    unit_dims = 1

    def __init__(
        self, dim: int, num_gated: int, hidden: Sequence[int], *, context: Context | None, ctx_init_std: float = 0.0
    ) -> None:
        super().__init__()
        if ctx_init_std < 0:
            raise ValueError(f"ctx_init_std={ctx_init_std} must not be below 0")
        self.context = context
        self.constant = None if context else nn.Parameter(torch.randn(dim) * ctx_init_std)
        width = len(context.shift) * dim if context else dim
        self.net = Perceptron(width, hidden, num_gated)

    def logits(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        """The values before the sigmoid."""
        return self.net(self.context(ids_BF, numeric_BN, sequences_BSL) if self.context else self.constant)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        return 2 * self.logits(ids_BF, numeric_BN, sequences_BSL).sigmoid()


class BilinearFusion(nn.Module):
    """w_x . x + w_y . y + the sum over heads of x_h W_h y_h: (B, P), (B, Q) -> (B, O) (sec. 4.2).

    Args:
        x_dim: P.
        y_dim: Q.
        output_dim: O. Above one, each head's matrix is read as the authors' views read it: (P/H, O, Q/H).
        num_heads: H; the bilinear part has P Q O / H weights.

    Raises:
        ValueError: if the heads do not divide both widths.
    """

    def __init__(self, x_dim: int, y_dim: int, *, output_dim: int = 1, num_heads: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or x_dim % num_heads or y_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the streams' output widths, {x_dim} and {y_dim}")
        self.num_heads, self.output_dim = num_heads, output_dim
        self.w_x, self.w_y = nn.Linear(x_dim, output_dim), nn.Linear(y_dim, output_dim)
        self.w_xy = nn.Parameter(torch.empty(x_dim * y_dim // num_heads, output_dim))
        init_linear(self.w_x)
        init_linear(self.w_y)
        nn.init.xavier_normal_(self.w_xy)

    def forward(self, x_BP: Tensor, y_BQ: Tensor) -> Tensor:
        x_BHp, y_BHq = x_BP.unflatten(1, (self.num_heads, -1)), y_BQ.unflatten(1, (self.num_heads, -1))
        w_HpOq = self.w_xy.view(self.num_heads, x_BHp.shape[2], self.output_dim, y_BHq.shape[2])
        bilinear_BO = torch.einsum("bhp,hpoq,bhq->bo", x_BHp, w_HpOq, y_BHq)
        return self.w_x(x_BP) + self.w_y(y_BQ) + bilinear_BO


# -- the networks --------------------------------------------------------------------------------------------


class ClickMLP(nn.Module):
    """What the networks share: the embedding and the regulariser of its table and of everything else.

    Args:
        field_sizes, dim, num_numeric, num_sequences, offsets: as for `Embedding`.
        embedding_regularizer, net_regularizer: see `parse_regularizer`.
    """

    def __init__(
        self,
        field_sizes: Sequence[int],
        dim: int,
        num_numeric: int,
        num_sequences: int,
        embedding_regularizer: Regularizer,
        net_regularizer: Regularizer,
        offsets: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(
            field_sizes, dim, num_numeric=num_numeric, num_sequences=num_sequences, offsets=offsets
        )
        self.field_sizes = list(field_sizes)
        self.flat_width = len(field_sizes) * dim
        parse_regularizer(embedding_regularizer)
        parse_regularizer(net_regularizer)
        self.embedding_regularizer, self.net_regularizer = embedding_regularizer, net_regularizer

    def penalty(self) -> Tensor:
        """The regulariser to be added to every step's loss, over whole tables: sum of (weight / p) |w|^p."""
        return regularization(self, embedding=self.embedding_regularizer, net=self.net_regularizer)

    def add_penalty(self) -> None:
        """Add its gradient to the parameters' instead, which is quicker; with sparse gradients, over rows looked up."""
        add_regularization(self, embedding=self.embedding_regularizer, net=self.net_regularizer)


class FinalMLP(ClickMLP, PyTorchModelHubMixin):
    """Two gated streams and their bilinear fusion.

    Args:
        field_sizes: rows of the embedding table for each field (M), fields with ids first, then numeric ones (1 each), then
            sequences. The first row of a field is its missing value or padding.
        num_numeric: how many of the fields are numeric, N.
        num_sequences: how many are sequences, S.
        dim: embedding width D.
        hidden_1, hidden_2: hidden widths of the streams; the last are P and Q.
        activation_1, activation_2: of the hidden layers, one name or one each; see `activation`.
        dropout_1, dropout_2: probabilities, one or one each.
        batch_norm_1, batch_norm_2: whether to normalise after each linear map (True) or the input once ("input").
        gated: False leaves the gates out: both streams see the raw embedding.
        gate_hidden: hidden widths of the gates' networks; may be empty.
        context_1, context_2: the fields that drive each gate, as places in ``field_sizes``; none: a learned constant.
        ctx_init_std: of that constant's start; 0 as the authors', see `FeatureGate`.
        num_heads: of the fusion, a divisor of P and Q.
        embedding_regularizer, net_regularizer: of the tables and of everything else; see `parse_regularizer`.
        offsets: each field's first id, which fields may share. Default: a field's ids start where those of the one
            before it end.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> logits (B,). Ids are global.

    Raises:
        ValueError: for sizes that cannot be.
    """

    def __init__(
        self,
        field_sizes: Sequence[int],
        *,
        num_numeric: int = 0,
        num_sequences: int = 0,
        dim: int = 10,
        hidden_1: Sequence[int] = (64, 64, 64),
        hidden_2: Sequence[int] = (64, 64, 64),
        activation_1: Activations = "relu",
        activation_2: Activations = "relu",
        dropout_1: Dropouts = 0.0,
        dropout_2: Dropouts = 0.0,
        batch_norm_1: Norm = False,
        batch_norm_2: Norm = False,
        gated: bool = True,
        gate_hidden: Sequence[int] = (64,),
        context_1: Sequence[int] = (),
        context_2: Sequence[int] = (),
        ctx_init_std: float = 0.0,
        num_heads: int = 1,
        embedding_regularizer: Regularizer = None,
        net_regularizer: Regularizer = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        super().__init__(field_sizes, dim, num_numeric, num_sequences, embedding_regularizer, net_regularizer, offsets)

        def gate(places: Sequence[int]) -> FeatureGate:
            context = None
            if places:
                context = Context(
                    places, field_sizes, dim, num_numeric=num_numeric, num_sequences=num_sequences, offsets=offsets
                )
            return FeatureGate(dim, self.flat_width, gate_hidden, context=context, ctx_init_std=ctx_init_std)

        self.gate_1 = gate(context_1) if gated else None
        self.gate_2 = gate(context_2) if gated else None
        self.stream_1 = Perceptron(
            self.flat_width, hidden_1, activations=activation_1, dropouts=dropout_1, batch_norm=batch_norm_1
        )
        self.stream_2 = Perceptron(
            self.flat_width, hidden_2, activations=activation_2, dropouts=dropout_2, batch_norm=batch_norm_2
        )
        self.fusion = BilinearFusion(self.stream_1.width, self.stream_2.width, num_heads=num_heads)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        e_BX = self.embedding(ids_BF, numeric_BN, sequences_BSL).flatten(1)
        g1 = g2 = None
        if self.gate_1 is not None and self.gate_2 is not None:
            g1, g2 = (gate(ids_BF, numeric_BN, sequences_BSL) for gate in (self.gate_1, self.gate_2))
        return self.fusion(self.stream_1(e_BX, g1), self.stream_2(e_BX, g2)).squeeze(1)


class DualMLP(ClickMLP, PyTorchModelHubMixin):
    """Two plain perceptrons on the same embedding, their logits added: neither gates nor bilinear fusion (sec. 3).

    Adding the logits is a linear map of the concatenated outputs, so this is also the fusion by concatenation.

    Args: as for `FinalMLP`. ``hidden_2=None`` leaves the second stream out, which is a single perceptron.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> logits (B,).
    """

    def __init__(
        self,
        field_sizes: Sequence[int],
        *,
        num_numeric: int = 0,
        num_sequences: int = 0,
        dim: int = 10,
        hidden_1: Sequence[int] = (64, 64, 64),
        hidden_2: Sequence[int] | None = (64, 64, 64),
        activation_1: Activations = "relu",
        activation_2: Activations = "relu",
        dropout_1: Dropouts = 0.0,
        dropout_2: Dropouts = 0.0,
        batch_norm_1: Norm = False,
        batch_norm_2: Norm = False,
        embedding_regularizer: Regularizer = None,
        net_regularizer: Regularizer = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        super().__init__(field_sizes, dim, num_numeric, num_sequences, embedding_regularizer, net_regularizer, offsets)
        self.stream_1 = Perceptron(
            self.flat_width, hidden_1, 1, activations=activation_1, dropouts=dropout_1, batch_norm=batch_norm_1
        )
        self.stream_2 = None
        if hidden_2 is not None:
            self.stream_2 = Perceptron(
                self.flat_width, hidden_2, 1, activations=activation_2, dropouts=dropout_2, batch_norm=batch_norm_2
            )

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        e_BX = self.embedding(ids_BF, numeric_BN, sequences_BSL).flatten(1)
        logit_B1 = self.stream_1(e_BX)
        if self.stream_2 is not None:
            logit_B1 = logit_B1 + self.stream_2(e_BX)
        return logit_B1.squeeze(1)


# -- published sizes -----------------------------------------------------------------------------------------

#: Rows of each field's table, missing and unseen values included, as printed in the benchmark's run logs (BARS).
_CRITEO_X1 = (
    *(1462, 560, 413_424, 248_543, 307, 23, 12_192, 635, 5, 54_712, 5350, 409_749, 3182, 29, 12_500, 365_811, 12, 4934),
    *(2096, 6, 397_981, 20, 17, 88_608, 98, 64_073),  # C1 ... C26
    *(1,) * 13,  # I1 ... I13, numeric
)
CRITEO_X4 = (
    *(44, 99, 122, 41, 220, 112, 80, 69, 92, 6, 27, 37, 72),  # I1 ... I13, as categories
    *(1446, 554, 157_339, 117_822, 306, 18, 11_882, 630, 5, 39_530, 5131, 156_656, 3176, 28, 11_043, 148_913, 12, 4560),
    *(2003, 5, 154_564, 18, 17, 53_031, 82, 40_955),  # C1 ... C26
)
_AVAZU_X1 = (
    *(9, 9, 3480, 4271, 26, 4864, 305, 33, 228_186, 1_048_285, 6515, 6, 6, 1940, 10, 11, 349, 6, 61, 171, 52, 26),
)
_AVAZU_X4 = (
    *(26, 9, 9, 4051, 5461, 27, 6545, 400, 33, 820_509, 2_903_322, 7259, 7, 6),  # hour, C1, banner_pos ... connection
    *(2556, 10, 11, 434, 6, 70, 173, 62, 9, 4),  # C14 ... C21, weekday, weekend
)
_MOVIELENS_X1 = (16_977, 23_606, 49_659)  # user, item, tag
_FRAPPE_X1 = (956, 4084, 9, 9, 4, 5, 4, 11, 82, 235)  # user, item, daytime ... country, city

#: The networks of the benchmark's run logs. The two of Criteo_x4 and Avazu_x4 were run without gates (use_fs False).
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "finalmlp_criteo_x1": partial(
        FinalMLP,
        _CRITEO_X1,
        num_numeric=13,
        dim=10,
        hidden_1=(400, 400, 400),
        hidden_2=(1000,),
        dropout_1=0.2,
        dropout_2=0.3,
        batch_norm_1=True,
        batch_norm_2=True,
        gate_hidden=(800,),
        context_1=tuple(range(26, 39)),  # I1 ... I13
        context_2=(5,),  # C6
        num_heads=200,
        embedding_regularizer=1e-5,
    ),
    "finalmlp_avazu_x1": partial(
        FinalMLP,
        _AVAZU_X1,
        dim=10,
        hidden_1=(400, 400, 400),
        hidden_2=(800,),
        dropout_1=0.3,
        dropout_2=0.3,
        batch_norm_1=True,
        batch_norm_2=True,
        gate_hidden=(800,),
        num_heads=10,
        embedding_regularizer=0.05,
    ),
    "finalmlp_movielenslatest_x1": partial(
        FinalMLP,
        _MOVIELENS_X1,
        dim=10,
        hidden_1=(400,),
        hidden_2=(800,),
        dropout_1=0.4,
        dropout_2=0.2,
        batch_norm_1=True,
        batch_norm_2=True,
        gate_hidden=(800,),
        num_heads=10,
        embedding_regularizer=0.01,
    ),
    "finalmlp_frappe_x1": partial(
        FinalMLP,
        _FRAPPE_X1,
        dim=10,
        hidden_1=(400,),
        hidden_2=(100,),
        dropout_1=0.4,
        dropout_2=0.4,
        batch_norm_1=True,
        batch_norm_2=True,
        gate_hidden=(400,),
        context_1=(0,),  # user
        context_2=(1,),  # item
        num_heads=5,
        embedding_regularizer=0.05,
    ),
    "finalmlp_criteo_x4_001": partial(
        FinalMLP,
        CRITEO_X4,
        dim=16,
        hidden_1=(1000,) * 5,
        hidden_2=(500,),
        dropout_1=0.2,
        dropout_2=0.1,
        gated=False,
        num_heads=50,
        embedding_regularizer=1e-5,
    ),
    "finalmlp_avazu_x4_001": partial(
        FinalMLP,
        _AVAZU_X4,
        dim=16,
        hidden_1=(2000,) * 3,
        hidden_2=(500,),
        batch_norm_1=True,
        gated=False,
        num_heads=20,
        embedding_regularizer=1e-9,
    ),
}
