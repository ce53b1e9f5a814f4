"""`milo-latent weights`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from milo_latent.cli.common import Answer, add_answer_options, add_command

OFFICIAL_PURPOSE = {
    "official-image": "The official MILO_I, which scores images.",
    "official-latent": "The official MILO_L, which scores latents of Stable Diffusion 1.x and 2.x.",
}
FIRST_SENTENCE = re.compile(r"^# .*?\n\n(.*?\.)\s", re.DOTALL | re.MULTILINE)  # of a card


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "weights", help="list, fetch, convert and describe weights", description="Manage weights."
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = add_command(
        actions, "list", "weights list", "weights list --json",
        help="the shipped sets and the official weights, and what each is for",
    )  # fmt: skip
    listing.set_defaults(run=run_list)
    pull = add_command(
        actions, "pull", "weights pull official-image", "weights pull official-latent",
        help="fetch official weights into the cache and check them",
    )  # fmt: skip
    pull.set_defaults(run=run_pull)
    pull.add_argument("name", help="official-image or official-latent")
    convert = add_command(
        actions, "convert", "weights convert MILO.pth -o folder", "weights convert mine.pth -o folder --unofficial",
        help="convert an official .pth to safetensors",
    )  # fmt: skip
    convert.set_defaults(run=run_convert)
    convert.add_argument("input", type=Path, metavar="FILE", help="MILO.pth or MILO_latent.pth")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    convert.add_argument("--unofficial", action="store_true", help="convert a file whose hash is not an official one's")
    info = add_command(
        actions, "info", "weights info nano", "weights info MILO_latent.pth",
        help="describe weights, and check their files against their card",
    )  # fmt: skip
    info.set_defaults(run=run_info)
    info.add_argument("source", metavar="NAME|FOLDER|FILE")
    for action in (listing, pull, convert, info):
        add_answer_options(action)


def run_list(options: argparse.Namespace) -> Answer:
    """List."""
    from milo_latent.metric.loading import OFFICIAL
    from milo_latent.resources import available_weights, weights_dir

    sets: list[dict[str, str | None]] = []
    for name in available_weights():
        found = FIRST_SENTENCE.search((weights_dir(name) / "README.md").read_text(encoding="utf-8"))
        purpose = " ".join(found[1].split()) if found else ""
        sets.append({"name": name, "purpose": purpose, "path": str(weights_dir(name))})
    for name, file in OFFICIAL.items():
        path = str(file.path) if file.is_at(file.path) else None
        sets.append({"name": name, "purpose": OFFICIAL_PURPOSE[name], "path": path})
    lines = ["{name}  {purpose}\n  {path}".format(**each) for each in sets]
    text = "\n".join(lines).replace("  None", "  not in the cache; fetched at its first use")
    return Answer(text, more={"weights": sets})


def run_pull(options: argparse.Namespace) -> Answer:
    """Fetch."""
    from milo_latent.metric.loading import fetch_official

    path = fetch_official(options.name)
    return Answer(f"pull: {options.name} -> {path}", outputs=[path])


def run_convert(options: argparse.Namespace) -> Answer:
    """Convert."""
    from milo_latent.convert.official import convert

    folder = convert(options.input, options.output, official=not options.unofficial)
    return Answer(f"convert: {options.input} -> {folder}", inputs=[options.input], outputs=[folder])


def run_info(options: argparse.Namespace) -> Answer:
    """Describe."""
    from milo_latent.convert.official import describe

    text = describe(options.source)
    return Answer(text, inputs=[options.source], more={"description": text.splitlines()})
