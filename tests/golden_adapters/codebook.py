"""Golden cases of codebook: one bottleneck, alone or in a group, with its gradients and interventions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock.gates import force
from penstock.nn.code_reading import force_codes, record_codes, without_codes
from penstock.nn.codebook import CodebookKey, CodebookLayer, GroupCodebookLayer, Similarity
from penstock.systems.sequence.codebook.checkpoint import load_codebook
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

_KNOWN = {"dim", "num_codes", "kcodes", "similarity", "loss", "num_codebooks", "disable_codes", "disable_topk",
          "keep_k_codes", "cosine", "patch"}  # fmt: skip


def quantiser(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _KNOWN)
    layer = load_codebook(params, top_k=config["kcodes"], similarity=config["similarity"], loss=config["loss"])
    codebooks = list(layer.codebook) if isinstance(layer, GroupCodebookLayer) else [layer]
    for head, codebook in enumerate(codebooks):
        codebook.key = CodebookKey(0, "here", head)
    assert len(codebooks) == config["num_codebooks"]
    assert all(c.num_codes == config["num_codes"] for c in codebooks)
    assert sum(c.dim for c in codebooks) == config["dim"]

    x = inputs["x"].clone().requires_grad_()
    y, ids = _run(layer.train(), x)
    (y * inputs["w"]).sum().backward()
    outputs = {
        "y": y,
        "ids": ids,
        "mse": torch.tensor([c.metrics.mse for c in codebooks], dtype=x.dtype),
        "input_norm": torch.tensor([c.metrics.input_norm for c in codebooks], dtype=x.dtype),
        "output_norm": torch.tensor([c.metrics.output_norm for c in codebooks], dtype=x.dtype),
        "active_codes": torch.tensor([c.metrics.active_codes for c in codebooks]),
        "grad.in.x": x.grad,
    }
    outputs |= {f"grad.{name}": p.grad for name, p in layer.named_parameters()}

    layer.eval()
    if config["cosine"]:
        for codebook in codebooks:
            codebook.selector.similarity = _with_cosine(config["similarity"])
    hidden = without_codes(config["disable_codes"], top=config["disable_topk"], keep_k=config["keep_k_codes"])
    with force(layer, hidden):
        outputs["y_disabled"], outputs["ids_disabled"] = _run(layer, x)
    if (patch := config["patch"]) is not None:
        for name, code in (("y_patched", patch["code"]), ("y_zeroed", -1)):
            with force_codes(layer, [(0, "here", 0, code, patch["pos"], patch["slot"])]):
                outputs[name], _ = _run(layer, x)
    return outputs


def _with_cosine(similarity: Similarity) -> Similarity:
    return "cosine" if similarity == "inner_product" else similarity


def _run(layer: CodebookLayer | GroupCodebookLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    with record_codes(layer) as log:
        y = layer(x)
    return y, torch.stack([calls[0] for calls in log.values()], 2)


ADAPTERS = {"quantiser": quantiser}
