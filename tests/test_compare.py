"""One leaderboard: the same data and budget for all, and only for systems that can share them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.lab import cards
from penstock.lab.compare import resized
from penstock.lab.system import system
from tests.test_run import TINY


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> str:
    """Another system of the same task, as later issues will bring them."""
    first = cards.card("gated_attention")
    known = cards.all_cards() | {"other": dataclasses.replace(first, name="other")}
    monkeypatch.setattr(cards, "all_cards", lambda: known)
    monkeypatch.setattr(cards.Card, "ready", True)
    kind = type(system("gated_attention"))
    monkeypatch.setitem(system.loaded, "other", type("Other", (kind,), {"name": "other"})())
    return "other"


def test_leaderboard_ranks_by_the_tasks_first_metric(
    second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "board"
    flags = [*TINY, "--train.steps", "6", "--json", "--out", str(out)]
    assert main(["compare", "gated_attention", second, *flags]) == 0
    board = json.loads(capsys.readouterr().out)
    assert board == json.loads((out / "results.json").read_text())
    assert {row["name"] for row in board["rows"]} == {"gated_attention", "gated_attention (ungated)", "other"}
    losses = [row["metrics"]["loss"]["mean"] for row in board["rows"]]
    assert losses == sorted(losses)
    assert board["budget"]["steps"] == 6
    assert main(["ablate", str(out / "gated_attention"), "--batches", "1", "--json"]) == 0, (
        "each part is a run of its own"
    )


def test_sizes_are_matched_and_speed_is_given_by_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--train.steps", "2", "--json", "--out", str(tmp_path / "board")]
    assert main(["compare", "gated_attention", "gla", "gam", *flags]) == 0
    board = json.loads(capsys.readouterr().out)
    assert board["task"] == "language_modelling"
    sizes = {row["name"]: row["cost"]["parameters"] for row in board["rows"]}
    assert len(sizes) == 4
    assert max(sizes.values()) / min(sizes.values()) < 1.03
    for row in board["rows"]:
        assert set(row["speed"]) == {f"tokens_per_s_at_{length}" for length in (256, 1024, 4096)}
        assert min(row["speed"].values()) > 0


def test_a_size_that_cannot_be_met_is_as_near_as_it_gets() -> None:
    gla = system("gla")
    config = gla.Config()
    spec = {"vocab_size": 256, "window": 64}
    assert resized(gla, config, spec, 1).mlp_hidden == 1
    assert resized(gla, config, spec, 10**6).mlp_hidden > config.mlp_hidden
    optfs = system("optfs")
    assert resized(optfs, optfs.Config(), {}, 10**6) == optfs.Config(), "no size_field, nothing changed"


def test_systems_of_different_tasks_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "board"
    assert main(["compare", "gated_attention", "convit", "--out", str(out)]) == 2
    assert "convit is image_classification" in capsys.readouterr().err
    assert main(["compare", "gated_attention", "gated_attention", "--out", str(out)]) == 2
    assert main(["compare", "gated_attention"]) == 2
    assert not out.exists()
