"""Pairs of clean and degraded crops; a sample follows from (seed, its number), whoever draws it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from milo_latent.diffbir.rules import resize
from milo_latent.training.data.degradations import Degradation
from milo_latent.training.data.photos import PhotoSource


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order in which an epoch goes through `count` photos."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class RestorationPairs(Dataset):
    """Samples number 0, 1, 2, ...: every epoch goes through all photos once, in an order of its own.

    Sample n is photo `epoch_order(...)[place]` with `epoch, place = divmod(n, len(source))`. Its crop, its flips and
    its degradation are drawn from (seed, epoch, name of the photo), so neither the number of processes nor that of
    workers matters.

    Args:
        source: photos.
        crop_size: side of the crops, in pixels.
        degradation: from a clean crop (3, H, W) in [0, 1] to a degraded one; not used for pairs.
        seed: start of every random draw.
        caption_dropout: share of the captions that are replaced by the empty one, for classifier-free guidance.
    """

    def __init__(
        self,
        source: PhotoSource,
        *,
        crop_size: int,
        degradation: Degradation,
        seed: int = 0,
        caption_dropout: float = 0.0,
    ) -> None:
        self.source, self.crop_size, self.degradation = source, crop_size, degradation
        self.seed, self.caption_dropout = seed, caption_dropout

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return sample `number`: `clean` and `degraded`, (3, crop_size, crop_size) in [0, 1], `caption`, and `draws`.

        `draws` is a seed for whatever else is drawn for this sample, such as noise.

        Raises:
            ValueError: if the photo is smaller than the crop.
        """
        epoch, place = divmod(number, len(self.source))
        photo = self.source[int(epoch_order(self.seed, epoch, len(self.source))[place])]
        rng = np.random.default_rng((self.seed, epoch, zlib.crc32(photo.name.encode())))
        clean, degraded = photo.clean, photo.degraded
        if min(clean.shape[1:]) < self.crop_size:
            raise ValueError(
                f"Expected photos of at least {self.crop_size} pixels a side, got {clean.shape[2]}x{clean.shape[1]} "
                f"for {photo.name}. Leave it out, or choose a smaller crop size."
            )
        if degraded is not None and degraded.shape != clean.shape:  # a small photo is enlarged as a pipeline would
            degraded = resize(degraded[None], (clean.shape[1], clean.shape[2]))[0].clamp(0, 1)
        clean, degraded = self._crop(rng, clean, degraded)
        if degraded is None:
            degraded = self.degradation(clean, rng)
        caption = "" if rng.random() < self.caption_dropout else photo.caption
        return {"clean": clean, "degraded": degraded, "caption": caption, "draws": int(rng.integers(2**62))}

    def _crop(self, rng: np.random.Generator, clean: Tensor, degraded: Tensor | None) -> tuple[Tensor, Tensor | None]:
        top, left = (int(rng.integers(side - self.crop_size + 1)) for side in clean.shape[1:])
        flip, transpose = rng.random() < 0.5, rng.random() < 0.5

        def cut(image: Tensor) -> Tensor:
            crop = image[:, top : top + self.crop_size, left : left + self.crop_size]
            crop = crop.flip(2) if flip else crop
            return (crop.transpose(1, 2) if transpose else crop).contiguous()

        return cut(clean), None if degraded is None else cut(degraded)


class BatchReader:
    """Reads batches ahead in worker processes; `reader(step, process_index)` is always the same batch.

    Args:
        pairs: samples by number.
        batch_size: samples a process and step.
        processes: number of processes; together they take `batch_size * processes` samples in a row each step.
        workers: processes that read ahead; 0 reads in this one.
        collate: from a list of samples to the tensors of a batch.
    """

    def __init__(
        self,
        pairs: Dataset,
        *,
        batch_size: int,
        processes: int = 1,
        workers: int = 0,
        collate: Callable[[list[dict[str, Any]]], tuple[Tensor, ...]],
    ) -> None:
        self.pairs, self.batch_size, self.processes = pairs, batch_size, processes
        self.workers, self.collate = workers, collate
        self._next: int | None = None
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())

    def __call__(self, step: int, process_index: int = 0) -> tuple[Tensor, ...]:
        """Return the batch of a step."""
        if step != self._next:
            loader = DataLoader(
                self.pairs,
                batch_sampler=self._numbers(step, process_index),
                num_workers=self.workers,
                collate_fn=self.collate,
            )
            self._batches = iter(loader)
        self._next = step + 1
        return next(self._batches)

    def _numbers(self, step: int, process_index: int) -> Iterator[list[int]]:
        """Yield the numbers of the samples of every batch from `step` on."""
        while True:
            first = (step * self.processes + process_index) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1


def noise_and_timestep(seed: tuple[int, ...], shape: tuple[int, ...], num_timesteps: int) -> tuple[Tensor, int]:
    """Draw the noise and the timestep of a sample.

    Args:
        seed: such as the `draws` of `RestorationPairs` and the number of the noise level.
        shape: of the noise.
        num_timesteps: the timestep is one of 0 to `num_timesteps - 1`.
    """
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape, dtype="float32")), int(rng.integers(num_timesteps))
