"""Full-reference metrics as plain callables, by name: our own, structural ones of torchmetrics, those of pyiqa."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milo_latent.latents.codec import VAE, encode_image
from milo_latent.metric.network import MILO

PYIQA_LICENCE = "pyiqa's licence is non-commercial: labels made with it, and what is trained on them, may inherit that."


@dataclass(frozen=True)
class FullReference:
    """A metric of `ref` and `dist`, images (B, 3, H, W) in [0, 1], to scores (B,).

    Args:
        name: for tables.
        score: called with the keywords `ref` and `dist`.
        higher_is_better: direction of the scores.
    """

    name: str
    score: Callable[..., Tensor]
    higher_is_better: bool

    def damage(self, *, ref: Tensor, dist: Tensor) -> Tensor:
        """Return scores of which higher means worse, (B,)."""
        with torch.no_grad():
            score = self.score(ref=ref, dist=dist).double().cpu()
        return -score if self.higher_is_better else score


def psnr(*, ref: Tensor, dist: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,); 60 for equal images."""
    return -10 * (ref - dist).square().mean(dim=(1, 2, 3)).clamp_min(1e-6).log10()


def mean_absolute_error(*, ref: Tensor, dist: Tensor) -> Tensor:
    """Return the mean absolute difference, (B,)."""
    return (ref - dist).abs().mean(dim=(1, 2, 3))


def _torchmetrics() -> Any:
    try:
        import torchmetrics.functional.image as functional
    except ImportError as error:
        raise ImportError(
            'The structural metrics need torchmetrics: pip install "milo_latent[eval]", or leave them out.'
        ) from error
    return functional


def structural(name: str) -> FullReference:
    """Return "ssim", "ms-ssim" or "vif" of torchmetrics (Apache-2.0).

    Raises:
        ImportError: where torchmetrics is missing.
    """
    functional = _torchmetrics()

    def score(*, ref: Tensor, dist: Tensor) -> Tensor:
        if name == "ssim":
            return functional.structural_similarity_index_measure(dist, ref, data_range=1.0, reduction="none")
        if name == "ms-ssim":
            options = {"data_range": 1.0, "reduction": "none", "normalize": "relu"}
            return functional.multiscale_structural_similarity_index_measure(dist, ref, **options).reshape(-1)
        each = [
            functional.visual_information_fidelity(d * 255, r * 255)
            for d, r in zip(dist[:, None], ref[:, None], strict=True)
        ]
        return torch.stack(each)

    return FullReference(name, score, higher_is_better=True)


def milo_image(source: str | Path, name: str | None = None) -> FullReference:
    """Return the mean of MILO_I's error map.

    Args:
        source: as of `MILO.from_pretrained`.
        name: for tables.

    Raises:
        ValueError: if the weights are of MILO_L.
    """
    metric = MILO.from_pretrained(source)
    if metric.config.channels != 3:
        raise ValueError(f"Expected MILO_I in {source}, got {metric.config.channels} channels. Use milo-latent:…")

    def score(*, ref: Tensor, dist: Tensor) -> Tensor:
        return metric.error_map(ref=ref, dist=dist).mean(dim=(1, 2, 3))

    return FullReference(name or f"milo:{Path(source).stem}", score, higher_is_better=False)


def milo_latent(source: str | Path, vae: VAE, name: str | None = None) -> FullReference:
    """Return the mean of MILO_L's error map of the latents of images.

    Args:
        source: as of `MILO.from_pretrained`.
        vae: encodes the images.
        name: for tables.
    """
    metric = MILO.from_pretrained(source)

    def score(*, ref: Tensor, dist: Tensor) -> Tensor:
        latents = encode_image(vae, torch.cat([ref, dist])).float()
        ref_latents, dist_latents = latents.chunk(2)
        return metric.error_map(ref=ref_latents, dist=dist_latents).mean(dim=(1, 2, 3))

    return FullReference(name or f"milo-latent:{Path(source).name}", score, higher_is_better=False)


def latent_l1(vae: VAE) -> FullReference:
    """Return the mean absolute difference of latents."""

    def score(*, ref: Tensor, dist: Tensor) -> Tensor:
        ref_latents, dist_latents = encode_image(vae, torch.cat([ref, dist])).float().chunk(2)
        return mean_absolute_error(ref=ref_latents, dist=dist_latents)

    return FullReference("latent-l1", score, higher_is_better=False)


def pyiqa_metric(name: str) -> FullReference:
    """Return a metric of pyiqa, where the user has installed it.

    Raises:
        ImportError: where it is missing; with a note on its licence.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise ImportError(f"Expected pyiqa for {name!r}: pip install pyiqa. {PYIQA_LICENCE}") from error
    metric = pyiqa.create_metric(name, as_loss=False)

    def score(*, ref: Tensor, dist: Tensor) -> Tensor:
        return metric(dist, ref).reshape(-1)

    return FullReference(f"pyiqa:{name}", score, higher_is_better=not metric.lower_better)


def by_name(text: str, *, vae: VAE | None = None) -> FullReference:
    """Open a metric by what a command line says.

    Args:
        text: psnr, mae, ssim, ms-ssim, vif, milo:WEIGHTS, milo-latent:WEIGHTS, latent-l1 or pyiqa:NAME.
        vae: for the metrics on latents.

    Raises:
        ValueError: for another name, or a metric on latents without `vae`.
        ImportError: where a metric's package is missing.
    """
    kind, _, source = text.partition(":")
    if kind in ("milo-latent", "latent-l1"):
        if vae is None:
            raise ValueError(f"Expected an autoencoder for {text!r}. Pass --vae.")
        return latent_l1(vae) if kind == "latent-l1" else milo_latent(source, vae)
    if kind == "milo":
        return milo_image(source)
    if kind == "pyiqa":
        return pyiqa_metric(source)
    if kind in ("ssim", "ms-ssim", "vif"):
        return structural(kind)
    simple = {"psnr": FullReference("psnr", psnr, True), "mae": FullReference("mae", mean_absolute_error, False)}
    if kind not in simple:
        raise ValueError(
            f"Expected psnr, mae, ssim, ms-ssim, vif, milo:WEIGHTS, milo-latent:WEIGHTS, latent-l1 or pyiqa:NAME, "
            f"got {text!r}."
        )
    return simple[kind]
