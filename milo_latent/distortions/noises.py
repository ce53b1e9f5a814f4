"""Noise: white, in color components, impulse and multiplicative noise, and the traces of denoising."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.distortions.color_spaces import rgb_to_ycbcr, ycbcr_to_rgb

BLOCK = 8  # side of the blocks that the denoiser transforms, in pixels
STRIDE = 2  # between blocks
THRESHOLD = 2.7  # standard deviations of the noise, below which coefficients are dropped


def _normal(image: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    return torch.randn(image.shape, generator=generator) * math.sqrt(variance)


def white_noise(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add white Gaussian noise of variance `amount`."""
    return image + _normal(image, amount, generator)


def white_noise_in_color_components(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add white Gaussian noise of variance `amount` to each component of YCbCr."""
    ycbcr = rgb_to_ycbcr(image)
    return ycbcr_to_rgb(ycbcr + _normal(ycbcr, amount, generator))


def impulse_noise(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Set a share `amount` of all values to black or white."""
    draw = torch.rand(image.shape, generator=generator)
    return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, image))


def multiplicative_noise(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Multiply by 1 plus white Gaussian noise of variance `amount`."""
    return image * (1 + _normal(image, amount, generator))


def denoise(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add white noise of variance `amount` and remove it again, which removes detail too.

    Source: own. KADID-10k denoises each channel with a DnCNN; thresholding overlapping cosine transforms needs no
    trained network.
    """
    noisy = (image + _normal(image, amount, generator)).clamp(0, 1)
    return threshold_cosines(noisy, math.sqrt(amount))


def threshold_cosines(image: Tensor, sigma: float) -> Tensor:
    """Denoise (B, C, H, W): drop small coefficients of the cosine transforms of 8x8 blocks, average what overlaps."""
    order, position = torch.arange(BLOCK)[:, None], torch.arange(BLOCK)[None]
    basis = torch.cos(math.pi * order * (2 * position + 1) / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    filters = torch.einsum("ux,vy->uvxy", basis, basis).reshape(BLOCK * BLOCK, 1, BLOCK, BLOCK)
    batch, channels, height, width = image.shape
    right, bottom = (BLOCK + (-side) % STRIDE for side in (width, height))
    padded = F.pad(image, (BLOCK, right, BLOCK, bottom), mode="replicate").flatten(0, 1)[:, None]
    coefficients = F.conv2d(padded, filters, stride=STRIDE)
    kept = coefficients.abs() > THRESHOLD * sigma
    kept[:, 0] = True  # the mean of the block
    weight = 1 / kept.sum(dim=1, keepdim=True)  # sparse blocks count more
    total = F.conv_transpose2d(coefficients * kept * weight, filters, stride=STRIDE)
    covered = F.conv_transpose2d(weight, torch.ones(1, 1, BLOCK, BLOCK), stride=STRIDE)
    cleaned = (total / covered)[..., BLOCK : BLOCK + height, BLOCK : BLOCK + width]
    return cleaned.reshape(batch, channels, height, width)
