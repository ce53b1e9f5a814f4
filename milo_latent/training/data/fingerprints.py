"""Fingerprints of data and weights, so that a resumed build or run uses the same ones as when it started."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from milo_latent.metric.loading import weights_path
from milo_latent.resources import sha256


def source_digest(source: str | Path) -> str | None:
    """Return the SHA-256 of a file, or of the configurations and weights in a folder or of a name; None for others."""
    path = weights_path(source)
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return None
    if not (path / "config.json").is_file() and (path / "metric").is_dir():
        path = path / "metric"  # the folder is a pipeline's
    files = sorted(file for file in path.iterdir() if file.suffix in {".json", ".safetensors", ".bin"})
    lines = (f"{file.name} {sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of names and sizes, which is enough to tell apart photos of the same names."""
    lines = (f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def shards_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and sizes of a training set's shards."""
    return files_digest(sorted(folder.glob("shard-*.safetensors")))


def metric_digests(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of weights by metric, for names as in `evaluation.metrics.by_name` that name any."""
    found = {name: source_digest(name.partition(":")[2]) for name in names if ":" in name}
    return {name: digest for name, digest in found.items() if digest is not None}
