"""The 25 distortions of KADID-10k at five levels; random draws follow from (image id, kind, level) alone.

Kinds, order and levels are those of the published generator (Lin, Hosu, Saupe: "KADID-10k", QoMEX 2019); the code is
this project's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milo_latent.checks import check_batch, check_choice
from milo_latent.distortions import blurs, colors, noises, spatial, tones
from milo_latent.pictures import round_to_8bit

LEVELS = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 64  # pixels; blocks and patches do not fit into smaller images


@dataclass(frozen=True)
class Distortion:
    """One kind of distortion."""

    number: int  # in KADID-10k, from 1
    name: str
    amounts: tuple[float, float, float, float, float]  # at levels 1 to 5
    apply: Callable[[Tensor, float, torch.Generator], Tensor]  # from images, (B, 3, H, W), and an amount


_TABLE = (
    ("gaussian blur", (0.1, 0.5, 1, 2, 5), blurs.gaussian_blur),
    ("lens blur", (1, 2, 4, 6, 8), blurs.lens_blur),
    ("motion blur", (1, 2, 4, 6, 10), blurs.motion_blur),
    ("color diffusion", (1, 3, 6, 8, 12), colors.color_diffusion),
    ("color shift", (1, 3, 6, 8, 12), colors.color_shift),
    ("color quantization", (64, 48, 32, 16, 8), colors.color_quantization),
    ("color saturation 1", (0.4, 0.2, 0.1, 0, -0.4), colors.color_saturation_hsv),
    ("color saturation 2", (1, 2, 3, 6, 9), colors.color_saturation_lab),
    ("JPEG2000", (16, 32, 45, 120, 400), spatial.jpeg2000),
    ("JPEG", (43, 36, 24, 7, 4), spatial.jpeg),
    ("white noise", (0.001, 0.002, 0.003, 0.005, 0.01), noises.white_noise),
    (
        "white noise in color component",
        (0.0001, 0.0005, 0.001, 0.002, 0.003),
        noises.white_noise_in_color_components,
    ),
    ("impulse noise", (0.001, 0.005, 0.01, 0.02, 0.03), noises.impulse_noise),
    ("multiplicative noise", (0.001, 0.005, 0.01, 0.02, 0.05), noises.multiplicative_noise),
    ("denoise", (0.01, 0.03, 0.05, 0.1, 0.15), noises.denoise),
    ("brighten", (0.1, 0.2, 0.4, 0.7, 1.1), tones.brighten),
    ("darken", (0.05, 0.1, 0.2, 0.4, 0.8), tones.darken),
    ("mean shift", (0.15, 0.08, 0, -0.08, -0.15), tones.mean_shift),
    ("jitter", (0.05, 0.1, 0.2, 0.5, 1), spatial.jitter),
    ("non-eccentricity patch", (20, 40, 60, 80, 100), spatial.non_eccentricity_patch),
    ("pixelate", (0.01, 0.05, 0.1, 0.2, 0.5), spatial.pixelate),
    ("quantization", (20, 16, 13, 10, 7), spatial.quantization),
    ("color block", (2, 4, 6, 8, 10), spatial.color_block),
    ("high sharpen", (1, 2, 3, 6, 12), tones.high_sharpen),
    ("contrast change", (0.3, 0.15, 0, -0.4, -0.6), tones.contrast_change),
)
DISTORTIONS = {row[0]: Distortion(number, *row) for number, row in enumerate(_TABLE, start=1)}


def seed_of(image_id: str, kind: str, level: int) -> int:
    """Return the seed of one distorted image, so that neither order nor workers matter."""
    digest = hashlib.sha256(f"{image_id}\0{kind}\0{level}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def distort(image: Tensor, kind: str, level: int, *, image_id: str | Sequence[str]) -> Tensor:
    """Distort images as KADID-10k does.

    Args:
        image: (B, 3, H, W), in [0, 1], with sides of at least 64.
        kind: a key of `DISTORTIONS`.
        level: 1 to 5.
        image_id: the name of each image, or one for all; every random draw is seeded by it, the kind and the level.

    Returns:
        Distorted images, (B, 3, H, W), in [0, 1], rounded to 8 bit as files are.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if `kind` or `level` is unknown, images are too small, or the number of ids is not B.
    """
    check_batch("image", image, 3)
    check_choice("kind", kind, DISTORTIONS)
    if level not in LEVELS:
        raise ValueError(f"Expected `level` to be one of {LEVELS}, got {level!r}.")
    if min(image.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"Expected sides of at least {SMALLEST_SIDE}, got {tuple(image.shape[2:])}. Use larger images."
        )
    names = [image_id] * len(image) if isinstance(image_id, str) else list(image_id)
    if len(names) != len(image):
        raise ValueError(f"Expected an `image_id` for each of {len(image)} images, got {len(names)}.")
    distortion = DISTORTIONS[kind]
    amount = distortion.amounts[level - 1]
    distorted = []
    for each, name in zip(image.split(1), names, strict=True):
        generator = torch.Generator().manual_seed(seed_of(name, kind, level))
        distorted.append(distortion.apply(each.float(), amount, generator))
    return round_to_8bit(torch.cat(distorted))
