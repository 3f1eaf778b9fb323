"""Penstock: gated neural networks beside their ungated twins; every gate can be watched, forced and ablated."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from penstock._version import __version__

if TYPE_CHECKING:
    from penstock import gates as gates
    from penstock.gates import Gate, Routing, ablate, force, mark, twin, watch
    from penstock.interop.create import create_model, list_models, load_authors
    from penstock.interop.graft import graft
    from penstock.interop.sklearn import ClickClassifier
    from penstock.lab.store import load

_HOMES = {
    **dict.fromkeys(("Gate", "Routing", "ablate", "force", "mark", "twin", "watch"), "penstock.gates"),
    **dict.fromkeys(("create_model", "list_models", "load_authors"), "penstock.interop.create"),
    "ClickClassifier": "penstock.interop.sklearn",
    "graft": "penstock.interop.graft",
    "load": "penstock.lab.store",
}
_ROOMS = ("gates", "interop", "lab", "nn", "ops", "tasks")


def __getattr__(name: str) -> Any:
    # Nothing here imports torch until it is asked for: the commands that only read cards must start at once.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return import_module(f"penstock.{name}")
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_ROOMS])


__all__ = [
    "ClickClassifier",
    "Gate",
    "Routing",
    "__version__",
    "ablate",
    "create_model",
    "force",
    "gates",
    "graft",
    "list_models",
    "load",
    "load_authors",
    "mark",
    "twin",
    "watch",
]
