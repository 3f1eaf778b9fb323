"""Cards: what each system is, read from ``card.toml`` without importing torch."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from penstock.errors import UserError, nearest

WINGS = (
    "sequence",
    "vision",
    "dense",
    "recommendation",
    "experts",
    "adaptive",
    "continual",
    "signals",
    "multimodal",
    "robustness",
)
#: Ungated models that `penstock compare` takes beside the systems, and the task they are for; see `penstock.lab.plain`.
PLAIN_MODELS = dict.fromkeys(("logistic_regression", "fm", "dnn", "dualmlp", "deepfm", "dcnv2"), "click_prediction")
_SYSTEMS = Path(__file__).parent.parent / "systems"


@dataclass(frozen=True)
class ClaimCard:
    """A claim: what the paper says, what is measured here, and which way it must go."""

    id: str
    says: str
    measures: str
    direction: str


@dataclass(frozen=True)
class GateCard:
    """What is gated, by what, with which activation, at which granularity."""

    what: str
    by: str
    activation: str
    granularity: str


@dataclass(frozen=True)
class Card:
    """One system's card."""

    name: str
    title: str
    arxiv: str
    date: str
    authors: str
    code: str
    license: str
    wing: str
    task: str
    idea: str
    twin: str
    evidence: str
    gate: GateCard
    claims: tuple[ClaimCard, ...]
    variants: dict[str, int] = field(default_factory=dict)
    """Published sizes: the name for `create_model` and the published number of parameters."""
    keywords: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Further tasks it can be run on, with --data of that kind."""
    advice: str = ""
    """When the gate pays and when it does not."""

    @property
    def module(self) -> str:
        """The dotted name of the system's package."""
        return f"penstock.systems.{self.wing}.{self.name}"

    @property
    def ready(self) -> bool:
        """Whether the system can be run (it has its model and its experiment)."""
        folder = _SYSTEMS / self.wing / self.name
        return all((folder / f"{part}.py").is_file() for part in ("model", "experiment"))

    def text(self) -> str:
        """Everything a search looks at."""
        claims = " ".join(f"{c.says} {c.measures}" for c in self.claims)
        gate = f"{self.gate.what} {self.gate.by} {self.gate.activation} {self.gate.granularity}"
        names = f"{self.name.replace('_', ' ')} {self.title} {' '.join(self.keywords)} {self.wing} {self.task.replace('_', ' ')}"
        return f"{names} {names} {self.idea} {gate} {self.twin} {claims} {self.advice}"


def read_card(path: Path) -> Card:
    """Read one ``card.toml``.

    Raises:
        ValueError: if a field is missing or unknown, naming the file.
    """
    raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        return Card(
            name=path.parent.name,
            wing=path.parent.parent.name,
            gate=GateCard(**raw.pop("gate")),
            claims=tuple(ClaimCard(**claim) for claim in raw.pop("claims")),
            variants=raw.pop("variants", {}),
            keywords=tuple(raw.pop("keywords", ())),
            also=tuple(raw.pop("also", ())),
            **raw,
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None


@cache
def all_cards() -> dict[str, Card]:
    """Every card by name, in the order of the wings."""
    cards = [read_card(path) for wing in WINGS for path in sorted(_SYSTEMS.glob(f"{wing}/*/card.toml"))]
    return {card.name: card for card in cards}


def card(name: str) -> Card:
    """The card of one system.

    Raises:
        UserError: if there is no such system, with the nearest names.
    """
    cards = all_cards()
    if name not in cards:
        close = nearest(name, cards) or [hit.name for hit, _ in search(name.replace("_", " "))[:3]]
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(cards)}"
        raise UserError(f"no system is called {name!r}; {hint}")
    return cards[name]


def last_measured(name: str) -> dict[str, Any] | None:
    """The results of the claims run stored with the system (``results.json`` in its folder), if there are any."""
    path = _SYSTEMS / all_cards()[name].wing / name / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def search(query: str) -> list[tuple[Card, float]]:
    """Cards ranked by TF-IDF cosine with the query, best first; only those that share a term."""
    cards = list(all_cards().values())
    documents = [Counter(_terms(c.text())) for c in cards]
    present = Counter(term for document in documents for term in document)
    weight = {term: math.log((1 + len(cards)) / (1 + n)) + 1 for term, n in present.items()}

    def vector(counts: Counter[str]) -> dict[str, float]:
        raw = {t: (1 + math.log(n)) * weight[t] for t, n in counts.items() if t in weight}
        norm = math.sqrt(sum(v * v for v in raw.values())) or 1.0
        return {t: v / norm for t, v in raw.items()}

    asked = vector(Counter(_terms(query)))
    scored = [
        (c, sum(asked.get(t, 0.0) * v for t, v in vector(d).items())) for c, d in zip(cards, documents, strict=True)
    ]
    return sorted((hit for hit in scored if hit[1] > 0), key=lambda hit: (-hit[1], hit[0].name))


def _terms(text: str) -> list[str]:
    """Lower-case words without plural and other common endings."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [re.sub(r"(ations|ation|ing|ers|er|ed|es|s)$", "", w) if len(w) > 5 else w for w in words if len(w) > 1]
