"""Train MILO_L without a training set on disk: pairs are drawn, labeled by another MILO and encoded for each step."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.evaluation.agreement import import_scipy, spearman
from milo_latent.latents.codec import encode_image
from milo_latent.latents.files import load_vae, vae_folder
from milo_latent.latents.spaces import VAE, LatentSpace
from milo_latent.metric.network import MILO, is_image_metric
from milo_latent.programs import run_program
from milo_latent.score.pairs import check_vae
from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.data.fingerprints import metric_digests, source_digest
from milo_latent.training.data.image_pairs import draw_image_pairs
from milo_latent.training.engine.loop import add_run_options, fit, run_config, training_state
from milo_latent.training.pseudo_mos import Ensemble, build_ensemble
from milo_latent.training.train_metric import initialize, scale_map

MAP_WEIGHT = 1.0  # of the loss of the error map, relative to that of its mean


class Teacher(nn.Module):
    """Labels pairs of images by their error map: that of MILO_I, or of a MILO_L on the latents of its autoencoder.

    Args:
        metric: frozen.
        vae: of the latents that `metric` knows; None for MILO_I.
        members: further metrics, calibrated to the scale of `metric`; the map is scaled so that its mean is the mean of
            what it was and of their labels.
    """

    def __init__(self, metric: MILO, vae: VAE | None = None, members: Ensemble | None = None) -> None:
        super().__init__()
        self.metric, self.vae = metric, None if vae is None else vae.requires_grad_(False)
        self.members = members

    @torch.no_grad()
    def forward(self, *, ref: Tensor, dist: Tensor) -> Tensor:
        """Return the error map, (B, 1, H, W) or (B, 1, h, w), of images (B, 3, H, W) in [0, 1]."""
        pair = {"ref": ref, "dist": dist}
        if self.vae is not None:
            latents = encode_image(self.vae, torch.cat([ref, dist])).float().chunk(2)
            pair = {"ref": latents[0], "dist": latents[1]}
        error_map = self.metric.error_map(**pair).float()
        if self.members is None:
            return error_map
        labels = self.members.labels(ref=ref, dist=dist).to(error_map)  # (B, members)
        own = error_map.mean(dim=(2, 3))  # (B, 1)
        return scale_map(error_map, torch.cat([own, labels], dim=1).mean(dim=1))

    @classmethod
    def open(cls, weights: str, vae: str | None = None, members: Ensemble | None = None) -> Teacher:
        """Open the weights of a MILO_I, or those of a MILO_L and its autoencoder.

        Raises:
            ValueError: if a MILO_L has no autoencoder, or one of other latents, or a MILO_I has one.
        """
        metric = MILO.from_pretrained(weights)
        if is_image_metric(metric) != (vae is None):
            needed = "a --teacher for images without --teacher-vae, or one for latents with it"
            raise ValueError(f"Expected {needed}, got {weights} of {metric.config.channels} channels and {vae}.")
        opened = None if vae is None else load_vae(vae)
        if opened is not None:
            check_vae(metric, opened)
        return cls(metric, opened, members)


class TeacherLoss(nn.Module):
    """Squared error of MILO_L's error map, and of its mean, against a teacher's for the same pairs.

    Args:
        metric: MILO_L, trained.
        teacher: labels the pairs.
        vae: autoencoder whose latents MILO_L learns, frozen.
    """

    def __init__(self, metric: MILO, *, teacher: Teacher, vae: VAE) -> None:
        super().__init__()
        self.metric, self.teacher, self.vae = metric, teacher, vae.requires_grad_(False)

    def forward(self, ref: Tensor, dist: Tensor) -> Tensor:
        """Return the loss for images (B, 3, H, W) in [0, 1]."""
        teacher_map = self.teacher(ref=ref, dist=dist)  # (B, 1, H, W)
        with torch.no_grad():
            latents = encode_image(self.vae, torch.cat([ref, dist])).float()
        ref_latents, dist_latents = latents.chunk(2)  # (B, C, h, w) each
        target = F.interpolate(teacher_map, size=ref_latents.shape[2:], mode="area")  # (B, 1, h, w)
        predicted = self.metric.error_map(dist=dist_latents, ref=ref_latents).float()
        mean_error = (predicted.mean(dim=(1, 2, 3)) - target.mean(dim=(1, 2, 3))).square().mean()
        return mean_error + MAP_WEIGHT * (predicted - target).square().mean()


@torch.no_grad()
def teacher_agreement(loss: TeacherLoss, folder: Path, *, crop_size: int, batches: int = 12) -> float:
    """Return Spearman's correlation of MILO_L's and the teacher's mean error over distorted crops of `folder`."""
    draw = draw_image_pairs(ImageCrops([folder], crop_size=crop_size, seed=10_000), 16)
    metric, vae = loss.metric, loss.vae
    means = []
    for step in range(batches):
        ref, dist = (each.to(metric.device) for each in draw(step, 0))
        latents = {"ref": encode_image(vae, ref).float(), "dist": encode_image(vae, dist).float()}
        maps = (metric.error_map(**latents), loss.teacher(ref=ref, dist=dist))
        means.append(torch.stack([each.mean(dim=(1, 2, 3)) for each in maps]))
    return spearman(*torch.cat(means, dim=1))


def main(arguments: list[str] | None = None) -> None:
    """Train and save the metric."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_options(parser, steps=6_000, crop_size=128, learning_rate=5e-4)
    parser.add_argument("--validation", type=Path, required=True, help="folder of clean validation images")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--teacher", required=True, help="weights of a MILO, such as official-image or MILO.pth")
    parser.add_argument("--teacher-vae", help="autoencoder of a teacher for latents, such as nano")
    parser.add_argument("--members", nargs="+", help="metrics that label beside the teacher, such as gmsd")
    parser.add_argument("--calibrations", help="JSON of milo_latent.training.pseudo_mos --like milo:TEACHER")
    parser.add_argument("--latent-space", required=True, help="name of the autoencoder in the configuration")
    parser.add_argument("--levels", type=int, default=4, help="scales; latents have at least 2^levels cells a side")
    options = parser.parse_args(arguments)
    import_scipy("stats")  # before the first step, not at the first validation
    torch.manual_seed(options.seed)
    vae = load_vae(options.vae)
    space = LatentSpace(vae)
    metric = MILO(
        channels=space.channels,
        levels=options.levels,
        latent_space=options.latent_space,
        scaling_factor=space.scaling_factor,
    )
    initialize(metric)
    data: dict[str, object] = {"levels": options.levels}
    if options.teacher_vae is not None:
        data["teacher_vae"] = source_digest(vae_folder(options.teacher_vae))
    members = None
    if options.members is not None:
        members = build_ensemble(options.members, options.calibrations)
        data["members"] = {each.name: asdict(members.calibrations[each.name]) for each in members.members}
        data["member_weights"] = metric_digests(options.members)
    teacher = Teacher.open(options.teacher, options.teacher_vae, members)
    for network in (vae, teacher.metric):
        network.to(memory_format=torch.channels_last)
    loss = TeacherLoss(metric, teacher=teacher, vae=vae)
    crops = ImageCrops(options.images, crop_size=options.crop_size, seed=options.seed)

    draw = draw_image_pairs(crops, options.batch_size)
    config = run_config(options, weight_decay=1e-6, data=data)

    def validate(trained: nn.Module) -> dict[str, float]:
        return {"srcc": teacher_agreement(loss, options.validation, crop_size=options.crop_size)}

    fit(loss, draw, config, validate=validate)
    if not training_state().is_main_process:
        return
    metric.save_pretrained(options.output / "metric")
    print(f"SRCC with the teacher on {options.validation}: {validate(loss)['srcc']:.4f}")


if __name__ == "__main__":
    sys.exit(run_program(main))
