"""Train UNet and IRControlNet together, as a latent diffusion restorer conditioned on the cleaned image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.files import make_readable
from milo_latent.latents.codec import VAE, encode_image
from milo_latent.programs import run_program
from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.data.degradations import degrade
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state

SHAPE = {  # of UNet and IRControlNet alike, whose features are added; they attend to nothing and take no prompt
    "in_channels": 4,
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "norm_num_groups": 16,
    "attention_head_dim": 64,
    "cross_attention_dim": 32,
}


def nano_scheduler() -> DDIMScheduler:
    """Return the noise schedule of the embedded models: v-prediction and zero terminal SNR, as DiffBIR v2.1's.

    It starts from pure noise in training as in sampling, so that one step and twenty both work.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def nano_unet() -> UNet2DConditionModel:
    """Return an untrained UNet of the size of the embedded one."""
    return UNet2DConditionModel(**SHAPE, out_channels=4, up_block_types=("UpBlock2D",) * 3)


def nano_controlnet() -> IRControlNet:
    """Return an untrained IRControlNet that fits `nano_unet`."""
    return IRControlNet(**SHAPE, conditioning_channels=4)


class RestorerLoss(nn.Module):
    """Mean squared error of the predicted v.

    Args:
        unet: trained.
        controlnet: trained.
        vae: frozen.
        cleaner: frozen.
        scheduler: gives noise levels and targets.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: IRControlNet,
        *,
        vae: VAE,
        cleaner: ResidualCleaner,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet
        self.vae = vae.requires_grad_(False)
        self.cleaner = cleaner.requires_grad_(False)
        self.scheduler = scheduler

    def forward(self, clean: Tensor, degraded: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the loss.

        Args:
            clean: images, (B, 3, H, W), in [0, 1].
            degraded: of the same shape and range.
            noise: (B * n, C, h, w): every image is used at n noise levels, since encoding it costs more than a step.
            timestep: (B * n,), from 0 to 999.
        """
        with torch.no_grad():
            latents = encode_image(self.vae, clean).float()  # (B, C, h, w)
            condition = encode_image(self.vae, self.cleaner(degraded).clamp(0, 1))  # (B, C, h, w)
            repeats = noise.shape[0] // clean.shape[0]
            latents, condition = latents.repeat(repeats, 1, 1, 1), condition.repeat(repeats, 1, 1, 1)
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        down_residuals, mid_residual = self.controlnet(
            noisy, timestep, encoder_hidden_states=None, controlnet_cond=condition, return_dict=False
        )
        output = self.unet(
            noisy,
            timestep,
            encoder_hidden_states=None,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
        ).sample
        return (output.float() - self.scheduler.get_velocity(latents, noise, timestep)).square().mean()


def main(arguments: list[str] | None = None) -> None:
    """Train and save a folder each of UNet, IRControlNet and scheduler."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_options(parser, crop_size=128, learning_rate=5e-4)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained autoencoder")
    parser.add_argument("--cleaner", type=Path, required=True, help="folder of the trained cleaner")
    parser.add_argument("--noise-levels", type=int, default=4, help="noise levels at which each image is used")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    unet, controlnet, scheduler = nano_unet(), nano_controlnet(), nano_scheduler()
    vae = AutoencoderTiny.from_pretrained(options.vae).eval()
    cleaner = ResidualCleaner.from_pretrained(options.cleaner).eval()
    for network in (unet, controlnet, vae, cleaner):
        network.to(memory_format=torch.channels_last)
    loss = RestorerLoss(unet, controlnet, vae=vae, cleaner=cleaner, scheduler=scheduler)
    crops = ImageCrops(options.images, crop_size=options.crop_size, seed=options.seed)

    def draw(step: int, process_index: int) -> tuple[Tensor, ...]:
        rng = crops.generator(step, process_index)
        clean = crops.batch(rng, options.batch_size)
        degraded = torch.stack([degrade(image, rng) for image in clean])
        side = options.crop_size // 8
        draws = options.batch_size * options.noise_levels
        noise = torch.from_numpy(rng.standard_normal((draws, 4, side, side), dtype="float32"))
        timestep = torch.from_numpy(rng.integers(0, scheduler.config.num_train_timesteps, draws))
        return clean, degraded, noise, timestep

    config = run_config(options, data={"noise_levels": options.noise_levels}, decay=0.4)
    fit(loss, draw, config)
    if not training_state().is_main_process:
        return
    unet.save_pretrained(options.output / "unet")
    controlnet.save_pretrained(options.output / "controlnet")
    make_readable(options.output / "unet", options.output / "controlnet")
    scheduler.save_pretrained(options.output / "scheduler")


if __name__ == "__main__":
    sys.exit(run_program(main))
