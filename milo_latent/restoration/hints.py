"""What a photo seems to need: its noise, JPEG blocks and sharpness, and the task that fits better. Own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.restoration.settings import RestorationSettings

CLEAN_NOISE = 2.5  # standard deviation, of 255, up to which a photo may count as clean
CLEAN_BLOCKS = 1.1  # ratio of steps at the borders of JPEG's blocks up to which a photo may count as clean
SHARP = 0.4  # share of the gradient that a slight blur leaves, below which a photo counts as sharp
SMALL_SIDE = 400  # pixels of the longer side up to which a photo counts as small
SMALLEST_SIDE = 32  # pixels; nothing is said about smaller photos
WINDOW = 512  # pixels of a side of the middle part that is looked at, so that large photos take no longer
ENOUGH = 1000  # values that are neither black nor white; with fewer nothing is said

SMALL = "This is a small, sharp photo; `--task sr` enlarges it by 4."
CLEAN = "This photo looks clean, so there is little to restore."


def noise_level(image: Tensor) -> float:
    """Estimate the standard deviation of the noise in an image, (1, 3, H, W), in units of 1/255; NaN if it cannot.

    The median over every other pixel that is neither black nor white is robust against edges; fine texture counts as
    noise.

    Source: Immerkær, "Fast Noise Variance Estimation", CVIU 64(2), 1996, with the median of a normal distribution.
    """
    channels = image.float().movedim(1, 0)  # (3, 1, H, W)
    row = image.new_tensor([1.0, -2.0, 1.0], dtype=torch.float32)
    response = F.conv2d(channels, torch.outer(row, row)[None, None], stride=2).abs()
    means = F.avg_pool2d(channels, 3, stride=2)
    inside = response[(means > 0.03) & (means < 0.97)]
    if inside.numel() < ENOUGH:
        return float("nan")
    return inside.median().item() / (6 * 0.6745) * 255


def blockiness(image: Tensor) -> float:
    """Return how much larger the steps at the borders of 8x8 blocks are than elsewhere, about 1 without JPEG.

    Args:
        image: (1, 3, H, W), in [0, 1], with the upper left corner of a block in its own.
    """
    luma = image.float().mean(dim=1)  # (1, H, W)
    ratios = [_border_ratio(luma), _border_ratio(luma.transpose(1, 2))]
    return min(ratios)


def _border_ratio(luma: Tensor) -> float:
    """Return the mean bend at the borders of blocks of 8 columns over that at all other columns."""
    step = luma.diff(dim=2).abs()
    bend = (step[..., 1:-1] - (step[..., :-2] + step[..., 2:]) / 2).clamp_min(0).mean(dim=(0, 1))  # (W - 3,)
    border = (torch.arange(len(bend), device=bend.device) + 2) % 8 == 0
    return (bend[border].mean() / bend[~border].mean().clamp_min(1e-6)).item()


def blur_share(image: Tensor) -> float:
    """Return the share of the gradients of an image, (1, 3, H, W), that a slight blur leaves: small for a sharp one."""
    blurred = F.avg_pool2d(image.float(), 3, stride=1)
    before = _gradient(image.float()[..., 1:-1, 1:-1])
    return ((_gradient(blurred) + 1e-9) / (before + 1e-9)).item()  # 1 where there is nothing to blur


def _gradient(image: Tensor) -> Tensor:
    return image.diff(dim=3).square().mean() + image.diff(dim=2).square().mean()


def middle(image: Tensor) -> Tensor:
    """Return the middle of an image, (1, 3, H, W), at most `WINDOW` pixels a side, which starts where a block does."""
    top, left = (max(side - WINDOW, 0) // 16 * 8 for side in image.shape[2:])
    return image[..., top : top + WINDOW, left : left + WINDOW]


def task_hint(image: Tensor, settings: RestorationSettings) -> list[str]:
    """Return a sentence on what fits a photo better than the settings, or nothing.

    Args:
        image: the photo, (1, 3, H, W), in [0, 1].
        settings: resolved; only tasks that keep the size are judged.
    """
    if settings.task != "denoise" or settings.upscale != 1.0 or min(image.shape[2:]) < SMALLEST_SIDE:
        return []
    part = middle(image)
    clean = noise_level(part) <= CLEAN_NOISE and blockiness(part) <= CLEAN_BLOCKS  # NaN is not
    if not clean or blur_share(part) >= SHARP:
        return []
    return [SMALL if max(image.shape[2:]) <= SMALL_SIDE else CLEAN]
