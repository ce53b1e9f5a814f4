"""Distil MILO from a teacher: MILO_L on synthetic latents, without their autoencoder, or MILO_I on photos.

The student starts from random weights of its own and learns from the teacher's outputs: the masks of all levels, the
error and the scaler. Neither the teacher's weights nor its hidden layers are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.evaluation.agreement import import_scipy, pearson, spearman
from milo_latent.files import read_latents
from milo_latent.metric.network import MILO
from milo_latent.programs import run_program
from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.data.fingerprints import shards_digest
from milo_latent.training.data.image_pairs import draw_image_pairs
from milo_latent.training.distillation.encoded_pairs import half_encoded
from milo_latent.training.distillation.latent_distortions import draw_latent_pairs
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
LARGEST_ERROR = 6.0  # error per pixel up to which the scaler is learned: latents rarely differ by more than 3
DIVERGENCE_WEIGHT = 4.0  # of the levels' divergence, relative to the mask's squared error over its variance
SMALLEST_CROP = 24  # cells, of the test pair
LEAST_VARIANCE = 0.003  # added to a mask's variance, so that flat masks do not weigh too much


def levels_and_mask(metric: MILO, *, ref: Tensor, dist: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the mask finder's logits at each level, coarse to fine, (B, 1, h_l, w_l) each, and the mask.

    The mask is that of `MILO.mask`, which does not return the logits.
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
    """Distance between the outputs of a student, which is trained, and a teacher, which is frozen."""

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
        """Compare the scalers, as differences from their value at 0, at errors per pixel and over the whole range."""
        grid = torch.linspace(0, 1, 256, device=error.device).pow(4) * LARGEST_ERROR
        values = torch.cat([grid, error.flatten()[:1024]]).view(1, 1, 1, -1)
        with torch.no_grad():
            target = self.teacher.scaler(values) - self.teacher.scaler(torch.zeros_like(values))
        gap = self.student.scaler(values).float() - self.student.scaler(torch.zeros_like(values)).float() - target
        return 10 * gap.square().mean() + (gap / target.clamp_min(0.01)).abs().clamp_max(1.0).mean() * 0.05


def _divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean divergence between the sigmoids of two tensors.

    Unlike the squared error it has a gradient where the student's sigmoid is saturated.
    """
    share = targets.sigmoid()
    at_best = F.binary_cross_entropy_with_logits(targets, share)
    return DIVERGENCE_WEIGHT * (F.binary_cross_entropy_with_logits(logits, share) - at_best)


def perturb_pair(ref: Tensor, dist: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return a pair of latents, (1, C, h, w) each, and 260 perturbations of it.

    They are noise, scaling, crops, blends and changes of the reference, which training does not use.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = [(ref, dist)]
    for sigma in torch.logspace(-2, 0.2, 30).tolist():
        noise = sigma * torch.randn(ref.shape, generator=generator)
        pairs += [(ref, dist + noise), (ref, ref + noise)]
    for factor in torch.linspace(0.6, 1.4, 20).tolist():
        pairs += [(ref, dist * factor), (ref * factor, dist * factor)]
        pairs += [(ref, ref * (factor + 0.003))]  # never exactly 1, where there is no error to compare
    for _ in range(60):
        side = int(torch.randint(SMALLEST_CROP, min(ref.shape[2:]), (), generator=generator))
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in ref.shape[2:])
        crop = (..., slice(top, top + side), slice(left, left + side))
        pairs.append((ref[crop], dist[crop]))
    for share in torch.linspace(0.02, 1.5, 40).tolist():
        pairs.append((ref, ref + share * (dist - ref)))
    for share in torch.linspace(0.05, 1.0, 20).tolist():
        pairs.append((ref, ref + share * (dist.flip(3) - ref)))
    for size in range(1, 11):
        blurred = F.avg_pool2d(F.pad(ref, (size,) * 4, mode="replicate"), 2 * size + 1, stride=1)
        pairs += [(ref, blurred), (ref.flip(2), dist.flip(2) + 0.05 * size)]
    return pairs


@torch.no_grad()
def compare(student: MILO, teacher: MILO, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return how closely `student` agrees with `teacher` on pairs of latents or images, (1, C, h, w) each.

    Returns:
        `srcc` and the median `relative_error` of the error E; `map_srcc` and `map_relative_error`, the same for the
        mean of the error map; `mask_correlation` over all pixels of all pairs, and `mask_correlation_worst`, the lowest
        correlation within a pair.
    """
    errors, means, masks, worst = [], [], [], 1.0
    device = student.device  # fit() has moved both metrics there
    for pair in pairs:
        ref, dist = (each.to(device) for each in pair)
        outputs = [metric.compare(ref=ref, dist=dist) for metric in (student, teacher)]
        errors.append(torch.cat([each.error for each in outputs]))
        means.append(torch.cat([each.error_map.mean(dim=(1, 2, 3)) for each in outputs]))
        masks.append(torch.stack([each.mask.flatten() for each in outputs]))
        worst = min(worst, pearson(*masks[-1]))
    return {
        **_agreement(torch.stack(errors, dim=1), prefix=""),
        **_agreement(torch.stack(means, dim=1), prefix="map_"),
        "mask_correlation": pearson(*torch.cat(masks, dim=1)),
        "mask_correlation_worst": worst,
    }


def _agreement(values: Tensor, *, prefix: str) -> dict[str, float]:
    student, teacher = values  # (n,) each
    relative = ((student - teacher).abs() / teacher).median().item()
    return {f"{prefix}srcc": spearman(student, teacher), f"{prefix}relative_error": relative}


def describe(student: MILO, teacher: MILO, pairs: list[tuple[Tensor, Tensor]]) -> str:
    """Return the figures of `compare` as lines."""
    figures = compare(student, teacher, pairs) | {"pairs": len(pairs)}
    return "\n".join(f"{name:24s} {value:.4f}" for name, value in figures.items())


def draw_pairs(folder: Path | None, images: list[Path], seed: int, channels: int, options: argparse.Namespace) -> Draw:
    """Return the function from (step, process) to a batch of `ref` and `dist`.

    It draws images (3 channels) or latents from folders of photos and, for every other batch of latents, from the
    training set in `folder`, if there is one.
    """
    crops = ImageCrops(images, crop_size=options.crop_size, seed=seed)
    draw = (draw_image_pairs if channels == 3 else draw_latent_pairs)(crops, options.batch_size)
    if folder is None:
        return draw
    return half_encoded(draw, folder, channels=channels, batch_size=options.batch_size, seed=seed)


def distil(teacher: MILO, options: argparse.Namespace) -> MILO:
    """Train a student of `teacher`, or resume its training, and return it."""
    config = teacher.config
    student = MILO(channels=config.channels, latent_space=config.latent_space, scaling_factor=config.scaling_factor)
    student.to(memory_format=torch.channels_last)
    training, validation = options.encoded or (None, None)
    draw = draw_pairs(training, options.images, options.seed, config.channels, options)
    unseen = draw_pairs(validation, [options.validation], 10_000, config.channels, options)
    pairs = [pair for step in range(12) for pair in zip(*(each.split(1) for each in unseen(step, 0)), strict=True)]
    pairs = [pair for pair in pairs if not torch.equal(*pair)]

    def validate(_: nn.Module) -> dict[str, float]:
        student.save_pretrained(options.output / "metric")  # so that it can be evaluated during training
        return compare(student, teacher, pairs)

    data = {"encoded": shards_digest(training)} if training else {}
    run = run_config(options, data=data, decay=0.6, warmup=200, weight_decay=1e-6)
    fit(MatchingLoss(student, teacher), draw, run, validate=validate)
    return student


def main(arguments: list[str] | None = None) -> None:
    """Distil and save a metric, or evaluate one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, steps=40_000, crop_size=128, learning_rate=4e-3, optimizer="soap")
    parser.add_argument("--teacher", required=True, help="MILO weights, such as the official MILO_latent.pth")
    parser.add_argument("--validation", type=Path, required=True, help="folder of other photos")
    parser.add_argument(
        "--encoded",
        type=Path,
        nargs=2,
        metavar=("TRAINING", "VALIDATION"),
        help="training sets of build_dataset, for every other batch of latents",
    )
    parser.add_argument(
        "--held-out", type=Path, nargs=2, metavar=("REF", "DIST"), help="a pair of real latents, for the test only"
    )
    parser.add_argument("--evaluate", type=Path, metavar="METRIC", help="compare this metric with the teacher and stop")
    options = parser.parse_args(arguments)
    import_scipy("stats")  # before the first step, not at the first validation
    torch.manual_seed(options.seed)
    teacher = MILO.from_pretrained(options.teacher)
    held_out = perturb_pair(*map(read_latents, options.held_out)) if options.held_out else []
    if options.evaluate:
        print(describe(MILO.from_pretrained(options.evaluate), teacher, held_out))
        return
    student = distil(teacher, options)
    if not training_state().is_main_process:
        return
    student.save_pretrained(options.output / "metric")
    if held_out:
        print(describe(student.frozen(), teacher, held_out))


if __name__ == "__main__":
    sys.exit(run_program(main))
