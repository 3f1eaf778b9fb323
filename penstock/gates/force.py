"""Intervene: put other values in a gate's place while a context is open."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from penstock.gates.core import (
    CHOICES,
    ClosedError,
    GateNotFoundError,
    Pattern,
    Routing,
    Spec,
    attach,
    input_dims,
    named_gates,
    one_hot_like,
    spec_of,
    tensor_of,
)

Named = Literal["open", "closed", "shuffle", "mean", "freeze"]
Constant: TypeAlias = Named | float | Tensor | Sequence[Tensor]
How: TypeAlias = Constant | Callable[[Any], Any]
Where: TypeAlias = int | slice | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None


class GateWarning(UserWarning):
    """An intervention that could not change anything."""


def force(
    model: nn.Module,
    how: How | Mapping[Any, How],
    pattern: Pattern = None,
    *,
    where: Where = None,
    seed: int = 0,
) -> Forcing:
    """Replace the values of gates while the context is open.

    Args:
        model: any module tree with gates.
        how: what to put in the place of each gate's values, or a mapping ``{pattern: how}``:

            - ``"open"``, ``"closed"``: as the gate's kind and range say;
            - ``"shuffle"``: each sample of the batch gets another sample's values (one random cycle, so that
              none keeps its own);
            - ``"mean"``: each unit at its mean over the batch and positions;
            - ``"freeze"``: the values of the first call inside the context, from then on;
            - a number: the value, or, for gates that choose (simplex, k-hot, one-hot, ordinal), the entry;
            - a tensor that broadcasts to the values (for a router: over all experts), or a sequence of tensors,
              one a call (as ``watch(..., keep="values").values()`` gives them: interchange);
            - a function from values to values; gradients flow through it, and through nothing else. A router
              passes its `Routing`, and the function may return one or a tensor over all experts.
        pattern: which gates, as for `named_gates`; a mapping brings its own. Where several match a gate, the later
            has the last word.
        where: restrict to part of the values: an index, slice, list of indices or boolean mask on the last axis,
            or a function from the values to a boolean mask of their shape.
        seed: of the shuffle, which is the same in every call with as many samples.

    Returns:
        a context manager. Contexts nest: hooks run in the order they were opened, so the inner one has the last
        word; leaving, also by an exception, restores everything. Its ``unchanged`` set names the gates on which
        no shuffle had an effect (static gates, single samples), which is also warned about.

    Raises:
        GateNotFoundError: if a pattern matches nothing; the message lists the gates.
        ClosedError: on "closed" for a gate that cannot close, naming the alternatives.
        TypeError: if ``model`` is what ``torch.compile`` returned: give the module it was compiled from.
        ValueError: for an unknown name, an entry out of range, or a tensor or ``where`` that does not fit. What
            depends on the values' shape is raised when the gate is called.

    Example:
        >>> import torch, penstock
        >>> gate = penstock.gates.SigmoidGate(4, 4)
        >>> with penstock.force(gate, "closed"):
        ...     float(gate(torch.randn(2, 4)).sum())
        0.0
    """
    return Forcing(model, how, pattern, where=where, seed=seed)


class Forcing:
    """The context that `force` returns.

    Attributes:
        unchanged: the gates that were shuffled and whose values no shuffle changed.
    """

    def __init__(
        self, model: nn.Module, how: How | Mapping[Any, How], pattern: Pattern, *, where: Where, seed: int
    ) -> None:
        if isinstance(how, Mapping) and pattern is not None:
            raise ValueError(f"pattern={pattern!r} beside a mapping: the mapping's keys are the patterns")
        plan = list(how.items()) if isinstance(how, Mapping) else [(pattern, how)]
        if not plan:
            raise GateNotFoundError("an empty mapping forces no gate")
        self.unchanged: set[str] = set()
        self._changed: set[str] = set()
        self._seed = seed
        self._where = where
        self._undo: list[Callable[[], None]] = []
        self._plan: list[tuple[str, nn.Module, Spec, How]] = []
        for one_pattern, one_how in plan:
            for name, module in named_gates(model, one_pattern).items():
                spec = spec_of(module)
                assert spec is not None
                _check(name, spec, one_how)
                self._plan.append((name, module, spec, one_how))

    def __enter__(self) -> Forcing:
        if self._undo:
            raise RuntimeError("this forcing is open already")
        for name, module, spec, how in self._plan:
            self._undo.append(attach(module, self._hook(name, spec, how)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def _hook(self, name: str, spec: Spec, how: How) -> Callable[..., Any]:
        constant = None if callable(how) else _constant(spec, how, self._seed)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = spec.read(output)
            old = tensor_of(before)
            leading = input_dims(spec, (args, kwargs), old)
            given = how(before) if callable(how) else None
            if isinstance(given, Routing) and isinstance(before, Routing) and self._where is None:
                return spec.write(output, given)
            try:
                new = constant(old.detach(), leading).detach() if constant else _tensor(given)
                new = self._fit(new, old)
            except ValueError as error:
                raise ValueError(f"{_called(name)}: {error}") from error
            if isinstance(how, str) and how == "shuffle":
                self._compare(name, old, new, leading)
            return spec.write(output, Routing.from_dense(new, before.logits) if isinstance(before, Routing) else new)

        # Compiled code leaves to Python what remembers something from call to call.
        remembers = isinstance(how, Sequence) and how not in ("open", "closed", "mean")
        return torch.compiler.disable(hook) if remembers else hook

    def _fit(self, new: Tensor, old: Tensor) -> Tensor:
        new = _broadcast(new.to(dtype=old.dtype, device=old.device), old, "a tensor")
        if self._where is not None:
            new = torch.where(_broadcast(_mask(self._where, old), old, "where"), new, old)
        # A copy: models may write into what a gate returned, and this may be the caller's tensor.
        return new.clone(memory_format=torch.contiguous_format)

    def _compare(self, name: str, old: Tensor, new: Tensor, leading: int) -> None:
        if not torch.equal(old, new):
            self._changed.add(name)
            self.unchanged.discard(name)
        elif name not in self._changed | self.unchanged:
            self.unchanged.add(name)
            if not leading:
                why = "it does not depend on the input"
            elif len(old) == 1:
                why = "the batch is a single sample"
            else:
                why = "the samples of the batch have the same values"
            warnings.warn(f"shuffling {_called(name)} changes nothing: {why}", GateWarning, stacklevel=2)


def _called(name: str) -> str:
    return f"gate {name or '(the model)'}"


def _constant(spec: Spec, how: Constant, seed: int) -> Callable[[Tensor, int], Tensor]:
    """From a call's values, whose leading axes are inputs, to what is put in their place."""
    if isinstance(how, Tensor):
        return lambda old, leading: how
    if isinstance(how, int | float):
        if spec.kind in CHOICES:
            return lambda old, leading: one_hot_like(old, int(how))
        return lambda old, leading: torch.full_like(old, how)
    if how == "open":
        return lambda old, leading: spec.open_like(old)
    if how == "closed":
        return lambda old, leading: spec.closed_like(old)
    if how == "mean":
        return lambda old, leading: old.mean(tuple(range(leading)), keepdim=True) if leading else old
    if how == "shuffle":
        return lambda old, leading: old[_cycle(len(old), seed).to(old.device)] if leading else old
    if how == "freeze":
        first: list[Tensor] = []

        def frozen(old: Tensor, leading: int) -> Tensor:
            if not first:
                first.append(old.clone())
            return first[0]

        return frozen
    tensors = iter(how)

    def following(old: Tensor, leading: int) -> Tensor:
        tensor = next(tensors, None)
        if tensor is None:
            raise ValueError(f"was called more often than there are tensors to force ({len(how)})")
        return tensor

    return following


def _cycle(size: int, seed: int) -> Tensor:
    """A random permutation of one cycle: no element stays."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _tensor(given: Any) -> Tensor:
    if not isinstance(given, Tensor | Routing):
        raise ValueError(f"the function returned {type(given).__name__}, not a tensor or routing")
    return tensor_of(given)


def _broadcast(given: Tensor, values: Tensor, what: str) -> Tensor:
    try:
        return given.expand(values.shape)
    except RuntimeError:
        raise ValueError(
            f"{what} of shape {tuple(given.shape)} does not broadcast to the gate's {tuple(values.shape)}"
        ) from None


def _check(name: str, spec: Spec, how: How) -> None:
    """What can be known to be wrong before the gate is called."""
    if isinstance(how, str):
        if how not in get_args(Named):
            known = ", ".join(get_args(Named))
            raise ValueError(f"cannot force {how!r}: it must be one of {known}, a number, tensor(s) or a function")
        if how == "closed":
            try:
                spec.check_closable()
            except ClosedError as error:
                raise ClosedError(f"{_called(name)}: {error}") from None
    elif isinstance(how, int | float) and not isinstance(how, bool):
        if spec.kind in CHOICES and how != int(how):
            raise ValueError(f"{_called(name)} is {spec.kind}: {how} names no entry; give a whole number")
    elif not (isinstance(how, Tensor) or callable(how) or _are_tensors(how)):
        raise ValueError(f"cannot force a {type(how).__name__}: give a name, number, tensor(s) or a function")


def _are_tensors(how: Any) -> bool:
    return isinstance(how, Sequence) and len(how) > 0 and all(isinstance(one, Tensor) for one in how)


def _mask(where: Where, values: Tensor) -> Tensor:
    if callable(where):
        return where(values)
    if isinstance(where, Tensor) and where.dtype == torch.bool:
        return where.to(values.device)
    size = values.shape[-1] if values.ndim else 0
    try:
        chosen = torch.arange(size)[where]
    except IndexError:
        raise ValueError(f"where={where} is outside the last axis, which has {size} entries") from None
    if not chosen.numel():
        raise ValueError(f"where={where} chooses nothing of the last axis, which has {size} entries")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[chosen] = True
    return mask.to(values.device)
