"""Random crops of image folders; a batch depends on seed, step and process alone, so that resumed runs are exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.files import IMAGE_SUFFIXES, list_files, read_image
from milo_latent.pictures import from_8bit, to_8bit


def list_images(folders: Sequence[str | Path]) -> list[Path]:
    """Return the image files of folders, not of their subfolders, sorted by name within each folder.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no image.
    """
    return [path for folder in folders for path in list_files(Path(folder), IMAGE_SUFFIXES)]


def spread_over(paths: Sequence[Path], count: int | None) -> list[Path]:
    """Return `count` of `paths`, spread evenly over them; all for None, or if there are fewer.

    Raises:
        ValueError: for a count below 1.
    """
    if count is None or count >= len(paths):
        return list(paths)
    if count < 1:
        raise ValueError(f"Expected a count of 1 or more, got {count}. Leave it out to take all.")
    return [paths[index * len(paths) // count] for index in range(count)]


class ImageCrops:
    """Random square crops, flipped and transposed, of images held in memory in 8 bit.

    Images that are smaller than `crop_size` pixels are left out.
    """

    def __init__(self, folders: Sequence[str | Path], *, crop_size: int, seed: int = 0) -> None:
        self.crop_size, self.seed = crop_size, seed
        self.images: list[np.ndarray] = []
        for path in tqdm(list_images(folders), desc="Reading images", unit="image"):
            image = read_image(path)[0]
            if min(image.shape[1:]) >= crop_size:
                self.images.append(to_8bit(image))
        if not self.images:
            raise ValueError(f"Expected images of at least {crop_size} px, got none. Pass a smaller `crop_size`.")

    def generator(self, step: int, process_index: int = 0) -> np.random.Generator:
        """Return the random generator of one step of one process."""
        return np.random.default_rng((self.seed, step, process_index))

    def batch(self, rng: np.random.Generator, batch_size: int) -> Tensor:
        """Draw crops, (B, 3, crop_size, crop_size), in [0, 1], by the generator of `generator`."""
        return from_8bit(np.stack([self._crop(rng) for _ in range(batch_size)]))

    def _crop(self, rng: np.random.Generator) -> np.ndarray:
        image = self.images[rng.integers(len(self.images))]
        top = rng.integers(image.shape[0] - self.crop_size + 1)
        left = rng.integers(image.shape[1] - self.crop_size + 1)
        crop = image[top : top + self.crop_size, left : left + self.crop_size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop.transpose(1, 0, 2) if rng.random() < 0.5 else crop
