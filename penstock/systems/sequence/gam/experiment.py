"""GAM on text beside sum fusion, each pathway alone and a transformer; how far back it recalls; how its time grows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from penstock.data.base import Data, Source
from penstock.data.text import TextConfig, read_text
from penstock.lab.results import Effect, Results
from penstock.lab.system import System, Trial
from penstock.systems.sequence.gam.baseline import TransformerLM
from penstock.systems.sequence.gam.model import Fusion, GAMLanguageModel, Init, LearnedPositionLM
from penstock.systems.sequence.gam.trials import CHANCE, LENGTHS, REACH, recall_by_distance, time_by_length
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class GAMConfig:
    """A byte-level language model that is past the frequencies of its bytes in seconds."""

    width: int = 48
    """Width of the residual stream."""
    depth: int = 3
    """Blocks."""
    num_slots: int = 48
    """Slots of each block's memory."""
    kernel_size: int = 3
    """Taps of each block's convolution."""
    ffn_hidden: int = 192
    """Hidden width of the feed-forward nets."""
    memory_heads: int = 1
    """Heads of the memory read, each with its share of the channels; must divide the width."""
    separate_values: bool = False
    """Whether the memory holds values apart from its keys."""
    dropout: float = 0.1
    """Of the embedded tokens and of each feed-forward net's output."""
    init: Init = "balanced"
    """"reference" draws positions far larger than tokens, as the author does, and learns slowly."""
    num_heads: int = 8
    """Attention heads of the transformer arm; must divide the width."""
    data: TextConfig = field(default_factory=lambda: TextConfig(window=64))
    train: Training = field(
        default_factory=lambda: Training(
            steps=160, batch_size=12, lr=4e-3, weight_decay=0.1, warmup=30 / 160, validate_batches=32
        )
    )

    @property
    def gate_hidden(self) -> int:
        """Hidden units of a feed-forward net that have as many parameters as a block's gate."""
        gate, unit = 2 * self.width * (self.width + 1), 2 * self.width + 1
        return round(gate / unit)


#: The author's sizes and recipe; with --data wikitext2.txt and --data.tokenizer the rest of his setting. The warm-up is
#: his 100 steps of some 1500 there. Not his: AdamW's betas (0.9, 0.95), and decay of biases, norms and gates too.
_PAPER = GAMConfig(
    width=512,
    depth=6,
    num_slots=512,
    ffn_hidden=2048,
    init="reference",
    data=TextConfig(window=256),
    train=Training(steps=0, epochs=5, batch_size=32, lr=3e-4, weight_decay=0.1, warmup=0.067),
)


class GAMSystem(System[GAMConfig]):
    """See card.toml."""

    name = "gam"
    Config = GAMConfig
    task = LanguageModelling
    quick = {"width": 32, "ffn_hidden": 128, "num_slots": 32, "train.steps": 60, "data.max_bytes": 1_500_000}
    presets = {"paper": _PAPER}
    threads = 1
    size_field = "ffn_hidden"

    def load_data(self, config: GAMConfig, source: Source) -> Data:
        return read_text(config.data, source)

    def arms(self, config: GAMConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        vocab_size, window = spec["vocab_size"], spec["window"]

        def gam(fusion: Fusion, wider: int = 0) -> Callable[[], nn.Module]:
            return lambda: GAMLanguageModel(
                vocab_size,
                window,
                config.width,
                config.depth,
                num_slots=config.num_slots,
                kernel_size=config.kernel_size,
                ffn_hidden=config.ffn_hidden + wider,
                dropout=config.dropout,
                fusion=fusion,
                memory_heads=config.memory_heads,
                separate_values=config.separate_values,
                init=config.init,
            )

        def transformer() -> nn.Module:
            return TransformerLM(
                vocab_size,
                window,
                config.width,
                config.depth,
                config.num_heads,
                ffn_hidden=config.ffn_hidden,
                dropout=config.dropout,
                init=config.init,
            )

        return {
            "gated": gam("gated"),
            "ungated": gam("sum"),
            "ungated_matched": gam("sum", wider=config.gate_hidden),
            "local_only": gam("local"),
            "global_only": gam("global"),
            "transformer": transformer,
        }

    def measure(self, arm: str, task: Task, config: GAMConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        assert isinstance(model, LearnedPositionLM)
        return {"receptive_field": float(positions_used(model))}

    @staticmethod
    def _recall(config: GAMConfig, seed: int) -> dict[str, float]:
        return recall_by_distance(seed, dropout=config.dropout)

    @staticmethod
    def _time(config: GAMConfig, seed: int) -> dict[str, float]:
        return time_by_length(seed)

    trials = {
        "recall": Trial(_recall, "associative recall, by distance"),
        "time": Trial(_time, "time of a pass, by length"),
    }

    def claims(self, config: GAMConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        claims: dict[str, Effect | list[Effect]] = {
            "linear_time": [
                Effect(results.trial("time", "smallest_ratio"), ">", 1.5, "time at 2T over T, smallest ratio"),
                Effect(results.trial("time", "largest_ratio"), "<", 2.5, "time at 2T over T, largest ratio"),
            ],
            "recall_limit": [
                Effect(results.trial("recall", "near"), ">", 0.5, f"accuracy, key at most {REACH} tokens back"),
                Effect(results.trial("recall", "far"), "<", CHANCE + 0.03, "accuracy, key further back"),
                Effect(results.trial("recall", "far"), ">", CHANCE - 0.03, "accuracy, key further back"),
            ],
        }
        pairs = {
            "gate_gain": [("gated", "ungated"), ("gated", "ungated_matched")],
            "ablation_order": [("global_only", "local_only")],
        }
        for claim, compared in pairs.items():
            effects = [
                Effect(results.difference(a, b, "loss"), "<", what=f"test loss, {a} - {b} (nats)") for a, b in compared
            ]
            if all(effect.values for effect in effects):
                claims[claim] = effects
        if fields := results.metric("gated", "receptive_field"):
            reached = min(config.depth * (config.kernel_size - 1) + 1, config.data.window)
            what = f"positions a logit depends on (expected {reached})"
            claims["receptive_field"] = [
                Effect(fields, ">", reached - 0.5, what, exact=True),
                Effect(fields, "<", reached + 0.5, what, exact=True),
            ]
        return claims

    def figures(self, config: GAMConfig, results: Results) -> dict[str, Figure]:
        return {"What is in reach, and what it costs": _reach_figure(results)}


def positions_used(model: LearnedPositionLM) -> int:
    """On how many positions the last logits depend, by the gradient of the position table in float64."""
    wide = copy.deepcopy(model).double().eval()
    assert wide.max_length is not None
    device = wide.pos_embedding.weight.device
    tokens_BL = torch.arange(wide.max_length, device=device)[None] % wide.vocab_size
    logits = wide(tokens_BL)[0, -1]
    (gradient,) = torch.autograd.grad(logits.square().sum(), wide.pos_embedding.weight)
    return int((gradient != 0).any(-1).sum())


def _reach_figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for measured in results.trials.get("recall", []):
        at = sorted((int(k.removeprefix("distance_")), v) for k, v in measured.items() if k.startswith("distance_"))
        left.plot(*zip(*at, strict=True), marker="o", markersize=3)
    left.axvline(REACH + 1, color="grey", linestyle=":")
    left.axhline(CHANCE, color="grey", linewidth=0.8)
    left.set(ylim=(-0.03, 1.03), xlabel="tokens back to the key", title="recall (dotted: reach; line: chance)")
    for measured in results.trials.get("time", []):
        right.plot(LENGTHS, [measured[f"ms_{length}"] for length in LENGTHS], marker="o", markersize=3)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="forward and backward pass")
    return figure


SYSTEM = GAMSystem()
