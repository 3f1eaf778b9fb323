"""Adding gates to a model of transformers, and taking them off again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args, overload

from torch import nn

from penstock.errors import UserError
from penstock.interop.graft.codebooks import CodebookPlace, graft_codebook
from penstock.interop.graft.layout import Layers, Layout, find_places
from penstock.interop.graft.output_gate import Granularity, graft_output_gate
from penstock.interop.graft.records import Graft, forget, grafts_of, remember
from penstock.interop.graft.seer import graft_seer_attention, is_sparse, set_sparse
from penstock.nn.codebook import CodebookType, Similarity
from penstock.systems.sequence.seer_attention.tiles import TileRule

What = Literal["output_gate", "seer_attention", "codebook"]
_Model = TypeVar("_Model", bound=nn.Module)

_MAKERS: dict[str, Callable[..., Graft]] = {
    "output_gate": graft_output_gate,
    "seer_attention": graft_seer_attention,
    "codebook": graft_codebook,
}


@overload
def graft(
    model: _Model,
    what: Literal["output_gate"],
    *,
    layers: Layers = "all",
    layout: Layout | None = None,
    granularity: Granularity = "headwise",
    bias: bool = False,
) -> _Model: ...
@overload
def graft(
    model: _Model,
    what: Literal["seer_attention"],
    *,
    layers: Layers = "all",
    layout: Layout | None = None,
    block_size: int = 64,
    gate_type: str = "Qavg_Kmaxminavg",
    gate_hidden_size: int | None = None,
    force_double: bool = False,
    rule: TileRule | None = None,
) -> _Model: ...
@overload
def graft(
    model: _Model,
    what: Literal["codebook"],
    *,
    layers: Layers = "all",
    layout: Layout | None = None,
    at: CodebookPlace | Sequence[CodebookPlace] = "mlp",
    num_codes: int = 100,
    top_k: int = 1,
    codebook_type: CodebookType | None = None,
    num_codebooks: int | None = None,
    similarity: Similarity = "inner_product",
    loss: str = "aeloss",
    replace_after: int = 0,
    replace_noise: float = 0.0,
) -> _Model: ...
def graft(model: _Model, what: What, *, layers: Layers = "all", layout: Layout | None = None, **options: Any) -> _Model:
    """Add gates to a model of transformers (Llama, Qwen2, Qwen3, GPT-NeoX), in place; at the start nothing changes.

    - ``"output_gate"``: 2 sigmoid(W x) on the heads' output before its projection, x being the layer's normalised input
      and W zero at first: outputs are equal to the bit (Qiu et al. 2025). Train it with the model, or alone.
    - ``"seer_attention"``: a gate on the tiles of the attention map (Gao et al. 2024). Attention stays what it was until
      `set_sparse` or `sparse_prefill`; `distil` trains the gates, `sparse_report` says what sparse attention costs.
    - ``"codebook"``: a bottleneck of discrete codes (Tamkin et al. 2023), which passes everything unchanged until
      `enable_codebooks`; the codes are read and written with `penstock.nn.code_reading`.

    The gates are parts of the model, so that they are in its ``state_dict`` and found by `penstock.watch`, `force`,
    `ablate` and `twin`. What the model was before has the same names and values as ever, and `ungraft` restores it.

    Args:
        model: with or without a head.
        what: of the three.
        layers: which; numbers count from the end if negative.
        layout: where the parts of another class are.
        granularity: of output gates: one value a head ("headwise") or one a channel ("elementwise").
        bias: whether output gates have a bias, which starts at zero too.
        block_size, gate_type, gate_hidden_size, force_double, rule: see `AttnGate`; the type as "Qavg_Kmaxminavg".
        at: where codebooks are: the concatenated heads before their projection ("attn_preproj"), the attention's output
            ("attn"), the MLP's hidden layer ("mlp_mid") or output ("mlp"), the layer's ("transformer_block").
        codebook_type: one codebook ("vanilla") or several side by side ("group", at "attn_preproj" the default).
        num_codebooks: of a group, default one a head.
        num_codes, top_k, similarity, loss, replace_after, replace_noise: see `CodebookLayer`.

    Returns:
        the same model.

    Raises:
        UserError: for a class that is not known, layers or options that are not right, or a second gate at the same place.

    Example:
        >>> import penstock
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = penstock.graft(LlamaForCausalLM(config), "output_gate", layers=[-1])
        >>> list(penstock.gates.named_gates(model))
        ['model.layers.1.self_attn.output_gate']
    """
    if what not in _MAKERS:
        raise UserError(f"graft: what={what!r} must be one of {', '.join(get_args(What))}")
    maker = _MAKERS[what]
    known = [name for name in inspect.signature(maker).parameters if name not in ("places", "model")]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"graft(model, {what!r}) takes layers, layout, {', '.join(known)}; not {unknown[0]}")
    if what == "seer_attention" and is_sparse(model):
        raise UserError("attention is sparse: set_sparse(model, False) before more layers get gates")
    places = find_places(model, layers, layout)
    if what == "seer_attention":
        options["model"] = model
    made = maker(places, **options)
    made.layers, made.layout = [place.number for place in places], layout
    remember(model, made)
    return model


def ungraft(model: nn.Module, what: What | None = None) -> None:
    """Take off what was grafted; the model is what it was before.

    Args:
        model: with grafts.
        what: the kind, default all.

    Raises:
        UserError: if there is nothing to take off.
    """
    grafts = grafts_of(model, what)
    if not grafts:
        raise UserError(f"no {what or 'gate'} was grafted onto this {type(model).__name__}")
    if is_sparse(model) and what in (None, "seer_attention"):
        set_sparse(model, False)
    for one in reversed(grafts):
        one.remove()
        forget(model, one)
