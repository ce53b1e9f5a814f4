"""What a run writes beside its checkpoints: tables of figures by step, and a record of its settings and starts."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from milo_latent.atomic import write_text
from milo_latent.checks import shortened
from milo_latent.structure import read_json, refusing_damage

RECORD_FILE = "run.json"
PACKAGES = ("milo_latent", "torch", "diffusers", "accelerate")
# Settings that may change when a run is resumed: its folder, its length, how often it saves, how it is logged, and the
# learning rate, which a user lowers after a loss that was not finite. The record tells them for each start.
FREE = ("output", "steps", "learning_rate", "checkpoint_minutes", "checkpoint_steps", "trackers")


def check_record(folder: Path, settings: dict[str, Any], *, done: int) -> None:
    """Raise ValueError if a run is resumed under other settings, or for fewer steps than it has done."""
    if settings["steps"] < done:
        raise ValueError(f"Expected {done} steps or more, which {folder} has done, got {settings['steps']}.")
    before, now = (_flat(each) for each in (read_json(folder / RECORD_FILE), settings))
    differing = [
        f"{name} is {shortened(repr(before.get(name)))} there and {value!r} here"
        for name, value in now.items()
        if name not in FREE and before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"Expected the settings of the run in {folder}: {'; '.join(differing)}. Choose another folder."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON holds them, with the entries of `data` on the same level."""
    settings = json.loads(json.dumps(settings))
    data = settings.pop("data", {})
    return settings | {f"data.{name}": value for name, value in (data if isinstance(data, dict) else {}).items()}


def write_record(folder: Path, settings: dict[str, Any], *, done: int) -> None:
    """Write the settings of a run and, for each start, its command, the versions of packages and the commit."""
    path = folder / RECORD_FILE
    before = read_json(path) if done else {}
    start = {"step": done} | {name: settings[name] for name in FREE}
    start |= {"command": shlex.join(sys.argv), "versions": versions(), "commit": commit()}
    starts = before.get("starts", [])
    if not isinstance(starts, list):
        raise ValueError(f"Expected a list of `starts` in {path}, got {shortened(starts)}.")
    record = settings | {"starts": [*starts, start]}
    write_text(path, json.dumps(record, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a run depends on; None for one that is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, followed by "+" if files were changed."""
    folder = Path(__file__).parent
    try:
        answers = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (
                ["ls-files", "--error-unmatch", Path(__file__).name],  # not of a repository around an installation
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[1].strip() + ("+" if answers[2].strip() else "")


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
        with refusing_damage(f"Expected a table of steps in {path}"):
            header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
            kept = [line for line in lines if int(line.split(",")[0]) <= step]
        write_text(path, "".join(f"{line}\n" for line in [header, *kept] if line))


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the rows of a table; none if it does not exist yet."""
    if not path.is_file():
        return []
    with refusing_damage(f"Expected a table of numbers in {path}"), path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
