"""Which pixels weigh how much: MILO's curriculum, as sampling or training goes on, and DiffBIR's flatness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch, check_choice, check_range

GRAY = (0.2989, 0.5870, 0.1140)  # weights of R, G and B in DiffBIR's official code
LEVELS = 4  # of MILO: its mask lies in (0, LEVELS)
Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
AnySchedule = Schedule | Callable[[float], float]


def check_schedule(schedule: AnySchedule) -> None:
    """Raise ValueError unless `schedule` is a function or the name of one."""
    if not callable(schedule):
        check_choice("schedule", schedule, SCHEDULES)


def curriculum_alpha(progress: float, *, schedule: AnySchedule = "cosine") -> float:
    """Return how far the emphasis has moved from less visible (0) to more visible regions (1).

    Args:
        progress: share of the guided steps already done, in [0, 1].
        schedule: "linear", "cosine", "constant", which stays half way and so weights all regions alike, or a function
            of progress that returns alpha in [0, 1].

    Raises:
        ValueError: if `progress`, or what the function returns, is outside [0, 1], or `schedule` is unknown.

    Source: the names linear and cosine are MILO's (ACM TOG 44(6), 2025); no formula is public, so these are own.

    Example:
        >>> [curriculum_alpha(p, schedule="linear") for p in (0.0, 0.25, 1.0)]
        [0.0, 0.25, 1.0]
    """
    check_schedule(schedule)
    check_range("progress", progress, 0.0, 1.0, "Pass step_index / max(num_steps - 1, 1).")
    if callable(schedule):
        alpha = float(schedule(progress))
        check_range("schedule(progress)", alpha, 0.0, 1.0, "0 emphasises the less visible regions, 1 the more visible.")
        return alpha
    if schedule == "constant":
        return 0.5
    return progress if schedule == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0


def curriculum_weight(mask: Tensor, progress: float, *, schedule: AnySchedule = "cosine") -> Tensor:
    """Weight latent pixels so that less visible regions come first and visible ones last.

    Args:
        mask: visibility mask M, (B, 1, h, w), in (0, LEVELS).
        progress: share of the guided steps already done, in [0, 1].
        schedule: how the emphasis moves, as of `curriculum_alpha`.

    Returns:
        Weight W, (B, 1, h, w), >= 0, with mean 1 for each sample, in the dtype and on the device of `mask`.

    Raises:
        ValueError: if `progress` is outside [0, 1], `schedule` is unknown, or `mask` is not (B, 1, h, w).

    Source: the idea, less visible regions first, is MILO's (ACM TOG 44(6), 2025); the formula is our reading of it.

    Example:
        >>> import torch
        >>> round(curriculum_weight(torch.full((2, 1, 8, 8), 1.0), progress=0.25).mean().item(), 6)
        1.0
    """
    check_batch("mask", mask)
    alpha, visible = curriculum_alpha(progress, schedule=schedule), mask / LEVELS
    weight = (1.0 - alpha) * (1.0 - visible) + alpha * visible
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    # a mask that is 0 or LEVELS everywhere leaves nothing to prefer, so all pixels weigh alike; NaN stays
    return torch.where(mean <= 0, torch.ones_like(weight), weight / mean.clamp(min=torch.finfo(mean.dtype).tiny))


def flatness(image: Tensor) -> Tensor:
    """Return 1 where an image is flat and 0 at strong edges: 1 - tanh(sum of Sobel magnitudes in each 2x2 block).

    Args:
        image: (B, 3, H, W), in [0, 1].

    Returns:
        Weight, (B, 1, H, W), constant in each block.

    Source: DiffBIR, equation 6.
    """
    gray = (image * image.new_tensor(GRAY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    smooth, slope = image.new_tensor([1.0, 2.0, 1.0]), image.new_tensor([1.0, 0.0, -1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]  # (2, 1, 3, 3)
    gradient = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), kernels)
    edges = F.avg_pool2d(gradient.norm(dim=1, keepdim=True), 2, ceil_mode=True, divisor_override=1).tanh()
    return 1.0 - F.interpolate(edges, scale_factor=2)[..., : image.shape[2], : image.shape[3]]
