"""Images to latents and back: pad, encode, scale; unscale, decode, crop."""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch

VAE: TypeAlias = AutoencoderKL | AutoencoderTiny


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


def encode_image(vae: VAE, image: Tensor) -> Tensor:
    """Encode images into scaled latents: the posterior's mode, so that equal images have equal latents.

    Args:
        vae: any diffusers `AutoencoderKL` or `AutoencoderTiny`.
        image: (B, 3, H, W), in [0, 1]; H and W are padded to multiples of the VAE's factor by repeating the border.

    Returns:
        Latents, (B, C, h, w), in the VAE's dtype, on its device.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if `image` is not (B, 3, H, W).
    """
    check_batch("image", image, 3)
    padded = _to_vae(pad_image(image, vae_scale_factor(vae)), vae)
    encoded = vae.encode(padded * 2 - 1)
    raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return scale_latents(vae, raw)


def decode_latents(vae: VAE, latents: Tensor, *, clip: bool = True) -> Tensor:
    """Decode scaled latents into images.

    Args:
        vae: the VAE they come from.
        latents: (B, C, h, w).
        clip: to [0, 1]; a VAE may leave it a little.

    Returns:
        Images, (B, 3, H, W) float32, in [0, 1] if clipped.

    Raises:
        TypeError: if `latents` are not floating point.
        ValueError: if `latents` are not (B, C, h, w) with the VAE's C.
    """
    check_batch("latents", latents, vae.config.latent_channels)
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
    return F.pad(image, (0, target[1] - width, 0, target[0] - height), mode="replicate")


@torch.no_grad()
def latents_spread(vae: VAE, image: Tensor) -> float:
    """Return the standard deviation of the VAE's unscaled latents over `image`, (B, 3, H, W), in [0, 1]."""
    return unscale_latents(vae, encode_image(vae, image)).std().item()
