"""Pairs of latents for distillation: what guidance, restorers and codecs may put beside a reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.distillation.latent_fields import (
    LatentStatistics,
    bend,
    coloured_noise,
    encode_randomly,
    encoder_kernels,
    local_contrast,
    log_uniform,
    mix_channels,
    piecewise_constant,
    uniform,
)

LARGEST = 5.0  # difference of two latents: of Stable Diffusion's, nearly all lie within 3 of each other
Distortion = Callable[[torch.Generator, Tensor], Tensor]


def _per_item(generator: torch.Generator, latents: Tensor, low: float, high: float) -> Tensor:
    return log_uniform(generator, low, high, latents.shape[0], 1, 1, 1)


def add_white_noise(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add white noise of a spread between 0.01 and 1.5."""
    return ref + _per_item(generator, ref, 0.01, 1.5) * torch.randn(ref.shape, generator=generator)


def add_coloured_noise(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add noise that is correlated over space."""
    exponent = uniform(generator, 0.2, 2.0, ref.shape[0])
    return ref + _per_item(generator, ref, 0.02, 1.0) * coloured_noise(generator, ref.shape, exponent)


def blur_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Blur by a Gaussian of 0.3 to 3 cells."""
    sigma = _per_item(generator, ref, 0.3, 3.0).view(-1, 1)
    offsets = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(ref.shape[1], dim=0)  # (B * C, 13)
    flat = F.pad(ref, (6, 6, 6, 6), mode="replicate").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=kernel.shape[0])
    return F.conv2d(flat, kernel[:, None, :, None], groups=kernel.shape[0]).view(ref.shape)


def sharpen_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add a share of what blurring takes away."""
    return ref + _per_item(generator, ref, 0.2, 2.0) * (ref - blur_latents(generator, ref))


def quantise_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Round to steps of 0.05 to 1.5."""
    step = _per_item(generator, ref, 0.05, 1.5)
    return (ref / step).round() * step


def shift_channels(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add a constant per channel, as a change of colour does."""
    amount = _per_item(generator, ref, 0.03, 1.0)
    return ref + amount * torch.randn(*ref.shape[:2], 1, 1, generator=generator)


def scale_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Multiply all by one factor, or each channel by its own."""
    amount = _per_item(generator, ref, 0.01, 0.6)
    channels = ref.shape[1] if torch.rand((), generator=generator) < 0.5 else 1
    return ref * (1.0 + amount * torch.randn(ref.shape[0], channels, 1, 1, generator=generator))


def shrink_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Shrink and enlarge again."""
    factor = 2 if torch.rand((), generator=generator) < 0.5 else 4
    small = F.avg_pool2d(ref, factor)
    mode = "nearest" if torch.rand((), generator=generator) < 0.5 else "bilinear"
    return F.interpolate(small, size=ref.shape[2:], mode=mode)


def blend_with_other(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Blend with the latents of another image of the batch, up to nothing of the own one."""
    share = uniform(generator, 0.02, 1.0, ref.shape[0], 1, 1, 1)
    return ref + share * (ref.roll(1, dims=0) - ref)


def move_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Shift by up to two cells."""
    rows, columns = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return ref.roll((rows, columns), dims=(2, 3))


def add_mixed_noise(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Add noise whose channels correlate and whose strength changes over space, and fade the reference, as encoders do.

    An encoder turns noise of an image into noise that is correlated between channels, and loses contrast over it.
    """
    batch = ref.shape[0]
    noise = coloured_noise(generator, ref.shape, uniform(generator, -0.5, 1.5, batch))
    noise = mix_channels(generator, noise, ref.shape[1]) / ref.shape[1] ** 0.5
    place = coloured_noise(generator, (batch, 1, *ref.shape[2:]), torch.full((batch,), 1.5))
    strength = (uniform(generator, 0.0, 1.0, batch, 1, 1, 1) * place).exp()
    faded = ref * uniform(generator, 0.5, 1.05, batch, 1, 1, 1)
    return faded + _per_item(generator, ref, 0.03, 1.0) * strength.clamp_max(4.0) * noise


def replace_texture(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Put other fine structure in place of the own, as restorers do: of another item, or correlated noise."""
    blurred = blur_latents(generator, ref)
    fine = (ref - blurred).roll(1, dims=0)
    batch = ref.shape[0]
    noise = mix_channels(
        generator, coloured_noise(generator, ref.shape, uniform(generator, -0.5, 0.5, batch)), ref.shape[1]
    )
    noise = noise / ref.shape[1] ** 0.5 * (ref - blurred).std(dim=(1, 2, 3), keepdim=True)
    share = torch.rand(batch, 1, 1, 1, generator=generator)
    return blurred + uniform(generator, 0.2, 1.5, batch, 1, 1, 1) * (share * fine + (1 - share) * noise)


DISTORTIONS: tuple[Distortion, ...] = (
    add_mixed_noise,
    add_mixed_noise,  # twice as often
    replace_texture,
    add_white_noise,
    add_coloured_noise,
    blur_latents,
    sharpen_latents,
    quantise_latents,
    shift_channels,
    scale_latents,
    shrink_latents,
    blend_with_other,
    move_latents,
)


def distort_latents(generator: torch.Generator, ref: Tensor) -> Tensor:
    """Distort each item of (B, C, h, w) by one or two kinds, a part of them only in a patch."""
    order = torch.randint(len(DISTORTIONS), (3,), generator=generator).tolist()
    kinds = torch.stack([DISTORTIONS[index](generator, ref) for index in order])  # (3, B, C, h, w)
    weights = torch.randn(3, ref.shape[0], generator=generator).argmax(dim=0)
    dist = kinds.gather(0, weights.view(1, -1, 1, 1, 1).expand(1, *ref.shape))[0]
    second = DISTORTIONS[int(torch.randint(len(DISTORTIONS), (), generator=generator))](generator, dist)
    dist = torch.where(torch.rand(ref.shape[0], 1, 1, 1, generator=generator) < 0.25, second, dist)
    dist = ref + (dist - ref).clamp(-LARGEST, LARGEST)
    return torch.where(patches(generator, ref), dist, ref)


def patches(generator: torch.Generator, latents: Tensor, *, share: float = 0.2) -> Tensor:
    """Return where to distort, (B, 1, h, w): everywhere, or for a `share` of the items in one rectangle."""
    batch, _, height, width = latents.shape
    inside = torch.ones(batch, 1, height, width, dtype=torch.bool)
    for side, axis in ((height, 2), (width, 3)):
        first = torch.randint(0, side - 4, (batch, 1), generator=generator)
        length = torch.randint(4, side, (batch, 1), generator=generator)
        position = torch.arange(side)[None]
        line = (position >= first) & (position < first + length)  # (B, side)
        inside &= line[:, None, :, None] if axis == 2 else line[:, None, None, :]
    return inside | (torch.rand(batch, 1, 1, 1, generator=generator) >= share)


def distort_images(generator: torch.Generator, images: Tensor) -> Tensor:
    """Distort images, (B, 3, H, W), in [0, 1], before a random encoder: noise, blur, brightness and contrast."""
    kind = int(torch.randint(4, (), generator=generator))
    amount = _per_item(generator, images, 0.02, 0.5)
    if kind == 0:
        return (images + amount * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if kind == 1:
        return blur_latents(generator, F.avg_pool2d(images, 2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    if kind == 2:
        return (images + amount * torch.randn(images.shape[0], 3, 1, 1, generator=generator)).clamp(0, 1)
    centre = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - centre) * (1.0 + 2 * amount * uniform(generator, -1, 1, *amount.shape)) + centre).clamp(0, 1)


def draw_pairs(generator: torch.Generator, images: Tensor, *, side: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Draw pairs of latents: from photos through random encoders, from coloured noise, and from flat regions.

    Args:
        generator: of every draw.
        images: photos for half of the pairs or more, (B, 3, H, W), H = W = a multiple of `side`.
        side: of the latents.
        channels: of the latents.

    Returns:
        `ref` and `dist`, (B, channels, side, side) each.
    """
    batch = images.shape[0]
    stride = images.shape[2] // side
    kernels = encoder_kernels(generator, batch, stride=stride)
    photos = encode_randomly(images, kernels, stride=stride)  # (B, FEATURES, side, side)
    shape = (batch, photos.shape[1], side, side)
    noise = coloured_noise(generator, shape, uniform(generator, 0.0, 2.0, batch))
    flat = piecewise_constant(generator, shape)
    photos_spread = photos.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
    kind = torch.rand(batch, 1, 1, 1, generator=generator)
    grain = uniform(generator, 0.0, 0.5, batch, 1, 1, 1) * photos_spread
    grain = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, grain, grain * local_contrast(photos))
    textured = bend(photos + grain * noise, uniform(generator, 0.6, 1.5, batch, 1, 1, 1))
    base = torch.where(kind < 0.75, textured, torch.where(kind < 0.9, noise, flat + 0.2 * noise))
    statistics = LatentStatistics(generator, base, channels=channels)
    ref = statistics(base)
    choice = torch.rand((), generator=generator).item()
    if choice < 0.1:  # by another encoder
        other = encode_randomly(images, encoder_kernels(generator, batch, stride=stride), stride=stride)
        return ref, ref + uniform(generator, 0.1, 1.0, batch, 1, 1, 1) * (statistics(other) - ref).clamp(-3, 3)
    if choice < 0.35:  # distorted before it is encoded
        distorted = encode_randomly(distort_images(generator, images), kernels, stride=stride)
        return ref, ref + (statistics(distorted) - statistics(photos)).clamp(-LARGEST, LARGEST)
    return ref, distort_latents(generator, ref)


def draw_latent_pairs(
    crops: ImageCrops, batch_size: int, *, sides: tuple[int, ...] = (32, 64)
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return the function from (step, process) to a batch of `ref` and `dist`.

    Args:
        crops: photos, whose crop size is a multiple of every side.
        batch_size: pairs of the smallest side; larger ones come in smaller batches of as many cells.
        sides: of the latents, in turn at random.
    """

    def draw(step: int, process_index: int) -> tuple[Tensor, Tensor]:
        rng = crops.generator(step, process_index)
        side = int(rng.choice(sides))
        count = max(2, batch_size * min(sides) ** 2 // side**2)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return draw_pairs(generator, crops.batch(rng, count), side=side)

    return draw
