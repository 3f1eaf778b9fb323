"""Watch: stream the statistics of every gate in constant memory, leaving outputs bit-equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penstock.gates.core import (
    Pattern,
    Routing,
    Spec,
    input_dims,
    named_gates,
    parameters_of,
    spec_of,
    tensor_of,
    unit_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 20
#: A value is never-open ("dead") when it stays below this share of the gate's range.
DEAD = 1e-5


@dataclass
class GateStats:
    """Running statistics of one gate; all accumulators are float64.

    Values are counted in the gate's own units; shares and the histogram are over its range mapped to [0, 1].
    Variance is split: *between inputs* (each unit over the samples and positions it saw) and *between units*
    (the units' means). A gate whose share of variance from the input is near zero is a constant in disguise.
    """

    spec: Spec
    calls: int = 0
    inputs: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    peak: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    load: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    entropy_sum: float = 0.0
    effective_sum: float = 0.0
    rows: int = 0
    static: bool = True

    def update(self, values: Tensor, leading: int) -> None:
        """Add one call's values, whose first ``leading`` axes are inputs and the rest units."""
        units = values.shape[leading:]
        flat = values.detach().reshape(-1, math.prod(units)).double()
        if self.calls and flat.shape[1] != self.mean.numel():
            # The number of units follows the input (a map over tokens): keep one unit, the mean over all.
            flat = flat.reshape(-1, 1)
            self._merge_units()
        if not self.calls:
            zeros = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
            self.mean, self.squares, self.peak, self.load = zeros, zeros.clone(), zeros.clone() - math.inf, zeros.clone()
            self.histogram = self.histogram.to(flat.device)
            self.shape = tuple(units)
        self.calls += 1
        self.static &= leading == 0
        self._welford(flat)
        share = unit_interval(self.spec, flat)
        self.peak = torch.maximum(self.peak, share.amax(0))
        self.load += (share > DEAD).sum(0)
        self.histogram += torch.histc(share.clamp(0, 1), BINS, 0, 1)
        self._effective(flat, values.shape[-1] if self.spec.kind == "simplex" else flat.shape[1])

    def _welford(self, flat: Tensor) -> None:
        count = flat.shape[0]
        squares, mean = torch.var_mean(flat, 0, correction=0)
        total = self.inputs + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares * count + delta.square() * (self.inputs * count / total)
        self.inputs = total

    def _effective(self, flat: Tensor, entries: int) -> None:
        rows = flat.reshape(-1, entries).clamp_min(0)
        self.rows += rows.shape[0]
        if self.spec.kind == "simplex":
            entropy = torch.special.entr(rows).sum(-1)
            self.entropy_sum += float(entropy.sum())
            self.effective_sum += float(entropy.exp().sum())
        else:
            power = rows.square().sum(-1)
            self.effective_sum += float((rows.sum(-1).square() / power.clamp_min(1e-300)).sum())

    def _merge_units(self) -> None:
        if self.mean.numel() > 1:
            mean = self.mean.mean()
            self.squares = (self.squares.sum() + self.inputs * (self.mean - mean).square().sum())[None]
            self.inputs *= self.mean.numel()
            self.mean, self.peak, self.load = mean[None], self.peak.max()[None], self.load.sum()[None]
            self.shape = ()

    shape: tuple[int, ...] = ()

    @property
    def unit_means(self) -> Tensor:
        """Each unit's mean, in the shape of the gate's unit axes, float64."""
        return self.mean.reshape(self.shape)

    def summary(self) -> dict[str, Any]:
        """The statistics as plain numbers.

        Returns a dictionary with: passes, kind, calls, inputs, units; mean, std (in the gate's own values);
        below_05, above_95 (share of values, range mapped to 0..1); from_input (share of the variance that comes
        from the input, 0..1, ``None`` without variance or for a static gate); effective (mean effective number of
        open entries); dead (entries never above 1e-5 of the range); unit_means; histogram (20 shares). Choices
        add entropy (nats), load (share of inputs that used each entry), load_cv (its coefficient of variation)
        and unused (share of entries never used).
        """
        if not self.calls:
            return {"passes": self.spec.passes, "kind": self.spec.kind, "calls": 0}
        within = float(self.squares.mean()) / self.inputs
        between = float(self.mean.var(correction=0))
        total = within + between
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
            "from_input": None if self.static or total < 1e-24 else within / total,
            "effective": self.effective_sum / max(self.rows, 1),
            "dead": int((self.peak < DEAD).sum()),
            "static": self.static,
            "unit_means": self.mean.tolist(),
            "histogram": histogram.tolist(),
        }
        if self.spec.kind in ("simplex", "k-hot", "one-hot", "ordinal"):
            load = self.load / self.inputs
            summary |= {
                "entropy": self.entropy_sum / max(self.rows, 1) if self.spec.kind == "simplex" else 0.0,
                "load": load.tolist(),
                "load_cv": float(load.std(correction=0) / load.mean().clamp_min(1e-300)),
                "unused": float((load == 0).double().mean()),
            }
        return summary


class Table(list[dict[str, Any]]):
    """Rows as dictionaries that print as an aligned table."""

    def __str__(self) -> str:
        if not self:
            return "(empty)"
        head = list(dict.fromkeys(key for row in self for key in row))
        cells = [[_cell(row.get(key)) for key in head] for row in self]
        widths = [max(len(key), *(len(row[i]) for row in cells)) for i, key in enumerate(head)]
        lines = ["  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True)))
                 for row in [head, *cells]]
        return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class WatchLog:
    """What `watch` saw; usable while it still watches and after."""

    def __init__(self, gates: dict[str, nn.Module], keep: str, every: int) -> None:
        self._gates = gates
        self._keep = keep
        self._every = every
        self._handles: list[RemovableHandle] = []
        self._ungraded: dict[str, RemovableHandle] = {}
        self._backward = False
        self._stats = {name: GateStats(_spec(module)) for name, module in gates.items()}
        self._values: dict[str, list[Tensor]] = {name: [] for name in gates}
        self._calls = dict.fromkeys(gates, 0)

    def __enter__(self) -> WatchLog:
        for name, module in self._gates.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        for name, parameter in parameters_of(self._gates):
            self._ungraded[name] = parameter.register_post_accumulate_grad_hook(self._graded(name))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()
        for handle in self._ungraded.values():
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        stats, kept = self._stats[name], self._values[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._calls[name] += 1
            if (self._calls[name] - 1) % self._every:
                return
            with torch.no_grad():
                values = tensor_of(stats.spec.read(output)).detach()
                stats.update(values, input_dims(stats.spec, (*args, *kwargs.values()), values))
                if self._keep == "values":
                    kept.append(values.clone())

        return hook

    def _graded(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._backward = True
            if parameter.grad is not None and bool(parameter.grad.any()):
                self._ungraded.pop(name).remove()

        return hook

    def __getitem__(self, name: str) -> GateStats:
        return self._stats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """One summary a gate, by dotted name; see `GateStats.summary`."""
        return {name: stats.summary() for name, stats in self._stats.items()}

    def table(self) -> Table:
        """One row a gate; prints as a table."""
        columns = ("kind", "passes", "mean", "std", "below_05", "above_95", "from_input", "effective", "dead", "entropy", "load_cv", "unused")
        seen = {name: summary for name, summary in self.to_dict().items() if summary["calls"]}
        used = [c for c in columns if any(c in s for s in seen.values())]
        return Table({"gate": name or "(model)"} | {c: s.get(c) for c in used} for name, s in seen.items())

    def mean(self) -> dict[str, Tensor]:
        """Each gate's mean per unit, ready for ``force(model, log.mean())``."""
        return {name: stats.unit_means.float() for name, stats in self._stats.items() if stats.calls}

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
        return sorted(self._ungraded) if self._backward else []

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
        GateNotFoundError: if the pattern matches no gate; the message lists the gates.

    Example:
        >>> import torch, penstock
        >>> gate = penstock.gates.SigmoidGate(4, 4)
        >>> with penstock.watch(gate) as log:
        ...     _ = gate(torch.zeros(8, 4))
        >>> log[""].summary()["mean"]
        0.5
    """
    if keep not in ("stats", "values"):
        raise ValueError(f"keep={keep!r}: it must be 'stats' or 'values'")
    if every < 1:
        raise ValueError(f"every={every}: it must be 1 or more")
    return WatchLog(named_gates(model, pattern), keep, every)


def _spec(module: nn.Module) -> Spec:
    spec = spec_of(module)
    assert spec is not None
    return spec


__all__: Sequence[str] = ["GateStats", "Routing", "Table", "WatchLog", "watch"]
