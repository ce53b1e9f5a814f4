"""Score many files: matched pairs, one reference against many, resumable tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.checks import check_finite
from milo_latent.files import (
    IMAGE_SUFFIXES,
    LATENT_SUFFIXES,
    read_image,
    read_latents,
    read_latents_metadata,
    write_text,
)
from milo_latent.metric.network import MILO

BATCH_SIZE = 16


@dataclass(frozen=True)
class Pair:
    """Two files to compare, and the name of the comparison in a table."""

    name: str
    ref: Path
    dist: Path


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


def match_pairs(ref: str | Path, dist: str | Path) -> list[Pair]:
    """Pair two files, a file with every file of a folder, or the files of two folders by their names.

    Args:
        ref: reference file, or folder.
        dist: distorted file, or folder.

    Returns:
        Pairs, sorted by name; names are those of `dist`, without suffix where two folders are matched.

    Raises:
        FileNotFoundError: if one is missing, or a folder holds no file that can be scored.
        ValueError: if two folders do not hold the same names, listing those that differ.
    """
    ref, dist = Path(ref), Path(dist)
    for path in (ref, dist):
        if not path.exists():
            raise FileNotFoundError(f"Expected a file or folder to score, got {path}, which does not exist.")
    if ref.is_file():
        candidates = [dist] if dist.is_file() else _scorable(dist)
        return [Pair(path.name, ref, path) for path in candidates]
    if dist.is_file():
        raise ValueError(f"Expected a folder for `dist`, as {ref} is one, got the file {dist}.")
    refs, dists = (_by_stem(folder) for folder in (ref, dist))
    if refs.keys() != dists.keys():
        alone = sorted(refs.keys() ^ dists.keys())
        raise ValueError(f"Expected the same names in {ref} and {dist}, {len(alone)} are in one only: {alone[:5]}.")
    return [Pair(name, refs[name], dists[name]) for name in sorted(refs)]


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = _scorable(folder)
    by_stem = {path.stem: path for path in paths}
    if len(by_stem) < len(paths):
        twice = sorted({path.name for path in paths} - {path.name for path in by_stem.values()})
        raise ValueError(f"Expected each name once in {folder}, whatever its suffix, got these again: {twice[:5]}.")
    return by_stem


def _scorable(folder: Path) -> list[Path]:
    suffixes = IMAGE_SUFFIXES | LATENT_SUFFIXES
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        raise FileNotFoundError(f"Expected images or latents in {folder}, found none of {sorted(suffixes)}.")
    return paths


def is_latents(path: Path) -> bool:
    """Return whether a file is one of latents, by its suffix."""
    return path.suffix.lower() in LATENT_SUFFIXES


def read_input(path: Path, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Read latents, or an image, which `encode` turns into latents where it is given.

    Args:
        path: image or latents.
        encode: from images, (1, 3, H, W), to latents.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: if the file is damaged, or its values are not finite.
    """
    if is_latents(path):
        tensor = read_latents(path)
    else:
        tensor = read_image(path)
        tensor = encode(tensor) if encode is not None else tensor
    check_finite(str(path), tensor)
    return tensor


def check_latent_space(metric: MILO, path: Path) -> None:
    """Raise ValueError if a `.safetensors` file says that its latents are of another VAE than the metric's.

    Args:
        metric: that is to score the file.
        path: any file; only `.safetensors` tells where its latents come from.
    """
    if path.suffix.lower() != ".safetensors" or metric.config.scaling_factor is None:
        return
    metadata = read_latents_metadata(path)
    told = metadata.get("scaling_factor")
    if told is not None and float(told) != metric.config.scaling_factor:
        raise ValueError(
            f"Expected latents of {metric.config.latent_space} (scaling factor {metric.config.scaling_factor:g}), got "
            f"those of {metadata.get('vae', 'another VAE')} ({told}) in {path}. Use that VAE's metric."
        )


@torch.inference_mode()
def score_pairs(
    metric: MILO, pairs: Iterable[Pair], *, encode: Callable[[Tensor], Tensor] | None = None
) -> Iterator[ScoreRow]:
    """Score pairs, in batches where neighbours have one size.

    Args:
        metric: for what the files hold, or for what `encode` makes of them.
        pairs: files to compare.
        encode: from images to latents.

    Yields:
        A row for each pair, in their order; a file of several latents counts with their mean.

    Raises:
        ValueError: for files that are damaged or do not fit each other or the metric.
    """
    remaining = iter(pairs)
    while batch := list(islice(remaining, BATCH_SIZE)):
        for pair in batch:
            check_latent_space(metric, pair.ref)
            check_latent_space(metric, pair.dist)
        tensors = [(read_input(pair.ref, encode), read_input(pair.dist, encode)) for pair in batch]
        shapes = {tensor.shape for each in tensors for tensor in each}
        if len(shapes) == 1 and next(iter(shapes))[0] == 1:
            refs, dists = (torch.cat(each) for each in zip(*tensors, strict=True))
            result = metric.compare(ref=refs, dist=dists)
            scores = list(zip(result.score.tolist(), result.quality.tolist(), strict=True))
        else:
            results = [metric.compare(ref=ref, dist=dist) for ref, dist in tensors]
            scores = [(each.score.mean().item(), each.quality.mean().item()) for each in results]
        for pair, (score, quality) in zip(batch, scores, strict=True):
            yield ScoreRow(pair.name, score, quality)


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
        lines = self.partial.read_text(encoding="utf-8").split("\n")
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
        with self.partial.open("a", encoding="utf-8") as file:
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


def rows_to_json(rows: Iterable[ScoreRow]) -> str:
    """Return the rows as a JSON list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=2)
