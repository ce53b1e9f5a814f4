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
from milo_latent.evaluation.distortion_settings import SETTINGS
from milo_latent.files import read_image, write_atomically
from milo_latent.latents.codec import VAE, encode_image, vae_scale_factor
from milo_latent.latents.files import load_vae, vae_folder
from milo_latent.metric.network import MILO
from milo_latent.pictures import center_crop, round_to_8bit, to_8bit
from milo_latent.training.pseudo_mos import Ensemble, build_ensemble

RECORD = "record"  # key of a shard's metadata


@dataclass(frozen=True)
class DatasetConfig:
    """What a training set is made of; a folder that was started with another configuration is refused.

    Args:
        images: names of the image files, in order.
        members: metrics that label, as in `evaluation.metrics.by_name`.
        calibrations: file of their calibrations; None takes the shipped ones.
        vae: autoencoder whose latents are kept, as in `latents.files.load_vae`; None keeps none.
        keep_images: whether to keep the images too, as MILO_I needs them.
        map_teacher: MILO_I weights whose error maps are kept at the latents' size, as a second label; None keeps none.
        side: side of the square images in pixels.
        resize: whether the largest central square is resized to `side`, as in the paper. If not, the central square of
            `side` pixels is cut out, which keeps small images sharp.
        per_image: distortion settings drawn for each image; 125 takes all.
        images_per_shard: images in one file.
        seed: seed of the draw of distortion settings.
    """

    images: tuple[str, ...]
    members: tuple[str, ...]
    calibrations: str | None = None
    vae: str | None = None
    keep_images: bool = False
    map_teacher: str | None = None
    side: int = 256
    resize: bool = True
    per_image: int = len(SETTINGS)
    images_per_shard: int = 8
    seed: int = 0

    def files(self) -> dict[str, str | Path]:
        """Return the files, folders or names of weights that the set is made with, by field."""
        named = {"calibrations": self.calibrations, "map_teacher": self.map_teacher}
        found: dict[str, str | Path] = {name: source for name, source in named.items() if source is not None}
        return found | ({"vae": vae_folder(self.vae)} if self.vae else {})


class Worker:
    """Makes shards; each process has one.

    Args:
        config: of the training set.
        paths: its image files.
        output: its folder.
    """

    def __init__(self, config: DatasetConfig, paths: Sequence[Path], output: Path) -> None:
        self.config, self.paths, self.output = config, list(paths), output
        self.ensemble: Ensemble = build_ensemble(config.members, config.calibrations)
        self.vae: VAE | None = load_vae(config.vae) if config.vae else None
        self.map_teacher = MILO.from_pretrained(config.map_teacher) if config.map_teacher else None

    @torch.no_grad()
    def make(self, index: int) -> None:
        """Write shard `index`, completely or not at all; images that cannot be read are named in its metadata."""
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
        # safetensors does not keep the order of metadata entries, so that only one entry gives the same bytes each time
        content = save(join_rows(rows), metadata={RECORD: json.dumps({"images": names, "skipped": skipped})})
        write_atomically(shard_path(self.output, index), lambda partial: partial.write_bytes(content))

    def _pairs(self, ref: Tensor, name: str) -> dict[str, Tensor]:
        """Return everything that is kept of one image, (1, 3, side, side), and its distorted versions."""
        chosen = draw_settings(name, self.config.per_image, self.config.seed)
        dist = torch.cat([distort(ref, *SETTINGS[setting], image_id=name) for setting in chosen])
        labels = torch.cat([self.ensemble.labels(ref=ref, dist=each) for each in dist.split(1)]).float()
        kept = {"setting": torch.tensor(chosen), "labels": labels, "dmos": labels.mean(dim=1)}
        if self.config.keep_images:
            kept |= {"ref_images": torch.from_numpy(to_8bit(ref)), "dist_images": torch.from_numpy(to_8bit(dist))}
        if self.vae is not None:
            latents = torch.cat([encode_image(self.vae, each).float() for each in torch.cat([ref, dist]).split(1)])
            kept |= {"ref_latents": latents[:1], "dist_latents": latents[1:]}
        if self.map_teacher is not None:
            factor = vae_scale_factor(self.vae) if self.vae is not None else 8
            maps = [self.map_teacher.error_map(ref=ref, dist=each) for each in dist.split(1)]
            kept["maps"] = F.avg_pool2d(torch.cat(maps), factor)
        return kept


def square(image: Tensor, side: int, *, resize: bool = True) -> Tensor:
    """Return a central square of (1, 3, H, W), of `side` pixels: the largest one resized, or cut to size.

    An image that is too small to be cut is resized. Source: supplement, section 1, of the resized square.
    """
    image = center_crop(image, None if resize else min(side, *image.shape[2:]))
    if image.shape[2] != side:
        image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    return round_to_8bit(image)


def draw_settings(name: str, count: int, seed: int) -> list[int]:
    """Return indices of `count` of the 125 distortion settings, which depend on the image's name and the seed alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return sorted(rng.permutation(len(SETTINGS))[:count].tolist())


def join_rows(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join what is kept of several images; `ref_index` tells the reference of each pair."""
    if not rows:
        return {"dmos": torch.zeros(0)}
    joined = {key: torch.cat([row[key] for row in rows]).contiguous() for key in rows[0]}
    counts = torch.tensor([len(row["dmos"]) for row in rows])
    joined["ref_index"] = torch.repeat_interleave(torch.arange(len(rows)), counts)
    return joined


def shard_path(output: Path, index: int) -> Path:
    """Return the file of shard `index`."""
    return output / f"shard-{index:05d}.safetensors"
