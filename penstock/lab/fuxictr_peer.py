"""FuxiCTR's networks and ours on the same rows, for benchmarks: its embedding, its layers, its training step, its loader.

The wheel has no AutoInt, and FinalMLP only in a form for long sequences; so the networks are put together here from its
own parts, as its model zoo describes them. Nothing else in Penstock needs FuxiCTR.

Shape legend: B batch, F fields.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lab.bench import Contest
from penstock.lab.peer import Peer
from penstock.nn.embeddings import RowTable
from penstock.nn.fuxictr import add_regularization
from penstock.nn.lazy_adam import LazyAdam
from penstock.ops.rectified_linear import half_products
from penstock.tasks.click_prediction import clip_norm

#: The published settings of Criteo_x4 that both networks share.
BATCH, DIM, REGULARIZER, LR, CLIP = 10_000, 16, 1e-5, 1e-3, 10.0
_MISSING = "FuxiCTR is not installed (pip install fuxictr): it is not timed. "


def click_rows(field_sizes: Sequence[int], rows: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up rows: local ids (B, F) int64, never a missing value, a few frequent and most rare; and labels (B,)."""
    draw = torch.Generator().manual_seed(seed)
    sizes_F = torch.tensor(field_sizes, dtype=torch.float64) - 1
    share_BF = torch.rand(rows, len(field_sizes), generator=draw, dtype=torch.float64)
    ids_BF = (sizes_F**share_BF).long().clamp(max=sizes_F.long())
    return ids_BF, (torch.rand(rows, generator=draw) < 0.25).float()


def global_ids(ids_BF: Tensor, field_sizes: Sequence[int]) -> Tensor:
    """Local ids as those of one table."""
    return ids_BF + torch.tensor([0, *accumulate(field_sizes)][:-1])


def our_step(model: nn.Module, ids_BF: Tensor, labels_B: Tensor, *, lazy: bool) -> Callable[[], None]:
    """A training step as `penstock run` makes it: loss, gradients, penalty of the tables, clipping, Adam."""
    for module in model.modules():
        if isinstance(module, RowTable):
            module.sparse = lazy
    parameters = list(model.parameters())
    optimizer = LazyAdam(parameters, lr=LR) if lazy else torch.optim.Adam(parameters, lr=LR, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids_BF), labels_B).backward()
        add_regularization(model, embedding=REGULARIZER)
        clip_norm([p.grad for p in parameters if p.grad is not None], CLIP)
        optimizer.step()

    return step


def contests(
    build: Callable[[], nn.Module], peer: Callable[..., nn.Module], field_sizes: Sequence[int], what: str
) -> tuple[Contest, Contest]:
    """Training steps, and scores of a batch, of ours and FuxiCTR's network.

    Args:
        build: ours.
        peer: builds FuxiCTR's, `finalmlp` or `autoint` of this module.
        field_sizes: ids of each field.
        what: said of the network in the notes.
    """
    ids_BF, labels_B = click_rows(field_sizes)
    rows_BF = global_ids(ids_BF, field_sizes)
    models = {lazy: build() for lazy in (False, True)}
    steps: dict[str, Callable[[], Any]] = {
        "tables whole in every step": our_step(models[False], rows_BF, labels_B, lazy=False),
        "rows of the batch only": our_step(models[True], rows_BF, labels_B, lazy=True),
    }
    scored = build().eval()

    @torch.no_grad()
    def score() -> Tensor:
        return scored(rows_BF).sigmoid()

    def half() -> int:
        with half_products() as used:
            score()
        return used.layers

    scores: dict[str, Callable[[], Any]] = {"scores": score}
    if half():
        scores["scores, hidden products in bfloat16"] = half
    installed = find_spec("fuxictr") is not None
    if installed:
        steps["FuxiCTR"] = Peer(partial(_their_step, peer, tuple(field_sizes)))
        scores["FuxiCTR, scores"] = Peer(partial(_their_scores, peer, tuple(field_sizes)))
    note = (
        f"{what}, batch {BATCH:,}, {len(field_sizes)} fields, {sum(field_sizes):,} ids, width {DIM}, published settings; "
        f"{'' if installed else _MISSING}"
    )
    training = (
        f"{note}A step with loss, L2 of the tables, clipping and Adam; FuxiCTR's penalises and updates whole tables."
    )
    return Contest(steps, note=training, repeats=5), Contest(scores, note=f"{note}Forward pass.", repeats=5)


# -- in the other process ------------------------------------------------------------------------------------


def _inputs(field_sizes: Sequence[int]) -> dict[str, Tensor]:
    ids_BF, labels_B = click_rows(field_sizes)
    return {f"f{n}": column.contiguous() for n, column in enumerate(ids_BF.T)} | {"label": labels_B}


def _their_step(peer: Callable[..., Any], field_sizes: Sequence[int]) -> Callable[[], Any]:
    model, batch = peer(field_sizes), _inputs(field_sizes)
    model._max_gradient_norm = CLIP
    model.train()
    return partial(model.train_step, batch)


def _their_scores(peer: Callable[..., Any], field_sizes: Sequence[int]) -> Callable[[], Any]:
    model, batch = peer(field_sizes).eval(), _inputs(field_sizes)
    return torch.no_grad()(partial(model.forward, batch))


def _feature_map(field_sizes: Sequence[int]) -> Any:
    from fuxictr.features import FeatureMap

    found = FeatureMap("generated", tempfile.gettempdir())
    found.labels, found.default_emb_dim = ["label"], DIM
    found.num_fields, found.total_features = len(field_sizes), sum(field_sizes)
    found.features = OrderedDict(
        (f"f{n}", {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": size})
        for n, size in enumerate(field_sizes)
    )
    return found


def _assembled(field_sizes: Sequence[int], parts: Callable[[], tuple[dict[str, nn.Module], Any]]) -> Any:
    """A FuxiCTR model of its embedding and some parts; ``parts`` also gives what maps (parts, embeddings) to logits."""
    from fuxictr.pytorch.layers import FeatureEmbedding
    from fuxictr.pytorch.models import BaseModel

    class Network(BaseModel):
        def __init__(self, features: Any, **options: Any) -> None:
            super().__init__(features, embedding_regularizer=f"l2({REGULARIZER})", **options)
            self.embedding_layer = FeatureEmbedding(features, DIM)
            own, self.head = parts()
            for name, module in own.items():
                self.add_module(name, module)
            self.compile("adam", "binary_crossentropy", LR)
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            embedded = self.embedding_layer(self.get_inputs(inputs))
            return {"y_pred": self.output_activation(self.head(self, embedded))}

    return Network(_feature_map(field_sizes), verbose=0, model_root=tempfile.gettempdir(), metrics=["AUC"])


def finalmlp(field_sizes: Sequence[int]) -> Any:
    """FuxiCTR's FinalMLP at the published Criteo_x4 settings, which are without gates."""

    def parts() -> tuple[dict[str, nn.Module], Any]:
        from fuxictr.pytorch.layers import MLP_Block
        from model_zoo.LongCTR.FinalMLP.FinalMLP import InteractionAggregation

        width = len(field_sizes) * DIM
        own = {
            "mlp1": MLP_Block(width, hidden_units=[1000] * 5, dropout_rates=0.2),
            "mlp2": MLP_Block(width, hidden_units=[500], dropout_rates=0.1),
            "fusion": InteractionAggregation(1000, 500, output_dim=1, num_heads=50),
        }
        return own, lambda m, e: m.fusion(m.mlp1(e.flatten(1)), m.mlp2(e.flatten(1)))

    return _assembled(field_sizes, parts)


def autoint(field_sizes: Sequence[int]) -> Any:
    """FuxiCTR's AutoInt at the published Criteo_x4 settings: five layers of width 64 with one head, no perceptron."""
    layers, width = 5, 64

    def parts() -> tuple[dict[str, nn.Module], Any]:
        from fuxictr.pytorch.layers import ScaledDotProductAttention

        class Layer(nn.Module):
            def __init__(self, inner: int) -> None:
                super().__init__()
                self.query, self.key, self.value = (nn.Linear(inner, width, bias=False) for _ in range(3))
                self.residual = nn.Identity() if inner == width else nn.Linear(inner, width, bias=False)
                self.attention = ScaledDotProductAttention(0.0)

            def forward(self, x: Tensor) -> Tensor:
                heads = (one(x).unflatten(-1, (1, width)).transpose(1, 2) for one in (self.query, self.key, self.value))
                read, _ = self.attention(*heads)
                return (read.transpose(1, 2).flatten(2) + self.residual(x)).relu()

        own = {
            "layers": nn.Sequential(*(Layer(width if n else DIM) for n in range(layers))),
            "out": nn.Linear(len(field_sizes) * width, 1),
        }
        return own, lambda m, e: m.out(m.layers(e).flatten(1))

    return _assembled(field_sizes, parts)
