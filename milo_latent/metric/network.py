"""MILO: it takes two images or two latents, and says where and how much a person would see a difference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.checks import ValueWatch, check_batch, check_model_input, check_pair, check_region, shortened
from milo_latent.inputs import Images, Latents, images_to_tensor, latents_to_tensor
from milo_latent.metric.component import register_component
from milo_latent.metric.loading import Config, PretrainedMixin, check_finite_weights
from milo_latent.metric.mask_finder import MaskFinder, is_transforming
from milo_latent.metric.output import MILOOutput

HIGHEST_MOS = 5.0
MAX_LEVELS = 16  # inputs have sides of at least 2^levels
Result = TypeVar("Result")


def taking_pairs(method: Callable[..., Result]) -> Callable[..., Result]:
    """Let a method of `MILO` take `dist` and `ref` as people have them, by keyword only, and make them tensors."""

    @functools.wraps(method)
    def take(self: MILO, *args: Any, **kwargs: Any) -> Result:
        if args:
            raise TypeError(
                "Expected `dist` and `ref` by keyword, as in metric(dist=..., ref=...), since their order matters, "
                f"got {len(args)} by position."
            )
        for name in kwargs.keys() & {"dist", "ref"}:
            kwargs[name] = self.to_input(kwargs[name], name)
        return method(self, **kwargs)

    return take


class MILO(PretrainedMixin):
    """The multiscale visibility network, for images (`channels=3`, MILO_I) or latents (`channels=4`, MILO_L).

    At each level, from coarse to fine, the same mask finder sees both inputs and the mask of the coarser levels, and
    adds a sigmoid to that mask. The scaler S maps an error to the scale on which people judged.

    Args:
        channels: C of `ref` and `dist`.
        levels: L, the number of scales; the sides of the inputs must be at least 2^L.
        mask_channels: widths of the mask finder's hidden layers.
        scaler_channels: width of the scaler's hidden layers.
        latent_space: name of the autoencoder whose latents the metric was trained on; None for images.
        scaling_factor: scaling factor of that autoencoder, which tells its latents from those of others.

    Source: MILO (ACM TOG 44(6), 2025), section 3; the widths are those of the official file `MILO_latent.pth`.
    """

    mask_finder: MaskFinder
    scaler: nn.Sequential

    def __init__(
        self,
        channels: int = 4,
        levels: int = 4,
        mask_channels: tuple[int, ...] = (32, 64, 32, 16),
        scaler_channels: int = 32,
        latent_space: str | None = None,
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(levels, int) or not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"Expected `levels` to be a whole number from 1 to {MAX_LEVELS}, got {shortened(levels)}.")
        self.config = Config(
            channels=channels, levels=levels, mask_channels=mask_channels, scaler_channels=scaler_channels,
            latent_space=latent_space, scaling_factor=scaling_factor,
        )  # fmt: skip
        self.watch = ValueWatch()  # of the range of references
        self.mask_finder = MaskFinder(channels, tuple(mask_channels))
        self.scaler = nn.Sequential(
            nn.Conv2d(1, scaler_channels, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(scaler_channels, scaler_channels, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(scaler_channels, 1, 1),
            nn.Sigmoid(),
        )

    def to_input(self, given: Images | Latents, name: str) -> Tensor:
        """Return images or latents as `images_to_tensor` or `latents_to_tensor` do, (B, C, H, W).

        What is no tensor gets the dtype and the device of the metric.
        """
        tensor = images_to_tensor(given, name) if is_image_metric(self) else latents_to_tensor(given, name)  # type: ignore[arg-type]
        return tensor if isinstance(given, Tensor) else tensor.to(next(self.parameters()))

    @taking_pairs
    def forward(self, *, dist: Tensor, ref: Tensor, region: Tensor | None = None) -> Tensor:
        """Return the error E, which is differentiable in both inputs.

        Args:
            dist: distorted images in [0, 1] or scaled latents, (B, C, H, W). A metric for images takes whatever
                `images_to_tensor` does, such as pictures, paths and arrays, a metric for latents tensors, arrays and
                files of latents; both take single ones without batch axis.
            ref: reference of the same shape, or (1, C, H, W), which then serves all items of `dist`.
            region: weights of the pixels, (B or 1, 1, H, W), >= 0, such as of a face; None weighs all pixels alike.

        Returns:
            Error E, (B,): 0 for equal inputs, unbounded above.

        Raises:
            TypeError: if the inputs are given by position, their dtypes differ or are not floating point.
            ValueError: if shapes or devices differ, a side is below 2^levels, or `region` has no mean.

        Source: the "Raw Error" of the official commands, which print its mean over the batch.
        """
        return pixel_mean(visible_error(self.mask(dist=dist, ref=ref), dist=dist, ref=ref), region)

    @taking_pairs
    def mask(self, *, dist: Tensor, ref: Tensor) -> Tensor:
        """Return the visibility mask M, (B, 1, H, W), in (0, levels); the arguments are those of `forward`.

        The share of a single `ref` for many `dist` in the first layer is computed once. A metric warns, once, of
        references on the CPU that are far outside the range of images or the scale of latents.

        Source: `mask_generator` of the official network. In spite of its variable names it concatenates
        [dist, ref, mask] when it is called as the official commands do.
        """
        check_pair(ref, dist, channels=self.config.channels, smallest=2**self.config.levels)
        check_model_input("ref` and `dist", dist, next(self.parameters()), model="metric")
        if not is_transforming():
            self.watch.glance("ref", ref, latents=not is_image_metric(self))
        find = self.mask_finder.prepare(shared_ref=ref.shape[0] != dist.shape[0])
        dist_levels, ref_levels = self._pyramid(dist), self._pyramid(ref)
        height, width = (side // 2 for side in dist_levels[-1].shape[2:])
        mask = dist.new_zeros(dist.shape[0], 1, height, width)
        for dist_level, ref_level in zip(reversed(dist_levels), reversed(ref_levels), strict=True):
            mask = _upsample_to(mask, dist_level)
            mask = mask + find(dist_level, ref_level, mask)
        return mask  # (B, 1, H, W)

    @taking_pairs
    def error_map(self, *, dist: Tensor, ref: Tensor) -> Tensor:
        """Return the error map V, (B, 1, H, W): 0 = identical, towards 1 = worst; the arguments are those of `forward`.

        Source: `MILO_map` of the official network.
        """
        return self.scale_error(visible_error(self.mask(dist=dist, ref=ref), dist=dist, ref=ref))

    @taking_pairs
    def compare(self, *, dist: Tensor, ref: Tensor, region: Tensor | None = None) -> MILOOutput:
        """Return error, MOS, mask and error map, with one pass of the mask finder.

        The arguments are those of `forward`; `region` counts for the error and the MOS, not for the two maps. What a
        metric for images returns also holds the images, for its pictures: `metric.compare(...).show()`.
        """
        mask = self.mask(dist=dist, ref=ref)
        pixel_error = visible_error(mask, dist=dist, ref=ref)
        error = pixel_mean(pixel_error, region)
        images = {"ref": ref.detach(), "dist": dist.detach()} if is_image_metric(self) else {}
        error_map = self.scale_error(pixel_error)
        return MILOOutput(error=error, mos=self.mos(error), mask=mask, error_map=error_map, **images)

    def mos(self, error: Tensor) -> Tensor:
        """Return the mean opinion score that people would give, 5 * (1 - S(E)), for the error E, (B,).

        Equal inputs get the highest score of the weights, 5 * (1 - S(0)), which is 4.35 for the official MILO_I.

        Source: the "MOS Score" of the official command for images.
        """
        return HIGHEST_MOS * (1.0 - self.scaler(error.reshape(-1, 1, 1, 1)).flatten())

    def scale_error(self, pixel_error: Tensor) -> Tensor:
        """Return S(error) - S(0) of the visible error of pixels, (B, 1, H, W): 0 = identical, towards 1 = worst."""
        scaled = self.scaler(pixel_error) - self.scaler(torch.zeros_like(pixel_error[:1, :, :1, :1]))
        return torch.where(pixel_error == 0, 0.0, scaled)  # the two scalers may round differently; NaN stays

    def _pyramid(self, finest: Tensor) -> list[Tensor]:
        """Return the levels from fine to coarse, channels last, the layout in which convolutions are fastest."""
        # inside vmap this layout cannot be asked for
        pyramid = [finest if is_transforming() else finest.contiguous(memory_format=torch.channels_last)]
        for _ in range(self.config.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return pyramid


register_component(__name__, "MILO")


def visible_error(mask: Tensor, *, dist: Tensor, ref: Tensor) -> Tensor:
    """Return the error of each pixel, M * |ref - dist| averaged over channels, (B, 1, H, W); its mean is E."""
    return (mask * (ref - dist).abs()).mean(dim=1, keepdim=True)


def _upsample_to(mask: Tensor, level: Tensor) -> Tensor:
    """Double the mask, and repeat its last row or column where the side of the level is odd."""
    mask = F.interpolate(mask, scale_factor=2, mode="bilinear", align_corners=True)
    odd_rows, odd_columns = level.shape[2] - mask.shape[2], level.shape[3] - mask.shape[3]
    return F.pad(mask, (0, odd_columns, 0, odd_rows), mode="replicate") if odd_rows or odd_columns else mask


def pixel_mean(values: Tensor, region: Tensor | None = None) -> Tensor:
    """Return the mean over pixels, weighted by a region.

    The values of a region are checked on the CPU only: elsewhere the check would make an accelerator wait.

    Args:
        values: (B, 1, H, W).
        region: weights, (B or 1, 1, H, W), >= 0; None weighs all pixels alike.

    Returns:
        Means, (B,); NaN for an item whose region is 0 everywhere.

    Raises:
        TypeError: if `region` is not floating point.
        ValueError: if `region` has another shape or, on the CPU, weights that have no mean.
    """
    if region is None:
        return values.mean(dim=(1, 2, 3))
    check_batch("region", region, 1)
    if region.shape[2:] != values.shape[2:] or region.shape[0] not in (1, values.shape[0]):
        raise ValueError(
            f"Expected `region` of shape {tuple(values.shape)} or (1, 1, H, W), got {tuple(region.shape)}. Resize it."
        )
    if region.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transforming():
        check_region(region)
        if (region.amax(dim=(1, 2, 3)) == 0).any():
            raise ValueError("Expected a `region` above 0 somewhere in each item, got zeros, which have no mean.")
    wide = torch.promote_types(values.dtype, torch.float32)  # sums over pixels leave the range of float16
    region = region.to(values.device, wide)
    share = region / region.sum(dim=(1, 2, 3), keepdim=True)  # dividing first keeps the products small
    return (values.to(wide) * share).sum(dim=(1, 2, 3)).to(values.dtype)


def is_image_metric(metric: MILO) -> bool:
    """Return whether a metric is for images (MILO_I), not for latents (MILO_L)."""
    return metric.config.latent_space is None and metric.config.channels == 3


def open_metric(metric: Any) -> MILO:
    """Return a metric as it is, or open what `MILO.from_pretrained` takes, such as "official-image" or "nano".

    Raises:
        TypeError: for anything else.
        ValueError: if the weights are not finite.
    """
    if isinstance(metric, str | Path):
        return MILO.from_pretrained(metric)
    if not isinstance(metric, MILO):
        raise TypeError(f"Expected `metric` to be a MILO, its name or its folder, got {type(metric).__name__}.")
    check_finite_weights(metric)
    return metric
