"""Photos of one size, read from files and processed at once, which is faster for small ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.files import Photo, open_photo

LARGEST_BATCH = 2**20  # pixels that are processed at once: 16 photos of 256 x 256


class Batches:
    """Processes the next photos together with the one that is asked for, those of one size at once.

    Args:
        size: how many photos to read together.
        process: from images, (B, 3, H, W), to the result of each, (B, ...).
        enlargement: of the sides before images are processed, which leaves memory for fewer.

    Raises:
        ValueError: for a `size` below 1.
    """

    def __init__(self, size: int, process: Callable[[Tensor], Tensor], *, enlargement: float = 1.0) -> None:
        if size < 1:
            raise ValueError(f"Expected a batch of at least 1 photo, got {size}.")
        self.size, self.process = size, process
        self.pixels = LARGEST_BATCH / max(1.0, enlargement) ** 2
        self.expect([])
        self.read: dict[Path, Photo] = {}  # and not yet processed
        self.ready: dict[Path, tuple[Photo, Tensor]] = {}

    def expect(self, photos: Sequence[Path]) -> None:
        """Take the photos that will be asked for, in their order."""
        self.photos = list(photos)
        self.places = {photo: place for place, photo in enumerate(self.photos)}

    def __call__(self, path: Path) -> tuple[Photo, Tensor]:
        """Return a photo, one of those that are expected, and its result, (1, ...).

        Raises:
            FileNotFoundError: if there is no such photo.
            ValueError: if the photo is damaged.
        """
        if path not in self.ready:
            self._process_next(path)
        return self.ready.pop(path)

    def _process_next(self, path: Path) -> None:
        place = self.places[path]
        following = self.photos[place : place + self.size]
        kept = {each: self.read[each] for each in following if each in self.read}
        kept[path] = photo = kept[path] if path in kept else open_photo(path)
        for other in following:
            if other not in kept and other not in self.ready:
                with contextlib.suppress(ValueError, FileNotFoundError, MemoryError):  # told when it is asked for
                    kept[other] = open_photo(other)
        shape = photo.image.shape
        most = max(1, int(self.pixels / (shape[2] * shape[3])))
        self.ready = {each: found for each, found in self.ready.items() if self.places[each] > place}
        waiting = (each for each in following if each in kept and each not in self.ready)
        alike = [each for each in waiting if kept[each].image.shape == shape][:most]
        photos = [kept.pop(each) for each in alike]
        results = self.process(torch.cat([each.image for each in photos])).split(1)
        self.ready |= dict(zip(alike, zip(photos, results, strict=True), strict=True))
        self.read = kept
