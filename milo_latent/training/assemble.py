"""Join trained parts into one pipeline folder, in half precision; UNet and IRControlNet may still be untrained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import nn

from milo_latent.atomic import write_text
from milo_latent.diffbir.fidelity_join import FidelityJoin
from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.diffbir.stages import LAST_STAGES
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.programs import run_program
from milo_latent.resources import find_weights, sha256
from milo_latent.structure import open_network

PARTS = {"vae": AutoencoderTiny, "cleaner": ResidualCleaner, "join": FidelityJoin}  # by the options of the command
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


def read_parts(options: argparse.Namespace) -> dict[str, Any]:
    """Return the components of a pipeline that the options of the command name."""
    parts: dict[str, Any] = {}
    for name, part_class in PARTS.items():
        if getattr(options, name) is not None:
            parts[name] = open_network(part_class, getattr(options, name))
    if options.metric is not None:
        parts["metric"] = MILO.from_pretrained(options.metric)
    if options.restorer is not None:
        parts["unet"] = open_network(UNet2DConditionModel, options.restorer / "unet")
        parts["controlnet"] = open_network(IRControlNet, options.restorer / "controlnet")
        parts["scheduler"] = DDIMScheduler.from_pretrained(options.restorer / "scheduler")
    return parts


def build_pipeline(parts: dict[str, Any], *, model: str | None, default_stage: str | None) -> DiffBIRPipeline:
    """Return a pipeline of these parts; what is missing comes from another pipeline, or is untrained.

    Args:
        parts: components by name.
        model: a pipeline whose other components are taken; None takes an untrained UNet and IRControlNet, which
            `train_restorer --train all` then trains.
        default_stage: `stage` of calls that do not name one; None keeps that of `model`, or takes "all".

    Raises:
        ValueError: for parts that are missing, or a default stage that the pipeline does not have.
    """
    if model is not None:
        pipeline = DiffBIRPipeline.from_pretrained(find_weights(model), **parts)
    elif missing := {"vae", "cleaner", "metric"} - parts.keys():
        raise ValueError(f"Expected {', '.join(f'--{name}' for name in sorted(missing))}, or a --model that has them.")
    else:
        channels = parts["vae"].config.latent_channels
        untrained = {
            "unet": nano_unet(channels), "controlnet": nano_controlnet(channels), "scheduler": nano_scheduler()
        }  # fmt: skip
        pipeline = DiffBIRPipeline(**untrained | parts)
    if default_stage is not None:
        pipeline.register_to_config(default_stage=default_stage)
    pipeline.choose_stage()  # refuses a stage without its network
    return pipeline


def write_pipeline(pipeline: DiffBIRPipeline, output: Path) -> None:
    """Write the folder of a pipeline, without what its parts recall of the machine that trained them."""
    pipeline.to(dtype=torch.float16).save_pretrained(output)
    for path in (*output.rglob("config.json"), output / "model_index.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # a path on the machine that trained it
        if path.parent.name == "vae" and isinstance(pipeline.vae, AutoencoderTiny):
            config.pop("block_out_channels", None)  # which the class adds, and then warns about when it is loaded
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def part_rows(pipeline: DiffBIRPipeline) -> str:
    """Return the rows of the model card's table of parts: name, class and number of parameters of each network."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in networks.items()}
    return "\n".join(f"| `{name}` | `{type(part).__name__}` | {counts[name]:,} |" for name, part in networks.items())


def card_rows(folder: Path) -> str:
    """Return the rows of the model card's table of files: path, size and SHA-256 of all weights in `folder`."""
    rows = []
    for path in sorted(folder.rglob("*.safetensors")):
        rows.append(f"| `{path.relative_to(folder)}` | {path.stat().st_size / 1e6:.2f} MB | `{sha256(path)}` |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Assemble a pipeline, and print the tables of parts and of files of its model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="pipeline whose parts are taken where none is given (default: none)")
    for name in (*PARTS, "metric"):
        parser.add_argument(f"--{name}", type=Path, help="folder of a trained one")
    parser.add_argument("--restorer", type=Path, help="trained pipeline: its UNet, IRControlNet and scheduler")
    parser.add_argument("--default-stage", choices=LAST_STAGES, help="where a restoration ends if nothing else is said")
    parser.add_argument("--seed", type=int, default=0, help="of untrained networks")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    pipeline = build_pipeline(read_parts(options), model=options.model, default_stage=options.default_stage)
    write_pipeline(pipeline, options.output)
    print(f"Default stage: {pipeline.config.default_stage}", part_rows(pipeline), card_rows(options.output), sep="\n\n")


if __name__ == "__main__":
    sys.exit(run_program(main))
