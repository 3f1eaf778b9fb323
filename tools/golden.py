"""Run the golden cases and record how near each came; `make golden`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from penstock.lab.store import write_atomically
from tools import docs

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Record the cases' lines in docs/golden.txt and rebuild the documents; returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "tests/test_golden.py", "-s", "--tb=line"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = re.findall(r"golden \S+/\S+: \d+ outputs, largest relative error \S+", done.stdout)
    write_atomically(ROOT / "docs" / "golden.txt", "\n".join(sorted(lines)) + "\n")
    print(done.stdout.strip().splitlines()[-1])
    docs.main()
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
