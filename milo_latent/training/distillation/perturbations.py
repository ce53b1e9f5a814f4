"""The test of a distilled metric: one real pair of latents, and 260 perturbations of it that training does not use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_CROP = 24  # cells


def perturb_pair(ref: Tensor, dist: Tensor, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return the pair and 260 perturbations of it: noise, scaling, crops, blends and changes of the reference.

    Args:
        ref: latents, (1, C, h, w).
        dist: latents, (1, C, h, w).
        seed: seed of the noise and of the places of the crops.

    Returns:
        Pairs `ref`, `dist`, (1, C, h', w') each.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [(ref, dist)]
    for sigma in torch.logspace(-2, 0.2, 30).tolist():
        noise = sigma * torch.randn(ref.shape, generator=generator)
        pairs += [(ref, dist + noise), (ref, ref + noise)]
    for factor in torch.linspace(0.6, 1.4, 20).tolist():
        pairs += [(ref, dist * factor), (ref * factor, dist * factor)]
        pairs += [(ref, ref * (factor + 0.003))]  # never exactly 1, where there is no error to compare
    for _ in range(60):
        side = int(torch.randint(SMALLEST_CROP, min(ref.shape[2:]), (), generator=generator))
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in ref.shape[2:])
        crop = (..., slice(top, top + side), slice(left, left + side))
        pairs.append((ref[crop], dist[crop]))
    for share in torch.linspace(0.02, 1.5, 40).tolist():
        pairs.append((ref, ref + share * (dist - ref)))
    for share in torch.linspace(0.05, 1.0, 20).tolist():
        pairs.append((ref, ref + share * (dist.flip(3) - ref)))
    for size in range(1, 11):
        blurred = F.avg_pool2d(F.pad(ref, (size,) * 4, mode="replicate"), 2 * size + 1, stride=1)
        pairs += [(ref, blurred), (ref.flip(2), dist.flip(2) + 0.05 * size)]
    return pairs
