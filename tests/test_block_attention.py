"""Block-sparse and pyramid attention against their definition, values and gradients, on every backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from penstock.ops import block_sparse_attention, last_backend, pooled_attention_map, pyramid_attention
from penstock.ops.block_attention import attention_probabilities, pool_keys
from penstock.ops.native import library

NATIVE = library("tile_attention") is not None
needs_native = pytest.mark.skipif(not NATIVE, reason="needs a C compiler: apt-get install gcc")


def tensors(batch: int, heads: int, groups: int, length: int, total: int, width: int, dtype: torch.dtype, seed: int) -> list[Tensor]:  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, width), (batch, groups, total, width), (batch, groups, total, width)]
    return [torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]


def tiles(kind: str, batch: int, heads: int, rows: int, columns: int, sizes: tuple[int, int], causal: bool, seed: int) -> Tensor:  # fmt: skip
    """A random map in which every block of queries sees something."""
    make = torch.Generator().manual_seed(seed)
    first = (torch.arange(rows) * sizes[0] // sizes[1]).clamp(max=columns - 1) if causal else torch.zeros(rows).long()
    if kind == "binary":
        chosen = torch.rand(batch, heads, rows, columns, generator=make) < 0.3
        chosen[:, :, torch.arange(rows), first] = True
        return chosen
    levels = torch.tensor([0, 1, 2, 4, 8])[torch.randint(5, (batch, heads, rows, columns), generator=make)]
    levels[:, :, torch.arange(rows), first] = torch.tensor([1, 2, 4, 8])[torch.randint(4, (rows,), generator=make)]
    return levels


def with_gradients(kind: str, given: list[Tensor], chosen: Tensor, **options: object) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    attend = block_sparse_attention if kind == "binary" else pyramid_attention
    output = attend(*leaves, chosen, **options)  # type: ignore[arg-type]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(x.grad for x in leaves if x.grad is not None)]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["binary", "pyramid"]),
    length=st.integers(1, 140),
    extra=st.integers(-30, 30),
    sizes=st.sampled_from([(16, 16), (8, 16), (16, 8), (32, 8), (8, 32), (64, 64)]),
    causal=st.booleans(),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    backend=st.sampled_from(["gather", "native"] if NATIVE else ["gather"]),
    seed=st.integers(0, 5),
)
def test_every_backend_is_the_definition(
    kind: str, length: int, extra: int, sizes: tuple[int, int], causal: bool, heads: tuple[int, int], backend: str, seed: int
) -> None:  # fmt: skip
    total = length if causal else length + extra
    assume(total >= 1)
    dtype = torch.float32 if backend == "native" else torch.float64
    given = tensors(2, *heads, length, total, 8, dtype, seed)
    shape = (2, heads[0], math.ceil(length / sizes[0]), math.ceil(total / sizes[1]))
    chosen = tiles(kind, *shape, sizes, causal, seed)
    options = {"block_size": sizes, "causal": causal}
    right = with_gradients(kind, [x.double() for x in given], chosen, backend="reference", **options)
    found = with_gradients(kind, given, chosen, backend=backend, **options)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for ours, reference in zip(found, right, strict=True):
        assert ours.isfinite().all()
        assert float((ours - reference).abs().max()) < tolerance * (1 + float(reference.abs().max()))


@pytest.mark.parametrize("kind", ["binary", "pyramid"])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_is_the_definition(kind: str, causal: bool) -> None:
    """Uncompiled and forward only, as it can be tried on a CPU: the masks and the order of levels are what CUDA gets."""
    q, k, v = tensors(2, 4, 2, 100, 100, 8, torch.float64, 0)
    chosen = tiles(kind, 2, 4, 7, 7, (16, 16), causal, 1)
    attend = block_sparse_attention if kind == "binary" else pyramid_attention
    ours, right = (
        attend(q, k, v, chosen, block_size=16, causal=causal, backend=backend) for backend in ("flex", "reference")
    )  # type: ignore[arg-type]
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("backend", ["gather", pytest.param("native", marks=needs_native)])
def test_all_tiles_are_dense_attention(backend: str) -> None:
    q, k, v = tensors(1, 4, 2, 300, 300, 16, torch.float32, 0)
    chosen = torch.ones(5, 5, dtype=torch.bool)
    output = block_sparse_attention(q, k, v, chosen, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@needs_native
def test_huge_scores_stay_finite() -> None:
    q, k, v = (10 * x for x in tensors(1, 2, 2, 128, 128, 8, torch.float32, 0))
    chosen = tiles("binary", 1, 2, 8, 8, (16, 16), True, 0)
    found = with_gradients("binary", [q, k, v], chosen, block_size=16, backend="native")
    right = with_gradients("binary", [x.double() for x in (q, k, v)], chosen, block_size=16, backend="reference")
    for ours, reference in zip(found, right, strict=True):
        assert float((ours - reference).abs().max()) < 1e-3 * (1 + float(reference.abs().max()))


@pytest.mark.parametrize("kind", ["binary", "pyramid"])
@pytest.mark.parametrize("backend", ["gather", pytest.param("native", marks=needs_native)])
def test_half_precision_is_rounded_and_no_more(kind: str, backend: str) -> None:
    given = [x.bfloat16() for x in tensors(1, 2, 2, 200, 200, 16, torch.float64, 0)]
    chosen = tiles(kind, 1, 2, 13, 13, (16, 16), True, 0)
    options = {"block_size": 16, "causal": True}
    right = with_gradients(kind, [x.double() for x in given], chosen, backend="reference", **options)
    found = with_gradients(kind, given, chosen, backend=backend, **options)
    for ours, reference in zip(found, right, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - reference).abs().max()) < 0.02 * float(reference.abs().max())


def test_averages_are_exact_where_keys_are_alike() -> None:
    q, _, _ = tensors(1, 2, 2, 64, 64, 8, torch.float64, 0)
    k, v = (x.repeat_interleave(8, 2) for x in tensors(1, 2, 2, 64, 8, 8, torch.float64, 1)[1:])
    levels = tiles("pyramid", 1, 2, 4, 4, (16, 16), False, 3).clamp(min=1)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(pyramid_attention(q, k, v, levels, block_size=16), dense)


def test_queries_that_see_nothing_get_zeros_and_no_gradient() -> None:
    q, k, v = tensors(1, 1, 1, 16, 16, 4, torch.float64, 0)
    levels = torch.full((1, 1), 8)
    output, *grads = with_gradients("pyramid", [q, k, v], levels, block_size=16, causal=True, backend="gather")
    assert (output[:, :, :7] == 0).all()
    assert (output[:, :, 7:] != 0).all()
    assert (grads[0][:, :, :7] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_the_pooled_map_is_the_map_pooled(causal: bool) -> None:
    q, k, _ = tensors(2, 4, 2, 100, 100, 8, torch.float64, 0)
    whole = F.pad(attention_probabilities(q, k, causal), (0, 12, 0, 12)).view(2, 4, 7, 16, 7, 16)
    for pool, right in (("max", whole.amax((3, 5))), ("sum", whole.sum((3, 5))), ("mean", whole.mean((3, 5)))):
        torch.testing.assert_close(pooled_attention_map(q, k, block_size=16, causal=causal, pool=pool), right)  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")
def test_the_triton_kernel_pools_the_map() -> None:
    """In Triton's interpreter, which has to be asked for before Triton is imported."""
    script = """
import torch
from penstock.ops import pooled_attention_map
for heads, groups, length, total, width, sizes, causal in (
    (4, 2, 100, 100, 8, (16, 16), True), (2, 1, 70, 130, 24, (16, 32), False), (1, 1, 50, 50, 8, (12, 20), True)
):
    q, k = torch.randn(2, heads, length, width), torch.randn(2, groups, total, width)
    for pool in ("max", "sum", "mean"):
        a, b = (pooled_attention_map(q, k, block_size=sizes, pool=pool, causal=causal, backend=b) for b in ("triton", "rows"))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print("alike")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "alike\n", done.stderr


def test_pooling_repeats_the_last_token() -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1)
    assert pool_keys(x, 8, 4).flatten().tolist() == [1.5, 4.0]
    assert pool_keys(x, 8, 1).flatten().tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_work_follows_the_tiles() -> None:
    q, k, v = tensors(1, 2, 2, 256, 256, 8, torch.float32, 0)
    chosen = torch.eye(16, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        block_sparse_attention(q, k, v, chosen, block_size=16)
    assert counter.get_total_flops() == 4 * (2 * 16) * 16 * 16 * 8


def test_it_compiles() -> None:
    q, k, v = tensors(1, 2, 2, 64, 64, 8, torch.float32, 0)
    chosen = torch.ones(4, 4, dtype=torch.bool)
    compiled = torch.compile(lambda *x: block_sparse_attention(*x, block_size=16), backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, chosen), block_sparse_attention(q, k, v, chosen, block_size=16))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["binary", "pyramid"])
def test_exported_programs_hold_no_operator_of_ours(kind: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, chosen: Tensor) -> Tensor:
            attend = block_sparse_attention if kind == "binary" else pyramid_attention
            return attend(q, q, q, chosen, block_size=16, causal=True)

    q = tensors(2, 2, 2, 64, 64, 8, torch.float32, 0)[0]
    chosen, other = (tiles(kind, 2, 2, 4, 4, (16, 16), True, seed) for seed in (0, 1))
    program = torch.export.export(Attention(), (q, chosen), strict=False)
    assert not any("penstock" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q, other), Attention()(q, other))


def test_what_ran_can_be_seen() -> None:
    q, k, v = tensors(1, 1, 1, 16, 16, 4, torch.float64, 0)
    block_sparse_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), block_size=16)
    assert last_backend["block_sparse_attention"] == "gather"
    with pytest.raises(ValueError, match="native backend needs float32 or less"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), block_size=16, backend="native")


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        (torch.ones(3, 4, dtype=torch.bool), {}, r"must be \(\[B, H,\] 4, 4\)"),
        (torch.zeros(4, 4, dtype=torch.bool), {}, "4 blocks of queries keep no tile; keep at least the diagonal"),
        (torch.ones(4, 4, dtype=torch.bool).triu(1), {}, "keep no tile"),
        (torch.ones(4, 4, dtype=torch.bool), {"block_size": 0}, "must be positive"),
        (torch.full((4, 4), 3), {}, "levels must be among"),
    ],
)
def test_bad_maps_are_refused(chosen: Tensor, options: dict[str, int], message: str) -> None:
    q, k, v = tensors(1, 2, 2, 64, 64, 8, torch.float32, 0)
    attend = block_sparse_attention if chosen.dtype == torch.bool else pyramid_attention
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, chosen, **({"block_size": 16, "causal": True} | options))  # type: ignore[arg-type]


def test_heads_must_divide() -> None:
    q, k, v = tensors(1, 3, 2, 16, 16, 4, torch.float32, 0)
    with pytest.raises(ValueError, match="2 key/value heads do not divide 3 query heads"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), block_size=16)
