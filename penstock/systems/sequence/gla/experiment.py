"""Linear attention with a gate that reads the token, with a fixed decay and with none, beside softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.data.base import Data, Source
from penstock.data.text import TextConfig, TextData, read_text
from penstock.gates import force, watch
from penstock.lab.results import Effect, Results
from penstock.lab.system import System, Trial
from penstock.systems.sequence.gla.baseline import AttentionLM
from penstock.systems.sequence.gla.model import GLALM, Decay
from penstock.systems.sequence.gla.trials import decode_cost, forms
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many times the training length the long windows are.
_TIMES = 4
#: Long windows of the test split that are measured, and at once.
_WINDOWS, _AT_ONCE = 128, 16
#: Parts of a training length in which the loss by position is given.
_PARTS = 2
#: Where each part ends, in training lengths.
_PLACES = [(n + 1) / _PARTS for n in range(_TIMES * _PARTS)]
_DECAYS: dict[str, Decay] = {"gated": "channel", "ungated": "none", "static_decay": "static", "fixed_decay": "fixed"}
_ARMS = (*_DECAYS, "attention")


@dataclass
class GLAConfig:
    """A byte-level language model; all gated and ungated arms have the same parameters (unused gate weights stay)."""

    width: int = 64
    """Width of the residual stream."""
    depth: int = 2
    """Blocks."""
    num_heads: int = 2
    """Heads; must divide half the width."""
    mlp_hidden: int = 172
    """Hidden width of the SwiGLU (published sizes: 8/3 of the width, rounded up to a multiple of 256)."""
    low_rank: int = 16
    """Inner width of the decay gate's two maps."""
    gate_logit_normalizer: float = 16.0
    """Tau: the decay is a sigmoid to the power 1 / tau."""
    use_short_conv: bool = False
    """Whether queries, keys and values pass a short causal convolution."""
    conv_size: int = 4
    """Its taps."""
    use_output_gate: bool = True
    """Whether what is read from the state passes a gate."""
    data: TextConfig = field(default_factory=lambda: TextConfig(window=96))
    train: Training = field(default_factory=lambda: Training(steps=350, batch_size=16, lr=3e-3, validate_batches=32))


class GLASystem(System[GLAConfig]):
    """See card.toml."""

    name = "gla"
    Config = GLAConfig
    task = LanguageModelling
    quick = {"train.steps": 60, "train.validate_batches": 8, "data.max_bytes": 1_500_000}
    threads = 1
    size_field = "mlp_hidden"

    def load_data(self, config: GLAConfig, source: Source) -> Data:
        return read_text(config.data, source)

    def arms(self, config: GLAConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        def linear(decay: Decay) -> Callable[[], nn.Module]:
            return lambda: GLALM(
                spec["vocab_size"],
                config.width,
                config.depth,
                config.num_heads,
                intermediate_size=config.mlp_hidden,
                gate_low_rank_dim=config.low_rank,
                gate_logit_normalizer=config.gate_logit_normalizer,
                use_short_conv=config.use_short_conv,
                conv_size=config.conv_size,
                use_output_gate=config.use_output_gate,
                decay=decay,
            )

        def attention() -> nn.Module:
            return AttentionLM(
                spec["vocab_size"], config.width, config.depth, config.num_heads, intermediate_size=config.mlp_hidden
            )

        return {arm: linear(decay) for arm, decay in _DECAYS.items()} | {"attention": attention}

    @torch.no_grad()
    def measure(self, arm: str, task: Task, config: GLAConfig, data: Data, seed: int) -> dict[str, float]:
        assert isinstance(data, TextData)
        windows = list(_long_windows(data))
        if not windows:
            return {}  # the user's test text is shorter than one long window
        long = torch.cat([_token_losses(task.model, batch) for batch in windows])
        short = torch.cat([_token_losses(task.model, _cut(batch, data.window)) for batch in windows])
        measured = {
            "loss_at_1x": float(short.mean()),
            "loss_at_4x": float(long.mean()),
            "loss_growth": float(long.mean() - short.mean()),
        }
        parts = long.mean(0).tensor_split(_TIMES * _PARTS)
        measured |= {f"loss_bucket_{place:g}x": float(part.mean()) for place, part in zip(_PLACES, parts, strict=True)}
        if arm == "gated":
            texts = [_cut(batch, data.window) for batch in windows]
            measured |= _gate_statistics(task.model, texts)
            for how in ("open", "shuffle", "mean"):
                with force(task.model, how, "*.decay_gate"):
                    changed = torch.cat([_token_losses(task.model, batch) for batch in texts])
                measured[f"loss_{how}_minus_trained"] = float(changed.mean() - short.mean())
        return measured

    trials = {
        "forms": Trial(lambda config, seed: forms(seed), "recurrent, chunk and parallel form in float64"),
        "decode": Trial(lambda config, seed: decode_cost(seed), "time of a generated token after 256 and 4096 others"),
    }

    def claims(self, config: GLAConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        def apart(kind: str) -> list[float]:
            return results.trial("decode", f"{kind}_ratio")

        found: dict[str, Effect | list[Effect]] = {
            "gain": [
                Effect(results.difference("gated", "ungated", "loss"), "<", what="test loss, gated - ungated (nats)"),
                Effect(
                    results.difference("gated", "fixed_decay", "loss"),
                    "<",
                    what="test loss, gated - fixed decay (nats)",
                ),
            ],
            "length": Effect(
                results.difference("gated", "ungated", "loss_growth"),
                "<",
                what="loss at 4x - at 1x the training length, gated - ungated (nats)",
            ),
            "forms": Effect(
                results.trial("forms", "worst"), "<", 1e-8, "largest difference from the recurrence", exact=True
            ),
            "decode": [
                Effect(apart("gated"), "<", 1.2, "time a token at 4096 / at 256, gated"),
                Effect(apart("gated"), ">", 0.8, "time a token at 4096 / at 256, gated"),
                Effect(
                    [a - g for a, g in zip(apart("attention"), apart("gated"), strict=True)],
                    ">",
                    what="the same ratio, softmax attention - gated",
                ),
            ],
        }
        # What needs arms or text that are not in this run.
        return {k: e for k, e in found.items() if all(one.values for one in (e if isinstance(e, list) else [e]))}

    def figures(self, config: GLAConfig, results: Results) -> dict[str, Figure]:
        curves = {arm: [results.metric(arm, f"loss_bucket_{place:g}x") for place in _PLACES] for arm in _ARMS}
        measured = {arm: curve for arm, curve in curves.items() if all(curve)}
        return {"Loss by position, to four times the training length": _length_figure(measured)} if measured else {}


def _long_windows(data: TextData) -> Iterator[Tensor]:
    """Batches of windows of four training lengths and a token, from the start of the test split."""
    length = _TIMES * data.window
    tokens = data.splits["test"]
    starts = np.arange(0, len(tokens) - length, length)[:_WINDOWS]
    for some in np.array_split(starts, max(-(-len(starts) // _AT_ONCE), 1)):
        if len(some):
            yield torch.from_numpy(tokens[some[:, None] + np.arange(length + 1)].astype(np.int64))


def _cut(batch: Tensor, window: int) -> Tensor:
    """The same text in windows of the training length, (4 B, L + 1)."""
    return batch.unfold(1, window + 1, window).flatten(0, 1)


def _token_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of each token, (B, L)."""
    batch = batch.to(next(model.parameters()).device)
    return F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none").cpu()


def _gate_statistics(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """Of alpha, the share of the state that stays: its mean, how often it is below a half, and the tokens it keeps.

    The memory of a channel is 1 / (1 - its mean alpha).
    """
    kept: list[list[Tensor]] = []
    for batch in batches:
        with watch(model, "*.decay_gate", keep="values") as log:
            _token_losses(model, batch)
        kept.append([values[0].flatten(0, 1).flatten(1) for values in log.values().values()])
    log_alpha = torch.cat([torch.cat(layer) for layer in zip(*kept, strict=True)], 1).double()  # (tokens, channels)
    forgotten = -log_alpha.expm1()
    memory = 1 / forgotten.mean(0).clamp(min=1e-6)
    return {
        "mean_alpha": float(1 - forgotten.mean()),
        "alpha_below_half": float((forgotten > 0.5).double().mean()),
        "memory_median": float(memory.median()),
        "memory_shortest": float(memory.min()),
        "memory_longest": float(memory.max()),
    }


def _length_figure(curves: Mapping[str, list[list[float]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    middles = [place - 0.5 / _PARTS for place in _PLACES]
    for arm, curve in curves.items():
        axes.plot(middles, [sum(seeds) / len(seeds) for seeds in curve], marker="o", label=arm)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="position, in training lengths", ylabel="test loss (nats a token)")
    axes.legend()
    return figure


SYSTEM = GLASystem()
