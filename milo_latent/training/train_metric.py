"""Train MILO_L or MILO_I on a training set of `build_dataset`; the default recipe is the paper's.

One process: `python -m milo_latent.training.train_metric`; several: `torchrun --nproc-per-node N -m` in place of
`python -m`, or `accelerate launch -m` on several GPUs.
The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from milo_latent.evaluation.correlation import pearson, spearman
from milo_latent.files import write_text
from milo_latent.latents.files import load_vae
from milo_latent.metric.network import MILO
from milo_latent.programs import run_program
from milo_latent.training.data.fingerprints import shards_digest, source_digest
from milo_latent.training.data.shards import CONFIG_FILE, PairSet
from milo_latent.training.engine.loop import fit, training_state
from milo_latent.training.engine.recipe import Recipe, read_recipe
from milo_latent.training.engine.run_logs import read_log
from milo_latent.training.initialise import initialise

VALIDATION_BATCH = 16


class OpinionLoss(nn.Module):
    """Squared error of the error map: of its mean against the label, and of each pixel where there is a target map.

    Args:
        metric: trained.
        map_weight: of the map's loss.

    Source: supplement, section 1: the L2 loss of predicted and (pseudo-)MOS.
    """

    def __init__(self, metric: MILO, *, map_weight: float = 0.0) -> None:
        super().__init__()
        self.metric, self.map_weight = metric, map_weight

    def forward(self, ref: Tensor, dist: Tensor, mos: Tensor, target_map: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            ref: (B, C, H, W).
            dist: (B, C, H, W).
            mos: labels, (B,), 0 = identical.
            target_map: where the damage is, (B, 1, H, W); how much is for `mos` to say.
        """
        predicted = self.metric.error_map(ref=ref, dist=dist).float()
        loss = (predicted.mean(dim=(1, 2, 3)) - mos).square().mean()
        if target_map is not None and self.map_weight:
            loss = loss + self.map_weight * (predicted - scale_map(target_map, mos)).square().mean()
        return loss


def scale_map(target_map: Tensor, mos: Tensor) -> Tensor:
    """Scale maps, (B, 1, H, W), so that their means are the labels, (B,), by a factor of at most 5; all under 1."""
    factor = (mos / target_map.mean(dim=(1, 2, 3)).clamp_min(1e-4)).clamp_max(5.0)
    return (target_map * factor.view(-1, 1, 1, 1)).clamp_max(0.95)


@torch.no_grad()
def validation_figures(metric: MILO, pairs: PairSet) -> dict[str, float]:
    """Return SRCC and PLCC of the means of the error maps with the labels of all pairs."""
    device = next(metric.parameters()).device
    scores = []
    for indices in torch.arange(len(pairs)).split(VALIDATION_BATCH):
        ref, dist, _ = pairs.pairs(indices)
        scores.append(metric.error_map(ref=ref.to(device), dist=dist.to(device)).mean(dim=(1, 2, 3)).cpu())
    predicted = torch.cat(scores)
    return {"srcc": round(spearman(predicted, pairs.mos), 6), "plcc": round(pearson(predicted, pairs.mos), 6)}


def keep_best(metric: MILO, output: Path, figures: dict[str, float]) -> None:
    """Keep `metric` in `output/best` if no validation before had a higher SRCC; NaN, of equal scores, is none."""
    if not math.isfinite(figures["srcc"]) or best_srcc(output) >= figures["srcc"]:
        return
    partial, best = output / "best.partial", output / "best"
    shutil.rmtree(partial, ignore_errors=True)
    metric.save_pretrained(partial)
    write_text(partial / "validation.json", json.dumps(figures) + "\n")
    shutil.rmtree(best, ignore_errors=True)
    partial.rename(best)


def best_srcc(output: Path) -> float:
    """Return the highest SRCC of the validations of the run in `output`; minus infinity where there is none."""
    found = [row["srcc"] for row in read_log(output / "validation.csv")]
    return max(filter(math.isfinite, found), default=-math.inf)


def new_metric(dataset: Path, *, space: str, latent_space: str | None) -> MILO:
    """Return an untrained metric for the pairs of `dataset`, which knows its autoencoder."""
    if space == "images":
        metric = MILO(channels=3)
    else:
        vae_name = json.loads((dataset / CONFIG_FILE).read_text(encoding="utf-8"))["vae"]
        vae = load_vae(vae_name)
        metric = MILO(
            channels=vae.config.latent_channels,
            latent_space=latent_space or Path(vae_name).name,
            scaling_factor=vae.config.scaling_factor,
        )
    initialise(metric)
    return metric.to(memory_format=torch.channels_last)


def mirrored(batch: Tensor, choice: int) -> Tensor:
    """Return one of the eight orientations of squares, (B, C, n, n)."""
    for bit, axis in ((1, 2), (2, 3)):
        batch = batch.flip(axis) if choice & bit else batch
    return batch.transpose(2, 3) if choice & 4 else batch


def draw_from(
    pairs: PairSet, *, batch_size: int, seed: int, processes: int, maps: bool, mirror: bool = False
) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return the function from (step, process) to a batch for `OpinionLoss`."""

    def draw(step: int, process_index: int) -> tuple[Tensor, ...]:
        indices = pairs.draw(batch_size, seed=seed, step=step, process_index=process_index, processes=processes)
        ref, dist, mos = pairs.pairs(indices)
        spatial = [ref, dist, pairs.maps[indices]] if maps and pairs.maps is not None else [ref, dist]
        if mirror:
            choice = int(np.random.default_rng((seed, step, process_index)).integers(8))
            spatial = [mirrored(each, choice) for each in spatial]
        return (*spatial[:2], mos, *spatial[2:])

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
    """Train, or go on training.

    Args:
        dataset: training set of `build_dataset`.
        validation: another one, of other images.
        output: folder of checkpoints, logs, `best` and `metric`.
        recipe: how.
        space: "latents" (MILO_L) or "images" (MILO_I).
        latent_space: name of the autoencoder, kept in the configuration.
        start: weights to start from; None starts from random ones.

    Returns:
        The metric after the last step.

    Raises:
        FileNotFoundError: if a training set is missing.
        ValueError: if one is not whole or lacks what the recipe needs; also see `fit`.
    """
    state = training_state()
    processes = state.num_processes
    data = {"space": space, "dataset": shards_digest(dataset), "start": start and source_digest(start)}
    config = recipe.run(output, processes, data)
    pairs, unseen = PairSet(dataset, space=space), PairSet(validation, space=space)
    if recipe.map_weight > 0 and pairs.maps is None:
        raise ValueError(
            f"Expected maps in {dataset} for map_weight {recipe.map_weight}. Build it with --map-teacher, or take 0."
        )
    torch.manual_seed(recipe.seed)
    metric = MILO.from_pretrained(start) if start else new_metric(dataset, space=space, latent_space=latent_space)
    metric.requires_grad_(True)
    draw = draw_from(
        pairs,
        batch_size=config.batch_size,
        seed=recipe.seed,
        processes=processes,
        maps=recipe.map_weight > 0,
        mirror=recipe.mirror,
    )

    def validate(_: nn.Module) -> dict[str, float]:
        figures = validation_figures(metric, unseen)
        keep_best(metric, output, figures)
        return figures

    fit(OpinionLoss(metric, map_weight=recipe.map_weight), draw, config, validate=validate)
    if state.is_main_process:
        metric.save_pretrained(output / "metric")
        write_text(output / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n")
    return metric


def main(arguments: list[str] | None = None) -> None:
    """Train and save the metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="training set of build_dataset")
    parser.add_argument("--validation", type=Path, required=True, help="training set of other images, to validate on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--space", choices=("latents", "images"), default="latents")
    parser.add_argument("--latent-space", help="name of the autoencoder, kept in the configuration")
    parser.add_argument("--recipe", type=Path, help="TOML with fields of Recipe; default: the paper's")
    parser.add_argument("--start", help="weights to start from; default: random ones")
    options = vars(parser.parse_args(arguments))
    recipe = read_recipe(options.pop("recipe"))
    train(**options, recipe=recipe)
    if not training_state().is_main_process:
        return
    figures = read_log(options["output"] / "validation.csv")
    print(f"Best SRCC {best_srcc(options['output']):.4f}, last {figures[-1]['srcc']:.4f}; see best/ and metric/")


if __name__ == "__main__":
    sys.exit(run_program(main))
