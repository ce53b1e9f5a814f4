"""Start a larger `ResidualCleaner` from a smaller, trained one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from milo_latent.diffbir.residual_cleaner import ResidualCleaner


@torch.no_grad()
def grow_cleaner(small: ResidualCleaner, large: ResidualCleaner) -> None:
    """Give `large` the weights of `small` such that both compute the same function.

    Channels that only `large` has start with random incoming and zero outgoing weights; its additional blocks and
    levels start by adding zero. All of them receive gradients from the first or the second step on.

    Args:
        small: the trained network.
        large: untrained; on no level with fewer channels or blocks than `small`.

    Raises:
        ValueError: if `large` is smaller somewhere.
    """
    _check_larger(small, large)
    _widen(small.conv_in, large.conv_in)
    _widen(small.conv_out, large.conv_out)
    for trained, blocks in ((small.down_blocks, large.down_blocks), (small.up_blocks, large.up_blocks)):
        for level, grown in enumerate(blocks):
            _grow_blocks(trained[level] if level < len(trained) else (), grown)
    for trained, samplers in ((small.downsamplers, large.downsamplers), (small.upsamplers, large.upsamplers)):
        for few, many in zip(trained, samplers, strict=False):
            _widen(few, many)
    for sampler in large.upsamplers[len(small.upsamplers) :]:
        _silence(sampler)


def _check_larger(small: ResidualCleaner, large: ResidualCleaner) -> None:
    for name in ("channels", "blocks"):
        few, many = tuple(small.config[name]), tuple(large.config[name])
        if len(few) > len(many) or any(less > more for less, more in zip(few, many, strict=False)):
            raise ValueError(f"Expected `{name}` of at least {few} on each level, got {many}. Choose a larger network.")


def _grow_blocks(small: Any, large: Any) -> None:
    for trained, block in itertools.zip_longest(small, large):
        if trained is None:
            _silence(block.conv2)
        else:
            _widen(trained.conv1, block.conv1)
            _widen(trained.conv2, block.conv2)


def _silence(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _widen(small: Any, large: Any) -> None:
    """Copy the weights of a convolution into the first channels of a wider one, whose new inputs count for nothing."""
    inputs, outputs = (1, 0) if isinstance(large, nn.Conv2d) else (0, 1)  # of transposed ones it is the other way round
    weight, trained = large.weight.movedim((outputs, inputs), (0, 1)), small.weight.movedim((outputs, inputs), (0, 1))
    weight[: trained.shape[0], trained.shape[1] :] = 0
    weight[: trained.shape[0], : trained.shape[1]] = trained
    large.bias[: trained.shape[0]] = small.bias
