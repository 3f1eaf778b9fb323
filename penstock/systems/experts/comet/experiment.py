"""COMET against top-k, DSelect-k, hash, softmax and uniform gates; how sparse it gets; local search on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.data.base import Data, Source
from penstock.data.mixtures import MixtureConfig, PlantedMixture, load_mixture
from penstock.lab.results import Effect, Results
from penstock.lab.system import System, Trial
from penstock.nn.experts import Experts, collect_losses, mixture
from penstock.systems.experts.comet.model import GateName, HashGate, MixtureOfExperts, SinkhornPermutation
from penstock.tasks.base import Training
from penstock.tasks.mixture_regression import MixtureRegression

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class CometConfig:
    """Eight linear experts on eight planted regions; data with ids gets wider experts and heads."""

    num_experts: int = 8
    """Experts, 2 or more; need not be a power of two."""
    top_k: int = 2
    """How many experts a sample may use: trees of COMET, selectors of DSelect-k, k of top-k."""
    gamma: float = 1.0
    """Width of the smooth step: smaller ones make splits hard sooner, and may freeze them as they were initialised."""
    entropy_reg: float = 0.05
    """Weight of the paths' entropy: larger ones make the gate sparse sooner."""
    strong_entropy_reg: float = 1.0
    """The same in the arms "penalised" and "sharp"."""
    sharp_gamma: float = 0.1
    """Width of the smooth step in the arm "sharp"."""
    zeta: float = 1.0
    """Of DSelect-k with a number of experts that is no power of two: keeps selectors on experts that exist."""
    jitter: bool = False
    """Learned noise on top-k's scores while training."""
    embed_dim: int = 16
    """Width of an id's embedding."""
    expert_dim: int | None = None
    """Output width of the experts (linear maps with ReLU); 0: they give the prediction itself, without a head.
    Default: 64 for data with ids, 0 for numbers alone."""
    head_dim: int | None = None
    """Hidden width of each label's head; default that of the experts."""
    dropout: float = 0.0
    """Of the experts' outputs."""
    search_ratio: float = 0.1
    """Share of the steps in which the arm "local_search" learns its permutation; then it is frozen."""
    tau0: float = 1e-3
    """Temperature of local search at the start (the authors' value; see the claim local_search for the scale rule)."""
    tau1: float = 1e-7
    """Temperature of local search at its end."""
    data: MixtureConfig = field(default_factory=MixtureConfig)
    train: Training = field(
        default_factory=lambda: Training(
            steps=1200, batch_size=256, optimizer="adam", lr=1e-2, schedule="constant", clip_norm=0.0
        )
    )


class Comet(System[CometConfig]):
    """See card.toml."""

    name = "comet"
    threads = 1
    Config = CometConfig
    task = MixtureRegression
    quick: ClassVar[Mapping[str, Any]] = {"train.steps": 300, "data.test_size": 1000}

    def load_data(self, config: CometConfig, source: Source) -> Data:
        return load_mixture(config.data, source)

    def arms(self, config: CometConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        def builder(
            gate: GateName,
            *,
            gamma: float = config.gamma,
            entropy_reg: float = config.entropy_reg,
            search: bool = False,
        ) -> Callable[[], nn.Module]:
            return lambda: MixtureOfExperts(
                num_ids=spec["num_ids"],
                num_fields=spec["num_id_fields"],
                num_numeric=spec["num_numeric"],
                sequence_offsets=spec["offsets"][len(spec["offsets"]) - spec["num_sequences"] :],
                embed_dim=config.embed_dim,
                num_tasks=len(spec["tasks"]),
                num_experts=config.num_experts,
                expert_dim=expert_dim,
                head_dim=expert_dim if config.head_dim is None else config.head_dim,
                dropout=config.dropout,
                gate=gate,
                top_k=config.top_k,
                gamma=gamma,
                entropy_reg=entropy_reg,
                zeta=config.zeta,
                jitter=config.jitter,
                permutation_steps=max(round(config.search_ratio * steps), 1) if search else 0,
                tau0=config.tau0,
                tau1=config.tau1,
            )

        if not 0 < config.search_ratio <= 1:
            raise ValueError(f"search_ratio={config.search_ratio} must be above 0 and at most 1")
        has_ids = spec["num_id_fields"] + spec["num_sequences"] > 0
        expert_dim = (64 if has_ids else 0) if config.expert_dim is None else config.expert_dim
        train = config.train
        steps = train.steps or train.epochs * math.ceil(spec["num_rows"] / train.batch_size)
        strong = config.strong_entropy_reg
        return {
            "gated": builder("comet"),
            "ungated": builder("uniform"),
            "topk": builder("topk"),
            "dselect_k": builder("dselect_k"),
            "hash": builder("hash"),
            "softmax": builder("softmax"),
            "penalised": builder("comet", entropy_reg=strong),
            "sharp": builder("comet", gamma=config.sharp_gamma, entropy_reg=strong),
            "local_search": builder("comet", search=True),
        }

    @staticmethod
    def _search(config: CometConfig, seed: int) -> dict[str, float]:
        """Local search on its own: temperatures by the scale rule, the authors' ones, and no search at all."""
        runs = {
            "scaled": search_alone(seed, tau0=1.0, tau1=1e-2),
            "authors": search_alone(seed, tau0=1e-3, tau1=1e-7),
            "none": search_alone(seed, tau0=1.0, tau1=1e-2, steps=0),
        }
        return {f"{name}_{key}": value for name, result in runs.items() for key, value in result.items()}

    trials: ClassVar[Mapping[str, Trial[Any]]] = {
        "local_search": Trial(_search, "local search on its own (experts frozen in random order)", seeds=5)
    }

    def claims(self, config: CometConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        trial = "local_search"
        claims: dict[str, Effect | list[Effect]] = {
            "local_search": [
                Effect(results.trial(trial, "scaled_matches"), ">", 0.9, "experts matched, temperature 1 to 0.01"),
                Effect(results.trial(trial, "none_matches"), "<", 0.5, "experts matched without local search"),
            ]
        }
        comet, topk = _ratios(results, "gated", "topk"), _ratios(results, "topk", "ungated")
        if comet and topk:
            claims["gates"] = [
                Effect(comet, "<", 0.7, "NMSE, COMET / top-k"),
                Effect(topk, "<", 0.6, "NMSE, top-k / uniform"),
            ]
        penalty = results.difference("penalised", "gated", "experts_per_sample")
        width = results.difference("sharp", "penalised", "experts_per_sample")
        if penalty and width:
            claims["sparsity"] = [
                Effect(results.metric("sharp", "share_within_k"), ">", 0.8, "samples with at most k experts, sharp"),
                Effect(penalty, "<", what="experts a sample, strong - weak penalty"),
                Effect(width, "<", what="experts a sample, narrow - wide step"),
            ]
        return claims

    def figures(self, config: CometConfig, results: Results) -> dict[str, Figure]:
        return {"Error against experts used": _use_figure(results), "Local search on its own": _search_figure(results)}


def search_alone(
    seed: int, *, tau0: float, tau1: float, steps: int = 100, lr: float = 5e-2, batch_size: int = 256
) -> dict[str, float]:
    """Local search where nothing else can help: the planted experts in random order, frozen, and a hash gate by region.

    Args:
        seed: of the maps, their order, the samples and the scores.
        tau0, tau1: temperatures at the start and the end.
        steps: training steps before the permutation is hard; 0: no local search.
        lr: of Adam, for the permutation's scores.
        batch_size: fresh samples a step.

    Returns:
        ``matches``: share of regions that reach their own expert; ``nmse`` on new samples.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    truth = PlantedMixture.draw(rng)
    regions, dim = truth.maps.shape
    order = rng.permutation(regions)
    experts = Experts(regions, (dim, 1), bias=False).requires_grad_(False)
    experts.load_state_dict({"layers.0.weight": torch.from_numpy(truth.maps[order])[..., None]})
    gate = HashGate(regions)
    search = SinkhornPermutation(regions, 1, steps=steps + 1, tau0=tau0, tau1=tau1)

    def predict(count: int) -> tuple[Tensor, Tensor]:
        x = rng.standard_normal((count, dim))
        region, target = torch.from_numpy(truth.region(x)), torch.from_numpy(truth.target(x)).float()
        predicted = mixture(experts, torch.from_numpy(x).float(), gate(region, search()))
        return predicted.squeeze(-1), target

    optimizer = torch.optim.Adam(search.parameters(), lr=lr)
    for _ in range(steps):
        with collect_losses() as regularisers:
            predicted, target = predict(batch_size)
        loss = F.mse_loss(predicted, target) + sum(regularisers.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    search.eval()
    with torch.no_grad():
        predicted, target = predict(4096)
        reached = order[search()[0].argmax(-1).numpy()]
    return {
        "matches": float((reached == np.arange(regions)).mean()),
        "nmse": float(F.mse_loss(predicted, target) / target.var()),
    }


def _ratios(results: Results, a: str, b: str) -> list[float]:
    """NMSE of arm ``a`` over that of arm ``b``, paired by seed; empty where there is none."""
    errors = {arm: {c["seed"]: c["metrics"].get("nmse") for c in results.cells if c["arm"] == arm} for arm in (a, b)}
    return [value / errors[b][seed] for seed, value in errors[a].items() if value and errors[b].get(seed)]


def _use_figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for arm in dict.fromkeys(cell["arm"] for cell in results.cells):
        axes.scatter(results.metric(arm, "experts_per_sample"), results.metric(arm, "loss"), label=arm, s=22)
    axes.set(xlabel="experts a sample uses", ylabel="test loss", ylim=(0, None))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _search_figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    names = {"scaled": "temperature\n1 to 0.01", "authors": "authors'\n0.001 to 1e-7", "none": "no search"}
    for place, name in enumerate(names):
        matches = results.trial("local_search", f"{name}_matches")
        axes.scatter([place] * len(matches), matches)
    axes.set(xticks=range(len(names)), xticklabels=names.values(), ylim=(-0.03, 1.03), ylabel="experts matched")
    return figure


SYSTEM = Comet()
