"""Full-reference metrics by name: our own, structural ones of torchmetrics, and those of pyiqa."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.evaluation.gmsd import gmsd
from milo_latent.extras import import_extra
from milo_latent.latents.codec import VAE, encode_image
from milo_latent.latents.files import load_vae
from milo_latent.metric.loading import weights_path
from milo_latent.metric.network import MILO

PYIQA_LICENCE = "pyiqa's licence is non-commercial: labels made with it, and what is trained on them, may inherit that."


@dataclass(frozen=True)
class FullReference:
    """A metric of `ref` and `dist`, images (B, 3, H, W) in [0, 1], with one direction for all metrics.

    Args:
        name: shown in tables.
        compute: called with the keywords `ref` and `dist`, returns the metric's own values, (B,).
        higher_is_better: direction of these values.
    """

    name: str
    compute: Callable[..., Tensor]
    higher_is_better: bool

    def error(self, *, ref: Tensor, dist: Tensor) -> Tensor:
        """Return the metric's values, (B,) float64, negated if higher is better, so that lower is better."""
        with torch.no_grad():
            values = self.compute(ref=ref, dist=dist).double().cpu()
        return -values if self.higher_is_better else values


def psnr(*, ref: Tensor, dist: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,); 60 for equal images."""
    return -10 * (ref - dist).square().mean(dim=(1, 2, 3)).clamp_min(1e-6).log10()


def mean_absolute_error(*, ref: Tensor, dist: Tensor) -> Tensor:
    """Return the mean absolute difference, (B,)."""
    return (ref - dist).abs().mean(dim=(1, 2, 3))


def structural(name: str) -> FullReference:
    """Return "ssim", "ms-ssim" or "vif" of torchmetrics (Apache-2.0).

    Raises:
        ImportError: if torchmetrics is not installed.
    """
    functional = import_extra("torchmetrics.functional.image", "eval", f"The metric {name}")

    def compute(*, ref: Tensor, dist: Tensor) -> Tensor:
        if name == "ssim":
            return functional.structural_similarity_index_measure(dist, ref, data_range=1.0, reduction="none")
        if name == "ms-ssim":
            options = {"data_range": 1.0, "reduction": "none", "normalize": "relu"}
            return functional.multiscale_structural_similarity_index_measure(dist, ref, **options).reshape(-1)
        pairs = zip(dist.split(1), ref.split(1), strict=True)
        return torch.stack([functional.visual_information_fidelity(255 * d, 255 * r) for d, r in pairs])

    return FullReference(name, compute, higher_is_better=True)


def milo(source: str | Path, vae: VAE | None = None) -> FullReference:
    """Return the mean of MILO's error map: MILO_I of images or, with `vae`, MILO_L of their latents.

    Args:
        source: as in `MILO.from_pretrained`.
        vae: encodes the images.

    Raises:
        ValueError: if the weights are of MILO_L and there is no `vae`.
    """
    metric = MILO.from_pretrained(source)
    if vae is None and metric.config.channels != 3:
        raise ValueError(f"Expected MILO_I in {source}, got {metric.config.channels} channels. Use milo-latent:…")

    def compute(*, ref: Tensor, dist: Tensor) -> Tensor:
        if vae is not None:
            ref, dist = _encode_pair(vae, ref, dist)
        metric.to(ref.device)  # in training, images lie on the accelerator
        return metric.error_map(ref=ref, dist=dist).mean(dim=(1, 2, 3))

    name = f"milo:{weights_path(source).stem}" if vae is None else f"milo-latent:{Path(source).name}"
    return FullReference(name, compute, higher_is_better=False)


def latent_l1(vae: VAE) -> FullReference:
    """Return the mean absolute difference of latents."""

    def compute(*, ref: Tensor, dist: Tensor) -> Tensor:
        ref_latents, dist_latents = _encode_pair(vae, ref, dist)
        return mean_absolute_error(ref=ref_latents, dist=dist_latents)

    return FullReference("latent-l1", compute, higher_is_better=False)


def _encode_pair(vae: VAE, ref: Tensor, dist: Tensor) -> tuple[Tensor, Tensor]:
    ref_latents, dist_latents = encode_image(vae, torch.cat([ref, dist])).float().chunk(2)
    return ref_latents, dist_latents


def pyiqa_metric(name: str) -> FullReference:
    """Return a metric of pyiqa, if the user has installed it.

    Raises:
        ImportError: if pyiqa is not installed; the message tells its licence.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise ImportError(f"Expected pyiqa for {name!r}: pip install pyiqa. {PYIQA_LICENCE}") from error
    metric = pyiqa.create_metric(name, as_loss=False)

    def compute(*, ref: Tensor, dist: Tensor) -> Tensor:
        return metric(dist, ref).reshape(-1)

    return FullReference(f"pyiqa:{name}", compute, higher_is_better=not metric.lower_better)


def by_name(text: str, *, vae: VAE | None = None) -> FullReference:
    """Open a metric by the name that a command line gives.

    Args:
        text: psnr, mae, gmsd, ssim, ms-ssim, vif, milo:WEIGHTS, milo-latent:WEIGHTS, latent-l1 or pyiqa:NAME;
            milo-latent:WEIGHTS@VAE names an autoencoder of its own.
        vae: autoencoder for the other metrics on latents.

    Raises:
        ValueError: for another name, or a metric on latents without `vae`.
        ImportError: if the package of a metric is not installed.
    """
    kind, _, source = text.partition(":")
    source, own, folder = source.partition("@") if kind == "milo-latent" else (source, "", "")
    vae = load_vae(folder) if own else vae
    if kind in ("milo-latent", "latent-l1"):
        if vae is None:
            raise ValueError(f"Expected an autoencoder for {text!r}. Pass --vae.")
        return latent_l1(vae) if kind == "latent-l1" else milo(source, vae)
    if kind == "milo":
        return milo(source)
    if kind == "pyiqa":
        return pyiqa_metric(source)
    if kind in ("ssim", "ms-ssim", "vif"):
        return structural(kind)
    simple = {
        "psnr": FullReference("psnr", psnr, True),
        "mae": FullReference("mae", mean_absolute_error, False),
        "gmsd": FullReference("gmsd", gmsd, False),
    }
    if kind not in simple:
        raise ValueError(
            "Expected psnr, mae, gmsd, ssim, ms-ssim, vif, milo:WEIGHTS, milo-latent:WEIGHTS, latent-l1 or pyiqa:NAME, "
            f"got {text!r}."
        )
    return simple[kind]
