"""Saved pipelines: a folder, or a hub repository that is fetched into one; saved cleaners."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.cleaner import Cleaner
from milo_latent.diffbir.prompt_cache import PromptCache
from milo_latent.diffbir.prompts import read_prompt_embeds, write_prompt_embeds
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.swinir import SwinIR

CLEANERS = {cls.__name__: cls for cls in (BSRNet, ResidualCleaner, SCUNet, SwinIR)}
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def pipeline_folder(name: str | Path, arguments: dict[str, Any]) -> Path:
    """Return the folder of a saved pipeline, fetched first if need be.

    Args:
        name: a folder, or a hub id.
        arguments: of `from_pretrained`; those that choose what is fetched are taken out.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such folder, nor such a repository on the hub or in its cache.
    """
    if Path(name).is_dir():
        return Path(name)
    choices = {key: arguments.pop(key) for key in HUB_ARGUMENTS if key in arguments}
    try:
        return Path(snapshot_download(str(name), **choices))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"Expected a pipeline folder or a hub id, got {str(name)!r}, which is no folder here and could not be "
            f"fetched ({type(error).__name__}). Pass a folder downloaded by hand."
        ) from error


class FolderMixin:
    """Opens and saves a pipeline together with the embeddings of its default prompts, where it has no text encoder."""

    prompt_cache: PromptCache

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Open a saved pipeline.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id, whose files are fetched first: diffusers would refuse
                the hub's folders of classes that are not its own.
            **kwargs: as of `DiffusionPipeline.from_pretrained`; `revision`, `cache_dir`, `token` and `local_files_only`
                choose what is fetched.

        Returns:
            The pipeline.

        Raises:
            FileNotFoundError: if there is no such folder, nor such a repository on the hub or in its cache.
        """
        folder = pipeline_folder(pretrained_model_name_or_path, kwargs)
        pipeline: Self = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        pipeline.prompt_cache.stored = read_prompt_embeds(folder)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the pipeline and its stored prompts; `Restorer.save_pretrained` keeps the metric and the release too.

        Args:
            save_directory: folder, made if need be.
            **kwargs: as of `DiffusionPipeline.save_pretrained`.

        Raises:
            OSError: if the disk is full.
        """
        write_prompt_embeds(save_directory, self.prompt_cache.stored)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


def open_cleaner(folder: str | Path, *, dtype: torch.dtype) -> ModelMixin:
    """Open a saved cleaner, whichever it is.

    Args:
        folder: with its configuration.
        dtype: of its weights.

    Returns:
        The cleaner.

    Raises:
        ValueError: if it is of another class.
    """
    name = str(Cleaner.load_config(folder).get("_class_name"))
    if name not in CLEANERS:
        raise ValueError(f"Expected a cleaner of the classes {sorted(CLEANERS)} in {folder}, got {name}.")
    return CLEANERS[name].from_pretrained(folder, dtype=dtype).eval()
