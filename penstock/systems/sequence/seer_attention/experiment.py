"""SeerAttention on a small language model: trained dense, frozen, its gates distilled, then read under their masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from penstock.data.base import Data, Source
from penstock.data.text import TextConfig, read_text
from penstock.gates import force, named_gates, watch
from penstock.lab.results import Effect, Results
from penstock.lab.system import Stage, System, Trial
from penstock.systems.sequence.seer_attention.gates import AttnGate
from penstock.systems.sequence.seer_attention.model import Heads, SeerAttention, SeerLM
from penstock.systems.sequence.seer_attention.tiles import (
    Method,
    TargetPool,
    TileRule,
    causal_tiles,
    density,
    ground_truth,
    open_tiles,
    select_tiles,
    sink_local_scores,
    tile_recall,
)
from penstock.systems.sequence.seer_attention.topics import average_pool_gate, topic_gate
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Test batches on which masks are compared.
_BATCHES = 8
#: Percent of the causal tiles at which masks are compared; the claim is about a quarter, as in the synthetic one.
_DENSITIES = (15, 25, 40, 60)
_CLAIMED = 25
_MASKS = ("learned", "oracle", "sink_local", "random", "average_pool")
_THRESHOLDS = (0.0, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass
class SeerAttentionConfig:
    """A byte model with a window of 32 blocks, small enough to learn in a minute or two on two cores."""

    width: int = 128
    """Width of the residual stream."""
    depth: int = 4
    """Blocks of the network."""
    num_heads: int = 4
    """Query heads; must divide the width."""
    num_kv_heads: int = 2
    """Key/value heads; must divide num_heads (fewer: grouped-query attention)."""
    qk_norm: bool = True
    """RMS norm of queries and keys."""
    mlp_hidden: int = 344
    """Hidden width of the SwiGLU."""
    block_size: int = 16
    """Tokens of a block; the authors' 64 suits windows of thousands."""
    gate_type: str = "Qavg_Kmaxminavg"
    """How gates pool queries and keys over a block: Q and K followed by any of max, min, avg in this order."""
    gate_hidden_size: int | None = None
    """Width of a gate; default that of a head."""
    method: Method = "nz_ratio"
    """How tiles are chosen in the test: by threshold, by share of the causal map, or by a budget of keys a query."""
    nz_ratio: float = 0.25
    """Share of the causal map to keep, for method nz_ratio."""
    threshold: float = 2e-3
    """Of a tile's share in its row, for method threshold."""
    token_budget: int = 128
    """Keys a query may see, for method token_budget."""
    last_block_dense: bool = False
    """Whether the last two block rows keep all their tiles (good for answering a prompt; here all rows are tested)."""
    target_pool: TargetPool = "max"
    """How the true attention map is pooled into the target."""
    gate_loss_scale: float = 10.0
    """Factor of the distillation loss."""
    train_base: bool = False
    """Train the base on with the language model's loss beside the gates' (the authors' fine-tuning) instead of freezing it."""
    data: TextConfig = field(default_factory=lambda: TextConfig(window=512, max_bytes=3_000_000))
    train: Training = field(default_factory=lambda: Training(steps=300, batch_size=8, lr=3e-3, validate_batches=8))
    distil: Training = field(
        default_factory=lambda: Training(steps=150, batch_size=8, lr=1e-2, warmup=0.1, validate_batches=8)
    )


class DenseTraining(LanguageModelling):
    """First stage: the base, with all tiles open also where it is validated."""

    def step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        with force(self.model, "open"):
            return super().step(batch)


class GateDistillation(LanguageModelling):
    """Second stage: the gates learn the frozen base's attention maps; validated and tested by the loss under their masks.

    Args:
        model: whose base has been trained.
        train: of this stage.
        data: what on.
        loss_scale: factor of the distillation loss, which is reported without it.
        train_base: add the language model's loss and train everything.
        pool: of the target.
    """

    def __init__(
        self, model: SeerLM, train: Training, data: Data, *, loss_scale: float, train_base: bool, pool: TargetPool
    ) -> None:
        super().__init__(model, train, data)
        self.loss_scale, self.train_base, self.pool = loss_scale, train_base, pool
        model.requires_grad_(train_base)
        for gate in model.gates:
            gate.requires_grad_(True)

    @property
    def seer(self) -> SeerLM:
        """The model, typed."""
        assert isinstance(self.model, SeerLM)
        return self.model

    def step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        if not self.model.training:
            return super().step(batch)
        logits, divergence = self.seer.distil(batch[:, :-1], pool=self.pool)
        loss = self.loss_scale * divergence
        if self.train_base:
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss, divergence

    def reported_loss(self, loss: Tensor, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs if self.model.training else loss

    def figures(self) -> dict[str, Figure]:
        batch = next(iter(self.data.test(1))).to(self.device)
        return super().figures() | {"Tiles: the truth, and what the gates keep of it": tiles_figure(self.seer, batch)}


class SeerAttentionSystem(System[SeerAttentionConfig]):
    """See card.toml."""

    name = "seer_attention"
    Config = SeerAttentionConfig
    task = LanguageModelling
    size_field = "mlp_hidden"
    quick = {
        "width": 64,
        "depth": 2,
        "mlp_hidden": 172,
        "train.steps": 60,
        "distil.steps": 40,
        "data.window": 256,
        "data.max_bytes": 1_000_000,
    }

    def load_data(self, config: SeerAttentionConfig, source: Source) -> Data:
        return read_text(config.data, source)

    def arms(self, config: SeerAttentionConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        if spec["window"] < 2 * config.block_size:
            raise ValueError(f"a window of {spec['window']} has no two blocks of block_size={config.block_size}")

        def builder(gated: bool) -> Callable[[], nn.Module]:
            return lambda: SeerLM(
                spec["vocab_size"],
                config.width,
                config.depth,
                config.num_heads,
                intermediate_size=config.mlp_hidden,
                num_kv_heads=config.num_kv_heads,
                qk_norm=config.qk_norm,
                gates="prefill" if gated else None,
                block_size=config.block_size,
                gate_hidden_size=config.gate_hidden_size,
                gate_type=config.gate_type,
                method=config.method,
                threshold=config.threshold,
                nz_ratio=config.nz_ratio,
                token_budget=config.token_budget,
                last_block_dense=config.last_block_dense,
            )

        return {"gated": builder(True), "ungated": builder(False)}

    def stages(self, arm: str, model: nn.Module, config: SeerAttentionConfig, data: Data) -> list[Callable[[], Stage]]:
        assert isinstance(model, SeerLM)
        if arm == "ungated":
            return [lambda: Stage(LanguageModelling(model, config.train, data))]

        def distil() -> Stage:
            task = GateDistillation(
                model,
                config.distil,
                data,
                loss_scale=config.gate_loss_scale,
                train_base=config.train_base,
                pool=config.target_pool,
            )
            return Stage(task, "distil")

        return [lambda: Stage(DenseTraining(model, config.train, data)), distil]

    @torch.no_grad()
    def measure(self, arm: str, task: Task, config: SeerAttentionConfig, data: Data, seed: int) -> dict[str, float]:
        if arm == "ungated":
            return {}
        model = task.model
        assert isinstance(model, SeerLM)
        batches = list(islice(data.test(config.distil.batch_size), _BATCHES))
        rules = [gate.rule for gate in model.gates]
        measured = compare_masks(task, model, batches, seed) | one_knob(task, model, batches[0])
        for gate, rule in zip(model.gates, rules, strict=True):
            gate.rule = rule
        return measured

    @staticmethod
    def _topics(config: SeerAttentionConfig, seed: int) -> dict[str, float]:
        return topic_gate(seed)

    trials = {"topics": Trial(_topics, "switching topics (does the gate find the tiles?)")}

    def claims(self, config: SeerAttentionConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        learned, oracle, local = (results.trial("topics", name) for name in ("learned", "oracle", "sink_local"))
        judged: dict[str, Effect | list[Effect]] = {
            "learned_tiles": Effect(
                [a - b for a, b in zip(learned, local, strict=True)],
                ">",
                0.1,
                "attention inside a quarter of the tiles, learned - sink and local",
            ),
            "near_oracle": Effect(
                [a / b for a, b in zip(learned, oracle, strict=True)],
                ">",
                0.85,
                "attention inside a quarter of the tiles, learned / oracle",
            ),
        }
        losses = [results.metric("gated", f"{name}_loss_at_{_CLAIMED}") for name in ("learned", "sink_local")]
        if losses[0]:
            judged["language_model"] = Effect(
                [a - b for a, b in zip(*losses, strict=True)],
                "<",
                what=f"test loss with {_CLAIMED}% of the tiles, learned - sink and local (nats)",
            )
            judged["one_knob"] = [
                Effect(
                    results.metric("gated", "largest_rise_of_density"),
                    "<",
                    1e-9,
                    "largest rise of the density from one threshold to the next",
                    exact=True,
                ),
                Effect(
                    results.metric("gated", "difference_at_threshold_zero"),
                    "<",
                    1e-5,
                    "largest difference of the logits from dense attention at threshold zero",
                    exact=True,
                ),
            ]
        return judged

    def figures(self, config: SeerAttentionConfig, results: Results) -> dict[str, Figure]:
        if not results.metric("gated", "dense_loss"):
            return {}
        return {"What skipped tiles cost": density_figure(results)}


def compare_masks(task: Task, model: SeerLM, batches: list[Tensor], seed: int) -> dict[str, float]:
    """Loss and tile recall under learned and other masks of the same density in every row.

    Returns dense_loss and, for each mask and percent of the tiles, ``<mask>_loss_at_<percent>``,
    ``<mask>_recall_at_<percent>`` (share of the truth's mass inside) and ``density_at_<percent>``.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(named_gates(model))
    size = model.gates[0].block_size
    totals: dict[str, float] = {}

    def add(name: str, value: Tensor) -> None:
        totals[name] = totals.get(name, 0.0) + float(value) / len(batches)

    for batch in batches:
        scores, truths = mask_scores(model, batch[:, :-1], generator)
        with force(model, "open"):
            add("dense_loss", task.step(batch)[0])
        for percent in _DENSITIES:
            rule = TileRule("nz_ratio", nz_ratio=percent / 100, last_block_dense=False)
            for gate in model.gates:
                gate.rule = rule
            loss, masks = masked_loss(task, model, batch)
            found = {"learned": (loss, masks)}
            for name, own in scores.items():
                masks = [select_tiles(score, rule, block_size=size) for score in own]
                with force(model, {gate: mask.float() for gate, mask in zip(names, masks, strict=True)}):
                    found[name] = task.step(batch)[0], masks
            for name, (loss, masks) in found.items():
                recalls = [tile_recall(m, t).mean() for m, t in zip(masks, truths, strict=True)]
                add(f"{name}_loss_at_{percent}", loss)
                add(f"{name}_recall_at_{percent}", torch.stack(recalls).mean())
            add(f"density_at_{percent}", mean_density(masks))
    return totals


def mask_scores(
    model: SeerLM, tokens_BL: Tensor, generator: torch.Generator
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """What the masks beside the learned one choose by, a tensor (B, H, N, N) a layer each, and the true tiles.

    All come from the dense model: oracle (the truth itself), sink_local (the first block, then the nearest), random, and
    average_pool (products of mean queries and mean keys, positions applied, nothing learned).
    """
    scores: dict[str, list[Tensor]] = {name: [] for name in _MASKS if name != "learned"}

    def look(layer: SeerAttention, heads: Heads) -> None:
        gate = layer.gate
        assert isinstance(gate, AttnGate)
        truth = ground_truth(heads.queries, heads.keys, block_size=gate.block_size)
        num, device = truth.shape[-1], truth.device
        plain = average_pool_gate(
            layer.head_dim, layer.num_heads, layer.num_kv_heads, block_size=gate.block_size, rotary=True
        ).to(device)
        firsts = torch.arange(num, device=device) * gate.block_size
        found = {
            "oracle": truth,
            "sink_local": sink_local_scores(num, device).expand(truth.shape),
            "random": torch.rand(truth.shape, generator=generator).to(device),
            "average_pool": plain.logits(
                heads.raw_queries, heads.raw_keys, layer.tables(firsts, layer.head_dim, truth.dtype)
            ),
        }
        for name, score in found.items():
            scores[name].append(score.masked_fill(~causal_tiles(num, device), -torch.inf))

    model.dense_pass(tokens_BL, look)
    return scores, [score.clamp(min=0.0) for score in scores["oracle"]]


def masked_loss(task: Task, model: SeerLM, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss under the gates' own masks, and these masks, a layer each."""
    with watch(model, keep="values") as log:
        loss = task.step(batch)[0]
    return loss, [open_tiles(calls[0]) for calls in log.values().values()]


def mean_density(masks: list[Tensor]) -> Tensor:
    """Share of the causal tiles kept, over samples, heads and layers."""
    return torch.stack([density(mask).mean() for mask in masks]).mean()


def one_knob(task: Task, model: SeerLM, batch: Tensor) -> dict[str, float]:
    """Density and loss over rising thresholds, and how far threshold zero is from dense attention.

    Returns density_at_threshold_<t> and loss_at_threshold_<t>, largest_rise_of_density between neighbours, and
    difference_at_threshold_zero, of the logits in float64.
    """
    measured: dict[str, float] = {}
    densities = []
    for threshold in _THRESHOLDS:
        model.set_rule(method="threshold", threshold=threshold)
        loss, masks = masked_loss(task, model, batch)
        densities.append(float(mean_density(masks)))
        measured[f"density_at_threshold_{threshold:g}"] = densities[-1]
        measured[f"loss_at_threshold_{threshold:g}"] = float(loss)
    measured["largest_rise_of_density"] = max(b - a for a, b in pairwise(densities))
    exact = copy.deepcopy(model).double()
    exact.set_rule(method="threshold", threshold=0.0)
    tokens_BL = batch[:2, :-1]
    dense = exact.dense_pass(tokens_BL, lambda layer, heads: None)
    measured["difference_at_threshold_zero"] = float((exact(tokens_BL) - dense).abs().max())
    return measured


@torch.no_grad()
def tiles_figure(model: SeerLM, batch: Tensor) -> Figure:
    """For one window and the first head of each layer: the true tiles, and those of them that the gate keeps."""
    from matplotlib.figure import Figure

    truths: list[Tensor] = []

    def look(layer: SeerAttention, heads: Heads) -> None:
        assert layer.gate is not None
        truths.append(ground_truth(heads.queries, heads.keys, block_size=layer.gate.block_size))

    tokens_BL = batch[:1, :-1]
    model.dense_pass(tokens_BL, look)
    with watch(model, keep="values") as log:
        model(tokens_BL)
    masks = [open_tiles(calls[0]).tril() for calls in log.values().values()]
    figure = Figure(figsize=(1.9 * len(masks), 4.2), layout="constrained")
    axes = figure.subplots(2, len(masks), squeeze=False)
    for layer, (truth, mask) in enumerate(zip(truths, masks, strict=True)):
        for row, tiles in enumerate((truth, truth * mask)):
            axes[row, layer].imshow(tiles[0, 0].float().sqrt().cpu(), cmap="magma", vmin=0.0, vmax=1.0)
            axes[row, layer].set(xticks=[], yticks=[])
        axes[0, layer].set_title(f"layer {layer}", fontsize=8)
    axes[0, 0].set_ylabel("truth (square root)", fontsize=8)
    axes[1, 0].set_ylabel("kept", fontsize=8)
    return figure


def density_figure(results: Results) -> Figure:
    """Loss and recall against density, a line a mask, means over seeds."""
    from matplotlib.figure import Figure

    def mean(name: str) -> float:
        return fmean(results.metric("gated", name))

    densities = [mean(f"density_at_{percent}") for percent in _DENSITIES]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mask in _MASKS:
        label = mask.replace("_", " and " if mask == "sink_local" else " ")
        left.plot(densities, [mean(f"{mask}_loss_at_{p}") for p in _DENSITIES], marker="o", label=label)
        right.plot(densities, [mean(f"{mask}_recall_at_{p}") for p in _DENSITIES], marker="o")
    left.axhline(mean("dense_loss"), color="grey", linestyle=":", label="dense")
    left.set(xlabel="share of the causal tiles kept", ylabel="test loss (nats)")
    right.set(xlabel="share of the causal tiles kept", ylabel="true mass inside", ylim=(0, 1.03))
    left.legend(fontsize=7)
    return figure


SYSTEM = SeerAttentionSystem()
