"""`milo-latent weights`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "weights", help="list, fetch, convert and describe weights", description="Manage weights."
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the sets at hand, and those that can be pulled")
    listing.set_defaults(run=run_list)
    pull = actions.add_parser("pull", help="fetch an official checkpoint, check it, convert it to safetensors")
    pull.set_defaults(run=run_pull)
    pull.add_argument("name", help="from the list")
    convert = actions.add_parser("convert", help="convert an official .pth that you have")
    convert.set_defaults(run=run_convert)
    convert.add_argument("input", type=Path, metavar="FILE", help="MILO.pth or MILO_latent.pth")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    convert.add_argument("--unofficial", action="store_true", help="take a file whose hash is not an official one's")
    info = actions.add_parser("info", help="what a set is, and whether its files are those of its card")
    info.set_defaults(run=run_info)
    info.add_argument("source", metavar="NAME|FOLDER|FILE")


def run_list(options: argparse.Namespace) -> str:
    """Return the list to print."""
    from milo_latent.convert.official import OFFICIAL
    from milo_latent.resources import available_weights, weights_dir

    at_hand = [f"{name}  {weights_dir(name)}" for name in available_weights()]
    others = [f"{name}  not here; pull {name}" for name in OFFICIAL if name not in available_weights()]
    return "\n".join([*at_hand, *others])


def run_pull(options: argparse.Namespace) -> str:
    """Fetch; return the line to print."""
    from milo_latent.convert.official import pull

    return f"pull: {options.name} -> {pull(options.name)}"


def run_convert(options: argparse.Namespace) -> str:
    """Convert; return the line to print."""
    from milo_latent.convert.official import convert

    folder = convert(options.input, options.output, official=not options.unofficial)
    return f"convert: {options.input} -> {folder}"


def run_info(options: argparse.Namespace) -> str:
    """Return the description to print."""
    from milo_latent.convert.official import describe

    return describe(options.source)
