"""The results of a run, and what a claim measures on them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "does not hold", "undecided"]


def loss_spikes(losses: Sequence[float], *, window: int = 50, k: float = 6.0) -> int:
    """How many training losses stand out above the ones before them: a measure of how stable training was.

    A loss counts when it exceeds the median of the ``window`` losses before it by more than ``k`` times their median
    absolute deviation. The first ``window`` losses, where training falls steeply, do not count.
    """
    count = 0
    for place in range(window, len(losses)):
        before = losses[place - window : place]
        middle = statistics.median(before)
        spread = statistics.median(abs(value - middle) for value in before)
        count += losses[place] > middle + k * max(spread, 1e-12)
    return count


class Results:
    """Per-seed numbers of a run.

    Args:
        cells: one a trained (arm, seed): ``{"arm", "seed", "metrics": {...}, "cost": {...}, "gates": {...}}``.
        trials: the side experiments: ``{name: [{measure: value}, ...]}``, one entry a seed.
    """

    def __init__(self, cells: list[dict[str, Any]], trials: dict[str, list[dict[str, float]]]) -> None:
        self.cells = cells
        self.trials = trials

    def metric(self, arm: str, name: str) -> list[float]:
        """A metric of an arm's test, one value a seed; empty where the arm was not trained or does not have it."""
        return list(self._by_seed(arm, name).values())

    def difference(self, a: str, b: str, name: str) -> list[float]:
        """Arm ``a`` minus arm ``b``, paired by seed."""
        first, second = self._by_seed(a, name), self._by_seed(b, name)
        return [value - second[seed] for seed, value in first.items() if seed in second]

    def trial(self, name: str, measure: str) -> list[float]:
        """A measure of a side experiment, one value a seed."""
        return [result[measure] for result in self.trials.get(name, [])]

    def _by_seed(self, arm: str, name: str) -> dict[int, float]:
        return {c["seed"]: c["metrics"][name] for c in self.cells if c["arm"] == arm and name in c["metrics"]}


@dataclass(frozen=True)
class Effect:
    """What a claim comes down to: a number a seed, and the side of a threshold it must be on.

    Attributes:
        values: one a seed (for a comparison of arms: paired differences).
        must_be: ">" or "<".
        threshold: in the unit of the values.
        what: what the values are, for the table ("loss, gated - ungated").
        exact: the values have no sampling error (an identity), so that one is enough.
    """

    values: list[float]
    must_be: Literal[">", "<"]
    threshold: float = 0.0
    what: str = ""
    exact: bool = False

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval of the mean over seeds, by Student's t; ``None`` from one seed or without numbers."""
        n = len(self.values)
        if not n or not all(map(math.isfinite, self.values)):
            return None
        if self.exact:
            return min(self.values), max(self.values)
        if n == 1:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> Verdict:
        """Holds if the whole interval is on the right side of the threshold, does not if none of it is."""
        interval = self.interval
        if interval is None:
            return "undecided"
        low, high = interval
        if self.must_be == "<":
            low, high = -high, -low
        threshold = self.threshold if self.must_be == ">" else -self.threshold
        if low > threshold:
            return "holds"
        return "does not hold" if high <= threshold else "undecided"


@dataclass(frozen=True)
class Judgement:
    """A claim and what came out; with several effects all must hold."""

    id: str
    says: str
    effects: list[Effect] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        verdicts = {effect.verdict for effect in self.effects}
        if "does not hold" in verdicts:
            return "does not hold"
        return "undecided" if "undecided" in verdicts or not verdicts else "holds"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``results.json``; ``measured`` and ``interval`` are those of the first effect."""
        parts = [
            {
                "what": e.what,
                "values": e.values,
                "measured": e.mean,
                "interval": list(e.interval) if e.interval else None,
                "must_be": f"{e.must_be} {e.threshold:g}",
                "verdict": e.verdict,
            }
            for e in self.effects
        ]
        first = parts[0] if parts else {"measured": None, "interval": None}
        head = {"id": self.id, "says": self.says, "measured": first["measured"], "interval": first["interval"]}
        return head | {"verdict": self.verdict, "parts": parts}
