"""Logs of a run: CSV always, TensorBoard where it is installed; a resumed run's are those of an uninterrupted one."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from milo_latent.files import write_text

FILES = ("log.csv", "validation.csv")


class RunLogs:
    """Rows of figures by step.

    Args:
        folder: of the run.
        active: whether this process writes; the others stay silent.
    """

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self.folder, self.active = folder, active
        self.minutes = 0.0  # spent before this start
        self._board: Any = None
        self._first = 0  # step that this start writes first

    def keep_until(self, step: int) -> None:
        """Drop the rows after `step`, which a run that was killed had written after its last checkpoint."""
        if not self.active:
            return
        self._first = step + 1
        for name in FILES:
            path = self.folder / name
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines[1:] if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step]
                write_text(path, "".join(f"{line}\n" for line in lines[:1] + kept))
        rows = read_log(self.folder / FILES[0])
        self.minutes = rows[-1].get("minutes", 0.0) if rows else 0.0

    def write(self, name: str, row: dict[str, float]) -> None:
        """Add a row, whose first figure is the step, to `name`."""
        if not self.active:
            return
        path = self.folder / name
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        board = self._tensorboard()
        if board is not None:
            for key, value in row.items():
                if key != "step":
                    board.add_scalar(f"{name.removesuffix('.csv')}/{key}", value, row["step"])

    def close(self) -> None:
        """Write what is held back."""
        if self._board is not None:
            self._board.close()

    def _tensorboard(self) -> Any:
        if self._board is None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # hides what was written after the checkpoint, as `keep_until` does in the files
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=self._first)
        return self._board


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the rows of a log; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
