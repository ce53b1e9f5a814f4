"""Random fields and encoders for synthetic latents, whose statistics include those of real autoencoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

KERNEL_CELLS = (1.0, 1.5, 2.0, 3.0)  # side of a random encoder's kernel, in latent cells
FEATURES = 8  # of a random encoder before its channels are mixed; half of them are rectified
STD = (0.4, 1.3)  # standard deviation of a channel; scaled latents of Stable Diffusion have about 0.8
REGIONS = 6  # of a piecewise constant field
MEAN_STD = 0.8  # standard deviation over images of the mean of a channel


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw uniformly from [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def log_uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw from [low, high) so that the logarithm is uniform."""
    return uniform(generator, math.log(low), math.log(high), *shape).exp()


def colored_noise(generator: torch.Generator, shape: Sequence[int], exponent: Tensor) -> Tensor:
    """Draw fields, (B, C, h, w), of mean 0 and variance 1 whose amplitude falls with frequency f as f^-exponent.

    The exponent, (B,), is 0 for white noise and 1 for the spectrum of photos.
    """
    height, width = shape[2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    radius = (rows.square() + columns.square()).sqrt().clamp_min(0.5 / max(height, width))
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator))
    fields = torch.fft.irfft2(spectrum * radius ** -exponent.view(-1, 1, 1, 1), s=(height, width))
    return standardize(fields)


def standardize(fields: Tensor) -> Tensor:
    """Give each channel of (B, C, h, w) mean 0 and standard deviation 1; a constant channel becomes 0."""
    centered = fields - fields.mean(dim=(2, 3), keepdim=True)
    return centered / centered.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)


def mix_channels(generator: torch.Generator, fields: Tensor) -> Tensor:
    """Mix the channels of each image of (B, C, h, w) by a random matrix, so that they are correlated."""
    matrix = torch.randn(fields.shape[0], fields.shape[1], fields.shape[1], generator=generator)
    return torch.einsum("bij,bjhw->bihw", matrix, fields)


def piecewise_constant(generator: torch.Generator, shape: tuple[int, int, int, int]) -> Tensor:
    """Draw fields, (B, C, h, w), of flat regions with sharp borders: each cell takes the value of the nearest point."""
    batch, channels, height, width = shape
    points = torch.rand(batch, REGIONS, 2, generator=generator)
    values = torch.randn(batch, REGIONS, channels, generator=generator)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).view(1, -1, 2)
    nearest = torch.cdist(grid.expand(batch, -1, -1), points).argmin(dim=2)  # (B, h * w)
    chosen = values.gather(1, nearest[..., None].expand(-1, -1, channels))
    return chosen.transpose(1, 2).reshape(shape)


def encoder_kernels(generator: torch.Generator, batch: int, *, stride: int) -> Tensor:
    """Draw kernels of random encoders, (batch * FEATURES, 3, n, n), with lower weights for higher frequencies.

    `stride` is the number of pixels per latent cell.
    """
    size = int(stride * KERNEL_CELLS[int(torch.randint(len(KERNEL_CELLS), (), generator=generator))])
    grid = (torch.arange(size) + 0.5) / size
    orders = torch.arange(4)
    cosines = torch.cos(math.pi * orders[:, None] * grid[None])  # (4, n)
    falloff = 1.0 / (1.0 + orders[:, None] + orders[None, :]) ** uniform(generator, 0.0, 2.0, batch, 1, 1, 1, 1)
    weights = torch.randn(batch, FEATURES, 3, 4, 4, generator=generator) * falloff
    window = torch.hann_window(size + 2, periodic=False)[1:-1].sqrt()
    kernels = torch.einsum("bfcuv,ux,vy->bfcxy", weights, cosines * window, cosines * window)
    return kernels.reshape(batch * FEATURES, 3, size, size)


def encode_randomly(images: Tensor, kernels: Tensor, *, stride: int) -> Tensor:
    """Encode each image, (B, 3, H, W), by its own kernels to (B, FEATURES, H / stride, W / stride).

    Half of the features are rectified, as in networks.
    """
    batch = images.shape[0]
    excess = kernels.shape[2] - stride
    margin = excess // 2
    padded = F.pad(images - 0.5, (margin, excess - margin) * 2, mode="replicate")
    features = F.conv2d(padded.reshape(1, -1, *padded.shape[2:]), kernels, stride=stride, groups=batch)
    features = features.view(batch, FEATURES, *features.shape[2:])
    smooth, rectified = features.chunk(2, dim=1)
    return torch.cat([smooth, rectified.abs() - rectified.abs().mean(dim=(2, 3), keepdim=True)], dim=1)


def bend(fields: Tensor, power: Tensor) -> Tensor:
    """Raise magnitudes, relative to each channel's standard deviation, to `power`, (B, 1, 1, 1): changes the tails."""
    scale = fields.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)
    return fields.sign() * (fields.abs() / scale) ** power * scale


def local_contrast(fields: Tensor) -> Tensor:
    """Return the smoothed difference of each cell from the mean of its 3x3 neighborhood, (B, 1, h, w), with mean 1."""
    contrast = (fields - F.avg_pool2d(fields, 3, stride=1, padding=1)).abs().mean(dim=1, keepdim=True)
    contrast = F.avg_pool2d(contrast, 3, stride=1, padding=1)
    return contrast / contrast.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)


class LatentStatistics:
    """Maps fields to latents of random mean and standard deviation, by the same mapping for references and distortions.

    The reference fields, (B, C, h, w), determine the scale.
    """

    def __init__(self, generator: torch.Generator, fields: Tensor, *, channels: int) -> None:
        batch = fields.shape[0]
        self.matrix = torch.randn(batch, channels, fields.shape[1], generator=generator)
        mixed = self._mix(fields)
        self.center = mixed.mean(dim=(2, 3), keepdim=True)
        overall = log_uniform(generator, *STD, batch, 1, 1, 1)
        each = log_uniform(generator, 0.7, 1.4, batch, channels, 1, 1)
        self.gain = overall * each / mixed.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)
        self.mean = MEAN_STD * torch.randn(batch, channels, 1, 1, generator=generator).clamp(-1.5, 1.5)

    def _mix(self, fields: Tensor) -> Tensor:
        return torch.einsum("bij,bjhw->bihw", self.matrix, fields)

    def __call__(self, fields: Tensor) -> Tensor:
        """Return latents, (B, channels, h, w)."""
        return (self._mix(fields) - self.center) * self.gain + self.mean
