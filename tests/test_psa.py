"""Pyramid sparse attention: its maps against plain loops, its orders, the module and the language model."""

from __future__ import annotations

import copy
import doctest
import itertools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import penstock
from penstock.gates import named_gates
from penstock.lab.cards import card
from penstock.lab.results import Results
from penstock.systems.sequence.psa import maps, model, orders, synthetic
from penstock.systems.sequence.psa.experiment import SYSTEM, PSAConfig
from penstock.systems.sequence.psa.maps import MapRules, density, ratios_from_ends
from penstock.systems.sequence.psa.model import PRESETS, PSALM, PyramidSparseAttention, preset

LEVELS = (1, 2, 4, 8, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(length: int, *, heads: int = 2, groups: int = 2, batch: int = 2, width: int = 16) -> tuple[Tensor, ...]:
    g = generator(length)
    return tuple(
        torch.randn(batch, number, length, width, generator=g, dtype=torch.float64)
        for number in (heads, groups, groups)
    )


# -- maps, against plain loops -----------------------------------------------------------------------------------


def plain_row(
    row: list[float], ratios: dict[int, Any], mode: str, per_tile: int, floor: float
) -> list[tuple[int, int, int]]:
    """(level, start, end) of each segment of a row's sorted blocks, by the rules of the authors' video path."""
    n, before, segments = len(row), 0, []
    ordered = torch.tensor(sorted(row, reverse=True))
    shares = ordered.cumsum(0) / ordered.sum()
    listed = list(ratios.items())
    for level, (_, bound) in listed if mode == "topk" else sorted(listed, key=lambda one: one[1][1]):
        align = math.ceil(level / per_tile)
        if mode == "topk":
            end = min(n, int(n * bound))
        else:
            count = int((shares <= bound + 1e-6).sum())
            end = count + 1 if count else before
        length = max(end - before, 0)
        if align > 1:
            length = -(-length // align) * align
            if before + length >= n:
                length = (n - before) // align * align
            end = before + length
        else:
            end = max(min(end, n), before)
            if level == 1 and mode != "topk":
                end = max(end, min(n, int(n * floor) + 1))
        segments.append((level, before, end))
        before = end
    return segments


RATIOS = [
    ratios_from_ends((0.05, 0.15, 0.25, 0.5)),
    ratios_from_ends((0.1, 0.15, 0.15, 0.35)),
    ratios_from_ends((0.6, 0.7, 0.7, 0.8)),
    {1: (0.0, 0.3), 4: (0.3, 0.9), 8: (0.9, 1.0)},
    {1: (0.0, 0.25), 0: (0.25, 1.0)},
    {8: (0.0, 0.4), 2: (0.4, 0.7), 1: (0.7, 1.0)},
]


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("blocks", [1, 5, 17, 40])
def test_levels_and_lists_follow_the_rules(mode: Any, block: int, blocks: int) -> None:
    importance = torch.rand(1, 2, 3, blocks, generator=generator(blocks)) ** 6
    for ratios in RATIOS:
        rules = MapRules(block_m=block, block_n=block, mask_ratios=ratios, mask_mode=mode)
        dense, listed = rules.levels(importance), rules.ranking(importance).listed()
        expected_dense, expected_list = torch.zeros_like(dense), torch.zeros_like(listed)
        for place in itertools.product(range(2), range(3)):
            row = importance[0][place]
            order = row.argsort(descending=True).tolist()
            segments = plain_row(row.tolist(), ratios, mode, block // 32, 0.06)
            cells: list[int] = []
            for level, start, end in segments:
                for b in order[start:end]:
                    expected_dense[0][place][b] = level
            for level in LEVELS:
                cells += [b for one, start, end in segments if one == level for b in order[start:end]] + [-1]
            expected_list[0][place][: len(cells)] = torch.tensor(cells)
        assert torch.equal(dense, expected_dense), ratios
        assert torch.equal(listed, expected_list), ratios
        assert torch.equal(maps.levels_from_list(listed), dense)


def test_text_columns_are_seen_in_full_in_maps_and_not_in_lists() -> None:
    importance = torch.rand(1, 1, 4, 20, generator=generator())
    plain, text = MapRules(block_n=32), MapRules(block_n=32, text_length=33)
    assert torch.equal(text.levels(importance)[..., :18], plain.levels(importance)[..., :18])
    assert (text.levels(importance)[..., 18:] == 1).all()
    assert torch.equal(text.ranking(importance).listed(), plain.ranking(importance).listed())


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("text_length", [0, 200])
def test_causal_levels_follow_the_rules(mode: Any, text_length: int) -> None:
    n = 9
    importance = torch.rand(1, 2, n, n, generator=generator()) ** 4
    importance = importance.tril()
    ratios = {1: (0.0, 0.3), 2: (0.3, 0.5), 4: (0.5, 0.6), 8: (0.6, 0.9), 0: (0.9, 1.0)}
    rules = MapRules(causal=True, mask_ratios=ratios, mask_mode=mode, text_length=text_length)
    expected = torch.zeros(1, 2, n, n, dtype=torch.int64)
    for head, r in itertools.product(range(2), range(n)):
        row = importance[0, head, r, : r + 1]
        order = row.argsort(descending=True)
        shares = row[order].cumsum(0) / row.sum()
        before = 0.0
        for level, (start, end) in ratios.items():
            for rank, b in enumerate(order.tolist()):
                if mode == "topk":
                    inside = int(torch.tensor(r + 1.0) * start) <= rank < int(torch.tensor(r + 1.0) * end)
                else:
                    inside = max(start, before) < float(shares[rank]) <= end
                if inside:
                    expected[0, head, r, b] = level
            before = end
    if text_length:
        expected[..., -2:], expected[..., -2:, :] = 1, 1
    expected = expected.tril()
    expected[..., 0] = 1
    expected.diagonal(dim1=-2, dim2=-1).fill_(1)
    assert torch.equal(rules.levels(importance), expected)


def test_density_is_the_mean_of_one_over_the_level() -> None:
    levels = torch.tensor([[1, 2, 0], [4, 8, 1], [0, 2, 2]])
    assert float(density(levels)) == pytest.approx((1 + 0.5 + 0.25 + 0.125 + 1 + 0.5 + 0.5) / 9)
    assert float(density(levels, causal=True)) == pytest.approx((1 + 0.25 + 0.125 + 0.5 + 0.5) / 6)
    importance = torch.rand(2, 3, 4, 32, generator=generator())
    quota = MapRules(block_n=32, mask_ratios=ratios_from_ends(synthetic.QUOTA))
    torch.testing.assert_close(density(quota.levels(importance)), torch.full((2, 3), 0.1875, dtype=torch.float64))


def test_resolutions_round_to_the_nearest_level() -> None:
    values = torch.tensor([1.4, 1.0, 0.72, 0.70, 0.5, 0.36, 0.35, 0.25, 0.17, 0.125, 0.07, 0.0625, 0.062, 0.0, -1.0])
    assert maps.nearest_levels(values).tolist() == [1, 1, 1, 2, 2, 2, 4, 4, 8, 8, 8, 8, 0, 0, 0]
    levels = torch.tensor(LEVELS)
    assert torch.equal(maps.nearest_levels(maps.resolution(levels)), levels)


def test_sampled_importance_is_the_largest_share_of_the_best_key() -> None:
    q, k, _ = tensors(24)
    found = maps.sampled_importance(q[:, :, :16], k, 8, 4)
    scores = q[:, :, :16] @ k.mT / 4
    share = (scores - scores.amax(-1, keepdim=True)).exp()
    for i, j in itertools.product(range(2), range(6)):
        row = [share[:, :, 8 * i : 8 * i + 8, 4 * n : 4 * n + 4].amax((2, 3)) for n in range(6)]
        torch.testing.assert_close(found[:, :, i, j], row[j] / sum(row))


def test_importance_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors(96)
    whole = maps.sampled_importance(q, k, 8, 8)
    monkeypatch.setattr(maps, "_CHUNK", 1)
    torch.testing.assert_close(maps.sampled_importance(q, k, 8, 8), whole)


def test_a_sample_holds_a_quarter_of_each_block_at_the_same_places() -> None:
    x = torch.arange(100.0)[None, None, :, None].expand(2, 3, -1, 1)
    for how, count in (("random", 8), ("stride", 8), ("all", 32)):
        places = maps.sample_blocks(x, 32, how, 5)[..., 0].unflatten(2, (-1, count))  # type: ignore[arg-type]
        assert places.shape == (2, 3, 4, count)
        first = places[:, :, 0]
        assert (first.sort(-1).values.diff() > 0).all(), "without replacement"
        torch.testing.assert_close(places[:, :, 1], first + 32)
        assert float(places.max()) <= 99, "padding repeats the last token"
    drawn = [maps.sample_blocks(x, 32, "random", seed) for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0, 0], drawn[0][0, 1]), "heads have draws of their own"


def plain_antidiagonal(q: Tensor, k: Tensor, block: int, stride: int, chunk: int) -> Tensor:
    """One sample and head, padded to whole chunks as the authors do it."""
    length, width = q.shape
    padding = -length % chunk
    q, k = F.pad(q, (0, 0, 0, padding)), F.pad(k, (0, 0, 0, padding))
    rows = len(q) // stride
    fold_k = torch.stack([torch.cat([k[u * stride + j] for j in range(stride)]) for u in range(rows)])
    fold_q = torch.stack([torch.cat([q[u * stride + stride - 1 - j] for j in range(stride)]) for u in range(rows)])
    scores = fold_q @ fold_k.T / math.sqrt(width) / stride
    empty = padding // stride
    for u, w in itertools.product(range(rows), range(rows)):
        if w > u or w >= rows - empty:
            scores[u, w] = -math.inf
    weights = scores.softmax(-1)
    weights[rows - empty :] = 0
    per = block // stride
    sums = weights.unflatten(0, (-1, per)).unflatten(2, (-1, per)).sum((1, 3))
    blocks = math.ceil(length / block)
    return sums[:blocks, :blocks]


@pytest.mark.parametrize("length", [1, 37, 64, 100])
def test_antidiagonal_importance_is_its_definition(length: int) -> None:
    q, k, _ = tensors(length)
    for chunk in (16, 32, 64):
        found = maps.antidiagonal_importance(q, k, block_size=16, stride=4, chunk_size=chunk)
        for b, h in itertools.product(range(2), range(2)):
            torch.testing.assert_close(found[b, h], plain_antidiagonal(q[b, h], k[b, h], 16, 4, 64))
    if length == 64:
        torch.testing.assert_close(found.sum(-1), torch.full((2, 2, 4), 4.0, dtype=torch.float64))


def test_padding_does_not_count_in_antidiagonal_importance() -> None:
    q, k, _ = tensors(100)
    lengths = torch.tensor([37, 0])
    found = maps.antidiagonal_importance(q, k, block_size=16, stride=4, chunk_size=64, lengths_B=lengths)
    alone = maps.antidiagonal_importance(q[:1, :, :37], k[:1, :, :37], block_size=16, stride=4, chunk_size=64)
    torch.testing.assert_close(found[:1, :, :3, :3], alone)
    assert found[0, :, 3:].abs().max() == 0
    assert found[1].abs().max() == 0


def test_similarity_cap_tests_each_level_on_its_own() -> None:
    keys = torch.randn(1, 1, 3 * 16 + 5, 8, generator=generator())
    keys[:, :, 16:32] = 1.0  # alike at every distance
    keys[:, :, 32:48:8] = keys[:, :, 39:48:8]  # alike at distance seven only
    assert maps.similarity_cap(keys, 16, (0.9, 0.9, 0.9)).tolist() == [[[1, 8, 8, 1]]]
    # The ragged block: five keys, then copies of the last.
    last = torch.cat([keys[0, 0, 48:], keys[0, 0, -1:].expand(11, -1)])
    means = [float(F.cosine_similarity(last[::n], last[n - 1 :: n]).mean()) for n in (2, 4, 8)]
    passing = [n for n, mean in zip((2, 4, 8), means, strict=True) if mean > 0.5]
    assert int(maps.similarity_cap(keys, 16, (0.5, 0.5, 0.5))[0, 0, 3]) == max([1, *passing])
    assert maps.similarity_cap(torch.ones(1, 1, 16, 4), 16, (1.5, 1.5, 1.5)).tolist() == [[[1]]]


# -- orders ------------------------------------------------------------------------------------------------------


def plain_gilbert(p: Any, a: Any, b: Any, c: Any) -> Any:
    """The recursion itself, vectors as tuples."""

    def add(*vs: Any) -> Any:
        return tuple(map(sum, zip(*vs, strict=True)))

    def neg(v: Any) -> Any:
        return tuple(-x for x in v)

    def size(v: Any) -> int:
        return abs(sum(v))

    def unit(v: Any) -> Any:
        return tuple((x > 0) - (x < 0) for x in v)

    def half(v: Any) -> Any:
        h = tuple(x // 2 for x in v)
        return add(h, unit(v)) if size(h) % 2 and size(v) > 2 else h

    w, h, d = size(a), size(b), size(c)
    if 0 in (w, h, d):
        return
    if (w == 1) + (h == 1) + (d == 1) >= 2:
        along = max((a, b, c), key=size)
        for _ in range(size(along)):
            yield p
            p = add(p, unit(along))
        return
    a2, b2, c2 = half(a), half(b), half(c)
    da, db, dc = unit(a), unit(b), unit(c)
    ra, rb, rc = add(a, neg(a2)), add(b, neg(b2)), add(c, neg(c2))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        parts = [(p, a2, b, c), (add(p, a2), ra, b, c)]
    elif 3 * h > 4 * d:
        far = add(p, a, neg(da), b2, neg(db))
        parts = [(p, b2, c, a2), (add(p, b2), a, rb, c), (far, neg(b2), c, neg(ra))]
    elif 3 * d > 4 * h:
        far = add(p, a, neg(da), c2, neg(dc))
        parts = [(p, c2, a2, b), (add(p, c2), a, b, rc), (far, neg(c2), neg(ra), b)]
    else:
        parts = [
            (p, b2, c2, a2),
            (add(p, b2), c, a2, rb),
            (add(p, b2, neg(db), c, neg(dc)), a, neg(b2), neg(rc)),
            (add(p, a, neg(da), b2, c, neg(dc)), neg(c), neg(ra), rb),
            (add(p, a, neg(da), b2, neg(db)), neg(b2), c2, neg(ra)),
        ]
    for part in parts:
        yield from plain_gilbert(*part)


@pytest.mark.parametrize("size", [*itertools.product((1, 2, 3, 5), repeat=3), (7, 4, 6), (4, 9, 2), (6, 6, 13)])
def test_gilbert_curve_is_the_recursion_and_visits_every_cell_once(size: tuple[int, int, int]) -> None:
    axes = [tuple(size[i] if i == j else 0 for j in range(3)) for i in range(3)]
    major = size.index(max(size))
    rest = [axis for i, axis in enumerate(axes) if i != major]
    found = orders.gilbert_coordinates(*size)
    assert [tuple(cell) for cell in found.tolist()] == list(plain_gilbert((0, 0, 0), axes[major], *rest))
    order = orders.gilbert_order(*size)
    assert torch.equal(order.sort().values, torch.arange(math.prod(size)))


def test_gilbert_curve_of_a_whole_video_is_quick_and_mostly_steps_to_neighbours() -> None:
    start = time.perf_counter()
    cells = orders.gilbert_coordinates(80, 45, 21)
    assert time.perf_counter() - start < 5
    assert len(cells) == 75600
    assert ((cells.diff(dim=0).abs().sum(1) == 1).float().mean()) > 0.99


def test_tiles_come_one_after_the_other() -> None:
    order = orders.tile_order(5, 3, 2, (2, 2, 2))
    raster = torch.arange(30).view(2, 3, 5)
    tiles = [raster[:, y : y + 2, x : x + 2].flatten() for y in (0, 2) for x in (0, 2, 4)]
    assert torch.equal(order, torch.cat(tiles))
    with pytest.raises(ValueError, match="each must be 1 or more"):
        orders.tile_order(5, 0, 2)
    with pytest.raises(ValueError, match="each must be 1 or more"):
        orders.gilbert_coordinates(5, 0, 2)


def test_kmeans_finds_clusters_and_semantic_order_keeps_them_together() -> None:
    centres = torch.eye(4)[:, :3] * 20
    labels = torch.randint(4, (1, 2, 60), generator=generator())
    x = centres[labels] + torch.randn(1, 2, 60, 3, generator=generator())
    found, centroids = orders.kmeans(x, 4, 20, centroids_BHCK=x[:, :, :20:5] * 0 + centres + 1)
    for head in range(2):
        pairs = {(int(a), int(b)) for a, b in zip(labels[0, head], found[0, head], strict=True)}
        assert len(pairs) == 4
    assert (centroids - centres).abs().max() < 1.5
    semantic = orders.SemanticOrder(4, 100, first_iterations=5, iterations=1)
    first, keys = semantic(x, x)
    assert torch.equal(first.sort(-1).values, torch.arange(60).expand(1, 2, -1))
    assert torch.equal(keys.sort(-1).values, torch.arange(60).expand(1, 2, -1)), "fewer tokens than clusters"
    semantic(x, x)
    semantic.reset()
    assert torch.equal(semantic(x, x)[0], first), "a new video starts from new clusters"


def test_an_empty_cluster_keeps_its_centroid() -> None:
    x = torch.zeros(1, 1, 8, 2)
    start = torch.tensor([[[[0.0, 0.0], [9.0, 9.0]]]])
    labels, centroids = orders.kmeans(x, 2, 3, centroids_BHCK=start)
    assert torch.equal(centroids, start)
    assert labels.max() == 0


# -- the module --------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"block_m": 16, "block_n": 16, "tile_n": 16}
VIDEO: dict[str, Any] = {"width": 6, "height": 4, "depth": 4}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text_length": 4},
        {"rearrange": "gilbert", **VIDEO},
        {"rearrange": "gilbert", "text_length": 4, **VIDEO, "depth": 4},
        {"rearrange": "tile", "tile": (2, 2, 2), **VIDEO},
        {"rearrange": "semantic"},
        {"rearrange": lambda q, k: (torch.arange(q.shape[2]).flip(0), torch.arange(k.shape[2]).roll(3))},
        {"causal": True, "stride": 4},
        {"use_sim_mask": True, "mask_mode": "thresholdbound", "scale": 0.5},
    ],
    ids=str,
)
def test_an_open_gate_is_dense_attention_in_every_order(options: dict[str, Any]) -> None:
    attention = PyramidSparseAttention(**SMALL, **options)
    q, k, v = tensors(96 + (attention.rules.text_length if options.get("rearrange") else 0), heads=4)
    dense = F.scaled_dot_product_attention(
        q, k, v, is_causal=attention.rules.causal, scale=attention.rules.scale, enable_gqa=True
    )
    sparse = attention(q, k, v)
    assert not torch.allclose(sparse, dense, rtol=1e-3)
    with penstock.force(attention, "open"):
        torch.testing.assert_close(attention(q, k, v), dense)
    torch.testing.assert_close(penstock.twin(attention)(q, k, v), dense)
    assert torch.equal(attention.gate(q, k), attention.gate(q, k)), "the sample is seeded"


def test_forward_attends_by_its_map_in_the_order_of_the_video() -> None:
    attention = PyramidSparseAttention(**SMALL, rearrange="gilbert", text_length=5, **VIDEO)
    q, k, v = tensors(101)
    order = torch.cat([orders.gilbert_order(**VIDEO) + 5, torch.arange(5)])
    levels = attention.level_map(q, k)
    plain = PyramidSparseAttention(**SMALL, text_length=5)
    assert torch.equal(levels, plain.level_map(q[:, :, order], k[:, :, order]))
    assert (levels[..., -1] == 1).all(), "text is last and seen in full"
    expected = plain.attend(q[:, :, order], k[:, :, order], v[:, :, order], levels)
    torch.testing.assert_close(attention(q, k, v)[:, :, order], expected)
    torch.testing.assert_close(attention.attend(q, k, v, levels), attention(q, k, v))


def test_the_map_is_the_gate_s_values_and_can_be_forced() -> None:
    attention = PyramidSparseAttention(**SMALL)
    q, k, v = tensors(96)
    with penstock.watch(attention, keep="values") as log:
        attention(q, k, v)
    values = log.values()["gate"][0]
    levels = attention.level_map(q, k)
    assert torch.equal(values, maps.resolution(levels))
    torch.testing.assert_close(values.double().mean((2, 3)), attention.density(levels))
    given = torch.full((6, 6), 0.3)
    with penstock.force(attention, given):
        assert (attention.level_map(q, k) == 4).all()
        torch.testing.assert_close(attention(q, k, v), attention.attend(q, k, v, torch.full((6, 6), 4)))
    with penstock.force(attention, "closed"), pytest.raises(ValueError, match="blocks of queries keep no tile"):
        attention(q, k, v)


def test_a_causal_gate_shut_sees_the_diagonal_and_never_the_future() -> None:
    attention = PyramidSparseAttention(**SMALL, causal=True, stride=4)
    q, k, v = tensors(96)
    with penstock.force(attention, "closed"):
        assert torch.equal(attention.level_map(q, k), torch.eye(6, dtype=torch.int64).expand(2, 2, 6, 6))
    assert attention.level_map(q, k).triu(1).abs().max() == 0
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 64:] += 1
    torch.testing.assert_close(attention(*changed)[:, :, :64], attention(q, k, v)[:, :, :64])


def test_the_cap_only_lowers_levels() -> None:
    q, k, _ = tensors(96)
    smooth = k.clone()
    smooth[:, :, :48] = smooth[:, :, :1]
    free, capped = (PyramidSparseAttention(**SMALL, use_sim_mask=use) for use in (False, True))
    before, after = free.level_map(q, smooth), capped.level_map(q, smooth)
    assert torch.equal(after[..., :3], before[..., :3]), "constant keys may be averaged"
    assert torch.equal(after[..., 3:], before[..., 3:].clamp_max(1)), "random keys may not, and skipped stay skipped"
    assert (before[..., 3:] > 1).any()


def test_the_binary_twin_costs_the_same() -> None:
    q, k, _ = tensors(32 * 16)
    for options in ({}, {"causal": True, "stride": 4}, {"text_length": 20}, {"mask_mode": "thresholdbound"}):
        pyramid, binary = (PyramidSparseAttention(**SMALL, **options, binary=b) for b in (False, True))
        levels, kept = pyramid.level_map(q, k), binary.level_map(q, k)
        assert set(kept.unique().tolist()) == {0, 1}
        assert torch.equal(kept.sum(-1), maps.resolution(levels).sum(-1).round().long())
        forced = maps.forced_tiles(
            32, 32, causal=pyramid.rules.causal, text_blocks=2 if "text_length" in options else 0
        )
        assert (kept[:, :, forced] == 1).all()
        if pyramid.rules.causal:
            assert kept.triu(1).max() == 0


def test_gradients_reach_queries_keys_and_values_with_the_map_constant() -> None:
    attention = PyramidSparseAttention(**{**SMALL, "block_n": 8, "tile_n": 8})
    q, k, v = (x[:1, :1, :20, :4].clone().requires_grad_() for x in tensors(40))
    assert not attention.gate(q, k).requires_grad
    levels = torch.tensor([[1, 2, 8], [4, 0, 1]])
    assert torch.autograd.gradcheck(lambda a, b, c: attention.attend(a, b, c, levels), (q, k, v))


def test_warm_up_steps_are_dense_and_counted() -> None:
    attention = PyramidSparseAttention(**SMALL, warmup_steps=2)
    q, k, v = tensors(96)
    dense = F.scaled_dot_product_attention(q, k, v)

    def is_dense(**options: int) -> bool:
        return torch.equal(attention(q, k, v, **options), dense)

    assert [is_dense() for _ in range(4)] == [True, True, False, False]
    attention.reset()
    assert is_dense()
    assert not is_dense(step=2)
    assert is_dense(step=1)
    assert not is_dense()


def test_lists_hold_the_map() -> None:
    q, k, _ = tensors(96)
    attention = PyramidSparseAttention(**SMALL, rearrange="gilbert", **VIDEO)
    listed = attention.level_list(q, k)
    assert listed.shape == (2, 2, 6, 11)
    assert torch.equal(maps.levels_from_list(listed), attention.level_map(q, k))
    with pytest.raises(ValueError, match="5 separators"):
        maps.levels_from_list(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask_ratios": {1: (0.0, 0.5), 2: (0.5, 0.4), 0: (0.4, 1.0)}}, r"mask_ratios\[2\]=\(0.5, 0.4\)"),
        ({"mask_ratios": {1: (0.0, 0.5), 2: (0.6, 1.0)}}, "must start at 0.5"),
        ({"mask_ratios": {1: (0.0, 0.5)}}, "end at 0.5; they must cover"),
        ({"mask_ratios": {1: (0.0, 0.5), 3: (0.5, 1.0)}}, r"levels \[3\]"),
        ({"block_n": 20}, "block_n=20: positive, block_n a multiple of 8"),
        ({"block_n": 48}, "tile_n=32 must divide block_n=48"),
        ({"mask_mode": "quota"}, "mask_mode='quota'"),
        ({"sample": "some"}, "sample='some'"),
        ({"text_length": -1}, "text_length=-1"),
        ({"causal": True, "block_m": 64}, "square tiles"),
        ({"causal": True, "stride": 24}, "stride=24 must divide"),
        ({"causal": True, "rearrange": "semantic"}, "keeps the order"),
        ({"rearrange": "hilbert"}, "rearrange='hilbert'"),
        ({"rearrange": "gilbert", "width": 4}, "needs width, height and depth"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PyramidSparseAttention(**options)


def test_tokens_that_are_not_the_video_s_are_refused() -> None:
    q, k, v = tensors(96)
    attention = PyramidSparseAttention(**SMALL, rearrange="gilbert", text_length=4, **VIDEO)
    with pytest.raises(ValueError, match="96 tokens less text_length=4 are 92, but width x height x depth is 96"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="keep no tile"):
        PyramidSparseAttention(**SMALL).attend(q, k, v, torch.zeros(6, 6, dtype=torch.int64))
    for options in ({"use_sim_mask": True}, {"causal": True, "stride": 4}, {"binary": True}):
        with pytest.raises(ValueError, match="list encoding"):
            PyramidSparseAttention(**SMALL, **options).level_list(q, k)
    with pytest.raises(ValueError, match=r"stride=4 must divide block_size=16, and that chunk_size=20"):
        maps.antidiagonal_importance(q, k, block_size=16, stride=4, chunk_size=20)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_attentions(name: str) -> None:
    attention = preset(name, rearrange="gilbert", width=8, height=8, depth=4)
    ends = [end for _, end in attention.rules.mask_ratios.values()]
    assert ends == [*PRESETS[name]["ends"], 1.0]
    assert sum(p.numel() for p in attention.parameters()) == 0
    assert not attention.state_dict()
    with pytest.raises(ValueError, match="there are wan2_1_14b"):
        preset("wan")


def test_the_docstring_s_example_runs() -> None:
    assert doctest.testmod(model).failed == 0


def test_error_against_density() -> None:
    q, k, v = synthetic.autoregressive(0.95, generator(), length=256)
    found = model.error_vs_density(
        q, k, v, [(0.125, 0.25, 0.5, 1.0), (1.0, 1.0, 1.0, 1.0)], block_m=16, block_n=16, tile_n=16, sample="all"
    )
    (coarse, full), (kept, everything) = found["pyramid"], found["binary"]
    assert coarse.density == pytest.approx((2 + 1 + 1 + 1) / 16)
    assert kept.density == pytest.approx(5 / 16)
    assert coarse.error < kept.error
    assert coarse.cosine > kept.cosine
    for point in (full, everything):
        assert point.density == 1
        assert point.error < 1e-5


# -- the language model ------------------------------------------------------------------------------------------


def lm(**options: Any) -> PSALM:
    torch.manual_seed(0)
    built = PSALM(31, 16, 2, 2, intermediate_size=24, **{"block_size": 8, "stride": 4, **options}).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built.eval()


TOKENS = torch.randint(31, (2, 60), generator=generator(1))


def test_kinds_of_attention_share_their_weights() -> None:
    pyramid, dense, binary = lm(), lm(attention="dense"), lm(attention="binary")
    assert pyramid.state_dict().keys() == dense.state_dict().keys() == binary.state_dict().keys()
    assert len(named_gates(pyramid)) == len(named_gates(binary)) == 2
    outputs = [m(TOKENS) for m in (pyramid, dense, binary)]
    for first, second in itertools.combinations(outputs, 2):
        assert not torch.allclose(first, second, rtol=1e-3)
    with penstock.force(pyramid, "open"), penstock.force(binary, "open"):
        torch.testing.assert_close(pyramid(TOKENS), outputs[1])
        torch.testing.assert_close(binary(TOKENS), outputs[1])


@pytest.mark.parametrize("options", [{}, {"mask_mode": "thresholdbound", "sim_thresholds": (0.3, 0.2, 0.1)}], ids=str)
def test_padding_changes_nothing_for_real_tokens(options: dict[str, Any]) -> None:
    model = lm(**options)
    alone = [model(TOKENS[:1, :60]), model(TOKENS[1:, :43])]
    for left in (False, True):
        tokens, mask = TOKENS.clone(), torch.ones(2, 60, dtype=torch.bool)
        tokens[1] = 7
        here = slice(17, None) if left else slice(43)
        mask[1] = False
        mask[1, here] = True
        tokens[1, here] = TOKENS[1, :43]
        found = model(tokens, mask_BL=mask)
        torch.testing.assert_close(found[:1], alone[0])
        torch.testing.assert_close(found[1:, here], alone[1])


def test_only_the_levels_of_its_own_block_tell_a_token_of_the_future() -> None:
    model = lm()
    changed = TOKENS.clone()
    changed[:, 45:] = (changed[:, 45:] + 1) % 31
    torch.testing.assert_close(model(TOKENS)[:, :40], model(changed)[:, :40], rtol=0, atol=1e-12)
    with penstock.force(model, maps.resolution(torch.ones(8, 8).tril().mul(2).long())):
        torch.testing.assert_close(model(TOKENS)[:, :45], model(changed)[:, :45], rtol=0, atol=1e-12)


def test_a_prompt_uses_the_map_and_decoded_tokens_attend_densely() -> None:
    model = PSALM(31, 16, 1, 2, intermediate_size=24, block_size=8, stride=4).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    full = model(TOKENS)
    cache = model.new_cache()
    torch.testing.assert_close(model(TOKENS[:, :56], cache=cache), full[:, :56])
    # One layer: a decoded token sees the keys of the prompt as a dense row of the map would.
    for number in (56, 57):
        step = model(TOKENS[:, number : number + 1], cache=cache)[:, 0]
        with penstock.force(model, "open"):
            torch.testing.assert_close(step, model(TOKENS[:, : number + 1])[:, -1])
    # Up to two blocks every tile is the diagonal or the first column, so that nothing is left out.
    deep = lm()
    cache = deep.new_cache()
    pieces = [deep(TOKENS[:, :9], cache=cache), *(deep(TOKENS[:, i : i + 1], cache=cache) for i in range(9, 16))]
    torch.testing.assert_close(torch.cat(pieces, 1), deep(TOKENS[:, :16]))


def test_a_padded_prompt_can_be_decoded_from() -> None:
    model = lm()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :13] = False
    padded = TOKENS[:, :40].clone()
    padded[1, 13:] = TOKENS[1, :27]
    padded[1, :13] = 3
    cache, alone = model.new_cache(), model.new_cache()
    model(padded, cache=cache, mask_BL=mask)
    model(TOKENS[1:, :27], cache=alone)
    step, own = model(TOKENS[:, 59:], cache=cache), model(TOKENS[1:, 59:], cache=alone)
    torch.testing.assert_close(step[1:], own)


def test_gradient_checkpointing_changes_no_gradient_and_counts_no_step_twice() -> None:
    grads = []
    for again in (False, True):
        model = lm(warmup_steps=1).train()
        model.gradient_checkpointing = again
        for _ in range(2):  # the second step is the first with a map
            model.zero_grad()
            model(TOKENS).square().mean().backward()
        assert int(model.steps_seen) == 2
        grads.append([p.grad for p in model.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def test_training_starts_dense_and_goes_on_after_a_checkpoint() -> None:
    model, dense = lm(warmup_steps=2).train(), lm(attention="dense")
    plain = dense(TOKENS)
    assert torch.equal(model(TOKENS), plain)
    assert not torch.allclose(model.eval()(TOKENS), plain, rtol=1e-3), "no warm-up in evaluation"
    again = lm(warmup_steps=2).train()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(again(TOKENS), plain)
    assert not torch.allclose(again(TOKENS), plain, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": "sparse"}, "attention='sparse'"),
        ({"end_ratios": (0.1, 0.2)}, "there must be four"),
        ({"end_ratios": (0.1, 0.2, 0.1, 0.5)}, "mask_ratios"),
        ({"sim_thresholds": (0.5,)}, "there must be three"),
        ({"block_size": 12, "stride": 4}, "multiple of 8"),
        ({"stride": 3}, "stride=3 must divide the block of 8"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lm(**options)
    with pytest.raises(ValueError, match="num_heads=3 must divide the width 16"):
        PSALM(31, 16, 1, 3, intermediate_size=8, block_size=8, stride=4)


# -- the experiment ----------------------------------------------------------------------------------------------


def test_synthetic_data_is_as_smooth_as_it_says() -> None:
    q, _, _ = synthetic.autoregressive(0.9, generator(), length=1024)
    assert q.shape == (1, 1, 1024, 32)
    neighbours = F.cosine_similarity(q[0, 0, 1:].flatten(), q[0, 0, :-1].flatten(), 0)
    assert float(neighbours) == pytest.approx(0.9, abs=0.03)
    assert float(q.std()) == pytest.approx(1.0, abs=0.05)
    video = synthetic.smooth_video(2.0, generator())[0]
    grid = video[0, 0].view(8, 16, 16, 32)
    assert float(video.std()) == pytest.approx(1.0, abs=0.01)
    for axis in (1, 2):
        # Noise through a Gaussian of deviation s has the autocorrelation exp(-d^2 / (4 s^2)).
        alike = (grid * grid.roll(2, axis)).mean() / grid.square().mean()
        assert float(alike) == pytest.approx(math.exp(-4 / 16), abs=0.05)


def test_an_averaged_token_stands_for_all_it_replaces() -> None:
    assert synthetic.error_when_constant(0) < 1e-9


def test_claims_are_those_of_the_card_and_need_every_seed() -> None:
    names = {claim.id for claim in card("psa").claims}
    config = PSAConfig()
    trials: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEM.trials}
    assert SYSTEM.claims(config, Results([], trials)).keys() == names
    rows = []
    for gain in (-0.2, -0.21, 0.001):
        row = {f"raster_pyramid_{c}": 0.4 for c in (1, 2, 3)}
        rows.append(row | {f"gilbert_pyramid_{c}": 0.4 + gain for c in (1, 2, 3)})
    effects = SYSTEM.claims(config, Results([], {"token_order": rows}))["token_order"]
    assert isinstance(effects, list)
    assert effects[-1].verdict == "does not hold", "one seed in which the order does harm is enough"
