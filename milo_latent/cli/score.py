"""`milo-latent score`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from milo_latent.cli.loading import hide_loading_bar


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "score",
        help="score the visible difference of images or latents",
        description="Print MILO's raw error (unbounded) and quality score (towards 1 = worst); 0 = identical. "
        "Two files, one against a folder, or two folders matched by name.",
    )
    command.set_defaults(run=run)
    command.add_argument("--ref", type=Path, required=True, help="image, or latents (.npy, .safetensors), or folder")
    command.add_argument("--dist", type=Path, required=True, help="the same, distorted")
    command.add_argument(
        "--weights", metavar="NAME|FOLDER|FILE", help="shipped weights, a folder, or an official .pth (latents: nano)"
    )
    command.add_argument("--vae", metavar="NAME|FOLDER", help="score images as latents of this model's VAE")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write a table; an interrupted one is gone on with")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--map", type=Path, metavar="OUT", help="write a picture of where the difference is (one pair)"
    )
    command.add_argument("--overlay", type=Path, metavar="IMAGE", help="lay the map over this image")


def run(options: argparse.Namespace) -> str:
    """Score two files, or the files of folders; return what to print."""
    from tqdm.auto import tqdm

    from milo_latent.metric.network import MILO
    from milo_latent.scoring import ScoreTable, match_pairs, rows_to_json, score_pairs

    pairs = match_pairs(options.ref, options.dist)
    weights, encode = _score_inputs(options, pairs)
    metric = MILO.from_pretrained(weights)
    if options.map is not None:
        _write_map(metric, pairs, encode, options)
    table = ScoreTable(options.csv, key=f"{weights} {options.vae or ''}") if options.csv else None
    left = [pair for pair in pairs if table is None or pair.name not in table.rows]
    scored = score_pairs(metric, left, encode=encode)
    rows = list(tqdm(scored, total=len(left), unit="pair", disable=len(left) < 2)) if table is None else []
    if table is not None:
        table.extend(tqdm(scored, total=len(left), unit="pair", disable=len(left) < 2))
        rows = table.finish(pair.name for pair in pairs)
    if options.json:
        return rows_to_json(rows)
    name = "MILO_I" if metric.config.latent_space is None and metric.config.channels == 3 else "MILO_L"
    lines = [f"{row.name}: raw error {row.score:.10f}, quality {row.quality:.10f}" for row in rows]
    return "\n".join([*lines, f"{name} ({weights}), 0 = identical; quality 1 = worst"])


def _score_inputs(options: argparse.Namespace, pairs: list[Any]) -> tuple[str, Any]:
    """Return the weights to score with, and what encodes images, where they are to be scored as latents."""
    from milo_latent.scoring import is_latents

    kinds = {is_latents(path) for pair in pairs for path in (pair.ref, pair.dist)}
    if len(kinds) > 1:
        raise ValueError(
            f"Expected two images or two latent files, got both kinds in {options.ref} and {options.dist}."
        )
    if options.vae is not None:
        if kinds == {True}:
            raise ValueError("Expected images with --vae, got latents. Leave --vae out.")
        from functools import partial

        from milo_latent.codec import encode_image
        from milo_latent.restore import load_restorer

        hide_loading_bar()
        return options.weights or options.vae, partial(encode_image, load_restorer(options.vae).pipeline.vae)
    if options.weights is None and kinds == {False}:
        raise ValueError(
            "Scoring images needs MILO_I weights: pass --weights with the official MILO.pth, or --vae nano."
        )
    return options.weights or "nano", None


def _write_map(metric: Any, pairs: list[Any], encode: Any, options: argparse.Namespace) -> None:
    import torch

    from milo_latent.files import read_image, write_image
    from milo_latent.metric.visualize import colour_error_map
    from milo_latent.scoring import read_input

    if len(pairs) != 1:
        raise ValueError(f"Expected one pair for --map, got {len(pairs)}.")
    ref, dist = (read_input(path, encode) for path in (pairs[0].ref, pairs[0].dist))
    with torch.inference_mode():
        error_map = metric.compare(ref=ref, dist=dist).error_map
    image = read_image(options.overlay) if options.overlay else None
    write_image(options.map, colour_error_map(error_map, image=image))
