"""Read a training set of `build_dataset` into memory; its batches depend on seed, step and process alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milo_latent.checks import shortened
from milo_latent.pictures import from_8bit
from milo_latent.structure import open_safetensors, read_json

CONFIG_FILE, SUMMARY_FILE = "config.json", "dataset.json"  # of a training set; a complete set has the second one


def read_shard(path: Path, keys: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a shard that `keys` name, as far as it has them, and its metadata.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in keys & set(file.keys())}, dict(file.metadata() or {})
    except ValueError as error:
        raise ValueError(f"{error} Delete it and build the training set again.") from error


class PairSet:
    """Pairs with labels, in memory.

    Args:
        folder: made by `build_dataset`.
        space: "latents" or "images".

    Raises:
        FileNotFoundError: if there is no shard.
        ValueError: if the set is incomplete, or if labels or the pairs of this space are missing.
    """

    def __init__(self, folder: str | Path, *, space: str) -> None:
        paths = sorted(Path(folder).glob("shard-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"Expected a training set in {folder}, found no shard. Make one: build_dataset.")
        _check_complete(Path(folder), len(paths))
        ref, dist = f"ref_{space}", f"dist_{space}"
        needed = {ref, dist, "ref_index", "dmos"}
        shards = [read_shard(path, needed | {"maps"})[0] for path in paths]
        shards = [shard for shard in shards if "dmos" not in shard or shard["dmos"].numel()]  # some have no images
        lacking = sorted(key for key in needed if not shards or any(key not in shard for shard in shards))
        if lacking:
            raise ValueError(f"Expected {', '.join(lacking)} in the shards of {folder}. Build it for {space}.")
        if not all(_is_whole(shard, shards[0], ref, dist) for shard in shards):
            raise ValueError(f"Expected pairs of one size, each with reference and label, in {folder}. Build it again.")
        offsets = np.cumsum([0] + [len(shard[ref]) for shard in shards[:-1]]).tolist()
        self.ref, self.dist = (torch.cat([shard[key] for shard in shards]) for key in (ref, dist))
        self.ref_index = torch.cat([each["ref_index"] + offset for each, offset in zip(shards, offsets, strict=True)])
        self.dmos = torch.cat([shard["dmos"] for shard in shards]).float()
        self.maps = torch.cat([shard["maps"] for shard in shards]) if "maps" in shards[0] else None
        unlabeled = int((~torch.isfinite(self.dmos)).sum())
        if unlabeled:
            raise ValueError(f"Expected a finite label for every pair in {folder}; {unlabeled} are not.")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.dmos)

    def pairs(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `ref`, `dist` and the labels (DMOS) of these pairs; images in [0, 1]."""
        ref, dist = self.ref[self.ref_index[indices]], self.dist[indices]
        if ref.dtype == torch.uint8:
            ref, dist = from_8bit(ref.numpy()), from_8bit(dist.numpy())
        return ref, dist, self.dmos[indices]

    def draw(self, batch_size: int, *, seed: int, step: int, process_index: int = 0, processes: int = 1) -> Tensor:
        """Return the indices of a batch; every epoch has a new order, which the processes share."""
        place = (step * processes + process_index) * batch_size + torch.arange(batch_size)
        epochs, offsets = (place // len(self)).tolist(), (place % len(self)).tolist()
        orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(self)) for epoch in set(epochs)}
        return torch.tensor([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def _is_whole(shard: dict[str, Tensor], first: dict[str, Tensor], ref: str, dist: str) -> bool:
    """Return whether the tensors of a shard fit each other and those of the first shard."""
    count, index = shard["dmos"].numel(), shard["ref_index"]
    if shard["dmos"].shape != (count,) or index.shape != (count,) or len(shard[dist]) != count:
        return False
    if index.dtype != torch.int64 or not 0 <= int(index.min()) <= int(index.max()) < len(shard[ref]):
        return False
    alike = all(
        (shard[key].shape[1:], shard[key].dtype, shard[key].ndim) == (first[ref].shape[1:], first[ref].dtype, 4)
        for key in (ref, dist)
    )
    maps = shard.keys() == first.keys() and len(shard.get("maps", shard[dist])) == count
    return alike and maps


def _check_complete(folder: Path, shards: int) -> None:
    summary = folder / SUMMARY_FILE
    if not summary.is_file():
        raise ValueError(f"Expected a complete training set in {folder}, found no {SUMMARY_FILE}. Run build_dataset.")
    expected = read_json(summary).get("shards")
    if shards != expected:
        raise ValueError(f"Expected {shortened(expected)} shards in {folder}, found {shards}. Run build_dataset again.")
