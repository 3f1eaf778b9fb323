"""Pure interactions: a target of products of two fields, of which no single field says anything.

A model that is additive over the fields cannot see such a target at all; one that mixes fields can.

Shape legend: R rows, F fields with one id a row, B batch, M fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import force
from penstock.systems.recommendation.autoint.model import Attention, AutoInt, attention_maps

FIELDS, VALUES = 6, 8
#: The products in the logit: their size and the two fields.
PRODUCTS = ((2.0, 0, 1), (1.0, 2, 3))
_ATTENTION: tuple[Attention, ...] = ("learned", "uniform", "closed")


class Split(NamedTuple):
    """Rows of the target.

    Attributes:
        ids: (R, F) global ids, int64.
        label: (R,) float32.
    """

    ids: Tensor
    label: Tensor


def draw(seed: int, rows: Sequence[int] = (3000, 2000, 6000)) -> list[Split]:
    """Splits of so many rows: every value has a sign, half of each field's are +1, and the logit adds up products."""
    rng = np.random.default_rng(seed)
    signs_FV = np.stack([rng.permutation(np.repeat((-1.0, 1.0), VALUES // 2)) for _ in range(FIELDS)])
    splits = []
    for count in rows:
        values_RF = rng.integers(0, VALUES, (count, FIELDS))
        sign_RF = signs_FV[np.arange(FIELDS), values_RF]
        logit_R = sum(size * sign_RF[:, a] * sign_RF[:, b] for size, a, b in PRODUCTS)
        label_R = rng.random(count) < 1 / (1 + np.exp(-logit_R))
        ids_RF = values_RF + VALUES * np.arange(FIELDS)
        splits.append(Split(torch.from_numpy(ids_RF), torch.from_numpy(label_R).float()))
    return splits


def fit(
    model: nn.Module,
    train: Split,
    validation: Split,
    *,
    lr: float = 1e-2,
    batch_size: int = 250,
    epochs: int = 25,
    patience: int = 2,
) -> None:
    """Adam until the validation AUC has not risen for ``patience`` epochs; the best weights are put back."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    best, since, kept = 0.0, 0, copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train.label)).split(batch_size):
            loss = F.binary_cross_entropy_with_logits(model(train.ids[batch]), train.label[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (score := auc(model.eval(), validation)) > best:
            best, since, kept = score, 0, copy.deepcopy(model.state_dict())
        elif (since := since + 1) == patience:
            break
    model.load_state_dict(kept)
    model.eval()


@torch.no_grad()
def auc(model: nn.Module, split: Split) -> float:
    """Area under the ROC curve."""
    return float(roc_auc_score(split.label.numpy(), model(split.ids).numpy()))


@torch.no_grad()
def additivity_error(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """How far a model is from a sum over fields.

    For such a sum, f(x) + f(x') stays what it is when one field is swapped between the two rows.

    Args:
        model: read in float64 and evaluation mode.
        inputs: rows, as the model takes them: parts of shape (B, fields, ...).

    Returns:
        the largest change of the sum of the two logits, over neighbouring rows and all fields.
    """
    model = copy.deepcopy(model).double().eval()
    parts = [part.double() if part.is_floating_point() else part for part in inputs]
    others = [part.roll(1, 0) for part in parts]
    before = model(*parts) + model(*others)
    worst = 0.0
    for place, (own, other) in enumerate(zip(parts, others, strict=True)):
        for field in range(own.shape[1]):
            mine, theirs = own.clone(), other.clone()
            mine[:, field], theirs[:, field] = other[:, field], own[:, field]
            after = model(*parts[:place], mine, *parts[place + 1 :])
            after += model(*others[:place], theirs, *others[place + 1 :])
            worst = max(worst, float((after - before).abs().max()))
    return worst


def measure(seed: int) -> Mapping[str, float]:
    """Train with learned, uniform and closed attention on the target of a seed, and intervene on the learned one.

    Returns:
        ``<attention>_auc`` of each on the test rows; ``forced_closed_auc`` and ``forced_uniform_auc``, of the model with
        learned attention; ``closed_additivity_error``; ``pair_attention``, the mean attention between the two fields of
        the stronger product.
    """
    train, validation, test = draw(seed)
    measured: dict[str, float] = {}
    models = {}
    for attention in _ATTENTION:
        torch.manual_seed(seed)
        model = AutoInt(
            FIELDS * VALUES,
            FIELDS,
            dim=8,
            attention_dims=(16,),
            num_heads=2,
            use_scale=True,
            use_wide=True,
            attention=attention,
            embedding_std=0.1,
        )
        fit(model, train, validation)
        measured[f"{attention}_auc"] = auc(model, test)
        models[attention] = model
    learned = models["learned"]
    with force(learned, torch.zeros(1)):
        measured["forced_closed_auc"] = auc(learned, test)
    with force(learned, "open"):
        measured["forced_uniform_auc"] = auc(learned, test)
    measured["closed_additivity_error"] = additivity_error(models["closed"], [test.ids[:1000]])
    (map_HMM,) = attention_maps(learned, [[test.ids]]).values()
    _, a, b = PRODUCTS[0]
    measured["pair_attention"] = float((map_HMM[:, a, b] + map_HMM[:, b, a]).mean() / 2)
    return measured
