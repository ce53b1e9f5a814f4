"""What guidance pulls towards, and where: reference latents and regions, checked and matched to the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import ValueWatch, check_finite
from milo_latent.inputs import Images, images_to_tensor
from milo_latent.latents.codec import encode_image
from milo_latent.latents.spaces import VAE, LatentSpace
from milo_latent.metric.network import MILO


def encode_reference(vae: VAE, image: Images, *, size: tuple[int, int] | None = None) -> Tensor:
    """Encode an image into reference latents for guidance, once for any number of runs.

    Warns of a tensor outside [0, 1], such as one in the [-1, 1] that diffusers' image processors return.

    Args:
        vae: of the pipeline that is to be guided.
        image: what `images_to_tensor` takes: a picture, a path, an array, or a tensor (B, 3, H, W) in [0, 1].
        size: height and width of the pipeline's output, in pixels, if the image has another size; bicubic, antialiased.

    Returns:
        Reference latents, (B, C, h, w) float32, on the VAE's device.

    Raises:
        FileNotFoundError: for a path where nothing is.
        TypeError: if `image` is none of these.
        ValueError: for an image of another shape, or if the latents are not finite.
    """
    image = images_to_tensor(image)
    ValueWatch().look("image", image, latents=False)
    if size is not None and tuple(image.shape[2:]) != tuple(size):
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        latents = encode_image(vae, image, warn=False).float()  # the look above has warned
    check_finite("reference latents", latents)
    return latents


def check_latent_space(metric: MILO, vae: Any, pipeline_name: str) -> None:
    """Raise ValueError if the metric was trained on other latents than those of the pipeline's `vae`, if it has one."""
    if vae is None:
        return
    own, expected = LatentSpace(vae), metric.config
    channels, factor = own.channels, own.scaling_factor
    space = f"{expected.latent_space or 'unnamed'} latents, {expected.channels} channels"
    fits = channels == expected.channels
    if expected.scaling_factor is not None:
        space += f", scaling factor {expected.scaling_factor:g}"
        fits = fits and factor is not None and abs(factor - expected.scaling_factor) <= 1e-4 * expected.scaling_factor
    if not fits:
        raise ValueError(
            f"Expected a pipeline with the latents that the metric was trained on ({space}), got {pipeline_name} with "
            f"{channels} channels, scaling factor {factor}. Its VAE has another latent space, whose visible "
            "differences this metric does not know. Train MILO_L for that VAE."
        )


def match_reference(reference: Tensor, sample: Tensor) -> Tensor:
    """Return the reference latents, (B or 1, C, h, w), in the shape of the samples, (B, C, h, w), on their device.

    Raises:
        ValueError: for another shape.
    """
    check_count("reference_latents", reference, sample)
    if reference.shape[0] == 1:
        reference = reference.expand(sample.shape[0], -1, -1, -1)
    if reference.shape != sample.shape:
        raise ValueError(
            f"Expected reference latents of shape {tuple(sample.shape)}, got {tuple(reference.shape)}. "
            "Encode the reference image at the pipeline's size, with its own VAE."
        )
    return reference.to(sample.device)


def check_count(name: str, given: Tensor, sample: Tensor) -> None:
    """Raise ValueError unless `given`, called `name`, is one for all samples or one for each of them.

    With several results for each image, the order of the results differs between pipelines, so it is not guessed.
    """
    if given.shape[0] in (1, sample.shape[0]):
        return
    repeats, rest = divmod(sample.shape[0], given.shape[0])
    advice = (
        f"Repeat it in the order of the results: {name}.repeat_interleave({repeats}, dim=0) where those of an image "
        f"follow each other (text to image, DiffBIR), {name}.repeat({repeats}, 1, 1, 1) where all images follow each "
        "other several times (image to image and inpainting of diffusers)."
    )
    raise ValueError(
        f"Expected `{name}` for one or for each of {sample.shape[0]} results, got {given.shape[0]}. "
        + ("Give one for each." if rest or repeats == 0 else advice)
    )


def match_region(region: Tensor | None, sample: Tensor) -> Tensor:
    """Return the region, (B or 1, 1, h, w), in the dtype and on the device of the samples; 1 if there is none.

    Raises:
        ValueError: for another shape.
    """
    if region is None:
        return sample.new_ones(1, 1, 1, 1)
    check_count("region", region, sample)
    if region.shape[2:] != sample.shape[2:]:
        raise ValueError(
            f"Expected `region` of shape (B or 1, 1, {sample.shape[2]}, {sample.shape[3]}), got {tuple(region.shape)}. "
            'Resize it, e.g. torch.nn.functional.interpolate(region, size=(h, w), mode="area").'
        )
    return region.to(sample)
