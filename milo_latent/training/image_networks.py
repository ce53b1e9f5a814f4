"""Image networks by name, for training: our `ResidualCleaner`, and the architectures of the library spandrel."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from milo_latent.atomic import make_readable
from milo_latent.checkpoints import read_checkpoint
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.extras import import_extra
from milo_latent.files import write_safetensors
from milo_latent.structure import open_network, refusing_damage
from milo_latent.training.growing import grow_cleaner

OWN = "ResidualCleaner"
LIBRARIES = ("spandrel", "spandrel_extra_arches")  # the second has Restormer and others under academic licenses
NETWORK_FOLDER, NETWORK_FILE = "network", "network.safetensors"


def build_network(name: str, options: dict[str, Any]) -> nn.Module:
    """Return an untrained network from images to images of the same size.

    Args:
        name: "ResidualCleaner", or an architecture of spandrel such as "NAFNet", "SwinIR", "SCUNet" or "Restormer".
        options: arguments of its class.

    Raises:
        ImportError: where spandrel is not installed, with the command that installs it.
        ValueError: for an unknown name, or options that the network does not take.
    """
    network_class = ResidualCleaner if name == OWN else _spandrel_class(name)
    try:
        return network_class(**options)
    except TypeError as error:
        raise ValueError(f"Expected options of {name}, got {options}: {error}") from error


def _spandrel_class(name: str) -> Any:
    import_extra("spandrel", "upscalers", f"The network {name!r}")
    for library in LIBRARIES:
        try:
            return getattr(importlib.import_module(f"{library}.architectures.{name}"), name)
        except (ImportError, AttributeError):
            continue
    raise ValueError(
        f"Expected {OWN} or an architecture of {' or '.join(LIBRARIES)}, got {name!r}. Names are case-sensitive, such "
        "as NAFNet, SwinIR and SCUNet; Restormer needs `pip install spandrel_extra_arches`."
    )


def load_initial(network: nn.Module, source: Path) -> None:
    """Start from trained weights; a `ResidualCleaner` may start from a smaller one.

    Args:
        network: from `build_network`.
        source: the folder of a `ResidualCleaner`, or a file of the weights of another network.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: for weights of another network.
    """
    if not source.exists():
        raise FileNotFoundError(f"Expected weights to start from, got {source}, which does not exist.")
    if isinstance(network, ResidualCleaner):
        grow_cleaner(open_network(ResidualCleaner, source), network)
        return
    state = read_checkpoint(source)
    with refusing_damage(f"Expected weights of the same network in {source}"):
        network.load_state_dict(state)


def save_network(network: nn.Module, output: Path) -> Path:
    """Write a trained network so that `milo-latent` opens it again as a cleaner, and return where it is.

    A `ResidualCleaner` is a folder of diffusers, any other network a file whose architecture `load_upscaler` finds.
    """
    if isinstance(network, ResidualCleaner):
        folder = output / NETWORK_FOLDER
        network.save_pretrained(folder)
        make_readable(folder)
        return folder
    path = output / NETWORK_FILE
    write_safetensors(path, network.state_dict())
    return path
