"""Initial weights of a metric that is trained from opinions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from milo_latent.metric.network import MILO

SCALER_SLOPES = (4.0, 30.0)  # of the untrained scaler's logit, per unit of raw error: of latents, of images


@torch.no_grad()
def initialise(metric: MILO) -> None:
    """Start from a scaler that rises over the errors of latents and a mask in the middle of its range.

    With the layers' usual start the scaler is flat, the fastest way to larger errors is a larger mask, and within a few
    hundred steps the mask is saturated everywhere, where no gradient reaches it any more (seen so).
    """
    first, middle, last = (layer for layer in metric.scaler if isinstance(layer, nn.Conv2d))
    nn.init.ones_(first.weight)
    middle.weight.mul_(0.1).add_(torch.eye(middle.out_channels)[:, :, None, None])
    nn.init.constant_(last.weight, SCALER_SLOPES[metric.config.channels == 3] / last.in_channels)
    third_of_the_range = -0.7  # before the mask's sigmoid
    for layer, bias in ((first, 0.0), (middle, 0.0), (last, -2.0), (metric.mask_finder[-2], third_of_the_range)):
        assert isinstance(layer.bias, Tensor)
        nn.init.constant_(layer.bias, bias)
