"""Codebook bottlenecks in a trained model (Tamkin et al., "Codebook Features", 2023), which start switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from penstock.errors import UserError
from penstock.interop.graft.layout import Place
from penstock.interop.graft.records import Graft, grafts_of, refuse_second
from penstock.nn.codebook import (
    CodebookKey,
    CodebookLayer,
    CodebookType,
    GroupCodebookLayer,
    Similarity,
    make_codebook,
)

CodebookPlace = Literal["attn_preproj", "attn", "mlp_mid", "mlp", "transformer_block"]


class _Site(NamedTuple):
    """A module, whose input or output a codebook stands on, and the width of that."""

    module: nn.Module
    reads: Literal["input", "output"]
    width: int


_SITES: dict[CodebookPlace, Callable[[Place], _Site]] = {
    "attn_preproj": lambda place: _Site(place.output, "input", place.width(place.output, "in_features")),
    "attn": lambda place: _Site(place.attention, "output", place.hidden_size),
    "mlp_mid": lambda place: _Site(place.mlp_output, "input", place.width(place.mlp_output, "in_features")),
    "mlp": lambda place: _Site(place.mlp, "output", place.hidden_size),
    "transformer_block": lambda place: _Site(place.layer, "output", place.hidden_size),
}


def graft_codebook(
    places: list[Place],
    *,
    at: CodebookPlace | Sequence[CodebookPlace] = "mlp",
    num_codes: int = 100,
    top_k: int = 1,
    codebook_type: CodebookType | None = None,
    num_codebooks: int | None = None,
    similarity: Similarity = "inner_product",
    loss: str = "aeloss",
    replace_after: int = 0,
    replace_noise: float = 0.0,
) -> Graft:
    """A codebook at one or more places of each layer; see `graft`."""
    where: list[CodebookPlace] = [at] if isinstance(at, str) else list(at)
    if not where or not set(where) <= set(_SITES):
        raise UserError(f"at={at!r}: it must be one or more of {', '.join(get_args(CodebookPlace))}")
    for one in where:
        refuse_second([(place, place.layer) for place in places], attribute(one), "codebook")
    options: dict[str, Any] = {
        "num_codes": num_codes,
        "top_k": top_k,
        "similarity": similarity,
        "loss": loss,
        "replace_after": replace_after,
        "replace_noise": replace_noise,
    }
    graft = Graft("codebook", {"at": where, "codebook_type": codebook_type, "num_codebooks": num_codebooks, **options})
    made = []
    for place in places:
        for one in where:
            site = _SITES[one](place)
            kind = codebook_type or ("group" if one == "attn_preproj" else "vanilla")
            groups = num_codebooks or (place.num_heads if kind == "group" else 1)
            key = CodebookKey(place.number, one)
            try:
                codebook = make_codebook(site.width, codebook_type=kind, num_codebooks=groups, key=key, **options)
            except ValueError as error:
                raise UserError(f"graft(model, 'codebook'): {error}") from None
            made.append((place, one, site, codebook))
    for place, one, site, codebook in made:
        _switch(codebook, False)
        graft.attach(place, place.layer, attribute(one), codebook)
        if site.reads == "input":
            graft.handles.append(site.module.register_forward_pre_hook(partial(_on_input, codebook)))
        else:
            graft.handles.append(site.module.register_forward_hook(partial(_on_output, codebook)))
    return graft


def attribute(at: CodebookPlace) -> str:
    """The name of the layer's part."""
    return f"codebook_{at}"


def enable_codebooks(model: nn.Module, enabled: bool = True) -> None:
    """Put the grafted codebooks into effect, or let everything pass unchanged again.

    `penstock.nn.code_reading` has what may be done with them then: `record_codes`, `force_codes`, `kmeans_codebooks` to start
    the codes where the activations are, `bypass_codebooks` for a while.

    Args:
        model: with codebooks of ``graft(model, "codebook")``.
        enabled: whether they are to act.

    Raises:
        UserError: if it has none.
    """
    grafts = grafts_of(model, "codebook")
    if not grafts:
        raise UserError("the model has no grafted codebooks: penstock.graft(model, 'codebook') first")
    for graft in grafts:
        for codebook in graft.modules:
            _switch(codebook, enabled)


def _switch(codebook: nn.Module, enabled: bool) -> None:
    for layer in codebook.modules():
        if isinstance(layer, CodebookLayer):
            layer.enabled = enabled


def _on_input(
    codebook: CodebookLayer | GroupCodebookLayer, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (codebook(args[0]), *args[1:])


def _on_output(codebook: CodebookLayer | GroupCodebookLayer, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (codebook(output[0]), *output[1:])
    return codebook(output)
