"""`milo-latent encode`."""

from __future__ import annotations

import argparse

from milo_latent.cli.common import Answer, add_command, add_file_options, add_vae_options, open_vae, piped, tell_report


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "encode",
        "encode photo.jpg -o photo.safetensors",
        "encode 'trips/**/*.jpg' -o latents/ --model FOLDER --tile 512",
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
        help="of the files in a folder, and of standard output (default: safetensors)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> Answer:
    """Encode."""
    return piped(_encode, f".{options.format}")(options)


def _encode(options: argparse.Namespace) -> Answer:
    from milo_latent.files import IMAGE_SUFFIXES
    from milo_latent.jobs import find_jobs
    from milo_latent.latents.files import encode_files

    jobs = find_jobs(
        options.inputs, options.output, suffixes=IMAGE_SUFFIXES, suffix=f".{options.format}",
        recursive=options.recursive, existing=options.existing,
    )  # fmt: skip
    how = {"vae_name": options.model, "tile": options.tile, "progress": not options.quiet}
    report = encode_files(open_vae(options), jobs, **how) if jobs.results else jobs.idle
    return tell_report(
        report, jobs, options, head="encode", unit="photos", told=lambda shape: ", ".join(map(str, shape))
    )
