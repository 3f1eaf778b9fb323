"""Pictures of the report: each drawn for light and for dark paper and embedded as a data URI; nothing is fetched."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogFormatterMathtext, MaxNLocator
from matplotlib.typing import RcKeyType
from numpy.typing import NDArray
from PIL import Image

#: A vector picture of more bytes than this is embedded as pixels.
_MOST_VECTOR_BYTES = 150_000
#: Arms are told apart by colour and by dash, as (offset, dashes) in points.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Theme:
    """Colours of the page and of what is drawn on it.

    Attributes:
        paper, card: behind text, and behind pictures and tables.
        ink, muted, line: of text, of labels, of rules and axes.
        accent: of bars and links.
        good, bad, undecided: of the verdicts holds, does not hold, undecided.
        cycle: of arms, in order.
        scale: of heat maps, from closed to open; closed is near the paper.
        images: matplotlib's colour map for figures that name none.
    """

    paper: str
    card: str
    ink: str
    muted: str
    line: str
    accent: str
    good: str
    bad: str
    undecided: str
    cycle: tuple[str, ...]
    scale: tuple[str, ...]
    images: str

    @cached_property
    def colormap(self) -> Colormap:
        return LinearSegmentedColormap.from_list("openness", self.scale).with_extremes(bad=self.line)

    def style(self) -> dict[RcKeyType, Any]:
        """Matplotlib's settings."""
        return {
            "savefig.transparent": True,
            "text.color": self.ink,
            "axes.labelcolor": self.muted,
            "axes.edgecolor": self.line,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=self.cycle),
            "axes.axisbelow": True,
            "xtick.color": self.line,
            "ytick.color": self.line,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "grid.color": self.line,
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "image.cmap": self.images,
            "image.interpolation": "none",
            # Measured with the font that matplotlib ships; shown with the reader's own, which may know more scripts.
            "font.sans-serif": ["Segoe UI", "Helvetica Neue", "DejaVu Sans", "Arial", "sans-serif"],
            "svg.fonttype": "none",
            # The same run gives the same file, byte for byte.
            "svg.hashsalt": "penstock",
            # Names come from the user's data: a column called "$a_b" is no formula.
            "text.parse_math": False,
        }


LIGHT = Theme(
    paper="#f7f7f4",
    card="#ffffff",
    ink="#1b2530",
    muted="#566272",
    line="#dcdfe3",
    accent="#0b6e99",
    good="#1a7340",
    bad="#b3261e",
    undecided="#8a5a00",
    cycle=("#0b6e99", "#cf5410", "#2f8a4c", "#8a4fb0", "#a87900", "#c2417a", "#4d5b6a", "#12857d"),
    scale=("#f4f6f8", "#bfdcea", "#6db3d2", "#1f7fae", "#084b73", "#052c47"),
    images="Blues",
)
DARK = Theme(
    paper="#0f151b",
    card="#171f27",
    ink="#e7ecf1",
    muted="#9dabb9",
    line="#303c48",
    accent="#5cb9e2",
    good="#6fcf97",
    bad="#ff8f85",
    undecided="#f0c05a",
    cycle=("#5cb9e2", "#f2935c", "#6cc98a", "#c39be0", "#e0b84d", "#f08ab5", "#aab7c5", "#5fd6cc"),
    scale=("#1d2731", "#17435c", "#1f6f97", "#45a4d0", "#9ad6f0", "#f0fbff"),
    images="Blues_r",
)


@dataclass(frozen=True)
class Picture:
    """One picture as two data URIs, and its size in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int


def pictures(draw: Callable[[], Mapping[str, Figure]]) -> dict[str, Picture]:
    """Figures by title, as pictures.

    Args:
        draw: makes the figures; it is called once a theme, with matplotlib set up for it.
    """
    light, dark = _drawn(draw, LIGHT), _drawn(draw, DARK)
    return {title: Picture(uri, dark[title][0], *size) for title, (uri, size) in light.items()}


def picture(draw: Callable[[], Figure]) -> Picture:
    """One figure as a picture; see `pictures`."""
    return pictures(lambda: {"": draw()})[""]


def _drawn(draw: Callable[[], Mapping[str, Figure]], theme: Theme) -> dict[str, tuple[str, tuple[int, int]]]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A reader's own settings could ask for LaTeX, or for colours that do not go with the page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(theme.style())
        # The reader's browser has glyphs that the font used for measuring lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        return {printable(title): _embedded(figure) for title, figure in draw().items()}


def _embedded(figure: Figure) -> tuple[str, tuple[int, int]]:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(LogFormatter())
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    content = printable(text.getvalue()).encode()
    if len(content) <= _MOST_VECTOR_BYTES:
        return data_uri("image/svg+xml", content), (width, height)
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=192)
    return data_uri("image/png", pixels.getvalue()), (width, height)


def tile(values: Values, limits: tuple[float, float]) -> Picture:
    """A heat map with one pixel a value, to be magnified by the page; what is not finite has the colour of rules.

    Args:
        values: (rows, columns).
        limits: the values of the first and of the last colour.
    """
    low, high = limits
    scaled = np.ma.masked_invalid((values - low) / (high - low))
    uris = []
    for theme in (LIGHT, DARK):
        pixels = io.BytesIO()
        Image.fromarray(theme.colormap(scaled, bytes=True)).convert("RGB").save(pixels, "PNG", optimize=True)
        uris.append(data_uri("image/png", pixels.getvalue()))
    return Picture(uris[0], uris[1], values.shape[1], values.shape[0])


def limits(values: Values, *, choice: bool) -> tuple[float, float]:
    """The ends of a heat map's scale: 0 and 1 where all values lie between, else the values' own.

    Args:
        values: of any shape.
        choice: the values share a whole among many entries, so that they go from 0 to the largest.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low >= 0.0 and choice:
        return 0.0, high or 1.0
    if low >= 0.0 and high <= 1.0:
        return 0.0, 1.0
    return low, high if high > low else low + 1.0


@dataclass(frozen=True)
class Curve:
    """One arm's course: steps (N,), and at each the mean and the standard deviation over seeds, (N,)."""

    steps: Values
    mean: Values
    spread: Values


def curve_figure(curves: Sequence[Curve | None]) -> Figure:
    """Curves over the steps of training, with a band where seeds differ.

    Args:
        curves: of the arms, in order; ``None`` for one without this metric, which keeps its colour.
    """
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    for place, curve in enumerate(curves):
        if curve is None:
            continue
        colour = f"C{place % len(LIGHT.cycle)}"
        low, high = curve.mean - curve.spread, curve.mean + curve.spread
        if curve.spread.any():
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.18, linewidth=0)
        marker = "o" if len(curve.steps) < 3 else None
        axes.plot(
            curve.steps, curve.mean, color=colour, linestyle=(0, DASHES[place % len(DASHES)] or None), marker=marker
        )
    means = np.concatenate([curve.mean for curve in curves if curve is not None])
    if means.min() > 0 and means.max() > 100 * means.min():
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    return figure


def printable(text: str) -> str:
    """``text`` with what neither HTML nor XML can hold replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
