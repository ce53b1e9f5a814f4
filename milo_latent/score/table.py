"""Tables of scores: on disk as they come, gone on with after an interruption; CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from milo_latent.files import write_text


@dataclass(frozen=True)
class ScoreRow:
    """A row of a table of scores; 0 = identical in both readings.

    Args:
        name: of the pair.
        score: raw error E, unbounded above.
        quality: quality score Q, towards 1 = worst.
    """

    name: str
    score: float
    quality: float


class ScoreTable:
    """Rows kept on disk as they come, so that an interrupted table goes on where it stopped.

    Args:
        path: of the finished CSV; until then the rows are in a file beside it, `.partial` appended.
        key: what the scores depend on, such as the weights; rows of another key are begun anew.
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
        return f"{name},{row.score!r},{row.quality!r}"

    def finish(self, order: Iterable[str]) -> list[ScoreRow]:
        """Write the CSV, its rows in `order`, and return them; the file beside it goes."""
        rows = [self.rows[name] for name in order]
        header = ",".join(field.name for field in fields(ScoreRow))
        write_text(self.path, "\n".join([header, *map(self._line, rows), ""]))
        self.partial.unlink(missing_ok=True)
        return rows


def rows_to_json(rows: list[ScoreRow], *, metric: str, weights: str) -> str:
    """Return JSON: an object of the metric's name, its weights, the mean over the pairs, and a list of the pairs.

    Args:
        rows: of the table.
        metric: "MILO_I" or "MILO_L".
        weights: where they are from.
    """
    mean = mean_row(rows)
    table = {
        "metric": metric,
        "weights": weights,
        "mean": {"score": mean.score, "quality": mean.quality},
        "pairs": [asdict(row) for row in rows],
    }
    return json.dumps(table, indent=2, allow_nan=False)


def mean_row(rows: list[ScoreRow]) -> ScoreRow:
    """Return the mean over rows, named "mean"."""
    return ScoreRow("mean", fmean(row.score for row in rows), fmean(row.quality for row in rows))
