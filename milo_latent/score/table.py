"""Tables of scores: rows are on disk as they come, so that an interrupted table can be resumed; CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from milo_latent.atomic import write_text


@dataclass(frozen=True)
class ScoreRow:
    """A row of a table of scores."""

    name: str  # of the pair
    error: float  # E; 0 = identical, unbounded above, lower is better
    mos: float  # mean opinion score, 0 to 5, higher is better


class ScoreTable:
    """Rows that are kept on disk as they come, so that an interrupted table resumes where it stopped.

    Args:
        path: of the finished CSV; until then the rows are in a file beside it, with `.partial` appended to its name.
        key: what the scores depend on, such as the weights; rows of another key are dropped.
    """

    def __init__(self, path: str | Path, *, key: str) -> None:
        self.path, self.key = Path(path), key
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.rows: dict[str, ScoreRow] = {}
        if self.partial.is_file():
            self._read()

    def _read(self) -> None:
        lines = self.partial.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        if lines[0] != json.dumps(self.key):
            return
        for line in lines[1:-1]:  # what follows the last line break was cut off in writing
            values = next(csv.reader([line]))
            if len(values) == len(fields(ScoreRow)):
                self.rows[values[0]] = ScoreRow(values[0], float(values[1]), float(values[2]))

    def extend(self, rows: Iterable[ScoreRow]) -> None:
        """Add rows, each on disk before the next is computed."""
        kept = [self._line(row) for row in self.rows.values()]
        write_text(self.partial, "\n".join([json.dumps(self.key), *kept, ""]))
        with self.partial.open("a", encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in rows:
                file.write(self._line(row) + "\n")
                file.flush()
                self.rows[row.name] = row

    @staticmethod
    def _line(row: ScoreRow) -> str:
        name = '"' + row.name.replace('"', '""') + '"'
        return f"{name},{row.error!r},{row.mos!r}"

    def finish(self, order: Iterable[str]) -> list[ScoreRow]:
        """Write the CSV with its rows in `order`, remove the partial file, and return the rows."""
        rows = [self.rows[name] for name in order]
        header = ",".join(field.name for field in fields(ScoreRow))
        write_text(self.path, "\n".join([header, *map(self._line, rows), ""]))
        self.partial.unlink(missing_ok=True)
        return rows


def rows_to_json(rows: list[ScoreRow], *, metric: str, weights: str) -> str:
    """Return a JSON object of the metric's name, where its weights are from, the mean over the pairs, and the pairs."""
    mean = mean_row(rows)
    table = {
        "metric": metric,
        "weights": weights,
        "mean": {"error": mean.error, "mos": mean.mos},
        "pairs": [asdict(row) for row in rows],
    }
    return json.dumps(table, indent=2, allow_nan=False)


def mean_row(rows: list[ScoreRow]) -> ScoreRow:
    """Return the mean over rows, named "mean"."""
    return ScoreRow("mean", fmean(row.error for row in rows), fmean(row.mos for row in rows))
