"""Zoology: recall by a hybrid with a look-up gate, by its ungated twin and by gated convolutions; also on text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.data.base import Data, Source
from penstock.data.recall import UNLABELLED, RecallConfig, RecallData, is_recall_file, read_recall
from penstock.data.text import TextConfig, TextData, read_text
from penstock.errors import UserError
from penstock.lab.config import override, untouched
from penstock.lab.results import Effect, Results
from penstock.lab.system import Stage, System, Trial
from penstock.nn.experts import collect_losses
from penstock.systems.sequence.zoology.lookups import LookupGate, Selection
from penstock.systems.sequence.zoology.model import MIXERS, LanguageModel, register_mixer
from penstock.systems.sequence.zoology.sweep import Sweep, sweep_figure, train_cell
from penstock.systems.sequence.zoology.text_recall import Bigrams, recall_losses
from penstock.tasks.associative_recall import AssociativeRecall
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Arms that have a look-up gate or stand for its being open: their training is `lookup_factor` times as long.
_LOOKUP_ARMS = ("gated", "ungated")
#: What changes on text, where it has not been set by hand: a larger model, and text's own optimisation.
_TEXT: dict[str, Any] = {
    "width": 128,
    "depth": 4,
    "num_heads": 4,
    "num_lookups": 0,
    "train.steps": 350,
    "train.batch_size": 16,
    "train.lr": 3e-3,
    "train.warmup": 0.05,
    "train.clip_norm": 1.0,
    "train.validate_every": 0,
    "train.validate_batches": 32,
}
#: Test batches of text on which the losses on recall hits and others are measured.
_BATCHES = 32


@dataclass
class ZoologyConfig:
    """MQAR small enough to be learned in seconds; on text, sizes that are left alone become larger ones."""

    width: int = 32
    """Width of the residual stream (on text 128)."""
    depth: int = 2
    """Layers (on text 4); a hybrid's mixers take turns."""
    num_heads: int = 1
    """Heads of attention (on text 4); must divide the width."""
    mlp_hidden: int = 512
    """On text: hidden width of the MLPs. On recall there are none, as in the paper."""
    attention_dropout: float = 0.0
    """Of the attention weights."""
    selection: Selection = "sigmoid"
    """How the look-up gate selects; seen_before is the paper's programmatic rule and learns nothing."""
    num_lookups: int = 6
    """Positions that get an attention update; 0: the square root of the length (so on text)."""
    selection_penalty: float = 1.0
    """Weight of the loss that holds the look-up gate's mean to num_lookups positions (the authors' default is 0.001)."""
    lookup_factor: float = 25 / 12
    """On recall the look-up gate's arm and its twin train so many times the steps of the others."""
    h3_state: int = 64
    """State size of H3, even."""
    stop_above: float = 0.99
    """On recall, training ends at this validation accuracy; 1 trains to the end."""
    rare_bigram: int = 1250
    """On text, bigrams seen at most so often in training count as rare: only they can be recall hits."""
    mixer: str = ""
    """A mixer of your own as "module.Class", built as Class(d_model, layer_idx=i), in an arm "own"."""
    sweep: Sweep = field(default_factory=Sweep)
    """Recall against width."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    """The recall examples."""
    data: TextConfig = field(default_factory=TextConfig)
    """The text, where --data is text."""
    train: Training = field(
        default_factory=lambda: Training(
            steps=564, batch_size=128, lr=5e-3, weight_decay=0.1, warmup=0.0, clip_norm=0.0, validate_every=47
        )
    )


def _figure_2(length: int, pairs: int, batch_size: int) -> ZoologyConfig:
    """A column of the paper's figure 2 at width 128 and one of its four learning rates."""
    batches = -(-100_000 // batch_size)
    return ZoologyConfig(
        width=128,
        attention_dropout=0.1,
        num_lookups=0,
        selection_penalty=1e-3,
        lookup_factor=1.0,
        h3_state=length,
        sweep=Sweep(widths=(64, 128, 256, 512), lrs=(1e-4, 4.64e-4, 2.15e-3, 1e-2), steps=64 * batches),
        recall=RecallConfig(
            vocab_size=8192, lengths=(length,), pairs=(pairs,), train_examples=100_000, test_examples=3000, shuffle=False
        ),
        train=Training(
            steps=64 * batches, batch_size=batch_size, lr=2.15e-3, weight_decay=0.1, warmup=0.0, clip_norm=0.0,
            validate_every=batches,
        ),
    )  # fmt: skip


class LookupLanguageModelling(LanguageModelling):
    """Language modelling that also trains on the modules' auxiliary losses, and leaves them out of what it reports."""

    def step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        with collect_losses() as auxiliary:
            loss, logits = super().step(batch)
        return loss + sum(auxiliary.values()), logits

    def reported_loss(self, loss: Tensor, outputs: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch[:, 1:].flatten()) if self.training else loss


class ZoologySystem(System[ZoologyConfig]):
    """See card.toml."""

    name = "zoology"
    Config = ZoologyConfig
    shared = ("data", "table", "recall")
    task = AssociativeRecall
    threads = 1
    size_field = "mlp_hidden"
    quick = {
        "train.steps": 24,
        "train.validate_every": 12,
        "recall.train_examples": 1536,
        "recall.test_examples": 256,
        "sweep.steps": 12,
        "sweep.widths": (16, 32),
        "sweep.lrs": (5e-3,),
        "data.max_bytes": 1_500_000,
    }
    presets = {
        "figure_2_64": _figure_2(64, 4, 512),
        "figure_2_128": _figure_2(128, 8, 512),
        "figure_2_256": _figure_2(256, 16, 256),
        "figure_2_512": _figure_2(512, 64, 128),
    }

    def task_for(self, spec: Mapping[str, Any]) -> type[Task]:
        return LookupLanguageModelling if "tokenizer" in spec else AssociativeRecall

    def trials_for(self, spec: Mapping[str, Any]) -> Mapping[str, Trial[Any]]:
        return {} if "tokenizer" in spec else self.trials

    def load_data(self, config: ZoologyConfig, source: Source) -> Data:
        """MQAR, or by the file: .npz and .jsonl with inputs and labels are recall examples, all else is text."""
        if source.data is None or is_recall_file(source.data):
            return read_recall(config.recall, source)
        return read_text(config.data, source)

    def arms(self, config: ZoologyConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        on_text = "tokenizer" in spec
        if on_text:
            config = override(config, untouched(config, _TEXT))
        names = list(_mixers(config, spec["window"], on_text=on_text))
        if unknown := set(config.sweep.mixers) - set(names):
            raise UserError(f"--sweep.mixers {min(unknown)}: there is no such arm; there are {', '.join(names)}")
        return {name: _builder(name, config, spec["vocab_size"], spec["window"], on_text=on_text) for name in names}

    def stages(self, arm: str, model: nn.Module, config: ZoologyConfig, data: Data) -> list[Callable[[], Stage]]:
        if "tokenizer" in data.spec:
            train = override(config, untouched(config, _TEXT)).train
            return [lambda: Stage(LookupLanguageModelling(model, train, data))]
        factor = config.lookup_factor if arm in _LOOKUP_ARMS else 1.0
        train = replace(
            config.train, steps=round(config.train.steps * factor), epochs=round(config.train.epochs * factor)
        )
        return [lambda: Stage(AssociativeRecall(model, train, data, stop_above=config.stop_above))]

    def measure(self, arm: str, task: Task, config: ZoologyConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        assert isinstance(model, LanguageModel)
        measured: dict[str, float] = {}
        if (size := model.state_size(data.spec["window"])) is not None:
            measured["state_bytes"] = float(size)
        if isinstance(data, TextData):
            bigrams = Bigrams(data.splits["train"], data.spec["vocab_size"])
            batches = islice(data.test(task.train_config.batch_size), _BATCHES)
            return measured | recall_losses(model, batches, bigrams, config.rare_bigram)
        assert isinstance(data, RecallData)
        if data.spec["generated"]:
            measured["guess"] = statistics.fmean(1 / pairs for pairs in data.spec["pairs"])
        if any(isinstance(module, LookupGate) for module in model.modules()):
            measured |= lookup_use(model, data, task.train_config.batch_size)
        return measured

    @staticmethod
    def _width_sweep(config: ZoologyConfig, seed: int) -> dict[str, float]:
        data = read_recall(config.recall, Source())
        measured = {}
        for arm in config.sweep.mixers:
            for width in config.sweep.widths:
                build = _builder(arm, replace(config, width=width), config.recall.vocab_size, data.spec["window"])
                cell = train_cell(build, data, config.train, config.sweep, seed)
                measured[f"{arm}_{width}_accuracy"] = cell.accuracy
                measured[f"{arm}_{width}_lr"] = cell.lr
                measured[f"{arm}_{width}_state_bytes"] = float(cell.state_bytes or 0)
        return measured

    trials = {"width_sweep": Trial(_width_sweep, "recall against width", seeds=1)}

    def claims(self, config: ZoologyConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        """On MQAR only: the user's own examples have other difficulties, and text has no queries."""
        if not any("guess" in cell["metrics"] for cell in results.cells):
            return {}
        hybrid, baseconv = results.metric("hybrid", "accuracy"), results.metric("baseconv", "accuracy")
        faster = results.difference("hybrid", "attention", "accuracy")
        separation, coverage = results.metric("gated", "gate_separation"), results.metric("gated", "query_coverage")
        accuracy = results.metric("gated", "accuracy")
        # "In every seed" is about the seeds that were run and not about their mean; one seed decides nothing.
        every = len(accuracy) > 1
        claims: dict[str, Effect | list[Effect]] = {}
        if hybrid and baseconv:
            claims["recall_gap"] = [
                Effect(hybrid, ">", 0.95, "test accuracy, convolution then attention"),
                Effect(baseconv, "<", 0.5, "test accuracy, BaseConv"),
            ]
        if faster:
            claims["short_convolution"] = Effect(
                faster, ">", what="test accuracy, convolution then attention - attention"
            )
        if separation:
            claims["lookup_gate"] = Effect(separation, ">", 0.3, "mean gate at queries - elsewhere, every seed", every)
            claims["lookup_coverage"] = Effect(coverage, ">", 0.95, "share of queries selected, every seed", every)
            median = statistics.median(accuracy)
            claims["lookup_accuracy"] = Effect([median], ">", 0.95, "test accuracy, median of the seeds", every)
        return claims

    def figures(self, config: ZoologyConfig, results: Results) -> dict[str, Figure]:
        if not results.trials.get("width_sweep"):
            return {}
        return {"Recall against width and state size": sweep_figure(results, config.sweep)}


def _mixers(config: ZoologyConfig, length: int, *, on_text: bool) -> dict[str, list[dict[str, Any]]]:
    """The mixers of every arm, which its layers take in turn."""
    short = {"name": "BaseConv", "l_max": length, "kernel_size": 3}
    long = {"name": "BaseConv", "l_max": length, "kernel_size": -1}
    attention = {"name": "MHA", "num_heads": config.num_heads, "dropout": config.attention_dropout}
    lookups = attention | {
        "name": "SigmoidLookups",
        "selection_penalty": config.selection_penalty,
        "n_lookups": config.num_lookups or None,
        # A language model must not be told by a later token whether to look something up.
        "scope": "prefix" if on_text else "sequence",
    }
    arms = {
        "gated": [short, lookups | {"selection": config.selection}],
        "ungated": [short, lookups | {"selection": None}],
        "hybrid": [short, attention],
        "attention": [attention],
        "baseconv": [short, long],
        "baseconv_ungated": [short | {"gated": False}, long | {"gated": False}],
        "hyena": [{"name": "Hyena", "l_max": length}],
        "h3": [{"name": "H3", "d_state": config.h3_state}],
        "rwkv": [{"name": "RWKVTimeMixer", "n_layer": max(config.depth, 2)}],
    }
    if config.mixer:
        arms["own"] = [{"name": _own_mixer(config.mixer)}]
    return arms


def _builder(
    arm: str, config: ZoologyConfig, vocab_size: int, length: int, *, on_text: bool = False
) -> Callable[[], LanguageModel]:
    mixers = _mixers(config, length, on_text=on_text)[arm]
    return lambda: LanguageModel(
        vocab_size,
        config.width,
        config.depth,
        mixers=mixers,
        mlp_hidden=config.mlp_hidden if on_text else 0,
        # Only attention cannot tell positions apart by itself; a convolution before it does.
        max_position_embeddings=length if arm == "attention" else 0,
    )


def _own_mixer(path: str) -> str:
    """Import the user's mixer and make it known under its path."""
    module, _, name = path.rpartition(".")
    if path not in MIXERS:
        try:
            register_mixer(path, getattr(import_module(module), name))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f'--mixer {path}: must be "module.Class" of an importable module ({error})') from None
    return path


@torch.no_grad()
def lookup_use(model: LanguageModel, data: RecallData, batch_size: int) -> dict[str, float]:
    """Where the last look-up gate of a model opens, on the test split.

    Returns:
        gate_mean, gate_at_queries, gate_elsewhere (before the selection of evaluation), gate_separation (their
        difference), and query_coverage, the share of queries that are selected.
    """
    gate = [module for module in model.modules() if isinstance(module, LookupGate)][-1]
    values, selected, asked = [], [], []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        values.append(gate.before_selection(args[0]).flatten())
        selected.append(output.ne(0).flatten())

    device = next(model.parameters()).device
    handle = gate.register_forward_hook(keep)
    for batch in data.test(batch_size):
        model(batch.inputs.to(device))
        asked.append((batch.labels != UNLABELLED).flatten().to(device))
    handle.remove()
    value, query = torch.cat(values), torch.cat(asked)
    at, elsewhere = float(value[query].mean()), float(value[~query].mean())
    return {
        "gate_mean": float(value.mean()),
        "gate_at_queries": at,
        "gate_elsewhere": elsewhere,
        "gate_separation": at - elsewhere,
        "query_coverage": float(torch.cat(selected)[query].float().mean()),
    }


SYSTEM = ZoologySystem()
