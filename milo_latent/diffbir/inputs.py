"""What a pipeline is given, as one batch of RGB images, and what it refuses; pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Tensor

from milo_latent.checks import check_choice, check_range
from milo_latent.diffbir.colour import COLOR_FIXES
from milo_latent.diffbir.sampling import COMPATIBILITIES, START_POINTS
from milo_latent.pictures import picture_to_array

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ROUNDING = 0.01  # by which resampled images may leave [0, 1]


def images_to_tensor(image: PipelineImageInput | None) -> Tensor:
    """Turn whatever diffusers accepts as images into a batch.

    Args:
        image: PIL image or images of one size, arrays (B, H, W, 3) or tensors (B, 3, H, W) in [0, 1].

    Returns:
        Images, (B, 3, H, W) float32, in [0, 1].

    Raises:
        ValueError: for None, sizes that differ, images that are not RGB, and values not finite or not in [0, 1].
    """
    if image is None:
        raise ValueError("Expected `image`, got None. DiffBIR restores an image; it does not make one from a prompt.")
    if isinstance(image, PIL.Image.Image):
        image = [image]
    if isinstance(image, list) and image and isinstance(image[0], PIL.Image.Image):
        sizes = {entry.size for entry in image}
        if len(sizes) > 1:
            raise ValueError(f"Expected images of one size in a batch, got {sorted(sizes)}. Restore them one by one.")
        image = np.stack([picture_to_array(entry) for entry in image])
    if len(image) == 0 or (isinstance(image, np.ndarray | Tensor) and 0 in image.shape):
        raise ValueError("Expected images of at least one pixel, got none.")
    tensor = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(image).float()
    if tensor.shape[1] != 3:
        raise ValueError(f"Expected RGB images, (B, 3, H, W), got {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise ValueError("Expected finite image values in [0, 1], got NaN or infinity.")
    low, high = tensor.min().item(), tensor.max().item()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"Expected image values in [0, 1], got [{low:g}, {high:g}]. Divide by 255?")
    return tensor.clamp(0, 1)


def scaled_size(image: Tensor, factor: float, *, official: bool = False) -> tuple[int, int]:
    """Return height and width of (B, C, H, W) times `factor`, at least 1; rounded, or cut as the official code does."""
    height, width = (max(1, int(side * factor) if official else round(side * factor)) for side in image.shape[2:])
    return height, width


def truncate(image: Tensor) -> Tensor:
    """Cut values in [0, 1] down to the next 255th, as the official code does where others round."""
    return (image * 255.0).clamp(0, 255).floor() / 255.0


def to_output(images: Tensor, output_type: str) -> Tensor | np.ndarray | list[PIL.Image.Image]:
    """Turn restored images into what was asked for; they are used up.

    Args:
        images: (B, 3, H, W), in [0, 1].
        output_type: "pt", "np" for (B, H, W, 3) float32, or "pil" for pictures of 8 bit, rounded.

    Returns:
        The images.
    """
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    pixels = images.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(each) for each in pixels]


def check_call(
    *,
    output_type: str,
    color_fix: str,
    start_point: str,
    compatibility: str | None,
    upscale: float,
    num_inference_steps: int,
    num_images_per_prompt: int,
    noise_aug: int,
    guidance_rescale: float,
    total_timesteps: int,
) -> None:
    """Refuse arguments of a pipeline's call that cannot work.

    Args:
        output_type: as in `DiffBIRPipeline.__call__`, as are the others.
        color_fix: see there.
        start_point: see there.
        compatibility: see there.
        upscale: see there.
        num_inference_steps: see there.
        num_images_per_prompt: see there.
        noise_aug: see there.
        guidance_rescale: see there.
        total_timesteps: number of timesteps that the model was trained with.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    check_choice("output_type", output_type, OUTPUT_TYPES)
    check_choice("color_fix", color_fix, COLOR_FIXES)
    check_choice("start_point", start_point, START_POINTS)
    if compatibility is not None:
        check_choice("compatibility", compatibility, COMPATIBILITIES)
    if not (upscale > 0 and math.isfinite(upscale)):
        raise ValueError(f"Expected `upscale` above 0, got {upscale}.")
    for name, value in (("num_inference_steps", num_inference_steps), ("num_images_per_prompt", num_images_per_prompt)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"Expected `{name}` to be a whole number of at least 1, got {value}.")
    if not isinstance(noise_aug, Integral) or not 0 <= noise_aug < total_timesteps:
        raise ValueError(f"Expected `noise_aug` to be a timestep, 0 to {total_timesteps - 1}, got {noise_aug}.")
    check_range("guidance_rescale", guidance_rescale, 0.0, 1.0, "It is a share.")


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn a device's lack of memory into a `MemoryError` that names the ways out.

    Raises:
        MemoryError: if there is not enough memory.
    """
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
