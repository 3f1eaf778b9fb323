"""OptFS: click models in which every feature value has a gate (Lyu et al. 2023, arXiv 2301.10909).

A feature value ("city = Paris") is a row of the embedding table and has one scalar gate. The interaction of two values
carries the product of their gates, so that choosing values chooses interactions. Gates are soft while the temperature
rises; then they are thresholded, the weights go back to an early snapshot, and the network is trained again.

Shape legend: B batch, F fields with one id a row, N numeric fields, S sequences, L longest sequence,
M = F + N + S fields, K rows of the table looked up, V feature values (all rows), D embedding width, X flat width.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate, GateWarning
from penstock.nn.embeddings import MLP, CrossNetwork, FieldEmbedding, factorization, pairwise_products

Backbone = Literal["fm", "deepfm", "dcn", "ipnn"]
Compat = Literal["paper", "authors"]


class FeatureGate(Gate):
    """One gate for each feature value, the same for every sample.

    Soft it is sigmoid(T g) / sigmoid(g_0), hard it is [g > 0] / sigmoid(g_0). At temperature 1 and g = g_0 it is
    exactly 1: the start is the ungated network (sec. 3.2).

    Args:
        num_ids: feature values V.
        initial: g_0.
        always_soft: pay no heed to temperature and hardening (the authors' IPNN).

    Shapes: ids (B, K) int64 -> (B, K, 1), values in [0, 1 / sigmoid(g_0)].
    """

    passes = "feature"
    kind = "scale"
    unit_dims = 2
    temperature: Tensor
    hard: Tensor

    def __init__(self, num_ids: int, *, initial: float = 0.5, always_soft: bool = False) -> None:
        super().__init__()
        self.initial = initial
        self.always_soft = always_soft
        self.scale = 1 + math.exp(-initial)
        self.range = (0.0, self.scale)
        self.logit = nn.Parameter(torch.full((num_ids, 1), float(initial)))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("hard", torch.tensor(False))

    def forward(self, ids_BK: Tensor) -> Tensor:
        g_BK1 = F.embedding(ids_BK, self.logit)
        if self.always_soft:
            return self.scale * g_BK1.sigmoid()
        soft_BK1 = (self.temperature * g_BK1).sigmoid()
        # Chosen by a tensor and not by Python, so that a compiled or exported model follows its state.
        return self.scale * torch.where(self.hard, (g_BK1 > 0).to(soft_BK1.dtype), soft_BK1)

    def openness(self) -> Tensor:
        """(V,) sigmoid(T g), what the regulariser adds up."""
        return (self.temperature * self.logit).sigmoid().squeeze(1)

    def kept(self) -> Tensor:
        """(V,) bool: which values stay when hardened, g > 0."""
        return self.logit.detach().squeeze(1) > 0

    def nonzero_share(self) -> float:
        """The authors' measure of soft gates: the share that has not underflowed to exactly zero."""
        return float((self.openness() != 0).double().mean())

    @torch.no_grad()
    def prune(self) -> None:
        """g <- min(T g, g_0): what is open starts again from g_0, what is closed stays so (the authors' helper)."""
        self.logit.copy_((self.temperature * self.logit).clamp_max(self.initial))

    @torch.no_grad()
    def shuffle(self, seed: int) -> None:
        """Give every value another value's gate, at random: a subset of the same size without a choice."""
        order = torch.randperm(len(self.logit), generator=torch.Generator().manual_seed(seed))
        self.logit.copy_(self.logit[order.to(self.logit.device)])


class FM(nn.Module):
    """Sum of all pairs' inner products, without first-order terms: (B, M, D) -> (B,)."""

    def forward(self, e_BMD: Tensor) -> Tensor:
        return factorization(e_BMD)


class DeepFM(nn.Module):
    """FM plus a multi-layer perceptron on the flat embeddings: (B, M, D) -> (B,)."""

    def __init__(self, num_fields: int, dim: int, mlp_dims: Sequence[int], dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.mlp = MLP(num_fields * dim, mlp_dims, dropout=dropout, batch_norm=batch_norm)

    def forward(self, e_BMD: Tensor) -> Tensor:
        return factorization(e_BMD) + self.mlp(e_BMD.flatten(1)).squeeze(1)


class DCN(nn.Module):
    """A cross network beside a multi-layer perceptron, joined by one linear map: (B, M, D) -> (B,)."""

    def __init__(
        self, num_fields: int, dim: int, mlp_dims: Sequence[int], dropout: float, batch_norm: bool, cross_layers: int
    ) -> None:
        super().__init__()
        self.cross = CrossNetwork(num_fields * dim, cross_layers)
        self.mlp = MLP(num_fields * dim, mlp_dims, output=0, dropout=dropout, batch_norm=batch_norm)
        self.combination = nn.Linear(num_fields * dim + self.mlp.width, 1, bias=False)

    def forward(self, e_BMD: Tensor) -> Tensor:
        x_BX = e_BMD.flatten(1)
        return self.combination(torch.cat([self.cross(x_BX), self.mlp(x_BX)], 1)).squeeze(1)


class IPNN(nn.Module):
    """A multi-layer perceptron on the flat embeddings and all pairs' inner products: (B, M, D) -> (B,)."""

    def __init__(self, num_fields: int, dim: int, mlp_dims: Sequence[int], dropout: float, batch_norm: bool) -> None:
        super().__init__()
        pairs = num_fields * (num_fields - 1) // 2
        self.mlp = MLP(num_fields * dim + pairs, mlp_dims, dropout=dropout, batch_norm=batch_norm)

    def forward(self, e_BMD: Tensor) -> Tensor:
        return self.mlp(torch.cat([e_BMD.flatten(1), pairwise_products(e_BMD)], 1)).squeeze(1)


class OptFSModel(nn.Module, PyTorchModelHubMixin):
    """A click model whose feature values are gated.

    Args:
        num_ids: feature values V, over all fields.
        num_fields: fields M.
        backbone: "fm", "deepfm", "dcn" or "ipnn"; none has a first-order term.
        dim: embedding width D.
        mlp_dims: hidden widths of the perceptron (not fm).
        dropout: of the perceptron.
        batch_norm: whether the perceptron normalises.
        cross_layers: of dcn.
        initial: g_0, where every gate starts.
        gated: False leaves the gates out, which is the plain backbone.
        reg: whether `penalty` adds up the gates' openness, as in the paper, or averages it, so that its weight does
            not depend on the size of the vocabulary.
        numeric_ids: the row of each numeric field (N).
        padding_ids: the id that pads each sequence field (S).
        compat: "authors" keeps two quirks of their code: ipnn's gates are always soft at temperature 1, and a rewind
            leaves dcn's cross biases as they are.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> logits (B,).

    Raises:
        ValueError: for sizes that cannot be.
    """

    def __init__(
        self,
        num_ids: int,
        num_fields: int,
        *,
        backbone: Backbone = "deepfm",
        dim: int = 16,
        mlp_dims: Sequence[int] = (1024, 512, 256),
        dropout: float = 0.0,
        batch_norm: bool = False,
        cross_layers: int = 3,
        initial: float = 0.5,
        gated: bool = True,
        reg: Literal["sum", "mean"] = "sum",
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
        compat: Compat = "paper",
    ) -> None:
        super().__init__()
        if backbone not in get_args(Backbone):
            raise ValueError(f"backbone={backbone!r}: it must be one of {', '.join(get_args(Backbone))}")
        least = 2 if backbone in ("fm", "ipnn") else 1
        if num_fields < max(least, len(numeric_ids) + len(padding_ids)):
            raise ValueError(
                f"num_fields={num_fields}: {backbone} needs {least} or more, numeric and sequence fields included"
            )
        if reg not in ("sum", "mean") or compat not in get_args(Compat):
            raise ValueError(f"reg={reg!r}, compat={compat!r}: reg is sum or mean, compat is paper or authors")
        self.reg, self.compat = reg, compat
        gate = FeatureGate(num_ids, initial=initial, always_soft=compat == "authors" and backbone == "ipnn")
        self.embedding = FieldEmbedding(
            num_ids, dim, numeric_ids=numeric_ids, padding_ids=padding_ids, gate=gate if gated else None
        )
        mlp = (num_fields, dim, mlp_dims, dropout, batch_norm)
        self.backbone: nn.Module
        if backbone == "fm":
            self.backbone = FM()
        elif backbone == "deepfm":
            self.backbone = DeepFM(*mlp)
        elif backbone == "dcn":
            self.backbone = DCN(*mlp, cross_layers)
        else:
            self.backbone = IPNN(*mlp)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        return self.backbone(self.embedding(ids_BF, numeric_BN, sequences_BSL))

    # -- what a search needs (see penstock.tasks.search) -----------------------------------------------------

    @property
    def gate(self) -> FeatureGate:
        """The gate.

        Raises:
            ValueError: if the model was built without.
        """
        if not isinstance(self.embedding.gate, FeatureGate):
            raise ValueError("this model has no gates: it was built with gated=False")
        return self.embedding.gate

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """What the search decides: trained without decay, not rewound, frozen afterwards."""
        if self.embedding.gate is not None:
            yield from self.embedding.gate.parameters()

    def set_temperature(self, temperature: float) -> None:
        """Sharpen the soft gates.

        Raises:
            ValueError: unless the temperature is positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        self.gate.temperature.fill_(temperature)

    def penalty(self) -> Tensor:
        """R(g), over all values whether in the batch or not: how open the gates are, between 0 and V (or 1)."""
        openness_V = self.gate.openness()
        return openness_V.sum() if self.reg == "sum" else openness_V.mean()

    def harden(self) -> None:
        """Put hard gates in the place of soft ones; warns if these let everything or nothing through."""
        self.gate.hard.fill_(True)
        if (share := self.kept_share()) in (0.0, 1.0):
            amount, cure = ("every", "larger") if share else ("no", "smaller")
            warnings.warn(f"the search kept {amount} feature value: try a {cure} penalty", GateWarning, stacklevel=2)

    def kept_share(self) -> float:
        """Share of feature values that hard gates let through."""
        return float(self.gate.kept().double().mean())

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of everything a rewind puts back: weights and running statistics, not gates."""
        left = ("embedding.gate.", "backbone.cross.biases.") if self.compat == "authors" else ("embedding.gate.",)
        return {name: value.clone() for name, value in self.state_dict().items() if not name.startswith(left)}

    def rewind(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the weights of a `snapshot` back."""
        self.load_state_dict(dict(snapshot), strict=False)

    # -- after the search ------------------------------------------------------------------------------------

    @torch.no_grad()
    def compact(self) -> Compacted:
        """The same model without the rows of dropped values, which all become one row of zeros.

        Returns:
            the smaller model (its outputs are the same) and the new id of every old one, (V,) int64.

        Raises:
            ValueError: before `harden`, when no value is dropped yet.
        """
        if not self.gate.hard or self.gate.always_soft:
            raise ValueError("only hard gates drop values: call harden() first (not with the authors' ipnn)")
        kept = self.gate.kept()
        kept[self.embedding.padding_ids] = True  # padding must not be taken for a dropped item: it does not count
        rows = int(kept.sum())
        new_ids = torch.where(kept, kept.cumsum(0) - 1, rows)
        small = copy.deepcopy(self)
        small.embedding.num_ids = rows + 1
        for holder, name, dropped in ((small.embedding.table, "weight", 0.0), (small.gate, "logit", -1.0)):
            old = getattr(holder, name)
            row = torch.full_like(old[:1], dropped)
            setattr(holder, name, nn.Parameter(torch.cat([old[kept], row]), requires_grad=old.requires_grad))
        small.embedding.table.num_embeddings = rows + 1
        for own in (small.embedding.numeric_ids, small.embedding.padding_ids):
            own.copy_(new_ids[own])
        return Compacted(small, new_ids)


class Compacted(NamedTuple):
    """A model without dropped rows, and the way from old ids to new ones.

    Attributes:
        model: reads ``new_ids[ids]`` where the original reads ``ids``.
        new_ids: (V,) int64.
    """

    model: OptFSModel
    new_ids: Tensor


#: The published sizes (D = 16, perceptron 1024-512-256); the vocabulary and the fields are the data's.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    f"optfs_{name}": partial(OptFSModel, backbone=name) for name in get_args(Backbone)
}
