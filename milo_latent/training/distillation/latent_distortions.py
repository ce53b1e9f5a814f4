"""Synthetic pairs of latents for distillation: references, and what guidance, restorers and codecs make of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.pictures import gaussian_blur
from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.distillation.latent_fields import (
    LatentStatistics,
    bend,
    colored_noise,
    encode_randomly,
    encoder_kernels,
    local_contrast,
    log_uniform,
    mix_channels,
    piecewise_constant,
    uniform,
)

LARGEST = 5.0  # difference between two latents; nearly all of Stable Diffusion's are within 3 of each other
IN_PATCH = 0.2
SIDES = (32, 64)  # of the latents in training
Distortion = Callable[[torch.Generator, Tensor], Tensor]


def _per_item(generator: torch.Generator, latents: Tensor, low: float, high: float) -> Tensor:
    return log_uniform(generator, low, high, latents.shape[0], 1, 1, 1)


def add_white_noise(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add white noise with a standard deviation between 0.01 and 1.5."""
    return ref + _per_item(generator, ref, 0.01, 1.5) * torch.randn(ref.shape, generator=generator)


def add_colored_noise(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add spatially correlated noise."""
    exponent = uniform(generator, 0.2, 2.0, ref.shape[0])
    return ref + _per_item(generator, ref, 0.02, 1.0) * colored_noise(generator, ref.shape, exponent)


def blur_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Blur by a Gaussian with a standard deviation of 0.3 to 3 cells."""
    return gaussian_blur(ref, _per_item(generator, ref, 0.3, 3.0).flatten(), radius=6)


def sharpen_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Amplify what a blur removes."""
    return ref + _per_item(generator, ref, 0.2, 2.0) * (ref - blur_latents(generator, ref))


def quantize_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Round to multiples of a step of 0.05 to 1.5."""
    step = _per_item(generator, ref, 0.05, 1.5)
    return (ref / step).round() * step


def shift_channels(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add a constant to each channel, as a change of color does."""
    amount = _per_item(generator, ref, 0.03, 1.0)
    return ref + amount * torch.randn(*ref.shape[:2], 1, 1, generator=generator)


def scale_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Multiply all channels by one factor, or each by its own."""
    amount = _per_item(generator, ref, 0.01, 0.6)
    channels = ref.shape[1] if torch.rand((), generator=generator) < 0.5 else 1
    return ref * (1.0 + amount * torch.randn(ref.shape[0], channels, 1, 1, generator=generator))


def shrink_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Downsample by 2 or 4 and upsample again."""
    factor = 2 if torch.rand((), generator=generator) < 0.5 else 4
    small = F.avg_pool2d(ref, factor)
    mode = "nearest" if torch.rand((), generator=generator) < 0.5 else "bilinear"
    return F.interpolate(small, size=ref.shape[2:], mode=mode)


def blend_with_other(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Blend with the latents of another image of the batch, or replace by them."""
    share = uniform(generator, 0.02, 1.0, ref.shape[0], 1, 1, 1)
    return ref + share * (ref.roll(1, dims=0) - ref)


def move_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Shift by up to two cells in each direction."""
    rows, columns = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return ref.roll((rows, columns), dims=(2, 3))


def add_mixed_noise(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Scale the reference and add noise with correlated channels and a spatially varying strength.

    An encoder turns noise of an image into noise that is correlated between channels, and loses contrast.
    """
    batch = ref.shape[0]
    noise = colored_noise(generator, ref.shape, uniform(generator, -0.5, 1.5, batch))
    noise = mix_channels(generator, noise) / ref.shape[1] ** 0.5
    place = colored_noise(generator, (batch, 1, *ref.shape[2:]), torch.full((batch,), 1.5))
    strength = (uniform(generator, 0.0, 1.0, batch, 1, 1, 1) * place).exp()
    faded = ref * uniform(generator, 0.5, 1.05, batch, 1, 1, 1)
    return faded + _per_item(generator, ref, 0.03, 1.0) * strength.clamp_max(4.0) * noise


def replace_texture(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Replace the fine structure by that of another image of the batch or by correlated noise, as restorers do."""
    blurred = blur_latents(generator, ref)
    fine = (ref - blurred).roll(1, dims=0)
    batch = ref.shape[0]
    noise = mix_channels(generator, colored_noise(generator, ref.shape, uniform(generator, -0.5, 0.5, batch)))
    noise = noise / ref.shape[1] ** 0.5 * (ref - blurred).std(dim=(1, 2, 3), keepdim=True)
    share = torch.rand(batch, 1, 1, 1, generator=generator)
    return blurred + uniform(generator, 0.2, 1.5, batch, 1, 1, 1) * (share * fine + (1 - share) * noise)


DISTORTIONS: tuple[Distortion, ...] = (
    add_mixed_noise,
    add_mixed_noise,  # twice as often
    replace_texture,
    add_white_noise,
    add_colored_noise,
    blur_latents,
    sharpen_latents,
    quantize_latents,
    shift_channels,
    scale_latents,
    shrink_latents,
    blend_with_other,
    move_latents,
)


def distort_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Distort each image of (B, C, h, w) by one or two distortions, some of them in a rectangle only."""
    order = torch.randint(len(DISTORTIONS), (3,), generator=generator).tolist()
    kinds = torch.stack([DISTORTIONS[index](generator, ref) for index in order])  # (3, B, C, h, w)
    weights = torch.randn(3, ref.shape[0], generator=generator).argmax(dim=0)
    dist = kinds.gather(0, weights.view(1, -1, 1, 1, 1).expand(1, *ref.shape))[0]
    second = DISTORTIONS[int(torch.randint(len(DISTORTIONS), (), generator=generator))](generator, dist)
    dist = torch.where(torch.rand(ref.shape[0], 1, 1, 1, generator=generator) < 0.25, second, dist)
    dist = ref + (dist - ref).clamp(-LARGEST, LARGEST)
    return torch.where(patches(generator, ref), dist, ref)


def patches(generator: torch.Generator, latents: Tensor) -> Tensor:
    """Return where to distort, (B, 1, h, w): everywhere, or in a rectangle for a share of `IN_PATCH` of the images."""
    batch, _, height, width = latents.shape
    inside = torch.ones(batch, 1, height, width, dtype=torch.bool)
    for side, axis in ((height, 2), (width, 3)):
        first = torch.randint(0, side - 4, (batch, 1), generator=generator)
        length = torch.randint(4, side, (batch, 1), generator=generator)
        position = torch.arange(side)[None]
        line = (position >= first) & (position < first + length)  # (B, side)
        inside &= line[:, None, :, None] if axis == 2 else line[:, None, None, :]
    return inside | (torch.rand(batch, 1, 1, 1, generator=generator) >= IN_PATCH)


def distort_images(generator: torch.Generator, images: Tensor) -> Tensor:
    """Distort images, (B, 3, H, W), in [0, 1], by noise, blur, brightness or contrast, before they are encoded."""
    kind = int(torch.randint(4, (), generator=generator))
    amount = _per_item(generator, images, 0.02, 0.5)
    if kind == 0:
        return (images + amount * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if kind == 1:
        return blur_latents(generator, F.avg_pool2d(images, 2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    if kind == 2:
        return (images + amount * torch.randn(images.shape[0], 3, 1, 1, generator=generator)).clamp(0, 1)
    center = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - center) * (1.0 + 2 * amount * uniform(generator, -1, 1, *amount.shape)) + center).clamp(0, 1)


def draw_pairs(generator: torch.Generator, images: Tensor, *, side: int) -> tuple[Tensor, Tensor]:
    """Draw `ref` and `dist`, (B, 4, side, side) each, from randomly encoded photos, colored noise and flat regions.

    The photos are (B, 3, H, H), where H is a multiple of `side`.
    """
    batch = images.shape[0]
    stride = images.shape[2] // side
    kernels = encoder_kernels(generator, batch, stride=stride)
    photos = encode_randomly(images, kernels, stride=stride)  # (B, FEATURES, side, side)
    shape = (batch, photos.shape[1], side, side)
    noise = colored_noise(generator, shape, uniform(generator, 0.0, 2.0, batch))
    flat = piecewise_constant(generator, shape)
    photos_std = photos.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
    kind = torch.rand(batch, 1, 1, 1, generator=generator)
    grain = uniform(generator, 0.0, 0.5, batch, 1, 1, 1) * photos_std
    grain = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, grain, grain * local_contrast(photos))
    textured = bend(photos + grain * noise, uniform(generator, 0.6, 1.5, batch, 1, 1, 1))
    base = torch.where(kind < 0.75, textured, torch.where(kind < 0.9, noise, flat + 0.2 * noise))
    statistics = LatentStatistics(generator, base, channels=4)
    ref = statistics(base)
    choice = torch.rand((), generator=generator).item()
    if choice < 0.1:  # by another encoder
        other = encode_randomly(images, encoder_kernels(generator, batch, stride=stride), stride=stride)
        return ref, ref + uniform(generator, 0.1, 1.0, batch, 1, 1, 1) * (statistics(other) - ref).clamp(-3, 3)
    if choice < 0.35:  # distorted before it is encoded
        distorted = encode_randomly(distort_images(generator, images), kernels, stride=stride)
        return ref, ref + (statistics(distorted) - statistics(photos)).clamp(-LARGEST, LARGEST)
    return ref, distort_latents(generator, ref)


def draw_latent_pairs(crops: ImageCrops, batch_size: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return the function from (step, process) to a batch of `ref` and `dist`.

    The crop size is a multiple of all `SIDES`. Larger latents come in smaller batches, of as many cells as `batch_size`
    pairs of the smallest side.
    """

    def draw(step: int, process_index: int) -> tuple[Tensor, Tensor]:
        rng = crops.generator(step, process_index)
        side = int(rng.choice(SIDES))
        count = max(2, batch_size * min(SIDES) ** 2 // side**2)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return draw_pairs(generator, crops.batch(rng, count), side=side)

    return draw
