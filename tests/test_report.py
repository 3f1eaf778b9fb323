"""The report: says what the run found, holds everything it shows, and lets no name out of its place."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MetricCollection

from penstock._version import __version__
from penstock.errors import UserError
from penstock.gates import Gate, Routing, SigmoidGate, TopKRouter
from penstock.lab.config import override, to_dict
from penstock.lab.gatesample import gate_sample
from penstock.lab.pictures import DARK, LIGHT, picture, tile
from penstock.lab.report import write_report
from penstock.lab.run import Options, run
from penstock.lab.store import FORMAT, RunFolder
from penstock.lab.system import system
from penstock.tasks.base import Task, Training

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    "\"><img src=x onerror=alert(1)>'",
    "{{ 7 * 7 }}{% raise %}",
    "$\\nosuch{1}$ & $a_b$",
    "</style></title><svg onload=alert(1)>",
    "javascript:alert(1)",
    "https://example.com/a.png",
    "&lt;b&gt; ]]> --> 名前 \u202e",
    "longer" * 40,
]
SECTIONS = (
    *("summary", "arms", "curves", "claims", "gates", "figures", "cost", "trials"),
    *("data", "configuration", "environment", "repeat"),
)
TRIED = (
    *("ungated_sink", "headwise_sink", "elementwise_sink"),
    *(f"{name}_gate_{at}" for name in ("headwise", "elementwise") for at in ("inactive", "active")),
)
VOID = {"meta", "link", "br", "img", "source", "rect", "line", "circle"}


# -- a run folder, written by hand ---------------------------------------------------------------------------------


def spread(*values: float) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": sum(values) / len(values), "std": std, "values": list(values)}


def gate(name: str, **others: Any) -> dict[str, Any]:
    stats = {"name": name, "passes": "head", "kind": "scale", "calls": 2, "inputs": 64, "units": 2, "mean": 0.4}
    stats |= {"std": 0.1, "below_05": 0.0, "above_95": 0.0, "from_input": 0.7, "effective": 1.8, "dead": 0}
    return stats | {"static": False, "unit_means": [0.3, 0.5], "histogram": [0.05] * 20} | others


def arm(*losses: float, gates: list[dict[str, Any]] | None = None, **others: Any) -> dict[str, Any]:
    gates = gates or []
    history = [{"step": step, "means": {g["name"]: [0.1 * step, 0.5] for g in gates}} for step in (1, 2, 4) if gates]
    cost = {"parameters": 1200, "flops": 3.5e6, "latency_ms": 2.0, "batch": 16, "train_seconds": 4.0}
    return {"metrics": {"loss": spread(*losses)}, "cost": cost, "gates": gates, "gate_history": history} | others


def claim(verdict: str, *values: float, must_be: str = "< 0", interval: list[float] | None = None) -> dict[str, Any]:
    measured = sum(values) / len(values) if values else None
    part = {"what": "loss, a - b", "values": list(values), "measured": measured, "interval": interval}
    head = {"id": f"claim_{verdict}", "says": "It helps.", "measured": measured, "interval": interval}
    return head | {"verdict": verdict, "parts": [part | {"must_be": must_be, "verdict": verdict}]}


def results(**others: Any) -> dict[str, Any]:
    found = system("gated_attention")
    return {
        "system": "gated_attention",
        "version": __version__,
        "config": to_dict(found.Config()),
        "seeds": [0, 1, 2],
        "quick": True,
        "data": {"origin": "made up", "tokens": {"train": 12345, "validation": 10, "test": 20}},
        "leaderboard": {"loss": "min"},
        "arms": {"gated": arm(1.0, 2.0, 3.0, gates=[gate("layers.0.gate")]), "ungated": arm(1.5, 2.7, 3.6)},
        "trials": {"selective_copy": [dict.fromkeys(TRIED, 0.25), dict.fromkeys(TRIED, 0.5)]},
        "claims": [claim("holds", -0.2, -0.1, -0.3, interval=[-0.45, -0.05]), claim("undecided")],
        "not_judged": ["dynamic"],
        "environment": {"python": "3.11", "torch": "2.13", "date": "2026-11-05 18:15:01", "gpu": None},
        "command": "penstock run gated_attention --seeds 3",
    } | others


def rows_of(content: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of log.csv, three steps a training."""
    kinds = itertools.product(content["arms"], content["seeds"], range(3), ("train/loss", "val/loss"))
    return [(name, seed, "train", step, metric, 4.0 - step + seed / 10) for name, seed, step, metric in kinds]


Written = Callable[..., RunFolder]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a run folder from what stands in results.json."""

    def write(
        content: dict[str, Any], rows: Iterable[tuple[Any, ...]] = (), cells: bool = False, **about: Any
    ) -> RunFolder:
        folder = RunFolder(tmp_path)
        head = {"format": FORMAT, "system": content["system"], "version": __version__, "config": content["config"]}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(head | {"command": content.get("command")} | about))
        folder.write_json("results.json", content)
        keys = ("arm", "seed", "stage", "step", "metric", "value")
        folder.write_log(dict(zip(keys, row, strict=True)) for row in rows)
        for name in content["arms"] if cells else ():
            folder.write_json(f"cells/{name.replace('/', '')[:20]}.seed0.json", {"arm": name, "seed": 0, "metrics": {}})
        return folder

    return write


class Page(HTMLParser):
    """What a browser's parser makes of a page: elements in order, text, and whether tags match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> does not close {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


def read(folder: RunFolder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.split(";base64,")[1])


def pixels(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(decoded(uri))).convert("RGB")


def svg_texts(uri: str) -> list[str]:
    tree = ElementTree.fromstring(decoded(uri))
    assert not [e for e in tree.iter() if e.tag.endswith("script")]
    return ["".join(element.itertext()) for element in tree.iter() if element.tag.endswith("}text")]


def hostile() -> dict[str, Any]:
    """A run in which every name, text and number-less value that comes from outside is hostile."""
    names = iter(HOSTILE * 10)
    gates = [gate(name, passes=SCRIPT) for name in HOSTILE]
    sample = {name: {"rows": SCRIPT, "columns": SCRIPT, "values": [[0.1, 0.9]] * 3} for name in HOSTILE}
    arms: dict[str, Any] = {name: arm(1.0, 2.0, 3.0, gates=gates, gate_sample=sample) for name in HOSTILE[:3]}
    arms |= {name: arm(1.1, 2.0, 2.9) for name in HOSTILE[3:]}
    arms["stopped " + SCRIPT] = {"metrics": {}, "cost": {}, "gates": [], "failed": {"0": SCRIPT + " " + HOSTILE[1]}}
    for one in arms.values():
        one["metrics"] |= {SCRIPT: spread(1.0)} if one["metrics"] else {}
    config = to_dict(system("gated_attention").Config())
    config["data"]["column"] = SCRIPT
    spoken = claim("holds", -1.0, must_be="< 0", interval=[-2.0, -0.5])
    spoken |= {"id": next(names), "says": next(names), "parts": [p | {"what": SCRIPT} for p in spoken["parts"]]}
    return results(
        arms=arms,
        config=config,
        data={"origin": next(names), SCRIPT: {next(names): next(names)}, "classes": HOSTILE},
        trials={next(names): [{SCRIPT: 1.0}]},
        claims=[spoken],
        not_judged=[SCRIPT],
        environment={SCRIPT: next(names), "date": None},
        command=f"penstock run gated_attention --data.column '{SCRIPT}' --out \"{HOSTILE[1]}\"",
        version=SCRIPT,
    )


# -- what the page says --------------------------------------------------------------------------------------------


def test_every_section_is_there_and_headings_go_down_one_level_at_a_time(written: Written) -> None:
    page = read(written(results()))
    ids = [a.get("id") for t, a in page.elements if t == "h2"]
    assert ids == list(SECTIONS)
    links = [a["href"] for a in page.all("a")]
    assert links == [f"#{name}" for name in SECTIONS]
    levels = [int(t[1]) for t, _ in page.elements if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.all("html", lang="en")


def test_tables_name_their_rows_and_columns_and_pictures_say_what_they_show(written: Written) -> None:
    page = read(written(results(), rows=rows_of(results()), cells=True))
    assert len(page.all("img")) == 2 * 4  # Two curves, a gate over training, the system's own figure; each twice.
    scopes = {a.get("scope") for a in page.all("th")}
    assert scopes == {"col", "row", "rowgroup"}
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("svg", role="img"))
    assert len(page.all("figcaption")) == len(page.all("figure")) > 0


def test_the_best_arm_is_told_with_the_interval_of_the_paired_difference(written: Written) -> None:
    page = read(written(results()))
    # Differences by seed are -0.5, -0.7 and -0.6: their standard error is 0.1 / sqrt 3, Student's t for two degrees 4.303.
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert f"differ by -0.6, 95% interval [{-0.6 - half:.4g}, {-0.6 + half:.4g}]: more than" in page.text
    assert "gated is best by loss (lower is better): 2 ± 1 against 2.6 ± 1.1 of ungated" in page.text


@pytest.mark.parametrize(
    ("ungated", "mode", "says"),
    [
        ((1.5, 1.5, 3.6), "min", "the order may be chance"),
        ((1.5, 2.7, 3.6), "max", "ungated is best by loss (higher is better)"),
    ],
)
def test_the_best_arm_follows_direction_and_chance(
    written: Written, ungated: tuple[float, ...], mode: str, says: str
) -> None:
    arms = {"gated": arm(1.0, 2.0, 3.0), "ungated": arm(*ungated)}
    assert says in read(written(results(arms=arms, leaderboard={"loss": mode}))).text


def test_seeds_stay_paired_when_one_arm_lost_one(written: Written) -> None:
    arms = {"gated": arm(1.0, 3.0, failed={"1": "the loss is nan"}), "ungated": arm(1.5, 100.0, 3.6)}
    folder = written(results(arms=arms))
    page = read(folder)
    assert "differ by -0.55," in page.text
    assert "seed 1 stopped: the loss is nan" in page.text


def test_verdicts_are_counted_and_written_out(written: Written) -> None:
    claims = [claim("holds", -1.0, interval=[-2, -1]), claim("undecided"), claim("does not hold", 2.0, interval=[1, 3])]
    page = read(written(results(claims=claims)))
    facts = page.text[page.text.index("Claims 1 holds") :]
    assert facts.startswith("Claims 1 holds 1 does not hold 1 undecided 1 not judged in this run")
    for verdict in ("✓ holds", "✕ does not hold", "? undecided"):
        assert page.text.count(verdict) == 2  # The claim, and its one part.
    assert "The gate's gain comes from being query-dependent." in page.text  # The card's words for what was not judged.


@pytest.mark.parametrize(("must_be", "right"), [("< 0", False), ("> 0", False), ("> -9", True), ("< 9", True)])
def test_an_interval_is_drawn_on_its_side_of_the_threshold(written: Written, must_be: str, right: bool) -> None:
    one = claim("undecided", -0.2, -0.1, 0.3, must_be=must_be, interval=[-0.6, 0.6])
    page = read(written(results(claims=[one])))
    (bar,) = page.all("line", **{"class": "interval"})
    (side,) = page.all("rect", **{"class": "side"})
    low, high = float(bar["x1"] or ""), float(bar["x2"] or "")
    start = float(side["x"] or "")
    end = start + float(side["width"] or "")
    assert 0 < low < high < 100
    assert (start <= low and high <= end) == right
    assert start < high
    assert low < end
    assert len(page.all("line", **{"class": "seed"})) == 3


def test_curves_of_stages_follow_one_another_and_average_seeds(written: Written) -> None:
    rows = [
        ("gated", seed, stage, step, "val/loss", value + seed)
        for seed in (0, 1)
        for stage, step, value in (("search", 9, 5.0), ("search", 19, 4.0), ("retrain", 4, 3.0))
    ]
    rows.append(("gated", 1, "retrain", 5, "val/loss", math.nan))
    page = read(written(results(), rows=rows))
    assert "gated ends at 3.5 (step 25)" in page.text
    assert "ungated ends at" not in page.text


def test_a_gate_is_shown_over_training_and_by_input(written: Written) -> None:
    sample = {"layers.0.gate": {"rows": "sample", "columns": "head", "values": [[0.0, 1.0], [None, 0.25], [1.0, 1.0]]}}
    arms = {
        "gated": arm(1.0, 2.0, 3.0, gates=[gate("layers.0.gate")], gate_sample=sample),
        "ungated": arm(1.5, 2.7, 3.6),
    }
    page = read(written(results(arms=arms)))
    over, _, by, in_dark = (a for a in page.all("img") if "heat" in str(a.get("class")))
    assert (over["width"], over["height"]) == ("3", "2")  # Three looks in training, two units.
    assert (by["width"], by["height"]) == ("3", "2")  # Three inputs, two units.
    for one, theme in ((by, LIGHT), (in_dark, DARK)):
        closed, opened, bad = (tuple(bytes.fromhex(c[1:])) for c in (theme.scale[0], theme.scale[-1], theme.line))
        assert [pixels(one["src"] or "").getpixel((x, 0)) for x in range(3)] == [closed, bad, opened]
    assert "→ step 1 to 4" in page.text
    assert "→ sample 1 to 3" in page.text
    assert "70% of its variance comes from the input" in page.text


def test_a_gate_without_history_or_sample_keeps_its_row(written: Written) -> None:
    silent = {"name": "unused", "passes": "head", "kind": "scale", "calls": 0}
    arms = {"gated": arm(1.0, gates=[gate("a"), silent]) | {"gate_history": []}}
    page = read(written(results(arms=arms, seeds=[0])))
    assert not [a for a in page.all("img") if "heat" in str(a.get("class"))]
    assert "It was not called on the test batches." in page.text


def test_a_routers_load_is_drawn(written: Written) -> None:
    router = gate(
        "router", passes="expert", kind="simplex", entropy=0.3, load=[0.5, 0.0, 0.25], load_cv=0.6, unused=0.3
    )
    page = read(written(results(arms={"gated": arm(1.0, gates=[router])}, seeds=[0])))
    assert "load of each expert" in page.text
    heights = [float(a["height"] or "") for a in page.all("rect")][-2:]
    assert heights[0] == pytest.approx(2 * heights[1])  # The unused expert has no bar.


def test_costs_are_set_against_the_twin(written: Written) -> None:
    content = results()
    content["arms"]["gated"]["cost"]["flops"] = 7e6
    assert "7,000,000 × 2.00" in read(written(content)).text


def test_the_command_to_repeat_is_the_first_one(written: Written) -> None:
    page = read(
        written(results(command="penstock run gated_attention --resume x"), command="penstock run first --seeds 3")
    )
    assert "Exactly as it was run : penstock run first --seeds 3 It was finished by:" in page.text.replace(
        "run:", "run :"
    )


def test_the_same_run_gives_the_same_page(written: Written) -> None:
    folder = written(results(), rows=rows_of(results()), cells=True)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_many_gates_stay_under_two_megabytes(written: Written) -> None:
    rng = np.random.default_rng(0)
    gates = [gate(f"blocks.{i}.gate", units=64, histogram=rng.random(20).tolist()) for i in range(120)]
    sample = {
        g["name"]: {"rows": "position", "columns": "head", "values": rng.random((32, 32)).tolist()} for g in gates
    }
    history = [{"step": s, "means": {g["name"]: rng.random(64).tolist() for g in gates}} for s in range(10)]
    one = arm(1.0, gates=gates, gate_sample=sample) | {"gate_history": history}
    folder = written(results(arms={"gated": one, "elementwise": one}, seeds=[0]))
    assert write_report(folder).stat().st_size < 2_000_000


# -- what it refuses -----------------------------------------------------------------------------------------------


def test_a_half_finished_run_is_one_clear_error(written: Written) -> None:
    folder = written(results())
    (folder.path / "results.json").unlink()
    with pytest.raises(UserError, match=r"has no results\.json; it did not finish .*--resume"):
        write_report(folder)
    assert not (folder.path / "report.html").exists()


def test_a_missing_or_broken_log_is_named_with_its_row(written: Written) -> None:
    folder = written(results(), rows=rows_of(results()))
    log = folder.path / "log.csv"
    log.write_text(log.read_text() + "gated,0,train,often,val/loss,1\n")
    rows = len(log.read_text().splitlines())
    with pytest.raises(UserError, match=rf"log\.csv: row {rows} is broken"):
        write_report(folder)
    log.unlink()
    with pytest.raises(UserError, match=r"has no log\.csv"):
        write_report(folder)


@pytest.mark.parametrize("content", [[], {"system": "gated_attention", "rows": []}])
def test_results_of_something_else_are_refused(written: Written, content: Any) -> None:
    folder = written(results())
    folder.write_json("results.json", content)
    with pytest.raises(UserError, match=r"results\.json: is not of a run \(it has no .*arms"):
        write_report(folder)


# -- nothing gets out ----------------------------------------------------------------------------------------------


def test_hostile_names_stay_text(written: Written) -> None:
    page = read(written(hostile(), rows=rows_of(hostile()), cells=True))
    assert not {"script", "iframe", "object", "embed", "form", "base", "foreignobject"} & {t for t, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert all(re.fullmatch(r"[a-z][a-z0-9-]*", name, re.I) for name in attributes), (tag, attributes)
    # The parser has undone the escapes: the names are there, whole, as text.
    for name in HOSTILE:
        assert name in "".join(page.texts)
    assert page.text.count("49") == "".join(HOSTILE).count("49")


def test_nothing_on_the_page_points_outside(written: Written) -> None:
    path = write_report(written(hostile(), rows=rows_of(hostile())))
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    loading = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "ping"}
    for tag, attributes in page.elements:
        for name in loading & set(attributes):
            value = attributes[name] or ""
            assert value.startswith("data:") or (tag == "a" and value.startswith("#")), (tag, name, value)
        assert "url(" not in (attributes.get("style") or "")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (a["content"] for a in page.all("meta", **{"http-equiv": "Content-Security-Policy"}))
    assert "default-src 'none'; img-src data:" in (policy or "")


def test_characters_that_no_page_can_hold_are_replaced(written: Written) -> None:
    folder = written(results())
    content = results(data={"origin": "a\x00b\x1bc\ud800d\nE"})
    (folder.path / "results.json").write_text(json.dumps(content))
    page = read(folder)
    assert "a\ufffdb\ufffdc\ufffdd E" in page.text


def test_hostile_names_stay_text_in_figures_and_are_no_formulas() -> None:
    def draw() -> Figure:
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([1, 1000], label=HOSTILE[3])
        axes.set_yscale("log")
        axes.set_title(HOSTILE[1])
        axes.set_xticks([0, 1], [SCRIPT, HOSTILE[3]])
        axes.set_xlabel("bell \x07 " + HOSTILE[7])
        axes.legend()
        return figure

    both = picture(draw)
    for uri in (both.light, both.dark):
        texts = svg_texts(uri)
        assert {SCRIPT, HOSTILE[1], "bell \ufffd " + HOSTILE[7]} <= set(texts)
        assert texts.count(HOSTILE[3]) == 2
        assert "100" in texts  # A tick of the logarithmic axis, written out.
        assert not [text for text in texts if "mathdefault" in text]
    assert LIGHT.ink.encode() in decoded(both.light)
    assert DARK.ink.encode() in decoded(both.dark)


def test_a_heavy_figure_becomes_pixels() -> None:
    def draw() -> Figure:
        figure = Figure(figsize=(3, 2))
        figure.add_subplot().scatter(*np.random.default_rng(0).random((2, 5000)))
        return figure

    one = picture(draw)
    assert one.light.startswith("data:image/png")
    assert pixels(one.light).size == (2 * one.width, 2 * one.height)


def test_a_heat_map_goes_from_closed_to_open() -> None:
    one = tile(np.array([[0.0, 2.0, np.nan]]), (0.0, 2.0))
    for uri, theme in ((one.light, LIGHT), (one.dark, DARK)):
        wanted = [tuple(bytes.fromhex(c[1:])) for c in (theme.scale[0], theme.scale[-1], theme.line)]
        assert [pixels(uri).getpixel((x, 0)) for x in range(3)] == wanted


# -- a real run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    found = system("convit")
    config = override(found.Config(), {"train.steps": 2})
    options = Options(quick=False, arms=("gated",), out=tmp_path_factory.mktemp("run") / "convit")
    folder, _ = run("convit", config, options)
    return folder


def test_the_tasks_figures_are_of_the_trained_model(trained: RunFolder) -> None:
    page = read(trained)
    assert "Confusion matrix (test): gated" in page.text
    uri, _ = (a["src"] for a in page.all("img") if a.get("alt") == "Confusion matrix (test): gated")
    names = {str(digit) for digit in range(10)}
    # Ten names on each axis are small numbers too, so that the sum of the cells is known up to these.
    numbers = [int(text) for text in svg_texts(uri or "") if text.isdigit()]
    tested = json.loads((trained.path / "results.json").read_text())["data"]["test"]
    assert sum(numbers) - 2 * sum(map(int, names)) == tested


def test_a_run_without_its_checkpoints_says_what_is_left_out(trained: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "cells")
    page = read(RunFolder(copy))
    assert "Figures of the task are left out: the run's checkpoints/ are not there." in page.text
    assert "The system's own figures are left out: the run's cells/ are not there." in page.text


def test_a_checkpoint_cut_short_is_told(trained: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    path = copy / "checkpoints" / "gated.seed0.train.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    assert "gated.seed0.train.ckpt is broken" in read(RunFolder(copy)).text


# -- what gates answer to single inputs ------------------------------------------------------------------------------


class Position(Gate):
    """(B, L, D) -> (B, L, H, K)."""

    passes = "head"

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid().unflatten(-1, (2, -1))


class Free(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))

    def forward(self) -> Tensor:
        return self.value


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position, self.sample = Position(), SigmoidGate(8, 5, passes="channel")
        self.router, self.free, self.drop = TopKRouter(8, 4, 2), Free(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.position(x).flatten(-2)
        routing: Routing = self.router(y.flatten(0, 1))
        gated = self.sample(self.drop(x).mean(1)).sum() + self.sample(y.mean(1) + 1).sum()
        return gated + routing.weights.sum() + self.free().sum()


class Summing(Task):
    def step(self, batch: Tensor) -> tuple[Tensor, None]:
        return self.model(batch), None

    def new_metrics(self) -> MetricCollection:
        return MetricCollection({})

    def update(self, metrics: MetricCollection, outputs: Any, batch: Any) -> None: ...

    def inputs(self, batch: Tensor) -> tuple[Tensor]:
        return (batch,)

    @classmethod
    def predict_file(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


def test_a_sample_holds_the_first_inputs_values_of_each_gate() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 6, 8)
    task = Summing(model, Training(), None)  # type: ignore[arg-type]
    task.train()
    sample = gate_sample(task, x, limit=6)
    assert task.training
    assert model.drop.training
    assert set(sample) == {"position", "sample", "router"}  # The free gate sees no input.
    position = model.position(x)
    # Six positions of the first sample; sixteen would be too many units, so heads are averaged over their channels.
    assert sample["position"]["rows"] == "position of the first sample"
    assert sample["position"]["columns"] == "head, averaged"
    torch.testing.assert_close(torch.tensor(sample["position"]["values"]), position[0].mean(-1), atol=0, rtol=5e-3)
    # The first of two calls, and in evaluation mode: nothing is dropped.
    assert (sample["sample"]["rows"], sample["sample"]["columns"]) == ("sample", "channel")
    torch.testing.assert_close(torch.tensor(sample["sample"]["values"]), model.sample(x.mean(1)), atol=0, rtol=5e-3)
    routed = model.router((x * position.flatten(-2)).flatten(0, 1)).dense()
    assert sample["router"]["rows"] == "position"
    torch.testing.assert_close(torch.tensor(sample["router"]["values"]), routed[:6], atol=0, rtol=5e-3)


def test_a_gate_of_one_axis_is_cut_off_at_the_limit() -> None:
    task = Summing(Model(), Training(), None)  # type: ignore[arg-type]
    sample = gate_sample(task, torch.randn(3, 2, 8), limit=2)["sample"]
    assert sample["columns"] == "channel (the first 2 of 5)"
    assert np.shape(sample["values"]) == (2, 2)


class Choice(Gate):
    """(B, 8) -> (B, 2, 4): each of two heads chooses among four experts."""

    passes, kind, unit_dims = "expert", "simplex", 2

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 4)).softmax(-1)


def test_of_a_choice_the_entries_are_kept_and_heads_averaged() -> None:
    task, x = Summing(Choice(), Training(), None), torch.randn(3, 8)  # type: ignore[arg-type]
    (sample,) = gate_sample(task, x, limit=4).values()
    torch.testing.assert_close(torch.tensor(sample["values"]), task.model(x).mean(1), atol=0, rtol=5e-3)


def test_a_model_without_gates_has_no_sample_and_a_limit_of_zero_is_refused() -> None:
    task = Summing(nn.Identity(), Training(), None)  # type: ignore[arg-type]
    assert gate_sample(task, torch.randn(2, 3)) == {}
    with pytest.raises(ValueError, match="limit=0: it must be 1 or more"):
        gate_sample(task, torch.randn(2, 3), limit=0)


# -- in a browser --------------------------------------------------------------------------------------------------

#: Frames the report at two widths and writes down what it finds.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body><script>
let waiting = 2; const found = [];
for (const width of [400, 1100]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.onload = async () => {
    const page = frame.contentDocument, images = [...page.images];
    for (const details of page.querySelectorAll("details")) details.open = true;
    await Promise.allSettled(images.map(image => image.decode()));
    const broken = images.filter(image => !image.naturalWidth).length;
    const shown = images.filter(image => image.getBoundingClientRect().width).length;
    const root = page.documentElement;
    found.push({width, wide: root.scrollWidth - root.clientWidth, images: images.length, shown, broken});
    if (!--waiting) document.body.textContent = "FOUND " + JSON.stringify(found) + " END";
  };
  frame.src = "report.html"; document.body.append(frame);
}
</script>"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """Runs Chromium without a window; gives its standard output and error."""

    def browse(*arguments: str) -> tuple[str, str]:
        program = shutil.which("chromium")
        if program is None:
            pytest.fail("Chromium is not installed, so the report cannot be looked at: apt-get install chromium")
        quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *quiet, "enable-logging=stderr"]
        profile = tmp_path_factory.mktemp("profile")
        command = [program, *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return browse


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the run folder; gives its address and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments: Any) -> None: ...

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def requested(net_log: Path, address: str) -> set[str]:
    """Every address that a page of ours made the browser ask for; the browser's own errands are left out."""
    parameters = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    return {one["url"] for one in parameters if "url" in one and one.get("initiator") == address}


def test_a_browser_shows_the_page_in_light_and_dark_and_asks_for_nothing_else(
    written: Written,
    served: tuple[str, list[str]],
    chromium: Callable[..., tuple[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    write_report(written(hostile(), rows=rows_of(hostile())))
    address, asked = served
    shots = tmp_path_factory.mktemp("shots")
    brightness = {}
    for scheme, name in ((1, "light"), (0, "dark")):
        shot, net_log = shots / f"{name}.png", shots / f"{name}.json"
        _, errors = chromium(
            f"--screenshot={shot}",
            "--window-size=1000,1600",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--log-net-log={net_log}",
            f"{address}/report.html",
        )
        assert "CONSOLE" not in errors, errors
        assert requested(net_log, address) == set()
        shown = np.asarray(Image.open(shot).convert("L"), np.float64)
        brightness[name] = float(np.median(shown))
        assert shown.std() > 10, "the screenshot is blank"
        assert (shown.std(1) > 5).mean() > 0.3, "most rows of the screenshot are empty"
    assert asked == ["/report.html"] * 2
    assert brightness["light"] > 200 > 60 > brightness["dark"]


def test_a_page_that_did_ask_or_complain_would_be_noticed(
    served: tuple[str, list[str]], chromium: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    address, asked = served
    (tmp_path / "leaky.html").write_text(f"<img src={address}/leak.png><script>undefined.x</script>")
    net_log = tmp_path / "net.json"
    _, errors = chromium(f"--log-net-log={net_log}", f"--screenshot={tmp_path / 'a.png'}", f"{address}/leaky.html")
    assert "CONSOLE" in errors
    assert f"{address}/leak.png" in requested(net_log, address)
    assert "/leak.png" in asked


def test_the_page_is_never_wider_than_the_window_and_every_picture_shows(
    written: Written, served: tuple[str, list[str]], chromium: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    write_report(written(hostile(), rows=rows_of(hostile())))
    (tmp_path / "harness.html").write_text(HARNESS)
    address, _ = served
    page, _ = chromium("--dump-dom", "--virtual-time-budget=20000", f"{address}/harness.html")
    found = json.loads(page[page.index("FOUND ") + 6 : page.index(" END")])
    assert {one["width"] for one in found} == {400, 1100}
    for one in found:
        assert one["wide"] <= 0
        assert one["broken"] == 0
        assert one["images"] == 2 * one["shown"] > 20
