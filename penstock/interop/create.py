"""Published sizes by name, and authors' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from penstock.errors import UserError, nearest
from penstock.lab.cards import all_cards, card
from penstock.nn.checkpoints import read_state


def list_models(pattern: str = "*") -> list[str]:
    """The names `create_model` knows, matching a shell-style pattern."""
    return sorted(
        name for c in all_cards().values() if c.ready for name in _variants(c.module) if fnmatchcase(name, pattern)
    )


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A published model with fresh weights.

    Args:
        name: as `list_models` lists them ("convit_tiny").
        overrides: arguments of the model's builder; ``None`` leaves the default, as in timm.

    Raises:
        UserError: for an unknown name, with the nearest, or an argument the builder does not take.
        ValueError: for impossible sizes.
    """
    for found in all_cards().values():
        if found.ready and name in (variants := _variants(found.module)):
            given = {key: value for key, value in overrides.items() if value is not None}
            try:
                return variants[name](**given)
            except TypeError as error:
                raise UserError(f"create_model({name!r}): {error}") from error
    known = list_models()
    raise UserError(f"no model is called {name!r}; did you mean {' or '.join(nearest(name, known) or known)}?")


def load_authors(name: str, checkpoint: str | Path | Mapping[str, Tensor], **options: Any) -> nn.Module:
    """A model with the weights of the authors' own checkpoint.

    Args:
        name: of the system.
        checkpoint: a ``.safetensors`` or ``torch.save`` file, or a state dict, under the authors' key names.
        options: what the tensors' shapes do not tell; see the system's ``checkpoint.from_authors``.

    Raises:
        UserError: if the file cannot be read safely, or tensors are missing, left over or misshapen.
    """
    found = card(name)
    try:
        module = import_module(f"{found.module}.checkpoint")
    except ModuleNotFoundError:
        raise UserError(f"{name} has no published checkpoints to load") from None
    try:
        return module.from_authors(read_state(checkpoint), **options)
    except TypeError as error:
        raise UserError(f"load_authors({name!r}): {error}") from error


def _variants(module: str) -> Mapping[str, Any]:
    return getattr(import_module(f"{module}.model"), "VARIANTS", {})
