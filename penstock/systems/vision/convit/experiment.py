"""ConViT against a plain ViT where images are few, with its gate learned, frozen, closed and open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from penstock.data.base import Data, Source
from penstock.data.images import ImageConfig, ImageData, read_images
from penstock.gates import Table, force
from penstock.lab.results import Effect, Results
from penstock.lab.system import Stage, System, Trial
from penstock.systems.vision.convit.model import GPSA, ConViT, GateMode, PositionalGate, head_table
from penstock.tasks.base import Task, Training
from penstock.tasks.image_classification import ImageClassification, accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class ConViTConfig:
    """ConViT and its twins on few images."""

    patch_size: int = 0
    """Side of a patch in pixels; 0: the smallest above one that leaves at most 196 patches."""
    embed_dim: int = 36
    """Total width, a multiple of num_heads."""
    num_heads: int = 9
    """Heads; a square number."""
    depth: int = 3
    """Blocks."""
    local_up_to_layer: int = 2
    """How many of the blocks have gated positional attention."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLPs as a multiple of embed_dim."""
    locality_strength: float = 1.0
    """How narrowly heads look at the start."""
    use_local_init: bool = True
    """Whether heads start as a convolution."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    digits: int = 150
    """How many of the embedded digits to train on, unless data.train_size says; your own images are all used."""
    data: ImageConfig = field(default_factory=ImageConfig)
    """The images."""
    train: Training = field(
        default_factory=lambda: Training(
            steps=120, batch_size=64, lr=2e-3, schedule="one-cycle", weight_decay=0.01, clip_norm=0.0
        )
    )
    """The training of every arm."""


class HeadPictures(ImageClassification):
    """Image classification that also shows where the positional heads look."""

    def figures(self) -> dict[str, Figure]:
        figures = super().figures()
        if any(isinstance(module, GPSA) for module in self.model.modules()):
            device = next(self.model.parameters()).device
            images = next(iter(self.data.test(64))).images.to(device)
            figures["Where heads look"] = heads_figure(head_table(self.model.eval(), images))
        return figures


class ConViTSystem(System[ConViTConfig]):
    """See card.toml."""

    name = "convit"
    threads = 1
    Config = ConViTConfig
    shared = ("data", "table", "digits")
    task = HeadPictures
    quick: ClassVar[Mapping[str, Any]] = {"train.steps": 60}

    def load_data(self, config: ConViTConfig, source: Source) -> Data:
        return read_images(config.data, source, few=config.digits)

    def arms(self, config: ConViTConfig, spec: Mapping[str, Any]) -> dict[str, Callable[[], nn.Module]]:
        if config.local_up_to_layer < 1:
            raise ValueError(
                f"local_up_to_layer={config.local_up_to_layer} leaves nothing to gate: it must be 1 or more"
            )
        size = (spec["image_size"][0], spec["image_size"][1])
        build = partial(
            ConViT,
            img_size=size,
            patch_size=config.patch_size or _patch_size(size),
            in_chans=spec["channels"],
            num_classes=len(spec["classes"]),
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path_rate,
            local_up_to_layer=config.local_up_to_layer,
            locality_strength=config.locality_strength,
            use_local_init=config.use_local_init,
        )
        modes: tuple[GateMode, ...] = ("closed", "open", "frozen")
        return {
            "gated": build,
            "ungated": partial(build, local_up_to_layer=0),
            **{mode: partial(build, gate=mode) for mode in modes},
        }

    def stages(self, arm: str, model: nn.Module, config: ConViTConfig, data: Data) -> list[Callable[[], Stage]]:
        assert isinstance(data, ImageData)
        return [lambda: Stage(HeadPictures(model, config.train, data, label_smoothing=config.label_smoothing))]

    def measure(self, arm: str, task: Task, config: ConViTConfig, data: Data, seed: int) -> dict[str, float]:
        """Of the gated arm: its test accuracy with all gates closed and open, and the share of position it learned."""
        if arm != "gated":
            return {}
        gates = [module for module in task.model.modules() if isinstance(module, PositionalGate)]
        with torch.no_grad():
            measured = {"positional_share": float(torch.cat([gate() for gate in gates]).mean())}
        for how in ("closed", "open"):
            with force(task.model, how):
                measured[f"accuracy_{how}"] = accuracy(task.model, data.test(256))
        return measured

    @staticmethod
    def _local_init(config: ConViTConfig, seed: int) -> dict[str, float]:
        return local_init_errors(config.locality_strength, seed)

    trials: ClassVar[Mapping[str, Trial[Any]]] = {
        "local_init": Trial(_local_init, "the local initialisation against a 3x3 convolution")
    }

    def claims(self, config: ConViTConfig, results: Results) -> dict[str, Effect | list[Effect]]:
        closed, opened = (results.metric("gated", f"accuracy_{how}") for how in ("closed", "open"))
        share = results.metric("gated", "positional_share")
        # Closing takes the positional branch away, opening the one from content.
        larger = [(o - c) if s > 0.5 else (c - o) for c, o, s in zip(closed, opened, share, strict=True)]
        plain = results.difference("closed", "ungated", "accuracy")
        return {
            "sample_efficiency": [
                Effect(results.difference("gated", "ungated", "accuracy"), ">", 0.08, "accuracy, gated - ungated"),
                Effect(plain, ">", -0.06, "accuracy, closed - ungated"),
                Effect(plain, "<", 0.06, "accuracy, closed - ungated"),
            ],
            "learned_gate": Effect(
                results.difference("gated", "frozen", "accuracy"), ">", what="accuracy, gated - frozen at a half"
            ),
            "leaving_locality": Effect(
                results.difference("gated", "open", "accuracy"), ">", what="accuracy, gated - position alone"
            ),
            "intervention": Effect(larger, ">", what="accuracy without the smaller branch - without the larger"),
            "local_init": [
                Effect(
                    results.trial("local_init", "shift_error"), "<", 1e-12, "layer - shifted image, largest", exact=True
                ),
                Effect(
                    results.trial("local_init", "right_offsets"), ">", 0.999, "heads at their offset, share", exact=True
                ),
            ],
        }


@torch.no_grad()
def local_init_errors(locality_strength: float, seed: int) -> dict[str, float]:
    """How far nine locally initialised heads are from the nine offsets of a 3x3 convolution, in float64.

    Returns:
        ``right_offsets``: the share of (head, query inside the border) whose positional map is largest at the head's
        offset; ``shift_error``: with gates open and a strength of 50, the largest difference between a head's
        channels and the image moved by that offset.
    """
    grid, heads = (6, 7), 9
    rows, columns = grid
    layer = GPSA(2 * heads, heads, locality_strength=locality_strength).double()
    inside = torch.arange(rows * columns).reshape(grid)[1:-1, 1:-1]
    moved = [inside + dy * columns + dx for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    looked_at = layer.positional_map(grid).argmax(-1)
    right = torch.stack([looked_at[p, inside] == place for p, place in enumerate(moved)])

    layer.local_init(50.0)
    nn.init.eye_(layer.proj.weight)
    x_1ND = torch.randn(
        1, rows * columns, 2 * heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    with force(layer, "open"):
        y_NHK = layer(x_1ND, grid)[0].unflatten(-1, (heads, -1))
    x_NHK = x_1ND[0].unflatten(-1, (heads, -1))
    error = max(float((y_NHK[inside, p] - x_NHK[place, p]).abs().max()) for p, place in enumerate(moved))
    return {"right_offsets": float(right.double().mean()), "shift_error": error}


def heads_figure(rows: Table) -> Figure:
    """Each head's centre and reach in patches, one panel a layer, coloured by its gate (1: position alone)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(1 + 2.6 * len(layers), 3), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        heads = [row for row in rows if row["layer"] == layer]
        centres = [[row[axis] for row in heads] for axis in ("x", "y")]
        points = axes.scatter(*centres, c=[row["gate"] for row in heads], vmin=0, vmax=1, cmap="viridis", zorder=3)
        for row in heads:
            if row["span"] > 0:
                axes.add_patch(
                    Circle((row["x"], row["y"]), row["span"] ** 0.5, fill=False, edgecolor="grey", alpha=0.6)
                )
        far = sum(row["nonlocality"] for row in heads) / len(heads)
        axes.set_title(f"{layer}, nonlocality {far:.2f}", fontsize=8)
        axes.axhline(0, lw=0.5, color="grey")
        axes.axvline(0, lw=0.5, color="grey")
        axes.set_aspect("equal", "datalim")
        axes.invert_yaxis()  # rows of patches go down
    figure.colorbar(points, ax=panels, label="gate: share of position")
    return figure


def _patch_size(size: tuple[int, int]) -> int:
    height, width = size
    for side in range(2, min(size) + 1):
        if height % side == 0 and width % side == 0 and height * width // side**2 <= _MOST_PATCHES:
            return side
    raise ValueError(
        f"images of {height}x{width} cannot be cut into at most {_MOST_PATCHES} square patches: "
        "give data.image_size (a rounder number) or patch_size"
    )


#: Where the patch size is chosen for you: as many patches as the published models have (14 x 14).
_MOST_PATCHES = 196

SYSTEM = ConViTSystem()
