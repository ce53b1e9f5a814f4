"""Read a training set of `build_dataset`: shards in memory, batches that follow from (seed, step, process)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_FILE, SUMMARY_FILE = "config.json", "dataset.json"  # of a set; the second is written when it is whole


def read_shard(path: Path, keys: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a shard.

    Args:
        path: of the file.
        keys: what to read, where it is there; None reads all.

    Returns:
        Tensors by key, and the metadata.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            wanted = [key for key in file.keys() if keys is None or key in set(keys)]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in wanted}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"Expected a shard in {path}: {error}. Delete it and build the training set again.") from error


class PairSet:
    """Pairs with labels, in memory.

    Args:
        folder: made by `build_dataset`.
        space: "latents" or "images".

    Raises:
        FileNotFoundError: if there is no shard.
        ValueError: if the set is not whole, or labels or the pairs of this space are missing.
    """

    def __init__(self, folder: str | Path, *, space: str) -> None:
        paths = sorted(Path(folder).glob("shard-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"Expected a training set in {folder}, found no shard. Make one: build_dataset.")
        _check_whole(Path(folder), len(paths))
        wanted = {f"ref_{space}", f"dist_{space}", "ref_index", "mos", "condition", "maps"}
        shards = [tensors for tensors in (read_shard(path, wanted)[0] for path in paths) if len(tensors.get("mos", ()))]
        lacking = sorted(wanted - {"maps"} - set(shards[0] if shards else ()))
        if lacking:
            raise ValueError(f"Expected {', '.join(lacking)} in the shards of {folder}. Build it for {space}.")
        offsets = np.cumsum([0] + [len(shard[f"ref_{space}"]) for shard in shards[:-1]])
        self.ref = torch.cat([shard[f"ref_{space}"] for shard in shards])
        self.dist = torch.cat([shard[f"dist_{space}"] for shard in shards])
        self.ref_index = torch.cat(
            [shard["ref_index"] + offset for shard, offset in zip(shards, offsets.tolist(), strict=True)]
        )
        self.mos = torch.cat([shard["mos"] for shard in shards]).float()
        self.condition = torch.cat([shard["condition"] for shard in shards])
        self.maps = torch.cat([shard["maps"] for shard in shards]) if "maps" in shards[0] else None
        if not torch.isfinite(self.mos).all():
            raise ValueError(
                f"Expected a finite label for every pair in {folder}; {int((~torch.isfinite(self.mos)).sum())} are not."
            )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.mos)

    def pairs(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `ref`, `dist` and `mos` of some pairs; images in [0, 1]."""
        ref, dist = self.ref[self.ref_index[indices]], self.dist[indices]
        if ref.dtype == torch.uint8:
            ref, dist = ref.float().div(255), dist.float().div(255)
        return ref, dist, self.mos[indices]

    def draw(self, batch_size: int, *, seed: int, step: int, process_index: int = 0, processes: int = 1) -> Tensor:
        """Return the indices of a batch: every epoch is a new order, shared out between the processes."""
        place = (step * processes + process_index) * batch_size + torch.arange(batch_size)
        epochs, offsets = place // len(self), place % len(self)
        orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(self)) for epoch in set(epochs.tolist())}
        return torch.tensor(
            [orders[epoch][offset] for epoch, offset in zip(epochs.tolist(), offsets.tolist(), strict=True)]
        )


def _check_whole(folder: Path, shards: int) -> None:
    summary = folder / SUMMARY_FILE
    if not summary.is_file():
        raise ValueError(
            f"Expected a whole training set in {folder}, found no {SUMMARY_FILE}. Finish it: build_dataset."
        )
    expected = json.loads(summary.read_text(encoding="utf-8")).get("shards", shards)  # older sets do not tell
    if shards != expected:
        raise ValueError(f"Expected {expected} shards in {folder}, found {shards}. Make them again: build_dataset.")
