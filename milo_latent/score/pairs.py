"""Scores of many files: matched pairs, or one reference against many; files that do not fit the metric are refused.

Members of webdataset shards and rows of data sets are scored as files are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from milo_latent.checks import ValueWatch, check_finite, shortened
from milo_latent.datasets import Item, as_file, column_items, expand_braces, shard_items
from milo_latent.files import (
    IMAGE_SUFFIXES,
    LATENT_SUFFIXES,
    list_files,
    list_named_files,
    read_image,
    read_latents,
    read_latents_metadata,
)
from milo_latent.latents.spaces import VAE, LatentSpace
from milo_latent.metric.network import MILO, is_image_metric
from milo_latent.score.table import ScoreRow
from milo_latent.threads import alone_if_large, in_threads

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_SIZE = 16
PIXELS_PER_CELL = 8  # a side, of the VAEs of the Stable Diffusion families, where the VAE is not at hand
SCORABLE = IMAGE_SUFFIXES | LATENT_SUFFIXES


Source = TypeVar("Source", Path, Item)


@dataclass(frozen=True)
class Pair(Generic[Source]):
    """Two files to compare, or items of shards or data sets, and the name of the comparison in a table."""

    name: str
    ref: Source
    dist: Source


def match_pairs(ref: str | Path, dist: str | Path, *, failed: list[str] | None = None) -> list[Pair[Path]]:
    """Pair two files, a file with every file of a folder, or the files of two folders by their names.

    Args:
        ref: reference file, or folder.
        dist: distorted file, or folder.
        failed: gets an error for each file that shares its name with another, and is left out; None refuses them.

    Returns:
        Pairs, sorted by name; names are those of `dist`, without suffix where two folders are matched.

    Raises:
        FileNotFoundError: if one is missing, or a folder holds no file that can be scored.
        ValueError: if two folders do not hold the same names, listing those that differ.
    """
    ref, dist = Path(ref), Path(dist)
    for path in (ref, dist):
        if not path.exists():
            raise FileNotFoundError(f"Expected a file or folder to score, got {path}, which does not exist.")
    if ref.is_file():
        candidates = [dist] if dist.is_file() else list_files(dist, SCORABLE)
        return [Pair(path.name, ref, path) for path in candidates]
    if dist.is_file():
        raise ValueError(f"Expected a folder for `dist`, as `ref` is the folder {ref}, got the file {dist}.")
    (refs, refused), (dists, more) = (list_named_files(folder, SCORABLE) for folder in (ref, dist))
    refused |= more
    for line in refused.values():
        _fail(ValueError(line), failed)
    shared = {path.stem for path in refused}
    _check_names(refs.keys() - shared, dists.keys() - shared, ref, dist)
    return [Pair(name, refs[name], dists[name]) for name in sorted(refs.keys() & dists.keys())]


def match_shards(ref: str | Path, dist: str | Path, *, failed: list[str] | None = None) -> list[Pair[Item]]:
    """Pair the members of webdataset shards, shard by shard, by their names without suffix.

    Args:
        ref: a shard of references, or a pattern of several, such as "refs-{000..099}.tar".
        dist: as many shards of the same members, distorted.
        failed: gets an error for each member that shares its name with another in its shard, and is left out; None
            refuses them.

    Returns:
        Pairs, sorted by name; if there are several shards, the name of the shard of `dist` is part of a pair's name.

    Raises:
        FileNotFoundError: if a shard is missing, or holds no file that can be scored.
        ValueError: if a shard is damaged, or two shards do not hold the same names.
    """
    refs, dists = expand_braces(str(ref)), expand_braces(str(dist))
    if len(refs) != len(dists):
        raise ValueError(f"Expected as many shards of references as distorted ones, got {len(refs)} and {len(dists)}.")
    pairs = []
    for ref_shard, dist_shard in zip(map(Path, refs), map(Path, dists), strict=True):
        ref_items, dist_items = _named_items(ref_shard, failed), _named_items(dist_shard, failed)
        _check_names(ref_items, dist_items, ref_shard, dist_shard)
        folder = f"{dist_shard.stem}/" if len(dists) > 1 else ""
        pairs += [Pair(f"{folder}{key}", item, dist_items[key]) for key, item in ref_items.items()]
    return sorted(pairs, key=lambda pair: pair.name)


def _check_names(refs: Iterable[str], dists: Iterable[str], ref: Path, dist: Path) -> None:
    alone = sorted(set(refs) ^ set(dists))
    if alone:
        raise ValueError(f"Expected the same names in {ref} and {dist}, {len(alone)} are in one only: {alone[:5]}.")


def _named_items(shard: Path, failed: list[str] | None) -> dict[str, Item]:
    """Return the members of a shard that can be scored, by their names without suffix."""
    named: dict[str, Item] = {}
    for item in shard_items(shard):
        if item.suffix in SCORABLE and named.setdefault(item.key, item) is not item:
            _fail(ValueError(f"{item}: expected each name once in a shard, whatever its suffix. Rename it."), failed)
    if not named:
        raise FileNotFoundError(f"Expected files of {sorted(SCORABLE)} in {shard}, found none.")
    return named


def match_columns(rows: Dataset, ref: str, dist: str) -> list[Pair[Item]]:
    """Pair the images in two columns of a Hugging Face data set; the names are the numbers of the rows.

    Raises:
        ValueError: if a column holds no images.
    """
    items = zip(column_items(rows, ref), column_items(rows, dist), strict=True)
    return [Pair(ref_item.name, ref_item, dist_item) for ref_item, dist_item in items]


def _fail(error: Exception, failed: list[str] | None) -> None:
    """Add an error to those of the other files, or raise it if there is no list of them."""
    if failed is None:
        raise error
    failed.append(str(error))


def is_latents(path: Path | Item) -> bool:
    """Return whether a file holds latents, by its suffix."""
    return path.suffix.lower() in LATENT_SUFFIXES


def read_input(path: Path, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Read latents, or an image, which `encode` turns into latents where it is given, (B, C, H, W).

    Raises:
        ValueError: if the file is damaged, or its values are not finite.
    """
    if is_latents(path):
        tensor = read_latents(path)
    else:
        tensor = read_image(path)
        with alone_if_large(tensor.shape[2] * tensor.shape[3]):
            tensor = encode(tensor) if encode is not None else tensor
    check_finite(str(path), tensor)
    return tensor


def check_fits(metric: MILO, path: Path, tensor: Tensor) -> None:
    """Raise ValueError if `tensor`, (B, C, H, W), read from `path`, is not what `metric` was trained on."""
    metadata = read_latents_metadata(path)  # only a `.safetensors` file tells of which VAE it is
    factor, vae = _factor(path, metadata), shortened(metadata.get("vae", "another VAE"))
    takes = describe_input(metric)
    if tensor.shape[1] != metric.config.channels:
        if is_latents(path):
            way_out = "Pass --weights of a metric of their VAE; training.train_metric makes one."
        else:
            way_out = "Pass --vae to score images as latents, or --weights official-image to score them as images."
        raise ValueError(
            f"Expected {takes}, got {tensor.shape[1]} channels, {tuple(tensor.shape)}, in {path}. {way_out}"
        )
    if factor is not None and is_image_metric(metric):
        raise ValueError(f"Expected {takes}, got latents of {vae} in {path}. Use that VAE's metric.")
    if factor is not None and metric.config.scaling_factor not in (None, factor):
        raise ValueError(f"Expected {takes}, got those of {vae} ({factor}) in {path}. Use that VAE's metric.")


def _factor(path: Path, metadata: dict[str, str]) -> float | None:
    """Return the scaling factor that the metadata of `path` give; None where they give none."""
    factor = metadata.get("scaling_factor")
    try:
        return None if factor is None else float(factor)
    except ValueError as error:
        raise ValueError(
            f"Expected a number as `scaling_factor` in {path}, got {shortened(factor)!r}. Encode again."
        ) from error


def check_vae(metric: MILO, vae: VAE) -> None:
    """Raise ValueError if `metric` was not trained on latents such as `vae` makes."""
    space = LatentSpace(vae)
    if metric.config.channels != space.channels or metric.config.scaling_factor not in (None, space.scaling_factor):
        raise ValueError(
            f"Expected a VAE whose latents the metric knows, {describe_input(metric)}, got one of "
            f"{space.channels} channels and scaling factor {space.scaling_factor}. Pass the --weights trained for it."
        )


def describe_input(metric: MILO) -> str:
    """Return in words what a metric takes."""
    if is_image_metric(metric):
        return "images of 3 channels"
    factor = metric.config.scaling_factor
    scale = "" if factor is None else f", scaling factor {factor:g}"
    return f"latents of {metric.config.latent_space or 'any VAE'} ({metric.config.channels} channels{scale})"


def score_pairs(
    metric: MILO,
    pairs: Iterable[Pair],
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    failed: list[str] | None = None,
    threads: int = 1,
) -> Iterator[ScoreRow]:
    """Return the rows of `compare_pairs` alone; a file of several latents gives the means over them."""
    return (row for row, _ in compare_pairs(metric, pairs, encode=encode, failed=failed, threads=threads))


def compare_pairs(
    metric: MILO,
    pairs: Iterable[Pair],
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    failed: list[str] | None = None,
    threads: int = 1,
) -> Iterator[tuple[ScoreRow, Tensor]]:
    """Score pairs, in batches where neighbours have one size; a reference that neighbours share is read once.

    Warns, once, of values that are outside the range of images or the scale of latents.

    Args:
        metric: for what the files hold, or for what `encode` makes of them.
        pairs: files to compare.
        encode: from images, (1, 3, H, W), to latents.
        failed: gets an error for each file or pair that cannot be compared, and costs no more than itself; None refuses
            the first.
        threads: how many batches to work on at once.

    Yields:
        For each pair its row and its error map, (B, 1, H, W).

    Raises:
        ValueError: for files that are damaged or do not fit each other or the metric.
    """
    metric.watch = watch = ValueWatch()  # the metric itself does not warn of the same values again
    own = threading.local()  # `last`: the reference that a thread has read last

    def read(path: Path | Item, failed: list[str] | None) -> Tensor | None:
        try:
            with as_file(path) as file:
                tensor = read_input(file, encode)
                check_fits(metric, file, tensor)
        except (ValueError, FileNotFoundError, MemoryError) as error:
            _fail(error, failed)
            return None
        watch.look(str(path), tensor, latents=not is_image_metric(metric))
        return tensor.to(metric.device, metric.dtype)

    @torch.inference_mode()  # which is a thread's own
    def compare(batch: list[Pair]) -> tuple[list[tuple[ScoreRow, Tensor]], list[str]]:
        errors: list[str] | None = None if failed is None else []
        tensors = {}
        for pair in batch:
            if getattr(own, "last", (None,))[0] != pair.ref:
                own.last = (pair.ref, read(pair.ref, errors))
            ref, dist = own.last[1], read(pair.dist, errors) if own.last[1] is not None else None
            if ref is not None and dist is not None:
                tensors[pair] = (ref, dist)
        cell = 1 if is_image_metric(metric) else PIXELS_PER_CELL**2
        with alone_if_large(max((ref.shape[2] * ref.shape[3] * cell for ref, _ in tensors.values()), default=0)):
            return list(_compare_batch(metric, tensors, errors)), errors or []

    remaining = iter(pairs)
    batches = iter(lambda: list(islice(remaining, BATCH_SIZE)), [])
    for _, outcome in in_threads(compare, batches, threads=threads):
        results, errors = outcome()
        yield from results
        if failed is not None:
            failed += [error for error in errors if error not in failed]  # one of a shared reference comes once


def _compare_batch(
    metric: MILO, tensors: dict[Pair, tuple[Tensor, Tensor]], failed: list[str] | None
) -> Iterator[tuple[ScoreRow, Tensor]]:
    """Compare what was read of pairs, (B, C, H, W) each: all at once if they have one size, with B = 1."""
    shapes = {tensor.shape for each in tensors.values() for tensor in each}
    if len(tensors) > 1 and (len(shapes) > 1 or next(iter(shapes))[0] > 1):
        for pair, each in tensors.items():
            yield from _compare_batch(metric, {pair: each}, failed)
        return
    try:
        results = _compare(metric, tensors) if tensors else []
    except ValueError as error:
        if len(tensors) == 1 or failed is None:
            _fail(error, failed)
        for pair, each in tensors.items() if len(tensors) > 1 else ():
            yield from _compare_batch(metric, {pair: each}, failed)
        return
    for pair, (row, error_map) in zip(tensors, results, strict=True):
        if math.isfinite(row.error) and math.isfinite(row.mos):
            yield row, error_map
        else:
            odd = f"Expected a finite error, got {row.error} of {pair.ref} and {pair.dist}: values too large?"
            _fail(ValueError(odd), failed)


def _compare(metric: MILO, tensors: dict[Pair, tuple[Tensor, Tensor]]) -> list[tuple[ScoreRow, Tensor]]:
    """Compare one pair, or several at once; an error names the files of the first."""
    first, alone = next(iter(tensors)), len(tensors) == 1
    refs, dists = (torch.cat(each) for each in zip(*tensors.values(), strict=True))
    shared = not alone and len({pair.ref for pair in tensors}) == 1
    try:
        result = metric.compare(ref=refs[:1] if shared else refs, dist=dists)
    except ValueError as error:
        cells = "" if is_image_metric(metric) else " Sizes are in latent cells."
        raise ValueError(f"{first.ref} and {first.dist}: {error}{cells}") from error
    if alone:
        return [(ScoreRow(first.name, result.error.mean().item(), result.mos.mean().item()), result.error_map)]
    errors, scores = result.error.tolist(), result.mos.tolist()
    rows = [ScoreRow(pair.name, *each) for pair, *each in zip(tensors, errors, scores, strict=True)]
    return list(zip(rows, result.error_map.split(1), strict=True))


def unfinished(pairs: list[Pair], done: Container[str]) -> list[Pair]:
    """Return the pairs of every batch that is not complete, given the names of the pairs that were scored before.

    Batches are scored whole, since a batch of another size could round the last digit of a score differently.
    """
    batches = [pairs[first : first + BATCH_SIZE] for first in range(0, len(pairs), BATCH_SIZE)]
    return [pair for batch in batches if any(each.name not in done for each in batch) for pair in batch]
