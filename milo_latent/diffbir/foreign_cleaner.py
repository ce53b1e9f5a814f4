"""Any image model that the library spandrel opens (ESRGAN, SwinIR, HAT, DAT and dozens more) as a cleaner."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from milo_latent.checkpoints import check_archive
from milo_latent.extras import import_extra
from milo_latent.structure import refusing_damage


class ForeignCleaner(nn.Module):
    """A model of another library, with a cleaner's interface.

    Args:
        network: the model itself, whose parameters move with this module.
        call: from one image, (1, 3, H, W) in [0, 1], to one of (1, 3, scale * H, scale * W), padded as `network` needs.
        scale: how many times larger the result is than the image.
    """

    def __init__(self, network: nn.Module, call: Callable[[Tensor], Tensor], *, scale: int) -> None:
        super().__init__()
        self.network, self.scale = network, scale
        self._call = call

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def forward(self, image: Tensor) -> Tensor:
        """Clean (B, 3, H, W), in [0, 1], image by image, since not every model takes a batch."""
        return torch.cat([self._call(each[None]) for each in image])


def load_upscaler(path: str | Path) -> ForeignCleaner:
    """Open a model file of any architecture that spandrel knows, as a cleaner.

    Args:
        path: `.pth`, `.pt`, `.ckpt` or `.safetensors`; the architecture is found from its keys.

    Returns:
        The cleaner, in evaluation mode, on the CPU.

    Raises:
        ImportError: if spandrel is not installed, with the command that installs it.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds no model from RGB images to RGB images.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a model file, got {path}, which does not exist.")
    check_archive(path)
    spandrel = import_extra("spandrel", "upscalers", "Opening upscalers")
    with suppress(ImportError):  # Restormer and others, whose licenses are not open
        importlib.import_module("spandrel_extra_arches").install(ignore_duplicates=True)
    with refusing_damage(f"Expected a model that spandrel knows, got {path}"):
        model = spandrel.ModelLoader(device="cpu").load_from_file(path)
    name = model.architecture.name
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise ValueError(f"Expected a model from image to image, got {path}, {name}, which needs more than an image.")
    if (model.input_channels, model.output_channels) != (3, 3):
        raise ValueError(
            f"Expected a model from RGB to RGB, got {path}, {name}, with {model.input_channels} channels in and "
            f"{model.output_channels} out."
        )
    network = model.model.eval().requires_grad_(False)
    return ForeignCleaner(network, model, scale=model.scale).eval()
