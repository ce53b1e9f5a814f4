"""Pipelines opened by one call: shipped, from a folder or from the hub, on the best device."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from milo_latent.checks import shortened
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.provenance import weights_digest
from milo_latent.resources import available_weights, find_weights


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
) -> DiffBIRPipeline:
    """Open a pipeline, frozen, with its metric as `pipe.metric`.

    Args:
        model: the name of a shipped set, a pipeline folder (`milo-latent convert` makes one), or a hub id. A converted
            official DiffBIR comes with its own sampler.
        device: "cpu", "cuda", "mps"; None takes the best there is.
        dtype: of the networks; None means float32, whatever the files hold. The metric stays in float32.
        metric: MILO_L instead of the model's own: what `MILO.from_pretrained` takes.

    Returns:
        The pipeline on its device. Gradients to images and latents still flow.

    Raises:
        FileNotFoundError: if there is no such model, or a metric only.
        ValueError: if there is no such device, or weights are missing.
    """
    folder = find_weights(model)
    if not folder.is_dir() and (folder.is_absolute() or str(model).count("/") != 1):
        raise FileNotFoundError(
            f"Expected a model, got {str(model)!r}: neither a shipped set ({', '.join(available_weights())}), "
            "nor a folder, nor a hub id such as owner/name."
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"Expected a pipeline, got {str(model)!r}, which has no model_index.json: a metric alone, perhaps."
        )
    target = find_device(device)
    chosen = {} if metric is None else {"metric": MILO.from_pretrained(metric)}
    source = folder if folder.is_dir() else str(model)
    pipeline = DiffBIRPipeline.from_pretrained(source, dtype=dtype or torch.float32, **chosen)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if target == "cpu" and isinstance(pipeline.vae, AutoencoderKL):
        pipeline.vae.to(memory_format=torch.channels_last)  # 5 % faster there (docs/benchmarks.md); slower for the UNet
    return pipeline.to(target)


def find_device(name: str | None = None) -> str:
    """Return the device of a name; None takes the best there is.

    Raises:
        ValueError: if there is no such device.
    """
    if name is None:
        return best_device()
    try:
        torch.zeros(1, device=name).item()  # the device "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, by device and by build
        reason = shortened(str(error).splitlines()[0])
        raise ValueError(
            f"Expected a device that is there, such as {best_device()!r}, got {shortened(name)!r}: {reason}"
        ) from error
    return name


def pipeline_digest(pipeline: DiffBIRPipeline) -> str:
    """Return the digest of all that a pipeline's results depend on: its components and the prompts that it stores."""
    prompts = {f"prompt {text}": embeds for text, embeds in pipeline.prompt_cache.stored.items()}
    return weights_digest(pipeline.components | prompts)
