"""Distortions of colour: diffusion, shift, quantisation, saturation."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from milo_latent.distortions.codecs import from_pillow, to_pillow
from milo_latent.distortions.colour_spaces import lab_to_rgb, luminance, rgb_to_lab, scale_hsv_saturation
from milo_latent.distortions.kernels import blur_by, gaussian_kernel

SHIFTED_CHANNEL = 1  # green, to which the eye is most sensitive


def colour_diffusion(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur the colour channels of Lab by 1.5 `amount` + 2 pixels, and multiply them by `amount`."""
    lab = rgb_to_lab(image)
    colours = blur_by(lab[:, 1:], gaussian_kernel(1.5 * amount + 2)) * amount
    return lab_to_rgb(torch.cat([lab[:, :1], colours], dim=1))


def colour_shift(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Move the green channel by `amount` pixels in a random direction, where there are edges."""
    angle = 0.5 * math.pi * torch.rand((), generator=generator).item()
    rows, columns = round(amount * math.sin(angle)), round(amount * math.cos(angle))
    height, width = image.shape[2:]
    from_rows = (torch.arange(height) - rows).clamp(0, height - 1)
    from_columns = (torch.arange(width) - columns).clamp(0, width - 1)
    green = image[:, SHIFTED_CHANNEL]
    moved = green[:, from_rows][:, :, from_columns]
    weight = edge_weight(image)[:, 0]
    shifted = image.clone()
    shifted[:, SHIFTED_CHANNEL] = weight * moved + (1 - weight) * green
    return shifted


def edge_weight(image: Tensor) -> Tensor:
    """Return where edges are near, (B, 1, H, W), from 0 to 1: the smoothed gradient, its extreme percents cut."""
    down, right = torch.gradient(luminance(image), dim=(2, 3))
    strength = blur_by((down.square() + right.square()).sqrt(), gaussian_kernel(4.0))
    low, high = (np.quantile(strength.flatten(1).numpy(), share, axis=1) for share in (0.01, 0.99))
    low, high = (torch.from_numpy(each).to(image).view(-1, 1, 1, 1) for each in (low, high))
    return ((strength - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


def colour_quantisation(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Keep the `amount` best colours of each image, with error diffusion."""
    quantised = []
    for picture in to_pillow(image):
        palette = picture.quantize(int(amount), method=Image.Quantize.MEDIANCUT)
        quantised.append(picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB"))
    return from_pillow(quantised)


def colour_saturation_hsv(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Multiply the saturation of HSV by `amount`."""
    return scale_hsv_saturation(image, amount)


def colour_saturation_lab(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Multiply the colour channels of Lab by `amount`."""
    lab = rgb_to_lab(image)
    return lab_to_rgb(torch.cat([lab[:, :1], lab[:, 1:] * amount], dim=1))
