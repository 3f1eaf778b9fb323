"""Pyramid sparse attention: every tile of the attention map is seen at a resolution of its own, and nothing is learned.

Li et al., "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation" (2025).

`PyramidSparseAttention` takes the place of softmax attention in a finished model (a video diffusion transformer, the
prefill of a language model). `PSALM` is a small language model made of it.

Shape legend: B batch, L query length, T key length, D width, H heads, G key/value heads, K head width, M query
blocks, N key blocks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate
from penstock.nn.causal_lm import Cache, Span, causal_attention
from penstock.nn.decoder import DecoderLM, initialise_normal, rotary_tables, rotate
from penstock.ops import pyramid_attention
from penstock.systems.sequence.psa.maps import (
    MapRules,
    MaskMode,
    Ratios,
    Sample,
    density,
    nearest_levels,
    ratios_from_ends,
    resolution,
)
from penstock.systems.sequence.psa.orders import SemanticOrder, gilbert_order, tile_order

#: From queries (B, H, L, K) and keys (B, G, T, K) to their orders, (L,) or (B, H, L) and (T,) or (B, G, T).
Order: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LevelGate(Gate):
    """The resolution at which each query block sees each key block: 1 / level, and 0 where it is skipped.

    The caller rounds values to levels and forces what validity needs, see `levels_from`. Open is dense attention, and
    the mean value is the compute density (of a causal map about half of it: the future counts as skipped).

    Args:
        rules: how the map is made.

    Shapes: queries (B, H, L, K), keys (B, G, T, K) [, real tokens of each sample (B,)] -> (B, H, M, N) float32.
    """

    passes = "block"
    kind = "mask"
    unit_dims = 3

    def __init__(self, rules: MapRules) -> None:
        super().__init__()
        self.rules = rules

    def forward(self, q_BHLK: Tensor, k_BGTK: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        return resolution(self.rules.level_map(q_BHLK, k_BGTK, lengths_B))


def levels_from(values_BHMN: Tensor, *, causal: bool) -> Tensor:
    """Levels from a gate's values; a causal map skips the future and always sees its diagonal tile in full."""
    levels = nearest_levels(values_BHMN.detach())
    if not causal:
        return levels
    past = torch.ones(levels.shape[-2:], dtype=torch.bool, device=levels.device).tril()
    return torch.where(past & ~past.tril(-1), 1, levels * past)


class PyramidSparseAttention(nn.Module):
    """Softmax attention at several resolutions, in place of ``scaled_dot_product_attention``; it has no parameters.

    Args:
        block_m, block_n: queries and keys of a tile; ``block_n`` a multiple of 8 and of ``tile_n``.
        tile_n: keys of a tile of the authors' kernel, which aligns the segments of coarse levels.
        mask_ratios: level -> (start, end): shares of the key blocks, sorted by importance, or of the importance.
        mask_mode: "topk" for shares of the blocks, "thresholdbound" for shares of the importance.
        min_full_attn_ratio: share of the blocks that "thresholdbound" sees in full at least.
        use_sim_mask: let no key block be averaged more coarsely than its smoothness allows.
        sim_2x_threshold, sim_4x_threshold, sim_8x_threshold: mean cosine above which keys may be averaged by 2, 4, 8.
        causal: a query sees no later key; importance comes from antidiagonals, and tiles are square.
        text_length: tokens that are text, seen in full: the first ones with ``rearrange``, which moves them to the
            end, and the last ones without.
        warmup_steps: so many first steps (of denoising) use dense attention.
        rearrange: the order in which tokens are cut into blocks: "gilbert" (a space-filling curve through the video),
            "tile", "semantic" (k-means), a function (see `Order`) of the tokens that are no text, or ``None``.
        width, height, depth: of the video, for "gilbert" and "tile".
        tile: (depth, height, width) of a tile, for "tile".
        sample: which tokens importance is estimated from, not causal: a "random" quarter of each block, "all", or
            every fourth ("stride").
        seed: of the random sample.
        stride: of the antidiagonals, causal.
        scale: of the scores, default K^-1/2.
        binary: keep or drop instead of levels, at equal density: the twin that the paper compares with.

    Raises:
        ValueError: for sizes, ratios or modes that do not fit together.

    Example:
        >>> import torch
        >>> attention = PyramidSparseAttention(block_m=32, block_n=32, rearrange="gilbert", width=8, height=8, depth=4)
        >>> q, k, v = torch.randn(3, 1, 2, 256, 16).unbind()
        >>> attention(q, k, v).shape, attention.density(attention.level_map(q, k)).shape
        (torch.Size([1, 2, 256, 16]), torch.Size([1, 2]))
    """

    def __init__(
        self,
        block_m: int = 128,
        block_n: int = 128,
        tile_n: int = 32,
        mask_ratios: Ratios | None = None,
        mask_mode: MaskMode = "topk",
        *,
        min_full_attn_ratio: float = 0.06,
        use_sim_mask: bool = False,
        sim_2x_threshold: float = 0.7,
        sim_4x_threshold: float = 0.65,
        sim_8x_threshold: float = 0.6,
        causal: bool = False,
        text_length: int = 0,
        warmup_steps: int = 0,
        rearrange: Literal["gilbert", "tile", "semantic"] | Order | None = None,
        width: int | None = None,
        height: int | None = None,
        depth: int | None = None,
        tile: tuple[int, int, int] = (2, 8, 8),
        sample: Sample = "random",
        seed: int = 0,
        stride: int = 16,
        scale: float | None = None,
        binary: bool = False,
    ) -> None:
        super().__init__()
        rules = MapRules(
            block_m=block_m,
            block_n=block_n,
            tile_n=tile_n,
            mask_mode=mask_mode,
            min_full_attn_ratio=min_full_attn_ratio,
            sim_thresholds=(sim_2x_threshold, sim_4x_threshold, sim_8x_threshold) if use_sim_mask else None,
            causal=causal,
            text_length=text_length,
            sample=sample,
            seed=seed,
            stride=stride,
            scale=scale,
            binary=binary,
        )
        self.rules = rules if mask_ratios is None else replace(rules, mask_ratios=dict(mask_ratios))
        self.gate = LevelGate(self.rules)
        if causal and rearrange is not None:
            raise ValueError(f"rearrange={rearrange!r}: causal attention keeps the order of its tokens")
        self.warmup_steps, self.step = warmup_steps, 0
        self.rearrange = SemanticOrder(seed=seed) if rearrange == "semantic" else rearrange
        self.grid_order: Tensor | None
        self.register_buffer("grid_order", _grid_order(rearrange, width, height, depth, tile), persistent=False)

    def forward(self, q_BHLK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, *, step: int | None = None) -> Tensor:
        """Attention output (B, H, L, K).

        Args:
            q_BHLK: queries.
            k_BGTK, v_BGTK: keys and values; G divides H.
            step: number of the denoising step, from 0; default: calls are counted since `reset`.

        Raises:
            ValueError: if the tokens are not those of the video, or a query block would see no key.
        """
        step = self.step if step is None else step
        self.step = step + 1
        if step < self.warmup_steps:
            return self.dense(q_BHLK, k_BGTK, v_BGTK)
        orders = self.orders(q_BHLK, k_BGTK)
        levels_BHMN = self.level_map(q_BHLK, k_BGTK, orders=orders)
        return self.attend(q_BHLK, k_BGTK, v_BGTK, levels_BHMN, orders=orders)

    def dense(self, q_BHLK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """The attention that is approximated, as in the warm-up."""
        return F.scaled_dot_product_attention(
            q_BHLK,
            k_BGTK,
            v_BGTK,
            is_causal=self.rules.causal,
            scale=self.rules.scale,
            enable_gqa=q_BHLK.shape[1] != k_BGTK.shape[1],
        )

    def reset(self) -> None:
        """Begin a new video: the warm-up starts again, and clusters are forgotten."""
        self.step = 0
        if isinstance(self.rearrange, SemanticOrder):
            self.rearrange.reset()

    def orders(self, q_BHLK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the queries and keys of the rearranged sequence come from; ``None``: they stay as they are.

        Raises:
            ValueError: if there are not as many tokens as the video has, and text.
        """
        text = self.rules.text_length
        if self.rearrange is None:
            return None
        if self.grid_order is not None:
            for tokens in (q_BHLK.shape[2], k_BGTK.shape[2]):
                if tokens - text != len(self.grid_order):
                    raise ValueError(
                        f"{tokens} tokens less text_length={text} are {tokens - text}, but width x height x depth is "
                        f"{len(self.grid_order)}"
                    )
            found = (self.grid_order, self.grid_order)
        else:
            assert callable(self.rearrange)
            found = self.rearrange(q_BHLK[:, :, text:], k_BGTK[:, :, text:])
        first, second = (_text_last(order, text) for order in found)
        return first, second

    def level_map(self, q_BHLK: Tensor, k_BGTK: Tensor, *, orders: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Levels of the tiles of the rearranged sequence, (B, H, M, N) int64.

        Args:
            q_BHLK, k_BGTK: in their own order.
            orders: from `orders`, if it has been called.
        """
        orders = orders or self.orders(q_BHLK, k_BGTK)
        if orders is not None:
            q_BHLK, k_BGTK = _take(q_BHLK, orders[0]), _take(k_BGTK, orders[1])
        return levels_from(self.gate(q_BHLK, k_BGTK), causal=self.rules.causal)

    def attend(
        self,
        q_BHLK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        levels: Tensor,
        *,
        orders: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention under a level map, (B, H, L, K); differentiable in queries, keys and values.

        Args:
            q_BHLK, k_BGTK, v_BGTK: in their own order.
            levels: (M, N), (H, M, N) or (B, H, M, N), as `level_map` gives it or any other.
            orders: from `orders`, if it has been called.

        Raises:
            ValueError: if the map does not fit, or a query block sees no key.
        """
        orders = orders or self.orders(q_BHLK, k_BGTK)
        if orders is not None:
            q_BHLK, k_BGTK, v_BGTK = _take(q_BHLK, orders[0]), _take(k_BGTK, orders[1]), _take(v_BGTK, orders[1])
        y_BHLK = pyramid_attention(
            q_BHLK,
            k_BGTK,
            v_BGTK,
            levels,
            block_size=(self.rules.block_m, self.rules.block_n),
            causal=self.rules.causal,
            scale=self.rules.scale,
        )
        return y_BHLK if orders is None else _take(y_BHLK, orders[0].argsort(-1))

    def level_list(self, q_BHLK: Tensor, k_BGTK: Tensor) -> Tensor:
        """The map in the authors' list encoding, (B, H, M, N + 5) int64; the text rule does not apply to it.

        Raises:
            ValueError: for causal, capped or binary maps, which are no segments of the sorted blocks.
        """
        if self.rules.causal or self.rules.binary or self.rules.sim_thresholds is not None:
            raise ValueError("the list encoding holds segments of sorted blocks: use no causal, binary or use_sim_mask")
        orders = self.orders(q_BHLK, k_BGTK)
        if orders is not None:
            q_BHLK, k_BGTK = _take(q_BHLK, orders[0]), _take(k_BGTK, orders[1])
        return self.rules.ranking(self.rules.importance(q_BHLK, k_BGTK)).listed()

    def density(self, levels: Tensor) -> Tensor:
        """Share of dense attention that a map costs, by head; see `penstock.systems.sequence.psa.maps.density`."""
        return density(levels, causal=self.rules.causal)


def _grid_order(
    how: object, width: int | None, height: int | None, depth: int | None, tile: tuple[int, int, int]
) -> Tensor | None:
    if how is None or callable(how) or how == "semantic":
        return None
    if how not in ("gilbert", "tile"):
        raise ValueError(f"rearrange={how!r}: it must be 'gilbert', 'tile', 'semantic', a function or None")
    if width is None or height is None or depth is None:
        raise ValueError(f"rearrange={how!r} needs width, height and depth of the video, in tokens")
    return gilbert_order(width, height, depth) if how == "gilbert" else tile_order(width, height, depth, tile)


def _text_last(order: Tensor, text_length: int) -> Tensor:
    text = torch.arange(text_length, device=order.device).expand(*order.shape[:-1], -1)
    return torch.cat([order + text_length, text], -1)


def _take(x_BHLK: Tensor, order: Tensor) -> Tensor:
    if order.ndim == 1:
        return x_BHLK[:, :, order]
    return x_BHLK.gather(2, order[..., None].expand(*x_BHLK.shape[:2], -1, x_BHLK.shape[3]))


#: Settings published with the authors' code: the ends of levels 1, 2, 4 and 8, and what differs from the defaults.
#: The warm-up of the 50-step models is 12 to 15 steps, the fewest of which stand here.
PRESETS: dict[str, dict[str, Any]] = {
    "wan2_1_14b": {"ends": (0.4, 0.5, 0.6, 0.8), "mask_mode": "thresholdbound", "warmup_steps": 12},
    "wan2_1_1_3b": {
        "ends": (0.5, 0.6, 0.7, 0.8), "mask_mode": "thresholdbound", "use_sim_mask": True, "warmup_steps": 12,
    },
    "wan2_1_1_3b_topk": {"ends": (0.05, 0.1, 0.15, 0.25), "warmup_steps": 12},
    "wan2_2_a14b": {
        "ends": (0.5, 0.6, 0.6, 0.8), "mask_mode": "thresholdbound", "block_n": 32, "warmup_steps": 12,
    },
    "wan2_2_5b": {"ends": (0.6, 0.7, 0.7, 0.8), "mask_mode": "thresholdbound", "warmup_steps": 12},
    "cogvideox": {"ends": (0.1, 0.15, 0.15, 0.35), "block_n": 32, "warmup_steps": 12},
    "distilled_4_step": {"ends": (0.05, 0.15, 0.25, 0.5)},
}  # fmt: skip


def preset(name: str, **overrides: Any) -> PyramidSparseAttention:
    """The attention of a published setting.

    Args:
        name: a key of `PRESETS`.
        overrides: arguments of `PyramidSparseAttention`, as ``rearrange="gilbert", width=80, height=45, depth=21``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    options = dict(PRESETS[name])
    return PyramidSparseAttention(**{"mask_ratios": ratios_from_ends(options.pop("ends")), **options, **overrides})


@dataclass(frozen=True)
class CurvePoint:
    """Relative error and cosine of an attention output against the dense one, at a density."""

    density: float
    error: float
    cosine: float


@torch.no_grad()
def error_vs_density(
    q_BHLK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    ends: Sequence[tuple[float, float, float, float]],
    **options: Any,
) -> dict[str, list[CurvePoint]]:
    """How far pyramid and binary attention are from dense attention, at several settings: for one's own tensors.

    Args:
        q_BHLK, k_BGTK, v_BGTK: queries, keys and values, as captured from a model.
        ends: of levels 1, 2, 4 and 8, a setting each.
        options: further arguments of `PyramidSparseAttention`.

    Returns:
        "pyramid" and "binary" curves, a point a setting; the binary map of each has the density of the pyramid's,
        rounded to whole tiles a row.
    """
    curves: dict[str, list[CurvePoint]] = {"pyramid": [], "binary": []}
    for setting in ends:
        for name, points in curves.items():
            attention = PyramidSparseAttention(
                mask_ratios=ratios_from_ends(setting), binary=name == "binary", **options
            )
            dense = attention.dense(q_BHLK, k_BGTK, v_BGTK)
            orders = attention.orders(q_BHLK, k_BGTK)
            levels = attention.level_map(q_BHLK, k_BGTK, orders=orders)
            sparse = attention.attend(q_BHLK, k_BGTK, v_BGTK, levels, orders=orders)
            points.append(
                CurvePoint(
                    float(attention.density(levels).mean()),
                    float((sparse - dense).norm() / dense.norm()),
                    float(F.cosine_similarity(sparse.flatten(), dense.flatten(), 0)),
                )
            )
    return curves


class PyramidSelfAttention(nn.Module):
    """Causal self-attention of a decoder, dense or at several resolutions.

    The map of a query block comes from all queries of the block, as in the authors' prefill: a token's own output can
    depend on tokens up to the end of its block, by what the block's tiles are averaged to and by nothing else. Tokens
    decoded with a cache attend to it densely, as in the authors' use.

    Args:
        dim: width D.
        num_heads: H, divides D.
        rules: how the level map is made, causal; ``None``: dense attention.
        rope_theta: base of the rotary positions.

    Raises:
        ValueError: if the heads do not divide the width, or their width is odd.
    """

    def __init__(self, dim: int, num_heads: int, rules: MapRules | None, *, rope_theta: float = 10000.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads or dim // num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must divide the width {dim} into heads of an even width")
        self.head_dim, self.rope_theta = dim // num_heads, rope_theta
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.gate = None if rules is None else LevelGate(rules)
        #: While training: dense attention for now.
        self.warming_up = False

    def forward(self, x_BLD: Tensor, span: Span, number: int = 0) -> Tensor:
        q, k, v = (
            proj(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotary_tables(span.positions, self.head_dim, self.rope_theta, x_BLD.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        state = span.state(number)
        decoding = state is not None and "keys" in state
        if self.gate is None or decoding or (self.training and self.warming_up):
            y_BHLK = causal_attention(q, k, v, span, number)
        else:
            if state is not None:
                state["keys"], state["values"] = k, v
            y_BHLK = self._pyramid(self.gate, q, k, v, span.key_mask)
        return self.o_proj(y_BHLK.transpose(1, 2).flatten(2))

    def _pyramid(self, gate: LevelGate, q: Tensor, k: Tensor, v: Tensor, mask_BL: Tensor | None) -> Tensor:
        if mask_BL is not None:
            # Blocks are cut from the real tokens, so that padding moves none of them; it is last, and unseen.
            lengths_B = mask_BL.sum(1)
            order_BL = (~mask_BL).long().argsort(dim=1, stable=True)
            last_B1 = (lengths_B - 1).clamp_min(0)[:, None]
            order_BL = order_BL.gather(1, torch.minimum(torch.arange(q.shape[2], device=q.device), last_B1))
            q, k, v = (_take(x, order_BL[:, None].expand(-1, x.shape[1], -1)) for x in (q, k, v))
        levels_BHNN = levels_from(gate(q, k, None if mask_BL is None else lengths_B), causal=True)
        y = pyramid_attention(q, k, v, levels_BHNN, block_size=gate.rules.block_n, causal=True)
        if mask_BL is None:
            return y
        place_BL = (mask_BL.cumsum(1) - 1).clamp_min(0)
        return _take(y, place_BL[:, None].expand(-1, y.shape[1], -1))


class PSALM(DecoderLM):
    """Decoder-only language model of pyramid sparse attention: tokens (B, L) -> logits (B, L, V).

    All kinds of attention have the same weights, so that a model trained with one can be run with another.

    Args:
        vocab_size, hidden_size, num_layers, num_heads: V, D, the number of blocks, H.
        intermediate_size: hidden width of the SwiGLU.
        attention: "pyramid", "binary" (tiles kept or dropped, at the pyramid's density) or "dense".
        block_size: queries and keys of a tile, a multiple of 8.
        end_ratios: where levels 1, 2, 4 and 8 end, as shares of the blocks or of the importance.
        mask_mode: "topk" or "thresholdbound", see `PyramidSparseAttention`.
        stride: of the antidiagonals from which importance is estimated; divides ``block_size``.
        sim_thresholds: of the similarity cap; ``None``: no cap.
        warmup_steps: the first so many forward passes of training attend densely.
        rope_theta, eps, tie_embeddings: as in other decoders.

    Raises:
        ValueError: for impossible sizes or ratios.
    """

    steps_seen: Tensor

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        intermediate_size: int,
        attention: Literal["pyramid", "binary", "dense"] = "pyramid",
        block_size: int = 32,
        end_ratios: Sequence[float] = (0.0625, 0.125, 0.25, 0.75),
        mask_mode: MaskMode = "topk",
        stride: int = 8,
        sim_thresholds: Sequence[float] | None = None,
        warmup_steps: int = 0,
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
        tie_embeddings: bool = False,
    ) -> None:
        if attention not in ("pyramid", "binary", "dense"):
            raise ValueError(f"attention={attention!r}: it must be 'pyramid', 'binary' or 'dense'")
        if len(end_ratios) != 4:
            raise ValueError(f"end_ratios={tuple(end_ratios)}: there must be four, of levels 1, 2, 4 and 8")
        rules = MapRules(
            block_m=block_size,
            block_n=block_size,
            mask_ratios=ratios_from_ends(tuple(end_ratios)),
            mask_mode=mask_mode,
            sim_thresholds=None if sim_thresholds is None else _three(sim_thresholds),
            causal=True,
            stride=stride,
            binary=attention == "binary",
        )
        mixers = [
            PyramidSelfAttention(hidden_size, num_heads, None if attention == "dense" else rules, rope_theta=rope_theta)
            for _ in range(num_layers)
        ]
        super().__init__(mixers, vocab_size, hidden_size, intermediate_size, eps=eps, tie_embeddings=tie_embeddings)
        self.warmup_steps = warmup_steps
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        self.apply(initialise_normal)

    @property
    def attentions(self) -> list[PyramidSelfAttention]:
        """The attention layers, in order."""
        return [block.self_attn for block in self.blocks if isinstance(block.self_attn, PyramidSelfAttention)]

    def forward(self, tokens_BL: Tensor, *, cache: Cache | None = None, mask_BL: Tensor | None = None) -> Tensor:
        if self.training:
            # Counted here and not in the layers, which gradient checkpointing runs twice.
            warming_up = int(self.steps_seen) < self.warmup_steps
            for attention in self.attentions:
                attention.warming_up = warming_up
            self.steps_seen += 1
        return super().forward(tokens_BL, cache=cache, mask_BL=mask_BL)


def _three(thresholds: Sequence[float]) -> tuple[float, float, float]:
    if len(thresholds) != 3:
        raise ValueError(f"sim_thresholds={tuple(thresholds)}: there must be three, of levels 2, 4 and 8")
    two, four, eight = thresholds
    return two, four, eight
