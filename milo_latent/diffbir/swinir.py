"""SwinIR as DiffBIR uses it: its cleaner of v1 and v2.1, and of faces.

Source: Liang et al., "SwinIR", arXiv 2108.10257, section 3 and figure 2; the sizes are those of DiffBIR's
configs/inference/swinir.yaml. Parameters are named as in the official files.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import ClassVar

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.diffbir.cleaning import Cleaner, channels_last
from milo_latent.diffbir.windows import join_windows, position_bias, split_windows, window_attention
from milo_latent.latents.codec import pad_image

__all__ = ["ModelMixin", "SwinIR"]  # ModelMixin: diffusers looks for it beside the class
IMAGE_MEAN = (0.4488, 0.4371, 0.4040)  # RGB, of the DIV2K photos
UPSAMPLER_CHANNELS = 64
SLOPE = 0.2


class WindowAttention(nn.Module):
    """Multi-head attention in windows with a learned bias for each relative position (eq. 6)."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, hidden: Tensor, shift: int) -> Tensor:
        """Return (B, H, W, C) for (B, H, W, C), H and W multiples of the window."""
        side = 2 * self.window - 1
        bias = position_bias(self.relative_position_bias_table.t().unflatten(1, (side, side)), self.window)
        windows = split_windows(hidden, self.window, shift)
        attended = window_attention(self.qkv(windows), bias, shift)
        return join_windows(self.proj(attended), self.window, shift)


class SwinBlock(nn.Module):
    """Attention in windows shifted by `shift`, then feed-forward, each after a norm and added to its input (eq. 7)."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, mlp_ratio: float) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        width = int(channels * mlp_ratio)
        feed_forward = {"fc1": nn.Linear(channels, width), "gelu": nn.GELU(), "fc2": nn.Linear(width, channels)}
        self.mlp = nn.Sequential(OrderedDict(feed_forward))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, H, W, C) for (B, H, W, C)."""
        hidden = hidden + self.attn(self.norm1(hidden), self.shift)
        return hidden + self.mlp(self.norm2(hidden))


class ResidualGroup(nn.Module):
    """Blocks, every other one shifted by half a window, then a convolution, added to their input (RSTB, eq. 5)."""

    def __init__(self, channels: int, depth: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        shifts = itertools.islice(itertools.cycle([0, window // 2]), depth)
        blocks = [SwinBlock(channels, heads, window, shift, mlp_ratio) for shift in shifts]
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, H, W, C) for (B, H, W, C)."""
        return hidden + _convolve(self.conv, self.residual_group["blocks"](hidden))


class SwinIR(Cleaner):
    """Remove degradation with window attention on blocks of pixels, then enlarge back.

    Args:
        embed_dim: channels.
        depths: blocks of each group.
        num_heads: heads of attention of each group.
        window_size: side of a window, in blocks of pixels.
        mlp_ratio: width of the feed-forward over `embed_dim`.
        downscale: side of the blocks of pixels that become one position.
        upscale: by which positions are enlarged; a power of two.

    Raises:
        ValueError: if `depths` and `num_heads` differ in number, or `upscale` is no multiple of `downscale` or no
            power of two.
    """

    enlarge_first: ClassVar[bool] = True
    outer_multiple: ClassVar[int] = 64

    @register_to_config
    def __init__(
        self,
        embed_dim: int = 180,
        depths: tuple[int, ...] = (6,) * 8,
        num_heads: tuple[int, ...] = (6,) * 8,
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        downscale: int = 8,
        upscale: int = 8,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"Expected as many `depths` as `num_heads`, got {len(depths)} and {len(num_heads)}.")
        if upscale % downscale or upscale.bit_count() != 1:
            raise ValueError(f"Expected `upscale` to be a power of two, times {downscale}, got {upscale}.")
        self.scale, self.multiple = upscale // downscale, downscale * window_size  # 1 and 64 in DiffBIR
        self.conv_first = nn.Sequential(
            nn.PixelUnshuffle(downscale), nn.Conv2d(3 * downscale**2, embed_dim, 3, padding=1)
        )
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList(
            ResidualGroup(embed_dim, depth, heads, window_size, mlp_ratio)
            for depth, heads in zip(depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        channels = UPSAMPLER_CHANNELS
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, channels, 3, padding=1), nn.LeakyReLU())
        self.doublings = int(math.log2(upscale))
        for index in range(1, self.doublings + 1):
            self.add_module(f"conv_up{index}", nn.Conv2d(channels, channels, 3, padding=1))
        self.conv_hr = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Clean images of any size, (B, 3, H, W) in [0, 1], to (B, 3, scale * H, scale * W), about in [0, 1]."""
        height, width = image.shape[2:]
        padded = channels_last(pad_image(image, self.multiple))
        mean = padded.new_tensor(IMAGE_MEAN)[:, None, None]
        shallow = self.conv_first(padded - mean)  # (B, C, h, w)
        deep = _convolve(self.conv_after_body, self._body(shallow.permute(0, 2, 3, 1)))
        hidden = self.conv_before_upsample(shallow + deep.permute(0, 3, 1, 2))
        for index in range(1, self.doublings + 1):
            hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")  # one name frees the smaller
            hidden = F.leaky_relu(self.get_submodule(f"conv_up{index}")(hidden), SLOPE, inplace=True)
        hidden = F.leaky_relu(self.conv_hr(hidden), SLOPE, inplace=True)
        cleaned = self.conv_last(hidden) + mean
        return cleaned[..., : self.scale * height, : self.scale * width]

    def _body(self, hidden: Tensor) -> Tensor:
        """Return deep features, (B, h, w, C), for shallow ones."""
        hidden = self.patch_embed["norm"](hidden)
        for group in self.layers:
            hidden = group(hidden)
        return self.norm(hidden)


def _convolve(convolution: nn.Module, hidden: Tensor) -> Tensor:
    """Convolve an image whose channels come last, (B, h, w, C)."""
    return convolution(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
