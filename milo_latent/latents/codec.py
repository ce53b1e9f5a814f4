"""Images to latents and back: pad, encode and scale; unscale, decode and crop."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import ValueWatch, check_batch
from milo_latent.inputs import Images, images_to_tensor
from milo_latent.latents.spaces import VAE, LatentSpace
from milo_latent.latents.tiling import tiled

# in latent cells; at 8 cells from a tile's border, latents of `nano` change by less than 3e-5 (standard deviation 1)
TINY_MARGIN, TINY_OVERLAP = 8, 20
SMALLEST_TILE = 320  # in pixels, of VAEs with cells of 8 pixels and more
WATCH = ValueWatch()


def vae_scale_factor(vae: VAE) -> int:
    """Return how many pixels a latent cell covers along a side: 8 for Stable Diffusion."""
    return LatentSpace(vae).factor


def scale_latents(vae: VAE, raw: Tensor) -> Tensor:
    """Scale the encoder's output, (B, C, h, w), as the pipelines of the VAE do."""
    return LatentSpace(vae).scale(raw)


def unscale_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Turn scaled latents, (B, C, h, w), into the decoder's input."""
    return LatentSpace(vae).unscale(latents)


def encode_image(vae: VAE, image: Images, *, tile: int | None = None, warn: bool = True) -> Tensor:
    """Encode images into scaled latents, the mode of the posterior, so that equal images have equal latents.

    With tiles, peak memory does not grow with the image, apart from the image and its latents. The latents of an
    `AutoencoderTiny` differ by less than 1e-4 then. An `AutoencoderKL` normalizes and attends over the whole image, so
    its tiles can only be approximate: with random weights, the worst case, tiles of 320 pixels change latents by less
    than 0.9 standard deviations and decoded images by less than 0.15 (root mean square), and diffusers'
    `enable_tiling` changes them more. Choose the largest tiles that fit into memory.

    Args:
        vae: of a class in `latents.spaces.KINDS`, such as `AutoencoderKL`, or of one derived from it.
        image: (B, 3, H, W), in [0, 1], or what else `images_to_tensor` takes, such as pictures and paths; H and W are
            padded to multiples of the VAE's factor by repeating the border.
        tile: side of the tiles in pixels, at least 320; None encodes the image as a whole.
        warn: whether to warn, once in a process, of images on the CPU that are far outside [0, 1], as the results of
            networks may be.

    Returns:
        Latents, (B, C, h, w), in the VAE's dtype and on its device.

    Raises:
        FileNotFoundError: for a path where nothing is.
        TypeError: if `image` is no image.
        ValueError: if `image` has another shape, the VAE is of an unknown class, or `tile` does not fit it.
    """
    image = images_to_tensor(image)
    if warn:
        WATCH.glance("image", image, latents=False)
    factor = vae_scale_factor(vae)
    padded = pad_image(image, factor)
    if tile is None:
        return _encode(vae, padded)
    sizes = {name: cells * factor for name, cells in _tile_sizes(vae, tile).items()}
    return tiled(partial(_encode, vae), padded, **sizes, multiple=factor, scale=Fraction(1, factor))


def _encode(vae: VAE, image: Tensor) -> Tensor:
    space = LatentSpace(vae)
    return space.scale(space.encode(_to_vae(image, vae) * 2 - 1))


def _tile_sizes(vae: VAE, tile: int) -> dict[str, int]:
    """Return the arguments of `tiled`, in latent cells, for tiles of `tile` pixels."""
    check_tile(vae, tile)
    cells = tile // vae_scale_factor(vae)
    if LatentSpace(vae).name == "AutoencoderTiny":
        return {"tile": cells, "overlap": TINY_OVERLAP, "margin": TINY_MARGIN}
    # the tiles of other VAEs differ in their overall tone, which a wide overlap blends
    return {"tile": cells, "overlap": cells // 4, "margin": cells // 16}


def check_tile(vae: VAE, tile: int) -> None:
    """Raise ValueError if tiles of `tile` pixels are too small for the VAE; the rest of a latent cell is left out."""
    space = LatentSpace(vae)
    factor, cells = space.factor, 2 * TINY_OVERLAP
    if space.name != "AutoencoderTiny":  # whose tiles must hold two margins
        cells = min(cells, -(-SMALLEST_TILE // factor))
    smallest = cells * factor
    if tile < smallest:
        raise ValueError(f"Expected `tile` of at least {smallest} pixels, got {tile}. 512 suits most machines.")


def decode_latents(vae: VAE, latents: Tensor, *, tile: int | None = None, clip: bool = True) -> Tensor:
    """Decode scaled latents into images.

    Args:
        vae: the VAE of the latents.
        latents: (B, C, h, w).
        tile: side of the tiles in pixels, with the tolerances of `encode_image`; None decodes as a whole.
        clip: whether to clip to [0, 1], which a decoder may exceed a little.

    Returns:
        Images, (B, 3, H, W) float32, in [0, 1] if clipped.

    Raises:
        TypeError: if `latents` are not floating point.
        ValueError: if `latents` are not (B, C, h, w) with the VAE's C, or `tile` does not fit the VAE.
    """
    check_batch("latents", latents, LatentSpace(vae).channels)
    decode = partial(_decode, vae, clip=clip)
    if tile is None:
        return decode(latents)
    return tiled(decode, latents, **_tile_sizes(vae, tile), scale=vae_scale_factor(vae))


def _decode(vae: VAE, latents: Tensor, clip: bool) -> Tensor:
    space = LatentSpace(vae)
    image = space.decode(space.unscale(_to_vae(latents, vae))).float() / 2 + 0.5
    return image.clamp(0, 1) if clip else image


def _to_vae(tensor: Tensor, vae: VAE) -> Tensor:
    return tensor.to(device=working_device(vae.device, tensor), dtype=vae.dtype)


def working_device(own: torch.device, tensor: Tensor) -> torch.device:
    """Return where a network on the device `own` computes: an offloaded one waits elsewhere, and follows its input.

    It waits on the CPU, or as the device "meta" where diffusers offloads layer by layer.
    """
    return own if tensor.device.type == "cpu" and own.type != "meta" else tensor.device


def pad_image(image: Tensor, multiple: int, *, smallest: int = 1) -> Tensor:
    """Pad images, (B, C, H, W), at the bottom and right by repeating the border; `[..., :H, :W]` is the input.

    The padded sides are the least multiples of `multiple` that are neither below `smallest` nor below the image's.
    """
    height, width = image.shape[2:]
    bottom, right = (-(-max(side, smallest) // multiple) * multiple - side for side in (height, width))
    return F.pad(image, (0, right, 0, bottom), mode="replicate") if bottom or right else image


@torch.no_grad()
def latents_spread(vae: VAE, image: Tensor) -> float:
    """Return the standard deviation of the VAE's unscaled latents of images, (B, 3, H, W), in [0, 1]."""
    return unscale_latents(vae, encode_image(vae, image)).std().item()
