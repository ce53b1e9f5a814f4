"""`milo-latent encode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from milo_latent.cli.common import add_vae_options, hide_loading_bar


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "encode",
        help="encode photos into latents",
        description="Encode a photo, or a folder of them, into latents. What is in OUT already is left alone if it was "
        "made of the same files and weights.",
    )
    command.set_defaults(run=run)
    command.add_argument("input", type=Path, metavar="IN", help="photo, or folder of photos")
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help=".npy, .safetensors, or folder"
    )
    add_vae_options(command)
    command.add_argument(
        "--format",
        choices=["npy", "safetensors"],
        default="safetensors",
        help="of a folder's files (default: safetensors)",
    )


def run(options: argparse.Namespace) -> str:
    """Encode; return the line to print."""
    from milo_latent.latents.files import encode_file, encode_folder, load_vae

    hide_loading_bar()
    vae, how = load_vae(options.model), {"vae_name": options.model, "tile": options.tile}
    if options.input.is_dir():
        count, skipped = encode_folder(vae, options.input, options.output, suffix=options.format, **how)
        return f"encode: {count} photos of {options.input} -> {options.output} ({skipped} were there already)"
    shape = encode_file(vae, options.input, options.output, **how)
    return f"encode: {options.input} -> {options.output} {shape}"
