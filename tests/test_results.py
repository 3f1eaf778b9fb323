"""Verdicts from the seeds' spread."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from penstock.lab.results import Effect, Judgement, Results, loss_spikes


def cell(arm: str, seed: int, **metrics: float) -> dict[str, object]:
    return {"arm": arm, "seed": seed, "metrics": metrics, "cost": {}, "gates": {}}


def test_interval_is_students_t() -> None:
    values = [0.1, 0.3, 0.2, 0.25]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert Effect(values, ">").interval == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("values", "must_be", "threshold", "verdict"),
    [
        ([1.0, 1.1, 0.9], ">", 0.0, "holds"),
        ([1.0, 1.1, 0.9], "<", 0.0, "does not hold"),
        ([-1.0, -1.1, -0.9], "<", 0.0, "holds"),
        ([1.0, -1.0, 0.5], ">", 0.0, "undecided"),
        ([1.0], ">", 0.0, "undecided"),
        ([], ">", 0.0, "undecided"),
        ([math.nan, 1.0], ">", 0.0, "undecided"),
        ([0.7, 0.71, 0.69], "<", 0.6, "does not hold"),
        ([0.5, 0.51, 0.49], "<", 0.6, "holds"),
    ],
)
def test_verdicts(values: list[float], must_be: str, threshold: float, verdict: str) -> None:
    assert Effect(values, must_be, threshold).verdict == verdict  # type: ignore[arg-type]


def test_exact_effect_needs_one_value() -> None:
    assert Effect([1e-16], "<", 1e-9, exact=True).verdict == "holds"
    assert Effect([1e-16, 1.0], "<", 1e-9, exact=True).verdict == "undecided"


def test_all_parts_must_hold() -> None:
    good, bad, open_ = Effect([1, 1.1, 1.2], ">"), Effect([-1, -1.1, -1.2], ">"), Effect([1], ">")
    assert Judgement("c", "", [good, good]).verdict == "holds"
    assert Judgement("c", "", [good, bad]).verdict == "does not hold"
    assert Judgement("c", "", [good, open_]).verdict == "undecided"
    assert Judgement("c", "", []).verdict == "undecided"


def test_differences_are_paired_by_seed_and_skip_failed_arms() -> None:
    results = Results([cell("gated", 0, loss=1.0), cell("ungated", 0, loss=1.5), cell("gated", 1, loss=2.0)], {})
    assert results.difference("gated", "ungated", "loss") == [-0.5]
    assert results.metric("gated", "loss") == [1.0, 2.0]
    assert results.metric("absent", "loss") == []
    assert results.trial("absent", "x") == []


def test_loss_spikes_count_what_stands_out() -> None:
    falling = [3.0 - 0.01 * step + 0.01 * (step % 3) for step in range(200)]
    assert loss_spikes(falling) == 0
    falling[120] += 2.0
    falling[160] += 2.0
    assert loss_spikes(falling) == 2
    assert loss_spikes(falling[:30]) == 0
