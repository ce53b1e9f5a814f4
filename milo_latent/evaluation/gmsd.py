"""The gradient magnitude similarity deviation, a full-reference metric that nothing here is trained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.pictures import LUMA

STABILITY = 170.0  # the constant c of the paper, for luma of 0 to 255


def gmsd(*, ref: Tensor, dist: Tensor) -> Tensor:
    """Return how unevenly the gradients of two images agree: 0 for equal images, higher is worse.

    Args:
        ref: (B, 3, H, W), in [0, 1].
        dist: of the same shape.

    Returns:
        Deviation, (B,).

    Source: Xue et al., "Gradient Magnitude Similarity Deviation", IEEE TIP 23(2), 2014, equations 1 to 6: luma, reduced
        by 2 with averaging, and Prewitt filters.
    """
    ref_gradient, dist_gradient = _gradient_magnitude(ref), _gradient_magnitude(dist)
    similarity = (2 * ref_gradient * dist_gradient + STABILITY) / (
        ref_gradient.square() + dist_gradient.square() + STABILITY
    )
    return similarity.flatten(1).std(dim=1)


def _gradient_magnitude(image: Tensor) -> Tensor:
    luma = torch.einsum("c,bchw->bhw", image.new_tensor(LUMA), image)[:, None] * 255
    prewitt = image.new_tensor([[1, 0, -1]] * 3) / 3
    filters = torch.stack([prewitt, prewitt.T])[:, None]  # (2, 1, 3, 3)
    return F.conv2d(F.avg_pool2d(luma, 2), filters, padding=1).square().sum(dim=1).sqrt()  # (B, H / 2, W / 2)
