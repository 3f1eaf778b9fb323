"""Parameters of the authors' layers (mazumder-lab/COMET, Keras), under the names of the golden cases.

Keras gives the gates' parameters no stable names, so the keys of the tree are by node: ``node.<heap index>.selector``
for splits and ``.output`` for leaves, kernels (D, K). No trained weights were published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.nn.checkpoints import load_strict, rename
from penstock.ops.routing import assignment
from penstock.systems.experts.comet.model import CometGate, DSelectKGate, SinkhornPermutation, TopkGate

#: (authors' key, ours). Keras kernels are transposed on the way.
_DSELECT_K = [
    (r"^z_logits\.kernel$", "codes.weight"),
    (r"^z_logits(\.bias)?$", "codes.bias"),
    (r"^w_logits\.kernel$", "weights.weight"),
    (r"^w_logits(\.bias)?$", "weights.bias"),
]
_TOP_K = [
    (r"^gate_weights$", "proj.weight"),
    (r"^bias$", "proj.bias"),
    (r"^jitter_weights$", "noise.weight"),
]
_PERMUTATION = [
    (r"^permutation_log_weights$", "scores"),
    (r"^log_weights$", "soft"),
    (r"^iterations$", "calls"),
]


def from_authors(
    state: Mapping[str, Tensor],
    *,
    num_experts: int | None = None,
    top_k: int = 2,
    gamma: float = 1.0,
    entropy_reg: float = 0.0,
    zeta: float = 1.0,
    steps: int = 1,
    noise: float = 0.0,
    perm_entropy_reg: float = 1e-4,
) -> nn.Module:
    """Build one of the authors' layers from its parameters, in their precision.

    Args:
        state: of a tree gate, a DSelect-k gate (static or not), a top-k gate or a learned permutation; which one is
            told by its keys.
        num_experts: of DSelect-k, whose parameters only say how many bits an expert's number has (default: all
            those numbers).
        top_k: of the top-k gate and the permutation; the other gates' parameters tell.
        gamma, entropy_reg, zeta: of the smooth-step gates.
        steps, noise, perm_entropy_reg: of the permutation.

    Raises:
        UserError: if the keys are those of no layer, or tensors are missing, extra or misshapen.
    """
    if "node.0.selector.kernel" in state:
        return _load(_tree_gate(state, gamma, entropy_reg), _stack_nodes(state), state)
    if "z_logits" in state or "z_logits.kernel" in state:
        ours = _transposed(rename(state, _DSELECT_K))
        gate = _dselect_k(ours, num_experts, gamma, entropy_reg, zeta)
        return _load(gate, {k: v.flatten() if k.endswith("bias") else v for k, v in ours.items()}, state)
    if "gate_weights" in state:
        experts, dim = state["gate_weights"].shape
        return _load(TopkGate(dim, experts, top_k, jitter="jitter_weights" in state), rename(state, _TOP_K), state)
    if "permutation_log_weights" in state:
        copies, experts, _ = state["permutation_log_weights"].shape
        permutation = SinkhornPermutation(
            experts, top_k, steps=steps, noise=noise, entropy_reg=perm_entropy_reg, per_tree=copies > 1
        )
        ours = permutation.state_dict() | rename(state, _PERMUTATION)
        ours["hard"] = assignment(ours["soft"])
        return _load(permutation, ours, state)
    raise UserError(f"no layer of COMET has these parameters: {', '.join(list(state)[:3]) or '(none)'}")


def to_authors(gate: CometGate | DSelectKGate, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a gate, or their gradients by the same names, as the authors lay them out.

    Args:
        gate: a tree gate, or a DSelect-k gate that reads its input.
        state: our names to tensors.
    """
    if isinstance(gate, DSelectKGate):
        back = {"codes": "z_logits", "weights": "w_logits", "weight": "kernel", "bias": "bias"}
        names = {key: ".".join(back[part] for part in key.split(".")) for key in state}
        return {names[key]: value.T if value.ndim == 2 else value for key, value in state.items()}
    theirs = {}
    kernel_KMD, bias_KM = (state[f"nodes.{part}"].unflatten(0, (gate.top_k, -1)) for part in ("weight", "bias"))
    for place, name in enumerate(_node_names(gate.num_experts)):
        theirs[f"{name}.kernel"] = kernel_KMD[:, place].T
        theirs[f"{name}.bias"] = bias_KM[:, place]
    return theirs


def _node_names(num_experts: int) -> list[str]:
    """The authors' names of the nodes in our order: splits by heap index, then leaves from left to right."""

    def leaves(node: int) -> list[int]:
        return [node] if node >= num_experts - 1 else [*leaves(2 * node + 1), *leaves(2 * node + 2)]

    return [f"node.{i}.selector" for i in range(num_experts - 1)] + [f"node.{i}.output" for i in leaves(0)]


def _tree_gate(state: Mapping[str, Tensor], gamma: float, entropy_reg: float) -> CometGate:
    experts = sum(re.fullmatch(r"node\.\d+\.output\.kernel", key) is not None for key in state)
    dim, trees = state["node.0.selector.kernel"].shape
    return CometGate(dim, experts, trees, gamma=gamma, entropy_reg=entropy_reg)


def _stack_nodes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The nodes' kernels (D, K) and biases (K) as one weight (K * nodes, D) and one bias; odd keys stay."""
    experts = sum(".output.kernel" in key for key in state)
    names = _node_names(experts)
    parts = {part: [f"{name}.{part}" for name in names] for part in ("kernel", "bias")}
    missing = [key for keys in parts.values() for key in keys if key not in state]
    if missing:
        raise UserError(f"a tree over {experts} experts has no {', '.join(missing[:3])} in this checkpoint")
    stacked = {
        "nodes.weight": torch.stack([state[key].T for key in parts["kernel"]], 1).flatten(0, 1),
        "nodes.bias": torch.stack([state[key] for key in parts["bias"]], 1).flatten(),
    }
    known = {key for keys in parts.values() for key in keys}
    return stacked | {key: value for key, value in state.items() if key not in known}


def _dselect_k(
    ours: Mapping[str, Tensor], num_experts: int | None, gamma: float, entropy_reg: float, zeta: float
) -> DSelectKGate:
    static = "codes.weight" not in ours
    selectors = len(ours["weights.bias"])
    bits = ours["codes.bias"].numel() // selectors
    dim = None if static else ours["codes.weight"].shape[1]
    return DSelectKGate(dim, num_experts or 2**bits, selectors, gamma=gamma, entropy_reg=entropy_reg, zeta=zeta)


def _transposed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.T if key.endswith("weight") else value for key, value in state.items()}


def _load(module: nn.Module, ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> nn.Module:
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    return load_strict(module.to(dtype), ours, source="the authors' checkpoint")
