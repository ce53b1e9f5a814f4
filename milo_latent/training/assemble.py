"""Join trained parts into one pipeline folder, in half precision; UNet and IRControlNet may still be untrained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

from milo_latent.atomic import write_text
from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.programs import run_program
from milo_latent.resources import sha256

SHAPE = {  # of UNet and IRControlNet alike, whose features are added; they attend to nothing and take no prompt
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "norm_num_groups": 16,
    "attention_head_dim": 64,
    "cross_attention_dim": 32,
}


def nano_scheduler() -> DDIMScheduler:
    """Return the noise schedule of the embedded models: v-prediction and zero terminal SNR, as DiffBIR v2.1's.

    It starts from pure noise in training as in sampling, so that one step and twenty both work.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def nano_unet(channels: int = 4) -> UNet2DConditionModel:
    """Return an untrained UNet of the size of the embedded one, for latents of so many channels."""
    up_blocks = ("UpBlock2D",) * 3
    return UNet2DConditionModel(**SHAPE, in_channels=channels, out_channels=channels, up_block_types=up_blocks)


def nano_controlnet(channels: int = 4) -> IRControlNet:
    """Return an untrained IRControlNet that fits `nano_unet`."""
    return IRControlNet(**SHAPE, in_channels=channels, conditioning_channels=channels)


def assemble(vae: Path, cleaner: Path, metric: Path, output: Path, restorer: Path | None = None) -> None:
    """Write a pipeline folder from those of its parts.

    Args:
        vae: autoencoder.
        cleaner: first stage.
        metric: MILO_L for the autoencoder's latents.
        output: the folder to write.
        restorer: trained pipeline, whose UNet, IRControlNet and scheduler are taken; None takes untrained ones, which
            `train_restorer --train all` then trains.
    """
    safe = {"use_safetensors": True}
    autoencoder = AutoencoderTiny.from_pretrained(vae, **safe)
    channels = autoencoder.config.latent_channels
    pipeline = DiffBIRPipeline(
        vae=autoencoder,
        unet=UNet2DConditionModel.from_pretrained(restorer / "unet", **safe) if restorer else nano_unet(channels),
        controlnet=(
            IRControlNet.from_pretrained(restorer / "controlnet", **safe) if restorer else nano_controlnet(channels)
        ),
        scheduler=DDIMScheduler.from_pretrained(restorer / "scheduler") if restorer else nano_scheduler(),
        cleaner=ResidualCleaner.from_pretrained(cleaner, **safe),
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
    for name in ("vae", "cleaner", "metric", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--restorer", type=Path, help="trained pipeline (default: untrained UNet and IRControlNet)")
    parser.add_argument("--seed", type=int, default=0, help="of untrained networks")
    options = parser.parse_args(arguments)
    torch.manual_seed(vars(options).pop("seed"))
    assemble(**vars(options))
    print(card_rows(options.output))


if __name__ == "__main__":
    sys.exit(run_program(main))
