"""BSRNet: the cleaner of DiffBIR v2 for super-resolution, ESRGAN's network.

Source: Wang et al., "ESRGAN", arXiv 1809.00219, section 3.1 and figure 4; trained as in Zhang et al., "Designing a
Practical Degradation Model for Deep Blind Image Super-Resolution", arXiv 2103.14006. Parameters are named as in the
official file.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.diffbir.cleaning import Cleaner, channels_last

__all__ = ["BSRNet", "ModelMixin"]  # ModelMixin: diffusers looks for it beside the class
RESIDUAL_SCALE = 0.2
SLOPE = 0.2


class DenseBlock(nn.Module):
    """Five convolutions, each fed with all results before it, of `growth` channels; the last is added to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for index in range(4):
            self.add_module(f"conv{index + 1}", nn.Conv2d(channels + index * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(channels + 4 * growth, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, C, H, W) for (B, C, H, W)."""
        known = hidden
        for index in range(1, 5):
            result = F.leaky_relu(self.get_submodule(f"conv{index}")(known), SLOPE)
            known = torch.cat([known, result], dim=1)
        return torch.add(hidden, self.conv5(known), alpha=RESIDUAL_SCALE)


class ResidualDenseBlocks(nn.Module):
    """Three dense blocks, whose scaled result is added to their input (RRDB)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = DenseBlock(channels, growth)
        self.RDB2 = DenseBlock(channels, growth)
        self.RDB3 = DenseBlock(channels, growth)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, C, H, W) for (B, C, H, W)."""
        return torch.add(hidden, self.RDB3(self.RDB2(self.RDB1(hidden))), alpha=RESIDUAL_SCALE)


class BSRNet(Cleaner):
    """Enlarge an image fourfold and remove its degradation.

    Args:
        channels: of the trunk.
        blocks: of three dense blocks each.
        growth: channels of each result inside a dense block.
    """

    scale = 4

    @register_to_config
    def __init__(self, channels: int = 64, blocks: int = 23, growth: int = 32) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(ResidualDenseBlocks(channels, growth) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.upconv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.upconv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.HRconv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Clean images of any size, (B, 3, H, W) in [0, 1], to (B, 3, 4 * H, 4 * W), about in [0, 1]."""
        shallow = self.conv_first(channels_last(image))
        hidden = shallow + self.trunk_conv(self.RRDB_trunk(shallow))
        for convolution in (self.upconv1, self.upconv2):
            larger = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
            hidden = F.leaky_relu(convolution(larger), SLOPE)
        return self.conv_last(F.leaky_relu(self.HRconv(hidden), SLOPE))
