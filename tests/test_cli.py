"""The commands as a person types them: help, one clear line for mistakes, nothing written then."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from penstock.cli import COMMANDS, main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_unknown_words_get_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run" in refused(capsys, "rum")
    assert "gated_attention" in refused(capsys, "show", "gated_atention")
    assert "gated_attention" in refused(capsys, "run", "gated_atention")
    assert "sequence" in refused(capsys, "list", "--wing", "sequnce")
    assert "watch" in refused(capsys, "bench", "wacth")


def test_list_and_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"name", "title", "wing", "task", "ready", "arxiv"} == set(listed[0])
    assert main(["show", "gated_attention", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gate"]["activation"] == "sigmoid"
    assert main(["search", "attention", "sink", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "gated_attention"


def test_every_setting_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "gated_attention", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--data",
        "--seeds",
        "--quick",
        "--resume",
        "--width",
        "--data.window",
        "--train.lr",
        "--strategy",
        "--precision",
    ):
        assert flag in text
    assert "Peak learning rate" in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-heads", "3"], "must divide"),
        (["--num-kv-heads", "3"], "must divide num_heads=4"),
        (["--seeds", "0"], "--seeds 0"),
        (["--arms", "nothing"], "no such arm"),
        (["--data", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--data.window", "1"], "--data.window 1"),
        (["--train.batch-size", "0"], "batch_size=0"),
        (["--train.steps", "0"], "both 0"),
    ],
)
def test_impossible_runs_write_nothing(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert says in refused(capsys, "run", "gated_attention", *flags, "--data.max-bytes", "200000", "--out", str(out))
    assert not out.exists()


def test_folders_that_are_no_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["predict", str(tmp_path), "--data", "x"], ["ablate", str(tmp_path)], ["export", str(tmp_path)], ["report", str(tmp_path)],
                    ["run", "gated_attention", "--resume", str(tmp_path)]):  # fmt: skip
        assert "not a run folder" in refused(capsys, *command)
    (tmp_path / "something").write_text("x")
    assert "not empty" in refused(
        capsys, "run", "gated_attention", "--data.max-bytes", "200000", "--out", str(tmp_path)
    )


def test_unknown_flag_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "gated_attention", "--widht", "3"])
    assert caught.value.code == 2


def test_a_table_is_shown_as_it_was_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "\n".join(f"{'xyz'[i % 3]},{i * 0.37:.2f},{'yes' if (i * 7) % 5 > 2 else 'no'}" for i in range(300))
    table, out = tmp_path / "<b>t.csv", tmp_path / "run"
    table.write_text(f"<script>,amount,bought\n{rows}\n")
    flags = ["--label", "bought", "--quick", "--arms", "ungated", "--train.epochs", "1", "--data", str(table)]
    assert main(["run", "optfs", *flags, "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "<script>" in said
    assert "categorical" in said
    assert "'no' became 0 and 'yes' became 1" in said
    assert "<script>" not in (out / "report.html").read_text()
    scores = tmp_path / "scores.csv"
    assert main(["predict", str(out), "--data", str(table), "--output", str(scores)]) == 0
    assert len(scores.read_text().splitlines()) == 301


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/last.ckpt")

    monkeypatch.setitem(COMMANDS, "run", full)
    assert main(["run", "optfs"]) == 2
    assert capsys.readouterr().err == (
        "penstock: runs/x/last.ckpt: the disk is full; make room, and go on with --resume RUN\n"
    )
