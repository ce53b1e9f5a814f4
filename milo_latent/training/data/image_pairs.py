"""Random pairs of photos and distorted photos, drawn for every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from milo_latent.distortions import DISTORTIONS, LEVELS
from milo_latent.pictures import round_to_8bit
from milo_latent.training.data.crops import ImageCrops

SECOND = 0.15  # share of the pairs with a second distortion
BETWEEN = 0.3  # share of the pairs that are blended with the photo, so that errors between the levels occur too


def draw_distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Distort one image, (1, 3, H, W), in [0, 1], by one or two random distortion settings, in whole or in part."""
    dist = image
    for _ in range(2 if rng.random() < SECOND else 1):
        distortion = list(DISTORTIONS.values())[rng.integers(len(DISTORTIONS))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        dist = distortion.apply(dist, distortion.amounts[rng.integers(len(LEVELS))], generator).clamp(0, 1)
    if rng.random() < BETWEEN:
        dist = image + float(rng.uniform(0.1, 1.0)) * (dist - image)
    return round_to_8bit(dist)


def draw_image_pairs(crops: ImageCrops, batch_size: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return the function from (step, process) to a batch of `ref` and `dist`, (B, 3, H, W) each."""

    def draw(step: int, process_index: int) -> tuple[Tensor, Tensor]:
        rng = crops.generator(step, process_index)
        ref = crops.batch(rng, batch_size)
        return ref, torch.cat([draw_distorted(image, rng) for image in ref.split(1)])

    return draw
