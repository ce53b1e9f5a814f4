"""IRControlNet: a ControlNet whose condition is latents."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import ControlNetModel, ModelMixin
from torch import nn

__all__ = ["IRControlNet", "ModelMixin"]  # ModelMixin: diffusers looks for it beside the classes that it loads


class IRControlNet(ControlNetModel):
    """DiffBIR's ControlNet, whose condition is the latents of the cleaned photo.

    The official network convolves the concatenation of noisy latents and condition. That convolution splits exactly
    into `conv_in` for the noisy latents and a convolution without bias for the condition. Their sum is where
    `ControlNetModel` adds its embedding of condition pixels.

    The arguments are those of `ControlNetModel`; `conditioning_channels` is the number of latent channels.

    Source: `ControlledUnetModel` and `ControlNet` in DiffBIR's diffbir/model/controlnet.py.
    """

    # of which `compile_repeated_blocks` compiles one kind, and which a `device_map` keeps whole
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012 (diffusers reads plain lists)
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # noqa: RUF012

    # the signature must stay, since diffusers reads configurations by it
    @functools.wraps(ControlNetModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controlnet_cond_embedding = nn.Conv2d(
            self.config.conditioning_channels, self.config.block_out_channels[0], 3, padding=1, bias=False
        )
