"""Configurations as plain dictionaries and back: they are written to ``config.yaml`` and read again."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from penstock.errors import UserError, nearest

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain values fit for YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_dict(kind: type[T], values: Mapping[str, Any], *, where: str = "configuration") -> T:
    """The dataclass ``kind`` from what `to_dict` gave; fields left out keep their defaults.

    Raises:
        UserError: on an unknown field, with the nearest names.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in fields]:
        close = nearest(unknown[0], fields) or sorted(fields)
        raise UserError(f"{where}: no field {unknown[0]!r}; did you mean {' or '.join(close)}?")
    return kind(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type[Any], hint), value, where=where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        return tuple(value)
    if hint is Path:
        return Path(value)
    return float(value) if hint is float and isinstance(value, int) else value


def override(config: T, changes: Mapping[str, Any]) -> T:
    """A copy of ``config`` with fields changed by dotted name ("train.steps").

    Raises:
        UserError: on an unknown field, with the nearest names.
    """
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            nested[head] = value
    known = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    if unknown := [name for name in nested if name not in known]:
        close = nearest(unknown[0], known) or known
        raise UserError(f"{type(config).__name__}: no field {unknown[0]!r}; did you mean {' or '.join(close)}?")
    direct = {
        name: override(getattr(config, name), value) if dataclasses.is_dataclass(getattr(config, name)) else value
        for name, value in nested.items()
    }
    return dataclasses.replace(config, **direct)  # type: ignore[type-var]


def untouched(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``changes`` whose field still has its default in ``config``: what a person set by hand stays."""
    default = type(config)()
    return {name: value for name, value in changes.items() if _at(config, name) == _at(default, name)}


def _at(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config
