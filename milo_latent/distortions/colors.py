"""Distortions of color: diffusion, shift, quantization, saturation."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from milo_latent.distortions.blurs import gaussian_blur
from milo_latent.distortions.color_spaces import lab_to_rgb, luminance, rgb_to_lab
from milo_latent.pictures import from_8bit, to_8bit

SHIFTED_CHANNEL = 1  # green, to which the eye is most sensitive


def color_diffusion(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur the color channels of Lab by 1.5 `amount` + 2 pixels, and multiply them by `amount`."""
    lab = rgb_to_lab(image)
    return lab_to_rgb(torch.cat([lab[:, :1], gaussian_blur(lab[:, 1:], 1.5 * amount + 2) * amount], dim=1))


def color_shift(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
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
    """Return how near edges are, (B, 1, H, W), in [0, 1]: the smoothed gradient between its percentiles 1 and 99."""
    down, right = torch.gradient(luminance(image), dim=(2, 3))
    strength = gaussian_blur((down.square() + right.square()).sqrt(), 4.0)
    low, high = (np.quantile(strength.flatten(1).numpy(), share, axis=1) for share in (0.01, 0.99))
    low, high = (torch.from_numpy(each).to(image).view(-1, 1, 1, 1) for each in (low, high))
    return ((strength - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


def color_quantization(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Reduce each image to the `amount` colors that suit it best, with error diffusion."""
    quantized = []
    for pixels in to_8bit(image):
        picture = Image.fromarray(pixels)
        palette = picture.quantize(int(amount), method=Image.Quantize.MEDIANCUT)
        quantized.append(picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB"))
    return from_8bit(np.stack([np.asarray(picture) for picture in quantized]))


def color_saturation_hsv(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Multiply the saturation of HSV by `amount`; below zero, colors turn into their complements.

    Hue and value stay, so a channel c moves on the line to the value v = max(r, g, b): c' = v - amount (v - c).
    """
    value = image.amax(dim=1, keepdim=True)
    return (value - amount * (value - image)).clamp(0, 1)


def color_saturation_lab(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Multiply the color channels of Lab by `amount`."""
    lab = rgb_to_lab(image)
    return lab_to_rgb(torch.cat([lab[:, :1], lab[:, 1:] * amount], dim=1))
