"""What image networks are trained to lower: plain errors, MILO's error, and the curricula of the paper."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from milo_latent.checks import check_choice
from milo_latent.guidance.curriculum import curriculum_weight
from milo_latent.metric.network import MILO, open_metric

ObjectiveName = Literal["mae", "log-mse", "milo", "log-milo", "linear", "cosine", "milo-through-mask"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
WITHOUT_MASK = ("mae", "log-mse")
CURRICULA = ("linear", "cosine")
LOG_OFFSET = (
    1e-4  # of squared errors in [0, 1], and of E: what nobody sees, such as PSNRs above 40 dB, is hardly rewarded
)


class Objective:
    """A loss of restored images against clean ones; but for one, no gradient passes through the mask of the metric.

    With the visibility mask M of MILO, (B, 1, H, W), and the curriculum's weight W, the objectives are

    - "mae": mean(|pred - target|);
    - "log-mse": mean over images of log(mean((pred - target)^2) + 1e-4), minus the mean PSNR up to a factor;
    - "milo": mean(M * |pred - target|), MILO's error E;
    - "log-milo": mean over images of log(E + 1e-4): strong and weak degradations count alike;
    - "linear" and "cosine": mean(W(progress) * |pred - target|): less visible regions first, visible ones last;
    - "milo-through-mask": E with the gradient through M, too, for comparison alone. A network learns to close the mask
      and not the difference.

    Args:
        name: one of the seven.
        metric: for images or latents, or what `MILO.from_pretrained` takes; only its mask is used, which "mae" and
            "log-mse" do without.

    Raises:
        TypeError: if `metric` is no MILO, or missing.
        ValueError: for another name.

    Source: MILO (ACM TOG 44(6), 2025) for E and the curriculum; the normalisation of W to mean 1 is own.
    """

    def __init__(self, name: str, metric: MILO | str | Path | None = None) -> None:
        check_choice("objective", name, OBJECTIVES)
        self.name, self.metric = name, open_metric(metric) if name not in WITHOUT_MASK else None

    def __call__(self, pred: Tensor, target: Tensor, *, progress: float = 0.0) -> Tensor:
        """Return the loss, a scalar.

        Args:
            pred: restored, (B, C, H, W).
            target: clean, of the same shape.
            progress: share of the training that is done, in [0, 1]; only the curricula depend on it.
        """
        pred = pred.float()
        if self.name == "log-mse":
            return ((pred - target).square().mean(dim=(1, 2, 3)) + LOG_OFFSET).log().mean()
        error = (pred - target).abs()
        if self.name in WITHOUT_MASK:
            return error.mean()
        error = self._weight(pred, target, progress) * error
        if self.name == "log-milo":
            return (error.mean(dim=(1, 2, 3)) + LOG_OFFSET).log().mean()
        return error.mean()

    def _weight(self, pred: Tensor, target: Tensor, progress: float) -> Tensor:
        """Return the weight of every pixel, (B, 1, H, W): M, or W(progress)."""
        assert self.metric is not None
        through_mask = self.name == "milo-through-mask"
        # in bfloat16, masks are off by some 8 %
        with torch.set_grad_enabled(through_mask), torch.autocast(pred.device.type, enabled=False):
            mask = self.metric.to(pred.device).mask(dist=pred, ref=target.float())
        return curriculum_weight(mask, progress, schedule=self.name) if self.name in CURRICULA else mask  # type: ignore[arg-type]


def training_progress(step: int, steps: int) -> float:
    """Return the share of a run that is done at `step`: 0 at its first step, 1 at its last."""
    return min(step / max(steps - 1, 1), 1.0)


def with_progress(
    draw: Callable[[int, int], tuple[Tensor, ...]], steps: int
) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Add the share of the training that is done, a scalar, to the batches of `draw(step, process)`."""
    return lambda step, process_index: (
        *draw(step, process_index),
        torch.tensor(training_progress(step, steps), dtype=torch.float64),
    )


def add_objective_options(parser: argparse.ArgumentParser, *, default: ObjectiveName) -> None:
    """Add the options from which `open_objective` makes an objective."""
    parser.add_argument("--objective", choices=OBJECTIVES, default=default)
    parser.add_argument("--metric", default="milo-image", help="MILO_I, whose mask most objectives use")


def open_objective(options: argparse.Namespace) -> Objective:
    """Return the objective that `add_objective_options` was told."""
    plain = options.objective in WITHOUT_MASK
    return Objective(options.objective, None if plain else options.metric)


def objective_settings(options: argparse.Namespace) -> dict[str, str | None]:
    """Return what settles a run: the objective, and the metric only where it is used."""
    return {"objective": options.objective} | ({"metric": None} if options.objective in WITHOUT_MASK else {})
