"""Intervene: put other values in a gate's place while a context is open."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penstock.gates.core import (
    CHOICES,
    GateNotFoundError,
    Pattern,
    Routing,
    Spec,
    Values,
    input_dims,
    named_gates,
    one_hot_like,
    spec_of,
    tensor_of,
)

Named = Literal["open", "closed", "shuffle", "mean", "freeze"]
How: TypeAlias = Named | float | Tensor | Sequence[Tensor] | Callable[[Any], Any]
Where: TypeAlias = int | slice | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None

_NAMED = ("open", "closed", "shuffle", "mean", "freeze")


class GateWarning(UserWarning):
    """An intervention that could not change anything."""


def force(
    model: nn.Module,
    how: How | Mapping[str, How],
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
            - a function from values to values; gradients flow through it. A router passes its `Routing`, and
              may return one or a tensor over all experts.
        pattern: which gates, as for `named_gates`; a mapping brings its own.
        where: restrict to part of the values: an index, slice, list of indices or boolean mask on the last axis,
            or a function from the values to a boolean mask of their shape.
        seed: of the shuffle.

    Returns:
        a context manager. Contexts nest: hooks run in the order they were opened, so the inner one has the last
        word; leaving, also by an exception, restores everything. Its ``unchanged`` set names the gates on which
        a shuffle had no effect (static gates, a single sample), which is also warned about.

    Raises:
        GateNotFoundError: if a pattern matches nothing; the message lists the gates.
        ClosedError: on "closed" for a gate that cannot close, naming the alternatives.
        ValueError: for an unknown name, an entry out of range, or a tensor that does not broadcast.

    Example:
        >>> import torch, penstock
        >>> gate = penstock.gates.SigmoidGate(4, 4)
        >>> with penstock.force(gate, "closed"):
        ...     float(gate(torch.randn(2, 4)).sum())
        0.0
    """
    return Forcing(model, how, pattern, where=where, seed=seed)


class Forcing:
    """The context that `force` returns."""

    def __init__(self, model: nn.Module, how: How | Mapping[str, How], pattern: Pattern, *, where: Where, seed: int) -> None:
        plan: Mapping[Any, How] = how if isinstance(how, Mapping) else {pattern: how}
        self.unchanged: set[str] = set()
        self._seed = seed
        self._where = where
        self._handles: list[RemovableHandle] = []
        self._plan: list[tuple[str, nn.Module, Spec, How]] = []
        if not plan:
            raise GateNotFoundError("an empty mapping forces no gate")
        for one_pattern, one_how in plan.items():
            for name, module in named_gates(model, one_pattern).items():
                spec = spec_of(module)
                assert spec is not None
                _check(name, spec, one_how)
                self._plan.append((name, module, spec, one_how))

    def __enter__(self) -> Forcing:
        assert not self._handles, "a forcing context is entered once at a time"
        for name, module, spec, how in self._plan:
            hook = self._hook(name, spec, how)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str, spec: Spec, how: How) -> Callable[..., Any]:
        memory: dict[str, Any] = {"call": 0, "generator": torch.Generator().manual_seed(self._seed)}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = spec.read(output)
            try:
                after = self._replace(name, spec, how, before, (*args, *kwargs.values()), memory)
            except ValueError as error:
                raise ValueError(f"gate {name or '(the model)'!s}: {error}") from None
            memory["call"] += 1
            return spec.write(output, after)

        return hook

    def _replace(self, name: str, spec: Spec, how: How, before: Values, inputs: Sequence[Any], memory: dict[str, Any]) -> Values:
        if callable(how):
            given = how(before)
            if isinstance(given, Routing):
                return given
            new, detached = given, False
        else:
            new, detached = self._constant(name, spec, how, tensor_of(before), inputs, memory), True
        old = tensor_of(before)
        new = new.to(dtype=old.dtype, device=old.device)
        if detached:
            new = new.detach()
        if torch.broadcast_shapes(new.shape, old.shape) != old.shape:
            raise ValueError(f"a tensor of shape {tuple(new.shape)} does not broadcast to the gate's {tuple(old.shape)}")
        new = new.expand(old.shape)
        if self._where is not None:
            new = torch.where(_mask(self._where, old), new, old)
        return Routing.from_dense(new, before.logits) if isinstance(before, Routing) else new

    def _constant(self, name: str, spec: Spec, how: How, old: Tensor, inputs: Sequence[Any], memory: dict[str, Any]) -> Tensor:
        if isinstance(how, Tensor):
            return how
        if isinstance(how, int | float):
            return one_hot_like(old, int(how)) if spec.kind in CHOICES else torch.full_like(old, float(how))
        if how == "open":
            return spec.open_like(old)
        if how == "closed":
            return spec.closed_like(old)
        leading = input_dims(spec, inputs, old)
        if how == "mean":
            return old.mean(dim=tuple(range(leading)), keepdim=True) if leading else old
        if how == "freeze":
            return memory.setdefault("frozen", old.detach().clone())
        if how == "shuffle":
            return self._shuffle(name, old, leading, memory["generator"])
        sequence = how
        assert not isinstance(sequence, str) and not callable(sequence)
        if memory["call"] >= len(sequence):
            raise ValueError(f"was called more often than there are tensors to force ({len(sequence)})")
        return sequence[memory["call"]]

    def _shuffle(self, name: str, old: Tensor, leading: int, generator: torch.Generator) -> Tensor:
        size = old.shape[0] if leading else 0
        if size > 1:
            cycle = torch.randperm(size, generator=generator).to(old.device)
            new = torch.empty_like(old)
            new[cycle] = old[cycle.roll(1)]
            if not torch.equal(new, old):
                return new
        if name not in self.unchanged:
            self.unchanged.add(name)
            why = "it does not depend on the input" if not leading else "the samples of the batch have the same values"
            warnings.warn(f"shuffling {name or 'the gate'} changes nothing: {why}", GateWarning, stacklevel=2)
        return old


def _check(name: str, spec: Spec, how: How) -> None:
    if isinstance(how, str):
        if how not in _NAMED:
            raise ValueError(f"cannot force {how!r}: it must be one of {', '.join(_NAMED)}, a number, tensor or function")
        if how == "closed":
            try:
                spec.check_closable()
            except ValueError as error:
                raise type(error)(f"gate {name or '(the model)'}: {error}") from None
    elif isinstance(how, bool) or (isinstance(how, int | float) and spec.kind in CHOICES and how != int(how)):
        raise ValueError(f"gate {name} is {spec.kind}: {how!r} names no entry; give a whole number")


def _mask(where: Where, values: Tensor) -> Tensor:
    if callable(where):
        return where(values)
    if isinstance(where, Tensor) and where.dtype == torch.bool:
        return where
    mask = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device)
    try:
        mask[where] = True
    except IndexError:
        raise ValueError(f"where={where} is outside the last axis, which has {values.shape[-1]} entries") from None
    return mask
