"""Train an image network to undo degradations, by a plain error, by MILO's error, or along the curriculum."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from milo_latent.evaluation.metrics import psnr
from milo_latent.files import read_image
from milo_latent.latents.codec import pad_image
from milo_latent.pictures import jpeg_round_trip, round_to_8bit
from milo_latent.programs import run_program
from milo_latent.training.data.crops import ImageCrops, list_images, spread_over
from milo_latent.training.data.degradations import (
    DEGRADATIONS,
    Degradation,
    add_noise,
    degrade,
    downscale_and_back,
    draw_degraded,
)
from milo_latent.training.data.fingerprints import source_digest
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state
from milo_latent.training.image_networks import OWN, build_network, load_initial, save_network
from milo_latent.training.objectives import (
    Objective,
    add_objective_options,
    objective_settings,
    open_objective,
    with_progress,
)

MULTIPLE = 64  # of the sides of validation images, which the networks of other libraries may need
TESTS: dict[str, Degradation] = {
    "noise15": lambda image, rng: add_noise(image, 15, rng),
    "noise25": lambda image, rng: add_noise(image, 25, rng),
    "noise50": lambda image, rng: add_noise(image, 50, rng),
    "jpeg10": lambda image, rng: jpeg_round_trip(image, 10),
    "x4": lambda image, rng: downscale_and_back(image, 4),
    "clean": lambda image, rng: image,
}


class ImageRestorerLoss(nn.Module):
    """The objective of what a network restores.

    Args:
        network: from images (B, 3, H, W) to images of the same size.
        objective: compares them with the clean ones.
    """

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, clean: Tensor, degraded: Tensor, progress: Tensor) -> Tensor:
        """Return the loss for images (B, 3, H, W) in [0, 1] at a share of the training, a scalar in [0, 1]."""
        restored = self.network(degraded.contiguous(memory_format=torch.channels_last))
        return self.objective(restored, clean, progress=progress.item())


@torch.no_grad()
def restoration_psnr(network: nn.Module, paths: list[Path], test: str) -> float:
    """Return the mean PSNR in dB over images that were degraded by one of `TESTS`, restored and rounded to 8 bit.

    Args:
        network: from images to images of the same size.
        paths: clean images.
        test: the noise of an image follows from its place among `paths`.
    """
    device = next(network.parameters()).device
    values = []
    for index, path in enumerate(paths):
        clean = read_image(path)
        degraded = TESTS[test](clean[0], np.random.default_rng(index))[None]
        restored = network(pad_image(degraded, MULTIPLE).to(device)).float().cpu()
        restored = round_to_8bit(restored[..., : clean.shape[2], : clean.shape[3]])
        values.append(psnr(ref=clean, dist=restored))
    return torch.cat(values).mean().item()


def validator(options: argparse.Namespace) -> Callable[[nn.Module], dict[str, float]]:
    """Return the function from the loss in training to the PSNR of its network in each of the tests."""
    paths = spread_over(list_images([options.validation]), options.validation_images)

    def validate(loss: nn.Module) -> dict[str, float]:
        assert isinstance(loss, ImageRestorerLoss)
        loss.eval()
        device = next(loss.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
            figures = {name: round(restoration_psnr(loss.network, paths, name), 3) for name in options.tests}
        loss.train()
        return figures

    return validate


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    options = argparse.ArgumentParser(description=__doc__)
    add_run_options(options, crop_size=128)
    options.add_argument("--network", default=OWN, help="ours, or an architecture of spandrel, such as NAFNet")
    options.add_argument("--network-options", type=json.loads, default={}, help="JSON, such as '{\"width\": 32}'")
    options.add_argument(
        "--start", type=Path, help="trained weights to start from; of ours also those of a smaller one"
    )
    add_objective_options(options, default="mae")
    options.add_argument("--degradation", choices=sorted(DEGRADATIONS), default="mixed")
    options.add_argument("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    options.add_argument("--decay", type=float, default=0.5, help="share of the steps in which it falls to zero")
    options.add_argument("--validation", type=Path, required=True, help="folder of clean validation images")
    options.add_argument("--validation-images", type=int, default=20, help="how many of them, while it trains")
    options.add_argument("--tests", nargs="+", choices=sorted(TESTS), default=["noise15", "noise25", "noise50"])
    options.add_argument("--checkpoint-minutes", type=float, default=4.0)
    return options


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what settles the run besides the options that every command has."""
    start = options.start and source_digest(options.start)
    settings = {name: getattr(options, name) for name in ("network", "network_options", "degradation")}
    return settings | objective_settings(options) | {"start": start}


def train(options: argparse.Namespace) -> nn.Module:
    """Train and return the network."""
    torch.manual_seed(options.seed)
    network = build_network(options.network, options.network_options)
    if options.start is not None:
        load_initial(network, options.start)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    crops = ImageCrops(options.images, crop_size=options.crop_size, seed=options.seed)
    draw = draw_degraded(crops, options.batch_size, DEGRADATIONS.get(options.degradation, degrade))
    config = run_config(
        options,
        data=_settings(options),
        decay=options.decay,
        warmup=options.warmup,
        checkpoint_minutes=options.checkpoint_minutes,
    )
    loss = ImageRestorerLoss(network, open_objective(options))
    fit(loss, with_progress(draw, options.steps), config, validate=validator(options))
    return network


def main(arguments: list[str] | None = None) -> None:
    """Train, validate, save."""
    options = parser().parse_args(arguments)
    network = train(options).eval()
    if not training_state().is_main_process:
        return
    print(f"Saved {save_network(network, options.output)}.")
    for test in options.tests:
        psnr = restoration_psnr(network, list_images([options.validation]), test)
        print(f"Mean PSNR, {test}, on {options.validation}: {psnr:.2f} dB")


if __name__ == "__main__":
    sys.exit(run_program(main))
