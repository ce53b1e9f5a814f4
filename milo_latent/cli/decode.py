"""`milo-latent decode`."""

from __future__ import annotations

import argparse

from milo_latent.cli.common import Answer, add_command, add_file_options, add_vae_options, open_vae, piped, tell_report


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "decode",
        "decode photo.safetensors -o photo.png",
        "decode latents -r -o photos --model FOLDER",
        help="decode latents into photos",
        description="Decode latents into photos. Files that tell the photo's size give that size back.",
    )
    command.set_defaults(run=run)
    add_file_options(
        command, inputs="latents (.npy, .safetensors)", output="an image, a folder of PNG, or - for standard output"
    )
    add_vae_options(command)


def run(options: argparse.Namespace) -> Answer:
    """Decode."""
    return piped(_decode, ".png")(options)


def _decode(options: argparse.Namespace) -> Answer:
    from milo_latent.files import LATENT_SUFFIXES
    from milo_latent.jobs import find_jobs
    from milo_latent.latents.files import decode_files

    jobs = find_jobs(
        options.inputs, options.output, suffixes=LATENT_SUFFIXES, suffix=".png", recursive=options.recursive,
        existing=options.existing,
    )  # fmt: skip
    how = {"vae_name": options.model, "tile": options.tile, "progress": not options.quiet}
    report = decode_files(open_vae(options), jobs, **how) if jobs.results else jobs.idle
    return tell_report(report, jobs, options, head="decode", unit="latents", told="{0[0]}x{0[1]}".format)
