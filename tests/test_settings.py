"""Every setting a person can give is documented where it is declared; its docstring becomes the flag's help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator

import pytest

from penstock.lab.cards import all_cards
from penstock.lab.run import Options
from penstock.lab.system import system

READY = [name for name, card in all_cards().items() if card.ready]


def nested(kind: type) -> Iterator[type]:
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from nested(typing.cast(type, hint))


def undocumented(kind: type) -> list[str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    missing = []
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            group = dataclasses.is_dataclass(typing.get_type_hints(kind).get(statement.target.id))
            if not documented and not group:
                missing.append(f"{kind.__name__}.{statement.target.id}")
    return missing


@pytest.mark.parametrize("kind", [Options, *(system(name).Config for name in READY)])
def test_every_setting_has_its_help(kind: type) -> None:
    assert not [name for one in nested(kind) for name in undocumented(one)]


@pytest.mark.parametrize("name", READY)
def test_presets_are_whole_configurations(name: str) -> None:
    for preset in system(name).presets.values():
        assert isinstance(preset, system(name).Config)
