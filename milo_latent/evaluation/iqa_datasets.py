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
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        return [row for row in rows if any(cell.strip() for cell in row)]


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"Expected a score in {path}, got {text!r}.") from error


def _cells(row: list[str], count: int, path: Path) -> list[str]:
    if len(row) < count:
        raise ValueError(f"Expected {count} values in each row of {path}, got {row}. Is the file whole?")
    return [cell.strip() for cell in row]


def _kind(name: str, path: Path) -> str:
    """Return the part of an image's name that says its distortion, such as 01 of I01_01_05.png."""
    parts = re.split(r"[_.]", name)
    if len(parts) < 4:
        raise ValueError(f"Expected names such as I01_01_05.png in {path}, got {name!r}. Is the file whole?")
    return parts[1]


def load_kadid10k(folder: Path) -> list[Rating]:
    """Read KADID-10k: `dmos.csv` (dist_img, ref_img, dmos, var) and `images/`."""
    path, images = folder / "dmos.csv", folder / "images"
    rows = [_cells(row, 3, path) for row in _rows(path)[1:]]
    return [Rating(images / ref, images / dist, _kind(dist, path), _number(dmos, path)) for dist, ref, dmos, *_ in rows]


def load_tid2013(folder: Path) -> list[Rating]:
    """Read TID2013: `mos_with_names.txt`, `reference_images/` and `distorted_images/`, names in any case."""
    path = folder / "mos_with_names.txt"
    references = _by_lower_name(folder / "reference_images")
    distorted = _by_lower_name(folder / "distorted_images")
    ratings = []
    for row in _rows(path, delimiter=" "):
        score, name = _cells(row, 2, path)[0], row[-1].lower()
        reference = name.split("_")[0] + ".bmp"
        ratings.append(
            Rating(
                references.get(reference, folder / "reference_images" / reference),
                distorted.get(name, folder / "distorted_images" / name),
                _kind(name, path),
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


CSIQ_COLUMNS = ("image", "dst_type", "dst_lev", "dmos")


def load_csiq(folder: Path) -> list[Rating]:
    """Read CSIQ: `csiq.DMOS.csv`, `src_imgs/`, `dst_imgs/`.

    The table is the published workbook's sheet all_by_image, saved as CSV; in that sheet, empty rows and columns come
    before the header (image, dst_idx, dst_type, dst_lev, dmos_std, dmos). Its DMOS is 0 for the best, so 1 - DMOS is
    the quality here.
    """
    path = folder / "csiq.DMOS.csv"
    rows = [[cell.strip() for cell in row] for row in _rows(path)]
    first = next((index for index, row in enumerate(rows) if set(CSIQ_COLUMNS) <= set(row)), None)
    if first is None:
        raise ValueError(
            f"Expected the columns {', '.join(CSIQ_COLUMNS)} in {path}. Save the sheet all_by_image of csiq.DMOS.xlsx."
        )
    places = [rows[first].index(column) for column in CSIQ_COLUMNS]
    ratings = []
    for row in rows[first + 1 :]:
        image, tag, level, dmos = (_cells(row, max(places) + 1, path)[place] for place in places)
        if tag.lower() not in CSIQ_FOLDERS:
            raise ValueError(f"Expected one of {', '.join(CSIQ_FOLDERS)} as dst_type in {path}, got {tag!r}.")
        place, part = CSIQ_FOLDERS[tag.lower()]
        dist = folder / "dst_imgs" / place / f"{image}.{part}.{level}.png"
        ratings.append(Rating(folder / "src_imgs" / f"{image}.png", dist, tag, 1.0 - _number(dmos, path)))
    return ratings


def load_pipal(folder: Path) -> list[Rating]:
    """Read PIPAL's training part: `Train_Label/*.txt` (name,score), `Train_Ref/`, and the distorted images.

    The latter come in four archives, `Distortion_1` to `Distortion_4`; folders of any name and depth are searched.
    """
    labels = sorted((folder / "Train_Label").glob("*.txt"))
    if not labels:
        raise FileNotFoundError(f"Expected PIPAL's labels in {folder / 'Train_Label'}, found no .txt there.")
    references = folder / "Train_Ref"
    places = {path.name: path for path in folder.rglob("*.bmp") if path.parent != references}
    ratings = []
    for label in labels:
        for row in _rows(label):
            name, score, *_ = _cells(row, 2, label)
            reference = references / f"{name.split('_')[0]}.bmp"
            ratings.append(
                Rating(reference, places.get(name, folder / name), _kind(name, label), _number(score, label))
            )
    return ratings


LOADERS: dict[str, Callable[[Path], list[Rating]]] = {
    "csiq": load_csiq,
    "kadid10k": load_kadid10k,
    "pipal": load_pipal,
    "tid2013": load_tid2013,
}
