"""Golden cases of gam: one block, and the language model with its tied head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import watch
from penstock.nn.checkpoints import rename
from penstock.systems.sequence.gam.checkpoint import BACK, from_authors, load_block
from penstock.systems.sequence.gam.model import GAMBlock
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

#: The author's constants, where a case does not set them.
_DEFAULTS = {
    "VOCAB_SIZE": 10000, "BLOCK_SIZE": 256, "N_EMBED": 512, "N_LAYER": 6, "DROPOUT": 0.1, "NUM_MEMORY_SLOTS": 512, "CONV_KERNEL_SIZE": 3,
}  # fmt: skip


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    refuse_unknown(config, _DEFAULTS)
    return _DEFAULTS | config


def _check(block: nn.Module, config: dict[str, Any]) -> None:
    """The sizes that the checkpoint map reads from the shapes are those of the case."""
    assert isinstance(block, GAMBlock)
    assert block.memory is not None
    assert block.conv is not None
    assert block.memory.keys.shape == (config["NUM_MEMORY_SLOTS"], config["N_EMBED"])
    assert block.conv.weight.shape == (config["N_EMBED"], 1, config["CONV_KERNEL_SIZE"])


def _gradients(model: nn.Module) -> Tensors:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f"grad.{name}": grad for name, grad in rename(grads, BACK).items()}


def block(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    config = _complete(config)
    gam = load_block(params, dropout=config["DROPOUT"]).eval()
    _check(gam, config)
    x = inputs["x"].clone().requires_grad_()
    with watch(gam, keep="values") as log:
        y = gam(x)
    gates = {name: values[0] for name, values in log.values().items()}
    h = gam.norm1(x)
    local, memory = gam.pathways(h)
    outputs = {
        "y": y,
        "local": local,
        "global": memory,
        "fused": gam.fuse(h, [local, memory]),
        "memory_weights": gates["memory.slot_gate"],
        "gate_local": gates["fusion_gate"][..., 0, :],
        "gate_global": gates["fusion_gate"][..., 1, :],
    }
    if "grad_out" in inputs:
        (y * inputs["grad_out"]).sum().backward()
        outputs |= _gradients(gam) | {"grad_x": x.grad}
    return outputs


def lm(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    config = _complete(config)
    model = from_authors(params, dropout=config["DROPOUT"]).eval()
    assert (model.vocab_size, model.max_length, model.num_layers) == tuple(
        config[key] for key in ("VOCAB_SIZE", "BLOCK_SIZE", "N_LAYER")
    )
    for one in model.blocks:
        _check(one, config)
    logits = model(inputs["idx"])
    outputs = {"logits": logits}
    if "targets" in inputs:
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten())
        loss.backward()
        outputs |= {"loss": loss.reshape(1)} | _gradients(model)
    return outputs


ADAPTERS = {"block": block, "lm": lm}
