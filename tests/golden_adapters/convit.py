"""Golden cases of convit: the gated positional layer, its local initialisation, the whole classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock.gates import watch
from penstock.nn.checkpoints import load_strict, rename
from penstock.nn.vit import relative_offsets
from penstock.systems.vision.convit.checkpoint import AUTHORS_KEYS, KEYS, from_authors
from penstock.systems.vision.convit.model import GPSA, nonlocality
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]


def gpsa(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"dim", "grid", "locality_strength", "num_heads", "qkv_bias"})
    options = {key: value for key, value in config.items() if key != "grid"}
    layer = GPSA(**options).to(inputs["x"].dtype).eval()
    load_strict(layer, rename(params, KEYS))
    x = inputs["x"].clone().requires_grad_()
    grid = tuple(config["grid"])
    with watch(layer, "gate", keep="values") as log:
        y = layer(x, grid)
    outputs = {"y": y, "gate": log.values()["gate"][0]}
    if "w" in inputs:
        (y * inputs["w"]).sum().backward()
        grads = rename({name: p.grad for name, p in layer.named_parameters()}, AUTHORS_KEYS) | {"x": x.grad}
        outputs |= {f"grad.{name}": grad for name, grad in grads.items()}
    maps = layer.maps(x, grid)
    offsets = relative_offsets(grid, dtype=x.dtype)
    features = torch.cat([offsets, offsets.square().sum(-1, keepdim=True)], -1)
    return outputs | {
        "content": maps.content,
        "positional": maps.positional[None],
        "attn": maps.mixed,
        "rel_indices": features[None],
        "nonlocality": nonlocality(maps.mixed, grid),
    }


def local_init(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"cases", "grid"})
    outputs = {}
    for case in config["cases"]:
        refuse_unknown(case, {"num_heads", "locality_strength"})
        heads, strength = case["num_heads"], case["locality_strength"]
        layer = GPSA(4 * heads, heads).double()
        layer.local_init(strength)
        found = {
            "pos_proj_weight": layer.pos_proj.weight,
            "v_weight": layer.v.weight,
            "gating_param": layer.gate.logit,
            "positional": layer.positional_map(tuple(config["grid"])),
        }
        outputs |= {f"{name}.h{heads}.a{strength}": value for name, value in found.items()}
    return outputs


def model(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    sizes = {"depth", "embed_dim", "img_size", "mlp_ratio", "num_classes", "num_heads", "patch_size"}
    refuse_unknown(config, sizes | {"local_up_to_layer", "qkv_bias", "use_pos_embed"})
    net = from_authors(params, num_heads=config.get("num_heads", 12), img_size=config.get("img_size", 224)).eval()
    inferred = {
        "depth": len(net.blocks),
        "embed_dim": net.embed_dim,
        "local_up_to_layer": net.local_up_to_layer,
        "num_classes": net.num_classes,
        "use_pos_embed": net.pos_embed is not None,
    }
    for key, value in inferred.items():
        assert config.get(key, value) == value, f"the checkpoint says {key}={value}, the case {config[key]}"
    tokens = net.forward_features(inputs["x"])
    return {"features": tokens[:, 0], "logits": net.forward_head(tokens)}


ADAPTERS = {"gpsa": gpsa, "local_init": local_init, "model": model}
