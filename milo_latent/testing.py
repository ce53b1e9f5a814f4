"""A tiny offline pipeline and pairs of latents, for tests, doctests, notebooks and benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import torch_utils
from torch import Tensor

from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline

WIDTHS = (8, 16)


def tiny_pipeline(*, seed: int = 0, prediction_type: str = "epsilon") -> DiffBIRPipeline:
    """Return a DiffBIRPipeline with small random networks, the same for the same seed; it takes no prompt.

    Args:
        seed: of the weights.
        prediction_type: what the UNet is said to predict.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}
        down, middle = ("DownBlock2D",) * len(WIDTHS), "UNetMidBlock2D"
        unet = UNet2DConditionModel(
            **shape, down_block_types=down, mid_block_type=middle, up_block_types=("UpBlock2D",) * len(WIDTHS)
        )
        controlnet = IRControlNet(**shape, down_block_types=down, mid_block_type=middle, conditioning_channels=4)
        for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.1)  # zero at first: the condition would change nothing
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        )
        cleaner = ResidualCleaner(channels=(8, 8), blocks=(1, 1))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction_type)
    pipeline = DiffBIRPipeline(vae=vae, unet=unet, controlnet=controlnet, scheduler=scheduler, cleaner=cleaner)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_metric(*, channels: int = 4, seed: int = 0) -> MILO:
    """Return a frozen MILO with random weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        metric = MILO(channels=channels)
    return metric.eval().requires_grad_(False)


def latent_pair(
    *, batch: int = 1, side: int = 16, channels: int = 4, noise: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return `ref` and `dist`, (batch, channels, side, side) each, which differ by noise."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(batch, channels, side, side, generator=generator)
    return ref, ref + noise * torch.randn(ref.shape, generator=generator)


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def replayed_noise(noises: Iterable[Tensor]) -> Iterator[None]:
    """Let pipelines and schedulers use given noise, in the order they draw it, instead of drawing.

    Args:
        noises: unit normal, of the shapes that are drawn: what `DiffBIRPipeline` starts from, then that of `noise_aug`
            if any, then one for each step of a scheduler that draws.

    Raises:
        ValueError: inside, when noise of another shape is drawn, or more than there is.
    """
    left = iter(noises)

    def replay(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        noise = next(left, None)
        if noise is None or tuple(noise.shape) != tuple(shape):
            found = "none" if noise is None else str(tuple(noise.shape))
            raise ValueError(f"Expected noise of shape {tuple(shape)} to replay, got {found}.")
        return noise.to(device=device, dtype=dtype)

    original = torch_utils.randn_tensor
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("milo_latent.", "diffusers.schedulers."))
        and getattr(module, "__dict__", {}).get("randn_tensor") is original
    ]
    for module in users:
        module.randn_tensor = replay  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.randn_tensor = original  # type: ignore[attr-defined]
