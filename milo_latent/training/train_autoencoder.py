"""Train the small autoencoder whose latents everything else works in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from milo_latent.atomic import make_readable
from milo_latent.evaluation.metrics import psnr
from milo_latent.files import read_image
from milo_latent.latents.codec import decode_latents, encode_image, latents_spread
from milo_latent.latents.spaces import LatentSpace
from milo_latent.pictures import round_to_8bit
from milo_latent.programs import run_program
from milo_latent.structure import open_network
from milo_latent.training.data.crops import ImageCrops, list_images
from milo_latent.training.data.fingerprints import source_digest
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state
from milo_latent.training.objectives import (
    Objective,
    add_objective_options,
    objective_settings,
    open_objective,
    with_progress,
)

NUM_BLOCKS = (0, 0, 2, 4)  # of the encoder, from full size to 1/8; the decoder mirrors it
DEEPER_BLOCKS = 2  # at each size below 1/8
DOWNSAMPLING = (8, 16, 32)  # pixels along the side of a latent cell
LATENT_NOISE = 0.05  # of latents with a spread of about 1: keeps nearby latents decoding to nearby images


def nano_autoencoder(latent_channels: int = 4, downsampling: int = 8) -> AutoencoderTiny:
    """Return an untrained autoencoder, most of whose work is at 1/4 and 1/8 of the size.

    Few layers work at full size: at 4 channels per 8x8 block no fine detail is left for them, and they cost the most.

    Args:
        latent_channels: numbers in a latent cell.
        downsampling: pixels along the side of a latent cell, one of `DOWNSAMPLING`.

    Raises:
        ValueError: for another `downsampling`.
    """
    if downsampling not in DOWNSAMPLING:
        raise ValueError(f"Expected `downsampling` to be one of {DOWNSAMPLING}, got {downsampling}.")
    blocks = NUM_BLOCKS + (DEEPER_BLOCKS,) * DOWNSAMPLING.index(downsampling)
    vae = AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(64,) * len(blocks),
        decoder_block_out_channels=(64,) * len(blocks),
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
    )
    _initialise(vae)
    return vae


@torch.no_grad()
def _initialise(vae: AutoencoderTiny) -> None:
    """Keep the signal's spread through the linear layers, and start from centred pixels, which trains much faster."""
    for layers in (vae.encoder.layers, vae.decoder.layers):
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    first, last = vae.encoder.layers[0], vae.decoder.layers[-1]
    first.weight.mul_(2)  # the module maps [-1, 1] to [0, 1] before its first layer; this maps it back
    first.bias.copy_(-first.weight.sum(dim=(1, 2, 3)) / 2)
    last.weight.mul_(0.25)
    last.bias.fill_(0.5)


class AutoencoderLoss(nn.Module):
    """The objective of what an autoencoder makes of images.

    Args:
        vae: the autoencoder; an encoder whose parameters need no gradient stays as it is.
        objective: compares reconstructions with the images.
    """

    def __init__(self, vae: AutoencoderTiny, objective: Objective) -> None:
        super().__init__()
        self.vae, self.objective = vae, objective

    def forward(self, image: Tensor, noise: Tensor, progress: Tensor) -> Tensor:
        """Return the loss.

        Args:
            image: (B, 3, H, W), in [0, 1].
            noise: of the latents, (B, C, h, w).
            progress: share of the training, a scalar in [0, 1].
        """
        pixels = image.mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(pixels).latents + LATENT_NOISE * noise  # (B, C, h, w)
        decoded = self.vae.decode(latents).sample.float().add(1).div(2)
        return self.objective(decoded, image, progress=progress.item())


def reconstruction_psnr(vae: AutoencoderTiny, folder: Path, *, every: int = 1) -> float:
    """Return the mean PSNR in dB over the images of `folder` after encoding and decoding, rounded to 8 bit.

    Args:
        vae: the autoencoder.
        folder: images of any size.
        every: use each n-th image only.
    """
    values = []
    for path in list_images([folder])[::every]:
        image = read_image(path).to(vae.device)
        with torch.no_grad():
            decoded = decode_latents(vae, encode_image(vae, image))[..., : image.shape[2], : image.shape[3]]
        values.append(psnr(ref=image, dist=round_to_8bit(decoded)))
    return torch.cat(values).mean().item()


def draw_batches(crops: ImageCrops, batch_size: int, space: LatentSpace) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return the function from (step, process) to a batch of images and latent noise."""

    def draw(step: int, process_index: int) -> tuple[Tensor, ...]:
        rng = crops.generator(step, process_index)
        side = crops.crop_size // space.factor
        noise = torch.from_numpy(rng.standard_normal((batch_size, space.channels, side, side), dtype="float32"))
        return crops.batch(rng, batch_size), noise

    return draw


def main(arguments: list[str] | None = None) -> None:
    """Train, validate, save a diffusers folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_options(parser)
    add_objective_options(parser, default="log-mse")
    parser.add_argument("--latent-channels", type=int, default=4, help="numbers in a latent cell, without --start")
    parser.add_argument(
        "--downsampling", type=int, choices=DOWNSAMPLING, default=8, help="side of a cell in pixels, without --start"
    )
    parser.add_argument("--start", type=Path, help="folder of a trained autoencoder to start from")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone; needs --start")
    parser.add_argument("--validation", type=Path, required=True, help="folder of validation images")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    vae = _open_autoencoder(options)
    crops = ImageCrops(options.images, crop_size=options.crop_size, seed=options.seed)
    start = options.start and source_digest(options.start)
    data = objective_settings(options) | {"start": start, "freeze_encoder": options.freeze_encoder}
    space = LatentSpace(vae)
    data |= {"latent_channels": space.channels, "downsampling": space.factor}
    if options.crop_size % space.factor:
        raise ValueError(f"Expected --crop-size to be a multiple of {space.factor}, got {options.crop_size}.")
    fit(
        AutoencoderLoss(vae, open_objective(options)),
        with_progress(draw_batches(crops, options.batch_size, space), options.steps),
        run_config(options, data=data, decay=0.7, max_grad_norm=5.0),
        validate=lambda loss: {"psnr": reconstruction_psnr(loss.vae, options.validation, every=4)},
    )
    if not training_state().is_main_process:
        return
    if not options.freeze_encoder:  # whose latents stay as they are
        sample = crops.batch(crops.generator(options.steps), 64)
        vae.register_to_config(scaling_factor=round(1.0 / latents_spread(vae, sample), 5))
    vae.save_pretrained(options.output / "vae")
    make_readable(options.output / "vae")
    print(f"Mean PSNR on {options.validation}: {reconstruction_psnr(vae, options.validation):.2f} dB")


def _open_autoencoder(options: argparse.Namespace) -> AutoencoderTiny:
    """Return the autoencoder that is trained, its encoder frozen if that was asked for."""
    if options.freeze_encoder and options.start is None:
        raise ValueError("Expected --start with --freeze-encoder: an encoder with random weights is of no use.")
    if options.start is None:
        vae = nano_autoencoder(options.latent_channels, options.downsampling)
    else:
        vae = open_network(AutoencoderTiny, options.start)
    vae.encoder.requires_grad_(not options.freeze_encoder)
    return vae.train().to(memory_format=torch.channels_last)


if __name__ == "__main__":
    sys.exit(run_program(main))
