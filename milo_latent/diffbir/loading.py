"""Saved pipelines: a folder, or a hub repository that is fetched into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from milo_latent.atomic import make_readable, saving_weights
from milo_latent.diffbir.allowed import check_allowed
from milo_latent.diffbir.prompts import PromptCache, read_prompt_embeds, write_prompt_embeds
from milo_latent.resources import HUB_OPTIONS, fetch_folder
from milo_latent.structure import check_model_folder, open_safetensors, refusing_damage


class FolderMixin:
    """Opens and saves a pipeline together with the embeddings that it stores in place of a text encoder."""

    _prompt_cache: PromptCache | None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Open a saved pipeline. Nothing in its folder can run code, and its weights are read from safetensors only.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id. All files are fetched from the hub first, since
                diffusers refuses to load classes from there that are not its own.
            **kwargs: as in `DiffusionPipeline.from_pretrained`; `revision`, `cache_dir`, `token` and `local_files_only`
                choose what is fetched.

        Returns:
            The pipeline.

        Raises:
            FileNotFoundError: if there is no such folder, nor such a repository on the hub or in its cache.
            ValueError: if a file in it is damaged, asks for what its weights cannot fill, or would run code, if it
                names other classes, as of `check_allowed`, or if weights are missing.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            choices = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
            folder = fetch_folder(str(pretrained_model_name_or_path), choices)
        for part in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
            check_model_folder(part)
        check_allowed(folder, cls, cls._get_signature_types())  # type: ignore[attr-defined]
        stored = read_prompt_embeds(folder)
        kwargs["use_safetensors"] = True
        with refusing_damage(f"Expected a pipeline in {folder}"):
            pipeline: Self = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        for name, component in pipeline.components.items():  # type: ignore[attr-defined]
            if isinstance(component, nn.Module) and name not in kwargs:
                check_whole(component, folder / name)
        pipeline.prompt_cache.stored = stored
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Make a pipeline of the components of another, as diffusers does, and of its stored prompts."""
        made: Self = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        if isinstance(pipeline, FolderMixin):
            made.prompt_cache.stored = pipeline.prompt_cache.stored
        return made

    @property
    def prompt_cache(self) -> PromptCache:
        """Embeddings of prompts: those used last, and those that the pipeline's folder stores."""
        if self._prompt_cache is None:
            self._prompt_cache = PromptCache()
            name = getattr(self, "name_or_path", None)  # diffusers sets it after the constructor
            if name and Path(name).is_dir():
                self._prompt_cache.stored = read_prompt_embeds(name)
        return self._prompt_cache

    @prompt_cache.setter
    def prompt_cache(self, cache: PromptCache) -> None:
        self._prompt_cache = cache

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load a LoRA as diffusers' pipelines do; prompts are encoded anew."""
        self.prompt_cache.clear()
        super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the pipeline and its stored prompts.

        Args:
            save_directory: folder, made if need be.
            **kwargs: as in `DiffusionPipeline.save_pretrained`. Weights are written as safetensors, whatever
                `safe_serialization` says, since `from_pretrained` reads no others.

        Raises:
            OSError: if the disk is full.
            ValueError: for a cleaner that cannot be saved, such as `ForeignCleaner`, or a LoRA in the text encoder.
        """
        for name in ("cleaner", "background_cleaner"):
            cleaner = getattr(self, name)
            if cleaner is not None and not isinstance(cleaner, ModelMixin):
                raise ValueError(
                    f"Expected a cleaner that can be saved, got {type(cleaner).__name__}, which is opened from its own "
                    f"file. Save without it: pipe.register_modules({name}=None)."
                )
        if getattr(getattr(self, "text_encoder", None), "peft_config", None):  # transformers would save the LoRA alone
            raise ValueError(
                "Expected a text encoder without a LoRA, since a saved folder would lack its weights. Keep what the "
                "LoRA does by `fuse_lora()` and then `unload_lora_weights()`, or save the LoRA by `save_lora_weights`."
            )
        write_prompt_embeds(save_directory, self.prompt_cache.stored)
        self.register_modules(**self.components)  # type: ignore[attr-defined]  # diffusers misses `pipe.metric = ...`
        with saving_weights(save_directory):
            super().save_pretrained(save_directory, **kwargs | {"safe_serialization": True})  # type: ignore[misc]
        make_readable(*(Path(save_directory) / name for name in self.components))  # type: ignore[attr-defined]


def _is_among(name: str, keys: set[str]) -> bool:
    """Return whether a weight is among those of a file, whose names may have another prefix."""
    return name in keys or any(key.endswith(f".{name}") or name.endswith(f".{key}") for key in keys)


def check_whole(module: nn.Module, folder: str | Path) -> None:
    """Raise ValueError if weights of `module` were missing in `folder`; diffusers and transformers only warn."""
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if isinstance(module, PreTrainedModel):  # transformers fills missing weights at random
        keys: set[str] = set()
        for path in Path(folder).glob("*.safetensors"):
            with open_safetensors(path) as file:
                keys.update(file.keys())
        missing += [name for name, _ in module.named_parameters() if keys and not _is_among(name, keys)]
    if missing:
        raise ValueError(f"Expected every weight in {folder}, missing: {', '.join(missing[:4])}.")
