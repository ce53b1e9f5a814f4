"""A benchmark without rated images: errors under KADID-10k's 125 distortion settings against people's mean opinions.

A distortion setting is a kind of distortion at a level. People rated each setting on 81 photos of KADID-10k. Here the
same settings are applied to any photos, a metric measures them, and the means over photos are compared.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.checks import check_file
from milo_latent.distortions import DISTORTIONS, LEVELS, distort
from milo_latent.evaluation.metrics import FullReference
from milo_latent.files import read_image
from milo_latent.pictures import center_crop
from milo_latent.structure import refusing_damage

SETTINGS = tuple((kind, level) for kind in DISTORTIONS for level in LEVELS)


def read_setting_opinions(path: str | Path) -> Tensor:
    """Read the mean opinion of each distortion setting.

    Args:
        path: a table with the columns `distortion` (1 to 25), `level` and `dmos_mean` (KADID-10k's name for an opinion
            of which higher is better).

    Returns:
        Mean opinions, (125,), higher is better, in the order of `SETTINGS`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column or a setting is missing.
    """
    path = Path(path)
    check_file(path, "a table of opinions by distortion setting")
    with refusing_damage(f"Expected distortion, level and dmos_mean of 125 settings in {path}"):
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        means = {(int(row["distortion"]), int(row["level"])): float(row["dmos_mean"]) for row in rows}
        ordered = [means[DISTORTIONS[kind].number, level] for kind, level in SETTINGS]
    return torch.tensor(ordered, dtype=torch.float64)


def measure_settings(
    metrics: Sequence[FullReference], photos: Sequence[Path], *, side: int | None = None
) -> dict[str, Tensor]:
    """Distort every photo by all 125 settings and compute the errors.

    Args:
        metrics: metrics with different names.
        photos: image files.
        side: use only the central square of this side, to save time.

    Returns:
        Errors by metric, (photos, 125), in the order of `SETTINGS`.
    """
    errors = {metric.name: torch.zeros(len(photos), len(SETTINGS), dtype=torch.float64) for metric in metrics}
    with tqdm(total=len(photos) * len(SETTINGS), desc="Measuring", unit="image", mininterval=5) as progress:
        for row, photo in enumerate(photos):
            ref = read_image(photo) if side is None else center_crop(read_image(photo), side)
            for column, (kind, level) in enumerate(SETTINGS):
                dist = distort(ref, kind, level, image_id=photo.stem)
                for metric in metrics:
                    errors[metric.name][row, column] = metric.error(ref=ref, dist=dist)
                progress.update()
    return errors


def rising_share(errors: Tensor, opinions: Tensor) -> dict[str, float]:
    """Return how often a metric orders neighboring levels as people do, by kind of distortion.

    Args:
        errors: (photos, 125), in the order of `SETTINGS`.
        opinions: mean opinions, (125,), higher is better.

    Returns:
        By kind, the share of steps from one level to the next, over all photos, in which the error rises where the mean
        opinion falls and falls where it rises.
    """
    by_level = errors.reshape(-1, len(DISTORTIONS), len(LEVELS))
    steps = np.sign(np.diff(by_level.numpy(), axis=2))
    wanted = -np.sign(np.diff(opinions.reshape(len(DISTORTIONS), len(LEVELS)).numpy(), axis=1))
    return dict(zip(DISTORTIONS, (steps == wanted[None]).mean(axis=(0, 2)).tolist(), strict=True))
