"""What a benchmark restores: photos of a folder, degraded ones or clean ones that are degraded here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.diffbir.rules import resize
from milo_latent.distortions import seed_of
from milo_latent.files import IMAGE_SUFFIXES, list_unique_files, read_image
from milo_latent.pictures import jpeg_round_trip, round_to_8bit
from milo_latent.score.pairs import match_pairs

DEGRADATION = re.compile(r"(noise|jpeg|x)([1-9]\d*)")


def degrade(image: Tensor, name: str, *, image_id: str) -> Tensor:
    """Degrade an image, (1, 3, H, W), in [0, 1]; the result is rounded to 8 bit as a file would be.

    Args:
        image: clean image.
        name: "noiseN", white Gaussian noise of standard deviation N / 255, clipped; "jpegN", JPEG of Pillow's quality
            N; "xN", bicubic downscaling by N with antialiasing.
        image_id: seeds the noise, together with `name`.

    Raises:
        ValueError: for another name.
    """
    kind, level = parse_degradation(name)
    if kind == "jpeg":
        return jpeg_round_trip(image, level)
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed_of(image_id, kind, level))
        return round_to_8bit(image + level / 255 * torch.randn(image.shape, generator=generator))
    return round_to_8bit(resize(image, (image.shape[2] // level, image.shape[3] // level)))


def parse_degradation(name: str) -> tuple[str, int]:
    """Return the kind and the level of a degradation.

    Raises:
        ValueError: for a name that `degrade` does not know.
    """
    match = DEGRADATION.fullmatch(name)
    if match is None or (match[1] == "jpeg" and int(match[2]) > 95):
        raise ValueError(f"Expected a degradation such as noise25, jpeg10 (at most 95) or x4, got {name!r}.")
    return match[1], int(match[2])


@dataclass(frozen=True)
class Photo:
    """A degraded image and its reference, (1, 3, H, W), and the height and width of the restored image."""

    degraded: Tensor
    clean: Tensor | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A photo to restore: a file, or made from the clean photo.

    Args:
        degradation: its name, as of `degrade`, or that of the folder of degraded photos.
        clean: the reference; None where there is none.
        degraded: None where `degrade` makes it from `clean`.
    """

    degradation: str
    clean: Path | None
    degraded: Path | None = None

    @property
    def photo(self) -> str:
        """The name of the photo."""
        path = self.degraded or self.clean
        assert path is not None
        return path.stem

    @property
    def factor(self) -> int:
        """How much smaller `degrade` makes the photo."""
        return int(self.degradation[1:]) if self.degraded is None and self.degradation.startswith("x") else 1

    def read(self, upscale: float) -> Photo:
        """Return the photo; the clean image is cropped to a multiple of `upscale`.

        Raises:
            ValueError: if the clean image is not `upscale` times as large as the degraded one.
        """
        clean, multiple = None, max(1, round(upscale))
        if self.clean is not None:
            clean = read_image(self.clean)
            height, width = (side // multiple * multiple for side in clean.shape[2:])
            clean = clean[..., :height, :width]
        if self.degraded is not None:
            degraded = read_image(self.degraded)
        else:
            assert clean is not None
            degraded = degrade(clean, self.degradation, image_id=self.photo)
        height, width = (round(side * upscale) for side in degraded.shape[2:])
        if clean is not None and clean.shape[2:] != (height, width):
            raise ValueError(
                f"Expected {self.clean} of {width}x{height} pixels, {upscale:g} times its {self.degradation}, got "
                f"{clean.shape[3]}x{clean.shape[2]}. Pass --task and --upscale of this degradation."
            )
        return Photo(degraded, clean, (height, width))


def list_cases(clean: Path | None, degraded: Path | None, degradations: Sequence[str], limit: int | None) -> list[Case]:
    """Return the photos of a benchmark.

    Args:
        clean: folder of references.
        degraded: folder of degraded photos, of the same names where there are references.
        degradations: names, as of `degrade`, where there is no folder of degraded photos.
        limit: takes only the first photos.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no image.
        ValueError: if the folders hold different names, or not one of `degraded` and `degradations` is given.
    """
    if (degraded is None) != bool(degradations) or (degraded is None and clean is None):
        raise ValueError("Expected a folder of degraded photos, or a clean one and the degradations to apply to it.")
    if limit is not None and limit < 1:
        raise ValueError(f"Expected a limit of at least 1 photo, got {limit}. Leave it out to take all.")
    for folder in (clean, degraded):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"Expected a folder of photos, got {folder}, which is no folder.")
    if degraded is None:
        assert clean is not None
        for name in degradations:
            parse_degradation(name)
        paths = list_unique_files(clean, IMAGE_SUFFIXES)[:limit]
        return [Case(name, path) for name in dict.fromkeys(degradations) for path in paths]
    name = degraded.resolve().name
    if clean is None:
        return [Case(name, None, path) for path in list_unique_files(degraded, IMAGE_SUFFIXES)[:limit]]
    return [Case(name, pair.ref, pair.dist) for pair in match_pairs(clean, degraded)[:limit]]
