"""Pyramid, binary and dense attention in a language model of bytes, and on tensors of known smoothness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from penstock.data.base import Data, Source
from penstock.data.text import TextConfig, read_text
from penstock.gates import force, watch
from penstock.lab.results import Effect, Results
from penstock.lab.system import System, Trial
from penstock.systems.sequence.psa.maps import MaskMode, density
from penstock.systems.sequence.psa.model import PSALM, levels_from
from penstock.systems.sequence.psa.synthetic import (
    QUOTA,
    SETTINGS,
    autoregressive,
    curves,
    error_when_constant,
    smooth_sequences,
    token_order,
)
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Attention = Literal["pyramid", "binary", "dense"]

#: Test batches on which interventions are measured.
_BATCHES = 8
_SMOOTHNESS = (0.98, 0.9, 0.5, 0.0)
_CORRELATIONS = (1, 2, 3)
_DATA = {"smooth": 0.98, "white": 0.0}


@dataclass
class PSAConfig:
    """A language model of bytes whose window is sixteen blocks long."""

    width: int = 96
    """Width of the residual stream."""
    depth: int = 3
    """Blocks."""
    num_heads: int = 3
    """Attention heads; must divide the width into heads of an even width."""
    mlp_hidden: int = 256
    """Hidden width of the SwiGLU."""
    block_size: int = 32
    """Queries and keys of a tile; a multiple of 8."""
    end_ratios: tuple[float, float, float, float] = QUOTA
    """Where levels 1, 2, 4 and 8 end, as shares of the sorted blocks (topk) or of their importance; the rest is skipped."""
    mask_mode: MaskMode = "topk"
    """topk gives each level a quota of the blocks, thresholdbound a share of the importance."""
    stride: int = 8
    """Tokens of the antidiagonals from which importance is estimated; must divide block_size."""
    similarity_cap: bool = False
    """Average no key block more coarsely than its smoothness allows (thresholds 0.75, 0.7, 0.7)."""
    warmup_steps: int = 75
    """First steps of training with dense attention, a quarter of all as in the paper's denoising."""
    data: TextConfig = field(default_factory=lambda: TextConfig(window=512, max_bytes=3_000_000))
    train: Training = field(default_factory=lambda: Training(steps=300, batch_size=4, lr=3e-3, validate_batches=16))


class PSASystem(System[PSAConfig]):
    """See card.toml."""

    name = "psa"
    Config = PSAConfig
    task = LanguageModelling
    size_field = "mlp_hidden"
    quick = {
        "width": 64,
        "depth": 2,
        "num_heads": 2,
        "mlp_hidden": 172,
        "warmup_steps": 10,
        "train.steps": 40,
        "data.window": 256,
        "data.max_bytes": 600_000,
    }

    def load_data(self, config: PSAConfig, source: Source) -> Data:
        return read_text(config.data, source)

    def arms(self, config: PSAConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        def builder(attention: Attention) -> Callable[[], nn.Module]:
            return lambda: self._build(config, spec["vocab_size"], attention)

        return {"gated": builder("pyramid"), "ungated": builder("dense"), "binary": builder("binary")}

    def _build(self, config: PSAConfig, vocab_size: int, attention: Attention) -> PSALM:
        return PSALM(
            vocab_size,
            config.width,
            config.depth,
            config.num_heads,
            intermediate_size=config.mlp_hidden,
            attention=attention,
            block_size=config.block_size,
            end_ratios=config.end_ratios,
            mask_mode=config.mask_mode,
            stride=config.stride,
            sim_thresholds=(0.75, 0.7, 0.7) if config.similarity_cap else None,
            warmup_steps=config.warmup_steps,
        )

    @torch.no_grad()
    def measure(self, arm: str, task: Task, config: PSAConfig, data: Data, seed: int) -> dict[str, float]:
        """Density and interventions; of the dense arm, its loss if maps are used at test time only, as in the paper."""
        batches: list[Tensor] = list(islice(data.test(config.train.batch_size), _BATCHES))
        trained = task.model

        def loss(model: nn.Module) -> float:
            task.model = model
            mean = sum(float(task.step(batch)[0]) for batch in batches) / len(batches)
            task.model = trained
            return mean

        base = loss(trained)
        if arm != "ungated":
            measured = {"density": map_density(trained, batches)}
            for how in ("open", "shuffle"):
                with force(trained, how):
                    measured[f"loss_{how}_minus_trained"] = loss(trained) - base
            return measured
        measured = {}
        attentions: tuple[Attention, ...] = ("pyramid", "binary")
        for attention in attentions:
            model = self._build(config, data.spec["vocab_size"], attention).eval()
            model.load_state_dict(trained.state_dict())
            measured[f"loss_{attention}_at_test_minus_trained"] = loss(model) - base
            measured[f"density_{attention}_at_test"] = map_density(model, batches)
        return measured

    @staticmethod
    def _smooth(config: PSAConfig, seed: int) -> dict[str, float]:
        return {f"{name}_{rho:g}": value for rho in _SMOOTHNESS for name, value in smooth_sequences(seed, rho).items()}

    @staticmethod
    def _order(config: PSAConfig, seed: int) -> dict[str, float]:
        return {
            f"{name}_{correlation}": value
            for correlation in _CORRELATIONS
            for name, value in token_order(seed, correlation).items()
        }

    @staticmethod
    def _constant(config: PSAConfig, seed: int) -> dict[str, float]:
        return {"difference": error_when_constant(seed)}

    @staticmethod
    def _curves(config: PSAConfig, seed: int) -> dict[str, float]:
        measured = {}
        for data, rho in _DATA.items():
            tensors = autoregressive(rho, torch.Generator().manual_seed(seed))
            for name, points in curves(tensors, *SETTINGS).items():
                for number, point in enumerate(points):
                    measured[f"{data}_{name}_{number}_density"] = point.density
                    measured[f"{data}_{name}_{number}_error"] = point.error
        return measured

    trials = {
        "smooth_sequences": Trial(_smooth, "pyramid against binary on AR(1) sequences", seeds=5),
        "token_order": Trial(_order, "raster against Gilbert order on smooth video", seeds=5),
        "constant_groups": Trial(_constant, "keys and values constant in groups of eight"),
        "error_against_density": Trial(_curves, "error against density"),
    }

    def claims(self, config: PSAConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        def less(trial: str, first: str, second: str) -> list[float]:
            pairs = zip(results.trial(trial, first), results.trial(trial, second), strict=True)
            return [a - b for a, b in pairs]

        gains = {
            correlation: less("token_order", f"gilbert_pyramid_{correlation}", f"raster_pyramid_{correlation}")
            for correlation in _CORRELATIONS
        }
        largest = [max(value for values in gains.values() for value in values)] if gains[1] else []
        return {
            "pyramid_over_binary": [
                Effect(
                    less("smooth_sequences", f"pyramid_{rho:g}", f"binary_{rho:g}"),
                    "<",
                    what=f"relative error, pyramid - binary, smoothness {rho:g}",
                )
                for rho in _SMOOTHNESS
            ],
            "token_order": [
                *(
                    Effect(values, "<", what=f"relative error, Gilbert - raster, correlation length {correlation}")
                    for correlation, values in gains.items()
                ),
                Effect(largest, "<", what="the largest of these differences in any seed", exact=True),
            ],
            "exact_when_constant": Effect(
                results.trial("constant_groups", "difference"),
                "<",
                1e-9,
                "largest difference from dense attention",
                exact=True,
            ),
        }

    def figures(self, config: PSAConfig, results: Results) -> dict[str, Figure]:
        return {
            "Error against density": _density_figure(results),
            "Error by the order of tokens (smooth video)": _order_figure(results),
        }


@torch.no_grad()
def map_density(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Mean density of the causal maps of all layers, relative to dense causal attention."""
    with watch(model, keep="values") as log:
        for batch in batches:
            model(batch[:, :-1])
    maps = [levels_from(values, causal=True) for calls in log.values().values() for values in calls]
    return sum(float(density(levels, causal=True).mean()) for levels in maps) / len(maps)


def _density_figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    for axes, data in zip(figure.subplots(1, 2), _DATA, strict=True):
        for name, style in (("pyramid", "o-"), ("binary", "x--")):
            places, errors = (
                [
                    _mean(results.trial("error_against_density", f"{data}_{name}_{n}_{part}"))
                    for n in range(len(SETTINGS))
                ]
                for part in ("density", "error")
            )
            axes.plot(places, errors, style, label=name)
        axes.set(title=f"AR(1), smoothness {_DATA[data]:g}", xlabel="density", ylabel="relative error", ylim=(0, None))
        axes.legend()
    return figure


def _order_figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("pyramid", "binary"), strict=True):
        for shift, order, marker in ((-0.08, "raster", "s"), (0.08, "gilbert", "o")):
            for correlation in _CORRELATIONS:
                errors = results.trial("token_order", f"{order}_{name}_{correlation}")
                label = order if correlation == _CORRELATIONS[0] else None
                axes.scatter([correlation + shift] * len(errors), errors, marker=marker, label=label, s=18,
                             color="C0" if order == "raster" else "C1")  # fmt: skip
        axes.set(title=name, xticks=_CORRELATIONS, xlabel="correlation length", ylabel="relative error", ylim=(0, None))
        axes.legend()
    return figure


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


SYSTEM = PSASystem()
