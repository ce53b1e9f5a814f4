"""Build the training set: images -> distorted pairs -> labels -> latents; in shards, in parallel, resumable."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from milo_latent.codec import VAE, encode_image, vae_scale_factor
from milo_latent.files import read_image, write_atomically, write_text
from milo_latent.metric.network import MILO
from milo_latent.training.conditions import CONDITIONS
from milo_latent.training.dataset import list_images
from milo_latent.training.distortions import distort
from milo_latent.training.full_reference import load_vae
from milo_latent.training.pseudo_mos import Ensemble, build_ensemble, format_agreement, member_agreement

CONFIG_FILE, SUMMARY_FILE = "config.json", "dataset.json"
RECORD = "record"  # metadata of a shard
SPARE = 1.2  # times the estimated size must be free


@dataclass(frozen=True)
class DatasetConfig:
    """What a training set is; a folder that was begun with another one is refused.

    Args:
        images: names of the image files, in order.
        members: metrics that label, as of `full_reference.by_name`.
        calibrations: their file, None for the shipped ones.
        vae: whose latents are kept, as of `full_reference.load_vae`; None keeps none.
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


def estimated_bytes(config: DatasetConfig) -> int:
    """Return about how much the dataset will take on the disk."""
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as each of several workers does: sums over more threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_shard(index: int) -> Path:
    assert _worker is not None
    return _worker.make(index)


def build(config: DatasetConfig, paths: Sequence[Path], output: Path, *, workers: int = 1) -> dict[str, Any]:
    """Build, or finish, a training set.

    Args:
        config: what it is; its images are the names of `paths`.
        paths: image files.
        output: folder; shards that are there already are kept.
        workers: processes.

    Returns:
        The summary that is also written to `dataset.json`: counts, skipped images, agreement of the members.

    Raises:
        ValueError: if `output` was begun with another configuration, or no image could be read.
        OSError: if there is too little space on the disk, before anything is made; or if it fills up: what is complete
            stays, and the same command goes on from there.
    """
    output.mkdir(parents=True, exist_ok=True)
    _check_config(config, output)
    count = -(-len(paths) // config.images_per_shard)
    missing = [index for index in range(count) if not shard_path(output, index).is_file()]
    needed = int(SPARE * estimated_bytes(config) * len(missing) / max(count, 1))
    free = shutil.disk_usage(output).free
    if needed > free:
        raise OSError(f"Expected {needed / 1e9:.1f} GB free for {output}, found {free / 1e9:.1f} GB. Lower per_image.")
    with tqdm(total=count, initial=count - len(missing), desc=output.name, unit="shard", mininterval=5) as progress:
        if workers <= 1:
            with one_thread():
                worker = Worker(config, paths, output)
                for index in missing:
                    worker.make(index)
                    progress.update()
        else:
            context = multiprocessing.get_context("spawn")
            with context.Pool(workers, _start_worker, (config, paths, output)) as pool:
                for _ in pool.imap_unordered(_make_shard, missing):
                    progress.update()
    return _summarise(config, output, count)


def _check_config(config: DatasetConfig, output: Path) -> None:
    record = json.dumps(asdict(config), indent=2) + "\n"
    path = output / CONFIG_FILE
    if path.is_file() and path.read_text(encoding="utf-8") != record:
        raise ValueError(f"{output} was begun with another configuration (see {path.name}). Choose another folder.")
    write_text(path, record)


def _summarise(config: DatasetConfig, output: Path, count: int) -> dict[str, Any]:
    from milo_latent.training.shards import read_shard

    labels, skipped, images = [], [], 0
    for index in range(count):
        tensors, metadata = read_shard(shard_path(output, index), keys={"labels"})
        record = json.loads(metadata[RECORD])
        skipped += record["skipped"]
        images += len(record["images"])
        labels += [tensors["labels"]] if "labels" in tensors else []
    if not labels:
        raise ValueError(f"Expected images that can be read, got none of {len(config.images)}; first: {skipped[:1]}")
    joined = torch.cat(labels)
    summary = {
        "images": images,
        "pairs": len(joined),
        "skipped": skipped,
        "members": list(config.members),
        "member_srcc": member_agreement(joined).tolist() if len(joined) > 2 else None,
    }
    write_text(output / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Build a training set and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", nargs="+", required=True, help="folders of clean images")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--members", nargs="+", required=True, help="metrics that label: milo:MILO.pth ssim ms-ssim vif"
    )
    parser.add_argument("--calibrations", help="JSON of their curves, from milo_latent.training.pseudo_mos")
    parser.add_argument("--vae", help="keep latents of this autoencoder: nano, or a folder")
    parser.add_argument("--keep-images", action="store_true", help="keep the images too, for MILO_I")
    parser.add_argument("--map-teacher", help="MILO_I weights whose error maps are kept as a second label")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--cut", dest="resize", action="store_false", help="cut the centre out in place of resizing")
    parser.add_argument("--per-image", type=int, default=len(CONDITIONS), help="conditions drawn per image, of 125")
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
        print(format_agreement(summary["members"], torch.tensor(summary["member_srcc"])))


if __name__ == "__main__":
    main()
