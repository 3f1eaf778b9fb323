"""Token orders that bring alike tokens together, so that their average stands for them: PSA, Li et al. (2025).

Video tokens come in raster order, index x + width (y + height z). An order is a permutation: the token at place p
of the reordered sequence is number ``order[p]`` of the raster.

Shape legend: B batch, H heads, L length, K head width, C clusters, S boxes, M moves; the last axis of 3 is (x, y, z).
"""

from __future__ import annotations

import torch
from torch import Tensor


def gilbert_coordinates(width: int, height: int, depth: int) -> Tensor:
    """The cells of a box along a generalised Hilbert curve of three dimensions (J. Cerveny's "Gilbert" curve).

    The curve's recursion is unrolled by generations: all boxes of a generation are split at once, in their order.

    Args:
        width, height, depth: cells along x, y and z, 1 or more.

    Returns:
        (width height depth, 3) int64, each cell once.

    Raises:
        ValueError: for a size below one.
    """
    sizes = (width, height, depth)
    if min(sizes) < 1:
        raise ValueError(f"width={width}, height={height}, depth={depth}: each must be 1 or more")
    axes = torch.diag(torch.tensor(sizes))
    major = sizes.index(max(sizes))
    minor = [axis for axis in range(3) if axis != major]
    boxes_S43 = torch.stack([torch.zeros(3, dtype=torch.int64), axes[major], axes[minor[0]], axes[minor[1]]])[None]
    while True:
        lengths_S3 = boxes_S43[:, 1:].abs().sum(-1)
        straight = (lengths_S3 == 1).sum(1) >= 2
        if straight.all():
            return _walk(boxes_S43, lengths_S3)
        boxes_S43 = _split(boxes_S43, lengths_S3, straight)


def _split(boxes_S43: Tensor, lengths_S3: Tensor, straight: Tensor) -> Tensor:
    """Each box (start, a, b, c) replaced by the boxes its piece of the curve runs through; straight ones stay."""
    start, a, b, c = boxes_S43.unbind(1)
    w, h, d = lengths_S3.unbind(1)
    da, db, dc = a.sign(), b.sign(), c.sign()
    a2, b2, c2 = _half(a, w), _half(b, h), _half(c, d)
    wide = ~straight & (2 * w > 3 * h) & (2 * w > 3 * d)
    high = ~straight & ~wide & (3 * h > 4 * d)
    deep = ~straight & ~wide & ~high & (3 * d > 4 * h)
    even = ~(straight | wide | high | deep)
    end_a = start + (a - da)
    cases = (
        (straight, [(start, a, b, c)]),
        (wide, [(start, a2, b, c), (start + a2, a - a2, b, c)]),
        (high, [(start, b2, c, a2), (start + b2, a, b - b2, c), (end_a + (b2 - db), -b2, c, a2 - a)]),
        (deep, [(start, c2, a2, b), (start + c2, a, b, c - c2), (end_a + (c2 - dc), -c2, a2 - a, b)]),
        (
            even,
            [
                (start, b2, c2, a2),
                (start + b2, c, a2, b - b2),
                (start + (b2 - db) + (c - dc), a, -b2, c2 - c),
                (end_a + b2 + (c - dc), -c, a2 - a, b - b2),
                (end_a + (b2 - db), -b2, c2, a2 - a),
            ],
        ),
    )
    children = boxes_S43.new_zeros(len(boxes_S43), 5, 4, 3)
    for chosen, parts in cases:
        for place, part in enumerate(parts):
            children[chosen, place] = torch.stack(part, 1)[chosen]
    children = children.flatten(0, 1)
    # Places without a part and parts without an extent hold no cell.
    return children[(children[:, 1:].abs().sum(-1) > 0).all(1)]


def _half(axis_S3: Tensor, length_S: Tensor) -> Tensor:
    """Half of each signed axis, rounded down, then made even in length where the axis is longer than two."""
    half = axis_S3 // 2
    odd = (half.abs().sum(1) % 2 == 1) & (length_S > 2)
    return half + axis_S3.sign() * odd[:, None]


def _walk(boxes_S43: Tensor, lengths_S3: Tensor) -> Tensor:
    """The cells of straight boxes, one after the other."""
    longest = lengths_S3.argmax(1)
    counts = lengths_S3.amax(1)
    step_S3 = boxes_S43[torch.arange(len(boxes_S43)), 1 + longest].sign()
    box_M = torch.arange(len(boxes_S43)).repeat_interleave(counts)
    number_M = torch.arange(len(box_M)) - (counts.cumsum(0) - counts)[box_M]
    return boxes_S43[box_M, 0] + step_S3[box_M] * number_M[:, None]


def gilbert_order(width: int, height: int, depth: int) -> Tensor:
    """(L,) raster indices along the curve of `gilbert_coordinates`; L = width height depth.

    Raises:
        ValueError: for a size below one.
    """
    x, y, z = gilbert_coordinates(width, height, depth).unbind(1)
    return x + width * (y + height * z)


def tile_order(width: int, height: int, depth: int, tile: tuple[int, int, int] = (2, 8, 8)) -> Tensor:
    """(L,) raster indices tile by tile, both the tiles and the tokens of each in raster order.

    Args:
        width, height, depth: of the video; its last tiles may be smaller.
        tile: (depth, height, width) of a tile.

    Raises:
        ValueError: for a size below one.
    """
    if min(width, height, depth, *tile) < 1:
        raise ValueError(f"width={width}, height={height}, depth={depth}, tile={tile}: each must be 1 or more")
    z, y, x = (torch.arange(size) // part for size, part in zip((depth, height, width), tile, strict=True))
    rows, columns = -(-height // tile[1]), -(-width // tile[2])
    tiles = (z[:, None, None] * rows + y[:, None]) * columns + x
    return tiles.flatten().argsort(stable=True)


def kmeans(
    x_BHLK: Tensor, num_clusters: int, iterations: int, *, centroids_BHCK: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm for each batch entry and head on its own.

    Args:
        x_BHLK: tokens.
        num_clusters: C; no more than there are tokens are used.
        iterations: of assigning and averaging, 1 or more.
        centroids_BHCK: to start from; default tokens drawn at random, the same numbers in every head.
        seed: of that draw.

    Returns:
        labels (B, H, L) int64 and centroids (B, H, C, K). An empty cluster keeps its centroid.
    """
    batch, heads, length, width = x_BHLK.shape
    if centroids_BHCK is None:
        drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:num_clusters]
        centroids_BHCK = x_BHLK[:, :, drawn.to(x_BHLK.device)]
    labels_BHL = _nearest(x_BHLK, centroids_BHCK)
    for _ in range(iterations):
        counts = x_BHLK.new_zeros(batch, heads, centroids_BHCK.shape[2])
        counts = counts.scatter_add(2, labels_BHL, x_BHLK.new_ones(()).expand(batch, heads, length))[..., None]
        sums = torch.zeros_like(centroids_BHCK).scatter_add(2, labels_BHL[..., None].expand(-1, -1, -1, width), x_BHLK)
        centroids_BHCK = torch.where(counts > 0, sums / counts.clamp_min(1), centroids_BHCK)
        labels_BHL = _nearest(x_BHLK, centroids_BHCK)
    return labels_BHL, centroids_BHCK


def _nearest(x_BHLK: Tensor, centroids_BHCK: Tensor) -> Tensor:
    # The token's own norm is the same for all centroids.
    return (centroids_BHCK.square().sum(-1)[:, :, None] - 2 * x_BHLK @ centroids_BHCK.mT).argmin(-1)


class SemanticOrder:
    """Queries and keys each sorted by their k-means cluster, in every head on its own ("semantic-aware" order).

    The clusters of one call are where the next one starts, as from one denoising step to the next.

    Args:
        query_clusters, key_clusters: how many.
        first_iterations, iterations: of k-means at the first call and later.
        seed: of the first centroids.
    """

    def __init__(
        self,
        query_clusters: int = 200,
        key_clusters: int = 1000,
        *,
        first_iterations: int = 50,
        iterations: int = 2,
        seed: int = 0,
    ) -> None:
        self.query_clusters, self.key_clusters = query_clusters, key_clusters
        self.first_iterations, self.iterations, self.seed = first_iterations, iterations, seed
        self._centroids: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget the clusters: the next call is the first of another video."""
        self._centroids.clear()

    def __call__(self, q_BHLK: Tensor, k_BGLK: Tensor) -> tuple[Tensor, Tensor]:
        """Orders of the queries (B, H, L) and of the keys (B, G, L)."""
        return self._order("q", q_BHLK, self.query_clusters), self._order("k", k_BGLK, self.key_clusters)

    @torch.no_grad()
    def _order(self, which: str, x_BHLK: Tensor, num_clusters: int) -> Tensor:
        before = self._centroids.get(which)
        iterations = self.first_iterations if before is None else self.iterations
        labels, self._centroids[which] = kmeans(x_BHLK, num_clusters, iterations, centroids_BHCK=before, seed=self.seed)
        return labels.argsort(dim=-1, stable=True)
