"""Readers of rated image sets in their published layouts."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from milo_latent.checks import check_file, shortened
from milo_latent.structure import refusing_damage


@dataclass(frozen=True)
class Rating:
    """One rated pair of image files."""

    ref: Path
    dist: Path
    kind: str  # of distortion
    opinion: float  # higher is better, on the scale of its data set


def _rows(path: Path, delimiter: str = ",") -> list[list[str]]:
    check_file(path, "a file of opinion scores", "Is this the right folder?")
    with refusing_damage(f"Expected a table in {path}"), path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        return [row for row in rows if any(cell.strip() for cell in row)]


def _opinion(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"Expected an opinion score in {path}, got {shortened(text)!r}.") from error


def _cells(row: list[str], count: int, path: Path) -> list[str]:
    if len(row) < count:
        raise ValueError(f"Expected {count} values in each row of {path}, got {shortened(row)}. Is the file whole?")
    return [cell.strip() for cell in row]


def _kind(name: str, path: Path) -> str:
    """Return the part of a file name that tells the kind of distortion, such as 01 in I01_01_05.png."""
    parts = re.split(r"[_.]", name)
    if len(parts) < 4:
        raise ValueError(f"Expected names such as I01_01_05.png in {path}, got {shortened(name)!r}. Is the file whole?")
    return parts[1]


def load_kadid10k(folder: Path) -> list[Rating]:
    """Read KADID-10k: `dmos.csv` (dist_img, ref_img, dmos, var; its DMOS is higher for better images) and `images/`."""
    path, images = folder / "dmos.csv", folder / "images"
    rows = [_cells(row, 3, path) for row in _rows(path)[1:]]
    return [
        Rating(images / ref, images / dist, _kind(dist, path), _opinion(dmos, path)) for dist, ref, dmos, *_ in rows
    ]


def load_tid2013(folder: Path) -> list[Rating]:
    """Read TID2013: `mos_with_names.txt`, `reference_images/` and `distorted_images/`; the case of names is ignored."""
    path = folder / "mos_with_names.txt"
    references = _by_lower_name(folder / "reference_images")
    distorted = _by_lower_name(folder / "distorted_images")
    ratings = []
    for row in _rows(path, delimiter=" "):
        score, name = _cells(row, 2, path)[0], row[-1].lower()
        reference = name.split("_")[0] + ".bmp"
        ref = references.get(reference, folder / "reference_images" / reference)
        dist = distorted.get(name, folder / "distorted_images" / name)
        ratings.append(Rating(ref, dist, _kind(name, path), _opinion(score, path)))
    return ratings


def _by_lower_name(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in folder.iterdir()} if folder.is_dir() else {}


CSIQ_FOLDERS = {  # from dst_type in the table to the folder under dst_imgs and a part of the file name
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

    The table is the sheet all_by_image of the published workbook, saved as CSV. Empty rows and columns precede the
    header in that sheet (image, dst_idx, dst_type, dst_lev, dmos_std, dmos). Its DMOS is 0 for the best image, so the
    opinion is 1 - DMOS.
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
            raise ValueError(
                f"Expected one of {', '.join(CSIQ_FOLDERS)} as dst_type in {path}, got {shortened(tag)!r}."
            )
        place, part = CSIQ_FOLDERS[tag.lower()]
        dist = folder / "dst_imgs" / place / f"{image}.{part}.{level}.png"
        ratings.append(Rating(folder / "src_imgs" / f"{image}.png", dist, tag, 1.0 - _opinion(dmos, path)))
    return ratings


def load_pipal(folder: Path) -> list[Rating]:
    """Read PIPAL's training part: `Train_Label/*.txt` (name,score), `Train_Ref/`, and the distorted images.

    The distorted images are published as four archives, `Distortion_1` to `Distortion_4`; they are found in folders of
    any name and depth.
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
            ref, dist = references / f"{name.split('_')[0]}.bmp", places.get(name, folder / name)
            ratings.append(Rating(ref, dist, _kind(name, label), _opinion(score, label)))
    return ratings


LOADERS: dict[str, Callable[[Path], list[Rating]]] = {
    "csiq": load_csiq,
    "kadid10k": load_kadid10k,
    "pipal": load_pipal,
    "tid2013": load_tid2013,
}
