"""Gated attention against its ungated twin on text, and the selective-copy task for the attention sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from penstock.data.base import Data, Source
from penstock.data.text import TextConfig, read_text
from penstock.gates import force
from penstock.lab.results import Effect, Results
from penstock.lab.system import System, Trial
from penstock.systems.sequence.gated_attention.model import (
    Activation,
    Combine,
    GatedAttentionLM,
    Granularity,
    Position,
    first_token_attention,
    max_activation,
)
from penstock.systems.sequence.gated_attention.selective_copy import merged_projection_error, selective_copy
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Test batches on which interventions and activations are measured.
_BATCHES = 8


@dataclass
class GatedAttentionConfig:
    """A language model small enough to learn in two minutes on two cores."""

    width: int = 128
    """Width of the residual stream."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 4
    """Query heads; must divide the width."""
    num_kv_heads: int = 4
    """Key/value heads; must divide num_heads (fewer: grouped-query attention)."""
    mlp_hidden: int = 344
    """Hidden width of the SwiGLU of the ungated arm."""
    match_parameters: bool = True
    """Shrink the SwiGLU of gated arms by the gates' parameters, so that all arms have the same size."""
    position: Position = "sdpa_output"
    """What is gated: the attention output (the paper's choice), value, key, query, or the projected output."""
    activation: Activation = "sigmoid"
    """Of the gate; ns_sigmoid lies in (0.5, 1) and cannot shut."""
    combine: Combine = "multiply"
    """Whether the gate multiplies or is added."""
    head_specific: bool = True
    """Whether each head has a gate of its own."""
    input_dependent: bool = True
    """Whether the gate reads the token, or is a learned constant."""
    data: TextConfig = field(default_factory=TextConfig)
    train: Training = field(default_factory=lambda: Training(steps=350, batch_size=16, lr=3e-3, validate_batches=32))


class GatedAttentionSystem(System[GatedAttentionConfig]):
    """See card.toml."""

    name = "gated_attention"
    Config = GatedAttentionConfig
    task = LanguageModelling
    quick = {"width": 64, "depth": 2, "mlp_hidden": 172, "train.steps": 60, "data.max_bytes": 1_500_000}

    def load_data(self, config: GatedAttentionConfig, source: Source) -> Data:
        return read_text(config.data, source)

    def arms(self, config: GatedAttentionConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        def builder(gate: Granularity | None) -> Callable[[], nn.Module]:
            return lambda: self._build(config, spec["vocab_size"], gate)

        return {"gated": builder("headwise"), "ungated": builder(None), "elementwise": builder("elementwise")}

    def _build(self, config: GatedAttentionConfig, vocab_size: int, gate: Granularity | None) -> GatedAttentionLM:
        hidden = config.mlp_hidden
        if gate is not None and config.match_parameters and config.input_dependent:
            units = config.num_heads if config.head_specific else 1
            rows = units * (config.width // config.num_heads if gate == "elementwise" else 1)
            hidden -= round(rows / 3)  # a hidden unit of SwiGLU has three weights where a row of the gate has one
        if hidden < 1:
            raise ValueError(f"mlp_hidden={config.mlp_hidden} leaves nothing after matching the gate's parameters")
        return GatedAttentionLM(
            vocab_size,
            config.width,
            config.depth,
            config.num_heads,
            intermediate_size=hidden,
            num_kv_heads=config.num_kv_heads,
            gate=gate,
            position=config.position,
            activation=config.activation,
            combine=config.combine,
            head_specific=config.head_specific,
            input_dependent=config.input_dependent,
        )

    @torch.no_grad()
    def measure(self, arm: str, task: Task, config: GatedAttentionConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        assert isinstance(model, GatedAttentionLM)
        batches = list(islice(data.test(config.train.batch_size), _BATCHES))

        def loss() -> float:
            return sum(float(task.step(batch)[0]) for batch in batches) / len(batches)

        measured = {
            "max_activation": max(float(max_activation(model, batch[:, :-1]).max()) for batch in batches),
            "first_token_attention": sum(float(first_token_attention(model, b[:, :-1]).mean()) for b in batches)
            / len(batches),
        }
        if arm != "ungated":
            base = loss()
            for how in ("open", "shuffle", "mean"):
                if how == "open" or config.input_dependent:
                    with force(model, how):
                        measured[f"loss_{how}_minus_trained"] = loss() - base
        return measured

    @staticmethod
    def _selective_copy(config: GatedAttentionConfig, seed: int) -> dict[str, float]:
        gates: dict[str, Granularity | None] = {"ungated": None, "headwise": "headwise", "elementwise": "elementwise"}
        measured: dict[str, float] = {}
        for name, gate in gates.items():
            measured |= {f"{name}_{k}": v for k, v in selective_copy(gate, seed).items()}
        return measured

    @staticmethod
    def _merged(config: GatedAttentionConfig, seed: int) -> dict[str, float]:
        return {"ungated": merged_projection_error(None, seed), "headwise": merged_projection_error("headwise", seed)}

    trials = {
        "selective_copy": Trial(_selective_copy, "selective copy (is there an attention sink?)", seeds=5),
        "merged_projections": Trial(_merged, "merging the value and output projections"),
    }

    def claims(self, config: GatedAttentionConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        copy, merged = "selective_copy", "merged_projections"
        return {
            "gain": Effect(
                results.difference("gated", "ungated", "loss"), "<", what="test loss, gated - ungated (nats)"
            ),
            "sink": [
                Effect(results.trial(copy, "headwise_sink"), "<", 0.6, "attention on the first token, headwise"),
                Effect(results.trial(copy, "ungated_sink"), ">", 0.95, "attention on the first token, ungated"),
            ],
            "gate_says_nothing": [
                Effect(results.trial(copy, "headwise_gate_inactive"), "<", 0.05, "gate at inactive queries"),
                Effect(results.trial(copy, "headwise_gate_active"), ">", 0.9, "gate at active queries"),
            ],
            "massive_activation": Effect(
                results.difference("gated", "ungated", "max_activation"),
                "<",
                what="largest activation, gated - ungated",
            ),
            "dynamic": Effect(
                results.metric("gated", "loss_shuffle_minus_trained"),
                ">",
                what="test loss, gates shuffled - as trained (nats)",
            ),
            "nonlinearity": [
                Effect(
                    results.trial(merged, "headwise"), ">", 1e-3, "relative change when merged, headwise", exact=True
                ),
                Effect(results.trial(merged, "ungated"), "<", 1e-9, "relative change when merged, ungated", exact=True),
            ],
        }

    def figures(self, config: GatedAttentionConfig, results: Results) -> dict[str, Figure]:
        return {"Where nothing comes from (selective copy)": _sink_figure(results)}


def _sink_figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ("ungated", "headwise", "elementwise")
    for place, name in enumerate(names):
        sink = results.trial("selective_copy", f"{name}_sink")
        left.scatter([place] * len(sink), sink)
    left.set(
        xticks=range(3), xticklabels=names, ylim=(-0.03, 1.03), title="attention on the first token,\ninactive queries"
    )
    for place, name in enumerate(names[1:]):
        for shift, at in ((-0.1, "inactive"), (0.1, "active")):
            values = results.trial("selective_copy", f"{name}_gate_{at}")
            right.scatter(
                [place + shift] * len(values),
                values,
                marker="o" if at == "active" else "x",
                label=at if not place else None,
            )
    right.set(xticks=range(2), xticklabels=names[1:], ylim=(-0.03, 1.03), title="mean gate value")
    right.legend()
    return figure


SYSTEM = GatedAttentionSystem()
