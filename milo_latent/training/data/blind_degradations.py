"""The published blind degradations: two rounds of blur, resizing, noise and JPEG for photos, and one for faces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.diffbir.cleaning import resize
from milo_latent.pictures import LUMA, jpeg_round_trip, round_to_8bit

SCALE = 4  # of blind super-resolution
RESAMPLING = ("area", "bilinear", "bicubic")
KERNEL_SIDES = range(7, 22, 2)  # `kernel_range` of realesrgan_dataset.py
KERNELS = ("gaussian", "generalized", "plateau")
KERNEL_SHARES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # `kernel_prob`: round and elongated ones of each kind in turn
SINC_SHARE, FINAL_SINC_SHARE = 0.1, 0.8  # `sinc_prob` and `sinc_prob2`, `final_sinc_prob`
GENERALIZED_SHAPE, PLATEAU_SHAPE = (0.5, 4.0), (1.0, 2.0)  # `betag_range`, `betap_range`
GAUSSIAN_NOISE_SHARE, GREY_NOISE_SHARE = 0.5, 0.4  # `gaussian_noise_prob`, `gray_noise_prob`; the others are Poisson's
JPEG_QUALITY = (30, 95)  # `jpeg_range` and `jpeg_range2`

FACE_KERNEL_SIDE = 41  # `blur_kernel_size` of train_gfpgan_v1.yml
FACE_BLUR_SIGMA, FACE_DOWNSCALE = (0.1, 10.0), (0.8, 8.0)  # `blur_sigma`, `downsample_range`
FACE_NOISE_SIGMA, FACE_JPEG_QUALITY = (0.0, 20.0), (60, 100)  # `noise_range`, `jpeg_range`


@dataclass(frozen=True)
class DegradationRound:
    """One round of Real-ESRGAN's degradation.

    Args:
        blur_share: share of the images that are blurred.
        blur_sigma: of the kernels, in pixels.
        resize_shares: how often the image is enlarged, reduced, or kept.
        resize: the smallest and the largest factor.
        noise_sigma: standard deviation of Gaussian noise, as n/255.
        poisson_scale: factor on the noise of a Poisson process.
    """

    blur_share: float
    blur_sigma: tuple[float, float]
    resize_shares: tuple[float, float, float]
    resize: tuple[float, float]
    noise_sigma: tuple[float, float]
    poisson_scale: tuple[float, float]


# options/train_realesrgan_x4plus.yml; `blur_sigma`, `resize_prob`, `resize_range`, `noise_range`, `poisson_scale_range`
FIRST_ROUND = DegradationRound(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
# and those that end in 2, with `second_blur_prob`
SECOND_ROUND = DegradationRound(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))


def blind_super_resolution(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Degrade a photo to a quarter of its size in two rounds, and enlarge it again, bicubic.

    The borders are repeated before filters and the clean image is not sharpened, both unlike the source.

    Args:
        image: (3, H, W), in [0, 1].
        rng: every random draw is from it.

    Returns:
        Degraded image, (3, H, W), in [0, 1].

    Source: Wang et al., "Real-ESRGAN", ICCVW 2021, with the parameters of its options/train_realesrgan_x4plus.yml;
        enlarged as the first stage of DiffBIR v2.1 is given it.
    """
    size = (image.shape[1], image.shape[2])
    small = (max(1, size[0] // SCALE), max(1, size[1] // SCALE))
    degraded = _blur(image, FIRST_ROUND, rng)
    factor = _resize_factor(FIRST_ROUND, rng)
    degraded = _resample(degraded, _scaled(size, factor), rng)
    degraded = _jpeg(_add_some_noise(degraded, FIRST_ROUND, rng), rng)
    degraded = _blur(degraded, SECOND_ROUND, rng)
    degraded = _resample(degraded, _scaled(small, _resize_factor(SECOND_ROUND, rng)), rng)
    degraded = _add_some_noise(degraded, SECOND_ROUND, rng)
    if rng.random() < 0.5:
        degraded = _jpeg(_final_sinc(_resample(degraded, small, rng), rng), rng)
    else:
        degraded = _final_sinc(_resample(_jpeg(degraded, rng), small, rng), rng)
    return resize(round_to_8bit(degraded)[None], size)[0].clamp(0, 1)


def blind_face(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Degrade a portrait by blur, reduction, noise and JPEG in this order, and enlarge it again.

    Args:
        image: (3, H, W), in [0, 1].
        rng: every random draw is from it.

    Returns:
        Degraded image, (3, H, W), in [0, 1].

    Source: Wang et al., "Towards Real-World Blind Face Restoration with Generative Facial Prior" (GFPGAN), CVPR 2021,
        equation 1, with the parameters of its options/train_gfpgan_v1.yml, without jitter of colors; the first stage of
        DiffBIR is trained with the same steps (`CodeformerDataset`).
    """
    height, width = image.shape[1:]
    kernel = _gaussian_like(rng, FACE_KERNEL_SIDE, FACE_BLUR_SIGMA, "gaussian", elongated=rng.random() < 0.5)
    degraded = _filter(image, kernel)
    factor = 1 / rng.uniform(*FACE_DOWNSCALE)
    degraded = _interpolate(degraded, _scaled((height, width), factor), "bilinear")
    noise = torch.from_numpy(rng.standard_normal(tuple(degraded.shape), dtype="float32"))
    degraded = (degraded + noise * (rng.uniform(*FACE_NOISE_SIGMA) / 255)).clamp(0, 1)
    degraded = jpeg_round_trip(degraded, int(rng.integers(*FACE_JPEG_QUALITY, endpoint=True)))
    return _interpolate(degraded, (height, width), "bilinear")


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _resize_factor(degradation: DegradationRound, rng: np.random.Generator) -> float:
    kind = rng.choice(3, p=degradation.resize_shares)
    low, high = degradation.resize
    return rng.uniform(1.0, high) if kind == 0 else rng.uniform(low, 1.0) if kind == 1 else 1.0


def _resample(image: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    return _interpolate(image, size, RESAMPLING[rng.integers(len(RESAMPLING))])


def _interpolate(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    options = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(image[None], size=size, mode=mode, **options)[0]


def _jpeg(image: Tensor, rng: np.random.Generator) -> Tensor:
    return jpeg_round_trip(image, int(rng.integers(*JPEG_QUALITY, endpoint=True)))


def _add_some_noise(image: Tensor, degradation: DegradationRound, rng: np.random.Generator) -> Tensor:
    """Add Gaussian or Poisson noise, the same in all channels or not, and clip."""
    image = image.clamp(0, 1)
    gaussian, grey = rng.random() < GAUSSIAN_NOISE_SHARE, rng.random() < GREY_NOISE_SHARE
    if gaussian:
        shape = (1, *image.shape[1:]) if grey else tuple(image.shape)
        drawn = torch.from_numpy(rng.standard_normal(shape, dtype="float32"))
        return (image + drawn * (rng.uniform(*degradation.noise_sigma) / 255)).clamp(0, 1)
    signal = torch.tensordot(torch.tensor(LUMA), image, dims=1)[None] if grey else image
    signal = round_to_8bit(signal)
    # the number of photons of a white pixel: that of the different values, rounded up to a power of two
    photons = 2.0 ** math.ceil(math.log2(len(signal.unique())))
    drawn = torch.from_numpy(rng.poisson(signal.numpy() * photons)).float() / photons - signal
    return (image + drawn * rng.uniform(*degradation.poisson_scale)).clamp(0, 1)


def _blur(image: Tensor, degradation: DegradationRound, rng: np.random.Generator) -> Tensor:
    if rng.random() >= degradation.blur_share:
        return image
    side = int(rng.choice(KERNEL_SIDES))
    if rng.random() < SINC_SHARE:
        return _filter(image, sinc_kernel(rng.uniform(math.pi / (3 if side < 13 else 5), math.pi), side))
    kind = int(rng.choice(len(KERNEL_SHARES), p=KERNEL_SHARES))
    kernel = _gaussian_like(rng, side, degradation.blur_sigma, KERNELS[kind // 2], elongated=kind % 2 == 1)
    return _filter(image, kernel)


def _final_sinc(image: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() >= FINAL_SINC_SHARE:
        return image
    return _filter(image, sinc_kernel(rng.uniform(math.pi / 3, math.pi), int(rng.choice(KERNEL_SIDES))))


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    padded = F.pad(image[:, None], (kernel.shape[0] // 2,) * 4, mode="replicate")  # (3, 1, H + n - 1, W + n - 1)
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _gaussian_like(
    rng: np.random.Generator, side: int, sigma: tuple[float, float], kind: str, *, elongated: bool
) -> Tensor:
    """Draw a Gaussian, generalized Gaussian or plateau kernel, (side, side), sum 1."""
    sigmas = torch.tensor([rng.uniform(*sigma)] * 2)
    angle = 0.0
    if elongated:
        sigmas[1], angle = rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)
    offsets = torch.arange(side, dtype=torch.float32) - side // 2
    rows, columns = offsets[:, None], offsets[None]
    along = columns * math.cos(angle) + rows * math.sin(angle)
    across = rows * math.cos(angle) - columns * math.sin(angle)
    distance = (along / sigmas[0]) ** 2 + (across / sigmas[1]) ** 2  # (side, side)
    if kind == "plateau":
        kernel = 1 / (1 + distance ** _shape(PLATEAU_SHAPE, rng))
    else:
        kernel = torch.exp(-0.5 * distance ** (_shape(GENERALIZED_SHAPE, rng) if kind == "generalized" else 1.0))
    return kernel / kernel.sum()


def _shape(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """Draw the exponent of a kernel: below 1, a heavier tail, as often as above."""
    return rng.uniform(limits[0], 1.0) if rng.random() < 0.5 else rng.uniform(1.0, limits[1])


def sinc_kernel(cutoff: float, side: int) -> Tensor:
    """Return the circular low-pass filter that cuts at `cutoff` radians per pixel, (side, side), sum 1; it rings.

    Source: Real-ESRGAN, equation 6.
    """
    offsets = torch.arange(side, dtype=torch.float64) - side // 2
    radius = (offsets[:, None] ** 2 + offsets[None] ** 2).sqrt().clamp_min(1e-6)
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    return (kernel / kernel.sum()).float()
