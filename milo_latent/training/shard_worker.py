"""One shard of a training set: what is kept of an image and its distorted versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from milo_latent.distortions import distort
from milo_latent.evaluation.conditions import CONDITIONS
from milo_latent.files import read_image, write_atomically
from milo_latent.latents.codec import VAE, encode_image, vae_scale_factor
from milo_latent.latents.files import load_vae, vae_folder
from milo_latent.metric.network import MILO
from milo_latent.training.pseudo_mos import Ensemble, build_ensemble

RECORD = "record"  # metadata of a shard


@dataclass(frozen=True)
class DatasetConfig:
    """What a training set is; a folder that was begun with another one is refused.

    Args:
        images: names of the image files, in order.
        members: metrics that label, as of `full_reference.by_name`.
        calibrations: their file, None for the shipped ones.
        vae: whose latents are kept, as of `encoding.load_vae`; None keeps none.
        keep_images: keep the images too, as MILO_I needs them.
        map_teacher: MILO_I weights whose error map is kept at the latents' size, as a second label; None keeps none.
        side: pixels of the squares.
        resize: shrink or enlarge the largest square to `side`, as the paper does; False cuts the centre out instead,
            which keeps the sharpness of small images.
        per_image: conditions drawn for each image; 125 takes all.
        images_per_shard: images of one file.
        seed: of the draw of conditions.
    """

    images: tuple[str, ...]
    members: tuple[str, ...]
    calibrations: str | None = None
    vae: str | None = None
    keep_images: bool = False
    map_teacher: str | None = None
    side: int = 256
    resize: bool = True
    per_image: int = len(CONDITIONS)
    images_per_shard: int = 8
    seed: int = 0

    def files(self) -> dict[str, str | Path]:
        """Return what the set is made with, where it is named: files, folders or sets of weights."""
        named = {"calibrations": self.calibrations, "map_teacher": self.map_teacher}
        found: dict[str, str | Path] = {name: source for name, source in named.items() if source is not None}
        return found | ({"vae": vae_folder(self.vae)} if self.vae else {})


class Worker:
    """Makes shards; one per process.

    Args:
        config: of the dataset.
        paths: of its images.
        output: folder.
    """

    def __init__(self, config: DatasetConfig, paths: Sequence[Path], output: Path) -> None:
        self.config, self.paths, self.output = config, list(paths), output
        self.ensemble: Ensemble = build_ensemble(config.members, config.calibrations)
        self.vae: VAE | None = load_vae(config.vae) if config.vae else None
        self.map_teacher = MILO.from_pretrained(config.map_teacher) if config.map_teacher else None

    @torch.no_grad()
    def make(self, index: int) -> Path:
        """Make shard `index`, completely or not at all; images that cannot be read are named in its metadata."""
        first = index * self.config.images_per_shard
        rows: list[dict[str, Tensor]] = []
        names, skipped = [], []
        for path in self.paths[first : first + self.config.images_per_shard]:
            try:
                image = square(read_image(path), self.config.side, resize=self.config.resize)
            except (OSError, ValueError) as error:
                skipped.append(f"{path.name}: {error}")
                continue
            rows.append(self._pairs(image, path.stem))
            names.append(path.name)
        tensors = join_rows(rows)
        record = json.dumps({"images": names, "skipped": skipped})  # one entry: the order of several is not fixed
        content = save(tensors, metadata={RECORD: record})
        target = shard_path(self.output, index)
        write_atomically(target, lambda partial: partial.write_bytes(content))
        return target

    def _pairs(self, ref: Tensor, name: str) -> dict[str, Tensor]:
        """Return everything kept of one image, (1, 3, side, side), and its distorted versions."""
        chosen = draw_conditions(name, self.config.per_image, self.config.seed)
        dist = torch.cat([distort(ref, *CONDITIONS[condition], image_id=name) for condition in chosen])
        labels = torch.cat([self.ensemble.labels(ref=ref, dist=each) for each in dist.split(1)]).float()
        kept = {"condition": torch.tensor(chosen), "labels": labels, "mos": labels.mean(dim=1)}
        if self.config.keep_images:
            kept |= {"ref_images": to_bytes(ref), "dist_images": to_bytes(dist)}
        if self.vae is not None:
            latents = torch.cat([encode_image(self.vae, each).float() for each in torch.cat([ref, dist]).split(1)])
            kept |= {"ref_latents": latents[:1], "dist_latents": latents[1:]}
        if self.map_teacher is not None:
            factor = vae_scale_factor(self.vae) if self.vae is not None else 8
            maps = [self.map_teacher.error_map(ref=ref, dist=each) for each in dist.split(1)]
            kept["maps"] = F.avg_pool2d(torch.cat(maps), factor)
        return kept


def square(image: Tensor, side: int, *, resize: bool = True) -> Tensor:
    """Return the largest centred square of (1, 3, H, W), resized to `side` (supplement, section 1), or cut to it."""
    crop = min(image.shape[2:])
    if not resize and crop > side:
        crop = side
    top, left = (image.shape[2] - crop) // 2, (image.shape[3] - crop) // 2
    image = image[..., top : top + crop, left : left + crop]
    if crop != side:
        image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return image.mul(255).round().div(255)


def draw_conditions(name: str, count: int, seed: int) -> list[int]:
    """Return `count` of the 125 conditions, which follow from image and seed alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return sorted(rng.permutation(len(CONDITIONS))[:count].tolist())


def to_bytes(image: Tensor) -> Tensor:
    """Return images in [0, 1] as 8 bit."""
    return image.mul(255).round().to(torch.uint8)


def join_rows(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join what is kept of several images; `ref_index` says to which reference each pair belongs."""
    if not rows:
        return {"mos": torch.zeros(0)}
    joined = {key: torch.cat([row[key] for row in rows]).contiguous() for key in rows[0]}
    counts = torch.tensor([len(row["mos"]) for row in rows])
    joined["ref_index"] = torch.repeat_interleave(torch.arange(len(rows)), counts)
    return joined


def shard_path(output: Path, index: int) -> Path:
    """Return the file of shard `index`."""
    return output / f"shard-{index:05d}.safetensors"
