"""Distortions of brightness, sharpness and contrast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from milo_latent.distortions.blurs import gaussian_blur
from milo_latent.distortions.color_spaces import lab_to_rgb, rgb_to_lab

SHARPEN_SIGMA = 3.0  # pixels, of unsharp masking


def tone_curve(values: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """Apply the polynomial through (0, 0), `points` and (1, 1), clipped to [0, 1].

    It equals the not-a-knot cubic spline of the KADID-10k code for the points used here: one, or three symmetric ones.
    """
    knots = [(0.0, 0.0), *points, (1.0, 1.0)]
    result = torch.zeros_like(values)
    for position, height in knots:
        term = torch.full_like(values, height)
        for other, _ in knots:
            if other != position:
                term = term * (values - other) / (position - other)
        result = result + term
    return result.clamp(0, 1)


def brighten(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Raise the middle tones by `amount` / 2, by a curve on RGB (two thirds) and on lightness (one third)."""
    points = [(0.5, 0.5 + amount / 2)]
    lab = rgb_to_lab(image)
    lightness = tone_curve(lab[:, :1] / 100, points) * 100
    return (2 * tone_curve(image, points) + lab_to_rgb(torch.cat([lightness, lab[:, 1:]], dim=1))) / 3


def darken(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Lower the middle tones by `amount` / 2."""
    return tone_curve(image, [(0.5, 0.5 - amount / 2)])


def mean_shift(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add `amount` to all values."""
    return image + amount


def high_sharpen(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Sharpen the lightness by unsharp masking of strength `amount`."""
    lab = rgb_to_lab(image)
    lightness = lab[:, :1]
    sharpened = lightness + amount * (lightness - gaussian_blur(lightness, SHARPEN_SIGMA))
    return lab_to_rgb(torch.cat([sharpened.clamp(0, 100), lab[:, 1:]], dim=1))


def contrast_change(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Bend the tone curve into an S, or its inverse where `amount` is negative; 0 is a slight S, as in KADID-10k."""
    return tone_curve(image, [(0.3, 0.25 - amount / 4), (0.5, 0.5), (0.7, 0.75 + amount / 4)])
