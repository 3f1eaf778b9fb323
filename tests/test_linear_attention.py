"""Gated linear attention: every form against the recurrence, values and gradients, however strong the decay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from penstock.ops import gated_linear_attention, last_backend
from penstock.ops.linear_attention import Backend
from penstock.ops.native import library

needs_native = pytest.mark.skipif(library("gla") is None, reason="needs a C compiler: apt-get install gcc")
#: Sums of log gates of up to 120 nats are rounded to 1e-5 in float32.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 4e-2}


def inputs(
    batch: int, length: int, heads: int, width: int, values: int, strength: float, *, dtype: torch.dtype = torch.float64,
    seed: int = 0, rows: int | None = None, scalar: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Queries, keys, values, log gates down to -strength, initial states."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, width)] * 2 + [(batch, length, heads, values)]
    q, k, v = (torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes)
    gate = (
        -strength * torch.rand(batch, length, heads, 1 if scalar else width, generator=make, dtype=torch.float64) ** 3
    )
    state = torch.randn(rows or batch, heads, width, values, generator=make, dtype=torch.float64)
    return [q, k, v, gate.to(dtype), state.to(torch.promote_types(dtype, torch.float32))]


def with_gradients(given: list[Tensor], backend: Backend, **options: object) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    output, state = gated_linear_attention(*leaves, backend=backend, **options)  # type: ignore[arg-type]
    weigh = torch.Generator().manual_seed(1)
    total = (output.double() * torch.randn(output.shape, generator=weigh, dtype=torch.float64)).sum()
    (total + (state.double() * torch.randn(state.shape, generator=weigh, dtype=torch.float64)).sum()).backward()
    return [output.detach(), state.detach(), *(x.grad for x in leaves if x.grad is not None)]


def check(given: list[Tensor], backend: Backend, **options: object) -> None:
    reference = with_gradients(
        [x.double() for x in given], "recurrent", **{k: v for k, v in options.items() if k != "chunk_size"}
    )
    found = with_gradients(given, backend, **options)
    tolerance = TOLERANCE[given[0].dtype]
    for ours, right in zip(found, reference, strict=True):
        assert ours.isfinite().all()
        # Where gates shut nearly all, what is left of a gradient is the difference of terms of size one.
        scale = max(float(right.abs().max()), 0.01)
        assert float((ours.double() - right).abs().max()) / scale < tolerance


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 150),
    width=st.integers(1, 9),
    values=st.integers(1, 9),
    strength=st.sampled_from([0.0, 0.05, 1.0, 5.0, 50.0, 150.0]),
    chunk=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 3),
)
def test_chunks_are_the_recurrence(
    length: int, width: int, values: int, strength: float, chunk: int, seed: int
) -> None:
    check(inputs(2, length, 2, width, values, strength, seed=seed), "chunk", chunk_size=chunk)


@pytest.mark.parametrize("strength", [0.1, 150.0])
def test_the_parallel_form_is_the_recurrence(strength: float) -> None:
    check(inputs(2, 37, 2, 5, 3, strength), "parallel")


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 150),
    width=st.integers(1, 9),
    values=st.integers(1, 9),
    strength=st.sampled_from([0.0, 0.05, 1.0, 5.0, 150.0]),
    chunk=st.sampled_from([16, 64]),
    seed=st.integers(0, 3),
)
def test_the_kernel_in_c_is_the_recurrence(
    length: int, width: int, values: int, strength: float, chunk: int, seed: int
) -> None:
    given = inputs(2, length, 2, width, values, strength, dtype=torch.float32, seed=seed)
    check(given, "native", chunk_size=chunk)


@pytest.mark.parametrize("backend", ["chunk", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.05, 1.0, 50.0])
def test_lower_precisions_stay_near_and_finite(backend: Backend, dtype: torch.dtype, strength: float) -> None:
    check(inputs(1, 300, 2, 16, 16, strength, dtype=dtype), backend)


@pytest.mark.parametrize("backend", ["chunk", pytest.param("native", marks=needs_native)])
def test_many_chunks_and_segments(backend: Backend) -> None:
    check(inputs(3, 1100, 4, 32, 32, 0.1, dtype=torch.float32), backend)


def test_one_decay_a_head() -> None:
    check(inputs(2, 70, 2, 4, 4, 1.0, scalar=True), "chunk")


@pytest.mark.parametrize("backend", ["chunk", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("strength", [0.3, 60.0])
@pytest.mark.parametrize("bounds", [[0, 1, 65, 130, 200], [0, 64, 128, 200], [0, 200]])
def test_packed_sequences_do_not_know_each_other(bounds: list[int], strength: float, backend: Backend) -> None:
    dtype = torch.float32 if backend == "native" else torch.float64
    given = inputs(1, 200, 2, 4, 4, strength, rows=len(bounds) - 1, dtype=dtype)
    check(given, backend, cu_seqlens=torch.tensor(bounds), chunk_size=32)
    q, k, v, gate, state = given
    _, packed = gated_linear_attention(q, k, v, gate, state, cu_seqlens=torch.tensor(bounds))
    a, b = bounds[-2:]
    _, alone = gated_linear_attention(q[:, a:b], k[:, a:b], v[:, a:b], gate[:, a:b], state[-1:])
    torch.testing.assert_close(packed[-1:], alone)


@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunk"])
def test_shut_gates_leave_the_current_token_only(backend: Backend) -> None:
    q, k, v, gate, state = inputs(1, 70, 1, 4, 4, 1.0)
    output, final = gated_linear_attention(q, k, v, torch.full_like(gate, -math.inf), state, scale=1.0, backend=backend)
    torch.testing.assert_close(output, (q * k).sum(-1, keepdim=True) * v)
    torch.testing.assert_close(final, k[:, -1, :, :, None] * v[:, -1, :, None])


def test_pieces_with_a_state_are_the_whole() -> None:
    q, k, v, gate, state = inputs(2, 150, 2, 8, 8, 0.5)
    whole, last = gated_linear_attention(q, k, v, gate, state)
    pieces = []
    for a, b in ((0, 70), (70, 71), (71, 150)):
        part, state = gated_linear_attention(q[:, a:b], k[:, a:b], v[:, a:b], gate[:, a:b], state)
        pieces.append(part)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


def test_a_sample_does_not_depend_on_how_others_decay() -> None:
    """A sample with a strong decay sends its batch the careful way; the results stay the same to rounding."""
    gentle, strong = inputs(1, 100, 2, 8, 8, 0.1), inputs(1, 100, 2, 8, 8, 90.0, seed=1)
    both = [torch.cat(pair) for pair in zip(gentle, strong, strict=True)]
    together, _ = gated_linear_attention(*both)
    alone, _ = gated_linear_attention(*gentle)
    torch.testing.assert_close(together[:1], alone)


def test_the_default_is_chosen_by_length_and_can_be_seen() -> None:
    q, k, v, gate, state = inputs(1, 5, 1, 4, 4, 1.0)
    gated_linear_attention(q, k, v, gate)
    assert last_backend["gated_linear_attention"] == "chunk", "float64"
    with pytest.raises(ValueError, match="native backend needs float32 or less"):
        gated_linear_attention(q, k, v, gate, backend="native")
    gated_linear_attention(q[:, :1], k[:, :1], v[:, :1], gate[:, :1], state)
    assert last_backend["gated_linear_attention"] == "recurrent"
    with pytest.raises(ValueError, match="no backend 'fast'; it has recurrent, parallel, chunk, native, fla"):
        gated_linear_attention(q, k, v, gate, backend="fast")  # type: ignore[arg-type]


def test_it_compiles_and_its_products_are_counted() -> None:
    q, k, v, gate, _ = inputs(1, 128, 2, 8, 8, 0.1, dtype=torch.float32)
    compiled = torch.compile(gated_linear_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, gate)[0], gated_linear_attention(q, k, v, gate)[0])
    torch._dynamo.reset()
    with FlopCounterMode(display=False) as counter:
        gated_linear_attention(q, k, v, gate)
    assert counter.get_total_flops() == 128 * 2 * 2 * (64 * 16 + 2 * 64)


def test_exported_programs_hold_no_operator_of_ours() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
            return gated_linear_attention(q, k, v, gate)[0]

    *given, _ = inputs(3, 70, 2, 4, 4, 90.0, dtype=torch.float32)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Attention(), tuple(given), dynamic_shapes=[batch] * 4, strict=False)
    assert not any("penstock" in str(node.target) for node in program.graph.nodes)
    *others, _ = inputs(5, 70, 2, 4, 4, 90.0, dtype=torch.float32, seed=1)
    torch.testing.assert_close(program.module()(*others), Attention()(*others))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_gate": torch.full((1, 6, 2, 4), 0.1)}, "log of a decay is at most 0"),
        ({"log_gate": torch.full((1, 6, 2, 4), math.nan)}, "log_gate holds nan"),
        ({"log_gate": torch.zeros(1, 6, 4)}, "log_gate is"),
        ({"k_BLHK": torch.zeros(1, 6, 2, 5)}, "they must be"),
        (
            {"initial_state": torch.zeros(1, 2, 3, 4)},
            r"must be \(B, H, K, V\) = \(1, 2, 4, 3\) \(it looks transposed\)",
        ),
        ({"chunk_size": 48}, "power of two"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "from 0 to the length 6"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    right = {
        "q_BLHK": torch.zeros(1, 6, 2, 4), "k_BLHK": torch.zeros(1, 6, 2, 4), "v_BLHV": torch.zeros(1, 6, 2, 3),
        "log_gate": torch.zeros(1, 6, 2, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**(right | change))  # type: ignore[arg-type]
