"""What restorers learn to undo: noise, blur, enlarging and JPEG, alone and mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from milo_latent.diffbir.cleaning import resize
from milo_latent.pictures import gaussian_blur, jpeg_round_trip, round_to_8bit
from milo_latent.training.data.blind_degradations import blind_face, blind_super_resolution
from milo_latent.training.data.crops import ImageCrops

Degradation = Callable[[Tensor, np.random.Generator], Tensor]  # of (3, H, W) in [0, 1], every draw from the generator


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
        image = gaussian_blur(image, rng.uniform(*ranges.blur_sigma))
    if rng.random() < 0.6:
        image = downscale_and_back(image, rng.uniform(*ranges.downscale))
    if rng.random() < 0.5:
        image = add_noise(image, sigma / 2, rng)
    if rng.random() < 0.6:
        image = jpeg_round_trip(image, int(rng.integers(*ranges.jpeg_quality, endpoint=True)))
    return round_to_8bit(image)


def add_noise(image: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Add white Gaussian noise of standard deviation `sigma` / 255 to (3, H, W); clipped and rounded to 8 bit."""
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype="float32"))
    return round_to_8bit(image + noise * (sigma / 255))


def downscale_and_back(image: Tensor, factor: float) -> Tensor:
    """Shrink (3, H, W) by `factor` with antialiasing, round to 8 bit and enlarge again, both bicubic."""
    height, width = image.shape[1:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    return resize(round_to_8bit(resize(image[None], small)), (height, width))[0].clamp(0, 1)


def noise_alone(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Add noise of 0 to 60 / 255, clipped and rounded, as in the noisy files of CBSD68."""
    return add_noise(image, rng.uniform(0, 60), rng)


def everyday(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw one of the degradations that a first stage for everyday photos undoes. Own.

    Shares: noise of 0 to 60 / 255, strong noise more often than weak (its square is uniform), 0.55; enlarging by 4 from
    a bicubic reduction, a third of which has noise of up to 10 / 255 or JPEG of quality 50 to 95 in the small picture,
    0.15; JPEG of quality 5 to 95, 0.1; Gaussian blur of 0.3 to 2.5 pixels, 0.05; several of these mixed as `degrade`
    does, 0.1; clean images, left as they are so that the network learns to do no harm, 0.05.
    """
    kind = rng.random()
    if kind < 0.55:
        return add_noise(image, 60 * rng.random() ** 0.5, rng)
    if kind < 0.7:
        return _enlarged_by_4(image, rng)
    if kind < 0.8:
        return jpeg_round_trip(image, int(rng.integers(5, 95, endpoint=True)))
    if kind < 0.85:
        return round_to_8bit(gaussian_blur(image, rng.uniform(0.3, 2.5)))
    return degrade(image, rng, DegradationRange(noise_only=0.0)) if kind < 0.95 else image


def _enlarged_by_4(image: Tensor, rng: np.random.Generator) -> Tensor:
    small = round_to_8bit(resize(image[None], (max(1, image.shape[1] // 4), max(1, image.shape[2] // 4))))[0]
    harm = rng.random()
    if harm < 1 / 6:
        small = add_noise(small, rng.uniform(0, 10), rng)
    elif harm < 1 / 3:
        small = jpeg_round_trip(small, int(rng.integers(50, 95, endpoint=True)))
    return resize(small[None], (image.shape[1], image.shape[2]))[0].clamp(0, 1)


DEGRADATIONS: dict[str, Degradation] = {
    "noise": noise_alone,
    "mixed": degrade,
    "everyday": everyday,
    "blind-sr": blind_super_resolution,
    "blind-face": blind_face,
}


def draw_degraded(
    crops: ImageCrops, batch_size: int, degradation: Degradation = degrade
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return the function from (step, process) to a batch of clean and degraded images, (B, 3, H, W) each."""

    def draw(step: int, process_index: int) -> tuple[Tensor, Tensor]:
        rng = crops.generator(step, process_index)
        clean = crops.batch(rng, batch_size)
        return clean, torch.stack([degradation(image, rng) for image in clean])

    return draw
