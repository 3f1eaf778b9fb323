"""Pre-trained vectors in a model's tables of embeddings: where these start, and what training must leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock.data.base import Data
from penstock.data.tables import TableData
from penstock.nn.embeddings import FieldEmbedding


@torch.no_grad()
def start_from_vectors(model: nn.Module, data: Data) -> None:
    """Put the vectors that come with a table into the model's tables of its ids (those wider than one number).

    What that took is added to the data's notes. A model on the meta device is only checked.

    Raises:
        UserError: for vectors narrower than a table.
    """
    if not isinstance(data, TableData):
        return
    for weight in _tables(model, data):
        for vectors in data.vectors:
            values, share = vectors.of_width(weight.shape[1])
            if not weight.is_meta:
                weight[torch.from_numpy(vectors.ids)] = torch.from_numpy(values).to(weight)
            note = (
                f"{vectors.path.name}: width {vectors.values.shape[1]} becomes {weight.shape[1]} by truncated SVD, "
                f"which keeps {share:.1%} of the vectors' squared length"
            )
            if vectors.values.shape[1] > weight.shape[1] and note not in data.notes:
                data.notes.append(note)


@dataclass(frozen=True)
class FrozenRows:
    """Rows of a table that are to stay as they are: ``ids`` (K,) of ``weight``, whose values are (K, D)."""

    weight: Tensor
    ids: Tensor
    values: Tensor

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what an optimiser did to them."""
        self.weight.index_copy_(0, self.ids, self.values)


def frozen_rows(model: nn.Module, data: Data) -> list[FrozenRows]:
    """The rows whose vectors are frozen, with the values they have now."""
    frozen: list[FrozenRows] = []
    if not isinstance(data, TableData):
        return frozen
    for weight in _tables(model, data):
        for vectors in data.vectors:
            if vectors.freeze:
                ids = torch.from_numpy(vectors.ids).to(weight.device)
                frozen.append(FrozenRows(weight, ids, weight.detach()[ids]))
    return frozen


def _tables(model: nn.Module, data: TableData) -> list[Tensor]:
    """The tables of all the data's ids; a gate's own table of a few fields is none of them."""
    embeddings = [m for m in model.modules() if isinstance(m, FieldEmbedding) and m.num_ids == data.schema.num_ids]
    return [m.table.weight for m in embeddings if m.table.embedding_dim > 1]
