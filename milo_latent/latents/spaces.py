"""Latent spaces: how the VAEs of diffusers, and the pipelines around them, scale, shape and pack latents."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import ModelMixin
from torch import Tensor

VAE: TypeAlias = ModelMixin  # of a class in `KINDS`, or derived from one
Number: TypeAlias = float | Tensor  # a tensor is (1, C, 1, 1)
Numbers: TypeAlias = tuple[Number, Number, Number]


def _by_factor(vae: VAE, like: Tensor) -> Numbers:
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor, 1.0


def _as_encoded(vae: VAE, like: Tensor) -> Numbers:
    return 0.0, 1.0, 1.0


def _by_deviation(vae: VAE, like: Tensor) -> Numbers:
    return _channelwise(vae.config.latents_mean, like), 1.0, _channelwise(vae.config.latents_std, like)


def _by_reciprocal(vae: VAE, like: Tensor) -> Numbers:
    return _channelwise(vae.config.latents_mean, like), 1.0 / _channelwise(vae.config.latents_std, like), 1.0


def _autoencoder_kl(vae: VAE, like: Tensor) -> Numbers:
    config = vae.config
    if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
        return _by_factor(vae, like)
    mean, _, deviation = _by_deviation(vae, like)
    # SDXL's pipelines, whose latents have 4 channels, use the scaling factor beside these; GLM-Image's do not
    return mean, config.scaling_factor if config.latent_channels == 4 else 1.0, deviation


def _by_batch_norm(vae: VAE, like: Tensor) -> Numbers:
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    return _channelwise(mean, like), 1.0, _channelwise(torch.sqrt(variance + vae.config.batch_norm_eps), like)


def _channelwise(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1).to(like.device, like.dtype)


@dataclass(frozen=True)
class Kind:
    """What the VAEs of a class have in common.

    Args:
        numbers: returns shift, factor and deviation of scaled latents, (raw - shift) * factor / deviation.
        frames: whether images are videos of one frame to the VAE, (B, 3, 1, H, W).
        patches: whether scaled latents are patches of the VAE's, whose cells become channels.
    """

    numbers: Callable[[VAE, Tensor], Numbers]
    frames: bool = False
    patches: bool = False


KINDS = {
    "AutoencoderKL": Kind(_autoencoder_kl),
    "AutoencoderTiny": Kind(_by_factor),
    "AsymmetricAutoencoderKL": Kind(_by_factor),
    "ConsistencyDecoderVAE": Kind(_by_factor),
    "AutoencoderDC": Kind(_by_factor),
    "AutoencoderKLHunyuanImage": Kind(_by_factor),
    "AutoencoderKLFlux2": Kind(_by_batch_norm, patches=True),
    "AutoencoderKLQwenImage": Kind(_by_reciprocal, frames=True),
    "AutoencoderKLQwenImage21": Kind(_by_deviation, frames=True),
    "AutoencoderKLWan": Kind(_by_reciprocal, frames=True),
    "VQModel": Kind(_as_encoded),  # as the pipelines of Kandinsky do, which pass over its `scaling_factor`
}


class LatentSpace:
    """The latent space of a VAE: images to scaled latents and back, bit for bit as the VAE's own pipelines.

    Scaled latents are always (B, C, h, w): the one frame of a video VAE is no axis of theirs, and those of Flux 2 are
    patches of 2 x 2, as its transformer sees them.

    Args:
        vae: of a class in `KINDS`, or of one derived from it.

    Raises:
        ValueError: for a VAE of another class.

    Source: the methods `_encode_vae_image` and `prepare_latents` of diffusers' pipelines, and what these do with
    latents before decoding.

    Example:
        >>> from diffusers import AutoencoderKL
        >>> LatentSpace(AutoencoderKL(block_out_channels=(32,), latent_channels=16)).channels
        16
    """

    def __init__(self, vae: VAE) -> None:
        names = [cls.__name__ for cls in type(vae).__mro__]
        self.vae, self.name = vae, next((name for name in names if name in KINDS), "")
        if not self.name:
            raise ValueError(
                f"Expected a VAE whose latent space is known, got {names[0]}. Known: {', '.join(KINDS)}. "
                "A class that is derived from one of them works, too."
            )
        self.kind = KINDS[self.name]
        self.patch: int = vae.config.patch_size[0] if self.kind.patches else 1

    @property
    def channels(self) -> int:
        """C of scaled latents."""
        config = self.vae.config
        own: int = config.z_dim if "z_dim" in config else config.latent_channels
        return own * self.patch**2

    @property
    def factor(self) -> int:
        """How many pixels a latent cell covers along a side: 8 for Stable Diffusion."""
        config = self.vae.config
        ratio = config.get("spatial_compression_ratio", vars(self.vae).get("spatial_compression_ratio"))
        if ratio is not None:
            return int(ratio)
        names = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")
        levels = next(len(config[name]) for name in names if name in config)
        return int(2 ** (levels - 1)) * self.patch

    @property
    def scaling_factor(self) -> float | None:
        """The factor that tells these latents from others; None where each channel is scaled by numbers of its own."""
        shift, factor, _ = self.kind.numbers(self.vae, torch.zeros(1))
        return None if isinstance(shift, Tensor) or isinstance(factor, Tensor) else factor

    def scale(self, raw: Tensor) -> Tensor:
        """Scale what `encode` returns, (B, C, h, w)."""
        shift, factor, deviation = self.kind.numbers(self.vae, raw)
        return (raw - shift) * factor / deviation

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn scaled latents, (B, C, h, w), into what `decode` takes."""
        shift, factor, deviation = self.kind.numbers(self.vae, latents)
        return latents * deviation / factor + shift

    def encode(self, image: Tensor) -> Tensor:
        """Encode images in [-1, 1], (B, 3, H, W), whose sides are multiples of `factor`, without scaling the latents.

        Returns:
            Mode of the posterior, (B, C, h, w).
        """
        if self.vae.config.get("in_channels") == 4:  # the fourth is opacity
            image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
        encoded = self.vae.encode(image.unsqueeze(2) if self.kind.frames else image)
        names = ("latents", "latent")  # of AutoencoderTiny and VQModel; of AutoencoderDC
        raw = next((encoded[name] for name in names if name in encoded), None)
        raw = encoded.latent_dist.mode() if raw is None else raw
        if self.kind.frames:
            raw = raw[:, :, 0]  # (B, C, h, w)
        return torch.pixel_unshuffle(raw, self.patch) if self.kind.patches else raw

    def decode(self, raw: Tensor) -> Tensor:
        """Decode unscaled latents, (B, C, h, w), into images about [-1, 1], (B, 3, H, W)."""
        if self.kind.patches:
            raw = torch.pixel_shuffle(raw, self.patch)
        if self.name == "VQModel":
            return self.vae.decode(raw, force_not_quantize=True).sample
        image = self.vae.decode(raw.unsqueeze(2) if self.kind.frames else raw).sample
        return image[:, :3, 0] if self.kind.frames else image

    def describe(self) -> dict[str, str]:
        """Return what tells whether latents in a file are of this scale."""
        shift, factor, deviation = self.kind.numbers(self.vae, torch.zeros(1))
        if not isinstance(shift, Tensor):
            return {"scaling_factor": str(factor), "shift_factor": str(shift)}
        numbers = torch.cat([torch.as_tensor(each).flatten() for each in (shift, factor, deviation)])
        return {"normalization": hashlib.sha256(numbers.cpu().numpy().tobytes()).hexdigest()[:16]}


def unpack_latents(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn latents as a pipeline's loop keeps them into scaled latents, (B, C, h, w); `pack_latents` undoes it.

    Args:
        packed: (B, C, h, w); one frame, (B, C, 1, h, w); or tokens, (B, N, D), each of a cell or of p x p cells, as in
            Flux, Flux 2 and Qwen-Image.
        shape: C, h and w.

    Raises:
        ValueError: if `packed` does not hold latents of that shape.
    """
    channels, height, width = shape
    if packed.ndim == 4:
        return packed
    if packed.ndim == 5 and packed.shape[2] == 1:
        return packed[:, :, 0]
    patch = math.isqrt(packed.shape[2] // channels) if packed.ndim == 3 else 0
    rows, columns = (side // max(patch, 1) for side in (height, width))
    if packed.shape[1:] != (rows * columns, channels * patch**2) or (rows * patch, columns * patch) != (height, width):
        raise ValueError(
            f"Expected packed latents of {channels} x {height} x {width}, the shape of the reference latents, got "
            f"{tuple(packed.shape)}. Encode the reference image at the pipeline's size, with its own VAE."
        )
    cells = packed.reshape(-1, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, channels, height, width)


def pack_latents(latents: Tensor, like: Tensor) -> Tensor:
    """Turn scaled latents, (B, C, h, w), into the shape of `like`, from which `unpack_latents` made such."""
    if like.ndim == 4:
        return latents
    if like.ndim == 5:
        return latents.unsqueeze(2)
    batch, channels, height, width = latents.shape
    patch = math.isqrt(like.shape[2] // channels)
    cells = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, *like.shape[1:])
