"""The 25 distortions of KADID-10k at five levels: seeded by (image id, kind, level), on tensors and files.

Kinds, order and levels are those of the published forward model (Lin, Hosu, Saupe: "KADID-10k", QoMEX 2019, and its
generator of distorted images); the code is this project's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.checks import check_batch, check_choice
from milo_latent.distortions import blurs, codecs, colours, noises, spatial, tones
from milo_latent.files import read_image, write_image

LEVELS = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 64  # pixels, under which blocks and patches do not fit


@dataclass(frozen=True)
class Distortion:
    """One kind of distortion.

    Args:
        number: in KADID-10k, from 1.
        name: of the kind.
        family: blur, colour, compression, noise, brightness, spatial, or sharpness and contrast.
        amounts: the parameter at levels 1 to 5.
        apply: from (B, 3, H, W), an amount and a generator to the distorted images.
    """

    number: int
    name: str
    family: str
    amounts: tuple[float, float, float, float, float]
    apply: Callable[[Tensor, float, torch.Generator], Tensor]


_TABLE = (
    ("gaussian blur", "blur", (0.1, 0.5, 1, 2, 5), blurs.gaussian_blur),
    ("lens blur", "blur", (1, 2, 4, 6, 8), blurs.lens_blur),
    ("motion blur", "blur", (1, 2, 4, 6, 10), blurs.motion_blur),
    ("color diffusion", "colour", (1, 3, 6, 8, 12), colours.colour_diffusion),
    ("color shift", "colour", (1, 3, 6, 8, 12), colours.colour_shift),
    ("color quantization", "colour", (64, 48, 32, 16, 8), colours.colour_quantisation),
    ("color saturation 1", "colour", (0.4, 0.2, 0.1, 0, -0.4), colours.colour_saturation_hsv),
    ("color saturation 2", "colour", (1, 2, 3, 6, 9), colours.colour_saturation_lab),
    ("JPEG2000", "compression", (16, 32, 45, 120, 400), codecs.jpeg2000),
    ("JPEG", "compression", (43, 36, 24, 7, 4), codecs.jpeg),
    ("white noise", "noise", (0.001, 0.002, 0.003, 0.005, 0.01), noises.white_noise),
    (
        "white noise in color component",
        "noise",
        (0.0001, 0.0005, 0.001, 0.002, 0.003),
        noises.white_noise_in_colour_components,
    ),
    ("impulse noise", "noise", (0.001, 0.005, 0.01, 0.02, 0.03), noises.impulse_noise),
    ("multiplicative noise", "noise", (0.001, 0.005, 0.01, 0.02, 0.05), noises.multiplicative_noise),
    ("denoise", "noise", (0.01, 0.03, 0.05, 0.1, 0.15), noises.denoise),
    ("brighten", "brightness", (0.1, 0.2, 0.4, 0.7, 1.1), tones.brighten),
    ("darken", "brightness", (0.05, 0.1, 0.2, 0.4, 0.8), tones.darken),
    ("mean shift", "brightness", (0.15, 0.08, 0, -0.08, -0.15), tones.mean_shift),
    ("jitter", "spatial", (0.05, 0.1, 0.2, 0.5, 1), spatial.jitter),
    ("non-eccentricity patch", "spatial", (20, 40, 60, 80, 100), spatial.non_eccentricity_patch),
    ("pixelate", "spatial", (0.01, 0.05, 0.1, 0.2, 0.5), spatial.pixelate),
    ("quantization", "spatial", (20, 16, 13, 10, 7), spatial.quantisation),
    ("color block", "spatial", (2, 4, 6, 8, 10), spatial.colour_block),
    ("high sharpen", "sharpness and contrast", (1, 2, 3, 6, 12), tones.high_sharpen),
    ("contrast change", "sharpness and contrast", (0.3, 0.15, 0, -0.4, -0.6), tones.contrast_change),
)
DISTORTIONS = {row[0]: Distortion(number, *row) for number, row in enumerate(_TABLE, start=1)}


def seed_of(image_id: str, kind: str, level: int) -> int:
    """Return the seed of one distorted image: neither order nor workers matter."""
    digest = hashlib.sha256(f"{image_id}\0{kind}\0{level}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def distort(image: Tensor, kind: str, level: int, *, image_id: str | Sequence[str]) -> Tensor:
    """Distort images as KADID-10k does.

    Args:
        image: (B, 3, H, W), in [0, 1], sides of 64 and more.
        kind: a key of `DISTORTIONS`.
        level: 1 to 5.
        image_id: name of each image, or one for all; with kind and level it seeds every random draw.

    Returns:
        Distorted images, (B, 3, H, W), in [0, 1], rounded to 8 bit as files are.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: for another kind or level, smaller images, or as many ids as there are not images.
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
    return torch.cat(distorted).clamp(0, 1).mul(255).round().div(255)


def distort_file(source: str | Path, target: str | Path, kind: str, level: int) -> None:
    """Distort an image file into another; its name without suffix is the image's id.

    Args:
        source: an image.
        target: the file to write; a lossless format such as PNG keeps the level.
        kind: see `distort`.
        level: see `distort`.

    Raises:
        FileNotFoundError: if there is no `source`.
        ValueError: if it is no image, and as `distort`.
        OSError: if `target` cannot be written.
    """
    write_image(target, distort(read_image(source), kind, level, image_id=Path(source).stem))
