"""Benchmarks: what the machine can do, then our kernels and models beside their peers on the same tensors.

Each figure is the median of interleaved repeats (A B A B ...), so that a drift of the machine's speed hits all
alike; ratios are of medians. They live with the systems: a function ``benchmarks()`` in ``bench.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from torch import nn

from penstock.errors import UserError, nearest
from penstock.lab.cards import all_cards
from penstock.lab.run import environment
from penstock.ops.workspace import keep_freed_memory

_REPEATS = 9
_WARM_UP = 40


@dataclass(frozen=True)
class Contest:
    """Callables timed against each other.

    Attributes:
        entries: what to time, by name; the first is ours, the ratio of each other to it is printed.
        flops: of one call of the first, to set it against the machine's matrix-product rate; 0 if that says nothing.
        note: what a reader must know (sizes, what is equal).
        repeats: how often each is timed.
    """

    entries: dict[str, Callable[[], Any]]
    flops: float = 0.0
    note: str = ""
    repeats: int = _REPEATS


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: ``make`` allocates and returns the contest."""

    what: str
    make: Callable[[], Contest]


def machine() -> dict[str, float]:
    """The machine's own limits: float32 matrix products (GFLOP/s) and copying (GB/s), medians."""
    n, size = 1024, 16_000_000
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    for _ in range(_WARM_UP):
        a @ b  # a processor at rest takes a while to reach its rate
    product = _median({"product": lambda: a @ b})["product"]
    copy = _median({"copy": lambda: target.copy_(source)})["copy"]
    return {"matrix_gflops": 2 * n**3 / product / 1e9, "copy_gb_per_s": 8 * size / copy / 1e9}


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name: that of the tables, and those of the systems' ``bench.py``."""
    found: dict[str, Benchmark] = dict(import_module("penstock.lab.tablebench").benchmarks())
    for card in all_cards().values():
        if card.ready and find_spec(f"{card.module}.bench") is not None:
            found |= import_module(f"{card.module}.bench").benchmarks()
    return found


def bench(names: Sequence[str] = ()) -> dict[str, Any]:
    """Run benchmarks and return their figures.

    Args:
        names: which (default all); "gated_linear_attention" takes all whose names begin with it and "_".

    Raises:
        UserError: for an unknown name.
    """
    known = benchmarks()
    chosen: list[str] = []
    for name in names:
        meant = [one for one in known if one == name or one.startswith(f"{name}_")]
        if not meant:
            raise UserError(f"no benchmark {name!r}; did you mean {' or '.join(nearest(name, known) or known)}?")
        chosen += [one for one in meant if one not in chosen]
    keep_freed_memory()
    limits = machine()
    results = {}
    for name in chosen or known:
        contest = known[name].make()
        times = _median(contest.entries, contest.repeats)
        first = next(iter(times.values()))
        results[name] = {
            "what": known[name].what,
            "note": contest.note,
            "ms": {entry: 1000 * seconds for entry, seconds in times.items()},
            "ratio": {entry: seconds / first for entry, seconds in times.items()},
            "share_of_matrix_rate": contest.flops / first / 1e9 / limits["matrix_gflops"] if contest.flops else None,
        }
    return {"machine": limits, "benchmarks": results, "environment": environment()}


def show_bench(result: dict[str, Any]) -> None:
    """The figures as a table."""
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    limits = result["machine"]
    console.print(
        f"machine: {limits['matrix_gflops']:.0f} GFLOP/s in float32 matrix products, {limits['copy_gb_per_s']:.1f} GB/s copied"
    )
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for column, side in (
        ("benchmark", "left"),
        ("entry", "left"),
        ("ms", "right"),
        ("ratio", "right"),
        ("of matrix rate", "right"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, one in result["benchmarks"].items():
        for place, (entry, ms) in enumerate(one["ms"].items()):
            share = one["share_of_matrix_rate"]
            table.add_row(
                Text(name if place == 0 else ""),
                Text(entry),
                f"{ms:.3f}",
                f"{one['ratio'][entry]:.2f}",
                f"{share:.0%}" if share and place == 0 else "",
            )
    console.print(table)
    for name, one in result["benchmarks"].items():
        console.print(Text(f"{name}: {one['what']}. {one['note']}"))


def _median(entries: dict[str, Callable[[], Any]], repeats: int = _REPEATS) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in entries}
    for call in entries.values():
        call()
    for _ in range(repeats):
        for name, call in entries.items():
            _synchronise()
            start = time.perf_counter()
            call()
            _synchronise()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training_step(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], None]:
    """Forward, backward (of the mean square of the output) and an AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()

    return step
