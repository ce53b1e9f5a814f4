"""Record what DiffBIR's official training code computes: loss, gradients and weights, for `training.safetensors`.

    python tests/data/record_training.py --diffbir FOLDER    # a checkout of XPixelGroup/DiffBIR, commit 3f8b530

The official networks of the tiny configuration get the weights of `tests/golden.py` and 20 batches of random latents,
drawn as `batch` does; `Diffusion.p_losses` is their loss and AdamW (learning rate 1e-4) the optimizer. Everything runs
in float64, for which two places of the official code that go through float32 are replaced while it runs. Of each tensor
its first, middle and last value, its mean and its norm are kept, by our names.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from golden import HEADS, official_weights, table
from test_denoising_loss import BATCHES, CASES, batch, rows

from milo_latent.convert.networks import find_network

KINDS = {"controlnet": "IRControlNet", "unet": "UNet"}


def open_official(folder):
    """Return the modules of the official code that training needs, without what its packages import besides."""
    for name in ("diffbir", "diffbir.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    names = ("config", "util", "unet", "controlnet", "gaussian_diffusion")
    modules = {name: importlib.import_module(f"diffbir.model.{name}") for name in names}
    embed = modules["util"].timestep_embedding
    for name in ("util", "unet", "controlnet"):
        modules[name].timestep_embedding = lambda *args, **options: embed(*args, **options).double()
    modules["util"].GroupNorm32.forward = torch.nn.GroupNorm.forward
    return types.SimpleNamespace(**modules)


class ControlledModel(torch.nn.Module):
    """Both networks, called as the official model calls them."""

    def __init__(self, official):
        super().__init__()
        sizes = table("official_facts")["tiny_configs"]
        self.unet = official.controlnet.ControlledUnetModel(**sizes["unet"])
        self.controlnet = official.controlnet.ControlNet(**sizes["controlnet"])
        for name in KINDS:
            network = getattr(self, name)
            network.load_state_dict(official_weights(name))
            network.double()
            network.dtype = torch.float64

    def forward(self, noisy, timestep, condition):
        control = self.controlnet(x=noisy, hint=condition["c_img"], timesteps=timestep, context=condition["c_txt"])
        return self.unet(
            x=noisy, timesteps=timestep, context=condition["c_txt"], control=list(control), only_mid_control=False
        )


def by_our_names(name, tensors):
    return rows(find_network(KINDS[name], tensors, HEADS).tensors).float()


def record(official, parameterization, names):
    """Train for `BATCHES` steps; return what is kept."""
    diffusion = official.gaussian_diffusion.Diffusion(
        **table("official_facts")["tiny_configs"]["diffusion"][parameterization]
    )
    model, kept, losses = ControlledModel(official), {}, []
    model.requires_grad_(False)
    networks = {name: getattr(model, name).requires_grad_(True) for name in names}
    optimizer = torch.optim.AdamW([each for network in networks.values() for each in network.parameters()], lr=1e-4)
    for number in range(BATCHES):
        drawn = batch(number)
        condition = {"c_img": drawn["condition"], "c_txt": drawn["context"]}
        with mock.patch("torch.randn_like", lambda _, noise=drawn["noise"]: noise):
            loss = diffusion.p_losses(model, drawn["latents"], drawn["timestep"], condition)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if number == 0:
            for name, network in networks.items():
                gradients = {key: each.grad.clone() for key, each in network.named_parameters()}
                kept[f"{parameterization}.gradient.{name}"] = by_our_names(name, gradients)
        optimizer.step()
    for name, network in networks.items():
        kept[f"{parameterization}.weights.{name}"] = by_our_names(name, network.state_dict())
    return kept | {f"{parameterization}.losses": torch.tensor(losses, dtype=torch.float64)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffbir", type=Path, required=True)
    official, kept = open_official(parser.parse_args().diffbir), {}
    for parameterization, names in CASES.items():
        kept |= record(official, parameterization, names)
    save_file(kept, Path(__file__).with_name("training.safetensors"))


if __name__ == "__main__":
    main()
