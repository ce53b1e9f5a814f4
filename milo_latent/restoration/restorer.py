"""A pipeline, the metric that guides it, and what is known of both: opened by one call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin

from milo_latent.diffbir.loading import open_cleaner
from milo_latent.diffbir.release import RELEASE_FILE, Release, read_release, release_text
from milo_latent.files import make_readable, write_text
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.resources import available_weights, weights_dir

BACKGROUND_FOLDER, METRIC_FOLDER = "background_cleaner", "metric"


@dataclass(frozen=True)
class Restorer:
    """A pipeline and the metric that guides it.

    Args:
        pipeline: on its device.
        metric: MILO_L for the pipeline's latents; None if there is none, and so no guidance.
        release: which official DiffBIR the pipeline is; None for other models.
        background_cleaner: stage 1 of what is around faces, where it is another than that of the faces.
    """

    pipeline: DiffBIRPipeline
    metric: MILO | None
    release: Release | None = None
    background_cleaner: ModelMixin | None = None

    def for_background(self) -> Restorer:
        """Return the same with the cleaner for what is around faces; the networks are shared."""
        if self.background_cleaner is None:
            return self
        pipeline = DiffBIRPipeline(**{**self.pipeline.components, "cleaner": self.background_cleaner})
        pipeline.prompt_cache = self.pipeline.prompt_cache  # with the prompts that need no text encoder
        pipeline._tiles = self.pipeline._tiles
        pipeline.set_progress_bar_config(**getattr(self.pipeline, "_progress_bar_config", {}))
        return replace(self, pipeline=pipeline, background_cleaner=None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save everything that `load_restorer` opens again.

        Args:
            folder: made if need be.

        Raises:
            OSError: if the disk is full.
        """
        target = Path(folder)
        self.pipeline.save_pretrained(target)
        if self.metric is not None:
            self.metric.save_pretrained(target / METRIC_FOLDER)
        if self.background_cleaner is not None:
            self.background_cleaner.save_pretrained(target / BACKGROUND_FOLDER)
            make_readable(target / BACKGROUND_FOLDER)
        if self.release is not None:
            write_text(target / RELEASE_FILE, release_text(self.release.version, self.release.task))


def best_device() -> str:
    """Return "cuda", "mps" or "cpu", the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_restorer(
    model: str | Path = "nano",
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    metric: str | Path | None = None,
) -> Restorer:
    """Open a pipeline with its metric.

    Args:
        model: the name of a shipped set, a pipeline folder (`milo-latent convert` makes one), or a hub id; its `metric`
            folder is the metric. A converted official DiffBIR comes with its own sampler.
        device: "cpu", "cuda", "mps"; None takes the best there is.
        dtype: of the networks; None means float32, whatever the files hold.
        metric: MILO_L instead of the model's own: what `MILO.from_pretrained` takes.

    Returns:
        Pipeline and metric, frozen.

    Raises:
        FileNotFoundError: if there is no such model, or a metric only.
        ValueError: if there is no such device, or weights are missing.
    """
    folder = weights_dir(str(model)) if str(model) in available_weights() else Path(model)
    if not folder.is_dir() and (folder.is_absolute() or str(model).count("/") != 1):
        raise FileNotFoundError(
            f"Expected a model, got {str(model)!r}: neither a shipped set ({', '.join(available_weights())}), "
            "nor a folder, nor a hub id such as owner/name."
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"Expected a pipeline, got {str(model)!r}, which has no model_index.json: a metric alone, perhaps."
        )
    source = folder if folder.is_dir() else str(model)
    pipeline = DiffBIRPipeline.from_pretrained(source, dtype=dtype or torch.float32)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)  # gradients to images and latents still flow
    folder, target = Path(pipeline.name_or_path), _check_device(device or best_device())
    if target == "cpu" and isinstance(pipeline.vae, AutoencoderKL):
        pipeline.vae.to(memory_format=torch.channels_last)  # 5 % faster there (docs/diffbir.md); slower for the UNet
    background = None
    if (folder / BACKGROUND_FOLDER).is_dir():
        background = open_cleaner(folder / BACKGROUND_FOLDER, dtype=dtype or torch.float32).to(target)
    return Restorer(pipeline.to(target), _open_metric(metric, folder), read_release(folder), background)


def _open_metric(chosen: str | Path | None, folder: Path) -> MILO | None:
    if chosen is not None:
        return MILO.from_pretrained(chosen)
    return MILO.from_pretrained(folder / METRIC_FOLDER) if (folder / METRIC_FOLDER).is_dir() else None


def _check_device(name: str) -> str:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, by device and by build
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"Expected a device that is there, such as {best_device()!r}, got {name!r}: {first_line}"
        ) from error
    return name
