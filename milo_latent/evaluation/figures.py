"""The figures of a restoration: how near it is to the clean image, and how good it looks without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from milo_latent.checks import check_choice
from milo_latent.evaluation.metrics import FullReference, by_name, pyiqa_metric
from milo_latent.extras import import_extra
from milo_latent.latents.codec import VAE, encode_image, vae_scale_factor
from milo_latent.metric.network import MILO
from milo_latent.pictures import round_to_8bit
from milo_latent.pipelines.diffbir import DiffBIRPipeline

NO_REFERENCE = {"topiq": "topiq_nr", "clip-iqa": "clipiqa", "musiq": "musiq"}  # with their names in pyiqa
FIGURES = ("psnr", "ssim", "ms-ssim", "vif", "gmsd", "milo_i", "milo_l", "lpips", *NO_REFERENCE)
SMALLEST_SIDE = {"ms-ssim": 161, "vif": 41, "milo_l": 128}  # in pixels; MILO_L's four levels need 16 latent cells


def lpips(device: torch.device | str = "cpu") -> FullReference:
    """Return LPIPS with AlexNet, of torchmetrics, which fetches the weights of AlexNet at its first use.

    Raises:
        ImportError: if torchmetrics or torchvision is not installed.
    """
    module = import_extra("torchmetrics.image.lpip", "eval", "LPIPS")
    metric = module.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    def compute(*, ref: Tensor, dist: Tensor) -> Tensor:
        value = metric(dist, ref)
        metric.reset()  # it would keep the value of every image
        return value

    return FullReference("lpips", compute, higher_is_better=False)


def image_error(milo_image: MILO) -> FullReference:
    """Return MILO_I's error E between two images."""
    return FullReference("milo_i", milo_image, higher_is_better=False)


def latent_error(pipe: DiffBIRPipeline, tile: int | None = None) -> FullReference:
    """Return MILO_L's error E between the latents of two images, by the autoencoder and the metric of a pipeline."""
    metric, encode = pipe.metric, partial(encode_image, pipe.vae, tile=whole_cells(pipe.vae, tile))
    assert metric is not None

    def compute(*, ref: Tensor, dist: Tensor) -> Tensor:
        return metric(ref=encode(ref).float(), dist=encode(dist).float())

    return FullReference("milo_l", compute, higher_is_better=False)


def whole_cells(vae: VAE, tile: int | None) -> int | None:
    """Return the side of a tile, rounded down to whole latent cells as the pipeline rounds it."""
    return None if tile is None else tile // vae_scale_factor(vae) * vae_scale_factor(vae)


def open_figures(
    pipe: DiffBIRPipeline,
    milo_image: MILO,
    *,
    referenced: bool = True,
    names: Sequence[str] | None = None,
    tile: int | None = None,
) -> tuple[dict[str, FullReference], list[str]]:
    """Open the figures that can be computed with what is installed.

    Args:
        pipe: whose autoencoder and metric MILO_L uses; without a metric there is no MILO_L.
        milo_image: computes MILO_I.
        referenced: whether there are clean images; without them only `NO_REFERENCE` is left.
        names: of `FIGURES`; None takes all of them, and leaves out those whose package or weights are not there.
        tile: side in pixels of the tiles in which images are encoded for MILO_L.

    Returns:
        The figures by name, in the order of `FIGURES`, and a line for each that is left out.

    Raises:
        ValueError: for an unknown name, or one that needs clean images or a metric where there are none.
        ImportError: if the package of a figure in `names` is not installed.
        OSError: if the weights of a figure in `names` cannot be fetched.
    """
    openers: dict[str, Callable[[], FullReference]] = {name: partial(by_name, name) for name in FIGURES[:5]}
    openers["milo_i"] = lambda: image_error(milo_image.to(pipe.device))
    if pipe.metric is not None:
        openers["milo_l"] = lambda: latent_error(pipe, tile)
    openers["lpips"] = lambda: lpips(pipe.device)
    openers = openers if referenced else {}
    openers |= {name: partial(pyiqa_metric, source) for name, source in NO_REFERENCE.items()}
    for name in names or ():
        check_choice("figure", name, openers)
    figures, left_out = {}, []
    for name, open_figure in openers.items():
        if names is None or name in names:
            try:
                figures[name] = open_figure()
            except (ImportError, OSError, RuntimeError) as error:
                if names is not None:
                    raise
                reason = " ".join(str(error).split()).partition(". ")[0]
                left_out.append(f"{name} is left out: {reason}")
    return figures, left_out


@torch.no_grad()
def measure(figures: Mapping[str, FullReference], result: Tensor, clean: Tensor | None = None) -> dict[str, float]:
    """Return the figures of a restored image, rounded to 8 bit as a file would be.

    Args:
        figures: by name.
        result: (1, 3, H, W), in [0, 1].
        clean: of the same shape; None for `NO_REFERENCE` figures alone.

    Returns:
        Values by name; NaN where the image is smaller than `SMALLEST_SIDE`.
    """
    result, side = round_to_8bit(result), min(result.shape[2:])
    return {
        name: figure.compute(ref=clean, dist=result).item() if side >= SMALLEST_SIDE.get(name, 1) else math.nan
        for name, figure in figures.items()
    }
