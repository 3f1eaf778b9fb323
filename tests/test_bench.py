"""Benchmarks: chosen by name or by the beginning of it, each timed against its peers on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from penstock.data.schema import TableBatch
from penstock.errors import UserError
from penstock.lab import bench as module
from penstock.lab import tablebench
from penstock.lab.bench import Benchmark, Contest, bench, benchmarks
from penstock.lab.peer import Peer


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three benchmarks that take no time, and which entries ran."""
    ran: list[str] = []

    def one(name: str) -> Benchmark:
        return Benchmark(name, lambda: Contest({"ours": lambda: ran.append(name), "theirs": lambda: None}, flops=1.0))

    found = {name: one(name) for name in ("fast_1", "fast_2", "fastest")}
    monkeypatch.setattr(module, "benchmarks", lambda: found)
    return ran


def names_of(result: dict[str, Any]) -> list[str]:
    return list(result["benchmarks"])


def test_a_name_or_its_beginning_chooses(few: list[str]) -> None:
    assert names_of(bench(["fast"])) == ["fast_1", "fast_2"]
    assert set(few) == {"fast_1", "fast_2"}
    assert names_of(bench(["fastest", "fast_2", "fast"])) == ["fastest", "fast_2", "fast_1"]
    assert names_of(bench()) == ["fast_1", "fast_2", "fastest"]
    with pytest.raises(UserError, match="no benchmark 'fasst'; did you mean"):
        bench(["fasst"])


def test_ratios_are_to_the_first_entry(few: list[str]) -> None:
    one = bench(["fastest"])["benchmarks"]["fastest"]
    assert one["ratio"]["ours"] == 1.0
    assert one["ratio"]["theirs"] == pytest.approx(one["ms"]["theirs"] / one["ms"]["ours"])
    assert one["share_of_matrix_rate"] > 0


def test_the_kernels_and_the_tables_are_among_them() -> None:
    kernels = {"gated_linear_attention_4096", "block_sparse_attention", "pyramid_attention"}
    assert kernels | {"table_stream"} <= set(benchmarks())


def test_tables_on_disk_and_in_memory_are_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tablebench, "_ROWS", 2_000)
    monkeypatch.setattr(tablebench, "_BATCH", 300)
    seen: dict[str, list[int]] = {}

    def counting(num_ids: int, num_fields: int) -> Callable[[TableBatch], None]:
        return lambda batch: seen[entry].append(len(batch.label))

    monkeypatch.setattr(tablebench, "_step", counting)
    for entry, call in tablebench.stream().entries.items():
        seen[entry] = []
        call()
    disk, *others = seen.values()
    assert len(disk) == 6
    assert all(other == disk for other in others)


def test_a_peer_is_called_in_a_process_of_its_own_and_its_end_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    peer = Peer(partial(partial, print, "called", flush=True))
    peer()
    assert capfd.readouterr().out.count("called") == 2, "once when it is made, once when it is called"
    with pytest.raises(RuntimeError, match="the peer's process has ended"):
        Peer(partial(partial, int, "no number"))
    assert "invalid literal" in capfd.readouterr().err
