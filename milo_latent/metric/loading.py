"""Opening and saving a metric: by the name of weights, from a folder, the hub, or an official file."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from milo_latent.atomic import saving_weights, temporary_folder, write_text
from milo_latent.checkpoints import CHECKPOINT_SUFFIXES, read_checkpoint, rename_keys
from milo_latent.checks import check_finite, shortened
from milo_latent.files import write_safetensors
from milo_latent.metric.card import write_card
from milo_latent.resources import HUB_OPTIONS, available_weights, cache_dir, fetch_folder, find_weights, sha256
from milo_latent.structure import check_model_folder, read_json, read_safetensors, refusing_damage

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
METRIC_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")  # of a folder on the hub
WITHOUT_EFFECT = ("dtype", "torch_dtype", "low_cpu_mem_usage", "use_safetensors")  # options that pipelines pass
STABLE_DIFFUSION_SCALING_FACTOR = 0.18215  # of SD 1.x and 2.x, on whose latents the official MILO_L was trained


class Config(dict[str, Any]):
    """The settings that a metric was made with, read by key or as attributes, as those of diffusers' models are."""

    def __getattr__(self, name: str) -> Any:
        """Return a setting."""
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"Expected one of the settings {', '.join(self)}, got {name!r}.") from error


class PretrainedMixin(nn.Module):
    """How `MILO` is opened and saved: in folders as of diffusers' models, without importing diffusers."""

    config: Config
    if TYPE_CHECKING:  # torch's annotations have no `memory_format`

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # noqa: D102

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        **options: Any,
    ) -> Self:
        """Open a metric in float32, frozen and in evaluation mode; gradients to its inputs still flow.

        Args:
            pretrained_model_name_or_path: "official-image" or "official-latent", which are fetched into the cache on
                first use; the name of a shipped set; a folder that holds `config.json` or a folder `metric`; an
                official `.pth` file; or a hub id.
            subfolder: the folder of the metric in that folder.
            variant: opens `diffusion_pytorch_model.VARIANT.safetensors`.
            **options: those of the hub, `revision`, `cache_dir`, `token`, `local_files_only` and `force_download`; and
                `dtype`, `torch_dtype`, `low_cpu_mem_usage` and `use_safetensors`, which pipelines pass and which change
                nothing: `metric.to(dtype)` converts it.

        Returns:
            The metric.

        Raises:
            FileNotFoundError: if there is nothing of that name.
            OSError: if official weights cannot be fetched.
            ValueError: if the weights are incomplete or not those of a MILO, or an option is not supported.
        """
        unknown = sorted(options.keys() - {*HUB_OPTIONS, *WITHOUT_EFFECT})
        if unknown:
            raise ValueError(f"Expected options among {', '.join((*HUB_OPTIONS, *WITHOUT_EFFECT))}, got {unknown}.")
        source = weights_path(pretrained_model_name_or_path)
        if source.suffix.lower() in CHECKPOINT_SUFFIXES:
            given = sorted(options) + [name for name in (subfolder, variant) if name]
            if given:
                raise ValueError(f"Expected no options for the official file {source}, got {given}.")
            return cls.from_official(source)
        if not source.exists() and not source.is_absolute() and len(source.parts) == 2:
            places = (f"{subfolder}/",) if subfolder else ("", "metric/")
            source = fetch_folder(str(source), options, [f"{place}{file}" for place in places for file in METRIC_FILES])
        folder = source / (subfolder or "")
        if not subfolder and not (folder / "config.json").is_file() and (source / "metric").is_dir():
            folder = source / "metric"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"Expected metric weights, got {str(pretrained_model_name_or_path)!r}: neither a shipped set "
                f"({', '.join(available_weights())}), nor {' or '.join(OFFICIAL)}, nor a folder with config.json, "
                "nor an official .pth file."
            )
        with refusing_damage(f"Expected MILO weights in {folder}"):
            check_model_folder(folder)
            stored = read_json(folder / "config.json")
            if stored.get("_class_name", cls.__name__) != cls.__name__:
                raise ValueError(f"the configuration is that of {shortened(stored['_class_name'])}")
            config = {name: value for name, value in stored.items() if name[0] != "_"}
            with torch.device("meta"):  # the values come from the file
                metric = cls(**config)
        state = {
            name: value.float() if value.is_floating_point() else value
            for path in _weight_files(folder, variant)
            for name, value in read_safetensors(path).items()
        }
        _check_keys(folder, missing=metric.state_dict().keys() - state, unexpected=state.keys() - metric.state_dict())
        with refusing_damage(f"Expected MILO weights in {folder}"):
            metric.load_state_dict(state, assign=True)
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

    def save_pretrained(self, save_directory: str | Path, *, variant: str | None = None) -> None:
        """Write safetensors, configuration and a model card.

        A card that is there already stays; only the SHA-256 in it is renewed.

        Args:
            save_directory: a folder, made where it is missing.
            variant: such as "fp16", becomes part of the weights' file name.

        Raises:
            OSError: if the disk is full.
            ValueError: if `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"Expected a folder to save the metric in, got the file {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        with saving_weights(folder):
            write_safetensors(folder / _weights_name(variant), self.state_dict())
        config = {"_class_name": type(self).__name__, **self.config}
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_card(self, folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, made where it is missing."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def frozen(self) -> Self:
        """Return itself in evaluation mode, its parameters without gradients, in the memory layout that is fastest.

        Raises:
            ValueError: if a weight is NaN or infinite.
        """
        check_finite_weights(self)
        self.to(memory_format=torch.channels_last)
        return self.eval().requires_grad_(False)


def _weights_name(variant: str | None) -> str:
    return f"diffusion_pytorch_model{'' if variant is None else f'.{variant}'}.safetensors"


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the file of the weights; where there is none without a variant, such as in shards, all that there are."""
    path = folder / _weights_name(variant)
    paths = [path] if path.is_file() or variant else sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not paths or not paths[0].is_file():
        raise ValueError(f"Expected the weights of a metric as safetensors, found no {path}.")
    return paths


def _check_keys(folder: Path, *, missing: Set[str], unexpected: Set[str]) -> None:
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise ValueError(
                f"Expected every weight of a MILO in {folder}, {kind}: {shortened(', '.join(sorted(names)))}."
            )


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
