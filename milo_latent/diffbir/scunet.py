"""SCUNet: the cleaner of DiffBIR v2 for noise.

Source: Zhang et al., "Practical Blind Image Denoising via Swin-Conv-UNet and Data Synthesis", arXiv 2203.13278,
section 3.1 and figure 2. Parameters are named as in the official file.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from milo_latent.diffbir.cleaning import Cleaner, channels_last
from milo_latent.diffbir.windows import join_windows, position_bias, split_windows, window_attention
from milo_latent.latents.codec import pad_image

__all__ = ["ModelMixin", "SCUNet"]  # ModelMixin: diffusers looks for it beside the class
HEAD_CHANNELS = 32
WINDOW = 8


class WindowAttention(nn.Module):
    """Multi-head attention in windows with a learned bias for each relative position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        side = 2 * WINDOW - 1
        self.relative_position_params = nn.Parameter(torch.empty(channels // HEAD_CHANNELS, side, side))
        nn.init.trunc_normal_(self.relative_position_params, std=0.02)
        self.embedding_layer = nn.Linear(channels, 3 * channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, hidden: Tensor, shift: int) -> Tensor:
        """Return (B, H, W, C) for (B, H, W, C), H and W multiples of the window."""
        windows = self.embedding_layer(split_windows(hidden, WINDOW, shift))
        attended = window_attention(windows, position_bias(self.relative_position_params, WINDOW), shift)
        return join_windows(self.linear(attended), WINDOW, shift)


class SwinBlock(nn.Module):
    """Attention in windows shifted by `shift`, then feed-forward, each after a norm and added to its input."""

    def __init__(self, channels: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.ln1 = nn.LayerNorm(channels)
        self.msa = WindowAttention(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, H, W, C) for (B, H, W, C)."""
        hidden = hidden + self.msa(self.ln1(hidden), self.shift)
        return hidden + self.mlp(self.ln2(hidden))


class SwinConvBlock(nn.Module):
    """Half of the channels through convolutions, half through attention, mixed and added to the input (figure 2)."""

    def __init__(self, channels: int, shift: int) -> None:
        super().__init__()
        half = channels // 2
        self.trans_block = SwinBlock(half, shift)
        self.conv1_1 = nn.Conv2d(channels, channels, 1)
        self.conv1_2 = nn.Conv2d(channels, channels, 1)
        self.conv_block = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, C, H, W) for (B, C, H, W), H and W multiples of the window."""
        local, distant = self.conv1_1(hidden).chunk(2, dim=1)  # (B, C / 2, H, W) each
        local = local + self.conv_block(local)
        distant = self.trans_block(distant.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return hidden + self.conv1_2(torch.cat([local, distant], dim=1))


def _blocks(channels: int, count: int) -> list[nn.Module]:
    """Return blocks of which every other one is shifted by half a window."""
    return [SwinConvBlock(channels, shift=(index % 2) * (WINDOW // 2)) for index in range(count)]


class SCUNet(Cleaner):
    """Denoise with a U-Net of convolutions and window attention.

    Args:
        dim: channels at full size, a multiple of 64; each halving doubles them.
        blocks: on the three levels down, at the bottom, and on the three levels up.

    Raises:
        ValueError: if there are not seven numbers of blocks.
    """

    multiple = 8 * WINDOW  # the pixels of a window on the coarsest level, after three halvings

    @register_to_config
    def __init__(self, dim: int = 64, blocks: tuple[int, ...] = (4,) * 7) -> None:
        super().__init__()
        if len(blocks) != 7:
            raise ValueError(f"Expected seven numbers of `blocks`, got {len(blocks)}.")
        self.m_head = nn.Sequential(nn.Conv2d(3, dim, 3, padding=1, bias=False))
        for level in range(3):
            fine, coarse = dim * 2**level, dim * 2 ** (level + 1)
            down = nn.Conv2d(fine, coarse, 2, stride=2, bias=False)
            up = nn.ConvTranspose2d(coarse, fine, 2, stride=2, bias=False)
            self.add_module(f"m_down{level + 1}", nn.Sequential(*_blocks(fine, blocks[level]), down))
            self.add_module(f"m_up{level + 1}", nn.Sequential(up, *_blocks(fine, blocks[6 - level])))
        self.m_body = nn.Sequential(*_blocks(8 * dim, blocks[3]))
        self.m_tail = nn.Sequential(nn.Conv2d(dim, 3, 3, padding=1, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        """Clean images, (B, 3, H, W) of any size, in [0, 1]; the result may leave that range a little."""
        height, width = image.shape[2:]
        hidden = self.m_head(channels_last(pad_image(image, self.multiple)))  # (B, dim, H, W)
        skips = [hidden]
        for level in (1, 2, 3):
            skips.append(self.get_submodule(f"m_down{level}")(skips[-1]))  # (B, dim * 2**level, H / 2**level, ...)
        hidden = self.m_body(skips[3])
        for level in (3, 2, 1):
            hidden = self.get_submodule(f"m_up{level}")(hidden + skips[level])
        return self.m_tail(hidden + skips[0])[..., :height, :width]
