"""The benchmark that needs no rated images: predicted quality of 125 conditions against people's mean opinions.

A condition is a kind of distortion at a level. People rated each for 81 photos of KADID-10k; here the same conditions
are made from any photos, a metric scores them, and the means over photos are compared.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.distortions import DISTORTIONS, LEVELS, distort
from milo_latent.evaluation.metrics import FullReference
from milo_latent.files import read_image

CONDITIONS = tuple((kind, level) for kind in DISTORTIONS for level in LEVELS)


@dataclass(frozen=True)
class ConditionScores:
    """Scores of photos under all conditions.

    Args:
        damage: by metric, (photos, 125), higher means worse, in the order of `CONDITIONS`.
        photos: their names.
    """

    damage: dict[str, Tensor]
    photos: tuple[str, ...]


def read_condition_means(path: str | Path) -> Tensor:
    """Read the mean opinions of the 125 conditions, higher is better.

    Args:
        path: a table with the columns `distortion` (1 to 25), `level` and `dmos_mean`.

    Returns:
        Means, (125,), in the order of `CONDITIONS`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column or a condition is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a table of the conditions' opinions, got {path}, which does not exist.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    try:
        means = {(int(row["distortion"]), int(row["level"])): float(row["dmos_mean"]) for row in rows}
        ordered = [means[DISTORTIONS[kind].number, level] for kind, level in CONDITIONS]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Expected distortion, level and dmos_mean of 125 conditions in {path}: {error}") from error
    return torch.tensor(ordered, dtype=torch.float64)


def centred_crop(image: Tensor, side: int | None) -> Tensor:
    """Return the centred square of (B, C, H, W), at most `side` wide; all of it for None."""
    if side is None:
        return image
    rows, columns = (min(side, size) for size in image.shape[2:])
    top, left = (image.shape[2] - rows) // 2, (image.shape[3] - columns) // 2
    return image[..., top : top + rows, left : left + columns]


def score_conditions(
    metrics: Sequence[FullReference], photos: Sequence[Path], *, side: int | None = None
) -> ConditionScores:
    """Distort every photo in all 125 ways and score each.

    Args:
        metrics: any.
        photos: image files.
        side: score a centred square of the photos only, to save time.

    Returns:
        The scores.
    """
    damage = {metric.name: torch.zeros(len(photos), len(CONDITIONS), dtype=torch.float64) for metric in metrics}
    with tqdm(total=len(photos) * len(CONDITIONS), desc="Scoring conditions", unit="image", mininterval=5) as progress:
        for row, photo in enumerate(photos):
            ref = centred_crop(read_image(photo), side)
            for column, (kind, level) in enumerate(CONDITIONS):
                dist = distort(ref, kind, level, image_id=photo.stem)
                for metric in metrics:
                    damage[metric.name][row, column] = metric.damage(ref=ref, dist=dist)
                progress.update()
    return ConditionScores(damage, tuple(photo.stem for photo in photos))


def rising_share(damage: Tensor, means: Tensor) -> dict[str, float]:
    """Return how often a metric orders neighbouring levels as people do, by kind.

    Args:
        damage: (photos, 125).
        means: of people, (125,), higher is better.

    Returns:
        By kind, the share of steps from level to level, over all photos, in which the damage rises where people's mean
        falls and falls where it rises.
    """
    scores = damage.reshape(-1, len(DISTORTIONS), len(LEVELS))
    steps = np.sign(np.diff(scores.numpy(), axis=2))
    wanted = -np.sign(np.diff(means.reshape(len(DISTORTIONS), len(LEVELS)).numpy(), axis=1))
    return dict(zip(DISTORTIONS, (steps == wanted[None]).mean(axis=(0, 2)).tolist(), strict=True))
