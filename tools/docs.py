"""Write the documents that hold figures from cards and stored results; `make docs`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from penstock.lab.cards import all_cards, last_measured
from penstock.lab.show import number
from penstock.lab.store import write_atomically

ROOT = Path(__file__).parent.parent


def pages() -> dict[Path, str]:
    """Every generated document by path, with its content."""
    readme = (ROOT / "README.md").read_text()
    for name, text in {
        "systems": _systems(),
        "claims": _claims(),
        "demo": _recorded("demo"),
        "test": _recorded("test"),
        "bench": _bench(),
        "golden": _golden(),
    }.items():
        readme = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", readme, flags=re.S
        )
    return {ROOT / "README.md": readme}


def _systems() -> str:
    rows = ["| system | wing | what is gated, by what | ready |", "|---|---|---|---|"]
    for card in all_cards().values():
        rows.append(
            f"| `{card.name}` [{card.title}](https://arxiv.org/abs/{card.arxiv}) | {card.wing} | {card.gate.what}, by {card.gate.by} | {'yes' if card.ready else 'no'} |"
        )
    return "\n".join(rows)


def _claims() -> str:
    rows = [
        "| system | claim | measured (mean [95% interval] over seeds) | must be | verdict |",
        "|---|---|---|---|---|",
    ]
    for card in all_cards().values():
        measured = last_measured(card.name)
        for claim in (measured or {}).get("claims", []):
            parts = "<br>".join(f"{p['what']}: {_interval(p)}" for p in claim["parts"])
            bounds = "<br>".join(p["must_be"].replace("<", "&lt;").replace(">", "&gt;") for p in claim["parts"])
            rows.append(f"| {card.name} | {claim['id']} | {parts} | {bounds} | {claim['verdict']} |")
    return "\n".join(rows)


def _interval(part: dict[str, Any]) -> str:
    between = f" [{', '.join(number(v) for v in part['interval'])}]" if part["interval"] else ""
    return f"{number(part['measured'])}{between}"


def _recorded(name: str) -> str:
    """What a command printed when it was last recorded."""
    return f"```\n{(ROOT / 'docs' / f'{name}.txt').read_text().rstrip()}\n```"


def _bench() -> str:
    rows = ["| benchmark | entry | ms | ratio | share of the matrix rate |", "|---|---|---|---|---|"]
    for path in sorted((ROOT / "benchmarks").glob("*.json")):
        result = json.loads(path.read_text())
        limits = result["machine"]
        where = f"{path.stem}: {limits['matrix_gflops']:.0f} GFLOP/s, {limits['copy_gb_per_s']:.0f} GB/s"
        rows.append(f"| **{where}** | | | | |")
        for name, one in result["benchmarks"].items():
            for place, (entry, ms) in enumerate(one["ms"].items()):
                share = one["share_of_matrix_rate"] if place == 0 else None
                rows.append(
                    f"| {name if place == 0 else ''} | {entry} | {ms:.3f} | {one['ratio'][entry]:.2f} | {f'{share:.0%}' if share else ''} |"
                )
    return "\n".join(rows)


def _golden() -> str:
    """Cases by system: how many outputs were compared, and the largest error relative to an output's largest value."""
    rows = ["| system | cases | outputs compared | largest relative error |", "|---|---|---|---|"]
    pattern = r"golden (\S+)/(\S+): (\d+) outputs, largest relative error (\S+)"
    found: dict[str, list[tuple[str, int, str]]] = {}
    for slug, case, outputs, error in re.findall(pattern, (ROOT / "docs" / "golden.txt").read_text()):
        found.setdefault(slug, []).append((case, int(outputs), error))
    for slug, cases in found.items():
        worst = max(cases, key=lambda case: float(case[2]))
        rows.append(f"| {slug} | {len(cases)} | {sum(case[1] for case in cases)} | {worst[2]} ({worst[0]}) |")
    return "\n".join(rows)


def main(check: bool = False) -> int:
    """Write the documents; with ``check`` only say which are out of date."""
    stale = [path for path, text in pages().items() if path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run `make docs`")
        else:
            write_atomically(path, pages()[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv))
