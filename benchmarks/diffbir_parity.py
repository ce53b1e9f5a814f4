"""Table of converted networks against the official code's own, with fresh random weights and inputs.

    python benchmarks/diffbir_parity.py --official CHECKOUT [--full] [--seed N]

CHECKOUT is the repository XPixelGroup/DiffBIR; its code runs on the CPU and needs `pip install einops ftfy regex`.
`--full` takes the real sizes (8 GB of memory, minutes); otherwise networks of the same keys are a fifth as wide.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from milo_latent.convert.mapping import select
from milo_latent.convert.networks import find_network
from milo_latent.convert.tokenizer import open_tokenizer
from milo_latent.diffbir.prompts import PROMPT_TOKENS, prompt_tokens

LIMIT = 1e-5
TEXTS = (*PROMPT_TOKENS, "Naïve CAFÉ, 12345 people & 東京 don't  stop <b>", "word " * 100)


def import_official(checkout: Path) -> Any:
    """Return the official package `diffbir.model`; the little it needs of timm and omegaconf is put in their place."""
    layers: Any = types.ModuleType("timm.models.layers")
    layers.trunc_normal_, layers.DropPath = nn.init.trunc_normal_, nn.Identity
    layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)
    sys.modules |= {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models")}
    sys.modules["timm.models.layers"] = layers
    lists: Any = types.ModuleType("omegaconf.listconfig")
    lists.ListConfig = tuple  # only asked for: whether a value is one
    sys.modules |= {"omegaconf": types.ModuleType("omegaconf"), "omegaconf.listconfig": lists}
    sys.path.insert(0, str(checkout))
    import diffbir.model  # type: ignore[import-not-found]

    return diffbir.model


def official_configs(checkout: Path, *, full: bool) -> dict[str, dict]:
    """Return the arguments of the official networks, from its own file; narrower unless `full`."""
    configs = yaml.safe_load((checkout / "configs" / "inference" / "cldm.yaml").read_text())["params"]
    if not full:
        for name in ("unet_cfg", "controlnet_cfg"):
            configs[name] |= {"model_channels": 64, "context_dim": 128}
        configs["vae_cfg"]["ddconfig"] |= {"ch": 32}
        configs["clip_cfg"] |= {"embed_dim": 128}
        configs["clip_cfg"]["text_cfg"] |= {"width": 128, "heads": 2, "layers": 4}
    for name in ("unet_cfg", "controlnet_cfg"):
        configs[name]["use_checkpoint"] = False
    return configs


def fill(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every parameter values that keep the scale of what passes, layers that begin at zero too."""
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = values / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
    return network.eval().requires_grad_(False)


def report(name: str, theirs: Any, ours: Any) -> bool:
    """Run both, print a row, and return whether they agree."""
    results, seconds = [], []
    for run in (theirs, ours):
        began = time.perf_counter()
        results.append(run())
        seconds.append(time.perf_counter() - began)
    pairs = list(zip(*results, strict=True))
    worst = max(((mine - other).abs().max() / other.abs().max()).item() for other, mine in pairs)
    print(f"| {name} | {len(pairs)} | {worst:.1e} | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)
    return worst < LIMIT


def check_diffusion(official: Any, configs: dict[str, dict], generator: torch.Generator) -> list[bool]:
    """Compare IRControlNet and UNet."""
    unet = fill(official.ControlledUnetModel(**configs["unet_cfg"]), generator)
    controlnet = fill(official.ControlNet(**configs["controlnet_cfg"]), generator)
    our_unet, our_controlnet = (
        find_network("UNet", unet.state_dict()).load(),
        find_network("IRControlNet", controlnet.state_dict()).load(),
    )
    latents, hint = torch.randn(2, 2, 4, 16, 24, generator=generator).unbind()
    context = torch.randn(2, 77, configs["unet_cfg"]["context_dim"], generator=generator)
    timesteps = torch.tensor([999, 333])
    given = {"x": latents, "hint": hint, "timesteps": timesteps, "context": context}
    residuals = controlnet(**given)

    def run_controlnet() -> list[Tensor]:
        down, middle = our_controlnet(latents, timesteps, context, controlnet_cond=hint, return_dict=False)
        return [*down, middle]

    def run_unet() -> list[Tensor]:
        added = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
        return [our_unet(latents, timesteps, context, **added).sample]

    return [
        report("IRControlNet", lambda: controlnet(**given), run_controlnet),
        report("UNet", lambda: [unet(latents, timesteps, context, control=list(residuals))], run_unet),
    ]


def check_vae(official: Any, configs: dict[str, dict], generator: torch.Generator) -> list[bool]:
    """Compare the VAE's two halves."""
    vae = fill(official.AutoencoderKL(**configs["vae_cfg"]), generator)
    ours = find_network("VAE", vae.state_dict()).load()
    image, latents = torch.rand(1, 3, 64, 96, generator=generator), torch.randn(1, 4, 8, 12, generator=generator)
    return [
        report("VAE encoder", lambda: [vae.encode(image).mode()], lambda: [ours.encode(image).latent_dist.mode()]),
        report("VAE decoder", lambda: [vae.decode(latents)], lambda: [ours.decode(latents).sample]),
    ]


def check_text(official: Any, configs: dict[str, dict], checkout: Path, generator: torch.Generator) -> list[bool]:
    """Compare tokens and text encoder."""
    from diffbir.model.clip import tokenize  # type: ignore[import-not-found]

    encoder = fill(official.FrozenOpenCLIPEmbedder(**configs["clip_cfg"]), generator)
    ours = find_network("text encoder", select(encoder.state_dict(), "model.")).load()
    vocabulary = next(checkout.rglob("bpe_simple_vocab_16e6.txt.gz"))
    tokenizer = open_tokenizer(vocabulary)
    tokens = tokenize(list(TEXTS))
    our_tokens = tokenizer(list(TEXTS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    stored = prompt_tokens()
    return [
        report("tokens", lambda: [tokens.float()], lambda: [our_tokens.float()]),
        report("tokens kept for default prompts", lambda: [tokens[: len(stored)].float()], lambda: [stored.float()]),
        report("text encoder", lambda: [encoder(tokens)], lambda: [ours(tokens)[0]]),
    ]


def check_cleaners(official: Any, checkout: Path, generator: torch.Generator) -> list[bool]:
    """Compare the three cleaners, full-size."""
    passed = []
    for kind, make in (("SwinIR", official.SwinIR), ("SCUNet", official.SCUNet), ("BSRNet", official.RRDBNet)):
        config = yaml.safe_load((checkout / "configs" / "inference" / f"{kind.lower()}.yaml").read_text())["params"]
        with contextlib.redirect_stdout(io.StringIO()):  # the official networks print while they are made
            network = fill(make(**config), generator)
        ours = find_network(kind, network.state_dict()).load()  # type: ignore[arg-type]
        image = torch.rand(1, 3, 64, 64, generator=generator)
        passed.append(report(kind, lambda net=network, x=image: [net(x)], lambda net=ours, x=image: [net(x)]))
    return passed


@torch.no_grad()
def main() -> None:
    """Print the table; exit with 1 if a network differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    checkout, generator = options.official, torch.Generator().manual_seed(options.seed)
    official, configs = import_official(checkout), official_configs(checkout, full=options.full)
    print("| network | outputs | largest relative difference | official, s | ours, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    passed = check_diffusion(official, configs, generator) + check_vae(official, configs, generator)
    passed += check_text(official, configs, checkout, generator) + check_cleaners(official, checkout, generator)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
