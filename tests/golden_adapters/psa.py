"""Golden cases of psa: attention under a map, both kinds of importance, maps and lists, the cap, the Gilbert order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penstock.ops import pyramid_attention
from penstock.systems.sequence.psa.maps import (
    MapRules,
    MaskMode,
    Ratios,
    antidiagonal_importance,
    density,
    levels_from_list,
    sampled_importance,
    similarity_cap,
)
from penstock.systems.sequence.psa.orders import gilbert_coordinates
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]


def _scale(given: float | str | None) -> float | None:
    """A number, or ``None`` for the default that the string names."""
    if isinstance(given, str):
        if given != "head_dim**-0.5":
            raise ValueError(f"the adapter does not know scale={given!r}")
        return None
    return given


def _ratios(given: dict[str, list[float]]) -> Ratios:
    return {int(level): (start, end) for level, (start, end) in given.items()}


def attention(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"block_m", "block_n", "causal", "scale"})
    size = (config.get("block_m", 128), config.get("block_n", 128))
    y = pyramid_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs["mask"],
        block_size=size,
        causal=config.get("causal", False),
        scale=_scale(config.get("scale")),
    )
    return {"o": y}


def causal_path(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"block_size", "stride", "chunk_size", "mask_ratios", "sim_thresholds", "text_length", "L"})
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if config.get("L", q.shape[2]) != q.shape[2]:
        raise ValueError(f"L={config['L']}, but there are {q.shape[2]} queries")
    block, stride = config.get("block_size", 128), config.get("stride", 16)
    importance = antidiagonal_importance(
        q, k, block_size=block, stride=stride, chunk_size=config.get("chunk_size", 4096)
    )
    shared: dict[str, Any] = {
        "block_m": block, "block_n": block, "causal": True, "stride": stride,
        "text_length": config.get("text_length", 0),
    }  # fmt: skip
    if "mask_ratios" in config:
        shared["mask_ratios"] = _ratios(config["mask_ratios"])
    topk = MapRules(**shared).levels(importance)
    energy = MapRules(mask_mode="thresholdbound", **shared).levels(importance)
    cap = similarity_cap(k, block, tuple(config.get("sim_thresholds", (0.75, 0.7, 0.7))))
    final = torch.minimum(topk, cap[:, :, None])
    return {
        "importance": importance,
        "mask_topk": topk,
        "mask_energy": energy,
        "cap": cap,
        "mask_final": final,
        "density_topk": density(topk, causal=True).mean().reshape(1),
        "density_energy": density(energy, causal=True).mean().reshape(1),
        "o": pyramid_attention(q, k, v, final, block_size=block, causal=True),
    }


def gilbert(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"width", "height", "depth"})
    size = (config["width"], config["height"], config["depth"])
    return {f"coords_{size[0]}x{size[1]}x{size[2]}": gilbert_coordinates(*size)}


def importance(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"samples_per_q_block", "samples_per_k_block", "causal", "scale"})
    if config.get("causal", False):
        raise ValueError("importance from sampled tokens is not causal")
    per_q, per_k = config.get("samples_per_q_block", 32), config.get("samples_per_k_block", 32)
    found = sampled_importance(
        inputs["q_sampled"], inputs["k_sampled"], per_q, per_k, scale=_scale(config.get("scale"))
    )
    return {"importance": found}


def ksim(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"block_size", "sim_2x_threshold", "sim_4x_threshold", "sim_8x_threshold"})
    thresholds = (
        config.get("sim_2x_threshold", 0.7),
        config.get("sim_4x_threshold", 0.65),
        config.get("sim_8x_threshold", 0.6),
    )
    return {"max_level": similarity_cap(inputs["k"], config.get("block_size", 128), thresholds)}


def mask(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(
        config,
        {
            "mask_ratios_topk",
            "mask_ratios_threshold",
            "text_length",
            "blocksize",
            "compute_tile",
            "min_full_attn_ratio",
        },
    )
    outputs: Tensors = {}
    modes: tuple[tuple[str, MaskMode], ...] = (("topk", "topk"), ("threshold", "thresholdbound"))
    for name, mode in modes:
        rules = MapRules(
            block_m=config.get("blocksize", 128),
            block_n=config.get("blocksize", 128),
            tile_n=config.get("compute_tile", 32),
            mask_mode=mode,
            min_full_attn_ratio=config.get("min_full_attn_ratio", 0.06),
            text_length=config.get("text_length", 0),
        )
        if ratios := config.get(f"mask_ratios_{name}"):
            rules = replace(rules, mask_ratios=_ratios(ratios))
        levels = rules.levels(inputs["importance"])
        listed = rules.ranking(inputs["importance"]).listed()
        outputs |= {
            f"mask_{name}": levels,
            f"list_{name}": listed,
            f"density_{name}": density(levels).mean().reshape(1),
            f"density_list_{name}": density(levels_from_list(listed)).mean().reshape(1),
        }
    return outputs


ADAPTERS = {
    "attention": attention,
    "causal_path": causal_path,
    "gilbert": gilbert,
    "importance": importance,
    "ksim": ksim,
    "mask": mask,
}
