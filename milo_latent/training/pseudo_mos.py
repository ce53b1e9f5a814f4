"""Pseudo-MOS: full-reference metrics, each mapped to the scale of opinions, label pairs that nobody has judged."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.evaluation.conditions import ConditionScores, read_condition_means, score_conditions
from milo_latent.evaluation.correlation import spearman
from milo_latent.evaluation.logistic import Logistic, fit_logistic
from milo_latent.evaluation.metrics import FullReference, by_name
from milo_latent.files import write_text
from milo_latent.programs import run_program
from milo_latent.training.data.crops import list_images, spread_over

DEFAULT_MEMBERS = ("ssim", "ms-ssim", "vif")  # beside MILO_I, whose weights the user names
OPINION_RANGE = 4.0  # of KADID-10k's scale, 1 to 5


@dataclass(frozen=True)
class Calibration:
    """From a metric's damage to opinions.

    Args:
        curve: to the mean opinion, higher is better.
        best: damage of an image compared with itself, whose label is 0.
    """

    curve: Logistic
    best: float

    def __call__(self, damage: Tensor) -> Tensor:
        """Return labels, 0 = identical, towards 1 = worst."""
        identical = self.curve(torch.tensor(self.best, dtype=torch.float64))
        return ((identical - self.curve(damage)) / OPINION_RANGE).clamp(0.0, 1.0)


def calibrate(metric: FullReference, damage: Tensor, opinions: Tensor) -> Calibration:
    """Fit a metric to opinions.

    Args:
        metric: any.
        damage: its scores, (n,), such as means over photos of the 125 conditions.
        opinions: (n,), higher is better.
    """
    grey = torch.linspace(0.2, 0.8, 192).expand(1, 3, 192, 192)
    return Calibration(fit_logistic(damage, opinions), metric.damage(ref=grey, dist=grey).item())


# Fitted by this module's command (--count 4 --side 192, photos of imagenet256) to the condition means of KADID-10k;
# "milo:MILO" is the official MILO_I, by the name of its file.
DEFAULT_CALIBRATIONS: dict[str, Calibration] = {
    "milo:MILO": Calibration(Logistic(4.71629, 1.44956, 0.0979642, -0.0707756), 0),
    "milo:milo-image": Calibration(Logistic(4.52205, 0.850838, 0.187662, -0.112008), 0),
    "ssim": Calibration(Logistic(602.336, 0.961366, -3.26374, -0.434506), -1),
    "ms-ssim": Calibration(Logistic(1657.85, 1.90371, -1.46161, -0.0713761), -1),
    "vif": Calibration(Logistic(7.87998, -212.155, 6.12064, -1.74695), -1),
    "psnr": Calibration(Logistic(4.60943, 2.19596, -27.0564, -3.46964), -60),
    "mae": Calibration(Logistic(4.78181, 2.33024, 0.020368, -0.0213693), 0),
}


class Ensemble:
    """Metrics that together label pairs of images.

    Args:
        members: plain metrics.
        calibrations: of each, by name.

    Raises:
        ValueError: if a member has no calibration; the way out is the command of this module.
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
        """Return the label of every member, (B, members), for images (B, 3, H, W); 0 = identical, towards 1 = worst."""
        each = [self.calibrations[member.name](member.damage(ref=ref, dist=dist)) for member in self.members]
        return torch.stack(each, dim=1)

    def __call__(self, *, ref: Tensor, dist: Tensor) -> Tensor:
        """Return the mean label of the members, (B,)."""
        return self.labels(ref=ref, dist=dist).mean(dim=1)


def member_agreement(labels: Tensor) -> Tensor:
    """Return Spearman's correlation between the members, (members, members), of labels (n, members)."""
    count = labels.shape[1]
    rows = [[spearman(labels[:, first], labels[:, second]) for second in range(count)] for first in range(count)]
    return torch.tensor(rows)


def format_agreement(names: Sequence[str], matrix: Tensor) -> str:
    """Return the matrix of `member_agreement` as a table."""
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{name:>{width}}" for name in names)]
    for name, row in zip(names, matrix.tolist(), strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{value:>{width}.3f}" for value in row))
    return "\n".join(lines)


def calibrate_on_conditions(
    metrics: Sequence[FullReference], scores: ConditionScores, opinions: Tensor
) -> dict[str, Calibration]:
    """Calibrate each metric by its means over photos of the 125 conditions."""
    return {metric.name: calibrate(metric, scores.damage[metric.name].mean(dim=0), opinions) for metric in metrics}


def write_calibrations(path: Path, calibrations: dict[str, Calibration]) -> None:
    """Write calibrations as JSON."""
    write_text(path, json.dumps({name: asdict(each) for name, each in calibrations.items()}, indent=2) + "\n")


def read_calibrations(path: str | Path) -> dict[str, Calibration]:
    """Read what `write_calibrations` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of calibrations, got {path}, which does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Calibration(Logistic(**each["curve"]), each["best"]) for name, each in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"Expected calibrations in {path}: {error}") from error


def build_ensemble(names: Sequence[str], calibrations: str | Path | None = None) -> Ensemble:
    """Return the ensemble of metrics by name.

    Args:
        names: as of `full_reference.by_name`.
        calibrations: a file; None takes the shipped ones, of MILO_I (the official MILO.pth and our milo-image), SSIM,
            MS-SSIM, VIF, PSNR and MAE.
    """
    table = DEFAULT_CALIBRATIONS if calibrations is None else read_calibrations(calibrations)
    return Ensemble([by_name(name) for name in names], table)


def main(arguments: list[str] | None = None) -> None:
    """Calibrate metrics on photos under the 125 conditions, and report how they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", nargs="+", required=True, help="folders of clean training photos")
    parser.add_argument("--count", type=int, default=24, help="photos used, spread over the folders")
    parser.add_argument("--side", type=int, default=256, help="pixels of the centred square that is scored")
    parser.add_argument("--conditions", type=Path, required=True, help="CSV of distortion, level, dmos_mean")
    parser.add_argument("--members", nargs="+", default=list(DEFAULT_MEMBERS), help="such as milo:MILO.pth ssim vif")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    options = parser.parse_args(arguments)
    photos = spread_over(list_images(options.photos), options.count)
    metrics = [by_name(name) for name in options.members]
    opinions = read_condition_means(options.conditions)
    scores = score_conditions(metrics, photos, side=options.side)
    calibrations = calibrate_on_conditions(metrics, scores, opinions)
    write_calibrations(options.output, calibrations)
    labels = torch.stack([calibrations[metric.name](scores.damage[metric.name].flatten()) for metric in metrics], dim=1)
    print(format_agreement([metric.name for metric in metrics], member_agreement(labels)))
    means = labels.reshape(len(photos), -1, len(metrics)).mean(dim=(0, 2))
    print(f"SRCC of the ensemble with the opinions of {len(opinions)} conditions: {spearman(-means, opinions):.3f}")


if __name__ == "__main__":
    sys.exit(run_program(main))
