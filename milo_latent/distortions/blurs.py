"""Blurs by a Gaussian, by a lens that is out of focus, and by motion."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.pictures import gaussian_blur as blur

SUBSAMPLES = 16  # per pixel and axis, where a disk's edge covers pixels in part


def gaussian_blur(image: Tensor, amount: float, generator: torch.Generator | None = None) -> Tensor:
    """Blur by a Gaussian of `amount` pixels, cut at two standard deviations as in the KADID-10k code."""
    return blur(image, amount, radius=math.ceil(2 * amount))


def lens_blur(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur by a disk of radius `amount` pixels."""
    return _filter(image, disk_kernel(amount))


def motion_blur(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur along a line of `amount` pixels, in a random direction."""
    degrees = 180.0 * torch.rand((), generator=generator).item()
    return _filter(image, line_kernel(amount, degrees))


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    """Filter every channel of (B, C, H, W) by a kernel, (n, n), of odd n; the border is repeated."""
    channels = image.shape[1]
    padded = F.pad(image, (kernel.shape[0] // 2,) * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def disk_kernel(radius: float) -> Tensor:
    """Return a disk, (n, n), whose pixels hold the share that it covers of them; the sum is 1."""
    reach = math.ceil(radius - 0.5)
    count = (2 * reach + 1) * SUBSAMPLES
    axis = (torch.arange(count) + 0.5) / SUBSAMPLES - reach - 0.5
    inside = (axis[:, None] ** 2 + axis[None] ** 2 <= radius**2).float()
    kernel = F.avg_pool2d(inside[None, None], SUBSAMPLES)[0, 0]
    return kernel / kernel.sum()


def line_kernel(length: float, degrees: float) -> Tensor:
    """Return an antialiased line one pixel wide, (n, n): the path of a camera that moves by `length` pixels; sum 1."""
    half = (length - 1) / 2
    reach = math.ceil(half + 0.5)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    rows, columns = axis[:, None], axis[None]
    cosine, sine = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))  # rows point down
    along = (columns * cosine + rows * sine).clamp(-half, half)
    distance = ((columns - along * cosine) ** 2 + (rows - along * sine) ** 2).sqrt()
    kernel = (1 - distance).clamp_min(0)
    return kernel / kernel.sum()
