"""Filters of images: Gaussian, disk and line kernels, replicated borders."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SUBSAMPLES = 16  # per pixel and axis, of the disk's border


def gaussian_kernel(sigma: float) -> Tensor:
    """Return a Gaussian of `sigma` pixels, (n,), cut at twice its spread as in the KADID-10k code, sum 1."""
    radius = math.ceil(2 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return kernel / kernel.sum()


def disk_kernel(radius: float) -> Tensor:
    """Return a disk, (n, n), of which each pixel holds the covered share; sum 1."""
    reach = math.ceil(radius - 0.5)
    count = (2 * reach + 1) * SUBSAMPLES
    axis = (torch.arange(count) + 0.5) / SUBSAMPLES - reach - 0.5
    inside = (axis[:, None] ** 2 + axis[None] ** 2 <= radius**2).float()
    kernel = F.avg_pool2d(inside[None, None], SUBSAMPLES)[0, 0]
    return kernel / kernel.sum()


def line_kernel(length: float, degrees: float) -> Tensor:
    """Return the path of a camera that moves by `length` pixels, (n, n): a line one pixel wide, antialiased, sum 1."""
    half = (length - 1) / 2
    reach = math.ceil(half + 0.5)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    rows, columns = axis[:, None], axis[None]
    cosine, sine = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))  # rows point down
    along = (columns * cosine + rows * sine).clamp(-half, half)
    distance = ((columns - along * cosine) ** 2 + (rows - along * sine) ** 2).sqrt()
    kernel = (1 - distance).clamp_min(0)
    return kernel / kernel.sum()


def blur_by(image: Tensor, kernel: Tensor) -> Tensor:
    """Filter every channel of (B, C, H, W) by `kernel`: (n,) separably along both axes, or (n, n); n is odd."""
    radius = kernel.shape[0] // 2
    channels = image.shape[1]
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    if kernel.ndim == 2:
        return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)
    rows = F.conv2d(padded, kernel.expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel[:, None].expand(channels, 1, -1, -1), groups=channels)
