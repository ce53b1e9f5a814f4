"""Join trained parts into one pipeline folder, in half precision."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.files import write_text
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.programs import run_program
from milo_latent.resources import sha256


def assemble(vae: Path, cleaner: Path, restorer: Path, metric: Path, output: Path) -> None:
    """Write a pipeline folder from those of its parts; `restorer` holds `unet`, `controlnet` and `scheduler`."""
    pipeline = DiffBIRPipeline(
        vae=AutoencoderTiny.from_pretrained(vae),
        unet=UNet2DConditionModel.from_pretrained(restorer / "unet"),
        controlnet=IRControlNet.from_pretrained(restorer / "controlnet"),
        scheduler=DDIMScheduler.from_pretrained(restorer / "scheduler"),
        cleaner=ResidualCleaner.from_pretrained(cleaner),
        metric=MILO.from_pretrained(metric),
    )
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    # AutoencoderTiny adds this value to its configuration, and then warns about it whenever it is loaded
    config = json.loads((output / "vae" / "config.json").read_text())
    config.pop("block_out_channels", None)
    for path in output.rglob("config.json"):
        part = config if path.parent.name == "vae" else json.loads(path.read_text())
        part.pop("_name_or_path", None)  # a path on the machine that trained it
        write_text(path, json.dumps(part, indent=2, sort_keys=True) + "\n")


def card_rows(folder: Path) -> str:
    """Return the rows of the model card's table of files: path, size and SHA-256 of all weights in `folder`."""
    rows = []
    for path in sorted(folder.rglob("*.safetensors")):
        rows.append(f"| `{path.relative_to(folder)}` | {path.stat().st_size / 1e6:.2f} MB | `{sha256(path)}` |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Assemble a pipeline, and print the table of files of its model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("vae", "cleaner", "restorer", "metric", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    assemble(**vars(options))
    print(card_rows(options.output))


if __name__ == "__main__":
    sys.exit(run_program(main))
