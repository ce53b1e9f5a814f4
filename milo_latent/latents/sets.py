"""Shards and data sets of photos to shards and data sets of latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from milo_latent.atomic import write_atomically, write_text
from milo_latent.datasets import Item, as_file, column_items, shard_items, write_shard
from milo_latent.extras import import_extra
from milo_latent.files import IMAGE_SUFFIXES, read_image
from milo_latent.jobs import Existing, Jobs, Report, leave_existing, run_jobs
from milo_latent.latents.codec import check_tile, encode_image
from milo_latent.latents.files import encode_file
from milo_latent.latents.spaces import VAE
from milo_latent.provenance import weights_digest

if TYPE_CHECKING:
    from datasets import Dataset

PART = 1024  # rows of a data set in one file
GROUP = 32  # rows in memory
T = TypeVar("T")


def failures_path(result: Path) -> Path:
    """Return the text file beside a shard or a part that lists the items without a result; absent if all have one."""
    return result.with_name(f"{result.name}.failed.txt")


def read_failures(result: Path) -> dict[str, str]:
    """Return the names of the items of a shard or a part that have no result, and why, also of an earlier run."""
    path = failures_path(result)
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.is_file() else []
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}


def _write_failures(result: Path, failed: dict[str, str]) -> None:
    lines = (f"{' '.join(name.split())}\t{' '.join(reason.split())}\n" for name, reason in failed.items())
    if failed:
        write_text(failures_path(result), "".join(lines))
    else:
        failures_path(result).unlink(missing_ok=True)


def _try(item: Item, work: Callable[[Path], T], failed: dict[str, str]) -> T | None:
    try:
        with as_file(item) as path:
            return work(path)
    except (ValueError, FileNotFoundError, MemoryError) as error:
        failed[item.name] = str(error)
        return None


def encode_shard(
    vae: VAE, shard: Path, output: Path, *, vae_name: str, suffix: str = ".safetensors", tile: int | None = None
) -> int:
    """Encode the images in a webdataset shard into a shard of latents, one at a time.

    A file of latents has the name of its image, with another suffix, and the bytes that `encode_file` writes. All other
    members, such as captions, are copied. Images that cannot be encoded are left out, and listed in a text file beside
    the result (`read_failures`).

    Args:
        vae: encodes.
        shard: a `.tar` file.
        output: the shard to write.
        vae_name: stored in `.safetensors`.
        suffix: ".safetensors" or ".npy".
        tile: as of `encode_image`.

    Returns:
        The number of images that were encoded.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if the shard is damaged or holds no image.
    """
    failed: dict[str, str] = {}
    sharing = Counter(item.key for item in shard_items(shard) if item.suffix in IMAGE_SUFFIXES)
    if not sharing:
        raise ValueError(f"Expected images of {sorted(IMAGE_SUFFIXES)} in {shard}, found none.")

    def encode(photo: Path) -> bytes:
        result = photo.with_name(f"latents{suffix}")
        encode_file(vae, photo, result, vae_name=vae_name, tile=tile)
        return result.read_bytes()

    def members() -> Iterator[tuple[str, bytes]]:
        for item in shard_items(shard):
            if item.suffix not in IMAGE_SUFFIXES:
                yield item.name, item.read()
            elif sharing[item.key] > 1:
                failed[item.name] = f"{item}: expected each name once in a shard, whatever its suffix. Rename it."
            elif (content := _try(item, encode, failed)) is not None:
                yield item.key + suffix, content

    write_shard(output, members())
    _write_failures(output, failed)
    return sharing.total() - len(failed)


@torch.inference_mode()
def encode_rows(
    vae: VAE,
    rows: Dataset,
    column: str,
    output: Path,
    *,
    start: int = 0,
    stop: int | None = None,
    tile: int | None = None,
) -> int:
    """Encode a column of images of a Hugging Face data set into a Parquet file, a few rows at a time.

    The file holds the rows from `start` to `stop` with the column `latents`, (C, h, w) each, and all other columns but
    the images; `datasets.load_dataset("parquet", data_files=...)` opens it. Where an image cannot be encoded, `latents`
    is null, and the row is listed in a text file beside the result (`read_failures`).

    Args:
        vae: encodes.
        rows: as of `open_dataset`.
        column: of images.
        output: the file to write.
        start: the first row.
        stop: the row after the last one; None goes to the end.
        tile: as of `encode_image`.

    Returns:
        The number of images that were encoded.

    Raises:
        ValueError: if the column holds no images.
    """
    datasets = import_extra("datasets", "data", "A Hugging Face data set")
    arrow = import_extra("pyarrow", "data", "A Hugging Face data set")
    parquet = import_extra("pyarrow.parquet", "data", "A Hugging Face data set")
    chosen = range(start, len(rows) if stop is None else min(stop, len(rows)))
    others = rows.remove_columns(column).with_format("arrow")
    latents_type = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
    schema = datasets.Features({**others.features, "latents": latents_type}).arrow_schema
    failed: dict[str, str] = {}

    def encode(photo: Path) -> list[Any]:
        return encode_image(vae, read_image(photo), tile=tile)[0].tolist()

    def write(partial_file: Path) -> None:
        with parquet.ParquetWriter(partial_file, schema) as file:
            items = column_items(rows, column, chosen)
            while group := list(islice(items, GROUP)):
                first = int(group[0].name)
                latents = arrow.array([_try(item, encode, failed) for item in group], schema.field("latents").type)
                kept = others[first : first + len(group)]
                file.write_table(arrow.table([*kept.columns, latents], schema=schema))

    write_atomically(output, write)
    _write_failures(output, failed)
    return len(chosen) - len(failed)


def encode_shards(
    vae: VAE, jobs: Jobs, *, vae_name: str, suffix: str = ".safetensors", tile: int | None = None, progress: bool = True
) -> Report:
    """Encode webdataset shards by `encode_shard`; the report holds how many images of each were encoded.

    Images that were not encoded are among what failed, also those of shards that an earlier run made.

    Raises:
        ValueError: for tiles that do not fit the VAE, before the first shard.
    """
    if tile is not None:
        check_tile(vae, tile)

    def work(shard: Path, output: Path) -> int:
        return encode_shard(vae, shard, output, vae_name=vae_name, suffix=suffix, tile=tile)

    made = {"weights": weights_digest({"vae": vae}), "vae": vae_name, "tile": tile, "format": suffix}
    return _with_failures(run_jobs(jobs, work, made=made, unit="shard", progress=progress), jobs)


def encode_dataset(
    vae: VAE, rows: Dataset, column: str, output: Path, *,
    tile: int | None = None, existing: Existing = "resume", progress: bool = True,
) -> tuple[Jobs, Report]:  # fmt: skip
    """Encode a column of a Hugging Face data set by `encode_rows` into a folder of Parquet files, `PART` rows each.

    A killed run resumes at the file that was not complete.

    Returns:
        The jobs, by the names of ranges of rows, and the report, which holds how many images of each were encoded.

    Raises:
        ValueError: for tiles that do not fit the VAE, or if the column holds no images.
    """
    if tile is not None:
        check_tile(vae, tile)
    next(column_items(rows, column), None)  # refuses another column
    parts = {
        f"rows {first} to {min(first + PART, len(rows))} of {column}": first for first in range(0, len(rows), PART)
    }
    results = {Path(name): output / f"part-{first // PART:05d}.parquet" for name, first in parts.items()}
    jobs = leave_existing(Jobs(results, output, existing))

    def work(part: Path, result: Path) -> int:
        first = parts[str(part)]
        return encode_rows(vae, rows, column, result, start=first, stop=first + PART, tile=tile)

    made = {"weights": weights_digest({"vae": vae}), "tile": tile, "rows": rows._fingerprint, "column": column}
    return jobs, _with_failures(run_jobs(jobs, work, made=made, unit="part", progress=progress), jobs)


def _with_failures(report: Report, jobs: Jobs) -> Report:
    lost = {source / name: reason for source, result in jobs.results.items()
            for name, reason in read_failures(result).items()}  # fmt: skip
    return replace(report, failed=report.failed | lost)
