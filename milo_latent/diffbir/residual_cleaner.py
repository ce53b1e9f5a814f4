"""A small residual U-Net as the cleaner (DiffBIR's stage 1) of the embedded models. Own."""

from __future__ import annotations

import itertools

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ModelMixin", "ResidualCleaner"]  # ModelMixin: diffusers looks for it beside the class


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a ReLU, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, channels, H, W) for (B, channels, H, W)."""
        return hidden + self.conv2(F.relu(self.conv1(hidden)))


def _levels(channels: tuple[int, ...], blocks: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(*(ResidualBlock(width) for _ in range(count)))
        for width, count in zip(channels, blocks, strict=True)
    )


class ResidualUNet(ModelMixin, ConfigMixin):
    """A U-Net of residual blocks on 2x2 blocks of pixels, from some images of one size to what is added to one of them.

    Args:
        images: number of RGB images that it sees at once.
        channels: of the levels, from 1/2 of the size downwards.
        blocks: residual blocks of each level; all but the last level have them on the way up, too.

    Raises:
        ValueError: if there are not as many `channels` as `blocks`.
    """

    def __init__(self, images: int, channels: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(f"Expected as many `channels` as `blocks`, got {len(channels)} and {len(blocks)}.")
        self.conv_in = nn.Conv2d(12 * images, channels[0], 3, padding=1)
        self.down_blocks = _levels(channels, blocks)
        pairs = list(itertools.pairwise(channels))
        self.downsamplers = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.upsamplers = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.up_blocks = _levels(channels[:-1], blocks[:-1])
        self.conv_out = nn.Conv2d(channels[0], 12, 3, padding=1)

    def residual(self, images: Tensor) -> Tensor:
        """Return (B, 3, H, W) for images in [0, 1] that are stacked in the channels, (B, 3 * images, H, W)."""
        height, width = images.shape[2:]
        multiple = 2 ** len(self.down_blocks)
        # a reflected border looks like noise; a repeated one would look like streaks, which are kept as edges are
        mode = "reflect" if min(height, width) >= multiple else "replicate"
        padded = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode=mode)
        hidden = self.conv_in(F.pixel_unshuffle(padded - 0.5, 2))  # (B, channels[0], H / 2, W / 2)
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down_blocks):
            hidden = blocks(hidden)
            if level < len(self.downsamplers):
                skips.append(hidden)
                hidden = self.downsamplers[level](hidden)
        for level in reversed(range(len(self.up_blocks))):
            hidden = self.up_blocks[level](skips[level] + self.upsamplers[level](hidden))
        return F.pixel_shuffle(self.conv_out(hidden), 2)[..., :height, :width]  # (B, 3, H, W)


class ResidualCleaner(ResidualUNet):
    """Remove noise, blur and compression from an image, without being told the degradation.

    Args:
        channels: of the levels, from 1/2 of the size downwards.
        blocks: residual blocks of each level; all but the last level have them on the way up, too.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), blocks: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__(1, channels, blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Clean images, (B, 3, H, W) of any size, in [0, 1]; the result may leave that range a little."""
        return image + self.residual(image)
