"""What was grafted onto a model, kept on the model itself, so that it can be saved and taken off again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from penstock.errors import UserError
from penstock.interop.graft.layout import Layout, Place, find_places

_ATTRIBUTE = "_penstock_grafts"


@dataclass(eq=False)
class Graft:
    """One call of `penstock.graft`.

    It lives on the model, so that a copy of the model has a copy of it, and names modules by where they are and not by
    themselves, since `penstock.twin` puts others there.

    Attributes:
        what: was grafted.
        options: to graft it again, fit for JSON.
        layers: their numbers.
        layout: of the model, where it is no known class.
        parts: (owner, attribute) of every module that was added.
        handles: of the hooks.
    """

    what: str
    options: dict[str, Any]
    layers: list[int] = field(default_factory=list)
    layout: Layout | None = None
    parts: list[tuple[nn.Module, str]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, place: Place, owner: nn.Module, attribute: str, module: nn.Module) -> None:
        """Make ``module`` a part of ``owner``, like the layer's weights in device, precision and mode."""
        owner.add_module(attribute, place.like_weights(module))
        self.parts.append((owner, attribute))

    @property
    def modules(self) -> list[nn.Module]:
        """What was added."""
        return [owner.get_submodule(attribute) for owner, attribute in self.parts]

    def places(self, model: nn.Module) -> list[Place]:
        """The layers it was grafted onto."""
        return find_places(model, self.layers, self.layout)

    def remove(self) -> None:
        """Take everything off."""
        for handle in self.handles:
            handle.remove()
        for owner, attribute in self.parts:
            delattr(owner, attribute)


def grafts_of(model: nn.Module, what: str | None = None) -> list[Graft]:
    """What was grafted onto ``model``, in order; of one kind or all."""
    return [graft for graft in model.__dict__.get(_ATTRIBUTE, []) if what in (None, graft.what)]


def remember(model: nn.Module, graft: Graft) -> None:
    """Keep ``graft`` with the model."""
    model.__dict__.setdefault(_ATTRIBUTE, []).append(graft)


def forget(model: nn.Module, graft: Graft) -> None:
    """The opposite of `remember`."""
    model.__dict__[_ATTRIBUTE].remove(graft)
    if not model.__dict__[_ATTRIBUTE]:
        del model.__dict__[_ATTRIBUTE]


def refuse_second(places: Iterable[tuple[Place, nn.Module]], attribute: str, what: str) -> None:
    """Raise `UserError` if one of the owners beside the places has such a part already."""
    for place, owner in places:
        if hasattr(owner, attribute):
            raise UserError(
                f"layer {place.number} has {attribute} already: choose other layers, or penstock.interop.graft.ungraft"
                f"(model, {what!r}) first"
            )
