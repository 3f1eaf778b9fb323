"""What models of tables share: one embedding table for all fields, and the ways in which fields interact.

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence,
M = F + N + S fields, K rows of the table looked up, D embedding width, P = M(M-1)/2 pairs of fields, X flat width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import observed
from penstock.ops.rectified_linear import rectified_linear
from penstock.ops.rows import lookup


class RowTable(nn.Embedding):
    """A table of embeddings, some rows of which are zero and never learn: ids (...) int64 -> (..., D).

    With ``sparse`` set, its gradient is sparse and coalesced: for `penstock.nn.lazy_adam.LazyAdam`.

    Args:
        num_ids: rows.
        dim: width D.
        zero_ids: which rows are zero.
    """

    zero_ids: Tensor

    def __init__(self, num_ids: int, dim: int, zero_ids: Sequence[int] = ()) -> None:
        super().__init__(num_ids, dim)
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("zero_ids", torch.tensor(sorted(set(zero_ids)), dtype=torch.int64), persistent=False)
        self.clear_zeros()

    @torch.no_grad()
    def clear_zeros(self) -> None:
        """Set the rows that are zero to zero, after all were drawn anew."""
        self.weight.index_fill_(0, self.zero_ids, 0)

    def forward(self, input: Tensor) -> Tensor:
        fixed = self.zero_ids if len(self.zero_ids) else None
        return lookup(self.weight, input, fixed=fixed, sparse=self.sparse)


class FieldEmbedding(nn.Module):
    """All fields of a row as vectors of one table, each row of the table gated if there is a gate.

    An id is the number of a row of the table. A number x is x times its field's row; a sequence is the mean of its
    items' rows, zero if it has none. A row that is zero (a missing value's, say) stays so.

    Args:
        num_ids: rows of the table, over all fields.
        dim: width D.
        numeric_ids: the row of each numeric field (N).
        padding_ids: the id that pads each sequence field (S).
        zero_ids: ids whose rows are zero and never learn.
        gate: maps ids (B, K) to the gates (B, K, 1) of their rows.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> (B, M, D), in this order.
    """

    numeric_ids: Tensor
    padding_ids: Tensor

    def __init__(
        self,
        num_ids: int,
        dim: int,
        *,
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
        zero_ids: Sequence[int] = (),
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_ids < 1 or dim < 1:
            raise ValueError(f"num_ids={num_ids} and dim={dim} must be 1 or more")
        for name, rows in (("numeric_ids", numeric_ids), ("padding_ids", padding_ids), ("zero_ids", zero_ids)):
            if outside := [i for i in rows if not 0 <= i < num_ids]:
                raise ValueError(f"{name} must be from 0 to {num_ids - 1}; {outside[0]} is not")
        self.num_ids = num_ids
        self.table = RowTable(num_ids, dim, zero_ids)
        self.gate = gate
        for name, rows in (("numeric_ids", numeric_ids), ("padding_ids", padding_ids)):
            self.register_buffer(name, torch.tensor(rows, dtype=torch.int64), persistent=False)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        numeric_BN, sequences_BSL = self._absent(ids_BF, numeric_BN, sequences_BSL)
        # By shape and not by len(), which would fix the batch of an exported model.
        rows_BK = torch.cat([ids_BF, self.numeric_ids.expand(ids_BF.shape[0], -1), sequences_BSL.flatten(1)], 1)
        check_ids(rows_BK, self.num_ids)
        e_BKD = self.table(rows_BK)
        if self.gate is not None:
            e_BKD = self.gate(rows_BK) * e_BKD
        single, numbers = ids_BF.shape[1], len(self.numeric_ids)
        parts = [e_BKD[:, :single]]
        if numbers:
            parts.append(e_BKD[:, single : single + numbers] * numeric_BN[..., None].to(e_BKD.dtype))
        if len(self.padding_ids):
            e_BSLD = e_BKD[:, single + numbers :].unflatten(1, sequences_BSL.shape[1:])
            item_BSL = (sequences_BSL != self.padding_ids[:, None]).to(e_BSLD.dtype)
            total_BSD = torch.einsum("bsl,bsld->bsd", item_BSL, e_BSLD)
            parts.append(total_BSD / item_BSL.sum(-1, keepdim=True).clamp_min(1))
        return torch.cat(parts, 1)

    def _absent(self, ids: Tensor, numeric: Tensor | None, sequences: Tensor | None) -> tuple[Tensor, Tensor]:
        """Empty tensors for what was not given, and a check of what was."""
        if numeric is None:
            numeric = torch.zeros(ids.shape[0], 0, device=ids.device)
        if sequences is None:
            sequences = ids.new_zeros(ids.shape[0], 0, 0)
        for what, given, wanted in (
            ("numeric", numeric.shape[1], len(self.numeric_ids)),
            ("sequences", sequences.shape[1], len(self.padding_ids)),
        ):
            if given != wanted:
                raise ValueError(f"{what} has {given} fields; the model was built for {wanted}")
        return numeric, sequences


def check_ids(ids: Tensor, num_ids: int) -> None:
    """Raise `ValueError` naming the first id outside a table of ``num_ids`` rows, and its field.

    Only on the CPU: a GPU would have to wait for the answer, and checks the index itself.
    """
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids are {ids.dtype}; they must be whole numbers (int64)")
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = ids.aminmax()
    if low < 0 or high >= num_ids:
        row, place = ((ids < 0) | (ids >= num_ids)).nonzero()[0].tolist()
        raise ValueError(f"id {ids[row, place].item()} of field {place} is outside the table's 0 .. {num_ids - 1}")


def run_layers(layers: nn.Sequential, x_BX: Tensor, first_weight: Tensor | None = None) -> Tensor:
    """What a perceptron's layers give, each Linear with the ReLU and dropout behind it in one pass: (B, X) -> (B, Y).

    Args:
        layers: any modules.
        x_BX: input.
        first_weight: takes the place of the first layer's weight, which is then a Linear.
    """
    waiting = deque(layers)
    weight = first_weight
    while waiting:
        layer = waiting.popleft()
        if not isinstance(layer, nn.Linear) or (weight is None and observed(layer)):
            x_BX = layer(x_BX)
            continue
        weight = layer.weight if weight is None else weight
        if layer.bias is not None and _next_is(waiting, nn.ReLU):
            waiting.popleft()
            dropout = waiting.popleft() if _next_is(waiting, nn.Dropout) else None
            rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            x_BX = rectified_linear(x_BX, weight, layer.bias, dropout=rate)
        else:
            x_BX = F.linear(x_BX, weight, layer.bias)
        weight = None
    return x_BX


def _next_is(waiting: deque[nn.Module], kind: type[nn.Module]) -> bool:
    return bool(waiting) and type(waiting[0]) is kind and not observed(waiting[0])


class MLP(nn.Sequential):
    """Linear, [BatchNorm], ReLU, Dropout for each hidden layer, then, if asked for, a linear output: (B, X) -> (B, Y).

    Args:
        dim: input width X.
        hidden: widths of the hidden layers.
        output: width Y of the output; 0 leaves it out, so that Y is the last hidden width.
        dropout: probability.
        batch_norm: whether to normalise before the ReLU.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int], output: int = 1, *, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        if any(width < 1 for width in (dim, *hidden)):
            raise ValueError(f"widths must be 1 or more; given {dim} and {tuple(hidden)}")
        layers: list[nn.Module] = []
        for width in hidden:
            layers.append(nn.Linear(dim, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            dim = width
        if output:
            layers.append(nn.Linear(dim, output))
        super().__init__(*layers)
        self.width = output or dim

    def forward(self, x_BX: Tensor) -> Tensor:
        return run_layers(self, x_BX)


class CrossNetwork(nn.Module):
    """Explicit crosses of growing degree: x_{l+1} = x_0 (w_l . x_l) + b_l + x_l, (B, X) -> (B, X).

    Source: Wang et al. 2017, Deep & Cross Network, eq. 3.

    Args:
        dim: width X.
        num_layers: crosses.
    """

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(dim, 1, bias=False) for _ in range(num_layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in range(num_layers))

    def forward(self, x0_BX: Tensor) -> Tensor:
        x_BX = x0_BX
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x_BX = x0_BX * weight(x_BX) + bias + x_BX
        return x_BX


def factorization(e_BMD: Tensor) -> Tensor:
    """Sum of all pairs' inner products, (B, M, D) -> (B,), in time linear in M (Rendle 2010, lemma 3.1)."""
    return 0.5 * (e_BMD.sum(1).square() - e_BMD.square().sum(1)).sum(-1)


def pairwise_products(e_BMD: Tensor) -> Tensor:
    """Inner products of all pairs of fields, (B, M, D) -> (B, P), in the order (0, 1), (0, 2), ..., (1, 2), ..."""
    first, second = torch.triu_indices(e_BMD.shape[1], e_BMD.shape[1], 1, device=e_BMD.device)
    return (e_BMD[:, first] * e_BMD[:, second]).sum(-1)
