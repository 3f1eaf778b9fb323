"""Gates on the attention tiles of a trained model (SeerAttention, Gao et al. 2024): dense until switched to sparse.

Shape legend: B batch, L length, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TypedDict, Unpack, cast, get_args

import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.interop.graft.layout import Place
from penstock.interop.graft.records import Graft, grafts_of, refuse_second
from penstock.interop.graft.tap import Heads, Tap, check
from penstock.nn.conditional import may_skip
from penstock.ops import block_sparse_attention
from penstock.systems.sequence.seer_attention.gates import AttnGate, Tables, parse_gate_type
from penstock.systems.sequence.seer_attention.tiles import Method, TileRule, open_tiles

ATTRIBUTE = "attn_gate"
_SPARSE = "_penstock_sparse"


class RuleChanges(TypedDict, total=False):
    """What may be changed of the gates' `TileRule`; the first three bring their method and exclude each other."""

    nz_ratio: float
    threshold: float | tuple[float, ...]
    token_budget: int
    last_block_dense: bool
    force_diagonal: bool


def graft_seer_attention(
    places: list[Place],
    *,
    model: nn.Module,
    block_size: int = 64,
    gate_type: str = "Qavg_Kmaxminavg",
    gate_hidden_size: int | None = None,
    force_double: bool = False,
    rule: TileRule | None = None,
) -> Graft:
    """A gate on the tiles of each layer's attention map; see `graft`."""
    check(model, places)
    refuse_second([(place, place.attention) for place in places], ATTRIBUTE, "seer_attention")
    rule = rule or TileRule()
    graft = Graft(
        "seer_attention",
        {
            "block_size": block_size,
            "gate_type": gate_type,
            "gate_hidden_size": gate_hidden_size,
            "force_double": force_double,
            "rule": asdict(rule),
        },
    )
    sizes = [(place.head_dim, place.num_heads, place.num_kv_heads) for place in places]
    try:
        q_pool, k_pool = parse_gate_type(gate_type)
        gates = [
            AttnGate(
                *own,
                block_size=block_size,
                gate_hidden_size=gate_hidden_size,
                q_pool=q_pool,
                k_pool=k_pool,
                force_double=force_double,
                rule=rule,
            )
            for own in sizes
        ]
    except ValueError as error:
        raise UserError(f"graft(model, 'seer_attention'): {error}") from None
    for place, gate in zip(places, gates, strict=True):
        graft.attach(place, place.attention, ATTRIBUTE, gate)
    return graft


def gated_places(model: nn.Module) -> list[Place]:
    """The layers with a tile gate, in order.

    Raises:
        UserError: if there is none.
    """
    places = [place for graft in grafts_of(model, "seer_attention") for place in graft.places(model)]
    if not places:
        raise UserError("the model has no attention gates: penstock.graft(model, 'seer_attention') first")
    return sorted(places, key=lambda place: place.number)


def set_sparse(model: nn.Module, enabled: bool = True, **rule: Unpack[RuleChanges]) -> None:
    """Let the attention gates decide which tiles are computed, or go back to dense attention.

    In evaluation mode a sequence, or the prompt of a cache, is then attended to in the tiles that the gates keep; tokens
    after a cache attend densely, by PyTorch's own attention. Training mode is always dense. Padding, left or right,
    shifts nothing: blocks are counted from a sample's first real token. Sequences shorter than a block, and masks that
    are more than causal (packed sequences), are dense, with a warning.

    Args:
        model: with gates of ``graft(model, "seer_attention")``.
        enabled: ``False``: dense, and the attention function that the model had before.
        rule: changes of the gates' rule: ``nz_ratio=0.25`` (share of the tiles), ``threshold=2e-3`` or
            ``token_budget=4096``; ``last_block_dense=False`` ...; see `TileRule`.

    Raises:
        UserError: if the model has no such gates, or for a rule that is none.
    """
    places = gated_places(model)
    _change_rules(places, rule)
    tap: Tap | None = model.__dict__.pop(_SPARSE, None)
    if tap is not None:
        tap.remove()
    if enabled:
        model.__dict__[_SPARSE] = Tap(model, places, _attend)


def is_sparse(model: nn.Module) -> bool:
    """Whether `set_sparse` is on."""
    return _SPARSE in model.__dict__


@contextmanager
def sparse_prefill(model: nn.Module, **rule: Unpack[RuleChanges]) -> Iterator[None]:
    """`set_sparse` while the context is open; rules and mode are as before afterwards.

    Args:
        model, rule: see `set_sparse`.

    Raises:
        UserError: see `set_sparse`.
    """
    places, before = gated_places(model), is_sparse(model)
    rules = [gate_of(place).rule for place in places]
    try:
        set_sparse(model, **rule)
        yield
    finally:
        for place, own in zip(places, rules, strict=True):
            gate_of(place).rule = own
        set_sparse(model, before)


def gate_of(place: Place) -> AttnGate:
    """The layer's tile gate."""
    return gate_in(place.attention)


def gate_in(attention: nn.Module) -> AttnGate:
    """The tile gate of an attention module; in a twin, what stands for it and has its attributes."""
    return cast(AttnGate, attention.get_submodule(ATTRIBUTE))


def _change_rules(places: list[Place], changes: RuleChanges) -> None:
    methods: list[Method] = [name for name in get_args(Method) if name in changes]
    if len(methods) > 1:
        raise UserError(f"{' and '.join(methods)}: give one of them")
    for place in places:
        gate = gate_of(place)
        try:
            gate.rule = replace(gate.rule, method=methods[0] if methods else gate.rule.method, **changes)
        except (TypeError, ValueError) as error:
            raise UserError(f"rule of the attention gates: {error}") from None


def block_tables(tables: Tables, block_size: int) -> Tables:
    """Rotary tables of the first token of each block."""
    return tables[0][:, ::block_size], tables[1][:, ::block_size]


def _attend(attention: nn.Module, heads: Heads) -> Tensor | None:
    """Attention in the tiles that the gate keeps; ``None`` where it is to be dense."""
    gate = gate_in(attention)
    length = heads.queries.shape[2]
    if attention.training:
        return None
    if length < gate.block_size:
        warnings.warn(
            f"{length} tokens are less than a block of {gate.block_size}: attention stays dense", stacklevel=2
        )
        return None
    order_BL = real_BL = None
    if heads.mask is not None:
        real_BL = padding_of(heads.mask)
        if real_BL is None:
            warnings.warn("the attention mask is more than causal: attention stays dense", stacklevel=2)
            return None
        order_BL = (~real_BL).int().argsort(stable=True, dim=1)
        heads, real_BL = _reordered(heads, order_BL), real_BL.gather(1, order_BL)
    kept = open_tiles(gate(heads.raw_queries, heads.raw_keys, block_tables(heads.tables, gate.block_size), real_BL))
    y_BHLK = block_sparse_attention(
        heads.queries,
        heads.keys,
        heads.values,
        kept,
        block_size=gate.block_size,
        scale=heads.scale,
        backend=None if may_skip() else "reference",
    )
    return y_BHLK if order_BL is None else _take(y_BHLK, order_BL.argsort(1), 2)


def padding_of(mask: Tensor) -> Tensor | None:
    """Which tokens are real, bool (B, L), from who sees whom, bool (B, 1, L, L); ``None`` if there is more to it."""
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    seen_BLL = mask[:, 0]
    real_BL = seen_BLL.diagonal(dim1=1, dim2=2)
    causal = torch.ones(seen_BLL.shape[1:], dtype=torch.bool, device=mask.device).tril()
    same = seen_BLL == (causal & real_BL[:, None])
    return real_BL if bool((same | ~real_BL[:, :, None]).all()) else None


def _reordered(heads: Heads, order_BL: Tensor) -> Heads:
    """The real tokens of each sample first."""
    batch = len(order_BL)
    cos, sin = (_take(table.expand(batch, -1, -1), order_BL, 1) for table in heads.tables)
    return heads._replace(
        queries=_take(heads.queries, order_BL, 2),
        keys=_take(heads.keys, order_BL, 2),
        values=_take(heads.values, order_BL, 2),
        raw_queries=_take(heads.raw_queries, order_BL, 1),
        raw_keys=_take(heads.raw_keys, order_BL, 1),
        tables=(cos, sin),
    )


def _take(x: Tensor, order_BL: Tensor, dim: int) -> Tensor:
    """``x`` (B, ...) with the tokens of axis ``dim`` in this order, sample by sample."""
    shape = [len(x), *[1] * (x.ndim - 1)]
    shape[dim] = order_BL.shape[1]
    return x.gather(dim, order_BL.view(shape).expand(x.shape))
