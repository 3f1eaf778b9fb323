"""The README tells the truth: its code runs, its commands exist, its figures are the stored ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import penstock
from penstock.cli import COMMANDS
from penstock.lab.cards import all_cards
from tools import docs

README = (Path(__file__).parent.parent / "README.md").read_text()
MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    (code,) = [block for block in blocks("python") if "penstock.watch(" in block]
    exec(code, names)
    printed = capsys.readouterr().out
    assert "from_input" in printed
    assert "shuffle" in printed
    assert not torch.equal(names["y"], names["y_open"])  # type: ignore[arg-type]


def test_the_estimator_is_used_as_shown() -> None:
    draw = np.random.default_rng(0)
    frame = pl.DataFrame({"city": draw.choice(["Oslo", "Rome"], 200), "price": draw.normal(size=200)})
    (code,) = [block for block in blocks("python") if "ClickClassifier" in block]
    names: dict[str, object] = {"frame": frame, "clicks": draw.integers(0, 2, 200)}
    exec(code.replace("epochs=10", "epochs=1"), names)
    assert np.isfinite(names["scores"]).all()  # type: ignore[call-overload]


def test_the_operators_run_as_shown() -> None:
    (code,) = [block for block in blocks("python") if "from penstock.ops import" in block]
    linear, sparse = code.split("output = ")
    q, k, v = torch.randn(3, 1, 300, 2, 16).unbind()
    names = {"q": q, "k": k, "v": v, "log_gate": -torch.rand(1, 300, 2, 16)}
    exec(linear, names)
    assert names["output"].shape == (1, 300, 2, 16)
    assert names["state"].shape == (1, 2, 16, 16)
    names |= {name: x.transpose(1, 2) for name, x in (("q", q), ("k", k), ("v", v))}
    exec(f"output = {sparse}", names | {"block_mask": torch.ones(3, 3, dtype=torch.bool)})


def test_gates_are_grafted_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(256, (2, 512))
    before = model(tokens).logits
    (code,) = [block for block in blocks("python") if "penstock.graft(" in block]
    exec(code, {"penstock": penstock, "model": model, "tokens": tokens, "batches": [tokens] * 2})
    assert torch.equal(model(tokens).logits, before), "taken off, it is what it was"
    assert "oracle" in capsys.readouterr().out


def test_a_language_model_generates_as_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from penstock.interop import hf
    from penstock.systems.sequence.gla.model import GLALM

    hf.save(GLALM(256, 16, 1, 2, intermediate_size=16), tmp_path / "FOLDER", tokenizer="bytes")
    (code,) = [block for block in blocks("python") if "AutoModelForCausalLM" in block]
    exec(code.replace('"FOLDER"', repr(str(tmp_path / "FOLDER"))), {})
    assert "def f(x):" in capsys.readouterr().out


def test_commands_and_targets_exist() -> None:
    lines = [line for block in blocks("") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith(("penstock ", "make "))]
    assert {words[0] for words in commands} == {"penstock", "make"}
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, flags=re.M), words
        else:
            assert words[1] in COMMANDS, words
            assert words[1] != "run" or words[2] in all_cards(), words


def test_generated_parts_are_up_to_date() -> None:
    stale = [str(path) for path, text in docs.pages().items() if path.read_text() != text]
    assert not stale, "run `make docs`"
