"""What vision transformers share: patches, attention, MLP, the residual block, stochastic depth and positions.

Shape legend: B batch, C image channels, h, w rows and columns of the grid of patches, N = h * w tokens in row-major
order (with prefix tokens where there are any), D width, H heads, K = D / H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size: TypeAlias = int | Sequence[int]


def pair(size: Size) -> tuple[int, int]:
    """(rows, columns) from one number for both, or from two.

    Raises:
        ValueError: if a side is not positive, or there are not two of them.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"a size of {height}x{width} must be positive in both directions")
    return height, width


def head_width(dim: int, num_heads: int) -> int:
    """The width of a head.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} cannot be divided among num_heads={num_heads}: it must be a multiple")
    return dim // num_heads


def init_linear(module: nn.Module) -> None:
    """The initialisation of DeiT for linear maps: truncated normal of deviation 0.02, biases at zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def relative_offsets(
    grid: tuple[int, int], *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """From each patch to each other one, in patches: (N, N, 2) holding (dx, dy) of key minus query."""
    y, x = torch.meshgrid(*(torch.arange(side, device=device, dtype=dtype) for side in grid), indexing="ij")
    place_N2 = torch.stack([x.flatten(), y.flatten()], -1)
    return place_N2[None, :] - place_N2[:, None]


def resample_positions(positions_1ND: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings of one grid interpolated (bicubic, antialiased) to another: (1, N, D) -> (1, N', D)."""
    if old == new:
        return positions_1ND
    map_1Dhw = positions_1ND.transpose(1, 2).unflatten(2, old)
    resized = F.interpolate(map_1Dhw.float(), size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized.to(positions_1ND.dtype).flatten(2).transpose(1, 2)


def take_indices(num_blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which blocks are meant, as absolute numbers (timm's convention).

    Args:
        num_blocks: how many there are.
        indices: ``None`` for all, n for the last n, or numbers of blocks, negative ones from the end.

    Raises:
        ValueError: if there is no such block.
    """
    if indices is None:
        return list(range(num_blocks))
    asked = range(num_blocks - indices, num_blocks) if isinstance(indices, int) else indices
    taken = [index + num_blocks if index < 0 and not isinstance(indices, int) else index for index in asked]
    if not all(0 <= index < num_blocks for index in taken):
        raise ValueError(f"indices={indices} ask for blocks outside 0 to {num_blocks - 1}")
    return taken


class PatchEmbed(nn.Module):
    """An image cut into patches, each mapped to a token: (B, C, height, width) -> (B, N, D), row-major.

    Args:
        img_size: height and width of the images.
        patch_size: height and width of a patch.
        in_chans: image channels C.
        embed_dim: width D of a token.

    Raises:
        ValueError: if patches do not tile the image.
    """

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        (height, width), (rows, columns) = self.img_size, self.patch_size
        if height % rows or width % columns:
            raise ValueError(
                f"images of {height}x{width} cannot be cut into patches of {rows}x{columns}: "
                "both sides must be multiples of the patch's"
            )
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        expected = (self.proj.in_channels, *self.img_size)
        if x_BCHW.ndim != 4 or tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(x_BCHW.shape)}, this model is built for (B, {', '.join(map(str, expected))})"
            )
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D).

    Args:
        dim: width D.
        num_heads: heads H, dividing D.
        qkv_bias: whether queries, keys and values have a bias.
        scale: of the scores (default: one over the root of the head width).
        attn_drop: dropout of the attention map.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.scale, self.attn_drop = num_heads, scale, attn_drop
        head_width(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.apply(init_linear)

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BHNK, k_BHNK, v_BHNK = self.qkv(x_BND).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        y_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(y_BHNK.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear maps around a GELU: (..., D) -> (..., D).

    Args:
        dim: width D.
        hidden: width between the maps.
        drop: dropout after each map.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is left out with probability ``rate``.

    What stays is scaled so that the mean is unchanged (Huang et al. 2016).

    Raises:
        ValueError: if ``rate`` is not in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"a drop-path rate of {rate} must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1.0 - self.rate)
        return x * kept / (1.0 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block around any attention: (B, N, D) -> (B, N, D).

    Args:
        dim: width D.
        attn: the attention, (B, N, D) -> (B, N, D); what else the block is called with is handed to it.
        mlp_ratio: hidden width of the MLP as a multiple of D (rounded down).
        drop: dropout of the MLP.
        drop_path: rate of stochastic depth.
        eps: of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BND: Tensor, *context: object) -> Tensor:
        x_BND = x_BND + self.drop_path(self.attn(self.norm1(x_BND), *context))
        return x_BND + self.drop_path(self.mlp(self.norm2(x_BND)))
