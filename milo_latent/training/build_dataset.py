"""Build a training set: images, distorted pairs, labels, latents; in shards, in parallel, resumable."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from milo_latent.evaluation.distortion_settings import SETTINGS
from milo_latent.files import write_text
from milo_latent.latents.codec import vae_scale_factor
from milo_latent.programs import run_program
from milo_latent.training.data.crops import list_images
from milo_latent.training.data.fingerprints import files_digest, metric_digests, source_digest
from milo_latent.training.data.shards import CONFIG_FILE, SUMMARY_FILE, read_shard
from milo_latent.training.pseudo_mos import format_agreement, member_agreement
from milo_latent.training.shard_worker import RECORD, DatasetConfig, Worker, shard_path

SPARE = 1.2  # this multiple of the estimated size must be free on the disk


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
    """Build a training set, or finish one.

    Args:
        config: its configuration, whose images are the names of `paths`.
        paths: image files.
        output: its folder; shards that exist are kept.
        workers: number of processes.

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
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else record
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
        "member_srcc": member_agreement(joined).tolist() if len(joined) > 2 else None,
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
        print(format_agreement(summary["members"], torch.tensor(summary["member_srcc"])))


if __name__ == "__main__":
    sys.exit(run_program(main))
