"""The ungated click models that people compare with: logistic regression, FM, DNN, DeepFM, DCNv2, DualMLP.

They are no systems of ours: no gate, no claim. `penstock compare` takes them by name beside the systems.

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence,
M = F + N + S fields, D embedding width, X = M D flat width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from penstock.nn.embeddings import MLP, FieldEmbedding, factorization


class ClickModel(nn.Module, PyTorchModelHubMixin):
    """A sum of parts, each a function of the field embeddings: rows of a table -> logits (B,).

    Args:
        num_ids, num_fields: rows of the embedding table and fields M, of the table's schema.
        dim: width D of the embeddings.
        linear: whether each id also has a weight of its own, the first-order part.
        pairs: whether all pairs' inner products are added (Rendle 2010).
        mlp_dims: hidden widths of a perceptron on the flat embeddings; empty: none.
        streams: perceptrons of these widths, whose logits are added (Mao et al. 2023: two are a strong baseline).
        cross_layers: crosses of `CrossNetworkV2`, which stand beside the perceptron; 0: none.
        dropout, batch_norm: of the perceptron.
        numeric_ids, padding_ids: see `FieldEmbedding`.

    Raises:
        ValueError: for sizes below one, or a model with no part at all.
    """

    def __init__(
        self,
        num_ids: int,
        num_fields: int,
        *,
        dim: int = 16,
        linear: bool = True,
        pairs: bool = False,
        mlp_dims: Sequence[int] = (),
        streams: int = 1,
        cross_layers: int = 0,
        dropout: float = 0.0,
        batch_norm: bool = False,
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not (linear or pairs or mlp_dims or cross_layers):
            raise ValueError("the model has no part: give it linear, pairs, mlp_dims or cross_layers")
        table = partial(FieldEmbedding, num_ids, numeric_ids=numeric_ids, padding_ids=padding_ids)
        self.linear = table(1) if linear else None
        self.embedding = table(dim) if pairs or mlp_dims or cross_layers else None
        self.bias = nn.Parameter(torch.zeros(()))
        self.pairs = pairs
        flat = num_fields * dim
        self.cross = CrossNetworkV2(flat, cross_layers) if cross_layers else None
        # Beside crosses the perceptron has no output of its own: one linear map reads both.
        output = 0 if cross_layers else 1
        self.streams = nn.ModuleList(
            MLP(flat, mlp_dims, output, dropout=dropout, batch_norm=batch_norm)
            for _ in range(streams if mlp_dims else 0)
        )
        beside = len(self.streams) * mlp_dims[-1] if mlp_dims else 0
        self.read = nn.Linear(flat + beside, 1) if cross_layers else None

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        logits_B = self.bias.expand(ids_BF.shape[0])
        if self.linear is not None:
            logits_B = logits_B + self.linear(ids_BF, numeric_BN, sequences_BSL).sum((1, 2))
        if self.embedding is None:
            return logits_B
        e_BMD = self.embedding(ids_BF, numeric_BN, sequences_BSL)
        if self.pairs:
            logits_B = logits_B + factorization(e_BMD)
        x_BX = e_BMD.flatten(1)
        parts = [stream(x_BX) for stream in self.streams]
        if self.cross is not None:
            assert self.read is not None
            parts = [self.read(torch.cat([self.cross(x_BX), *parts], 1))]
        return sum((part.squeeze(1) for part in parts), logits_B)


class CrossNetworkV2(nn.Module):
    """Crosses with a full matrix: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, (B, X) -> (B, X).

    Source: Wang et al. 2021, DCN V2, eq. 2.

    Args:
        dim: width X.
        num_layers: crosses.
    """

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))

    def forward(self, x0_BX: Tensor) -> Tensor:
        x_BX = x0_BX
        for layer in self.layers:
            x_BX = x0_BX * layer(x_BX) + x_BX
        return x_BX


#: What makes each model, beside the table's sizes, the width of the embeddings and of the perceptron.
CLICK_MODELS: Mapping[str, Callable[[Sequence[int]], Mapping[str, object]]] = {
    "logistic_regression": lambda mlp_dims: {},
    "fm": lambda mlp_dims: {"pairs": True},
    "dnn": lambda mlp_dims: {"linear": False, "mlp_dims": mlp_dims},
    "dualmlp": lambda mlp_dims: {"linear": False, "mlp_dims": mlp_dims, "streams": 2},
    "deepfm": lambda mlp_dims: {"pairs": True, "mlp_dims": mlp_dims},
    "dcnv2": lambda mlp_dims: {"linear": False, "mlp_dims": mlp_dims, "cross_layers": 3},
}
