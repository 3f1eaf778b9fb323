"""The contract: a Gate is a module whose output is the gate's values.

Because the values leave a module, PyTorch's forward hooks are enough to see and to replace every gate of
every model. What a gate must declare is what it lets through (`passes`), how its values are to be read
(`kind`) and between which numbers they lie (`range`); from these follow what *open* and *closed* mean.

Shape legend: B batch, E experts, K chosen experts; ``...`` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
        range: the smallest and the largest value the gate can take; either may be infinite.
        neutral: the values of (closed, open), where those of the kind and range do not apply; see `Spec.bounds`.
        unit_dims: how many trailing axes number the gate's units (its heads, channels, ...), the axes before
            them being the inputs it saw. ``None``: it is guessed from the first tensor argument, see `input_dims`;
            to be declared where sizes could be alike by chance (as many heads as samples in a batch).

    Example:
        >>> import torch, penstock
        >>> class ChannelGate(penstock.Gate):
        ...     passes = "channel"
        ...     def __init__(self, channels: int) -> None:
        ...         super().__init__()
        ...         self.proj = torch.nn.Linear(channels, channels)
        ...     def forward(self, x_BC: torch.Tensor) -> torch.Tensor:
        ...         return self.proj(x_BC).sigmoid()
        >>> list(penstock.gates.named_gates(torch.nn.ModuleDict({"gate": ChannelGate(4)})))
        ['gate']
    """

    passes: Passes = "feature"
    kind: Kind = "scale"
    range: tuple[float, float] = (0.0, 1.0)
    neutral: tuple[float, float] | None = None
    unit_dims: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind not in get_args(Kind):
            raise TypeError(f"{cls.__name__}.kind is {cls.kind!r}; it must be one of {get_args(Kind)}")
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

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: it must be one of {get_args(Kind)}")
        if self.passes not in get_args(Passes):
            raise ValueError(f"passes={self.passes!r}: it must be one of {get_args(Passes)}")
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range={self.range}: it must be the smallest and then the largest value")

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
        """(closed, open) for kinds whose values are not a choice.

        `neutral` where given; else zero and one, or the end of the range that is nearest. A decay has the ends of
        its range: a log-decay forgets at minus infinity and keeps at zero.
        """
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
                f"a {self.kind} gate over {self.passes}s always passes something: force an entry (its number), 'open' "
                "(all alike), 'shuffle', 'mean' or a tensor instead of 'closed' (torch.zeros(1) with where= shuts one)"
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


_Module = TypeVar("_Module", bound=nn.Module)


def mark(
    module: _Module,
    *,
    kind: Kind,
    passes: Passes,
    range: tuple[float, float] = (0.0, 1.0),
    neutral: tuple[float, float] | None = None,
    unit_dims: int | None = None,
    output: int | Sequence[str] | None = None,
) -> _Module:
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
        ValueError: for an unknown kind, an empty range, or names that do not describe a router.

    Example:
        >>> import torch, penstock
        >>> excite = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sigmoid())
        >>> _ = penstock.mark(excite[1], kind="scale", passes="channel")
        >>> with penstock.force(excite, "open"):
        ...     float(excite(torch.randn(2, 8)).min())
        1.0
    """
    if output is not None and not isinstance(output, int):
        output = tuple(output)
        if missing := set(Routing._fields) - set(output):
            raise ValueError(
                f"output={output} names no {', '.join(sorted(missing))}; a router has weights, indices and logits"
            )
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
        pattern: a name or shell-style pattern, or several ("blocks.*.gate"; any name of a shared gate counts), a
            predicate ``f(name, module)``, or ``None`` for all.

    Raises:
        GateNotFoundError: if a pattern matches no gate, or there is none at all.
        TypeError: if ``model`` is what ``torch.compile`` returned.
    """
    if "_orig_mod" in model._modules:
        raise TypeError(
            "the model is compiled: give the module it was compiled from (its _orig_mod), or compile inside the context"
        )
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if spec_of(module) is not None:
            names.setdefault(module, []).append(name)
    if pattern is None:
        return _found({a[0]: m for m, a in names.items()}, "the model", names)
    if callable(pattern):
        return _found({a[0]: m for m, a in names.items() if pattern(a[0], m)}, "the predicate", names)
    found: dict[str, nn.Module] = {}
    for one in [pattern] if isinstance(pattern, str) else pattern:
        # Names are compared first: a name may hold brackets or stars of its own (the keys of a ModuleDict).
        matching = {a[0]: m for m, a in names.items() if any(n == one or fnmatchcase(n, one) for n in a)}
        found |= _found(matching, repr(one), names)
    return _found(found, repr(pattern), names)


def _found(gates: dict[str, nn.Module], asked: str, names: dict[nn.Module, list[str]]) -> dict[str, nn.Module]:
    if not names:
        raise GateNotFoundError("the model has no gates: make one of a module with penstock.mark")
    if not gates:
        known = ", ".join(aliases[0] or "'' (the model itself)" for aliases in names.values())
        raise GateNotFoundError(f"{asked} matches no gate; the gates of this model are: {known}")
    return gates


#: How many hooks of ours a module has.
_attached: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def attach(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
    """Run ``hook(module, args, kwargs, output)`` after each forward pass, also in code compiled before.

    Returns:
        what takes the hook off again.
    """
    if not module._forward_hooks:
        # Compiled code does not look for new hooks on a module that had none, but it does look whether `forward`
        # is set on the instance: so with this it is traced anew, and without it the old code is valid again.
        module.__dict__.setdefault("forward", module.forward)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    _attached[module] = _attached.get(module, 0) + 1

    def detach() -> None:
        handle.remove()
        _attached[module] -= 1
        own = module.__dict__.get("forward")
        if not _attached[module] and getattr(own, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]

    return detach


def observed(gate: nn.Module) -> bool:
    """Whether anyone looks at or replaces the gate's values, so that a fused form that never shows them will not do.

    Code being compiled always says yes: it would not be compiled anew for a hook that comes later.
    """
    return torch.compiler.is_compiling() or bool(gate._forward_hooks or gate._forward_pre_hooks)


def input_dims(spec: Spec, inputs: Any, values: Tensor) -> int:
    """How many leading axes of ``values`` number the inputs the gate saw; the axes after them are its units.

    All but the gate's `unit_dims` where it declares them. Otherwise the leading axes that ``values`` shares with the
    first tensor among ``inputs`` (arguments, or containers of them), leaving out that tensor's features: its last
    axis, or all but the batch axis of an image or volume. An axis that numbers choices is never an input.
    """
    if spec.unit_dims is not None:
        return max(values.ndim - spec.unit_dims, 0)
    first = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
    if first is None or not first.ndim or not values.ndim:
        return 0
    seen = first.shape[:1] if first.ndim > 3 else first.shape[:-1]
    if first.ndim == 1 or (values.ndim > first.ndim and not first.is_floating_point()):
        seen = first.shape  # One number a sample, or one a position: there is no axis of features.
    shared = 0
    for a, b in zip(seen, values.shape, strict=False):
        if a != b:
            break
        shared += 1
    if not shared and values.shape[0] == math.prod(first.shape[:-1]):
        shared = 1  # The gate has flattened batch and positions into one axis.
    return min(shared, values.ndim - 1) if spec.kind in CHOICES else shared


def tensor_of(values: Values) -> Tensor:
    """Gate values as one tensor: a routing becomes its row over all experts."""
    return values.dense() if isinstance(values, Routing) else values


def unit_interval(spec: Spec, values: Tensor) -> Tensor:
    """``values`` mapped to [0, 1] by the gate's range.

    A log-decay is mapped by its exponential. An end at infinity counts as -1 or 1; values beyond it leave [0, 1].
    """
    low, high = spec.range
    if spec.kind == "decay" and math.isinf(low):
        return values.exp()
    if math.isinf(low):
        low = min(-1.0, high - 1.0)
    if math.isinf(high):
        high = max(1.0, low + 1.0)
    return values if (low, high) == (0.0, 1.0) else (values - low) / (high - low)


def amount(spec: Spec, values: Tensor) -> Tensor:
    """How much passes, whatever its sign: the magnitude of ``values``, of a log-decay its exponential."""
    if spec.kind == "decay" and math.isinf(spec.range[0]):
        return values.exp()
    return values if spec.range[0] >= 0.0 else values.abs()
