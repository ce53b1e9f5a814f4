"""Build a training set: images, distorted pairs, labels, latents; in shards, in parallel, resumable."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from milo_latent.atomic import write_text
from milo_latent.distortions import distort
from milo_latent.evaluation.distortion_settings import SETTINGS
from milo_latent.files import read_image, write_safetensors
from milo_latent.latents.codec import VAE, encode_image, vae_scale_factor
from milo_latent.latents.files import load_vae, vae_folder
from milo_latent.metric.network import MILO
from milo_latent.pictures import center_crop, round_to_8bit, to_8bit
from milo_latent.programs import run_program
from milo_latent.structure import read_json, refusing_damage
from milo_latent.training.data.crops import list_images
from milo_latent.training.data.fingerprints import files_digest, metric_digests, source_digest
from milo_latent.training.data.shards import CONFIG_FILE, SUMMARY_FILE, read_shard
from milo_latent.training.pseudo_mos import Ensemble, build_ensemble, format_agreement, member_agreement

SPARE = 1.2  # this multiple of the estimated size must be free on the disk
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
    """Makes the shards of the training set in `output` from the images in `paths`; each process has one."""

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
        record = json.dumps({"images": names, "skipped": skipped})
        write_safetensors(shard_path(self.output, index), join_rows(rows), metadata={RECORD: record})

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


def square(image: Tensor, side: int, *, resize: bool) -> Tensor:
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


def estimated_bytes(config: DatasetConfig) -> int:
    """Return the approximate size of the training set on the disk."""
    cells = (config.side // 8) ** 2
    pair = 4 * (len(config.members) + 4)
    pair += 3 * config.side**2 if config.keep_images else 0
    pair += 4 * 4 * cells if config.vae else 0
    pair += 4 * cells if config.map_teacher else 0
    return len(config.images) * (config.per_image + 1) * pair


_worker: Worker | None = None  # of this process


def _start_worker(config: DatasetConfig, paths: Sequence[Path], output: Path) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Worker(config, paths, output)


def _make_shard(index: int) -> None:
    assert _worker is not None
    _worker.make(index)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as each of several workers does, since sums over more threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(config: DatasetConfig, paths: Sequence[Path], output: Path, *, workers: int = 1) -> dict[str, Any]:
    """Build a training set in the folder `output`, or finish one: shards that exist are kept.

    The images of `config` are the names of `paths`, and `workers` is the number of processes.

    Returns:
        The summary that is also written to `dataset.json`: counts, skipped images, agreement of the members.

    Raises:
        ValueError: if `output` was started with another configuration or other files, if the side is not a multiple of
            the autoencoder's factor, or if no image can be read.
        OSError: if the disk has too little space, before anything is made, or if it fills up. Complete shards stay, and
            the same command continues.
    """
    with one_thread():
        worker = Worker(config, paths, output)  # before the folder is made, so that a mistyped name leaves no trace
    _check_side(config, worker)
    output.mkdir(parents=True, exist_ok=True)
    _check_config(config, paths, output)
    (output / SUMMARY_FILE).unlink(missing_ok=True)  # its presence tells that a set is complete
    count = -(-len(paths) // config.images_per_shard)
    missing = [index for index in range(count) if not shard_path(output, index).is_file()]
    _check_space(int(SPARE * estimated_bytes(config) * len(missing) / max(count, 1)), output)
    with tqdm(total=count, initial=count - len(missing), desc=output.name, unit="shard", mininterval=5) as progress:
        if workers <= 1:
            with one_thread():
                for index in missing:
                    worker.make(index)
                    progress.update()
        else:
            del worker  # each process opens its own
            context = multiprocessing.get_context("spawn")
            with context.Pool(workers, _start_worker, (config, paths, output)) as pool:
                for _ in pool.imap_unordered(_make_shard, missing):
                    progress.update()
    return _summarize(config, output, count)


def _check_side(config: DatasetConfig, worker: Worker) -> None:
    factor = vae_scale_factor(worker.vae) if worker.vae is not None else 1
    if config.side < factor or config.side % factor:
        raise ValueError(
            f"Expected a side that is a multiple of {factor} px, a cell of the latents, got {config.side}."
        )


def _check_config(config: DatasetConfig, paths: Sequence[Path], output: Path) -> None:
    sources = {name: source_digest(source) for name, source in config.files().items()}
    sources |= {"images": files_digest(paths)} | metric_digests(config.members)
    record = json.loads(json.dumps(asdict(config) | {"sources": sources}))
    path = output / CONFIG_FILE
    before = read_json(path) if path.is_file() else record
    differing = sorted(name for name in record | before if record.get(name) != before.get(name))
    if differing:
        raise ValueError(
            f"{output} was started with another configuration: {', '.join(differing)} differ (see {CONFIG_FILE}). "
            "Choose another folder."
        )
    write_text(path, json.dumps(record, indent=2) + "\n")


def _check_space(needed: int, output: Path) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise OSError(f"Expected {needed / 1e9:.1f} GB free for {output}, found {free / 1e9:.1f} GB. Lower per_image.")


def _summarize(config: DatasetConfig, output: Path, count: int) -> dict[str, Any]:
    labels, skipped, images = [], [], 0
    for index in range(count):
        tensors, metadata = read_shard(shard_path(output, index), keys={"labels"})
        with refusing_damage(f"Expected a record of images in {shard_path(output, index)}"):
            record = json.loads(metadata[RECORD])
            skipped += record["skipped"]
            images += len(record["images"])
        labels += [tensors["labels"]] if "labels" in tensors else []
    if not labels:
        raise ValueError(f"Expected images that can be read, got none of {len(config.images)}; first: {skipped[:1]}")
    joined = torch.cat(labels)
    summary = {
        "shards": count,
        "images": images,
        "pairs": len(joined),
        "skipped": skipped,
        "members": list(config.members),
        "member_srcc": member_agreement(joined) if len(joined) > 2 else None,
    }
    write_text(output / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Build a training set and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", nargs="+", required=True, help="folders of clean images")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--members", nargs="+", required=True, help="metrics that label: milo:MILO.pth ssim ms-ssim vif"
    )
    parser.add_argument("--calibrations", help="JSON of their calibrations, from milo_latent.training.pseudo_mos")
    parser.add_argument("--vae", help="keep latents of this autoencoder: nano, or a folder")
    parser.add_argument("--keep-images", action="store_true", help="keep the images too, for MILO_I")
    parser.add_argument("--map-teacher", help="MILO_I weights whose error maps are kept as a second label")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--cut", dest="resize", action="store_false", help="cut out the central square unresized")
    parser.add_argument("--per-image", type=int, default=len(SETTINGS), help="distortion settings per image, of 125")
    parser.add_argument("--images-per-shard", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    output, workers = options.pop("output"), options.pop("workers")
    paths = list_images(options.pop("images"))
    members = tuple(options.pop("members"))
    config = DatasetConfig(images=tuple(path.name for path in paths), members=members, **options)
    summary = build(config, paths, output, workers=workers)
    print(f"{summary['pairs']} pairs of {summary['images']} images in {output}; {len(summary['skipped'])} skipped")
    for line in summary["skipped"]:
        print(f"  skipped {line}")
    if summary["member_srcc"]:
        print(format_agreement(summary["members"], summary["member_srcc"]))


if __name__ == "__main__":
    sys.exit(run_program(main))
