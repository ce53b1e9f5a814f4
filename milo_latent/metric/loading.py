"""Opening and saving a metric: by the name of weights, from a folder, the hub, or an official file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from milo_latent.atomic import make_readable, saving_weights, temporary_folder
from milo_latent.checkpoints import CHECKPOINT_SUFFIXES, read_checkpoint, rename_keys
from milo_latent.checks import check_finite, shortened
from milo_latent.metric.card import write_card
from milo_latent.resources import available_weights, cache_dir, find_weights, sha256
from milo_latent.structure import check_model_folder, refusing_damage

OFFICIAL_URL = "https://raw.githubusercontent.com/ugurcogalan06/MILO/a54e50e9cd1aaaefd6fddfacacc1427f8387af1c/weights/"


@dataclass(frozen=True)
class PinnedFile:
    """A public file whose content is known."""

    url: str
    size: int  # in bytes
    digest: str  # SHA-256, in hexadecimal

    @property
    def path(self) -> Path:
        """Where the file lies in the cache once it is fetched."""
        return cache_dir() / self.url.rpartition("/")[2]

    def is_at(self, path: Path) -> bool:
        """Return whether the file at `path` is this one."""
        return path.is_file() and path.stat().st_size == self.size and sha256(path) == self.digest


OFFICIAL = {
    "official-image": PinnedFile(
        OFFICIAL_URL + "MILO.pth",
        size=185_625,
        digest="a1d66a7e0ebe0f839564ad70160ffdec709708f0b9a7dd03b19c0bee90d31f79",
    ),
    "official-latent": PinnedFile(
        OFFICIAL_URL + "MILO_latent.pth",
        size=187_929,
        digest="639448793a4e2a41614cd1ed7fb97234533ba2d02fa2c18f94909ca44fc169b3",
    ),
}
OFFICIAL_PREFIXES = {"mask_finder_1.netBasic.": "mask_finder.", "scaler_network.model.": "scaler."}
STABLE_DIFFUSION_SCALING_FACTOR = 0.18215  # of SD 1.x and 2.x, on whose latents the official MILO_L was trained


class PretrainedMixin(ModelMixin, ConfigMixin):
    """How `MILO` is opened and saved."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Open a metric, frozen and in evaluation mode; gradients to its inputs still flow.

        Args:
            pretrained_model_name_or_path: "official-image" or "official-latent", which are fetched into the cache on
                first use; the name of a shipped set; a folder that holds `config.json` or a folder `metric`; an
                official `.pth` file; or a hub id.
            **kwargs: as of `ModelMixin.from_pretrained`, without `output_loading_info`; none for official weights.

        Returns:
            The metric.

        Raises:
            FileNotFoundError: if there is nothing of that name.
            OSError: if official weights cannot be fetched.
            ValueError: if the weights are incomplete or not those of a MILO, or an option is not supported.
        """
        source = weights_path(pretrained_model_name_or_path)
        if source.suffix.lower() in CHECKPOINT_SUFFIXES:
            if kwargs:
                raise ValueError(f"Expected no options for the official file {source}, got {sorted(kwargs)}.")
            return cls.from_official(source)
        if kwargs.pop("output_loading_info", False):
            raise ValueError("Expected no `output_loading_info`: incomplete weights are refused anyway. Leave it out.")
        kwargs.pop("low_cpu_mem_usage", None)  # diffusers refuses False beside the fixed float32
        folder = source / (kwargs.get("subfolder") or "")
        if folder == source and not (folder / "config.json").is_file() and (source / "metric").is_dir():
            source = folder = source / "metric"
        could_be_hub_id = not source.exists() and not source.is_absolute() and len(source.parts) == 2
        if not (folder / "config.json").is_file() and not could_be_hub_id:
            raise FileNotFoundError(
                f"Expected metric weights, got {str(pretrained_model_name_or_path)!r}: neither a shipped set "
                f"({', '.join(available_weights())}), nor {' or '.join(OFFICIAL)}, nor a folder with config.json, "
                "nor an official .pth file."
            )
        with refusing_damage(f"Expected MILO weights in {pretrained_model_name_or_path}"):
            check_model_folder(folder)
            kwargs["use_safetensors"] = True
            metric, info = super().from_pretrained(source, **kwargs, output_loading_info=True)
        if info["missing_keys"]:  # diffusers only warns, and leaves them without values or with random ones
            raise ValueError(
                f"Expected every weight in {pretrained_model_name_or_path}, missing: {', '.join(info['missing_keys'])}."
            )
        return metric.frozen()

    @classmethod
    def from_official(cls, path: str | Path) -> Self:
        """Read the file `MILO.pth` (images) or `MILO_latent.pth` (Stable Diffusion latents), frozen.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or no official MILO checkpoint; the message names the keys that differ.
        """
        state = rename_keys(read_checkpoint(path), OFFICIAL_PREFIXES)
        first = state.get("mask_finder.0.weight")
        if first is None or first.ndim != 4 or not all(value.is_floating_point() for value in state.values()):
            keys = shortened(sorted(state))
            raise ValueError(f"Expected an official MILO checkpoint in {path}, got the keys {keys}.")
        channels = (first.shape[1] - 1) // 2
        space = {"latent_space": "stable-diffusion", "scaling_factor": STABLE_DIFFUSION_SCALING_FACTOR}
        metric = cls(channels=channels, **({} if channels == 3 else space))
        with refusing_damage(f"Expected an official MILO checkpoint in {path}"):
            metric.load_state_dict(state, strict=True)
        return metric.frozen()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write safetensors, configuration and a model card.

        A card that is there already stays; only the SHA-256 in it is renewed.

        Args:
            save_directory: a folder, made where it is missing.
            **kwargs: as of `ModelMixin.save_pretrained`.

        Raises:
            OSError: if the disk is full.
            ValueError: if `save_directory` is a file.
        """
        if Path(save_directory).is_file():
            raise ValueError(f"Expected a folder to save the metric in, got the file {save_directory}.")
        with saving_weights(save_directory):
            super().save_pretrained(str(save_directory), **kwargs)
        make_readable(save_directory)
        write_card(self, Path(save_directory))

    def frozen(self) -> Self:
        """Return itself in evaluation mode, its parameters without gradients, in the memory layout that is fastest.

        Raises:
            ValueError: if a weight is NaN or infinite.
        """
        check_finite_weights(self)
        self.to(memory_format=torch.channels_last)
        return self.eval().requires_grad_(False)


def check_finite_weights(metric: nn.Module) -> None:
    """Raise ValueError if a weight of a metric is NaN or infinite: all that it says would be worthless."""
    for name, parameter in metric.named_parameters():
        if not parameter.is_meta:
            check_finite(f"{name} of the metric", parameter)


def weights_path(source: str | Path) -> Path:
    """Return the path of named weights, fetching official ones as `fetch_official` does; else `source` itself."""
    return fetch_official(str(source)) if str(source) in OFFICIAL else find_weights(source)


def fetch_official(name: str) -> Path:
    """Return the path of official weights, one of `OFFICIAL`, in the cache; they are fetched if they are not there.

    Raises:
        OSError: if they cannot be fetched.
        ValueError: for another name, or if another content comes; it is not kept.
    """
    if name not in OFFICIAL:
        raise ValueError(f"Expected one of {', '.join(OFFICIAL)}, got {name!r}.")
    file = OFFICIAL[name]
    if file.is_at(file.path):
        return file.path
    try:
        _fetch(file)
    except OSError as error:
        raise OSError(
            f"{name} is not in the cache and could not be fetched from {file.url}: {getattr(error, 'reason', error)}. "
            f"Run `milo-latent weights pull {name}` once with a network, or use the embedded stand-ins milo-image "
            "(photos) and milo-sd (Stable Diffusion latents)."
        ) from error
    return file.path


def _fetch(file: PinnedFile) -> None:
    """Fetch a file into the cache, where it appears once it is complete and checked."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(file.path.parent) as folder:
        partial = folder / file.path.name
        torch.hub.download_url_to_file(file.url, str(partial), progress=False)
        if not file.is_at(partial):
            raise ValueError(
                f"Expected {file.size} bytes with the SHA-256 {file.digest} at {file.url}, got "
                f"{partial.stat().st_size} with {sha256(partial)}. The file is not kept."
            )
        partial.replace(file.path)


def default_image_metric() -> str:
    """Return the name of the MILO_I to score images with: the official one where it was fetched, else our own."""
    official = OFFICIAL["official-image"]
    return "official-image" if official.is_at(official.path) else "milo-image"
