"""Watch: stream the statistics of every gate in constant memory, leaving outputs bit-equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from penstock.gates.core import (
    CHOICES,
    Pattern,
    Spec,
    amount,
    attach,
    input_dims,
    named_gates,
    spec_of,
    tensor_of,
    unit_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 20
#: An entry is never open ("dead"), or not used, when no more than this passes.
DEAD = 1e-5
#: How many values are converted to float64 at a time: on a CPU what its caches hold, elsewhere what memory spares.
_CHUNK_CPU, _CHUNK = 2**18, 2**23
_TINY = 1e-300


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@dataclass
class GateStats:
    """Running statistics of one gate; all accumulators are float64 and none grows with the number of calls.

    Values are counted in the gate's own units; shares and the histogram are over its range mapped to [0, 1].
    Variance is split: *between inputs* (each unit over the samples and positions it saw) and *between units*
    (the units' means). A gate whose share of variance from the input is near zero is a constant in disguise.

    Attributes:
        spec: how the values are read.
        calls: how many calls were counted.
        inputs: how many values each unit has had.
        static: whether no call depended on an input.
        merged: whether the number of units followed the input (a map over tokens); all are then counted as one.
        shape: of the units.
        mean, squares: of each unit, and its summed squared deviation, (units,).
        peak: the most that each unit ever let pass, (units,).
        load: how many inputs used each entry, (units,); only of gates that choose.
        histogram: counts, (20,).
        entropy, effective: sums over rows of the entropy and of the effective number of open entries, ().
        rows: how many rows these were.
    """

    spec: Spec
    calls: int = 0
    inputs: int = 0
    static: bool = True
    merged: bool = False
    shape: tuple[int, ...] = ()
    mean: Tensor = field(default_factory=lambda: _zeros(0))
    squares: Tensor = field(default_factory=lambda: _zeros(0))
    peak: Tensor = field(default_factory=lambda: _zeros(0))
    load: Tensor = field(default_factory=lambda: _zeros(0))
    histogram: Tensor = field(default_factory=lambda: _zeros(BINS))
    entropy: Tensor = field(default_factory=_zeros)
    effective: Tensor = field(default_factory=_zeros)
    rows: int = 0

    def update(self, values: Tensor, leading: int) -> None:
        """Add one call's values, whose first ``leading`` axes are inputs and the rest units; no values, no call."""
        if not values.numel():
            return
        units = tuple(values.shape[leading:])
        flat = values.detach().reshape(-1, math.prod(units))
        if not self.calls:
            self._start(units, values.device)
        elif units != self.shape:
            self._merge_units()
        self.calls += 1
        self.static &= leading == 0
        entries = values.shape[-1] if self.spec.kind in CHOICES else flat.shape[1]
        chunk = _CHUNK_CPU if flat.device.type == "cpu" else _CHUNK
        for part in flat.split(max(chunk // flat.shape[1], 1)):
            self._add(part.double(), entries)

    def _start(self, units: tuple[int, ...], device: torch.device) -> None:
        self.shape = units
        self.mean, self.squares, self.peak, self.load = _zeros(4, math.prod(units)).to(device)
        self.histogram = self.histogram.to(device)
        self.entropy, self.effective = self.entropy.to(device), self.effective.to(device)

    def _merge_units(self) -> None:
        mean = self.mean.mean(0, keepdim=True)
        self.squares = (self.squares + self.inputs * (self.mean - mean).square()).sum(0, keepdim=True)
        self.inputs *= self.mean.numel()
        self.mean, self.peak, self.load = mean, self.peak.amax(0, keepdim=True), self.load.sum(0, keepdim=True)
        self.shape, self.merged = (), True

    def _add(self, x: Tensor, entries: int) -> None:
        units = self.mean.numel()
        self._welford(x.reshape(-1, units))
        passing = amount(self.spec, x)
        self.peak = torch.maximum(self.peak, passing.reshape(-1, units).amax(0))
        if self.spec.kind in CHOICES:
            self.load = self.load + (passing > DEAD).reshape(-1, units).sum(0)
        # Unsigned, because a gate that has gone to NaN must not make the count fail.
        bins = (unit_interval(self.spec, x) * BINS).clamp_(0, BINS - 1).to(torch.uint8)
        self.histogram = self.histogram + torch.bincount(bins.flatten(), minlength=BINS)
        self._count_open(passing.reshape(-1, entries))

    def _welford(self, x: Tensor) -> None:
        count, total = x.shape[0], self.inputs + x.shape[0]
        mean = x.sum(0) / count
        squares = (x - mean).square_().sum(0)
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.inputs * count / total)
        self.inputs = total

    def _count_open(self, rows: Tensor) -> None:
        self.rows += rows.shape[0]
        total = rows.sum(-1)
        if self.spec.kind in CHOICES:
            weights = rows if self.spec.kind == "simplex" else rows / total.clamp_min(_TINY)[:, None]
            entropy = torch.special.entr(weights.clamp_min(0)).sum(-1)
            self.entropy = self.entropy + entropy.sum()
        if self.spec.kind == "simplex":
            effective = entropy.exp()
        else:
            effective = total.square() / torch.linalg.vector_norm(rows, dim=-1).square().clamp_min(_TINY)
        self.effective = self.effective + effective.sum()

    @property
    def unit_means(self) -> Tensor:
        """Each unit's mean, in the shape of the gate's unit axes, float64."""
        return self.mean.reshape(self.shape)

    def summary(self) -> dict[str, Any]:
        """The statistics as plain numbers.

        Returns a dictionary with: passes, kind, calls, inputs, units; mean, std (in the gate's own values);
        below_05, above_95 (share of values, range mapped to 0..1); from_input (share of the variance that comes
        from the input, 0..1; ``None`` without variance, for a static gate, or where the units varied in number);
        effective (mean effective number of open entries: exp(entropy) of a simplex, else (sum |v|)^2 / sum v^2);
        dead (entries that never let more than 1e-5 pass); static; unit_means; histogram (20 shares). Choices add
        entropy (nats, mean over inputs), load (share of inputs that used each entry), load_cv (its coefficient of
        variation) and unused (share of entries never used).
        """
        if not self.calls:
            return {"passes": self.spec.passes, "kind": self.spec.kind, "calls": 0}
        within = float(self.squares.mean()) / self.inputs
        total = within + float(self.mean.var(correction=0))
        histogram = self.histogram / self.histogram.sum()
        summary: dict[str, Any] = {
            "passes": self.spec.passes,
            "kind": self.spec.kind,
            "calls": self.calls,
            "inputs": self.inputs,
            "units": self.mean.numel(),
            "mean": float(self.mean.mean()),
            "std": math.sqrt(total),
            "below_05": float(histogram[0]),
            "above_95": float(histogram[-1]),
            "from_input": None if self.static or self.merged or total < 1e-24 else within / total,
            "effective": float(self.effective) / self.rows,
            "dead": int((self.peak < DEAD).sum()),
            "static": self.static,
            "unit_means": self.mean.tolist(),
            "histogram": histogram.tolist(),
        }
        if self.spec.kind in CHOICES:
            load = self.load / self.inputs
            summary |= {
                "entropy": float(self.entropy) / self.rows,
                "load": load.tolist(),
                "load_cv": float(load.std(correction=0) / load.mean().clamp_min(_TINY)),
                "unused": float((load == 0).double().mean()),
            }
        return summary


class Table(list[dict[str, Any]]):
    """Rows as dictionaries that print as an aligned table."""

    def __str__(self) -> str:
        if not self:
            return "(empty)"
        head = list(dict.fromkeys(key for row in self for key in row))
        cells = [head, *([_cell(row.get(key)) for key in head] for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        )
        return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class WatchLog:
    """What `watch` saw; usable while it still watches and after."""

    def __init__(self, model: nn.Module, gates: dict[str, nn.Module], keep: str, every: int) -> None:
        self._model = model
        self._gates = gates
        self._keep = keep
        self._every = every
        self._undo: list[Callable[[], None]] = []
        self._backward = False
        self._stats = {name: GateStats(_spec(module)) for name, module in gates.items()}
        self._values: dict[str, list[Tensor]] = {name: [] for name in gates}
        self._dtypes: dict[str, torch.dtype] = {}
        self._calls = dict.fromkeys(gates, 0)
        self._ungraded: dict[Tensor, str] = {
            parameter: f"{name}.{own}" if name else own
            for name, gate in gates.items()
            for own, parameter in gate.named_parameters()
            if parameter.requires_grad
        }

    def __enter__(self) -> WatchLog:
        if self._undo:
            raise RuntimeError("this watch is open already")
        for name, module in self._gates.items():
            self._undo.append(attach(module, self._hook(name)))
        for parameter in self._model.parameters():
            # Of other parameters too: a gate whose values were detached shows in nothing but their having gradients.
            if parameter.requires_grad:
                self._undo.append(parameter.register_hook(partial(self._graded, parameter)).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def _hook(self, name: str) -> Callable[..., None]:
        stats, kept = self._stats[name], self._values[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._calls[name] += 1
            if (self._calls[name] - 1) % self._every:
                return
            # What is kept must be of use outside inference mode too.
            with torch.inference_mode(False), torch.no_grad():
                values = tensor_of(stats.spec.read(output)).detach()
                stats.update(values, input_dims(stats.spec, (args, kwargs), values))
                self._dtypes[name] = values.dtype
                if self._keep == "values":
                    kept.append(values.clone())

        return torch.compiler.disable(hook)  # The statistics stay in Python, also when the model is compiled.

    def _graded(self, parameter: Tensor, gradient: Tensor) -> None:
        self._backward = True
        if parameter in self._ungraded and bool(gradient.any()):
            del self._ungraded[parameter]

    def __getitem__(self, name: str) -> GateStats:
        return self._stats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """One summary a gate, by dotted name; see `GateStats.summary`."""
        return {name: stats.summary() for name, stats in self._stats.items()}

    def table(self) -> Table:
        """One row a gate that was called; prints as a table."""
        columns = (
            *("kind", "passes", "mean", "std", "below_05", "above_95", "from_input", "effective", "dead"),
            *("entropy", "load_cv", "unused"),
        )
        seen = {name: summary for name, summary in self.to_dict().items() if summary["calls"]}
        used = [c for c in columns if any(c in s for s in seen.values())]
        return Table({"gate": name or "(model)"} | {c: s.get(c) for c in used} for name, s in seen.items())

    def mean(self) -> dict[str, Tensor]:
        """Each gate's mean per unit in the gate's own dtype, ready for ``force(model, log.mean())``."""
        return {name: self._stats[name].unit_means.to(dtype) for name, dtype in self._dtypes.items()}

    def values(self) -> dict[str, list[Tensor]]:
        """Each gate's values, one tensor a call (``keep="values"``), ready for ``force(model, log.values())``.

        Raises:
            ValueError: if values were not kept.
        """
        if self._keep != "values":
            raise ValueError('values were not kept: watch with keep="values"')
        return {name: kept for name, kept in self._values.items() if kept}

    def without_gradient(self) -> list[str]:
        """Gate parameters that no backward pass gave a gradient other than zero while watching.

        A parameter that keeps being named here does not learn. Empty when nothing was trained.
        """
        return sorted(self._ungraded.values()) if self._backward else []

    def plot(self) -> Figure:
        """A histogram of values for each gate, over its range mapped to 0..1."""
        from matplotlib.figure import Figure

        seen = [(name, stats.summary()) for name, stats in self._stats.items() if stats.calls]
        figure = Figure(figsize=(6, 0.8 + 0.7 * len(seen)), layout="constrained")
        for row, (name, summary) in enumerate(seen):
            axes = figure.add_subplot(len(seen), 1, row + 1)
            axes.bar([(i + 0.5) / BINS for i in range(BINS)], summary["histogram"], width=0.9 / BINS)
            axes.set_title(name, fontsize=7, loc="left")
            axes.set_xlim(0, 1)
            axes.tick_params(labelsize=6)
        return figure


def watch(
    model: nn.Module,
    pattern: Pattern = None,
    *,
    keep: Literal["stats", "values"] = "stats",
    every: int = 1,
) -> WatchLog:
    """Record what gates do while the context is open; outputs stay bit-equal and no hook is left behind.

    Args:
        model: any module tree with gates.
        pattern: which gates, as for `named_gates` (default all).
        keep: "stats" streams statistics in constant memory; "values" also keeps every tensor.
        every: look at every n-th call of each gate only.

    Returns:
        a context manager that is also the `WatchLog`. Hooks run in the order they were opened: a watch opened
        inside a `force` sees the forced values, one opened outside it the gate's own.

    Raises:
        GateNotFoundError: if the pattern matches no gate, or there is none; the message lists the gates.
        TypeError: if ``model`` is what ``torch.compile`` returned: give the module it was compiled from.
        ValueError: for another ``keep``, or ``every`` below one.

    Example:
        >>> import torch, penstock
        >>> gate = penstock.gates.SigmoidGate(4, 4)
        >>> _ = torch.nn.init.zeros_(gate.proj.bias)
        >>> with penstock.watch(gate) as log:
        ...     _ = gate(torch.zeros(8, 4))
        >>> log[""].summary()["mean"]
        0.5
    """
    if keep not in ("stats", "values"):
        raise ValueError(f"keep={keep!r}: it must be 'stats' or 'values'")
    if every < 1:
        raise ValueError(f"every={every}: it must be 1 or more")
    return WatchLog(model, named_gates(model, pattern), keep, every)


def _spec(module: nn.Module) -> Spec:
    spec = spec_of(module)
    assert spec is not None
    return spec
