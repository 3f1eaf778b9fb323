"""Codebooks against the same network without them: on a finite state machine, or on a person's own text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import nn
from torch.nn import functional as F

from penstock.data.base import Data, Source
from penstock.data.fsm import FSMConfig, FSMData, machine_of
from penstock.data.text import TextConfig, read_documents, read_text
from penstock.errors import UserError
from penstock.lab.results import Effect, Results
from penstock.lab.system import Stage, System, Trial
from penstock.nn.code_reading import find_codebooks, kmeans_codebooks
from penstock.nn.codebook import CodebookLayer, Similarity
from penstock.systems.sequence.codebook.model import CodebookLM, Place
from penstock.systems.sequence.codebook.probes import (
    StateCodes,
    codes_of_states,
    forcing,
    purity_of_states,
    sampled_transitions,
    transition_mass,
    whole_states,
)
from penstock.tasks.base import Task, Training
from penstock.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Samples by which codes start where k-means puts them (the authors' number).
_KMEANS_EXAMPLES = 1000


@dataclass
class CodebookConfig:
    """A transformer of two layers that learns a small state machine in a minute, with one codebook."""

    width: int = 32
    """Width of the residual stream."""
    depth: int = 2
    """Blocks."""
    num_heads: int = 4
    """Attention heads; must divide the width."""
    mlp_hidden: int = 128
    """Hidden width of the MLPs."""
    rotary_fraction: float = 1.0
    """Share of each head's channels that rotate with the position (published models: a quarter; heads are larger there)."""
    codebook_at: tuple[Place, ...] = ("mlp",)
    """Where in a block: attn_preproj, attn, qkv, mlp_mid, mlp, attn_plus_mlp, transformer_block; several may be given."""
    codebook_layers: tuple[int, ...] = (-1,)
    """Blocks that have codebooks, from the end if negative; none given: all."""
    by_head: tuple[Place, ...] = ("attn_preproj",)
    """Places where each head's channels have a codebook of their own."""
    num_codes: int = 100
    """Codes in a codebook."""
    top_k: int = 1
    """Codes chosen for each token."""
    similarity: Similarity = "inner_product"
    """By which codes are chosen."""
    loss: str = "aeloss"
    """What trains the codes: base, aeloss, vqvae-BETA or fullaeloss-BETA."""
    replace_after: int = 0
    """Training steps after which codes unused since are given random inputs; 0: never."""
    replace_noise: float = 0.0
    """Gaussian noise on those, as a share of their norm."""
    kmeans_init: bool = False
    """Whether codes start at the centres of a k-means of the activations."""
    model_lr_factor: float = 1.0
    """Learning rate of everything but the codebooks, as a share of theirs."""
    fsm: FSMConfig = field(default_factory=FSMConfig)
    data: TextConfig = field(default_factory=TextConfig)
    """Your own text."""
    train: Training = field(
        default_factory=lambda: Training(steps=3000, batch_size=64, lr=3e-3, schedule="constant", validate_batches=8)
    )


#: The authors' own settings: their state machine, and Pythia-70M's size for a text of one's own (with its tokenizer).
PUBLISHED = {
    "tokfsm": CodebookConfig(
        width=128,
        depth=4,
        mlp_hidden=512,
        rotary_fraction=0.25,
        codebook_at=("attn_preproj", "mlp"),
        codebook_layers=(),
        num_codes=1000,
        fsm=FSMConfig(states=100, edges=10, base=10, window=127, sequences=1_000_000),
        train=Training(steps=20_000, batch_size=512, lr=1e-3, schedule="constant"),
    ),
    "pythia_70m": CodebookConfig(
        width=512,
        depth=6,
        num_heads=8,
        mlp_hidden=2048,
        rotary_fraction=0.25,
        codebook_at=("attn_preproj",),
        codebook_layers=(),
        num_codes=10_000,
        top_k=8,
        data=TextConfig(window=512, tokenizer="EleutherAI/pythia-70m-deduped"),
        train=Training(steps=15_000, batch_size=24, lr=5e-4, schedule="constant"),
    ),
}


class CodebookModelling(LanguageModelling):
    """Language modelling in which the codebooks may learn at another rate than the rest; the loss is the text's alone."""

    model_lr_factor = 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        codebooks = {id(p) for m in self.model.modules() if isinstance(m, CodebookLayer) for p in m.parameters()}
        groups = []
        for group in super().parameter_groups():
            own = [p for p in group["params"] if id(p) in codebooks]
            rest = [p for p in group["params"] if id(p) not in codebooks]
            groups += [group | {"params": own}] if own else []
            rate = self.train_config.lr * self.model_lr_factor
            groups += [group | {"params": rest, "lr": rate}] if rest else []
        return groups

    def figures(self) -> dict[str, Figure]:
        codes = _state_codes(self.model, self.data)
        return {} if codes is None else {"Which code is in which state": _codes_figure(codes)}

    @classmethod
    def predict_file(cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 64) -> pl.DataFrame:
        """How surprising each document is; of a state machine's, one line of digits each, also its valid transitions."""
        machine = machine_of(spec)
        if machine is None:
            return super().predict_file(model, spec, path, batch_size)
        rows = []
        lines = [line.strip() for text in read_documents(path, spec["column"]) for line in text.splitlines()]
        for number, line in enumerate(lines, 1):
            wrong = next(
                (place for place, c in enumerate(line) if not (c.isascii() and c.isdigit() and int(c) < machine.base)),
                None,
            )
            if wrong is not None or len(line) < 2 * machine.num_digits:
                problem = (
                    "is too short for a transition"
                    if wrong is None
                    else f"column {wrong + 1}: {line[wrong]!r} is no digit of base {machine.base}"
                )
                raise UserError(
                    f"{path}: line {number}: {problem}; give one walk a line, {machine.num_digits} digits a state"
                )
            tokens = torch.tensor([[machine.start, *map(int, line)]])
            with torch.no_grad():
                loss = float(F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:]))
            valid = machine.valid(machine.read(tokens))
            rows.append(
                {"walk": number, "tokens": len(line), "loss": loss, "valid_transitions": float(valid.float().mean())}
            )
        return pl.DataFrame(rows)


class CodebookSystem(System[CodebookConfig]):
    """See card.toml."""

    name = "codebook"
    Config = CodebookConfig
    shared = ("data", "table", "fsm")
    task = CodebookModelling
    threads = 1
    size_field = "mlp_hidden"
    presets = PUBLISHED
    quick = {"train.steps": 150, "fsm.test_sequences": 512}

    def load_data(self, config: CodebookConfig, source: Source) -> Data:
        return FSMData(config.fsm) if source == Source() else read_text(config.data, source)

    def arms(self, config: CodebookConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        def builder(places: Sequence[Place], layers: Sequence[int]) -> Callable[[], nn.Module]:
            return lambda: self._build(config, spec["vocab_size"], places, layers)

        return {
            "gated": builder(config.codebook_at, config.codebook_layers),
            "ungated": builder((), ()),
            "everywhere": builder(("attn_preproj", "mlp"), ()),
            "stream": builder(("transformer_block",), (-1,)),
        }

    @staticmethod
    def _build(config: CodebookConfig, vocab_size: int, places: Sequence[Place], layers: Sequence[int]) -> CodebookLM:
        return CodebookLM(
            vocab_size,
            config.width,
            config.depth,
            config.num_heads,
            intermediate_size=config.mlp_hidden,
            codebook_at=places,
            codebook_type=["group" if place in config.by_head else "vanilla" for place in places],
            num_codebooks=[-1 if place in config.by_head else 1 for place in places],
            num_codes=config.num_codes,
            top_k=config.top_k,
            codebook_layers=layers or "all",
            similarity=config.similarity,
            loss=config.loss,
            replace_after=config.replace_after,
            replace_noise=config.replace_noise,
            rotary_fraction=config.rotary_fraction,
        )

    def stages(self, arm: str, model: nn.Module, config: CodebookConfig, data: Data) -> list[Callable[[], Stage]]:
        def train() -> Stage:
            if config.kmeans_init and _has_codebooks(model):
                batches = data.train(config.train.batch_size, 0)
                kmeans_codebooks(model, (batch[:, :-1] for batch in batches), examples=_KMEANS_EXAMPLES)
            task = CodebookModelling(model, config.train, data)
            task.model_lr_factor = config.model_lr_factor
            return Stage(task)

        return [train]

    @torch.no_grad()
    def measure(self, arm: str, task: Task, config: CodebookConfig, data: Data, seed: int) -> dict[str, float]:
        model = task.model
        assert isinstance(model, CodebookLM)
        measured: dict[str, float] = {}
        if _has_codebooks(model):
            measured |= _bottleneck(model, data, config.train.batch_size)
        if isinstance(data, FSMData):
            measured["transition_mass"] = transition_mass(model, data.machine)
            measured |= sampled_transitions(model, data.machine, data.spec["window"], seed)
            codes = _state_codes(model, data)
            if codes is not None:
                walks = whole_states(data.splits["test"].long(), data.machine)
                measured |= codes.summary() | {"purity": purity_of_states(model, data.machine)}
                measured |= forcing(model, data.machine, walks, codes, seed)
        return measured

    @staticmethod
    def _gradient(config: CodebookConfig, seed: int) -> dict[str, float]:
        return {loss: straight_through_error(loss, seed) for loss in ("base", "aeloss")}

    @staticmethod
    def _more_codes(config: CodebookConfig, seed: int) -> dict[str, float]:
        return {f"k{top_k}": reconstruction_error(top_k, seed) for top_k in (1, 4)}

    trials = {
        "gradient": Trial(_gradient, "the input's gradient through the bottleneck"),
        "more_codes": Trial(_more_codes, "fixed vectors described by one code and by several", seeds=5),
    }

    def claims(self, config: CodebookConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        claims: dict[str, Effect | list[Effect]] = {}
        if lost := results.difference("ungated", "gated", "transition_mass"):
            claims["modest_cost"] = Effect(lost, "<", 0.05, "mass on valid next states, ungated - gated")
        if gained := results.metric("gated", "forced_minus_random"):
            claims["forcing"] = Effect(gained, ">", 0.07, "mass on valid first digits, forced - random code")
        gradient, more = "gradient", "more_codes"
        claims["gradient"] = [
            Effect(
                results.trial(gradient, loss), "<", 1e-12, f"largest difference of the gradients, {loss}", exact=True
            )
            for loss in ("base", "aeloss")
        ]
        several = zip(results.trial(more, "k4"), results.trial(more, "k1"), strict=True)
        claims["more_codes"] = Effect([a - b for a, b in several], "<", what="reconstruction error, k = 4 minus k = 1")
        return claims


def straight_through_error(loss: str, seed: int) -> float:
    """Largest difference between the input's gradient and the output's, taken through the layer norm alone; float64."""
    torch.manual_seed(seed)
    layer = CodebookLayer(16, 40, top_k=3, loss=loss).double()
    nn.init.normal_(layer.ln.weight)
    x = torch.randn(4, 8, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    (through,) = torch.autograd.grad(layer(x), x, upstream)
    (alone,) = torch.autograd.grad(layer.ln(x), x, upstream)
    return float((through - alone).abs().max())


def reconstruction_error(
    top_k: int, seed: int, *, number: int = 1024, width: int = 16, num_codes: int = 64, steps: int = 300
) -> float:
    """Mean of ||y - u||^2 after training nothing but the codes on fixed vectors, chosen by cosine.

    The vectors are sums of four of 32 random directions, layer-normalised.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, width, generator=generator)
    active = torch.rand(number, 32, generator=generator).topk(4).indices
    x = directions[active].sum(1)[None]
    torch.manual_seed(seed)
    layer = CodebookLayer(width, num_codes, top_k=top_k, similarity="cosine", loss="aeloss")
    optimizer = torch.optim.Adam(layer.codebook.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        y = layer(x)
        y.backward(torch.zeros_like(y))  # what is left is the codebook's own loss
        optimizer.step()
    layer.metrics.reset()
    with torch.no_grad():
        layer(x)
    return layer.metrics.mse


def _has_codebooks(model: nn.Module) -> bool:
    return any(isinstance(module, CodebookLayer) for module in model.modules())


def _bottleneck(model: CodebookLM, data: Data, batch_size: int) -> dict[str, float]:
    """Error, norms and share of dead codes of all codebooks over the test split, mean over codebooks."""
    layers = list(find_codebooks(model).values())
    for layer in layers:
        layer.metrics.reset()
    for batch in data.test(batch_size):
        model(batch[:, :-1])
    names = {
        "mse": "codebook_mse",
        "input_norm": "input_norm",
        "output_norm": "output_norm",
        "dead_share": "dead_codes",
    }
    return {ours: sum(getattr(x.metrics, name) for x in layers) / len(layers) for name, ours in names.items()}


def _state_codes(model: nn.Module, data: Data) -> StateCodes | None:
    """The codes of the machine's states; ``None`` for text and for a model without codebooks."""
    if not isinstance(data, FSMData) or not _has_codebooks(model):
        return None
    assert isinstance(model, CodebookLM)
    return codes_of_states(model, data.machine, whole_states(data.splits["test"].long(), data.machine))


def _codes_figure(codes: StateCodes) -> Figure:
    from matplotlib.figure import Figure

    used = codes.counts.sum(0).argsort(descending=True)[:40]
    share = codes.counts / codes.counts.sum(1, keepdim=True)
    order = codes.modal.argsort(stable=True)
    figure = Figure(figsize=(7, 0.8 + 0.14 * len(order)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share[order][:, used], aspect="auto", vmin=0, vmax=1, cmap="Blues")
    axes.set(xticks=range(len(used)), yticks=range(len(order)), yticklabels=order.tolist())
    axes.set_xticklabels(used.tolist(), rotation=90, fontsize=6)
    axes.set(xlabel="code (most used first)", ylabel="state", title="share of a state's occurrences with each code")
    figure.colorbar(image)
    return figure


SYSTEM = CodebookSystem()
