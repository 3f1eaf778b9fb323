"""The authors' ConViT checkpoints (facebookresearch/convit; timm's ``convit_*`` have the same keys)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from penstock.errors import UserError
from penstock.nn.checkpoints import load_strict, rename
from penstock.nn.vit import Size, pair
from penstock.systems.vision.convit.model import ConViT, GateMode

#: The authors' key -> ours; every other key has the same name.
KEYS = [(r"(^|\.)gating_param$", r"\1gate.logit")]
#: Ours -> the authors'.
AUTHORS_KEYS = [(r"(^|\.)gate\.logit$", r"\1gating_param")]


def from_authors(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    img_size: Size | None = None,
    num_classes: int | None = None,
    gate: GateMode = "learned",
) -> ConViT:
    """The model that a checkpoint was saved from, in the checkpoint's dtype.

    Args:
        state: the authors' state dict.
        num_heads: needed only without GPSA layers, which tell it.
        img_size: of the images; default the square the position embeddings were made for. Another size
            interpolates them.
        num_classes: another number than the checkpoint's puts a fresh classifier in place, for fine-tuning.
        gate: "learned", or an ablation; see `penstock.systems.vision.convit.model.PositionalGate`.

    Raises:
        UserError: if a size cannot be told from the checkpoint, or its tensors do not fit together.
    """
    ours = {key: value for key, value in rename(state, KEYS).items() if not key.endswith("rel_indices")}
    if "patch_embed.proj.weight" not in ours or "cls_token" not in ours:
        raise UserError("the checkpoint has no patch_embed.proj.weight or no cls_token: it is not a ConViT")
    stem = ours["patch_embed.proj.weight"]
    embed_dim, in_chans = stem.shape[:2]
    patch_size = (stem.shape[2], stem.shape[3])
    depth = len({key.split(".")[1] for key in ours if key.startswith("blocks.")})
    local = [value for key, value in ours.items() if key.endswith(".attn.gate.logit")]
    if num_heads is None:
        if not local:
            raise UserError("a checkpoint without GPSA layers does not tell its heads: give num_heads")
        num_heads = len(local[0])
    trained_size = _image_size(ours, patch_size, img_size)
    classes = len(ours["head.weight"]) if "head.weight" in ours else 0
    model = ConViT(
        img_size=trained_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=_ratio(len(ours["blocks.0.mlp.fc1.weight"]), embed_dim),
        qkv_bias=any(key.endswith(("attn.qk.bias", "attn.qkv.bias")) for key in ours),
        local_up_to_layer=len(local),
        use_pos_embed="pos_embed" in ours,
        gate=gate,
    ).to(stem.dtype)
    load_strict(model, ours)
    if img_size is not None and pair(img_size) != trained_size:
        model.set_input_size(img_size)
    if num_classes not in (None, classes):
        model.reset_classifier(num_classes)
    return model


def to_authors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a `ConViT` or one of its layers under the authors' keys."""
    return rename(model.state_dict(), AUTHORS_KEYS)


def _image_size(state: Mapping[str, Tensor], patch: tuple[int, int], asked: Size | None) -> tuple[int, int]:
    """The size the position embeddings were made for: the one asked for if they fit it, else a square."""
    if "pos_embed" not in state:
        if asked is None:
            raise UserError("a checkpoint without pos_embed does not tell its image size: give img_size")
        return pair(asked)
    tokens = state["pos_embed"].shape[1]
    if asked is not None and (pair(asked)[0] // patch[0]) * (pair(asked)[1] // patch[1]) == tokens:
        return pair(asked)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"pos_embed holds {tokens} positions, which is no square: give the img_size it was trained on")
    return side * patch[0], side * patch[1]


def _ratio(hidden: int, dim: int) -> float:
    """The ratio whose product with ``dim`` rounds down to ``hidden``."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
