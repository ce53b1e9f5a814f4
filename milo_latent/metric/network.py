"""MILO: two images or two latents in, where and how much a person would see a difference out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.checkpoints import CHECKPOINT_SUFFIXES, read_checkpoint, rename_keys
from milo_latent.checks import check_batch, check_model_input, check_pair, check_region
from milo_latent.files import make_readable
from milo_latent.metric.card import write_card
from milo_latent.metric.mask_finder import MaskFinder, is_transforming
from milo_latent.resources import available_weights, weights_dir

__all__ = ["MILO", "MILOOutput", "ModelMixin"]  # ModelMixin: diffusers looks for it beside the classes that it loads

OFFICIAL_PREFIXES = {"mask_finder_1.netBasic.": "mask_finder.", "scaler_network.model.": "scaler."}
STABLE_DIFFUSION_SCALING_FACTOR = 0.18215  # of SD 1.x and 2.x, on whose latents the official MILO_L was trained


@dataclass(frozen=True)
class MILOOutput:
    """What MILO says of a batch; in all of it 0 means identical.

    Args:
        score: raw error E, (B,), unbounded above.
        quality: quality score Q, (B,), towards 1 = worst; the official command for images prints this.
        mask: visibility mask M, (B, 1, H, W), in (0, levels).
        error_map: V, (B, 1, H, W).
        similarity: the quality score the other way round for people, (B,): 1 = identical, towards 0 = worst.
    """

    score: Tensor
    quality: Tensor
    mask: Tensor
    error_map: Tensor
    similarity: Tensor


class MILO(ModelMixin, ConfigMixin):
    """The multiscale visibility network, for images (`channels=3`, MILO_I) or latents (`channels=4`, MILO_L).

    The mask finder, one for all levels, adds a sigmoid per level, from coarse to fine; the scaler maps an error to the
    scale on which people judged.

    Args:
        channels: C of `ref` and `dist`.
        levels: L, the number of scales; the sides of the inputs must be at least 2^L.
        mask_channels: widths of the mask finder's hidden layers.
        scaler_channels: width of the scaler's hidden layers.
        latent_space: name of the autoencoder whose latents this was trained on; None for images.
        scaling_factor: of that autoencoder, to tell its latents from others.

    Source: MILO (ACM TOG 44(6), 2025), section 3; layer widths from the official file `MILO_latent.pth`.
    """

    _keep_in_fp32_modules = ["mask_finder", "scaler"]  # noqa: RUF012 (whatever dtype a pipeline is opened in)
    mask_finder: MaskFinder
    scaler: nn.Sequential

    @register_to_config
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
        self.mask_finder = MaskFinder(channels, tuple(mask_channels))
        self.scaler = nn.Sequential(
            nn.Conv2d(1, scaler_channels, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(scaler_channels, scaler_channels, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(scaler_channels, 1, 1),
            nn.Sigmoid(),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MILO:
        """Open a metric, frozen and in evaluation mode; gradients to its inputs still flow.

        Args:
            pretrained_model_name_or_path: the name of a shipped set, a folder that holds `config.json` or a `metric`
                folder, an official `.pth` file, or a hub id.
            **kwargs: as of `ModelMixin.from_pretrained`, without `output_loading_info`; none for an official file.

        Returns:
            The metric.

        Raises:
            FileNotFoundError: if nothing is there, naming where it was looked for.
            ValueError: if what is there is not MILO, or not all of it, or for options that are not taken.
        """
        source = Path(pretrained_model_name_or_path)
        if kwargs.pop("output_loading_info", False):
            raise ValueError(
                "Expected no `output_loading_info`: whatever is not loaded whole is refused. Leave it out."
            )
        if source.suffix.lower() in CHECKPOINT_SUFFIXES:
            if kwargs:
                raise ValueError(
                    f"Expected no options for the official file {source}, got {sorted(kwargs)}. Convert it."
                )
            return cls.from_official(source)
        if str(source) in available_weights():
            source = weights_dir(str(source))
        folder = source / (kwargs.get("subfolder") or "")
        if folder == source and not (folder / "config.json").is_file() and (source / "metric").is_dir():
            source = folder = source / "metric"
        could_be_hub_id = not source.exists() and not source.is_absolute() and len(source.parts) == 2
        if not (folder / "config.json").is_file() and not could_be_hub_id:
            raise FileNotFoundError(
                f"Expected metric weights, got {str(pretrained_model_name_or_path)!r}: neither a shipped set "
                f"({', '.join(available_weights())}), nor a folder with config.json, nor an official .pth file."
            )
        try:
            metric, info = super().from_pretrained(source, **kwargs, output_loading_info=True)
        except (OSError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"Expected MILO weights in {pretrained_model_name_or_path}: {error}") from error
        if info["missing_keys"]:  # diffusers only warns, and leaves them without values or with random ones
            raise ValueError(
                f"Expected every weight in {pretrained_model_name_or_path}, missing: {', '.join(info['missing_keys'])}."
            )
        return metric.frozen()

    @classmethod
    def from_official(cls, path: str | Path) -> MILO:
        """Read `MILO.pth` (images) or `MILO_latent.pth` (Stable Diffusion latents), frozen.

        Args:
            path: the official file.

        Returns:
            The metric.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or no official MILO checkpoint; the differing keys are named.
        """
        state = rename_keys(read_checkpoint(path), OFFICIAL_PREFIXES)
        first = state.get("mask_finder.0.weight")
        if first is None or first.ndim != 4:
            raise ValueError(f"Expected an official MILO checkpoint in {path}, got the keys {sorted(state)[:4]}...")
        channels = (first.shape[1] - 1) // 2
        latent = channels != 3
        metric = cls(
            channels=channels,
            latent_space="stable-diffusion" if latent else None,
            scaling_factor=STABLE_DIFFUSION_SCALING_FACTOR if latent else None,
        )
        try:
            metric.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"Expected an official MILO checkpoint in {path}: {error}") from error
        return metric.frozen()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write safetensors, configuration and a model card, which a card that is there already is not replaced by.

        Args:
            save_directory: a folder, made where it is missing.
            **kwargs: as of `ModelMixin.save_pretrained`.

        Raises:
            ValueError: if `save_directory` is a file.
        """
        if Path(save_directory).is_file():
            raise ValueError(f"Expected a folder to save the metric in, got the file {save_directory}.")
        super().save_pretrained(str(save_directory), **kwargs)
        make_readable(save_directory)
        write_card(self, Path(save_directory))

    def frozen(self) -> MILO:
        """Return itself in evaluation mode, its parameters without gradients, in the memory layout that is fastest."""
        self.to(memory_format=torch.channels_last)
        return self.eval().requires_grad_(False)

    def forward(self, *, dist: Tensor, ref: Tensor, region: Tensor | None = None) -> Tensor:
        """Return the raw error E: 0 for equal inputs, unbounded above, differentiable in both.

        Args:
            dist: distorted images in [0, 1] or scaled latents, (B, C, H, W).
            ref: reference, of the same shape, or (1, C, H, W): one for all of `dist`.
            region: weights of pixels, (B or 1, 1, H, W), >= 0, such as a face; None weighs all alike.

        Returns:
            Raw error, (B,).

        Raises:
            TypeError: for dtypes that differ or are not floating point.
            ValueError: for shapes or devices that differ, or sides below 2^levels.

        Source: MILO_runner.py and MILO_runner_latent.py of the official repository print its mean over the batch.
        """
        mask = self.mask(dist=dist, ref=ref)
        return _mean((mask * (ref - dist).abs()).mean(dim=1, keepdim=True), region)

    def mask(self, *, dist: Tensor, ref: Tensor) -> Tensor:
        """Return the visibility mask M.

        Args:
            dist: distorted, (B, C, H, W).
            ref: reference, of the same shape, or (1, C, H, W): one for all of `dist`, whose share is computed once.

        Returns:
            Mask, (B, 1, H, W), in (0, levels).

        Raises:
            TypeError: see `forward`.
            ValueError: see `forward`.

        Source: `mask_generator` of the official network, which, in spite of its variable names, concatenates
        [dist, ref, mask] when called as the official command line does.
        """
        check_pair(ref, dist, channels=self.config.channels, smallest=2**self.config.levels)
        check_model_input("ref` and `dist", dist, next(self.parameters()), model="metric")
        shared = ref.shape[0] != dist.shape[0]
        layers = self.mask_finder.layers(without_ref=shared)
        mask: Tensor | None = None
        for dist_level, ref_level in zip(reversed(self._pyramid(dist)), reversed(self._pyramid(ref)), strict=True):
            mask = _upsample_to(mask, dist_level)
            features = self.mask_finder.ref_features(ref_level) if shared else None
            inputs = [dist_level, mask] if shared else [dist_level, ref_level, mask]
            mask = mask + self.mask_finder.find(layers, inputs, features)
        assert mask is not None
        return mask  # (B, 1, H, W)

    def _pyramid(self, finest: Tensor) -> list[Tensor]:
        """Return the levels, from fine to coarse; channels last, in which convolutions are fastest (measured)."""
        # inside vmap this layout cannot be asked for
        pyramid = [finest if is_transforming() else finest.contiguous(memory_format=torch.channels_last)]
        for _ in range(self.config.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return pyramid

    def error_map(self, *, dist: Tensor, ref: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the error map V: per pixel, 0 = identical, towards 1 = worst.

        Args:
            dist: distorted, (B, C, H, W).
            ref: reference, of the same shape.
            mask: from `mask`, where it is known already.

        Returns:
            Error map, (B, 1, H, W). Its mean is the quality score Q.

        Source: `MILO_map` of the official network.
        """
        mask = self.mask(dist=dist, ref=ref) if mask is None else mask
        error = (mask * (ref - dist).abs()).mean(dim=1, keepdim=True)  # (B, 1, H, W)
        error_map = self.scaler(error) - self.scaler(torch.zeros_like(error[:1, :, :1, :1]))
        return torch.where(error == 0, 0.0, error_map)  # the two scalers' roundings may differ; NaN stays

    def compare(self, *, dist: Tensor, ref: Tensor, region: Tensor | None = None) -> MILOOutput:
        """Compare `dist` with `ref` in every way there is, with one pass of the mask finder.

        Args:
            dist: distorted, (B, C, H, W).
            ref: reference, of the same shape, or (1, C, H, W): one for all of `dist`.
            region: weights of pixels, (B or 1, 1, H, W), >= 0; None weighs all alike.

        Returns:
            Score, quality, mask and error map.

        Raises:
            TypeError: see `forward`.
            ValueError: see `forward`.
        """
        mask = self.mask(dist=dist, ref=ref)
        error = (mask * (ref - dist).abs()).mean(dim=1, keepdim=True)  # (B, 1, H, W)
        error_map = self.error_map(dist=dist, ref=ref, mask=mask)
        quality = _mean(error_map, region)
        worst = 1.0 - self.scaler(error.new_zeros(1, 1, 1, 1)).flatten()
        return MILOOutput(
            score=_mean(error, region),
            quality=quality,
            mask=mask,
            error_map=error_map,
            similarity=1.0 - quality / worst,
        )


def is_image_metric(metric: MILO) -> bool:
    """Return whether a metric is for images (MILO_I), not for latents (MILO_L)."""
    return metric.config.latent_space is None and metric.config.channels == 3


def check_metric(metric: Any) -> None:
    """Raise TypeError unless `metric` is a MILO, such as where its name was given."""
    if not isinstance(metric, MILO):
        raise TypeError(
            f"Expected `metric` to be a MILO, got {type(metric).__name__}. Open one: MILO.from_pretrained(name)."
        )


def _mean(values: Tensor, region: Tensor | None) -> Tensor:
    """Return the mean of (B, 1, H, W) over pixels, weighted by `region`, (B,); NaN where it is 0 everywhere.

    Reads values of regions on the CPU only, to refuse those; elsewhere that would make an accelerator wait.
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
    total = region.sum(dim=(1, 2, 3), keepdim=True)  # divided by first, so that no product grows
    return (values.to(wide) * (region / total)).sum(dim=(1, 2, 3)).to(values.dtype)


def _upsample_to(mask: Tensor | None, level: Tensor) -> Tensor:
    """Double the mask, then repeat its last row or column where the level is odd; zeros before the coarsest level."""
    height, width = level.shape[2:]
    if mask is None:
        return level.new_zeros(level.shape[0], 1, height, width)
    mask = F.interpolate(mask, scale_factor=2, mode="bilinear", align_corners=True)
    odd_rows, odd_columns = height - mask.shape[2], width - mask.shape[3]
    return F.pad(mask, (0, odd_columns, 0, odd_rows), mode="replicate") if odd_rows or odd_columns else mask
