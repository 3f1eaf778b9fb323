"""The authors' OptInter checkpoints (fuyuanlyu/OptInter), of the search and of the retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import load_strict, rename
from penstock.systems.recommendation.optinter.model import InteractionNet, Method
from penstock.systems.recommendation.optinter.vocabulary import all_pairs

#: The authors' key -> ours. `arch_parameters` is no part of their state dict: it is in arch_weight.npy.
KEYS = [
    (r"^(orig|cate)_embeddings_table\.", "embedding.table."),
    (r"^comb_embeddings_table\.", "cross_table."),
    (r"^addition_embeddings?_table\.", "factor_table."),
    (r"^arch_parameters$", "gate.alpha"),
    (r"^fc_layers\.", "mlp.linears."),
    (r"^norm_layers\.", "mlp.norms."),
    (r"^output_layer\.", "mlp.output."),
]
_SHARED = [
    (r"^cross_table\.", "comb_embeddings_table."),
    (r"^gate\.alpha$", "arch_parameters"),
    (r"^mlp\.linears\.", "fc_layers."),
    (r"^mlp\.norms\.", "norm_layers."),
    (r"^mlp\.output\.", "output_layer."),
]
#: Ours -> the authors', of the search and of the retraining, which name two tables differently.
SEARCH_KEYS = [
    (r"^embedding\.table\.", "orig_embeddings_table."),
    (r"^factor_table\.", "addition_embedding_table."),
    *_SHARED,
]
FINAL_KEYS = [
    (r"^embedding\.table\.", "cate_embeddings_table."),
    (r"^factor_table\.", "addition_embeddings_table."),
    *_SHARED,
]
#: The method of each ``alpha_mode`` of the retraining.
MODES: tuple[Method, ...] = ("search", "memorise", "factorise", "naive")


def from_authors(
    state: Mapping[str, Tensor],
    *,
    num_fields: int,
    num_numeric: int = 0,
    pairs: Sequence[Sequence[int]] | None = None,
    arch: Tensor | None = None,
    tau: float = 5e-5,
    step: int = 0,
) -> InteractionNet:
    """The network that a checkpoint was saved from, in the checkpoint's dtype.

    Args:
        state: the authors' state dict; which tables are in it tells the stage and the ``alpha_mode``.
        num_fields: categorical fields; of the tables' rows, the first ``num_numeric`` are the numeric fields'.
        num_numeric: numeric fields.
        pairs: the fields of each column of crosses; default all pairs in lexicographic order.
        arch: (P, 3) the architecture of arch_weight.npy: alpha of a search (unless ``state`` has ``arch_parameters``),
            alpha or one-hot of a retraining by searched choice.
        tau: how much the temperature falls a step of the search.
        step: how many steps the search has made.

    Raises:
        UserError: if the tensors do not fit, or the architecture is missing.
    """
    searching = "orig_embeddings_table.weight" in state
    table = state.get("orig_embeddings_table.weight" if searching else "cate_embeddings_table.weight")
    if table is None:
        raise UserError(
            "the checkpoint has neither orig_embeddings_table.weight nor cate_embeddings_table.weight: it is not an "
            "OptInter network"
        )
    ours = rename(state, KEYS)
    cross, factor = ours.get("cross_table.weight"), ours.get("factor_table.weight")
    method: Method = MODES[2 * (cross is None) + (factor is None)]
    num_pairs = len(all_pairs(num_fields) if pairs is None else pairs)
    widths = _widths(ours)
    net = InteractionNet(
        len(table),
        num_fields,
        0 if cross is None else len(cross),
        pairs=pairs,
        method=method,
        dim=table.shape[1],
        pair_dim=_pair_dim(cross, factor, widths[0] - (num_fields + num_numeric) * table.shape[1], num_pairs),
        mlp_dims=widths[1:-1],
        tau=tau,
        numeric_ids=range(num_numeric),
    ).to(table.dtype)
    if net.gate is not None:
        alpha = ours.get("gate.alpha", arch)
        if alpha is None or alpha.shape != net.gate.alpha.shape:
            given = "nothing" if alpha is None else tuple(alpha.shape)
            raise UserError(f"arch, the (P, 3) numbers of arch_weight.npy, is {given}; it must be ({num_pairs}, 3)")
        ours |= {"gate.alpha": alpha, "gate.step": torch.tensor(step), "gate.hard": torch.tensor(not searching)}
    load_strict(net, ours)
    if net.gate is not None and not searching:
        net.gate.harden()
    return net


def to_authors(net: InteractionNet) -> dict[str, Tensor]:
    """The state of a network under the authors' keys, with ``arch_parameters`` beside if it has a gate."""
    state = {key: value for key, value in net.state_dict().items() if key not in ("gate.step", "gate.hard")}
    return rename(state, authors_keys(net))


def authors_keys(net: InteractionNet) -> list[tuple[str, str]]:
    """Ours -> the authors' for a network of its stage."""
    return SEARCH_KEYS if net.gate is not None and not net.gate.hard else FINAL_KEYS


def _widths(ours: Mapping[str, Tensor]) -> list[int]:
    """Input width, hidden widths and output width of the perceptron."""
    layers: list[Tensor] = []
    while (weight := ours.get(f"mlp.linears.{len(layers)}.weight")) is not None:
        layers.append(weight)
    if (output := ours.get("mlp.output.weight")) is None:
        raise UserError("the checkpoint has no output_layer.weight")
    return [layer.shape[1] for layer in (*layers, output)] + [1]


def _pair_dim(cross: Tensor | None, factor: Tensor | None, width: int, num_pairs: int) -> int:
    """Of an interaction, by a table of its width or by what the first layer has room for."""
    for table in (cross, factor):
        if table is not None:
            return table.shape[1]
    if width <= 0 or width % max(num_pairs, 1):
        raise UserError(f"the first layer has {width} columns for {num_pairs} pairs: other num_fields or num_numeric")
    return width // num_pairs
