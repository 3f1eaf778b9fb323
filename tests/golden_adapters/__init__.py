"""One module a system: ``ADAPTERS[kind](config, params, inputs) -> outputs`` reproduces the authors' numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def refuse_unknown(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Fail on a configuration key the adapter does not pass on."""
    if unknown := set(config) - set(known):
        raise ValueError(f"the adapter does not know {sorted(unknown)}; it knows {sorted(known)}")
