"""Images as pipelines are given them and return them, and what is said when memory runs out; pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from milo_latent.inputs import Images, images_to_tensor
from milo_latent.pictures import to_8bit

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ROUNDING = 0.01  # by which resampled images may leave [0, 1]


def degraded_images(image: Images | None) -> Tensor:
    """Return what is to be restored as `images_to_tensor` does, in float32 and with its values checked.

    Raises:
        ValueError: for None, and for values that are not finite or not in [0, 1].
    """
    if image is None:
        raise ValueError("Expected `image`, got None. DiffBIR restores an image; it does not make one from a prompt.")
    tensor = images_to_tensor(image).float()
    if not torch.isfinite(tensor).all():
        raise ValueError("Expected finite image values in [0, 1], got NaN or infinity.")
    low, high = tensor.min().item(), tensor.max().item()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"Expected image values in [0, 1], got [{low:g}, {high:g}]. Divide by 255?")
    return tensor.clamp(0, 1)


def to_output(images: Tensor, output_type: str) -> Tensor | np.ndarray | list[PIL.Image.Image]:
    """Return images, (B, 3, H, W) in [0, 1], as "pt", as "np", (B, H, W, 3) float32, or as "pil", rounded to 8 bit."""
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(to_8bit(image)) for image in images]


@contextmanager
def explained_memory() -> Iterator[None]:
    """Raise MemoryError, which names the ways out, where a device has not enough memory inside this block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(
                "Not enough memory for an image of this size. Restore it in tiles: `pipe.enable_tiling(512)`, or "
                "`milo-latent restore --tile 512`; smaller tiles need less. `pipe.enable_model_cpu_offload()` keeps "
                "only one network on the accelerator."
            ) from error
        raise
