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
    listing = actions.add_parser("list", help="the shipped sets and the official weights")
    listing.set_defaults(run=run_list)
    pull = actions.add_parser("pull", help="fetch official weights into the cache and check them")
    pull.set_defaults(run=run_pull)
    pull.add_argument("name", help="official-image or official-latent")
    convert = actions.add_parser("convert", help="convert an official .pth to safetensors")
    convert.set_defaults(run=run_convert)
    convert.add_argument("input", type=Path, metavar="FILE", help="MILO.pth or MILO_latent.pth")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    convert.add_argument("--unofficial", action="store_true", help="convert a file whose hash is not an official one's")
    info = actions.add_parser("info", help="describe weights, and check their files against their card")
    info.set_defaults(run=run_info)
    info.add_argument("source", metavar="NAME|FOLDER|FILE")


def run_list(options: argparse.Namespace) -> str:
    """Return the list to print."""
    from milo_latent.metric.loading import OFFICIAL
    from milo_latent.resources import available_weights, weights_dir

    lines = [f"{name}  {weights_dir(name)}" for name in available_weights()]
    for name, file in OFFICIAL.items():
        lines.append(f"{name}  {file.path if file.is_at(file.path) else 'not in the cache; fetched at its first use'}")
    return "\n".join(lines)


def run_pull(options: argparse.Namespace) -> str:
    """Fetch; return the line to print."""
    from milo_latent.metric.loading import fetch_official

    return f"pull: {options.name} -> {fetch_official(options.name)}"


def run_convert(options: argparse.Namespace) -> str:
    """Convert; return the line to print."""
    from milo_latent.convert.official import convert

    folder = convert(options.input, options.output, official=not options.unofficial)
    return f"convert: {options.input} -> {folder}"


def run_info(options: argparse.Namespace) -> str:
    """Return the description to print."""
    from milo_latent.convert.official import describe

    return describe(options.source)
