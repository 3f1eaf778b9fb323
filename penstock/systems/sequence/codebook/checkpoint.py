"""The authors' checkpoints (taufeeque9/codebook-features, GPT-NeoX models) and our key names.

Theirs wrap the module whose output a codebook takes over: ``mlp.module_layer.*`` beside ``mlp.codebook_layer.*``. A
codebook's own keys (``codebook.weight``, ``ln.weight``; in a group ``codebook.3.codebook.weight``) are the same here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import State, load_strict, rename
from penstock.nn.codebook import CodebookLayer, GroupCodebookLayer, Similarity, make_codebook
from penstock.systems.sequence.codebook.model import CodebookLM, Place

#: The whole model's prefixes, two names of the output matrix, and buffers that old versions of transformers saved.
KEYS = [(r"^(model\.)?gpt_neox\.", ""), (r"^(model\.)?(embed_out|lm_head)\.", "embed_out.")]
_BUFFERS = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")

#: Where in a block their ``codebook_layer`` is, and whether a ``module_layer`` with parameters is beside it -> our name.
PLACES: dict[tuple[str, bool], str] = {
    ("", True): "codebooks.transformer_block",
    ("", False): "codebooks.attn_plus_mlp",
    (".attention", True): "codebooks.attn",
    (".attention", False): "attention.codebooks.attn_preproj",
    (".attention.query_key_value", True): "attention.codebooks.qkv",
    (".mlp", True): "codebooks.mlp",
    (".mlp.act", False): "mlp.codebooks.mlp_mid",
}
_BLOCK = re.compile(r"^(layers\.\d+)((?:\.\w+)*)$")
_OUR_PLACE = re.compile(r"^(layers\.\d+)\.((?:\w+\.)?codebooks\.\w+)\.(.*)$")
_OUR_CODES = re.compile(r"^layers\.(\d+)\.(?:\w+\.)?codebooks\.(\w+)\.(?:codebook\.(\d+)\.)?codebook\.weight$")


def load_codebook(
    state: State, *, top_k: int = 1, similarity: Similarity = "inner_product", loss: str = "aeloss"
) -> CodebookLayer | GroupCodebookLayer:
    """One codebook, or a group, from its own keys, in the dtype of the checkpoint.

    Raises:
        UserError: if tensors are missing, left over or misshapen.
    """
    weights = [value for key, value in state.items() if re.fullmatch(r"(codebook\.\d+\.)?codebook\.weight", key)]
    if not weights:
        raise UserError(f"no codebook.weight among {', '.join(sorted(state)[:4])}")
    group = "codebook.weight" not in state
    (num_codes, width), dtype = weights[0].shape, weights[0].dtype
    codebook = make_codebook(
        width * len(weights),
        num_codes,
        codebook_type="group" if group else "vanilla",
        num_codebooks=len(weights),
        top_k=top_k,
        similarity=similarity,
        loss=loss,
    ).to(dtype)
    load_strict(codebook, state, source="the codebook")
    return codebook


def from_authors(state: State, *, num_heads: int, top_k: int | Mapping[Place, int] = 1, **options: Any) -> CodebookLM:
    """The language model of a published checkpoint; sizes, places and numbers of codes are read from the tensors.

    Args:
        state: under the authors' names (``model.gpt_neox.layers.0.mlp.codebook_layer.codebook.weight`` ...); GPT-NeoX
            models without codebooks are read too.
        num_heads: attention heads.
        top_k: codes chosen, for all places or by place.
        options: what else `CodebookLM` takes and the tensors do not tell: similarity, loss, rotary_fraction ...

    Raises:
        UserError: if tensors are missing, left over or misshapen, or the places' codebooks are not in the same layers.
    """
    ours = to_ours(state)
    if "embed_in.weight" not in ours or "layers.0.mlp.dense_h_to_4h.weight" not in ours:
        raise UserError("the checkpoint is no GPT-NeoX model: it has no embed_in or no layers.0.mlp.dense_h_to_4h")
    vocab_size, hidden_size = ours["embed_in.weight"].shape
    codes: dict[str, list[int]] = {}
    layers: dict[str, set[int]] = {}
    groups: set[str] = set()
    for key, value in ours.items():
        if found := _OUR_CODES.match(key):
            layer, place, head = found.groups()
            layers.setdefault(place, set()).add(int(layer))
            codes.setdefault(place, []).append(len(value))
            groups |= set() if head is None else {place}
    places = [place for place in get_args(Place) if place in codes]
    if len({frozenset(layers[place]) for place in places}) > 1:
        raise UserError(
            f"the codebooks are in different layers: {', '.join(f'{p} {sorted(layers[p])}' for p in places)}"
        )
    per_layer = {place: len(codes[place]) // len(layers[place]) for place in places}
    model = CodebookLM(
        vocab_size,
        hidden_size,
        1 + max(int(key.split(".")[1]) for key in ours if key.startswith("layers.")),
        num_heads,
        intermediate_size=len(ours["layers.0.mlp.dense_h_to_4h.weight"]),
        codebook_at=places,
        codebook_type=["group" if place in groups else "vanilla" for place in places],
        num_codes=[codes[place][0] for place in places],
        num_codebooks=[per_layer[place] // (3 if place == "qkv" else 1) for place in places],
        top_k=top_k if isinstance(top_k, int) else [top_k[place] for place in places],
        codebook_layers=sorted(layers[places[0]]) if places else "all",
        **options,
    ).to(ours["embed_in.weight"].dtype)
    load_strict(model, ours)
    return model


def to_ours(state: State) -> dict[str, Tensor]:
    """Authors' key names to ours."""
    state = rename(state, KEYS)
    prefixes = {key[: dot.start()] for key in state for dot in re.finditer(r"\.", key)}
    ours = {}
    for key, value in state.items():
        owner, wrapper, rest = key.rpartition(".codebook_layer.")
        name = key.replace(".module_layer", "")
        if wrapper:
            block, part = _BLOCK.findall(owner.replace(".module_layer", ""))[0]
            place = PLACES.get((part, f"{owner}.module_layer" in prefixes))
            if place is None:
                raise UserError(f"{key}: no codebook is known at this place of a GPT-NeoX block")
            name = f"{block}.{place}.{rest}"
        if not _BUFFERS.search(name):
            ours[name] = value
    return ours


def to_authors(model: CodebookLM) -> dict[str, Tensor]:
    """The model's state dict under the authors' names."""
    parts = {place: key for key, place in PLACES.items()}
    state = model.state_dict()
    codebooks = {key: match for key in state if (match := _OUR_PLACE.match(key))}
    owners = {match[1] + parts[match[2]][0] for match in codebooks.values() if parts[match[2]][1]}

    def wrapped(path: str) -> str:
        """``path`` with a ``module_layer`` behind every owner of a wrapper that it lies inside."""
        for owner in sorted(owners, key=len, reverse=True):
            if path.startswith(f"{owner}."):
                path = f"{owner}.module_layer{path.removeprefix(owner)}"
        return path

    theirs = {}
    for key, value in state.items():
        name = wrapped(key)
        if match := codebooks.get(key):
            part, beside = parts[match[2]]
            owner = match[1] + part
            layer = f"{wrapped(owner)}.codebook_layer" if beside else wrapped(f"{owner}.codebook_layer")
            name = f"{layer}.{match[3]}"
        theirs[f"model.{name}" if name.startswith("embed_out") else f"model.gpt_neox.{name}"] = value
    return theirs
