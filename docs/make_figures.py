"""Make the figures of docs/explanation: `python docs/make_figures.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent import (
    MILO,
    color_error_map,
    curriculum_weight,
    encode_image,
    load_restorer,
    read_image,
    restore_image,
    write_image,
)

OUTPUT = Path(__file__).parent / "explanation"
EXAMPLE = Path(__file__).parent.parent / "examples" / "cat_noisy.png"


def gray(values: Tensor) -> Tensor:
    """Return values in [0, 1], (1, 1, H, W), as an image."""
    return values.clamp(0, 1).expand(-1, 3, -1, -1)


def distort(image: Tensor) -> Tensor:
    """Add equal noise everywhere, and blur the right half."""
    half = image.shape[3] // 2
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (weights[:, None] * weights).div(256).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    mixed = torch.cat([image[..., :half], blurred[..., half:]], dim=3)
    return (mixed + 0.04 * torch.randn(image.shape, generator=torch.manual_seed(0))).clamp(0, 1)


def main() -> None:
    """Write milo_mask.jpg and curriculum.jpg."""
    ref = restore_image(read_image(EXAMPLE), model=load_restorer("nano"))
    dist = distort(ref)
    result = MILO.from_pretrained("milo-image").compare(ref=ref, dist=dist)
    mask = gray(result.mask / result.mask.quantile(0.99))
    write_figure("milo_mask.jpg", [ref, dist, mask, color_error_map(result.error_map)])
    mask = latent_mask(ref, dist)
    weights = [curriculum_weight(mask, progress, schedule="cosine") for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    write_figure("curriculum.jpg", [F.interpolate(gray(weight / 2), scale_factor=8) for weight in weights])


def latent_mask(ref: Tensor, dist: Tensor) -> Tensor:
    """Return the mask of MILO_L between the latents of two images."""
    pipe = load_restorer("nano", device="cpu")
    return pipe.metric.mask(ref=encode_image(pipe.vae, ref), dist=encode_image(pipe.vae, dist))


def write_figure(name: str, images: list[Tensor]) -> None:
    """Write images of equal height side by side, at most 1200 pixels wide."""
    row = torch.cat(images, dim=3)
    if row.shape[3] > 1200:
        row = F.interpolate(row, scale_factor=1200 / row.shape[3], mode="bilinear", antialias=True)
    write_image(OUTPUT / name, row)


if __name__ == "__main__":
    main()
