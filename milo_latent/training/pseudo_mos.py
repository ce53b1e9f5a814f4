"""Pseudo-DMOS: full-reference metrics, each mapped to the scale of opinions, label pairs that nobody has judged."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.atomic import write_text
from milo_latent.checks import check_file, check_range
from milo_latent.evaluation.agreement import Logistic, fit_logistic, spearman
from milo_latent.evaluation.distortion_settings import measure_settings, read_setting_opinions
from milo_latent.evaluation.metrics import FullReference, by_name
from milo_latent.evaluation.reports import format_rows
from milo_latent.programs import run_program
from milo_latent.structure import read_json, refusing_damage
from milo_latent.training.data.crops import list_images, spread_over

DEFAULT_MEMBERS = ("ssim", "ms-ssim", "vif")  # MILO_I is not among them, since the user names its weights
OPINION_RANGE = 4.0  # KADID-10k's opinions lie between 1 and 5
LARGEST = 1e12  # of the values of a calibration


@dataclass(frozen=True)
class Calibration:
    """A mapping from a metric's errors to labels; ValueError for values that are not finite and a scale of 0."""

    curve: Logistic  # from errors to mean opinions, higher is better
    best: float  # error of an image compared with itself, whose label is 0

    def __post_init__(self) -> None:
        """Refuse what cannot label."""
        for name, value in {**asdict(self.curve), "best": self.best}.items():
            check_range(f"{name} of a calibration", value, -LARGEST, LARGEST)
        if self.curve.scale == 0:
            raise ValueError("Expected a `scale` of the calibration's curve other than 0.")

    def __call__(self, errors: Tensor) -> Tensor:
        """Return labels (DMOS), 0 = identical, towards 1 = worst."""
        identical = self.curve(torch.tensor(self.best, dtype=torch.float64))
        return ((identical - self.curve(errors)) / OPINION_RANGE).clamp(0.0, 1.0)


def calibrate(metric: FullReference, errors: Tensor, opinions: Tensor) -> Calibration:
    """Fit a metric's errors, (n,), such as the means over photos for each distortion setting, to opinions, (n,)."""
    gray = torch.linspace(0.2, 0.8, 192).expand(1, 3, 192, 192)
    return Calibration(fit_logistic(errors, opinions), metric.error(ref=gray, dist=gray).item())


# Fitted by this module's command (--count 4 --side 192, photos of imagenet256) to KADID-10k's mean opinions of the 125
# distortion settings. "milo:MILO" is the official MILO_I, by the name of its file.
DEFAULT_CALIBRATIONS: dict[str, Calibration] = {
    "milo:MILO": Calibration(Logistic(4.71629, 1.44956, 0.0979642, -0.0707756), 0),
    "milo:milo-image": Calibration(Logistic(4.52205, 0.850838, 0.187662, -0.112008), 0),
    "ssim": Calibration(Logistic(602.336, 0.961366, -3.26374, -0.434506), -1),
    "ms-ssim": Calibration(Logistic(1657.85, 1.90371, -1.46161, -0.0713761), -1),
    "vif": Calibration(Logistic(7.87998, -212.155, 6.12064, -1.74695), -1),
    "psnr": Calibration(Logistic(4.60943, 2.19596, -27.0564, -3.46964), -60),
    "mae": Calibration(Logistic(4.78181, 2.33024, 0.020368, -0.0213693), 0),
}


def opinions_like(metric: FullReference, photos: Sequence[Path], *, side: int) -> Tensor:
    """Return what `metric`, whose errors lie between 0 and 1, says in people's place of each setting, (125,)."""
    return 5.0 - OPINION_RANGE * measure_settings([metric], photos, side=side)[metric.name].mean(dim=0)


class Ensemble:
    """Metrics that together label pairs of images, with a calibration for the name of each.

    Raises:
        ValueError: if there is no member, or one without a calibration; the message names the command that makes one.
    """

    def __init__(self, members: Sequence[FullReference], calibrations: dict[str, Calibration]) -> None:
        missing = [member.name for member in members if member.name not in calibrations]
        if missing or not members:
            raise ValueError(
                f"Expected a calibration of every member, missing {missing or 'any member'}. "
                "Make one: python -m milo_latent.training.pseudo_mos --help"
            )
        self.members, self.calibrations = list(members), calibrations

    def labels(self, *, ref: Tensor, dist: Tensor) -> Tensor:
        """Return each member's label (DMOS), (B, members), for images (B, 3, H, W); 0 = identical, towards 1 = worst.

        The label of a pair is their mean.
        """
        each = [self.calibrations[member.name](member.error(ref=ref, dist=dist)) for member in self.members]
        return torch.stack(each, dim=1)


def member_agreement(labels: Tensor) -> list[list[float]]:
    """Return Spearman's correlation of each member with each, for labels (n, members)."""
    return [[spearman(first, second) for second in labels.T] for first in labels.T]


def format_agreement(names: Sequence[str], matrix: list[list[float]]) -> str:
    """Return the rows of `member_agreement` as a table."""
    rows = [dict(zip(names, (f"{value:.3f}" for value in row), strict=True)) for row in matrix]
    return format_rows([{"SRCC": name, **row} for name, row in zip(names, rows, strict=True)])


def write_calibrations(path: Path, calibrations: dict[str, Calibration]) -> None:
    """Write calibrations as JSON."""
    write_text(path, json.dumps({name: asdict(each) for name, each in calibrations.items()}, indent=2) + "\n")


def read_calibrations(path: str | Path) -> dict[str, Calibration]:
    """Read what `write_calibrations` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else.
    """
    path = Path(path)
    check_file(path, "a file of calibrations")
    content = read_json(path)
    with refusing_damage(f"Expected calibrations in {path}"):
        return {name: Calibration(Logistic(**each["curve"]), each["best"]) for name, each in content.items()}


def build_ensemble(names: Sequence[str], calibrations: str | Path | None = None) -> Ensemble:
    """Return the ensemble of the metrics with these names, as in `evaluation.metrics.by_name`.

    `calibrations` is a file; None takes `DEFAULT_CALIBRATIONS`.
    """
    table = DEFAULT_CALIBRATIONS if calibrations is None else read_calibrations(calibrations)
    return Ensemble([by_name(name) for name in names], table)


def main(arguments: list[str] | None = None) -> None:
    """Calibrate metrics on photos under the 125 distortion settings, and report how they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", nargs="+", required=True, help="folders of clean training photos")
    parser.add_argument("--count", type=int, default=24, help="number of photos, spread over the folders")
    parser.add_argument("--side", type=int, default=256, help="side in pixels of the central square that is measured")
    scale = parser.add_mutually_exclusive_group(required=True)
    scale.add_argument("--opinions", type=Path, help="CSV of distortion, level, dmos_mean: labels on people's scale")
    scale.add_argument("--like", help="milo:MILO.pth …: labels on this metric's scale, which ranges from 0 to 1")
    parser.add_argument("--members", nargs="+", default=DEFAULT_MEMBERS, help="such as milo:MILO.pth ssim vif")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    options = parser.parse_args(arguments)
    photos = spread_over(list_images(options.photos), options.count)
    metrics = [by_name(name) for name in options.members]
    if options.like is None:
        opinions = read_setting_opinions(options.opinions)
    else:
        opinions = opinions_like(by_name(options.like), photos, side=options.side)
    errors = measure_settings(metrics, photos, side=options.side)
    calibrations = {each.name: calibrate(each, errors[each.name].mean(dim=0), opinions) for each in metrics}
    write_calibrations(options.output, calibrations)
    labels = torch.stack([calibrations[name](values.flatten()) for name, values in errors.items()], dim=1)
    print(format_agreement(list(errors), member_agreement(labels)))
    means = labels.mean(dim=1).reshape(len(photos), -1).mean(dim=0)
    print(f"SRCC of the ensemble with the opinions of {len(opinions)} settings: {spearman(-means, opinions):.3f}")


if __name__ == "__main__":
    sys.exit(run_program(main))
