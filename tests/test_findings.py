"""What the gates found is told in the report, by `penstock ablate` and in results.json, whatever its length or names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main
from penstock.gates import Table
from penstock.lab.config import override
from penstock.lab.report import write_report
from penstock.lab.run import Options, run
from penstock.lab.store import RunFolder
from penstock.lab.system import system
from penstock.systems.recommendation.optfs.experiment import OptFS

FLAGS = {"data.train_rows": 300, "data.validation_rows": 200, "data.test_rows": 200}
TITLES = ["Fields kept and dropped", "Values kept and dropped, by field"]
LONG = Table({"field": f"<b>{place}</b>", "share": place / 1000, "{{ 1 }}": None} for place in range(1000))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = override(system("optfs").Config(), FLAGS | {"train.epochs": 1, "search.epochs": 2})
    folder, _ = run("optfs", config, Options(arms=("gated", "ungated"), out=tmp_path_factory.mktemp("run") / "optfs"))
    return folder.path


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptFS, "findings", lambda *arguments: {"Long": LONG, "Short": LONG[:3]})


def ablated(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["ablate", *arguments]) == 0
    return capsys.readouterr().out


def test_the_report_has_the_tables(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    section = page[page.index('id="findings"') : page.index('id="figures"')]
    assert re.findall(r"<summary>(.*) \(8\)</summary>", section) == TITLES
    assert section.count('<th scope="row">signal_0</th>') == 2
    assert '<a href="#findings">' in page


def test_ablate_prints_the_tables_after_its_own(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ablated(capsys, str(finished), "--batches", "1")
    places = [text.index(title) for title in ("(as trained)", *TITLES)]
    assert places == sorted(places)
    rows = json.loads(ablated(capsys, str(finished), "--batches", "1", "--json"))
    assert rows[0]["gate"] == "(as trained)", "the list, as ever"
    both = json.loads(ablated(capsys, str(finished), "--batches", "1", "--json", "--findings"))
    assert both["ablation"] == rows
    assert list(both["findings"]) == TITLES
    stored = json.loads((finished / "results.json").read_text())["arms"]
    assert both["findings"] == stored["gated"]["findings"]
    assert stored["ungated"]["findings"] == {}


def test_long_tables_are_cut_off_with_a_count(
    finished: Path, long: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ablated(capsys, str(finished), "--batches", "1")
    assert "... 960 more rows" in text
    assert "<b>39</b>" in text
    assert "<b>40</b>" not in text
    whole = json.loads(ablated(capsys, str(finished), "--batches", "1", "--json", "--findings"))
    assert len(whole["findings"]["Long"]) == 1000

    page = write_report(RunFolder(finished)).read_text()
    assert "Long (1000)" in page
    assert "600 more rows are in" in page
    assert "&lt;b&gt;399&lt;/b&gt;" in page
    assert "&lt;b&gt;400&lt;/b&gt;" not in page
    assert "<b>" not in page
    assert "{{ 1 }}" in page

    found = system("optfs")
    config = found.Config()
    config.data.train_rows, config.data.validation_rows, config.data.test_rows = 100, 50, 50
    config.train.epochs, config.search.epochs = 1, 2
    _, results = run("optfs", config, Options(arms=("gated",), out=tmp_path / "run"))
    assert list(results["arms"]["gated"]["findings"]) == ["Short"]
