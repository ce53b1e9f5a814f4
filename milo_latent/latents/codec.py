"""Images to latents and back: pad, encode, scale; unscale, decode, crop."""

from __future__ import annotations

from fractions import Fraction
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch
from milo_latent.latents.tiling import tiled

VAE: TypeAlias = AutoencoderKL | AutoencoderTiny

# in latent cells; behind 8 cells nano's latents no longer depend on a tile's border by more than 3e-5, of a spread of 1
TINY_MARGIN, TINY_OVERLAP = 8, 20


def vae_scale_factor(vae: VAE) -> int:
    """Return how many pixels one latent cell is wide: 8 for Stable Diffusion."""
    config = vae.config
    channels = config.block_out_channels if "block_out_channels" in config else config.encoder_block_out_channels
    return 2 ** (len(channels) - 1)


def scale_latents(vae: VAE, raw: Tensor) -> Tensor:
    """Turn what the encoder gives, (B, C, h, w), into scaled latents: minus `shift_factor`, times `scaling_factor`."""
    return (raw - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Turn scaled latents, (B, C, h, w), into what the decoder takes."""
    return latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)


def encode_image(vae: VAE, image: Tensor, *, tile: int | None = None) -> Tensor:
    """Encode images into scaled latents: the posterior's mode, so that equal images have equal latents.

    Args:
        vae: any diffusers `AutoencoderKL` or `AutoencoderTiny`.
        image: (B, 3, H, W), in [0, 1]; H and W are padded to multiples of the VAE's factor by repeating the border.
        tile: side of the tiles that larger images are encoded in, in pixels, a multiple of the VAE's factor; None
            encodes whole. With tiles, peak memory does not grow with the image, but for the image and its latents.

    Returns:
        Latents, (B, C, h, w), in the VAE's dtype, on its device.

        Tiles against whole: `nano`, an `AutoencoderTiny`, sees a few cells far, so latents and images differ by less
        than 1e-4 (photo of 744x496: 2e-6). `AutoencoderKL` normalises over the whole image and attends to
        all of it, so no tiles are exact, and what the tiles differ by is blended. Untrained weights, on which this is
        tested, amplify it most: tiles of 320 pixels change latents by up to 0.9 of their spread and images by 0.15
        (root mean square), less than diffusers' `enable_tiling` at that size. Take the largest tiles that fit.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if `image` is not (B, 3, H, W), or `tile` does not fit the VAE.
    """
    check_batch("image", image, 3)
    factor = vae_scale_factor(vae)
    padded = pad_image(image, factor)
    if tile is None:
        return _encode(vae, padded)
    _, overlap, margin = _tile_sizes(vae, tile)
    sizes = {"tile": tile, "overlap": overlap * factor, "margin": margin * factor, "multiple": factor}
    return tiled(lambda each: _encode(vae, each), padded, **sizes, scale=Fraction(1, factor))


def _encode(vae: VAE, image: Tensor) -> Tensor:
    encoded = vae.encode(_to_vae(image, vae) * 2 - 1)
    raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return scale_latents(vae, raw)


def _tile_sizes(vae: VAE, tile: int) -> tuple[int, int, int]:
    """Return a tile's side, its overlap and its margin, in latent cells, for tiles of `tile` pixels."""
    check_tile(vae, tile)
    cells = tile // vae_scale_factor(vae)
    if isinstance(vae, AutoencoderTiny):
        return cells, TINY_OVERLAP, TINY_MARGIN
    return cells, cells // 4, cells // 16  # a wide blend: what differs between tiles is their overall tone


def check_tile(vae: VAE, tile: int, *, given: int | None = None) -> None:
    """Raise ValueError unless tiles of `tile` pixels fit the VAE; the message says `given`, of which they are made."""
    factor = vae_scale_factor(vae)
    smallest = 2 * TINY_OVERLAP * factor
    if tile % factor or tile < smallest:
        raise ValueError(
            f"Expected `tile` to be a multiple of {factor} of at least {smallest} pixels, got {given or tile}. "
            "512 suits most machines."
        )


def decode_latents(vae: VAE, latents: Tensor, *, tile: int | None = None, clip: bool = True) -> Tensor:
    """Decode scaled latents into images.

    Args:
        vae: the VAE they come from.
        latents: (B, C, h, w).
        tile: side of the tiles that larger images are decoded in, in pixels, as of `encode_image`; its tolerances hold.
        clip: to [0, 1]; a VAE may leave it a little.

    Returns:
        Images, (B, 3, H, W) float32, in [0, 1] if clipped.

    Raises:
        TypeError: if `latents` are not floating point.
        ValueError: if `latents` are not (B, C, h, w) with the VAE's C, or `tile` does not fit the VAE.
    """
    check_batch("latents", latents, vae.config.latent_channels)
    if tile is None:
        return _decode(vae, latents, clip)
    cells, overlap, margin = _tile_sizes(vae, tile)
    return tiled(
        lambda each: _decode(vae, each, clip),
        latents,
        tile=cells,
        overlap=overlap,
        margin=margin,
        scale=vae_scale_factor(vae),
    )


def _decode(vae: VAE, latents: Tensor, clip: bool) -> Tensor:
    raw = unscale_latents(vae, _to_vae(latents, vae))
    image = vae.decode(raw).sample.float() / 2 + 0.5
    return image.clamp(0, 1) if clip else image


def _to_vae(tensor: Tensor, vae: VAE) -> Tensor:
    """Move to the VAE, unless on an accelerator already: an offloaded VAE waits on the CPU and follows its input."""
    device = vae.device if tensor.device.type == "cpu" else tensor.device
    return tensor.to(device=device, dtype=vae.dtype)


def pad_image(image: Tensor, multiple: int, *, smallest: int = 1) -> Tensor:
    """Pad images at the bottom and right, by repeating the border, to sides that are multiples.

    Args:
        image: (B, C, H, W).
        multiple: of which H and W become multiples.
        smallest: the least sides of the result, rounded up to a multiple.

    Returns:
        Padded images; `[..., :H, :W]` gives the input back.
    """
    height, width = image.shape[2:]
    target = [-(-max(side, smallest) // multiple) * multiple for side in (height, width)]
    if target == [height, width]:
        return image
    return F.pad(image, (0, target[1] - width, 0, target[0] - height), mode="replicate")


@torch.no_grad()
def latents_spread(vae: VAE, image: Tensor) -> float:
    """Return the standard deviation of the VAE's unscaled latents over `image`, (B, 3, H, W), in [0, 1]."""
    return unscale_latents(vae, encode_image(vae, image)).std().item()
