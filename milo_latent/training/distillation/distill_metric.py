"""Distil MILO from a teacher: MILO_L over synthetic latents where the autoencoder is not at hand, MILO_I over photos.

The student starts from its own random weights and learns from what the teacher puts out (masks of all levels, raw
error, scaler); neither the teacher's weights nor its hidden layers are read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.evaluation.correlation import pearson, spearman
from milo_latent.files import read_latents
from milo_latent.metric.network import MILO
from milo_latent.programs import run_program
from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.data.image_pairs import draw_image_pairs
from milo_latent.training.distillation.encoded_pairs import half_encoded
from milo_latent.training.distillation.latent_distortions import draw_latent_pairs
from milo_latent.training.distillation.perturbations import perturb_pair
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state

# raw error per pixel up to which the scaler is learned: latents differ by 3 at most, the mask is < 4
LARGEST_ERROR = 6.0
DIVERGENCE_WEIGHT = 4.0  # beside the mask's error in units of its spread
LEAST_VARIANCE = 0.003  # of a mask, under which flat masks would weigh too much


def levels_and_mask(metric: MILO, *, ref: Tensor, dist: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the mask finder's logits at each level, coarse to fine, (B, 1, h_l, w_l) each, and the mask.

    `MILO.mask` gives the same mask, and no logits.
    """
    layers = list(metric.mask_finder)[:-1]  # without the sigmoid
    pyramid = [torch.cat([dist, ref], dim=1).contiguous(memory_format=torch.channels_last)]
    for _ in range(metric.config.levels - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    height, width = (side // 2 for side in pyramid[-1].shape[2:])
    mask, found = dist.new_zeros(dist.shape[0], 1, height, width), []
    for level in reversed(pyramid):
        mask = F.interpolate(mask, scale_factor=2, mode="bilinear", align_corners=True)
        missing = (0, level.shape[3] - mask.shape[3], 0, level.shape[2] - mask.shape[2])
        mask = F.pad(mask, missing, mode="replicate")
        hidden = torch.cat([level, mask], dim=1)
        for layer in layers:
            hidden = layer(hidden)
        found.append(hidden.float())
        mask = mask + found[-1].sigmoid()
    return found, mask


class MatchingLoss(nn.Module):
    """Distance between student and teacher in all that they put out.

    Args:
        student: trained.
        teacher: frozen.
    """

    def __init__(self, student: MILO, teacher: MILO) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, ref: Tensor, dist: Tensor) -> Tensor:
        """Return the loss for latents or images (B, C, h, w)."""
        with torch.no_grad(), torch.autocast(ref.device.type, enabled=False):
            targets, target_mask = levels_and_mask(self.teacher, dist=dist, ref=ref)
        levels, mask = levels_and_mask(self.student, dist=dist, ref=ref)
        loss = sum(
            (_divergence(*each) for each in zip(levels, targets, strict=True)), torch.zeros((), device=ref.device)
        )
        loss = loss + (mask - target_mask).square().mean() / (target_mask.var() + LEAST_VARIANCE)
        difference = (ref - dist).abs().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        error, target_error = ((each * difference).mean(dim=(1, 2, 3)) for each in (mask, target_mask))
        loss = loss + ((error - target_error) / target_error.clamp_min(1e-3)).square().clamp_max(1.0).mean()
        return loss + self._scaler_loss(target_mask * difference)

    def _scaler_loss(self, error: Tensor) -> Tensor:
        """Compare the scalers at the errors met, and evenly over their range, also relative to what they say of 0."""
        grid = torch.linspace(0, 1, 256, device=error.device).pow(4) * LARGEST_ERROR
        values = torch.cat([grid, error.flatten()[:1024]]).view(1, 1, 1, -1)
        with torch.no_grad():
            target = self.teacher.scaler(values) - self.teacher.scaler(torch.zeros_like(values))
        gap = self.student.scaler(values).float() - self.student.scaler(torch.zeros_like(values)).float() - target
        return 10 * gap.square().mean() + (gap / target.clamp_min(0.01)).abs().clamp_max(1.0).mean() * 0.05


def _divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean divergence of two sigmoids given before them; unlike a squared error it pulls from saturation."""
    share = targets.sigmoid()
    at_best = F.binary_cross_entropy_with_logits(targets, share)
    return DIVERGENCE_WEIGHT * (F.binary_cross_entropy_with_logits(logits, share) - at_best)


@torch.no_grad()
def compare(student: MILO, teacher: MILO, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return how well `student` stands in for `teacher` over pairs of latents.

    Args:
        student: a metric.
        teacher: the metric it should equal.
        pairs: `ref` and `dist`, (1, C, h, w) each.

    Returns:
        `srcc` and `relative_error` (median) of the error E, the same of the mean of the error map with `map_` before,
        `mask_correlation` over all pixels of all pairs, and `mask_correlation_worst`, the lowest of a pair.
    """
    errors, means, masks, worst = [], [], [], 1.0
    device = student.device  # where training has taken both
    for pair in pairs:
        ref, dist = (each.to(device) for each in pair)
        first, second = (metric.compare(ref=ref, dist=dist) for metric in (student, teacher))
        errors.append(torch.cat([first.error, second.error]))
        means.append(torch.cat([each.error_map.mean(dim=(1, 2, 3)) for each in (first, second)]))
        masks.append(torch.stack([first.mask.flatten(), second.mask.flatten()]))
        worst = min(worst, pearson(*masks[-1]))
    error, mean = torch.stack(errors, dim=1), torch.stack(means, dim=1)  # (2, n)
    return {
        "srcc": spearman(error[0], error[1]),
        "relative_error": ((error[0] - error[1]).abs() / error[1]).median().item(),
        "map_srcc": spearman(mean[0], mean[1]),
        "map_relative_error": ((mean[0] - mean[1]).abs() / mean[1]).median().item(),
        "mask_correlation": pearson(*torch.cat(masks, dim=1)),
        "mask_correlation_worst": worst,
    }


def describe(figures: dict[str, float], count: int) -> str:
    """Return `figures` of `compare` as lines."""
    return "\n".join(f"{name:24s} {value:.4f}" for name, value in (figures | {"pairs": float(count)}).items())


def main(arguments: list[str] | None = None) -> None:
    """Distil and save, or evaluate what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, steps=40_000, crop_size=128, learning_rate=4e-3, optimizer="soap")
    parser.add_argument("--teacher", required=True, help="MILO weights, such as the official MILO_latent.pth")
    parser.add_argument("--validation", type=Path, required=True, help="folder of photos that are not trained on")
    parser.add_argument(
        "--encoded",
        type=Path,
        nargs=2,
        metavar=("TRAINING", "VALIDATION"),
        help="sets of build_dataset, for every other batch of latents",
    )
    parser.add_argument(
        "--held-out", type=Path, nargs=2, metavar=("REF", "DIST"), help="real latents, for the test only"
    )
    parser.add_argument("--evaluate", type=Path, metavar="METRIC", help="compare this metric with the teacher and stop")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    teacher = MILO.from_pretrained(options.teacher)
    held_out = perturb_pair(*map(read_latents, options.held_out)) if options.held_out else []
    if options.evaluate:
        print(describe(compare(MILO.from_pretrained(options.evaluate), teacher, held_out), len(held_out)))
        return
    space, factor = teacher.config.latent_space, teacher.config.scaling_factor
    channels = teacher.config.channels
    student = MILO(channels=channels, latent_space=space, scaling_factor=factor).to(memory_format=torch.channels_last)
    draw_pairs = draw_image_pairs if channels == 3 else draw_latent_pairs
    encoded = options.encoded or (None, None)
    draws = []
    for folders, folder, seed in (
        (options.images, encoded[0], options.seed),
        ([options.validation], encoded[1], 10_000),
    ):
        drawn = draw_pairs(ImageCrops(folders, crop_size=options.crop_size, seed=seed), options.batch_size)
        if folder is not None:
            drawn = half_encoded(drawn, folder, channels=channels, batch_size=options.batch_size, seed=seed)
        draws.append(drawn)
    draw, unseen = draws
    batches = [unseen(step, 0) for step in range(12)]
    pairs = [(ref[index : index + 1], dist[index : index + 1]) for ref, dist in batches for index in range(len(ref))]

    def validate(_: nn.Module) -> dict[str, float]:
        student.save_pretrained(options.output / "metric")  # so that it can be evaluated while it trains
        return compare(student, teacher, [pair for pair in pairs if not torch.equal(*pair)])

    config = run_config(options, decay=0.6, warmup=200, weight_decay=1e-6)
    fit(MatchingLoss(student, teacher), draw, config, validate=validate)
    if not training_state().is_main_process:
        return
    student.save_pretrained(options.output / "metric")
    if held_out:
        print(describe(compare(student.frozen(), teacher, held_out), len(held_out)))


if __name__ == "__main__":
    sys.exit(run_program(main))
