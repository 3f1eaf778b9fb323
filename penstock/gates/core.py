"""The contract: a Gate is a module whose output is the gate's values.

Because the values leave a module, PyTorch's forward hooks are enough to see and to replace every gate of
every model. What a gate must declare is what it lets through (`passes`), how its values are to be read
(`kind`) and between which numbers they lie (`range`); from these follow what *open* and *closed* mean.

Shape legend: B batch, E experts, K chosen experts; ``...`` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

Passes = Literal[
    "feature", "channel", "position", "token", "head", "block", "expert", "layer", "level", "code", "sample"
]
Kind = Literal["scale", "mask", "decay", "simplex", "k-hot", "one-hot", "ordinal"]

#: Kinds whose last axis is a choice among entries, so that a number names an entry and not a value.
CHOICES: tuple[Kind, ...] = ("simplex", "k-hot", "one-hot", "ordinal")

_ATTRIBUTE = "_penstock_gate"


class GateNotFoundError(LookupError):
    """A pattern matched no gate; the message lists the gates there are."""


class ClosedError(ValueError):
    """The gate has no closed position (its values must sum to one)."""


class Routing(NamedTuple):
    """What a router decides: which experts each token goes to, and with what weight.

    Attributes:
        weights: (..., K) weights of the chosen experts.
        indices: (..., K) which experts, int64.
        logits: (..., E) scores before the decision, for auxiliary losses.
    """

    weights: Tensor
    indices: Tensor
    logits: Tensor

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    def dense(self) -> Tensor:
        """The weights as one row over all experts, (..., E); experts not chosen get zero."""
        row = torch.zeros(self.logits.shape, dtype=self.weights.dtype, device=self.weights.device)
        return row.scatter_add(-1, self.indices, self.weights)

    @classmethod
    def from_dense(cls, values: Tensor, logits: Tensor | None = None) -> Routing:
        """The routing that gives every expert its weight in ``values`` (..., E)."""
        indices = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
        return cls(values, indices, values if logits is None else logits)


Values: TypeAlias = Tensor | Routing


class Gate(nn.Module):
    """Base of every gate: a module whose ``forward`` returns the gate's values.

    The caller applies the values, and anything shaped by an index (top-k, exits, dispatch) is derived from
    what was returned, never from a private copy: otherwise forcing a gate would have no effect.

    Class attributes (an instance may override them):
        passes: what the gate lets through.
        kind: how values are read, and so what open and closed mean.
        range: the smallest and the largest value the gate can take.
        neutral: the values of (closed, open), where the kind's own do not apply; see `open_value`.
        unit_dims: how many trailing axes number the gate's units (its heads, channels, ...), the axes before
            them being the inputs it saw. ``None``: the leading axes shared with the first tensor argument
            are inputs (only the batch axis of an image), the rest are units.
    """

    passes: Passes = "feature"
    kind: Kind = "scale"
    range: tuple[float, float] = (0.0, 1.0)
    neutral: tuple[float, float] | None = None
    unit_dims: int | None = None

    _kinds: ClassVar[tuple[str, ...]] = get_args(Kind)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind not in cls._kinds:
            raise TypeError(f"{cls.__name__}.kind is {cls.kind!r}; it must be one of {', '.join(cls._kinds)}")
        if cls.passes not in get_args(Passes):
            raise TypeError(f"{cls.__name__}.passes is {cls.passes!r}; it must be one of {get_args(Passes)}")


@dataclass(frozen=True)
class Spec:
    """How the output of a module is read as gate values, and how other values are put in its place."""

    passes: Passes
    kind: Kind
    range: tuple[float, float]
    neutral: tuple[float, float] | None = None
    unit_dims: int | None = None
    output: int | tuple[str, ...] | None = None

    def read(self, output: Any) -> Values:
        """The gate's values in what the module returned."""
        if self.output is None:
            return output
        if isinstance(self.output, int):
            return output[self.output]
        part = dict(zip(self.output, output, strict=True))
        return Routing(part["weights"], part["indices"], part["logits"])

    def write(self, output: Any, values: Values) -> Any:
        """What the module returned, with the gate's values replaced by ``values``."""
        if self.output is None:
            return values
        parts = list(output)
        if isinstance(self.output, int):
            parts[self.output] = values
        else:
            assert isinstance(values, Routing)
            for place, name in enumerate(self.output):
                if name in Routing._fields:
                    parts[place] = getattr(values, name)
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    @property
    def bounds(self) -> tuple[float, float]:
        """(closed, open) for kinds whose values are not a choice."""
        if self.neutral is not None:
            return self.neutral
        low, high = self.range
        if self.kind == "decay":
            return low, high
        return (0.0 if low <= 0.0 <= high else low), (1.0 if low <= 1.0 <= high else high)

    def open_like(self, values: Tensor) -> Tensor:
        """Values of the open gate, shaped like ``values``: everything passes unchanged.

        scale, mask: one (or `neutral`); decay: the top of the range; simplex, one-hot: every entry alike;
        k-hot: every entry; ordinal: the last entry.
        """
        if self.kind in ("simplex", "one-hot"):
            return torch.full_like(values, 1.0 / values.shape[-1])
        if self.kind == "k-hot":
            return torch.ones_like(values)
        if self.kind == "ordinal":
            return one_hot_like(values, -1)
        return torch.full_like(values, self.bounds[1])

    def check_closable(self) -> None:
        """Raise `ClosedError` if the gate has no closed position."""
        if self.kind in ("simplex", "one-hot"):
            raise ClosedError(
                f"a {self.kind} gate over {self.passes}s always passes something: force an entry (its number), "
                "'open' (all alike), 'shuffle', 'mean' or a tensor instead of 'closed'"
            )

    def closed_like(self, values: Tensor) -> Tensor:
        """Values of the closed gate, shaped like ``values``: nothing passes.

        Raises:
            ClosedError: for kinds whose entries sum to one, naming what can be forced instead.
        """
        self.check_closable()
        if self.kind == "k-hot":
            return torch.zeros_like(values)
        if self.kind == "ordinal":
            return one_hot_like(values, 0)
        return torch.full_like(values, self.bounds[0])


def one_hot_like(values: Tensor, index: int) -> Tensor:
    """A tensor shaped like ``values`` (..., E) with a one at ``index`` of the last axis, zero elsewhere.

    Raises:
        ValueError: if there is no such entry.
    """
    size = values.shape[-1]
    if not -size <= index < size:
        raise ValueError(f"there is no entry {index}: the gate chooses among {size} (0 to {size - 1})")
    hot = torch.zeros_like(values)
    hot[..., index] = 1
    return hot


def mark(
    module: nn.Module,
    *,
    kind: Kind,
    passes: Passes,
    range: tuple[float, float] = (0.0, 1.0),
    neutral: tuple[float, float] | None = None,
    unit_dims: int | None = None,
    output: int | Sequence[str] | None = None,
) -> nn.Module:
    """Make a gate of a foreign module, without touching its class.

    Args:
        module: the module whose output holds gate values, as a squeeze-and-excite's last sigmoid.
        kind, passes, range, neutral, unit_dims: as on `Gate`.
        output: where the values are in the output. ``None``: the output itself. A number: that element of a
            tuple. Names for the elements of a tuple, among them "logits", "weights" and "indices": a router,
            as ``("logits", "weights", "indices")`` for transformers' ``MixtralTopKRouter``.

    Returns:
        the same module, now found by `watch`, `force`, `ablate` and `twin`.

    Raises:
        ValueError: for an unknown kind, or names that do not describe a router.
    """
    if kind not in get_args(Kind) or passes not in get_args(Passes):
        raise ValueError(f"kind={kind!r}, passes={passes!r}: kind is one of {get_args(Kind)}, passes one of {get_args(Passes)}")
    if output is not None and not isinstance(output, int):
        output = tuple(output)
        if missing := set(Routing._fields) - set(output):
            raise ValueError(f"output={output} names no {', '.join(sorted(missing))}; a router has weights, indices and logits")
    module.__dict__[_ATTRIBUTE] = Spec(passes, kind, range, neutral, unit_dims, output)
    return module


def spec_of(module: nn.Module) -> Spec | None:
    """How ``module`` is read as a gate, or ``None`` if it is none."""
    marked = module.__dict__.get(_ATTRIBUTE)
    if marked is not None:
        return marked
    if isinstance(module, Gate):
        return Spec(module.passes, module.kind, module.range, module.neutral, module.unit_dims)
    return None


Pattern: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def named_gates(model: nn.Module, pattern: Pattern = None) -> dict[str, nn.Module]:
    """The gates of ``model`` by dotted name, in the order of ``named_modules``.

    Args:
        model: any module tree; a gate shared by several parents appears once, under its first name.
        pattern: shell-style pattern(s) on dotted names ("blocks.*.gate"; any name of a shared gate counts), a
            predicate ``f(name, module)``, or ``None`` for all.

    Raises:
        GateNotFoundError: if a pattern matches no gate.
        TypeError: if ``model`` is a compiled module, whose traced code would not run the hooks.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("the model is compiled, and compiled code ignores later hooks: watch or force model._orig_mod, or compile inside the context")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if spec_of(module) is not None:
            names.setdefault(module, []).append(name)
    if pattern is None:
        return {aliases[0]: module for module, aliases in names.items()}
    if callable(pattern):
        return _found({a[0]: m for m, a in names.items() if pattern(a[0], m)}, "the predicate", names)
    found: dict[str, nn.Module] = {}
    for one in [pattern] if isinstance(pattern, str) else pattern:
        found |= _found({a[0]: m for m, a in names.items() if any(fnmatchcase(n, one) for n in a)}, repr(one), names)
    return found


def _found(gates: dict[str, nn.Module], asked: str, names: dict[nn.Module, list[str]]) -> dict[str, nn.Module]:
    if not gates:
        known = ", ".join(aliases[0] or "(the model itself)" for aliases in names.values()) or "none"
        raise GateNotFoundError(f"{asked} matches no gate; the gates of this model are: {known}")
    return gates


def input_dims(spec: Spec, inputs: Sequence[Any], values: Tensor) -> int:
    """How many leading axes of ``values`` number the inputs the gate saw; the axes after them are its units."""
    if spec.unit_dims is not None:
        return max(values.ndim - spec.unit_dims, 0)
    first = next((x for x in inputs if isinstance(x, Tensor)), None)
    if first is None:
        return 0
    if first.ndim == 4 and values.ndim == 4:
        return 1 if first.shape[0] == values.shape[0] else 0
    shared = 0
    for a, b in zip(first.shape, values.shape, strict=False):
        if a != b:
            break
        shared += 1
    last_is_units = spec.kind in CHOICES or shared == values.ndim == first.ndim
    return min(shared, values.ndim - 1) if last_is_units else shared


def tensor_of(values: Values) -> Tensor:
    """Gate values as one tensor: a routing becomes its row over all experts."""
    return values.dense() if isinstance(values, Routing) else values


def unit_interval(spec: Spec, values: Tensor) -> Tensor:
    """``values`` mapped to [0, 1] by the gate's range; a log-decay (range without a floor) by its exponential."""
    low, high = spec.range
    if math.isinf(low):
        return values.exp()
    return (values - low) / (high - low)


def parameters_of(gates: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters inside gates, by full dotted name."""
    for name, gate in gates.items():
        for own, parameter in gate.named_parameters():
            if parameter.requires_grad:
                yield f"{name}.{own}" if name else own, parameter
