"""Gates under the authors' names (microsoft/SeerAttention): files with nothing but the gates, as they publish them.

A file ``attn_gate_weights.pth`` holds ``model.layers.0.self_attn.attn_gate.mask_linear_k.weight`` and so on for a prefill
gate, ``attngate_linear_q``, ``attngate_linear_k``, ``attngate_qnorm`` and ``attngate_knorm`` for one of decoding. The
base model's weights are another file, and not read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import State, load_strict, read_state, rename
from penstock.systems.sequence.seer_attention.gates import AttnGate, DecodeGate, QueryPooling, parse_gate_type
from penstock.systems.sequence.seer_attention.model import GateStack, SeerLM, TileGate
from penstock.systems.sequence.seer_attention.tiles import TileRule

#: The authors' names within a gate, and ours.
KEYS = [
    (r"(?:mask|attngate)_linear_q\.", "query_map."),
    (r"(?:mask|attngate)_linear_k\.", "key_map."),
    (r"attngate_qnorm\.", "query_norm."),
    (r"attngate_knorm\.", "key_norm."),
]
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.attn_gate\.(.+)")


def from_authors(
    state: State,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    block_size: int = 64,
    gate_type: str = "Qavg_Kmaxminavg",
    query_pooling: QueryPooling | None = None,
    rotary: bool = True,
    compat: bool = False,
    rule: TileRule | None = None,
) -> GateStack:
    """The gates of a published file.

    Args:
        state: under the authors' names; names without a layer are those of a single gate.
        num_heads: query heads H; needed by decode gates that average them.
        num_kv_heads: key/value heads G of the base model; needed by prefill gates without a map of queries, default H.
        block_size: b.
        gate_type: the pools of prefill gates; of a decode gate the keys' part counts.
        query_pooling: of decode gates, to be held against the shapes; default what they tell.
        rotary, compat, rule: see `AttnGate` and `DecodeGate`.

    Raises:
        UserError: if tensors are missing, left over or misshapen, or the shapes contradict the options.
    """
    layers = _by_layer(state)
    gates: list[TileGate] = []
    for number, own in layers.items():
        try:
            if any(key.startswith("attngate") for key in own):
                gate: TileGate = _decode_gate(
                    own, num_heads, block_size, gate_type, query_pooling, rotary, compat, rule
                )
            else:
                gate = _prefill_gate(own, num_kv_heads, block_size, gate_type, rotary, rule)
        except ValueError as error:
            raise UserError(f"layer {number}: {error}") from error
        gates.append(gate.to(next(iter(own.values())).dtype))
    stack = GateStack(gates)
    load_gates(stack, state)
    return stack


def load_gates(target: GateStack | SeerLM | Sequence[TileGate], source: str | Path | State) -> None:
    """Load the authors' gates into gates that exist: of a model, a stack, or any list with one a layer.

    Args:
        target: what to load into; a model's other weights stay as they are.
        source: a file or a state dict.

    Raises:
        UserError: if layers or tensors are missing, left over or misshapen, or the file cannot be read.
    """
    gates = target.gates if isinstance(target, GateStack | SeerLM) else list(target)
    layers = _by_layer(read_state(source))
    if list(layers) != list(range(len(gates))):
        have = f"{min(layers)} to {max(layers)} ({len(layers)} layers)"
        raise UserError(f"the checkpoint has the gates of layers {have}; the model has {len(gates)} layers with a gate")
    for number, own in layers.items():
        load_strict(gates[number], rename(own, KEYS), source=f"the checkpoint's gate of layer {number}")


def to_authors(source: GateStack | SeerLM | Sequence[TileGate]) -> dict[str, Tensor]:
    """The gates alone under the authors' names; a model's other weights are not in it."""
    gates = source.gates if isinstance(source, GateStack | SeerLM) else list(source)
    state = {}
    for number, gate in enumerate(gates):
        linear = "mask_linear" if isinstance(gate, AttnGate) else "attngate_linear"
        for key, value in gate.state_dict().items():
            theirs = key.replace("query_map", f"{linear}_q").replace("key_map", f"{linear}_k")
            theirs = theirs.replace("query_norm", "attngate_qnorm").replace("key_norm", "attngate_knorm")
            state[f"model.layers.{number}.self_attn.attn_gate.{theirs}"] = value
    return state


def save_gates(source: GateStack | SeerLM | Sequence[TileGate], path: str | Path) -> None:
    """Write the gates alone, as ``.safetensors`` or, with any other ending, as the authors do (``torch.save``)."""
    state = to_authors(source)
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


def _by_layer(state: State) -> dict[int, dict[str, Tensor]]:
    """Tensors by layer, under their names within the gate; layers in order.

    Raises:
        UserError: if there are no gates, or something else beside them.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    other = []
    for key, value in state.items():
        found = _LAYER.fullmatch(key)
        if found:
            layers.setdefault(int(found[1]), {})[found[2]] = value
        elif re.match(r"(mask_linear|attngate)_", key):
            layers.setdefault(0, {})[key] = value
        else:
            other.append(key)
    if not layers or other:
        raise UserError(
            "the checkpoint must hold gates alone (model.layers.0.self_attn.attn_gate.mask_linear_k.weight ...)"
            + (f"; it holds {', '.join(other[:3])}" if other else "")
        )
    return dict(sorted(layers.items()))


def _prefill_gate(
    own: Mapping[str, Tensor],
    num_kv_heads: int | None,
    block_size: int,
    gate_type: str,
    rotary: bool,
    rule: TileRule | None,
) -> AttnGate:
    q_pool, k_pool = parse_gate_type(gate_type)
    keys = _shaped(own, "mask_linear_k.weight", 3)
    queries = own.get("mask_linear_q.weight")
    heads = (keys if queries is None else queries).shape[0]
    head_dim = keys.shape[1] // len(k_pool)
    return AttnGate(
        head_dim,
        heads,
        keys.shape[0] if queries is not None else num_kv_heads or heads,
        block_size=block_size,
        gate_hidden_size=keys.shape[2],
        q_pool=q_pool,
        k_pool=k_pool,
        force_double=queries is not None,
        rotary=rotary,
        rule=rule,
    )


def _decode_gate(
    own: Mapping[str, Tensor],
    num_heads: int | None,
    block_size: int,
    gate_type: str,
    query_pooling: QueryPooling | None,
    rotary: bool,
    compat: bool,
    rule: TileRule | None,
) -> DecodeGate:
    _, k_pool = parse_gate_type(gate_type)
    keys = _shaped(own, "attngate_linear_k.weight", 3)
    queries = own.get("attngate_linear_q.weight")
    found: QueryPooling = "Qavg" if queries is None else "Qproj" if queries.ndim == 4 else "Qavgproj"
    if query_pooling not in (None, found):
        raise ValueError(f"query_pooling={query_pooling!r}, but the weights are of {found!r}")
    groups = keys.shape[0]
    if found == "Qproj":
        assert queries is not None
        num_heads = groups * queries.shape[1]
    elif num_heads is None:
        raise ValueError(f"a {found} gate does not tell how many query heads there are; give num_heads")
    return DecodeGate(
        keys.shape[1] // len(k_pool),
        num_heads,
        groups,
        block_size=block_size,
        gate_hidden_size=keys.shape[2],
        query_pooling=found,
        k_pool=k_pool,
        use_qk_norm="attngate_qnorm.weight" in own,
        rotary=rotary,
        compat=compat,
        rule=rule,
    )


def _shaped(own: Mapping[str, Tensor], key: str, ndim: int) -> Tensor:
    """The tensor under ``key``.

    Raises:
        ValueError: if it is missing or has another number of axes.
    """
    if key not in own or own[key].ndim != ndim:
        given = f"has shape {tuple(own[key].shape)}" if key in own else "is missing"
        raise ValueError(f"{key} {given}; it must have {ndim} axes (heads, channels in, channels out)")
    return own[key]
