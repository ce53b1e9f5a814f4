"""What a restorer learns to undo: noise first, blur, downscaling and JPEG mixed in."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from milo_latent.training.data.crops import ImageCrops


@dataclass(frozen=True)
class DegradationRange:
    """Ranges that `degrade` draws from.

    Args:
        noise_sigma: standard deviation of the noise, as n/255.
        noise_only: share of the images with noise alone; the others are mixed.
        blur_sigma: of the Gaussian blur, in pixels.
        downscale: factor of downscaling (and up again).
        jpeg_quality: of Pillow.
    """

    noise_sigma: tuple[float, float] = (0.0, 60.0)
    noise_only: float = 0.7
    blur_sigma: tuple[float, float] = (0.3, 2.5)
    downscale: tuple[float, float] = (1.0, 4.0)
    jpeg_quality: tuple[int, int] = (25, 95)


def degrade(image: Tensor, rng: np.random.Generator, ranges: DegradationRange | None = None) -> Tensor:
    """Degrade one image: either noise alone, or some of blur, downscaling, noise and JPEG in this order.

    Args:
        image: (3, H, W), in [0, 1].
        rng: every random draw is from it.
        ranges: of the parameters.

    Returns:
        Degraded image, (3, H, W), in [0, 1], rounded to 8 bit as a file would be.
    """
    ranges = ranges or DegradationRange()
    sigma = rng.uniform(*ranges.noise_sigma)
    if rng.random() < ranges.noise_only:
        return add_noise(image, sigma, rng)
    if rng.random() < 0.6:
        image = blur(image, rng.uniform(*ranges.blur_sigma))
    if rng.random() < 0.6:
        image = downscale_and_back(image, rng.uniform(*ranges.downscale))
    if rng.random() < 0.5:
        image = add_noise(image, sigma / 2, rng)
    if rng.random() < 0.6:
        image = compress_jpeg(image, int(rng.integers(*ranges.jpeg_quality, endpoint=True)))
    return image.clamp(0, 1).mul(255).round().div(255)


def add_noise(image: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Add white Gaussian noise of standard deviation `sigma` / 255 to (3, H, W); clipped and rounded to 8 bit."""
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype="float32"))
    return (image + noise * (sigma / 255)).clamp(0, 1).mul(255).round().div(255)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Blur (3, H, W) with a Gaussian of `sigma` pixels, edges replicated."""
    radius = max(1, int(3 * sigma + 0.5))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]


def downscale_and_back(image: Tensor, factor: float) -> Tensor:
    """Shrink (3, H, W) by `factor` with antialiasing and enlarge it again, both bicubic."""
    height, width = image.shape[1:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    shrunk = F.interpolate(image[None], size=small, mode="bicubic", antialias=True, align_corners=False)
    return F.interpolate(shrunk, size=(height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def compress_jpeg(image: Tensor, quality: int) -> Tensor:
    """Write and read (3, H, W) as JPEG of `quality`, by Pillow."""
    array = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=quality)
    decoded = np.asarray(Image.open(buffer)).astype(np.float32) / 255.0
    return torch.from_numpy(decoded.transpose(2, 0, 1).copy())


def draw_degraded(crops: ImageCrops, batch_size: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return the function from (step, process) to a batch of clean and degraded images, (B, 3, H, W) each."""

    def draw(step: int, process_index: int) -> tuple[Tensor, Tensor]:
        rng = crops.generator(step, process_index)
        clean = crops.batch(rng, batch_size)
        return clean, torch.stack([degrade(image, rng) for image in clean])

    return draw
