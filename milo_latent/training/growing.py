"""Start a larger `ResidualCleaner` from a smaller, trained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from milo_latent.diffbir.residual_cleaner import ResidualBlock, ResidualCleaner


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
    levels = len(small.down_blocks)
    for level, blocks in enumerate(large.down_blocks):
        _grow_blocks(small.down_blocks[level] if level < levels else (), blocks)
    for level, blocks in enumerate(large.up_blocks):
        _grow_blocks(small.up_blocks[level] if level < levels - 1 else (), blocks)
    for level, (down, up) in enumerate(zip(large.downsamplers, large.upsamplers, strict=True)):
        if level < levels - 1:
            _widen(small.downsamplers[level], down)
            _widen(small.upsamplers[level], up)
        else:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)


def _check_larger(small: ResidualCleaner, large: ResidualCleaner) -> None:
    for name in ("channels", "blocks"):
        few, many = tuple(small.config[name]), tuple(large.config[name])
        if len(few) > len(many) or any(less > more for less, more in zip(few, many, strict=False)):
            raise ValueError(f"Expected `{name}` of at least {few} on each level, got {many}. Choose a larger network.")


def _grow_blocks(small: nn.Module | Sequence[ResidualBlock], large: nn.Module) -> None:
    trained = list(small)  # type: ignore[arg-type]
    for index, block in enumerate(large):  # type: ignore[arg-type, var-annotated]
        if index < len(trained):
            _widen(trained[index].conv1, block.conv1)
            _widen(trained[index].conv2, block.conv2)
        else:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)


def _widen(small: nn.Module, large: nn.Module) -> None:
    """Copy the weights of a convolution into the first channels of a wider one, whose new inputs count for nothing."""
    inputs, outputs = (1, 0) if isinstance(large, nn.Conv2d) else (0, 1)  # of transposed ones it is the other way round
    weight, trained = large.weight.movedim((outputs, inputs), (0, 1)), small.weight.movedim((outputs, inputs), (0, 1))
    weight[: trained.shape[0], trained.shape[1] :] = 0
    weight[: trained.shape[0], : trained.shape[1]] = trained
    large.bias[: trained.shape[0]] = small.bias
