"""A search judges by validation alone, loses nothing, and refuses what cannot be searched in one line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from penstock.cli import _typed, main
from penstock.data.tables import TableData
from penstock.lab.cards import PLAIN_MODELS, all_cards
from penstock.lab.config import override
from penstock.lab.run import Job
from penstock.lab.space import Around, OneOf, Range, flags, parse_space, plain_space, settings_of, settle
from penstock.lab.store import load, open_run
from penstock.lab.system import system
from penstock.lab.tune import default_space
from penstock.tasks.click_prediction import ClickPrediction

DATA = ["--data.train-rows", "300", "--data.validation-rows", "200", "--data.test-rows", "200"]
FM = ["tune", "fm", *DATA, "--train.epochs", "2", "--json"]
TUNABLE = [*(name for name, card in all_cards().items() if card.ready), *PLAIN_MODELS]

Tuned = Callable[..., dict[str, Any]]


@pytest.fixture
def tuned(capsys: pytest.CaptureFixture[str]) -> Tuned:
    def search(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert main(arguments) == code
        return json.loads(capsys.readouterr().out)

    return search


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")


def written(path: Path, space: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(space))
    return str(path)


# -- from first trial to best run --------------------------------------------------------------------------------


def test_a_search_reads_the_test_split_only_for_the_best(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    validated, test, init = Job.validated, TableData.test, TableData.__init__
    monkeypatch.setattr(Job, "validated", lambda *a, **k: (order.append("trial"), validated(*a, **k))[1])
    monkeypatch.setattr(TableData, "test", lambda *a: (order.append("test"), test(*a))[1])
    monkeypatch.setattr(TableData, "__init__", lambda *a, **k: (order.append("read"), init(*a, **k))[1])
    out = tmp_path / "search"
    found = tuned(*FM, "--trials", "4", "--out", str(out))
    assert order[:5] == ["read", *["trial"] * 4], "data is read once and tested on after the last trial"
    assert set(order[5:]) == {"test"}
    assert found == json.loads((out / "tune.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 4
    assert found["metric"] == "auc"
    assert found["best"]["value"] == max(trial["value"] for trial in found["trials"])
    assert sum(found["importances"].values()) == pytest.approx(1)

    first = found["trials"][0]["settings"]
    default = system("fm").Config()
    assert (first["train.lr"], first["dim"]) == (default.train.lr, default.dim), "what is there is tried first"

    run = open_run(out / "best")
    assert run.config.train.lr == found["best"]["settings"]["train.lr"]
    load(out / "best")
    assert (out / "best" / "report.html").is_file()
    assert main(["predict", str(out / "best"), "--data", "nowhere.csv"]) == 2
    tested = json.loads((out / "best" / "results.json").read_text())["arms"]["gated"]["metrics"]
    assert found["test"]["gated"] == tested

    page = (out / "tune.html").read_text()
    for text in ("Importance of each setting", "Validation score of each trial", "penstock run fm", "tested once"):
        assert text in page


def test_the_shown_command_trains_the_same(tuned: Tuned, tmp_path: Path) -> None:
    found = tuned(*FM, "--trials", "2", "--out", str(tmp_path / "search"))
    arguments = shlex.split(found["best"]["command"])[1:]
    assert main([*arguments, "--out", str(tmp_path / "again")]) == 0
    again, best = open_run(tmp_path / "again"), open_run(tmp_path / "search" / "best")
    assert again.config == best.config
    auc = json.loads((tmp_path / "again" / "results.json").read_text())["arms"]["gated"]["metrics"]["auc"]
    assert auc == found["test"]["gated"]["auc"]


def test_what_is_given_as_a_flag_is_not_searched(tuned: Tuned, tmp_path: Path) -> None:
    default = system("fm").Config()
    given = ["--dim", str(default.dim), "--train.lr=0.01"]
    found = tuned(*FM, *given, "--trials", "1", "--search-only", "--out", str(tmp_path / "search"))
    assert set(found["space"]) == {"train.weight_decay", "train.batch_size"}
    assert "--train.lr 0.01" in found["best"]["command"]
    assert found["test"] is None
    assert not (tmp_path / "search" / "best").exists()
    assert "The test split has not been read" in (tmp_path / "search" / "tune.html").read_text()


# -- going on ----------------------------------------------------------------------------------------------------


def test_a_search_goes_on_in_its_folder(tuned: Tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "search")
    first = tuned(*FM, "--trials", "2", "--out", out)
    second = tuned("tune", "fm", "--resume", out, "--trials", "3", "--json")
    assert second["trials"][:2] == first["trials"]
    assert len(second["trials"]) == 3
    assert second["space"] == first["space"]
    third = tuned(*FM, "--trials", "4", "--out", out)
    assert third["trials"][:3] == second["trials"]
    assert len({json.dumps(trial["settings"]) for trial in third["trials"]}) == 4, "nothing is drawn twice"
    assert tuned("tune", "fm", "--resume", out, "--search-only", "--json")["trials"] == third["trials"]
    assert main([*FM, "--dim", "5", "--out", out]) == 2
    assert "holds a search with other configuration" in capsys.readouterr().err
    assert main(["tune", "dnn", "--resume", out]) == 2
    assert "is a search of fm, not of dnn" in capsys.readouterr().err


def test_a_trial_that_was_lost_is_tried_again(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "search"
    tuned(*FM, "--trials", "1", "--search-only", "--out", str(out))
    study = study_of(out)
    lost = study.ask()
    drawn = {
        "train.lr": lost.suggest_float("train.lr", 0.0003, 0.03, log=True),
        "dim": lost.suggest_int("dim", 4, 16, log=True),
    }
    found = tuned("tune", "fm", "--resume", str(out), "--trials", "3", "--search-only", "--json")
    assert study.get_trials()[lost.number].state == optuna.trial.TrialState.FAIL
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3
    (again,) = (trial for trial in study.get_trials() if trial.system_attrs.get("retry_history") == [lost.number])
    assert {name: again.params[name] for name in drawn} == drawn


def test_ctrl_c_keeps_what_was_found(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, validated, calls = tmp_path / "search", Job.validated, iter(range(10))

    def interrupted(*arguments: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return validated(*arguments)

    monkeypatch.setattr(Job, "validated", interrupted)
    assert main([*FM, "--trials", "3", "--out", str(out)]) == 130
    assert len(json.loads((out / "tune.json").read_text())["trials"]) == 1
    stopped = study_of(out).get_trials()[1].params
    found = tuned("tune", "fm", "--resume", str(out), "--trials", "2", "--search-only", "--json")
    assert found["trials"][1]["settings"]["dim"] == stopped["dim"]


def test_processes_share_a_study(tuned: Tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--study", "ours", "--search-only"]
    command = [sys.executable, "-m", "penstock", *FM, *shared, "--trials", "2", "--out", str(tmp_path / "a")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )
    first = json.loads(done.stdout)
    second = tuned(*FM, *shared, "--trials", "3", "--out", str(tmp_path / "b"))
    assert second["trials"][:2] == first["trials"]
    assert len(second["trials"]) == 3
    assert main([*FM, *shared, "--dim", "5", "--out", str(tmp_path / "c")]) == 2
    assert "the study 'ours' is a search with other space" in capsys.readouterr().err


# -- trials that end otherwise -----------------------------------------------------------------------------------


def test_a_pruned_trial_stops_training(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = ClickPrediction.training_step
    monkeypatch.setattr(ClickPrediction, "training_step", lambda *a: (steps.append(1), step(*a))[1])
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda *a: True)
    flags = [*FM[:-3], "--train.epochs", "9", "--train.batch-size", "100", "--json"]
    found = tuned(*flags, "--trials", "1", "--out", str(tmp_path / "search"), code=1)
    assert len(steps) == 3, "one epoch of nine"
    (trial,) = found["trials"]
    assert (trial["state"], trial["validations"]) == ("pruned", 1)
    assert trial["value"] is not None
    assert found["best"] is None
    assert "No trial was completed" in (tmp_path / "search" / "tune.html").read_text()


def test_validations_are_counted_over_stages(tuned: Tuned, tmp_path: Path) -> None:
    stages = ["--search.epochs", "2", "--train.epochs", "3", "--train.patience", "0", "--search-only"]
    tuned("tune", "optfs", *DATA, *stages, "--trials", "1", "--json", "--out", str(tmp_path / "search"))
    (trial,) = study_of(tmp_path / "search").get_trials()
    assert list(trial.intermediate_values) == [1, 2, 3, 4, 5]
    assert trial.value == pytest.approx(trial.intermediate_values[5]), "the last stage counts"


def test_settings_that_cannot_be_trained_fail_alone(tuned: Tuned, tmp_path: Path) -> None:
    space = written(tmp_path / "space.yaml", {"num_heads": [4, 5], "train.lr": [3e-3, 1e30]})
    command = ["tune", "finalmlp", *DATA, "--train.epochs", "1", "--search", space, "--search-only", "--json"]
    found = tuned(*command, "--trials", "8", "--out", str(tmp_path / "search"))
    reasons = {tuple(t["settings"].values()): t["reason"] for t in found["trials"] if t["state"] == "failed"}
    assert all("num_heads=5" in why for (heads, _), why in reasons.items() if heads == 5)
    assert any("the loss is" in why for (heads, lr), why in reasons.items() if (heads, lr) == (4, 1e30))
    assert found["best"]["settings"] == {"num_heads": 4, "train.lr": 3e-3}


def test_a_search_without_a_completed_trial_says_so(tuned: Tuned, tmp_path: Path) -> None:
    space = written(tmp_path / "space.yaml", {"num_heads": [5, 7]})
    command = ["tune", "finalmlp", *DATA, "--num-heads", "4", "--search", space, "--json", "--out", str(tmp_path / "x")]
    assert main(command) == 2, "searched and given"
    command.remove("--num-heads")
    command.remove("4")
    assert tuned(*command, "--trials", "1", code=1)["best"] is None


# -- what may be searched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("dimm: [8, 16]", "no setting 'dimm'; did you mean dim"),
        ("train.lrr: {low: 1, high: 2}", "did you mean train.lr"),
        ("data.seed: [1, 2]", "all trials share the data"),
        ("dim: 8", "dim: give a list of values, or a range as {low"),
        ("dim: {low: 8, hihg: 16}", "give a list of values, or a range"),
        ("dim: [8, big]", "dim: 'big' is not of its type (int)"),
        ("dim: [8]", "two values or more"),
        ("dim: {low: 16, high: 8}", "low must be below high"),
        ("dim: {low: 1.5, high: 8}", "must be whole numbers"),
        ("train.lr: {low: 0, high: 1, log: true}", "above 0"),
        ("train.lr: {low: 1e-4, high: 1, log: 2}", "log is 2; it must be true or false"),
        ("train.optimizer: [adam, lion]", "'lion' is not of its type (adamw or adam or sgd)"),
        ("batch_norm: {low: 0, high: 1}", "is no number; give a list"),
        ("- dim", "must map settings to what to try"),
        ("dim: [", "is no YAML"),
    ],
)
def test_a_bad_space_is_one_line(space: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "space.yaml").write_text(space)
    assert main(["tune", "dnn", "--search", str(tmp_path / "space.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--search", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--study", "x"], "--storage and --study go together"),
        (["--devices", "2"], "give --devices 1"),
        (["--resume", "nowhere"], "is not a run folder (it has no tune.yaml)"),
        (["--storage", "nonsense", "--study", "x"], "Could not parse"),
        (["--arms", "closed"], "there is no such arm"),
    ],
)
def test_impossible_searches_are_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "fm", *DATA, *arguments, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_space_file_may_hold_every_kind_of_value() -> None:
    config = system("autoint").Config()
    given = {
        "train.lr": {"low": "1e-4", "high": "1e-2", "log": True},
        "attention_dims": [[16], [16, 8]],
        "layer_norm": [True, False],
        "embedding_std": [None, "1e-2"],
        "embedding_regularizer": [0.1, "l1(1e-5)"],
        "dialect": ["paper", "tf"],
        "num_heads": {"low": 1, "high": 4},
    }
    assert parse_space(given, config, (), where="file") == {
        "train.lr": Range(1e-4, 1e-2, log=True),
        "attention_dims": OneOf(((16,), (16, 8))),
        "layer_norm": OneOf((True, False)),
        "embedding_std": OneOf((None, 0.01)),
        "embedding_regularizer": OneOf((0.1, "l1(1e-5)")),
        "dialect": OneOf(("paper", "tf")),
        "num_heads": Range(1, 4, whole=True),
    }


def test_around_is_by_a_factor_down_and_up() -> None:
    config = override(system("optfs").Config(), {"penalty": None, "mlp_dims": (8, 4)})
    space = settle({"dim": Around(2), "penalty": Around(10, start=0.1), "mlp_dims": Around(2)}, config)
    assert space["dim"] == Range(4, 16, log=True, whole=True)
    assert space["penalty"] == Range(0.01, 1.0, log=True)
    assert isinstance(space["mlp_dims"], OneOf)
    assert space["mlp_dims"].values[:5] == ((8, 4), (8,), (8, 4, 4), (4, 2), (4,))
    assert settle({"mlp_dims": Around(2)}, override(config, {"mlp_dims": ()})) == {}, "nothing to choose from"


@pytest.mark.parametrize("name", TUNABLE)
def test_every_system_has_a_space_that_its_flags_can_say(name: str) -> None:
    found = system(name)
    for base in (found.Config(), *found.presets.values()):
        space = settle(default_space(found, base), base)
        assert {"train.lr", "train.weight_decay"} <= set(space)
        assert parse_space(plain_space(space), base, found.shared, where="") == space, "it can be written and read"
    config = found.Config()
    other = {
        name: choice.values[-1] if isinstance(choice, OneOf) else choice.high
        for name, choice in settle(default_space(found, config), config).items()
    }
    _, parsed = _typed(f"run {name}", name, flags(other))
    assert {name: value for name, (_, value) in settings_of(parsed).items() if name in other} == other
