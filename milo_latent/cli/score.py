"""`milo-latent score`."""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milo_latent.cli.common import (
    Answer,
    add_answer_options,
    add_command,
    add_device_options,
    add_existing_options,
    given_options,
    hide_loading_bar,
    place,
)

if TYPE_CHECKING:
    from milo_latent.score.pairs import Pair


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "score",
        "score original.png restored.png                 # the reference first",
        "score originals results --csv scores.csv        # two folders, matched by name; resumed if interrupted",
        "score a.png b.png --map where.png --overlay a.png",
        "score originals results --html sheet.html       # thumbnails, the worst first",
        "score 'a-{00..09}.tar' 'b-{00..09}.tar'         # webdataset shards, matched one by one",
        "score hf:NAME:original hf:NAME:restored         # columns of a Hugging Face data set",
        help="score the visible difference of images or latents",
        description="Print MILO's error (0 = identical, unbounded, lower is better) and MOS (0 to 5, higher is better) "
        "of two files, of one file against a folder, or of two folders matched by name.",
    )
    command.set_defaults(run=run)
    for name, what in (("ref", "image, or latents (.npy, .safetensors), or folder"), ("dist", "the same, distorted")):
        # no type, which would be applied to the default, which leaves the option's value in its place
        command.add_argument(name, nargs="?", default=argparse.SUPPRESS, metavar=name.upper(), help=what)
        command.add_argument(f"--{name}", metavar=name.upper(), help=f"the same as {name.upper()}")
    command.add_argument(
        "--weights", metavar="NAME|FOLDER|FILE",
        help="official-image or official-latent (fetched once), a shipped set, a folder, or an official .pth (default: "
        "for images official-image once it was fetched, before that milo-image; for latents nano)",
    )  # fmt: skip
    command.add_argument("--vae", metavar="NAME|FOLDER", help="score images as latents of this model's VAE")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write a table; an interrupted one is resumed")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with thumbnails, the worst first")
    command.add_argument("--split", default="train", help="of a Hugging Face data set (default: train)")
    command.add_argument(
        "--map", type=Path, metavar="OUT", help="write a picture of where the difference is (one pair)"
    )
    command.add_argument(
        "--map-scale", default="auto", metavar="ERROR|auto",
        help="the error painted lightest; auto: the map's 99.5th percentile; a number makes maps comparable",
    )  # fmt: skip
    command.add_argument("--overlay", type=Path, metavar="IMAGE", help="lay the map over this image")
    add_existing_options(command, "a table or map is refused, an interrupted table resumed")
    add_device_options(command, "of metric and VAE")
    add_answer_options(command)


def run(options: argparse.Namespace) -> Answer:
    """Score two files, or the files of folders."""
    from tqdm.auto import tqdm

    from milo_latent.files import files_failed
    from milo_latent.metric.network import MILO
    from milo_latent.processes import gather, process_index, share
    from milo_latent.score.pairs import BATCH_SIZE, compare_pairs, score_pairs, unfinished
    from milo_latent.score.sheet import write_sheet
    from milo_latent.score.table import ScoreTable
    from milo_latent.threads import thread_count

    if options.ref is None or options.dist is None:
        raise ValueError("Expected two files or folders, REF and DIST: milo-latent score REF DIST.")
    largest = _map_scale(options)
    failed: list[str] = []
    pairs = _pairs(options, failed)
    weights = _weights(options, pairs)
    _check_outputs(options, pairs, weights)
    there = _leave_existing(options)
    if there and options.csv is None and options.map is None and options.html is None:
        return Answer(f"score: nothing to do, {', '.join(map(str, there))} is there already", skipped=there)
    metric = place(MILO.from_pretrained(weights), options)
    encode = None if options.vae is None else _encoder(metric, options)
    table = ScoreTable(options.csv, made=_made(metric, encode, pairs)) if options.csv else None
    painted: list[str] = []
    broken: list[str] = []
    left, _ = share(pairs if table is None else unfinished(pairs, table.rows), BATCH_SIZE)
    if options.map is not None and left:
        ((row, error_map),) = compare_pairs(metric, left, encode=encode)
        scores = iter([row])
        painted = [_write_map(metric, left[0].ref, encode, error_map, largest, options)]
    else:
        # by all pairs, so that what is left of a table is computed as the rest of it was
        threads = thread_count(metric.device) if len(pairs) > BATCH_SIZE else 1
        several = {"failed": broken} if len(pairs) > 1 else {}
        scores = score_pairs(metric, left, encode=encode, threads=threads, **several)
    hidden = options.quiet or len(left) < 2 or process_index() > 0
    scored = tqdm(scores, total=len(left), unit="pair", disable=hidden)
    rows = gather(list(scored if table is None else table.extend(scored)))
    failed += gather(broken)
    if process_index() > 0:
        return Answer("")
    if table is not None:
        rows = table.finish((pair.name for pair in pairs), rows)
    if options.html is not None and rows:
        write_sheet(options.html, rows, pairs, title=f"{_name(metric)} ({weights})")
        painted.append(f"sheet: {options.html}")
    return Answer(
        _text(rows, painted, weights=weights, metric=metric) if rows else "",
        inputs=[options.ref, options.dist],
        outputs=[path for path in (options.csv, options.map, options.html) if path],
        settings=given_options(options),
        skipped=there,
        more=_scores(rows, weights, metric) | {"failed": [{"reason": reason} for reason in failed]},
        failure=files_failed(f"{len(rows)} pairs of {options.ref} and {options.dist} scored", failed)
        if failed
        else None,
    )


def _pairs(options: argparse.Namespace, failed: list[str]) -> list[Pair]:
    """Return the pairs of files, of members of shards, or of rows of a data set."""
    from milo_latent.datasets import is_column, is_shard, open_column
    from milo_latent.score.pairs import match_columns, match_pairs, match_shards

    given = (options.ref, options.dist)
    if all(map(is_column, given)):
        (rows, ref), (others, dist) = (open_column(each, split=options.split) for each in given)
        if rows._fingerprint != others._fingerprint:
            raise ValueError(f"Expected two columns of one data set, got {options.ref} and {options.dist}.")
        return match_columns(rows, ref, dist)
    if all(map(is_shard, given)):
        return match_shards(*given, failed=failed)
    return match_pairs(*given, failed=failed)


def _leave_existing(options: argparse.Namespace) -> dict[Path, str]:
    """Refuse outputs that are there, or take them from the options where they are to be left alone."""
    from milo_latent.jobs import THERE, refuse_existing

    there = {}
    for name in ("csv", "map", "html"):
        path = getattr(options, name)
        if path is not None and path.exists():
            refuse_existing(path, options.existing)
            if options.existing == "skip":
                there[path] = THERE
                setattr(options, name, None)
    return there


def _scores(rows: list[Any], weights: str, metric: Any) -> dict[str, Any]:
    """Return the values that --json prints of a table."""
    from dataclasses import asdict

    from milo_latent.score.table import mean_row

    mean = {} if not rows else asdict(mean_row(rows))
    mean.pop("name", None)
    return {"metric": _name(metric), "weights": weights, "mean": mean, "pairs": [asdict(row) for row in rows]}


def _name(metric: Any) -> str:
    from milo_latent.metric.network import is_image_metric

    return "MILO_I" if is_image_metric(metric) else "MILO_L"


def _text(rows: list[Any], painted: list[str], *, weights: str, metric: Any) -> str:
    """Return the table of scores as it is printed."""
    from milo_latent.score.table import mean_row

    mean = [mean_row(rows)] if len(rows) > 1 else []
    lines = [f"{row.name}: error {row.error:.10f}, MOS {row.mos:.4f}" for row in [*rows, *mean]]
    about = f"{_name(metric)} ({weights}); error: 0 = identical; MOS: 0 to 5, higher is better"
    return "\n".join([*lines, *painted, about])


def _map_scale(options: argparse.Namespace) -> float | None:
    """Return the error that is painted lightest; None takes that of the map itself."""
    if options.map_scale == "auto":
        return None
    try:
        largest = float(options.map_scale)
    except ValueError:
        largest = math.nan
    if not 0 < largest < math.inf:
        raise ValueError(f"Expected --map-scale to be auto or an error above 0, got {options.map_scale!r}.")
    return largest


def _check_outputs(options: argparse.Namespace, pairs: list[Pair], weights: str) -> None:
    from milo_latent.checks import check_apart
    from milo_latent.score.table import partial_of

    if options.overlay is not None and options.map is None:
        raise ValueError("Expected --map OUT with --overlay: the map is what is laid over the image.")
    if options.csv is not None and options.csv.is_dir():
        raise ValueError(f"Expected a file for --csv, got the folder {options.csv}.")
    if options.map is not None and len(pairs) != 1:
        raise ValueError(f"Expected one pair for --map, got {len(pairs)}.")
    files = [path for pair in pairs for path in (pair.ref, pair.dist) if isinstance(path, Path)]
    inputs = [*files, Path(weights), options.overlay or Path()]
    outputs = [options.map, options.html, *([options.csv, partial_of(options.csv)] if options.csv else [])]
    for output in filter(None, outputs):
        check_apart(output, *inputs)


def _made(metric: Any, encode: Any, pairs: list[Pair]) -> dict[str, dict[str, str]]:
    """Return what the row of each pair depends on: weights, and the files with their sizes and times."""
    from milo_latent.provenance import file_stamp, weights_digest

    networks = {"metric": metric} if encode is None else {"metric": metric, "vae": encode.args[0]}
    digest = weights_digest(networks)
    resolved = cache(Path.resolve)

    def stamp(source: Any) -> str:
        return f"{resolved(source.parent)} {file_stamp(source)}" if isinstance(source, Path) else source.stamp

    return {pair.name: {"weights": digest, "ref": stamp(pair.ref), "dist": stamp(pair.dist)} for pair in pairs}


def _weights(options: argparse.Namespace, pairs: list[Pair]) -> str:
    """Return the weights to score with."""
    from milo_latent.metric.loading import default_image_metric
    from milo_latent.score.pairs import is_latents

    kinds = {is_latents(path) for pair in pairs for path in (pair.ref, pair.dist)}
    if len(kinds) > 1:
        raise ValueError(
            f"Expected two images or two latent files, got both kinds in {options.ref} and {options.dist}."
        )
    if options.vae is not None:
        if kinds == {True}:
            raise ValueError("Expected images with --vae, got latents. Leave --vae out.")
        return options.weights or options.vae
    if options.weights is None and kinds == {False}:
        return default_image_metric()
    return options.weights or "nano"


def _encoder(metric: Any, options: argparse.Namespace) -> Any:
    """Return a function that encodes images with the VAE of --vae, whose latents the metric must know."""
    from functools import partial

    from milo_latent.latents.codec import encode_image
    from milo_latent.latents.files import load_vae
    from milo_latent.score.pairs import check_vae

    hide_loading_bar()
    vae = place(load_vae(options.vae), options)
    check_vae(metric, vae)
    return partial(encode_image, vae)


def _write_map(
    metric: Any, ref: Any, encode: Any, error_map: Any, largest: float | None, options: argparse.Namespace
) -> str:
    """Write the picture of the error map of the first item; return the line to print."""
    from milo_latent.files import read_image, write_image
    from milo_latent.metric.network import is_image_metric
    from milo_latent.metric.visualize import color_error_map, map_scale

    which = f", of the first of {len(error_map)} latents" if len(error_map) > 1 else ""
    error_map = error_map[:1].float().cpu()
    largest = map_scale(error_map) if largest is None else largest
    image = read_image(options.overlay) if options.overlay else None
    if not is_image_metric(metric):
        error_map = _enlarge(error_map, ref, encode)
    write_image(options.map, color_error_map(error_map, image=image, largest=largest))
    return f"map: {options.map}, from 0 (dark) to {largest:.3g} (light){which}"


def _enlarge(error_map: Any, ref: Any, encode: Any) -> Any:
    """Enlarge a map of latents to the pixels they stand for, and cut off what encoding added to the image `ref`."""
    from torch.nn.functional import interpolate

    from milo_latent.datasets import as_file
    from milo_latent.files import read_image
    from milo_latent.latents.codec import vae_scale_factor
    from milo_latent.score.pairs import PIXELS_PER_CELL

    factor = PIXELS_PER_CELL if encode is None else vae_scale_factor(encode.args[0])
    error_map = interpolate(error_map, scale_factor=factor, mode="bilinear", align_corners=False)
    if encode is None:
        return error_map
    with as_file(ref) as file:
        height, width = read_image(file).shape[2:]
    return error_map[..., :height, :width]
