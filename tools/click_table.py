"""Write a made-up click log in the shape of Criteo's as Parquet parts: `python -m tools.click_table DIR --rows 20000000`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet
from rich.progress import track

from penstock.data.clicktable import CriteoLike
from penstock.errors import UserError


def write(folder: Path, rows: int, *, seed: int = 0, part_rows: int = 1_000_000) -> list[Path]:
    """Write the table; a part is there whole or not at all.

    Args:
        folder: where to; it must not hold Parquet files yet.
        rows: of the whole table.
        seed: of the truth and the rows.
        part_rows: of each part but the last.

    Returns:
        the parts in order.

    Raises:
        UserError: for sizes that cannot be, or a folder that holds a table.
    """
    if min(rows, part_rows) < 1:
        raise UserError(f"rows={rows}, part_rows={part_rows}: each must be 1 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.rglob("*.parquet"))):
        raise UserError(f"{folder}: is there already; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    log = CriteoLike(seed)
    parts = []
    starts = range(0, rows, part_rows)
    for part, first in track(list(enumerate(starts)), "parts", disable=not sys.stderr.isatty()):
        parts.append(folder / f"part-{part:05}.parquet")
        _write_part(log, part, min(part_rows, rows - first), parts[-1])
    return parts


def _write_part(log: CriteoLike, part: int, rows: int, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
        unfinished = Path(folder) / "part"
        writer: pyarrow.parquet.ParquetWriter | None = None
        for block in log.blocks(part, rows):
            writer = writer or pyarrow.parquet.ParquetWriter(unfinished, block.schema, compression="zstd")
            writer.write_batch(block)
        assert writer is not None
        writer.close()
        unfinished.replace(path)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.click_table", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part-rows", type=int, default=1_000_000)
    asked = parser.parse_args()
    try:
        write(asked.folder, asked.rows, seed=asked.seed, part_rows=asked.part_rows)
    except UserError as error:
        print(f"click_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
