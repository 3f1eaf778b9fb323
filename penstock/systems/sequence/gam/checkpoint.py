"""Checkpoints of the author's code (rishiraj/gam)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from penstock.errors import UserError
from penstock.nn.checkpoints import State, load_strict, rename
from penstock.systems.sequence.gam.model import GAMBlock, GAMLanguageModel

#: Our key for each of the author's (the rest are called alike), and back.
KEYS = [
    (r"\bcausal_conv\.", "conv."),
    (r"\bmemory_bank$", "memory.keys"),
    (r"\bgate\.", "fusion_gate.proj."),
    (r"\bln1\.", "norm1."),
    (r"\bln2\.", "norm2."),
    (r"\bln_f\.", "norm."),
]
BACK = [
    (r"\bconv\.", "causal_conv."),
    (r"\bmemory\.keys$", "memory_bank"),
    (r"\bfusion_gate\.proj\.", "gate."),
    (r"\bnorm1\.", "ln1."),
    (r"\bnorm2\.", "ln2."),
    (r"^norm\.", "ln_f."),
]
_TIED = ("head.weight", "token_embedding.weight")


def load_block(state: State, *, dropout: float = 0.1) -> GAMBlock:
    """One block from its own keys (``memory_bank``, ``causal_conv.weight`` ...), in the dtype of the checkpoint.

    Raises:
        UserError: if tensors are missing, left over or misshapen.
    """
    slots, dim = _shape(state, "memory_bank", 2)
    taps = _shape(state, "causal_conv.weight", 3)[2]
    hidden = _shape(state, "ffn.0.weight", 2)[0]
    block = GAMBlock(dim, slots, taps, ffn_hidden=hidden, dropout=dropout).to(state["memory_bank"].dtype)
    load_strict(block, rename(state, KEYS), source="the block")
    return block


def from_authors(state: State, *, dropout: float = 0.1) -> GAMLanguageModel:
    """The language model of a published checkpoint; all sizes are read from it.

    Args:
        state: under the author's names. The tied matrix may be there as ``token_embedding.weight``, as ``head.weight``
            or as both.
        dropout: for further training.

    Raises:
        UserError: if tensors are missing, left over or misshapen, or the tied matrix is there twice and differs.
    """
    state = _tie(state)
    vocab_size, dim = _shape(state, _TIED[0], 2)
    layers = {int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    model = GAMLanguageModel(
        vocab_size,
        _shape(state, "pos_embedding.weight", 2)[0],
        dim,
        max(layers, default=0) + 1,
        num_slots=_shape(state, "blocks.0.memory_bank", 2)[0],
        kernel_size=_shape(state, "blocks.0.causal_conv.weight", 3)[2],
        ffn_hidden=_shape(state, "blocks.0.ffn.0.weight", 2)[0],
        dropout=dropout,
    ).to(state[_TIED[0]].dtype)
    load_strict(model, rename(state, KEYS))
    return model


def to_authors(model: GAMLanguageModel) -> dict[str, Tensor]:
    """The state dict of a gated model under the author's names, the tied matrix under both of its names."""
    return rename(model.state_dict(), BACK)


def _tie(state: State) -> dict[str, Tensor]:
    """The state with the tied matrix under both names."""
    there = [state[name] for name in _TIED if name in state]
    if len(there) == 2 and not torch.equal(*there):
        raise UserError("head.weight and token_embedding.weight differ; they are one matrix, keep the right one only")
    return dict(state) | {name: matrix for name in _TIED for matrix in there[:1]}


def _shape(state: State, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes.

    Raises:
        UserError: if it is missing or has another number of axes.
    """
    if key not in state:
        raise UserError(f"{key} is missing; a checkpoint of the author's GAM has it")
    if state[key].ndim != ndim:
        raise UserError(f"{key} is {tuple(state[key].shape)}; it must have {ndim} axes")
    return tuple(state[key].shape)
