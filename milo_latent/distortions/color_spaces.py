"""RGB to CIE Lab and YCbCr and back; all (B, 3, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor

from milo_latent.pictures import LUMA

RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.950456, 1.0, 1.088754)  # D65
RGB_TO_YCBCR = (LUMA, (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
LAB_THRESHOLD = 6 / 29


def _mix(image: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix.to(image), image)


def rgb_to_lab(image: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] to CIE Lab: L in [0, 100], a and b around 0."""
    linear = torch.where(image > 0.04045, ((image.clamp_min(0) + 0.055) / 1.055) ** 2.4, image / 12.92)
    xyz = _mix(linear, torch.tensor(RGB_TO_XYZ)) / torch.tensor(WHITE).to(image).view(1, 3, 1, 1)
    low = xyz / (3 * LAB_THRESHOLD**2) + 4 / 29
    root = torch.where(xyz > LAB_THRESHOLD**3, xyz.clamp_min(1e-12) ** (1 / 3), low)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Convert CIE Lab to sRGB, clipped to [0, 1]."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    root = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    low = 3 * LAB_THRESHOLD**2 * (root - 4 / 29)
    xyz = torch.where(root > LAB_THRESHOLD, root**3, low) * torch.tensor(WHITE).to(lab).view(1, 3, 1, 1)
    linear = _mix(xyz, torch.linalg.inv(torch.tensor(RGB_TO_XYZ, dtype=torch.float64)).float()).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear).clamp(0, 1)


def rgb_to_ycbcr(image: Tensor) -> Tensor:
    """Convert RGB in [0, 1] to YCbCr of the full range: Y in [0, 1], Cb and Cr in [-0.5, 0.5]."""
    return _mix(image, torch.tensor(RGB_TO_YCBCR))


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """Convert YCbCr of the full range to RGB, not clipped."""
    return _mix(ycbcr, torch.linalg.inv(torch.tensor(RGB_TO_YCBCR, dtype=torch.float64)).float())


def luminance(image: Tensor) -> Tensor:
    """Return the luma Y of RGB, (B, 1, H, W)."""
    return rgb_to_ycbcr(image)[:, :1]
