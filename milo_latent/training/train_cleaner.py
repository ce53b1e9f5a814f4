"""Train the small cleaner (DiffBIR's stage 1) on noise, blur, downscaling and JPEG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.files import make_readable, read_image
from milo_latent.programs import run_program
from milo_latent.training.data.crops import ImageCrops, list_images
from milo_latent.training.data.degradations import add_noise, draw_degraded
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state


class CleanerLoss(nn.Module):
    """Mean log squared error of cleaned images, which is minus the mean PSNR up to a factor.

    Args:
        cleaner: the network.
    """

    def __init__(self, cleaner: ResidualCleaner) -> None:
        super().__init__()
        self.cleaner = cleaner

    def forward(self, clean: Tensor, degraded: Tensor) -> Tensor:
        """Return the loss for images (B, 3, H, W) in [0, 1]."""
        cleaned = self.cleaner(degraded.contiguous(memory_format=torch.channels_last)).float()
        error = (cleaned - clean).square().mean(dim=(1, 2, 3))
        return (error + 1e-4).log().mean()


def denoising_psnr(cleaner: ResidualCleaner, folder: Path, *, sigma: float = 50.0, every: int = 1) -> float:
    """Return the mean PSNR in dB over the images of `folder`, degraded by clipped noise of `sigma` / 255.

    Args:
        cleaner: the network.
        folder: clean images.
        sigma: of the noise.
        every: use each n-th image only.
    """
    psnr = []
    for index, path in enumerate(list_images([folder])[::every]):
        clean = read_image(path)
        noisy = add_noise(clean[0], sigma, np.random.default_rng(index))[None]
        with torch.no_grad():
            error = (cleaner(noisy.to(cleaner.device)).float().cpu().clamp(0, 1) - clean).square().mean()
        psnr.append(-10 * torch.log10(error))
    return torch.stack(psnr).mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train, validate, save a diffusers folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_options(parser)
    parser.add_argument("--validation", type=Path, required=True, help="folder of clean validation images")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    cleaner = ResidualCleaner().to(memory_format=torch.channels_last)
    crops = ImageCrops(options.images, crop_size=options.crop_size, seed=options.seed)
    config = run_config(options)

    def validate(_: nn.Module) -> dict[str, float]:
        return {"psnr_sigma_50": denoising_psnr(cleaner, options.validation, every=5)}

    fit(CleanerLoss(cleaner), draw_degraded(crops, options.batch_size), config, validate=validate)
    if not training_state().is_main_process:
        return
    cleaner.save_pretrained(options.output / "cleaner")
    make_readable(options.output / "cleaner")
    print(f"Mean PSNR at noise 50/255 on {options.validation}: {denoising_psnr(cleaner, options.validation):.2f} dB")


if __name__ == "__main__":
    sys.exit(run_program(main))
