"""ConViT: a vision transformer whose first layers start as a convolution, with a gate in each head to leave it.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
arXiv 2103.10697, sections 3 and 4. Each head of a gated positional self-attention (GPSA) layer has two attention
maps, one from content and one from relative position alone; one learned number decides the mixture.

Shape legend: B batch, C image channels, h, w rows and columns of the grid of patches, N = h * w tokens in row-major
order (1 + N behind the class token), D width, H heads, K = D / H head width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from penstock.gates import Gate, Table
from penstock.nn.vit import (
    Attention,
    Block,
    PatchEmbed,
    Size,
    head_width,
    init_linear,
    relative_offsets,
    resample_positions,
    take_indices,
)

GateMode = Literal["learned", "frozen", "closed", "open"]

#: What each mode but "learned" keeps the gate at; "frozen" is the paper's "no gating" (lambda = 0).
FIXED: dict[GateMode, float] = {"frozen": 0.5, "closed": 0.0, "open": 1.0}


class PositionalGate(Gate):
    """How much of each head's attention is positional; the rest is content: () -> (H,), values in (0, 1).

    Args:
        num_heads: heads H.
        mode: "learned": sigmoid of a free number a head, 1 at the start (sec. 3); "frozen", "closed" and "open" stay
            at a half, zero and one, for the paper's ablations.

    Raises:
        ValueError: for another mode.
    """

    passes = "head"
    unit_dims = 1

    def __init__(self, num_heads: int, mode: GateMode = "learned") -> None:
        super().__init__()
        if mode not in ("learned", *FIXED):
            raise ValueError(f"gate={mode!r} must be one of learned, {', '.join(FIXED)}")
        self.fixed = FIXED.get(mode)
        # Kept in every mode, so that a trained model can be loaded into its ablations.
        self.logit = nn.Parameter(torch.ones(num_heads), requires_grad=mode == "learned")

    def forward(self) -> Tensor:
        return self.logit.sigmoid() if self.fixed is None else torch.full_like(self.logit, self.fixed)


class AttentionMaps(NamedTuple):
    """The attention of a GPSA layer: ``content`` (B, H, N, N), ``positional`` (H, N, N), ``mixed`` (B, H, N, N)."""

    content: Tensor
    positional: Tensor
    mixed: Tensor


class GPSA(nn.Module):
    """Gated positional self-attention (sec. 3): (B, N, D) -> (B, N, D).

    Args:
        dim: width D.
        num_heads: heads H, dividing D; a square number, or the heads beyond the largest square start without a place.
        qkv_bias: whether queries, keys and values have a bias.
        scale: of the content scores (default: one over the root of K).
        attn_drop: dropout of the mixed attention map.
        proj_drop: dropout of the output.
        locality_strength: alpha of the paper: how narrowly heads look at the start.
        use_local_init: start as a convolution, each head looking at one neighbour; else from random positions.
        gate: "learned", or what the gate is kept at; see `PositionalGate`.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        gate: GateMode = "learned",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = head_width(dim, num_heads) ** -0.5 if scale is None else scale
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gate = PositionalGate(num_heads, gate)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.apply(init_linear)
        if use_local_init:
            self.local_init(locality_strength)

    @torch.no_grad()
    def local_init(self, locality_strength: float = 1.0) -> None:
        """Make head p look at offset Delta_p, the p-th place of a sqrt(H) x sqrt(H) kernel, and values the identity.

        The scores become -alpha * ||delta - Delta_p||^2 up to a constant (sec. 3). With an even kernel the places lie
        between patches. Warns if H is not a square: the heads left over keep random positional weights.
        """
        side = math.isqrt(self.num_heads)
        if side * side != self.num_heads:
            warnings.warn(
                f"num_heads={self.num_heads} is not a square: {side * side} heads start as a {side}x{side} "
                f"convolution, the other {self.num_heads - side * side} without a place",
                stacklevel=2,
            )
        centre = (side - 1) / 2
        for p in range(side * side):
            y, x = p % side - centre, p // side - centre
            self.pos_proj.weight[p] = self.pos_proj.weight.new_tensor([2 * x, 2 * y, -1.0])
        self.pos_proj.weight *= locality_strength
        nn.init.eye_(self.v.weight)

    def positional_factors(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Attention over rows (H, h, h) and over columns (H, w, w), whose product is the positional map.

        The scores W.(dx, dy, dx^2 + dy^2) are a sum of a term in dx and a term in dy, so their softmax factorises;
        the bias, constant over keys, has no effect.
        """
        scores = []
        for axis, side in ((1, grid[0]), (0, grid[1])):
            steps = torch.arange(side, device=self.pos_proj.weight.device, dtype=self.pos_proj.weight.dtype)
            offsets = steps[None, :] - steps[:, None]
            features = [torch.zeros_like(offsets), torch.zeros_like(offsets), offsets.square()]
            features[axis] = offsets
            scores.append(self.pos_proj(torch.stack(features, -1)).permute(2, 0, 1))
        return scores[0].softmax(-1), scores[1].softmax(-1)

    def positional_map(self, grid: tuple[int, int]) -> Tensor:
        """The attention from relative position alone, (H, N, N)."""
        rows_Hhh, columns_Hww = self.positional_factors(grid)
        return torch.einsum("hyt,hxs->hyxts", rows_Hhh, columns_Hww).flatten(3).flatten(1, 2)

    def maps(self, x_BND: Tensor, grid: tuple[int, int] | None = None) -> AttentionMaps:
        """The layer's attention maps for an input (B, N, D); see `AttentionMaps`."""
        q_BHNK, k_BHNK, _ = self._heads(x_BND)
        return self._maps(q_BHNK, k_BHNK, _grid_of(x_BND, grid))

    def forward(self, x_BND: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend.

        Args:
            x_BND: tokens (B, N, D) of the grid, row-major, without prefix tokens.
            grid: rows and columns of patches; ``None``: a square.

        Raises:
            ValueError: if N tokens do not fill the grid.
        """
        grid = _grid_of(x_BND, grid)
        q_BHNK, k_BHNK, v_BHNK = self._heads(x_BND)
        if self.training and self.attn_drop.p:
            # Dropout acts on the mixed map, which therefore has to exist.
            y_BHNK = self.attn_drop(self._maps(q_BHNK, k_BHNK, grid).mixed) @ v_BHNK
        else:
            # Attention is linear in its map: mixing the two outputs is mixing the two maps.
            gate_H11 = self.gate()[:, None, None]
            content = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, scale=self.scale)
            y_BHNK = (1 - gate_H11) * content + gate_H11 * self._look_around(v_BHNK, grid)
        return self.proj_drop(self.proj(y_BHNK.transpose(1, 2).flatten(2)))

    def _maps(self, q_BHNK: Tensor, k_BHNK: Tensor, grid: tuple[int, int]) -> AttentionMaps:
        content = (q_BHNK @ k_BHNK.transpose(-2, -1) * self.scale).softmax(-1)
        positional = self.positional_map(grid)
        gate_H11 = self.gate()[:, None, None]
        mixed = (1 - gate_H11) * content + gate_H11 * positional
        return AttentionMaps(content, positional, mixed / mixed.sum(-1, keepdim=True))

    def _look_around(self, v_BHNK: Tensor, grid: tuple[int, int]) -> Tensor:
        """The positional map applied to values (B, H, N, K), along columns and then along rows."""
        rows_Hhh, columns_Hww = self.positional_factors(grid)
        y_BHhwK = torch.einsum("hxs,bhtsk->bhtxk", columns_Hww, v_BHNK.unflatten(2, grid))
        return torch.einsum("hyt,bhtxk->bhyxk", rows_Hhh, y_BHhwK).flatten(2, 3)

    def _heads(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHNK, k_BHNK = self.qk(x_BND).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q_BHNK, k_BHNK, self.v(x_BND).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ConViT(nn.Module, PyTorchModelHubMixin, library_name="penstock"):
    """The image classifier: GPSA blocks, then the class token joins, then ordinary transformer blocks (sec. 4).

    Args:
        img_size: height and width of the images.
        patch_size: height and width of a patch, tiling the image.
        in_chans: image channels C.
        num_classes: 0 leaves the classifier out.
        global_pool: "token" reads the class token, "avg" the mean of the patches, "" leaves the tokens unpooled.
        embed_dim: total width D (not the width of a head).
        depth: blocks, of which the first ``local_up_to_layer`` have GPSA.
        num_heads: heads H, dividing D.
        mlp_ratio: hidden width of the MLPs as a multiple of D.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout of the embedded patches.
        proj_drop_rate: dropout of attention outputs and in MLPs.
        attn_drop_rate: dropout of attention maps.
        drop_path_rate: stochastic depth, rising linearly over the blocks to this rate.
        local_up_to_layer: 0 (a plain ViT) to depth - 1.
        locality_strength: of the local initialisation.
        use_local_init: start GPSA as a convolution.
        use_pos_embed: whether patches have a learned position embedding (the class token never has).
        gate: see `PositionalGate`.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["token", "avg", ""] = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        use_pos_embed: bool = True,
        gate: GateMode = "learned",
    ) -> None:
        super().__init__()
        if not 0 <= local_up_to_layer < depth:
            raise ValueError(
                f"local_up_to_layer={local_up_to_layer} must be from 0 to {depth - 1}: the class token joins before "
                f"that block, and there are {depth}"
            )
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.local_up_to_layer = local_up_to_layer
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        common: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        local: dict[str, Any] = {"locality_strength": locality_strength, "use_local_init": use_local_init, "gate": gate}
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                GPSA(embed_dim, num_heads, **common, **local)
                if index < local_up_to_layer
                else Attention(embed_dim, num_heads, **common),
                mlp_ratio=mlp_ratio,
                drop=proj_drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(depth)
        ]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, height, width)."""
        return self.forward_head(self.forward_features(x_BCHW))

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """The normalised tokens (B, 1 + N, D), the class token first.

        Raises:
            ValueError: if the images have another size than the model was built for; see `set_input_size`.
        """
        return self.norm(self._run(x_BCHW, len(self.blocks))[0])

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of the tokens of `forward_features`, or with ``pre_logits`` what the classifier reads."""
        if self.global_pool:
            tokens = tokens[:, 0] if self.global_pool == "token" else tokens[:, 1:].mean(1)
        tokens = self.head_drop(tokens)
        return tokens if pre_logits else self.head(tokens)

    def forward_intermediates(
        self,
        x_BCHW: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The patches' tokens after chosen blocks, as timm's feature extraction wants them.

        Args:
            x_BCHW: images.
            indices: which blocks, as for `penstock.nn.vit.take_indices`.
            norm: whether they pass the final norm.
            stop_early: leave out the blocks after the last chosen one.
            output_fmt: (B, D, h, w) maps or (B, N, D) tokens.
            intermediates_only: leave out the final tokens.

        Returns:
            the list, or (final normalised tokens, list).
        """
        taken = take_indices(len(self.blocks), indices)
        last, kept = self._run(x_BCHW, max(taken) + 1 if stop_early else len(self.blocks), keep=taken)
        chosen = [kept[index][:, -self.patch_embed.num_patches :] for index in taken]
        chosen = [self.norm(x) for x in chosen] if norm else chosen
        if output_fmt == "NCHW":
            chosen = [x.transpose(1, 2).unflatten(2, self.patch_embed.grid_size) for x in chosen]
        return chosen if intermediates_only else (self.norm(last), chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices`` and what only they needed; returns the absolute indices."""
        taken = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(taken) + 1]
        if len(self.blocks) <= self.local_up_to_layer:
            self.cls_token = None
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The last linear map, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["token", "avg", ""] | None = None) -> None:
        """Put a fresh classifier in place; 0 classes leaves it out, ``global_pool`` changes what it reads."""
        if global_pool not in (None, "token", "avg", ""):
            raise ValueError(f"global_pool={global_pool!r} must be 'token', 'avg' or ''")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must not be negative")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        head.apply(init_linear)
        self.head: nn.Module = head.to(self.patch_embed.proj.weight)

    def set_input_size(self, img_size: Size) -> None:
        """Build the model over for images of another size: position embeddings are interpolated, offsets follow.

        Raises:
            ValueError: if patches do not tile the new size.
        """
        old, proj = self.patch_embed, self.patch_embed.proj
        new = PatchEmbed(img_size, old.patch_size, proj.in_channels, self.embed_dim)
        new.proj = proj
        if self.pos_embed is not None:
            resized = resample_positions(self.pos_embed.detach(), old.grid_size, new.grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.patch_embed = new

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute blocks in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _run(self, x_BCHW: Tensor, depth: int, keep: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """The tokens after the first ``depth`` blocks, and after those of ``keep``."""
        x_BND = self.patch_embed(x_BCHW)
        if self.pos_embed is not None:
            x_BND = x_BND + self.pos_embed
        x_BND = self.pos_drop(x_BND)
        kept = {}
        for index, block in enumerate(self.blocks[:depth]):
            if index == self.local_up_to_layer and self.cls_token is not None:
                x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], 1)
            context = (self.patch_embed.grid_size,) if index < self.local_up_to_layer else ()
            if self.grad_checkpointing and self.training:
                x_BND = checkpoint(block, x_BND, *context, use_reentrant=False)
            else:
                x_BND = block(x_BND, *context)
            if index in keep:
                kept[index] = x_BND
        return x_BND, kept


def head_table(model: nn.Module, images: Tensor) -> Table:
    """Where each GPSA head looks: one row a layer and head.

    Args:
        model: a `ConViT`, or any module whose forward runs `GPSA` layers.
        images: (B, C, height, width), what to measure on.

    Returns:
        rows of ``layer`` (dotted name), ``head``, ``gate`` (share of position), the centre ``x`` and ``y`` and the
        ``span`` of the positional map in patches (sec. 3; a span below zero has lost its locality), and
        ``nonlocality``: the mean distance attended to, in patches, over queries and images (sec. 5). It is measured
        on the layer's real input; the authors' training log takes the bare patch embedding instead.
    """
    rows = Table()

    def read(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(layer, GPSA)
            x_BND, *given = inputs
            grid = _grid_of(x_BND, given[0] if given else None)
            far_H = nonlocality(layer.maps(x_BND, grid).mixed, grid)
            a_x, a_y, a = layer.pos_proj.weight.unbind(1)
            columns = (layer.gate(), -a_x / a / 2, -a_y / a / 2, -1 / a, far_H)
            for head, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                rows.append({"layer": name, "head": head} | dict(zip(_COLUMNS, values, strict=True)))

        return hook

    handles = [
        layer.register_forward_pre_hook(read(name)) for name, layer in model.named_modules() if isinstance(layer, GPSA)
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return rows


_COLUMNS = ("gate", "x", "y", "span", "nonlocality")


def nonlocality(attention_BHNN: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean distance in patches that each head attends to, over queries and samples, (H,)."""
    offsets_NN2 = relative_offsets(grid, device=attention_BHNN.device, dtype=attention_BHNN.dtype)
    return (attention_BHNN * offsets_NN2.norm(dim=-1)).sum(-1).mean((0, 2))


def _grid_of(x_BND: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    tokens = x_BND.shape[1]
    if grid is None:
        grid = (math.isqrt(tokens),) * 2
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"{tokens} tokens are no square grid: give grid=(rows, columns)")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"{tokens} tokens do not fill a grid of {grid[0]}x{grid[1]} patches")
    return grid


#: The published sizes; keyword arguments override. Widths are 48 a head, 64 for the plus sizes.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "convit_tiny": partial(ConViT, embed_dim=192, num_heads=4),
    "convit_small": partial(ConViT, embed_dim=432, num_heads=9),
    "convit_base": partial(ConViT, embed_dim=768, num_heads=16),
    "convit_tiny_plus": partial(ConViT, embed_dim=256, num_heads=4),
    "convit_small_plus": partial(ConViT, embed_dim=576, num_heads=9),
    "convit_base_plus": partial(ConViT, embed_dim=1024, num_heads=16),
}
