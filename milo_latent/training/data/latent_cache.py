"""Latents of a few epochs of pairs, encoded once and used over and over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from milo_latent.atomic import write_bytes, write_text
from milo_latent.files import open_safetensors
from milo_latent.training.data.restoration_pairs import BatchReader, RestorationPairs, epoch_order

SETTINGS_FILE = "settings.json"
Encode = Callable[[Tensor, Tensor, list[str]], tuple[Any, ...]]  # clean, degraded, captions -> latents of both, ...


class CachedPairs(Dataset):
    """The samples of `RestorationPairs`, with the latents of `clean` and of the cleaned `degraded` in their places.

    Epoch e has the latents and captions of epoch `e % epochs`, in an order and with `draws` of its own.

    Args:
        pairs: whose latents were cached.
        folder: with the files of `fill_cache`.
        epochs: that are in the cache.
        batch_size: samples in each file.
    """

    def __init__(self, pairs: RestorationPairs, folder: Path, *, epochs: int, batch_size: int) -> None:
        self.seed, self.count = pairs.seed, len(pairs.source)
        self.folder, self.epochs, self.batch_size = folder, epochs, batch_size

    @property
    def files(self) -> int:
        """The number of files in a complete cache."""
        return -(-self.epochs * self.count // self.batch_size)

    def path(self, number: int) -> Path:
        """Return the file of batch `number`."""
        return self.folder / f"{number:08d}.safetensors"

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return sample `number`, as `RestorationPairs` does.

        Raises:
            ValueError: if a file is damaged.
        """
        epoch, place = divmod(number, self.count)
        cycle, cached = divmod(epoch, self.epochs)
        photo = epoch_order(self.seed, epoch, self.count)[place]
        place = int(np.flatnonzero(epoch_order(self.seed, cached, self.count) == photo)[0])
        batch, row = divmod(cached * self.count + place, self.batch_size)
        with open_safetensors(self.path(batch)) as file:
            sample = {name: file.get_slice(name)[row] for name in ("clean", "degraded")}
            told = json.loads(file.metadata()["told"])[row]
        if cycle:  # other noise than in the cycles before
            told["draws"] = int(np.random.default_rng((told["draws"], cycle)).integers(2**62))
        return sample | told


def fill_cache(
    reader: BatchReader, encode: Encode, folder: Path, *, epochs: int, settings: dict[str, Any], process_index: int = 0
) -> CachedPairs:
    """Encode this process's share of the batches of the first epochs that are not in `folder` yet.

    The batches are those of a run without a cache, so that latents equal its latents to the bit.

    Args:
        reader: of `RestorationPairs`.
        encode: from images and captions of a batch to its latents.
        folder: made if need be; files are written completely or not at all, so that a killed run resumes.
        epochs: to encode, 1 or more.
        settings: what the latents depend on besides; the same for every run that uses the folder.
        process_index: of this process; the others must be waited for.

    Raises:
        ValueError: if the folder was filled with other settings, or `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"Expected 1 or more epochs of latents, got {epochs}.")
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / SETTINGS_FILE, settings)
    assert isinstance(reader.pairs, RestorationPairs)
    pairs = CachedPairs(reader.pairs, folder, epochs=epochs, batch_size=reader.batch_size)
    images = BatchReader(
        reader.pairs,
        batch_size=reader.batch_size,
        processes=reader.processes,
        workers=reader.workers,
        collate=_collate_images,
    )
    numbers = range(process_index, pairs.files, reader.processes)
    for number in tqdm(numbers, desc=folder.name, disable=process_index > 0, mininterval=5):
        if not pairs.path(number).exists():
            clean, degraded, told = images(number // reader.processes, process_index)
            latents, condition = encode(clean, degraded, [each["caption"] for each in told])[:2]
            tensors = {"clean": latents.cpu().contiguous(), "degraded": condition.cpu().contiguous()}
            write_bytes(pairs.path(number), save(tensors, metadata={"told": json.dumps(told)}))
    return pairs


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if not path.exists():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"Expected the settings with which {path.parent} was filled, which {path.name} there tells, got "
            f"{json.dumps(settings)}. Delete that folder, or choose another output."
        )


def _collate_images(samples: list[dict[str, Any]]) -> tuple[Any, ...]:
    clean, degraded = (torch.stack([sample.pop(name) for sample in samples]) for name in ("clean", "degraded"))
    return clean, degraded, samples
