"""`milo-latent decode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from milo_latent.cli.common import add_vae_options, hide_loading_bar


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "decode",
        help="decode latents into photos",
        description="Decode latents, or a folder of them. Files that tell the photo's size give that size back.",
    )
    command.set_defaults(run=run)
    command.add_argument("input", type=Path, metavar="IN", help="latents (.npy, .safetensors), or folder of them")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="image, or folder")
    add_vae_options(command)


def run(options: argparse.Namespace) -> str:
    """Decode; return the line to print."""
    from milo_latent.latents.files import decode_file, decode_folder, load_vae

    hide_loading_bar()
    vae = load_vae(options.model)
    if options.input.is_dir():
        count, skipped = decode_folder(vae, options.input, options.output, tile=options.tile)
        return f"decode: {count} latents of {options.input} -> {options.output} ({skipped} were there already)"
    width, height = decode_file(vae, options.input, options.output, tile=options.tile)
    return f"decode: {options.input} -> {options.output} ({width}x{height})"
