"""Run every ready system at full budget over several seeds and store what came out; `make claims`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from penstock.lab.cards import all_cards
from penstock.lab.jsontext import plain_json
from penstock.lab.store import write_atomically
from tools import docs

SEEDS = 3
ROOT = Path(__file__).parent.parent


def main(names: list[str]) -> int:
    """Run the systems called ``names`` (default all ready ones); returns the worst exit code."""
    worst = 0
    for card in all_cards().values():
        if not card.ready or (names and card.name not in names):
            continue
        out = Path("runs") / "claims" / card.name
        go_on = ["--resume", str(out)] if (out / "config.yaml").exists() else ["--out", str(out)]
        code = subprocess.run(
            [sys.executable, "-m", "penstock", "run", card.name, "--seeds", str(SEEDS), *go_on], check=False
        ).returncode
        worst = max(worst, code)
        if code == 0:
            results = json.loads((out / "results.json").read_text())
            for arm in results["arms"].values():
                arm.pop("gate_history", None)
                arm.pop("gate_sample", None)
            folder = ROOT / "penstock" / "systems" / card.wing / card.name
            write_atomically(folder / "results.json", plain_json(results) + "\n")
    docs.main()
    return worst


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
