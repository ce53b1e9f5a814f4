"""Tiny models with random weights and pairs of latents, for tests and doctests."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline

WIDTHS = (8, 16)


def tiny_pipeline(*, seed: int = 0, prediction_type: str = "epsilon") -> DiffBIRPipeline:
    """Return a DiffBIRPipeline with small random networks that follow from `seed`; it takes no prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}
        down, middle = ("DownBlock2D",) * len(WIDTHS), "UNetMidBlock2D"
        unet = UNet2DConditionModel(
            **shape, down_block_types=down, mid_block_type=middle, up_block_types=("UpBlock2D",) * len(WIDTHS)
        )
        controlnet = IRControlNet(**shape, down_block_types=down, mid_block_type=middle, conditioning_channels=4)
        for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.1)  # the initial zeros would ignore the condition
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
    """Return a frozen MILO with random weights that follow from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        metric = MILO(channels=channels)
    return metric.eval().requires_grad_(False)


def latent_pair(
    *, batch: int = 1, side: int = 16, channels: int = 4, noise: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return `ref` and `dist`, (batch, channels, side, side) each; they differ by noise of that deviation."""
    rng = generator(seed)
    ref = torch.randn(batch, channels, side, side, generator=rng)
    return ref, ref + noise * torch.randn(ref.shape, generator=rng)


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)
