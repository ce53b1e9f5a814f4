"""What a pipeline is given, as one batch of RGB images; pure functions."""

from __future__ import annotations

import math

import PIL.Image
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from torch import Tensor
from torch.nn import functional as F

ROUNDING = 0.01  # by which resampled images may leave [0, 1]


def images_to_tensor(image: PipelineImageInput) -> Tensor:
    """Turn whatever diffusers accepts as images into a batch.

    Args:
        image: PIL image or images of one size, arrays (B, H, W, 3) or tensors (B, 3, H, W) in [0, 1].

    Returns:
        Images, (B, 3, H, W) float32, in [0, 1].

    Raises:
        ValueError: for sizes that differ, images that are not RGB, and values that are not finite or not in [0, 1].
    """
    if isinstance(image, PIL.Image.Image):
        image = [image]
    if isinstance(image, list) and isinstance(image[0], PIL.Image.Image):
        sizes = {entry.size for entry in image}
        if len(sizes) > 1:
            raise ValueError(f"Expected images of one size in a batch, got {sorted(sizes)}. Restore them one by one.")
        image = [entry.convert("RGB") for entry in image]
    tensor = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(image).float()
    if tensor.shape[1] != 3:
        raise ValueError(f"Expected RGB images, (B, 3, H, W), got {tuple(tensor.shape)}.")
    low, high = tensor.min().item(), tensor.max().item()
    if not (math.isfinite(low) and math.isfinite(high) and low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(f"Expected image values in [0, 1], got [{low:g}, {high:g}]. Divide by 255?")
    return tensor.clamp(0, 1)


def enlarge(image: Tensor, factor: float) -> Tensor:
    """Resize (B, 3, H, W), in [0, 1], by `factor`: bicubic, antialiased where it shrinks."""
    if factor == 1.0:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[2:]]
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
