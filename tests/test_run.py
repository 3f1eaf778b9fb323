"""A run loses nothing: killed runs resume to the same numbers, folders have one owner, files are whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cli import main
from penstock.errors import UserError
from penstock.lab.cost import flops
from penstock.lab.store import RunFolder, load, open_run, write_atomically

TINY = [
    "--quick", "--width", "16", "--depth", "1", "--num-heads", "2", "--num-kv-heads", "2", "--mlp-hidden", "24",
    "--data.window", "16", "--data.max-bytes", "200000", "--train.batch-size", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["run", "gated_attention", *TINY, "--train.steps", "12", "--seeds", "2", "--out", str(out)]) == 0
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_run_folder_holds_what_the_design_says(finished: Path) -> None:
    for name in (
        "config.yaml",
        "results.json",
        "report.html",
        "log.csv",
        "models/gated/model.safetensors",
        "models/gated/config.json",
    ):
        assert (finished / name).is_file(), name
    assert list(finished.glob("checkpoints/*.ckpt"))
    assert not [p for p in finished.rglob(".*") if p.name != ".lock"], "no temporary file is left"
    found = results(finished)
    assert found["system"] == "gated_attention"
    assert found["seeds"] == [0, 1]
    loss = found["arms"]["gated"]["metrics"]["loss"]
    assert len(loss["values"]) == 2
    assert loss["mean"] == pytest.approx(sum(loss["values"]) / 2)
    assert {"parameters", "flops", "latency_ms", "peak_memory_mb", "train_seconds"} <= set(
        found["arms"]["gated"]["cost"]
    )
    assert [gate["name"] for gate in found["arms"]["gated"]["gates"]] == ["layers.0.self_attn.gate"]
    assert {"id", "says", "measured", "interval", "verdict"} <= set(found["claims"][0])


def test_log_has_every_validation(finished: Path) -> None:
    rows = [line.split(",") for line in (finished / "log.csv").read_text().splitlines()]
    steps = {int(row[3]) for row in rows[1:] if row[0] == "gated" and row[1] == "1" and row[4] == "val/loss"}
    assert max(steps) >= 10
    assert len(steps) >= 10


def test_saved_model_gives_the_tested_loss(finished: Path) -> None:
    run = open_run(finished)
    model = load(finished)
    data = run.system.load_data(run.config, run.source)
    task = run.system.task(model, run.config.train, data)
    total = count = 0.0
    with torch.no_grad():
        for batch in data.test(8):
            total += float(task.step(batch)[0]) * len(batch)
            count += len(batch)
    assert total / count == pytest.approx(results(finished)["arms"]["gated"]["metrics"]["loss"]["values"][0], abs=1e-5)


def test_same_seed_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert main(["run", "gated_attention", *TINY, "--train.steps", "12", "--arms", "gated", "--out", str(out)]) == 0
    first = results(finished)["arms"]["gated"]["metrics"]["loss"]["values"][0]
    assert results(out)["arms"]["gated"]["metrics"]["loss"]["values"] == [first]


def test_killed_run_resumes_to_the_same_metrics(tmp_path: Path) -> None:
    flags = [*TINY, "--arms", "gated", "--train.steps", "400", "--train.validate-every", "200"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["run", "gated_attention", *flags, "--out", str(whole)]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "run", "gated_attention", *flags, "--out", str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    checkpoint = killed / "checkpoints" / "gated.seed0.train.ckpt"
    deadline = time.monotonic() + 120
    first = None
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if checkpoint.exists():
            written = checkpoint.stat().st_mtime_ns
            first = first or written
            if written != first:  # past the first checkpoint, in the middle of an epoch
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists(), "the run was killed before its end"
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 1 < step < 400
    assert main(["run", "gated_attention", "--resume", str(killed)]) == 0
    assert results(killed)["arms"]["gated"]["metrics"] == results(whole)["arms"]["gated"]["metrics"]


def test_two_processes_never_write_one_folder(tmp_path: Path) -> None:
    folder = RunFolder.create("x", tmp_path / "run")
    write_atomically(folder.path / "config.yaml", "format: 1\nsystem: gated_attention\nversion: 0.1.0\n")
    with pytest.raises(UserError, match="another process"):
        RunFolder.open(folder.path, write=True)
    folder.release()
    RunFolder.open(folder.path, write=True).release()


def test_automatic_folders_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.create("x", None) for _ in range(3)]
    assert len({f.path for f in folders}) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_diverging_arm_stops_and_names_step_rate_and_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = [
        *TINY,
        "--arms",
        "gated",
        "--train.steps",
        "30",
        "--train.clip-norm",
        "0",
        "--train.optimizer",
        "sgd",
        "--train.lr",
        "1e30",
    ]
    assert main(["run", "gated_attention", *flags, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "at step" in said
    assert "learning rate" in said
    assert "checkpoint" in said
    assert "failed" in results(out)["arms"]["gated"]


def test_run_of_another_version_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.yaml").write_text((finished / "config.yaml").read_text().replace("version: 0.", "version: 9."))
    assert main(["predict", str(old), "--data", "x.txt"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "9." in said


def test_predict_ablate_export(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_text("def f(x):\n    return x\n" * 20)
    output = tmp_path / "scores.csv"
    assert main(["predict", str(finished), "--data", str(text), "--output", str(output)]) == 0
    assert output.read_text().startswith("document,tokens,loss")
    capsys.readouterr()
    assert main(["ablate", str(finished), "--batches", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["forced"] for row in rows} == {"-", "open", "mean", "shuffle"}
    for form in ("onnx", "pt2"):
        assert main(["export", str(finished), "--format", form, "--json"]) == 0
        exported = json.loads(capsys.readouterr().out)
        assert exported["difference"] < 1e-4
        assert Path(exported["file"]).stat().st_size == exported["bytes"]


def test_json_is_one_document_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "run", "gated_attention", *TINY, "--train.steps", "4", "--arms", "gated", "--json",
         "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["system"] == "gated_attention"
    for banner in ("Lightning", "Tip", "GPU available", "warn", "USDT"):
        assert banner not in done.stderr


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    flags = [*TINY, "--arms", "gated", "ungated", "--train.steps", "20", "--accelerator", "cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["run", "gated_attention", *flags, "--out", str(one)]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "run", "gated_attention", *flags, "--devices", "2", "--strategy", "ddp", "--out", str(two)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for arm in ("gated", "ungated"):
        alone, together = (results(f)["arms"][arm]["metrics"]["loss"]["mean"] for f in (one, two))
        assert together == pytest.approx(alone, abs=1e-4)


def test_ctrl_c_keeps_the_run_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    flags = [*TINY, "--arms", "gated", "--data", str(text), "--train.steps", "3000", "--train.validate-every", "3000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "run", "gated_attention", *flags, "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # Where the tests run in the background of a shell, Ctrl-C is ignored and would be by this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(out.glob("checkpoints/*.ckpt")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    assert not (out / ".lock").exists()
    text.write_text("something else\n" * 800)
    assert main(["run", "gated_attention", "--resume", str(out)]) == 2
    assert "not what it was" in capsys.readouterr().err


def test_fused_attention_on_the_cpu_is_counted() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    inputs = (torch.randn(3, 2, 64, 8), torch.randn(3, 2, 32, 8))
    assert flops(Attention(), inputs) == 2 * 3 * 2 * 64 * 32 * (8 + 8)
