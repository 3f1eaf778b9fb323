"""The ungated twin: the same network with every gate replaced by its open constant."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from penstock.gates.core import Gate, Pattern, Routing, Spec, named_gates, spec_of


class OpenGate(Gate):
    """Stands where a gate stood and always returns the open value, in the shape the gate would have given.

    The original lives on the meta device, outside the module tree: it is asked for shapes only, has no
    parameters, and costs no arithmetic.
    """

    def __init__(self, original: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.passes, self.kind, self.range, self.neutral = spec.passes, spec.kind, spec.range, spec.neutral
        self.unit_dims = spec.unit_dims
        self._spec = spec
        self._shape_of = (copy.deepcopy(original).to("meta"),)  # in a tuple, so that it is no sub-module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else self._home
        args, kwargs = tree_map_only(Tensor, lambda x: x.detach().to("meta"), (args, kwargs))
        with torch.no_grad():
            output = self._shape_of[0](*args, **kwargs)
        output = tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device), output)
        values = self._spec.read(output)
        if isinstance(values, Routing):
            opened: Any = Routing.from_dense(self._spec.open_like(values.logits).to(values.weights.dtype), values.logits)
        else:
            opened = self._spec.open_like(values)
        return self._spec.write(output, opened)

    @property
    def _home(self) -> torch.device:
        return torch.get_default_device()


def twin(model: nn.Module, pattern: Pattern = None) -> nn.Module:
    """A copy of ``model`` with gates replaced by their open constants, so that the ungated network can be trained.

    Args:
        model: any module tree with gates.
        pattern: which gates (default all).

    Returns:
        an independent copy. It has no gate parameters, so it can have fewer parameters than ``model``; its output
        equals ``model``'s under ``force(model, "open")``.

    Raises:
        GateNotFoundError: if the pattern matches no gate.
        ValueError: if ``model`` itself is the gate.
    """
    copied = copy.deepcopy(model)
    replaced = {module: OpenGate(module, _spec(module)) for module in named_gates(copied, pattern).values()}
    if copied in replaced:
        raise ValueError("the model itself is the gate: there is nothing around it to make a twin of")
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    return copied.train(model.training)


def _spec(module: nn.Module) -> Spec:
    spec = spec_of(module)
    assert spec is not None
    return spec
