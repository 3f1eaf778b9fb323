"""Numbers from the authors' own code, reproduced through each system's checkpoint map.

Cases come from tests/golden and from $PENSTOCK_GOLDEN (directories separated by ':'; default ../shared/golden).
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.lab.cards import all_cards

HERE = Path(__file__).parent


def _folders() -> list[Path]:
    elsewhere = os.environ.get("PENSTOCK_GOLDEN", str(HERE.parent.parent / "shared" / "golden"))
    return [HERE / "golden", *(Path(folder) for folder in elsewhere.split(":") if folder)]


def _cases() -> list[Any]:
    seen: dict[tuple[str, str], Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*/*.json")):
            seen.setdefault((path.parent.name, path.stem), path)
    return [pytest.param(path, id=f"{slug}-{case}") for (slug, case), path in sorted(seen.items())]


@pytest.mark.parametrize("path", _cases())
def test_golden(path: Path, record_property: Any) -> None:
    case = json.loads(path.read_text())
    slug = case["system"]
    if slug not in all_cards() or not all_cards()[slug].ready:
        pytest.skip(f"{slug} is not built yet")
    adapters = importlib.import_module(f"tests.golden_adapters.{slug}").ADAPTERS
    adapter = adapters[case["kind"]]  # a kind of a built system must be there
    arrays = np.load(path.with_suffix(".npz"), allow_pickle=False)
    parts: dict[str, dict[str, Any]] = {"in": {}, "param": {}, "out": {}, "grad": {}}
    for key in arrays.files:
        part, _, name = key.partition(".")
        parts[part][name] = arrays[key]
    tensors = {part: {k: _given(np.array(v)) for k, v in parts[part].items()} for part in ("in", "param")}
    got = adapter(case["config"], tensors["param"], tensors["in"])

    expected = parts["out"] | {f"grad.{name}": value for name, value in parts["grad"].items()}
    worst = 0.0
    for name, value in expected.items():
        assert name in got, f"the adapter returned no {name!r}; it returned {sorted(got)}"
        ours = got[name]
        ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
        assert ours.shape == value.shape, f"{name}: shape {ours.shape}, must be {value.shape}"
        if value.dtype.kind == "U":
            assert ours.tolist() == value.tolist(), f"{slug} {path.stem}: {name}"
            continue
        rtol, atol = _tolerance(case["tolerance"], name)
        np.testing.assert_allclose(ours, value, rtol=rtol, atol=atol, err_msg=f"{slug} {path.stem}: {name}")
        size = np.abs(value).max(initial=0.0) if value.dtype.kind == "f" else 0.0
        if size > atol:  # what is zero up to rounding has no relative error
            worst = max(worst, float(np.abs(ours - value).max() / size))
    record_property("largest_relative_error", worst)
    print(f"golden {slug}/{path.stem}: {len(expected)} outputs, largest relative error {worst:.1e}")


def _given(value: np.ndarray[Any, Any]) -> Any:
    """A tensor, or text as it is."""
    return value if value.dtype.kind == "U" else torch.from_numpy(value)


def _tolerance(tolerance: dict[str, Any], name: str) -> tuple[float, float]:
    own = tolerance.get("per_output", {}).get(name.removeprefix("grad."), tolerance.get("per_output", {}).get(name))
    if own is not None:
        return (own, own) if isinstance(own, int | float) else (own["rtol"], own["atol"])
    if "rtol" not in tolerance and "exact" in str(tolerance.get("note", "")):
        return 0.0, 0.0
    return tolerance["rtol"], tolerance["atol"]


def test_there_are_cases() -> None:
    assert _cases(), "a fresh clone tests itself with the cases in tests/golden"
