"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import penstock.gates

MODULES = [found.name for found in pkgutil.iter_modules(penstock.gates.__path__, "penstock.gates.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0


def test_the_calls_of_the_contract_have_examples() -> None:
    for call in (penstock.Gate, penstock.watch, penstock.force, penstock.ablate, penstock.twin, penstock.mark):
        assert ">>> " in (call.__doc__ or ""), call
