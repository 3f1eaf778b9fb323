"""The ungated twin: the same network with every gate replaced by its open constant."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from penstock.gates.core import Gate, Pattern, Routing, Spec, mark, named_gates, spec_of


class OpenGate(Gate):
    """Stands where a gate stood and always returns the open value, in the shape the gate would have given.

    The original lives on the meta device, outside the module tree: it is asked for shapes only, has no
    parameters, and costs no arithmetic.
    """

    def __init__(self, original: nn.Module, spec: Spec) -> None:
        super().__init__()
        mark(self, **vars(spec))
        self.training = original.training
        weight = next((t for t in chain(original.parameters(), original.buffers()) if t.is_floating_point()), None)
        # In a tuple, so that it is no sub-module; in eval mode, so that it draws no noise and reports no losses.
        self._original = (copy.deepcopy(original).to("meta").eval(),)
        for module in self._original[0].modules():
            module._forward_hooks.clear()  # The twin may be made while the model is watched or forced.
        self._dtype = None if weight is None else weight.dtype
        # Follows the model to its device and precision, where the gate's weights would have gone.
        home = torch.empty(0) if weight is None else weight.detach().new_empty(0)
        self.register_buffer("home", home, persistent=False)
        self.home: Tensor

    def __getattr__(self, name: str) -> Any:
        """The original's settings (its number of experts, ...), which the model around it may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self._original[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = given[0].device if given else self.home.device

        def shape(x: Tensor) -> Tensor:
            return x.detach().to("meta", self._dtype if x.is_floating_point() else None)

        def zeros(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=self.home.dtype if x.dtype == self._dtype else x.dtype, device=device)

        args, kwargs = tree_map_only(Tensor, shape, (args, kwargs))
        # Counters of FLOPs are modes: what is computed on shapes alone is not for them.
        unseen = nullcontext() if torch.compiler.is_compiling() else _disable_current_modes()
        with torch.no_grad(), unseen:
            output = self._original[0](*args, **kwargs)
        output = tree_map_only(Tensor, zeros, output)
        spec = spec_of(self)
        assert spec is not None
        values = spec.read(output)
        if not isinstance(values, Routing):
            return spec.write(output, spec.open_like(values))
        opened = spec.open_like(values.logits).to(values.weights.dtype)
        return spec.write(output, Routing.from_dense(opened, values.logits))


def twin(model: nn.Module, pattern: Pattern = None) -> nn.Module:
    """A copy of ``model`` with gates replaced by their open constants, so that the ungated network can be trained.

    Args:
        model: any module tree with gates.
        pattern: which gates (default all).

    Returns:
        an independent copy. It has no gate parameters, so it can have fewer parameters than ``model``; its output
        equals ``model``'s under ``force(model, "open")``.

    Raises:
        GateNotFoundError: if the pattern matches no gate, or there is none; the message lists the gates.
        ValueError: if ``model`` itself is the gate.

    Example:
        >>> import torch, penstock
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), penstock.gates.SigmoidGate(4, 4))
        >>> ungated = penstock.twin(model)
        >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in ungated.parameters())
        (40, 20)
    """
    copied = copy.deepcopy(model)
    gates = named_gates(copied, pattern)
    if "" in gates:
        raise ValueError("the model itself is the gate: there is nothing around it to make a twin of")
    replaced: dict[nn.Module | None, OpenGate] = {}
    for gate in gates.values():
        spec = spec_of(gate)
        assert spec is not None
        replaced[gate] = OpenGate(gate, spec)
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return copied
