"""Tables of scores: rows are on disk as they come, so that an interrupted table can be resumed; CSV and JSON."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from milo_latent.atomic import write_text
from milo_latent.processes import own_part, process_index, take_parts
from milo_latent.provenance import Entry, format_entry, read_entries


@dataclass(frozen=True)
class ScoreRow:
    """A row of a table of scores."""

    name: str  # of the pair
    error: float  # E; 0 = identical, unbounded above, lower is better
    mos: float  # mean opinion score, 0 to 5, higher is better


SCORES = ("error", "mos")  # the fields of a row that are computed


def partial_of(path: Path) -> Path:
    """Return where the rows of a table are until it is finished."""
    return path.with_name(path.name + ".partial")


def _is_score(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


class ScoreTable:
    """Rows that are kept on disk as they come, so that an interrupted table resumes where it stopped.

    Warns of rows on disk that are scored anew, since they are damaged or were made of something else. Of several
    processes, the main one knows the rows on disk and finishes the table; each of the others keeps its rows in a file
    of its own.

    Args:
        path: of the finished CSV; until then the rows are in a file beside it, with `.partial` appended to its name.
        made: what the row of each name depends on, such as weights and files; rows of something else are dropped.
    """

    def __init__(self, path: str | Path, *, made: Mapping[str, Entry]) -> None:
        self.path, self.made = Path(path), made
        self.partial = partial_of(self.path)
        entries, dropped = self._read()
        self.rows: dict[str, ScoreRow] = {}
        for entry in entries:
            values = {name: entry.pop(name, None) for name in SCORES}
            name = str(entry.get("name"))
            if entry == {"name": name, **made.get(name, {"another": True})} and all(map(_is_score, values.values())):
                self.rows[name] = ScoreRow(name, **values)
            else:
                dropped += 1
        if dropped:
            warnings.warn(
                f"{dropped} rows of {self.partial} are scored anew: they are of other files, weights or settings, or "
                "damaged.",
                stacklevel=2,
            )

    def _read(self) -> tuple[list[Entry], int]:
        if process_index() > 0:
            return [], 0
        take_parts(self.partial)
        return read_entries(self.partial)

    def extend(self, rows: Iterable[ScoreRow]) -> Iterator[ScoreRow]:
        """Yield rows, each on disk before the next is computed."""
        part = own_part(self.partial)
        write_text(part, "".join(map(self._entry, self.rows.values())))
        with part.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(self._entry(row))
                file.flush()
                yield row

    def _entry(self, row: ScoreRow) -> str:
        return format_entry({**asdict(row), **self.made[row.name]})

    @staticmethod
    def _line(row: ScoreRow) -> str:
        name = '"' + row.name.replace('"', '""') + '"'
        return f"{name},{row.error!r},{row.mos!r}"

    def finish(self, order: Iterable[str], new: Iterable[ScoreRow]) -> list[ScoreRow]:
        """Write the CSV of the rows known and `new`, in `order`, remove the partial file, and return the rows."""
        self.rows |= {row.name: row for row in new}
        rows = [self.rows[name] for name in order if name in self.rows]
        header = ",".join(field.name for field in fields(ScoreRow))
        write_text(self.path, "\n".join([header, *map(self._line, rows), ""]))
        take_parts(self.partial)
        self.partial.unlink(missing_ok=True)
        return rows


def mean_row(rows: list[ScoreRow]) -> ScoreRow:
    """Return the mean over rows, named "mean"."""
    return ScoreRow("mean", fmean(row.error for row in rows), fmean(row.mos for row in rows))
