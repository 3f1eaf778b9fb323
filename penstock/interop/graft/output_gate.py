"""Attention output gates in a trained model (Qiu et al., "Gated Attention for Large Language Models", 2025).

Shape legend: B batch, L length, D width, H query heads, K head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from penstock.errors import UserError
from penstock.gates import SigmoidGate
from penstock.interop.graft.layout import Place
from penstock.interop.graft.records import Graft, refuse_second

Granularity = Literal["headwise", "elementwise"]

ATTRIBUTE = "output_gate"
#: Where the values wait, on the output projection, from the attention's beginning until it is reached.
_WAITING = "_penstock_values"


def graft_output_gate(places: list[Place], *, granularity: Granularity = "headwise", bias: bool = False) -> Graft:
    """A gate on the heads' output of each layer, computed from the layer's normalised input; see `graft`."""
    if granularity not in get_args(Granularity):
        raise UserError(f"granularity={granularity!r}: it must be {' or '.join(get_args(Granularity))}")
    refuse_second([(place, place.attention) for place in places], ATTRIBUTE, "output_gate")
    graft = Graft("output_gate", {"granularity": granularity, "bias": bias})
    for place, gate in [(place, _open_gate(place, granularity, bias)) for place in places]:
        attention, output = place.attention, place.output
        graft.attach(place, attention, ATTRIBUTE, gate)
        graft.handles += [
            attention.register_forward_pre_hook(partial(_compute, place.layout.output), with_kwargs=True),
            output.register_forward_pre_hook(_apply),
        ]
    return graft


def _open_gate(place: Place, granularity: Granularity, bias: bool) -> SigmoidGate:
    """2 sigmoid(0) is one exactly."""
    heads = place.num_heads
    passes: Literal["head", "channel"] = "head" if granularity == "headwise" else "channel"
    units = heads if granularity == "headwise" else heads * place.head_dim
    gate = SigmoidGate(place.hidden_size, units, passes=passes, bias=bias, scale=2.0)
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    return gate


# The hooks know no module but the one they are called with: copies, twins and pickles of the model then work by
# themselves, and a gate that was replaced is the one that is asked.


def _compute(output: str, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x_BLD = args[0] if args else kwargs["hidden_states"]
    setattr(attention.get_submodule(output), _WAITING, attention.get_submodule(ATTRIBUTE)(x_BLD))


def _apply(output: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y_BLE, *rest = args
    values = getattr(output, _WAITING)
    delattr(output, _WAITING)
    y_BLHK = y_BLE.unflatten(-1, (values.shape[-1], -1))
    return ((y_BLHK * values[..., None]).flatten(-2), *rest)
