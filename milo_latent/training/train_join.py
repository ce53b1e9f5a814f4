"""Train the fidelity join of a pipeline: a small network that joins decoded, cleaned and degraded images."""

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

from milo_latent.atomic import make_readable
from milo_latent.checks import check_range
from milo_latent.diffbir.fidelity_join import FidelityJoin
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.evaluation.gmsd import gmsd
from milo_latent.evaluation.metrics import psnr
from milo_latent.files import read_image
from milo_latent.metric.network import MILO
from milo_latent.pictures import round_to_8bit
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.programs import run_program
from milo_latent.resources import find_weights
from milo_latent.restoration.restorer import load_restorer
from milo_latent.restoration.settings import RestorationSettings
from milo_latent.structure import open_network
from milo_latent.training.data.crops import ImageCrops, list_images, spread_over
from milo_latent.training.data.degradations import DEGRADATIONS, Degradation, draw_degraded
from milo_latent.training.data.fingerprints import source_digest
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state
from milo_latent.training.objectives import (
    Objective,
    add_objective_options,
    objective_settings,
    open_objective,
    with_progress,
)
from milo_latent.training.train_image_restorer import TESTS

NO_GENERATOR = -1  # in place of a seed: the cleaned image stands for the decoded one
GENERATOR_PARTS = ("vae", "unet", "controlnet", "scheduler")


class JoinLoss(nn.Module):
    """The objective of what the join returns; all other networks are frozen.

    Args:
        join: trained.
        pipe: the pipeline to which it will belong, without a join.
        objective: compares joined images with the clean ones.
        steps: denoising steps of the generator; its other settings are the pipeline's defaults, without guidance.
    """

    def __init__(self, join: FidelityJoin, pipe: DiffBIRPipeline, objective: Objective, *, steps: int = 1) -> None:
        super().__init__()
        self.join, self.pipe, self.objective = join, pipe, objective
        settings = RestorationSettings(stage="all", fidelity=0.0, milo_scale=0.0, steps=steps)
        self.call_arguments = settings.resolve(pipe).call_arguments

    def forward(self, clean: Tensor, degraded: Tensor, seed: Tensor, progress: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            clean: images, (B, 3, H, W), in [0, 1].
            degraded: of the same shape and range.
            seed: of the generator's noise, a scalar; `NO_GENERATOR` for the cleaned image in place of the decoded one.
            progress: share of the training that is done, in [0, 1].
        """
        _, joined = self.restore(degraded, int(seed))
        return self.objective(joined, clean, progress=progress.item())

    def restore(self, degraded: Tensor, seed: int = NO_GENERATOR) -> tuple[Tensor, Tensor]:
        """Return the cleaned and the joined image, both like `degraded`, (B, 3, H, W)."""
        degraded = degraded.contiguous(memory_format=torch.channels_last)
        cleaned = self.pipe.clean(degraded, (degraded.shape[2], degraded.shape[3]))
        decoded = cleaned if seed == NO_GENERATOR else self._generate(degraded, seed)
        return cleaned, self.join(decoded, cleaned, degraded)

    def _generate(self, degraded: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        arguments = {"output_type": "pt", "return_dict": False, **self.call_arguments}
        return self.pipe(image=degraded, generator=generator, **arguments)[0]


@torch.no_grad()
def join_figures(loss: JoinLoss, metric: MILO, paths: list[Path], degradation: Degradation, seed: int) -> Tensor:
    """Return the means over clean images of PSNR, MILO's error and GMSD, (2, 3): of the first stage, of the join.

    Args:
        loss: holds the networks.
        metric: MILO_I.
        paths: clean images; the noise of one follows from its place among them.
        degradation: one of `TESTS`.
        seed: of the generator's noise, or `NO_GENERATOR`.
    """
    rows = []
    for index, path in enumerate(paths):
        clean = read_image(path)
        degraded = degradation(clean[0], np.random.default_rng(index))[None]
        restored = loss.restore(degraded.to(loss.join.device), seed)
        pairs = [{"ref": clean, "dist": round_to_8bit(image.float().cpu())} for image in restored]
        rows.append(torch.tensor([[function(**pair).item() for function in (psnr, metric, gmsd)] for pair in pairs]))
    return torch.stack(rows).mean(dim=0)


def named_figures(figures: Tensor) -> dict[str, float]:
    """Name what `join_figures` returns: the join's PSNR in dB, what it gains over the first stage, ratios of errors."""
    (first_psnr, *first), (joined_psnr, *joined) = figures.tolist()
    ratios = [round(ours / max(theirs, 1e-9), 4) for ours, theirs in zip(joined, first, strict=True)]
    gain = round(joined_psnr - first_psnr, 3)
    return {"psnr": round(joined_psnr, 3), "gain": gain, "milo_ratio": ratios[0], "gmsd_ratio": ratios[1]}


def validator(options: argparse.Namespace) -> Callable[[nn.Module], dict[str, float]]:
    """Return the function from the loss in training to its figures in each test, without and with the generator."""
    paths = spread_over(list_images([options.validation]), options.validation_images)
    metric = MILO.from_pretrained(options.metric)

    def validate(loss: nn.Module) -> dict[str, float]:
        assert isinstance(loss, JoinLoss)
        found: dict[str, float] = {}
        for name, seed in _modes(options).items():
            for test in options.tests:
                figures = named_figures(join_figures(loss, metric, paths, TESTS[test], seed))
                found |= {f"{name}_{test}_{figure}": value for figure, value in figures.items()}
        return found

    return validate


def _modes(options: argparse.Namespace) -> dict[str, int]:
    """Return a seed of the generator for each of the stages for which the join is trained."""
    modes = {"join": NO_GENERATOR, "all": 0}
    trained = {"join": options.generator_share < 1, "all": options.generator_share > 0}
    return {name: seed for name, seed in modes.items() if trained[name]}


def draw_seeded(
    draw: Callable[[int, int], tuple[Tensor, Tensor]], *, share: float, seed: int
) -> Callable[[int, int], tuple[Tensor, Tensor, Tensor]]:
    """Add a seed of the generator's noise to a share of the batches of `draw`, and `NO_GENERATOR` to the others."""

    def draw_with_seed(step: int, process_index: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((seed, step, process_index, 1))  # other numbers than those of the crops
        drawn = int(rng.integers(2**31)) if rng.random() < share else NO_GENERATOR
        return *draw(step, process_index), torch.tensor(drawn)

    return draw_with_seed


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    options = argparse.ArgumentParser(description=__doc__)
    add_run_options(options, crop_size=128)
    options.add_argument("--model", default="nano", help="the pipeline: shipped weights, a folder, or a hub id")
    options.add_argument("--cleaner", type=Path, help="folder of a ResidualCleaner, instead of the pipeline's own")
    options.add_argument("--network-options", type=json.loads, default={}, help="JSON, such as '{\"blocks\": [1, 2]}'")
    options.add_argument("--start", type=Path, help="folder of a trained join to start from")
    options.add_argument(
        "--generator-share", type=float, default=0.0, metavar="P",
        help="share of the batches whose decoded images are the generator's; in the others they are the cleaned ones "
        "(default: 0, for the stage join alone)",
    )  # fmt: skip
    options.add_argument("--generator-steps", type=int, default=1, help="denoising steps of the generator")
    add_objective_options(options, default="milo")
    options.add_argument("--degradation", choices=sorted(DEGRADATIONS), default="everyday")
    options.add_argument("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    options.add_argument("--decay", type=float, default=0.5, help="share of the steps in which it falls to zero")
    options.add_argument("--validation", type=Path, required=True, help="folder of clean validation images")
    options.add_argument("--validation-images", type=int, default=6, help="how many of them, while it trains")
    options.add_argument("--tests", nargs="+", choices=sorted(TESTS), default=list(TESTS))
    options.add_argument("--checkpoint-minutes", type=float, default=10.0)
    return options


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what settles the run besides the options that every command has."""
    names = ("network_options", "degradation", "generator_share", "generator_steps")
    settings = {name: getattr(options, name) for name in names} | objective_settings(options)
    folder, parts = find_weights(options.model), GENERATOR_PARTS if options.generator_share else ()
    parts = parts if options.cleaner else ("cleaner", *parts)
    settings |= {part: source_digest(folder / part) for part in parts}
    return settings | {"start": options.start and source_digest(options.start)}


def open_pipeline(options: argparse.Namespace) -> DiffBIRPipeline:
    """Open the pipeline whose join is to be trained, on the training device, without a join.

    Raises:
        ValueError: for crops below the least side of what the pipeline's cleaner returns, or no cleaner.
    """
    pipe = load_restorer(options.model, device=str(training_state().device))
    if options.cleaner is not None:
        cleaner = open_network(ResidualCleaner, options.cleaner).requires_grad_(False)
        pipe.register_modules(cleaner=cleaner.to(pipe.device))
    pipe.register_modules(join=None)
    pipe.set_progress_bar_config(disable=True)
    if pipe.cleaner is None:
        raise ValueError(f"Expected a pipeline with a cleaner, got {options.model} without. Pass --cleaner.")
    least = getattr(pipe.cleaner, "short_side", 0)
    if options.crop_size < least:
        raise ValueError(f"Expected crops of at least {least} px for this cleaner, got {options.crop_size}.")
    pipe.cleaner.to(memory_format=torch.channels_last)
    return pipe


def train(options: argparse.Namespace) -> JoinLoss:
    """Train the join; return it with the pipeline."""
    torch.manual_seed(options.seed)
    join = FidelityJoin(**options.network_options)
    if options.start is not None:
        join = open_network(FidelityJoin, options.start)
    join.train().to(memory_format=torch.channels_last)
    crops = ImageCrops(options.images, crop_size=options.crop_size, seed=options.seed)
    draw = draw_degraded(crops, options.batch_size, DEGRADATIONS[options.degradation])
    seeded = draw_seeded(draw, share=options.generator_share, seed=options.seed)
    config = run_config(
        options,
        data=_settings(options),
        decay=options.decay,
        warmup=options.warmup,
        checkpoint_minutes=options.checkpoint_minutes,
    )
    loss = JoinLoss(join, open_pipeline(options), open_objective(options), steps=options.generator_steps)
    fit(loss, with_progress(seeded, options.steps * options.accumulation), config, validate=validator(options))
    return loss


def main(arguments: list[str] | None = None) -> None:
    """Train, save, and print the figures of the join and of the first stage."""
    options = parser().parse_args(arguments)
    check_range("--generator-share", options.generator_share, 0.0, 1.0, "It is a share.")
    loss = train(options)
    if not training_state().is_main_process:
        return
    folder = options.output / "join"
    loss.join.save_pretrained(folder)
    make_readable(folder)
    print(f"Saved {folder}.")
    metric, paths = MILO.from_pretrained(options.metric), list_images([options.validation])
    for name, seed in _modes(options).items():
        for test in options.tests:
            first, joined = join_figures(loss, metric, paths, TESTS[test], seed).tolist()
            print(f"{test}, first stage: {_digits(first)}; stage {name}: {_digits(joined)}")


def _digits(figures: list[float]) -> str:
    return "PSNR {:.2f} dB, MILO_I {:.5f}, GMSD {:.4f}".format(*figures)


if __name__ == "__main__":
    sys.exit(run_program(main))
