"""`milo-latent encode`."""

from __future__ import annotations

import argparse
from functools import partial

from milo_latent.cli.common import Answer, add_command, add_file_options, add_vae_options, open_vae, piped, tell_report


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "encode",
        "encode photo.jpg -o photo.safetensors",
        "encode 'trips/**/*.jpg' -o latents/ --model FOLDER --tile 512",
        "encode 'photos-{000..099}.tar' -o latents/       # webdataset shards into shards",
        "encode hf:NAME:image -o latents/                # a column of a Hugging Face data set, into Parquet files",
        help="encode photos into latents",
        description="Encode photos into latents. In a folder of results, those are left alone that were made of the "
        "same files and weights.",
    )
    command.set_defaults(run=run)
    output = "a file (.npy, .safetensors), a folder, or - for standard output"
    add_file_options(command, inputs="photos", output=output)
    add_vae_options(command)
    command.add_argument(
        "--format", choices=["npy", "safetensors"], default="safetensors",
        help="of the files in a folder or a shard, and of standard output (default: safetensors)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=int, default=1, metavar="N",
        help="photos of one size to encode at once, faster for small ones; changes last digits (default: 1)",
    )  # fmt: skip
    command.add_argument("--split", default="train", help="of a Hugging Face data set (default: train)")


def run(options: argparse.Namespace) -> Answer:
    """Encode."""
    return piped(_encode, f".{options.format}")(options)


def _encode(options: argparse.Namespace) -> Answer:
    from milo_latent.datasets import is_column, is_shard
    from milo_latent.files import IMAGE_SUFFIXES
    from milo_latent.jobs import find_jobs
    from milo_latent.latents.files import encode_files

    if any(map(is_column, options.inputs)) or any(map(is_shard, options.inputs)):
        if options.batch != 1:
            raise ValueError(f"Expected --batch with files and folders only, got {options.batch} with a data set.")
        return _encode_set(options)
    jobs = find_jobs(
        options.inputs, options.output, suffixes=IMAGE_SUFFIXES, suffix=f".{options.format}",
        recursive=options.recursive, existing=options.existing,
    )  # fmt: skip
    how = {"vae_name": options.model, "tile": options.tile, "batch": options.batch, "progress": not options.quiet}
    report = encode_files(open_vae(options), jobs, **how) if jobs.results else jobs.idle
    return tell_report(
        report, jobs, options, head="encode", unit="photos", told=lambda shape: ", ".join(map(str, shape))
    )


def _encode_set(options: argparse.Namespace) -> Answer:
    """Encode webdataset shards, or a column of a Hugging Face data set."""
    from pathlib import Path

    from milo_latent.datasets import SHARD_SUFFIX, expand_braces, is_column, is_shard, open_column
    from milo_latent.jobs import find_jobs
    from milo_latent.latents.sets import encode_dataset, encode_shards

    tell = partial(tell_report, options=options, head="encode", told=lambda count: f"{count} photos")
    how = {"tile": options.tile, "progress": not options.quiet}
    if len(options.inputs) == 1 and is_column(options.inputs[0]):
        rows, column = open_column(options.inputs[0], split=options.split)
        jobs, report = encode_dataset(
            open_vae(options), rows, column, Path(options.output), existing=options.existing, **how
        )
        return tell(report, jobs, unit="parts")
    if not all(map(is_shard, options.inputs)):
        raise ValueError(f"Expected photos, or shards, or one column of a data set, got {', '.join(options.inputs)}.")
    jobs = find_jobs(
        [shard for each in options.inputs for shard in ([each] if Path(each).exists() else expand_braces(each))],
        options.output, suffixes=frozenset({SHARD_SUFFIX}), suffix=SHARD_SUFFIX, existing=options.existing,
    )  # fmt: skip
    suffix = f".{options.format}"
    report = encode_shards(open_vae(options), jobs, vae_name=options.model, suffix=suffix, **how)
    return tell(report, jobs, unit="shards")
