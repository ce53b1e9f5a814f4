"""Tables of figures by step: the table of a resumed run is that of an uninterrupted one."""

from __future__ import annotations

import csv
from pathlib import Path

from milo_latent.files import write_text


def append_row(path: Path, row: dict[str, float]) -> None:
    """Add a row, whose first figure is the step."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows after `step`, which a killed run wrote after its last checkpoint, and a row that is cut off."""
    if path.is_file():
        header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        kept = [line for line in lines if int(line.split(",")[0]) <= step]
        write_text(path, "".join(f"{line}\n" for line in [header, *kept] if line))


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the rows of a table; none if it does not exist yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
