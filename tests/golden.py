"""What the tests against the official code's results share: its recorded values, and its tiny random networks.

The values lie in `data/`; `data/make_golden.py` says where they come from.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from milo_latent import DiffBIRPipeline
from milo_latent.convert.networks import find_network
from milo_latent.diffbir.schedulers import official_scheduler

DATA = Path(__file__).resolve().parent / "data"
HEADS = {"attention_head_dim": (4, 8, 4, 4)}
CLEANERS = {
    "swinir": {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3)},
    "scunet": {"dim": 32, "blocks": (0, 2, 1, 0, 1, 2, 0)},
    "bsrnet": {"channels": 16, "blocks": 2, "growth": 8},
}
PREDICTION = {"eps": "epsilon", "v_zsnr": "v_prediction"}


class Random(NamedTuple):
    """How the official tiny networks got their weights: a seed, and a factor for the layers that end them."""

    seed: int
    factors: dict[str, float]
    half: bool = False  # rounded to float16, and used so


NETWORKS = {
    "unet": Random(1000, {}),
    "controlnet": Random(1001, {}),
    "vae": Random(1002, {"decoder.conv_out.weight": 0.5, "quant_conv.weight": 8.0}, half=True),
    "swinir": Random(2000, {"conv_last.weight": 0.4}),
    "scunet": Random(2100, {"m_tail.0.weight": 0.02}, half=True),
    "bsrnet": Random(2200, {"conv_last.weight": 0.2}),
}


def golden(name):
    """Return recorded values of the official code, by their names."""
    return load_file(DATA / f"{name}.safetensors")


def table(name):
    """Return a recorded table."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def official_shapes(network):
    """Return tensors without values, of the official full-size network's names and shapes."""
    return {key: torch.empty(shape, device="meta") for key, shape in table("official_shapes")[network].items()}


@functools.cache
def official_weights(network):
    """Draw the weights of an official tiny network again, which the recorded results belong to.

    The tensors are drawn in the order of their names by one generator. Another processor may differ in the last bit.
    """
    random, shapes = NETWORKS[network], table("tiny_shapes")[network]
    generator, weights = torch.Generator().manual_seed(random.seed), {}
    for key, shape in sorted(shapes.items()):
        normal = torch.randn(shape, generator=generator)
        if "relative_position" in key:
            drawn = 0.5 * normal
        elif len(shape) > 1:
            drawn = normal / math.sqrt(math.prod(shape[1:]))
        elif key.endswith(".weight"):  # of a normalization
            drawn = 1 + 0.1 * normal
        else:
            of_norm = len(shapes.get(key.removesuffix("bias") + "weight", "matrix")) == 1
            drawn = (0.1 if of_norm else 0.05) * normal
        drawn = drawn * random.factors.get(key, 1.0)
        weights[key] = drawn.half().float() if random.half else drawn
    if network == "bsrnet":
        weights["conv_last.bias"] = torch.full((3,), 0.5)
    return weights


def relative(result, expected):
    """The largest difference, over the largest absolute value."""
    assert result.shape == expected.shape
    return ((result - expected).abs().max() / expected.abs().max()).item()


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def numbered(tensors, prefix):
    """The tensors prefix0, prefix1, ... in their order."""
    return [tensors[f"{prefix}{index}"] for index in range(sum(key.startswith(prefix) for key in tensors))]


def tiny_networks():
    return {
        "unet": find_network("UNet", official_weights("unet"), HEADS).load(),
        "controlnet": find_network("IRControlNet", official_weights("controlnet"), HEADS).load(),
        "vae": find_network("VAE", official_weights("vae")).load(),
    }


def scheduler_for(parameterization, sampler="spaced"):
    return official_scheduler(
        sampler, prediction_type=PREDICTION[parameterization], rescale_betas_zero_snr=parameterization == "v_zsnr"
    )


def golden_pipeline(networks, parameterization, sampler="spaced", cleaner=None):
    pipeline = DiffBIRPipeline(**networks, scheduler=scheduler_for(parameterization, sampler), cleaner=cleaner)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_cleaner(cleaner):
    """Return an official tiny cleaner, by its class."""
    name = cleaner.__name__.lower()
    return find_network(cleaner.__name__, official_weights(name), CLEANERS[name]).load().requires_grad_(False)
