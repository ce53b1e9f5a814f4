"""Rated image sets in the layouts in which they are published; a user points at the folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rating:
    """One rated pair.

    Args:
        ref: file of the reference.
        dist: file of the distorted image.
        kind: of distortion.
        quality: opinion score, of which higher means better.
    """

    ref: Path
    dist: Path
    kind: str
    quality: float


def _rows(path: Path, delimiter: str = ",") -> list[list[str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the opinion scores in {path}, which does not exist. Is this the right folder?"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [row for row in csv.reader(file, delimiter=delimiter, skipinitialspace=True) if row]


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"Expected a score in {path}, got {text!r}.") from error


def load_kadid10k(folder: Path) -> list[Rating]:
    """Read KADID-10k: `dmos.csv` (dist_img, ref_img, dmos, var) and `images/`."""
    rows = _rows(folder / "dmos.csv")[1:]
    images = folder / "images"
    return [
        Rating(images / ref, images / dist, dist.split("_")[1], _number(dmos, folder / "dmos.csv"))
        for dist, ref, dmos, *_ in rows
    ]


def load_tid2013(folder: Path) -> list[Rating]:
    """Read TID2013: `mos_with_names.txt`, `reference_images/` and `distorted_images/`, names in any case."""
    path = folder / "mos_with_names.txt"
    references = _by_lower_name(folder / "reference_images")
    distorted = _by_lower_name(folder / "distorted_images")
    ratings = []
    for row in _rows(path, delimiter=" "):
        score, name = row[0], row[-1].lower()
        reference = name.split("_")[0] + ".bmp"
        ratings.append(
            Rating(
                references.get(reference, folder / "reference_images" / reference),
                distorted.get(name, folder / "distorted_images" / name),
                name.split("_")[1],
                _number(score, path),
            )
        )
    return ratings


def _by_lower_name(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in folder.iterdir()} if folder.is_dir() else {}


CSIQ_FOLDERS = {  # tag in the table -> folder under dst_imgs and part of the file name
    "noise": ("awgn", "AWGN"),
    "jpeg": ("jpeg", "JPEG"),
    "jpeg 2000": ("jpeg2000", "jpeg2000"),
    "fnoise": ("fnoise", "fnoise"),
    "blur": ("blur", "BLUR"),
    "contrast": ("contrast", "contrast"),
}


def load_csiq(folder: Path) -> list[Rating]:
    """Read CSIQ: `csiq.DMOS.csv`, `src_imgs/`, `dst_imgs/`.

    The table is the published sheet all_by_image, saved as CSV: image, dst_idx, dst_type, dst_lev,
    dmos_std, dmos. Its DMOS is 0 for the best, so 1 - DMOS is the quality here.
    """
    path = folder / "csiq.DMOS.csv"
    ratings = []
    for image, _, tag, level, _, dmos, *_ in (row for row in _rows(path) if row[0] != "image"):
        place, part = CSIQ_FOLDERS[tag.strip().lower()]
        dist = folder / "dst_imgs" / place / f"{image}.{part}.{level}.png"
        ratings.append(Rating(folder / "src_imgs" / f"{image}.png", dist, tag, 1.0 - _number(dmos, path)))
    return ratings


def load_pipal(folder: Path) -> list[Rating]:
    """Read PIPAL's training part: `Train_Label/*.txt` (name,score), `Train_Ref/`, and `Train_Dist*/`."""
    labels = sorted((folder / "Train_Label").glob("*.txt"))
    if not labels:
        raise FileNotFoundError(f"Expected PIPAL's labels in {folder / 'Train_Label'}, found no .txt there.")
    places = {path.name: path for part in folder.glob("Train_Dist*") for path in part.rglob("*.bmp")}
    ratings = []
    for label in labels:
        for name, score, *_ in _rows(label):
            reference = folder / "Train_Ref" / f"{name.split('_')[0]}.bmp"
            dist = places.get(name, folder / "Train_Dist" / name)
            ratings.append(Rating(reference, dist, re.split(r"[_.]", name)[1], _number(score, label)))
    return ratings


LOADERS: dict[str, Callable[[Path], list[Rating]]] = {
    "csiq": load_csiq,
    "kadid10k": load_kadid10k,
    "pipal": load_pipal,
    "tid2013": load_tid2013,
}
