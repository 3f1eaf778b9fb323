"""What a hyper-parameter search may try: a small vocabulary, used by systems and in the user's YAML files."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from penstock.errors import UserError, nearest


@dataclass(frozen=True)
class Range:
    """Every number from ``low`` to ``high``, evenly on a log scale if ``log``; ``whole`` for whole numbers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (", log" if self.log else "")


@dataclass(frozen=True)
class OneOf:
    """One of several values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return " | ".join(map(label, self.values))


@dataclass(frozen=True)
class Around:
    """What lies around the configured value.

    Of a number: from the value divided by ``factor`` to the value times it, on a log scale. Of hidden widths: these,
    scaled down and up by ``factor``, each also with a layer fewer and a layer more.

    Attributes:
        factor: above 1.
        start: stands in for a configured value that is none or 0.
    """

    factor: float
    start: float = 0.0


Choice = Range | OneOf | Around
#: What can be drawn from: an `Around` becomes one of these once the configuration is known.
Settled = Range | OneOf


def label(value: Any) -> str:
    """A value as one would type it after its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings by dotted name as the arguments that `penstock run` takes."""
    found = []
    for name, value in settings.items():
        group, _, leaf = name.replace("_", "-").rpartition(".")
        no = "no-" if value is False else ""
        found.append(f"--{group}.{no}{leaf}" if group else f"--{no}{leaf}")
        if not isinstance(value, bool):
            found += map(str, value) if isinstance(value, tuple) else [str(value)]
    return found


def settings_of(config: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every setting of a configuration by dotted name: its type and its value."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, tuple[Any, Any]] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            found |= settings_of(value, f"{prefix}{one.name}.")
        else:
            found[prefix + one.name] = hints[one.name], value
    return found


def settle(space: Mapping[str, Choice], config: Any) -> dict[str, Settled]:
    """The space for one configuration, whose own values are always among those to be tried.

    What leaves no choice (the widths of a perceptron that is not there) is left out.
    """
    known = settings_of(config)
    settled = {name: _settled(choice, *known[name]) for name, choice in space.items()}
    return {name: choice for name, choice in settled.items() if isinstance(choice, Range) or len(choice.values) > 1}


def _settled(choice: Choice, hint: Any, value: Any) -> Settled:
    if isinstance(choice, Range):
        return choice
    if isinstance(choice, OneOf):
        return choice if value in choice.values else OneOf((value, *choice.values))
    if isinstance(value, tuple):
        return OneOf(_shapes(value, choice.factor))
    middle = value or choice.start
    if _number(hint) == "whole":
        return Range(max(round(middle / choice.factor), 1), round(middle * choice.factor), log=True, whole=True)
    return Range(float(f"{middle / choice.factor:.3g}"), float(f"{middle * choice.factor:.3g}"), log=True)


def _shapes(widths: tuple[int, ...], factor: float) -> tuple[tuple[int, ...], ...]:
    scaled = [tuple(max(round(width * by), 1) for width in widths) for by in (1, 1 / factor, factor)]
    deeper = [own for one in scaled for own in (one, one[:-1], (*one, *one[-1:])) if own]
    return tuple(dict.fromkeys(deeper)) or (widths,)


def read_space(path: Path, config: Any, shared: Collection[str]) -> dict[str, Settled]:
    """A search space from a YAML file: `train.lr: {low: 1e-4, high: 1e-2, log: true}`, `dim: [8, 16, 32]`.

    Args:
        path: of the file.
        config: of the system.
        shared: groups of settings that all trials share, which cannot be searched.

    Raises:
        UserError: naming what cannot be used and what would be right.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--search {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--search {path}: is no YAML ({' '.join(str(error).split())})") from None
    return parse_space(raw, config, shared, where=f"--search {path}")


def parse_space(raw: Any, config: Any, shared: Collection[str], *, where: str) -> dict[str, Settled]:
    """The same from what the file holds; see `read_space`."""
    if not isinstance(raw, Mapping) or not raw:
        raise UserError(f"{where}: must map settings to what to try, as `dim: [8, 16, 32]`")
    known = {
        name: hint for name, (hint, _) in settings_of(config).items() if name.partition(".")[0] not in shared
    }  # fmt: skip
    return {str(name): _parsed(str(name), given, known, shared, where) for name, given in raw.items()}


def _parsed(name: str, given: Any, known: Mapping[str, Any], shared: Collection[str], where: str) -> Settled:
    if name not in known:
        if name.partition(".")[0] in shared:
            raise UserError(f"{where}: {name} cannot be searched: all trials share the data")
        close = nearest(name, known) or list(known)
        raise UserError(f"{where}: there is no setting {name!r}; did you mean {' or '.join(close[:2])}?")
    hint = known[name]
    try:
        if isinstance(given, list):
            values = tuple(dict.fromkeys(_typed(hint, value) for value in given))
            if len(values) < 2:
                raise ValueError("there must be two values or more to choose from")
            return OneOf(values)
        if isinstance(given, Mapping) and {"low", "high"} <= set(given) <= {"low", "high", "log"}:
            return _range(given, _number(hint))
    except ValueError as error:
        raise UserError(f"{where}: {name}: {error}") from None
    raise UserError(f"{where}: {name}: give a list of values, or a range as {{low: 1e-4, high: 1e-2, log: true}}")


def _range(given: Mapping[str, Any], number: Literal["whole", "real", ""]) -> Range:
    if not number:
        raise ValueError("is no number; give a list of values")
    low, high, log = _typed(float, given["low"]), _typed(float, given["high"]), given.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log is {log!r}; it must be true or false")
    if not low < high or (log and low <= 0):
        raise ValueError(f"low={low:g}, high={high:g}: low must be below high" + (" and above 0" if log else ""))
    if number == "whole" and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"low={low:g}, high={high:g} must be whole numbers")
    return Range(int(low), int(high), log, whole=True) if number == "whole" else Range(low, high, log)


def plain_space(space: Mapping[str, Settled]) -> dict[str, Any]:
    """A space as plain values, as they would stand in its YAML file."""
    return {
        name: {"low": choice.low, "high": choice.high, "log": choice.log}
        if isinstance(choice, Range)
        else [list(value) if isinstance(value, tuple) else value for value in choice.values]
        for name, choice in space.items()
    }


def _arms(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _number(hint: Any) -> Literal["whole", "real", ""]:
    arms = _arms(hint)
    return "real" if float in arms else "whole" if int in arms else ""


def _typed(hint: Any, value: Any) -> Any:
    """``value`` as the setting's type has it.

    Raises:
        ValueError: if it is not of that type.
    """
    for arm in _arms(hint):
        if typing.get_origin(arm) is Literal and value in typing.get_args(arm):
            return value
        if typing.get_origin(arm) is tuple and isinstance(value, list):
            return tuple(_typed(typing.get_args(arm)[0], item) for item in value)
        if arm is type(None) and value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (arm is bool and isinstance(value, bool)) or (arm is int and number and isinstance(value, int)):
            return value
        # YAML takes 1e-4 for text: it wants 1.0e-4.
        if arm is float and (number or (isinstance(value, str) and _is_float(value))):
            return float(value)
        if arm is str and (number or isinstance(value, str)):
            return str(value)
    raise ValueError(f"{value!r} is not of its type ({_name(hint)})")


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
