"""Distortions of structure: jitter, moved patches, pixelation, quantization, blocks of color, compression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.distortions.color_spaces import luminance
from milo_latent.pictures import codec_round_trip, jpeg_round_trip

JITTER_PASSES = 5
PATCH = 16  # side in pixels; a patch moves by up to half of it
COLOR_BLOCK = 32  # pixels
THRESHOLD_PASSES = 20  # of Lloyd's method


def jpeg(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Compress as JPEG of quality `amount`."""
    return jpeg_round_trip(image, int(amount))


def jpeg2000(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Compress by the lossy wavelets of JPEG 2000 to 1 / `amount` of the size."""
    options = {"quality_mode": "rates", "quality_layers": [amount], "irreversible": True}
    return codec_round_trip(image, format="JPEG2000", **options)


def jitter(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Move each pixel by a random offset of standard deviation `amount` pixels, five times in a row."""
    height, width = image.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([columns, rows], dim=-1).float()[None]  # (1, H, W, 2)
    size = torch.tensor([width, height]).float()
    for _ in range(JITTER_PASSES):
        places = grid + amount * torch.randn(image.shape[0], height, width, 2, generator=generator)
        scaled = (2 * places + 1) / size - 1
        image = F.grid_sample(image, scaled, mode="bilinear", padding_mode="border", align_corners=False)
    return image


def non_eccentricity_patch(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Copy `amount` patches to a random place nearby; all images of the batch share the places."""
    image = image.clone()
    height, width = image.shape[2:]
    limits = torch.tensor([height - 3 * PATCH, width - 3 * PATCH]).clamp_min(0)
    reach = torch.tensor([height - PATCH, width - PATCH])
    for _ in range(int(amount)):
        source = (torch.rand(2, generator=generator) * limits).round() + PATCH
        target = (source + (torch.rand(2, generator=generator) - 0.5) * PATCH).round()
        (top, left), (to_top, to_left) = (each.minimum(reach).clamp_min(0).int().tolist() for each in (source, target))
        patch = image[:, :, top : top + PATCH, left : left + PATCH].clone()
        image[:, :, to_top : to_top + PATCH, to_left : to_left + PATCH] = patch
    return image


def pixelate(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Shrink the sides to 0.95 - `amount`^0.6 of their length and enlarge them again, by the nearest pixel."""
    share = 0.95 - amount**0.6
    small = [max(1, int(side * share)) for side in image.shape[2:]]
    return F.interpolate(F.interpolate(image, size=small, mode="nearest"), size=image.shape[2:], mode="nearest")


def quantization(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Reduce every channel to `amount` evenly spaced values; the thresholds between them follow the image's luma."""
    steps = int(amount)
    reduced = []
    for each in image:
        thresholds = best_thresholds(luminance(each[None]).flatten(), steps)
        reduced.append(torch.bucketize(each.contiguous(), thresholds).float() / (steps - 1))
    return torch.stack(reduced)


def best_thresholds(values: Tensor, classes: int) -> Tensor:
    """Part `values`, (n,), in [0, 1], into classes of least variance by Lloyd's method; return (classes - 1,)."""
    histogram = torch.histc(values, bins=256, min=0.0, max=1.0)
    centers = (torch.arange(256) + 0.5) / 256
    low, high = values.min().item(), values.max().item()
    thresholds = torch.linspace(low, high, classes + 1)[1:-1]
    for _ in range(THRESHOLD_PASSES):
        members = torch.bucketize(centers, thresholds)
        mass = torch.zeros(classes).index_add(0, members, histogram)
        total = torch.zeros(classes).index_add(0, members, histogram * centers)
        bounds = torch.cat([torch.tensor([low]), thresholds, torch.tensor([high])])
        means = torch.where(mass > 0, total / mass.clamp_min(1), (bounds[1:] + bounds[:-1]) / 2)
        thresholds = (means[1:] + means[:-1]) / 2
    return thresholds


def color_block(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Cover `amount` places by blocks of random colors; all images of the batch share them."""
    image = image.clone()
    height, width = image.shape[2:]
    for _ in range(int(amount)):
        top, left = (
            int(torch.rand((), generator=generator).item() * max(side - COLOR_BLOCK, 1)) for side in (height, width)
        )
        color = torch.rand(1, 3, 1, 1, generator=generator)
        image[:, :, top : top + COLOR_BLOCK, left : left + COLOR_BLOCK] = color
    return image
