"""Train MILO_L or MILO_I on a training set of `build_dataset`; the default recipe is the paper's.

One process: `python -m milo_latent.training.train_metric`. Several processes: `torchrun --nproc-per-node N -m` in place
of `python -m`, or `accelerate launch -m` on several GPUs. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from milo_latent.atomic import write_text
from milo_latent.checks import shortened
from milo_latent.evaluation.agreement import import_scipy, pearson, spearman
from milo_latent.latents.files import load_vae
from milo_latent.latents.spaces import LatentSpace
from milo_latent.metric.network import MILO
from milo_latent.programs import run_program
from milo_latent.structure import read_json
from milo_latent.training.data.fingerprints import shards_digest, source_digest
from milo_latent.training.data.shards import CONFIG_FILE, PairSet
from milo_latent.training.engine.loop import fit, training_state
from milo_latent.training.engine.recipe import Recipe, read_recipe
from milo_latent.training.engine.records import read_log

VALIDATION_BATCH = 16
SCALER_SLOPES = (4.0, 30.0)  # of the untrained scaler's logit per unit of error, for latents and for images


class OpinionLoss(nn.Module):
    """Squared error of the mean of MILO's error map against the label, and of the map against a target, if any.

    Args:
        metric: the metric to train.
        map_weight: weight of the loss of the map.

    Source: supplement, section 1: the L2 loss between predicted and (pseudo-)MOS; the loss of the map is **own**.
    """

    def __init__(self, metric: MILO, *, map_weight: float = 0.0) -> None:
        super().__init__()
        self.metric, self.map_weight = metric, map_weight

    def forward(self, ref: Tensor, dist: Tensor, dmos: Tensor, target_map: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            ref: (B, C, H, W).
            dist: (B, C, H, W).
            dmos: labels, (B,), 0 = identical.
            target_map: where the difference is visible, (B, 1, H, W); it is scaled so that its mean is the label.
        """
        predicted = self.metric.error_map(ref=ref, dist=dist).float()
        loss = (predicted.mean(dim=(1, 2, 3)) - dmos).square().mean()
        if target_map is not None and self.map_weight:
            loss = loss + self.map_weight * (predicted - scale_map(target_map, dmos)).square().mean()
        return loss


def scale_map(target_map: Tensor, dmos: Tensor) -> Tensor:
    """Scale maps, (B, 1, H, W), so that their means are the labels, (B,), by a factor of at most 5; all below 1."""
    factor = (dmos / target_map.mean(dim=(1, 2, 3)).clamp_min(1e-4)).clamp_max(5.0)
    return (target_map * factor.view(-1, 1, 1, 1)).clamp_max(0.95)


@torch.no_grad()
def validation_figures(metric: MILO, pairs: PairSet) -> dict[str, float]:
    """Return SRCC and PLCC of the means of MILO's error maps with the labels of all pairs."""
    device = next(metric.parameters()).device
    means = []
    for indices in torch.arange(len(pairs)).split(VALIDATION_BATCH):
        ref, dist, _ = pairs.pairs(indices)
        means.append(metric.error_map(ref=ref.to(device), dist=dist.to(device)).mean(dim=(1, 2, 3)).cpu())
    predicted = torch.cat(means)
    return {"srcc": round(spearman(predicted, pairs.dmos), 6), "plcc": round(pearson(predicted, pairs.dmos), 6)}


def keep_best(metric: MILO, output: Path, figures: dict[str, float]) -> None:
    """Keep `metric` in `output/best` if its SRCC is the highest so far; NaN, which equal predictions give, is not."""
    if not math.isfinite(figures["srcc"]) or best_srcc(output) >= figures["srcc"]:
        return
    partial, best = output / "best.partial", output / "best"
    shutil.rmtree(partial, ignore_errors=True)
    metric.save_pretrained(partial)
    write_text(partial / "validation.json", json.dumps(figures) + "\n")
    shutil.rmtree(best, ignore_errors=True)
    partial.rename(best)


def best_srcc(output: Path) -> float:
    """Return the highest SRCC in the log of the run in `output`; minus infinity if there is none."""
    found = [row["srcc"] for row in read_log(output / "validation.csv")]
    return max(filter(math.isfinite, found), default=-math.inf)


@torch.no_grad()
def initialize(metric: MILO) -> None:
    """Start from a scaler that rises over the errors of latents, and from a mask in the middle of its range.

    With the layers' default weights the scaler is flat, so that a larger mask is the fastest way to larger predictions.
    Within a few hundred steps the mask is then saturated everywhere and receives no gradient any more.
    """
    first, middle, last = (layer for layer in metric.scaler if isinstance(layer, nn.Conv2d))
    nn.init.ones_(first.weight)
    middle.weight.mul_(0.1).add_(torch.eye(middle.out_channels)[:, :, None, None])
    nn.init.constant_(last.weight, SCALER_SLOPES[metric.config.channels == 3] / last.in_channels)
    third_of_the_range = -0.7  # before the mask's sigmoid
    for layer, bias in ((first, 0.0), (middle, 0.0), (last, -2.0), (metric.mask_finder[-2], third_of_the_range)):
        assert isinstance(layer.bias, Tensor)
        nn.init.constant_(layer.bias, bias)


def new_metric(dataset: Path, *, space: str, latent_space: str | None) -> MILO:
    """Return an untrained metric for the pairs of `dataset`, whose configuration names its autoencoder."""
    if space == "images":
        metric = MILO(channels=3)
    else:
        vae_name = read_json(dataset / CONFIG_FILE).get("vae")
        if not isinstance(vae_name, str):
            raise ValueError(f"Expected the name of a VAE in {dataset / CONFIG_FILE}, got {shortened(vae_name)}.")
        own = LatentSpace(load_vae(vae_name))
        metric = MILO(
            channels=own.channels,
            latent_space=latent_space or Path(vae_name).name,
            scaling_factor=own.scaling_factor,
        )
    initialize(metric)
    return metric.to(memory_format=torch.channels_last)


def mirrored(batch: Tensor, choice: int) -> Tensor:
    """Return one of the eight orientations of squares, (B, C, n, n)."""
    for bit, axis in ((1, 2), (2, 3)):
        batch = batch.flip(axis) if choice & bit else batch
    return batch.transpose(2, 3) if choice & 4 else batch


def draw_from(pairs: PairSet, recipe: Recipe, *, processes: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return the function from (step, process) to a batch for `OpinionLoss`, shared out between `processes`."""

    def draw(step: int, process_index: int) -> tuple[Tensor, ...]:
        share = {"process_index": process_index, "processes": processes}
        indices = pairs.draw(recipe.batch_size, seed=recipe.seed, step=step, **share)
        ref, dist, dmos = pairs.pairs(indices)
        spatial = [ref, dist, pairs.maps[indices]] if recipe.map_weight > 0 and pairs.maps is not None else [ref, dist]
        if recipe.mirror:
            choice = int(np.random.default_rng((recipe.seed, step, process_index)).integers(8))
            spatial = [mirrored(each, choice) for each in spatial]
        return (*spatial[:2], dmos, *spatial[2:])

    return draw


def train(
    dataset: Path,
    validation: Path,
    output: Path,
    recipe: Recipe,
    *,
    space: str,
    latent_space: str | None,
    start: str | None,
) -> MILO:
    """Train a metric, or resume its training.

    Args:
        dataset: training set of `build_dataset`.
        validation: training set of other images, to validate on.
        output: folder of checkpoints, logs, `best` and `metric`.
        recipe: how to train.
        space: "latents" (MILO_L) or "images" (MILO_I).
        latent_space: name of the autoencoder, kept in the metric's configuration; None takes its folder's name.
        start: weights to start from; None starts from random weights.

    Returns:
        The metric after the last step.

    Raises:
        FileNotFoundError: if a training set is missing.
        ValueError: if a training set is incomplete or lacks what the recipe needs, or as in `fit`.
        ImportError: if scipy is not installed, which validation needs.
    """
    import_scipy("stats")  # before the first step, not at the first validation
    state = training_state()
    processes = state.num_processes
    data = {"space": space, "dataset": shards_digest(dataset), "start": start and source_digest(start)}
    config = recipe.start(output, processes, data)
    pairs, unseen = PairSet(dataset, space=space), PairSet(validation, space=space)
    if recipe.map_weight > 0 and pairs.maps is None:
        raise ValueError(
            f"Expected maps in {dataset} for map_weight {recipe.map_weight}. Build it with --map-teacher, or set 0."
        )
    torch.manual_seed(recipe.seed)
    metric = MILO.from_pretrained(start) if start else new_metric(dataset, space=space, latent_space=latent_space)
    metric.requires_grad_(True)
    draw = draw_from(pairs, config, processes=processes)

    def validate(_: nn.Module) -> dict[str, float]:
        figures = validation_figures(metric, unseen)
        keep_best(metric, output, figures)
        return figures

    fit(OpinionLoss(metric, map_weight=recipe.map_weight), draw, config, validate=validate)
    if state.is_main_process:
        metric.save_pretrained(output / "metric")
    return metric


def main(arguments: list[str] | None = None) -> None:
    """Train and save the metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="training set of build_dataset")
    parser.add_argument("--validation", type=Path, required=True, help="training set of other images")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--space", choices=("latents", "images"), default="latents")
    parser.add_argument("--latent-space", help="name of the autoencoder in the configuration")
    parser.add_argument("--recipe", type=Path, help="TOML file with fields of Recipe (default: the paper's)")
    parser.add_argument("--start", help="weights to start from (default: random)")
    parser.add_argument("--trackers", nargs="*", help="accelerate's, such as tensorboard wandb (default: tensorboard)")
    options = vars(parser.parse_args(arguments))
    trackers = options.pop("trackers")
    recipe = replace(read_recipe(options.pop("recipe")), trackers=trackers and tuple(trackers))
    train(**options, recipe=recipe)
    if not training_state().is_main_process:
        return
    figures = read_log(options["output"] / "validation.csv")
    print(f"Best SRCC {best_srcc(options['output']):.4f}, last {figures[-1]['srcc']:.4f}; see best/ and metric/")


if __name__ == "__main__":
    sys.exit(run_program(main))
