"""Blurs: out of focus, by a lens, by motion."""

from __future__ import annotations

import torch
from torch import Tensor

from milo_latent.distortions.kernels import blur_by, disk_kernel, gaussian_kernel, line_kernel


def gaussian_blur(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur by a Gaussian of `amount` pixels."""
    return blur_by(image, gaussian_kernel(amount))


def lens_blur(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur by a disk of radius `amount` pixels."""
    return blur_by(image, disk_kernel(amount))


def motion_blur(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Blur along a line of `amount` pixels, in a random direction."""
    degrees = 180.0 * torch.rand((), generator=generator).item()
    return blur_by(image, line_kernel(amount, degrees))
