"""The record of a run beside its checkpoints: how it is set, by which code, and whether it may go on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from milo_latent.files import write_text

RECORD_FILE = "run.json"
PACKAGES = ("milo_latent", "torch", "diffusers", "accelerate")
# What may differ when a run goes on: where it lies, how long it lasts, how often it saves, and the learning rate, which
# is lowered after a loss that was not finite. Each start is recorded.
FREE = ("output", "steps", "learning_rate", "checkpoint_minutes", "checkpoint_steps")


def check_record(folder: Path, settings: dict[str, Any], *, done: int) -> None:
    """Refuse to go on with a run under other settings, or with one that has done more than is asked for.

    Args:
        folder: of the run.
        settings: of this start, which JSON can hold.
        done: steps of the last checkpoint.

    Raises:
        ValueError: naming what differs.
    """
    path = folder / RECORD_FILE
    if settings["steps"] < done:
        raise ValueError(f"Expected {done} steps or more, which {folder} has done, got {settings['steps']}.")
    if not path.is_file():
        return
    before, now = (_flat(each) for each in (json.loads(path.read_text(encoding="utf-8")), settings))
    differing = [
        f"{name} is {before[name]!r} there and {value!r} here"
        for name, value in now.items()
        if name not in FREE and name in before and before[name] != value
    ]
    if differing:
        raise ValueError(
            f"Expected the settings of the run in {folder}: {'; '.join(differing)}. Choose another folder."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON holds them, those of `data` by their own names."""
    settings = json.loads(json.dumps(settings))
    data = settings.pop("data", {})
    return settings | {f"data.{name}": value for name, value in data.items()}


def write_record(folder: Path, settings: dict[str, Any], *, done: int) -> None:
    """Write the settings of a run, and of each start its command, the packages' versions and the commit, if any.

    Args:
        folder: of the run.
        settings: which JSON can hold.
        done: steps before this start.
    """
    path = folder / RECORD_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if done and path.is_file() else {}
    start = {"step": done} | {name: settings[name] for name in FREE if name in settings}
    start |= {"command": shlex.join(sys.argv), "versions": versions(), "commit": commit()}
    record = settings | {"starts": [*before.get("starts", []), start]}
    write_text(path, json.dumps(record, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a run depends on; None where one is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with "+" after it where files were changed."""
    folder = Path(__file__).parent
    try:
        answers = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (
                ["ls-files", "--error-unmatch", Path(__file__).name],  # not that of a folder around an installation
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[1].strip() + ("+" if answers[2].strip() else "")
