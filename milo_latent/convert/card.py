"""The model card of a converted pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from milo_latent.diffbir.versions import UPSCALE, TaskName, Version
from milo_latent.resources import sha256

CARD = """\
---
library_name: diffusers
pipeline_tag: image-to-image
tags: [image-restoration, diffbir]
---
# {name}

DiffBIR {version}, task {task}, converted from the official checkpoints. Only names were changed{cast}.

| part | file | SHA-256 |
| --- | --- | --- |
{rows}

The UNet predicts {prediction}; the noise schedule {end}. The official README samples with `{sampler}`, {steps} steps
and a guidance scale of {scale:g}, and enlarges {upscale:g} times.

Source: Lin et al., "DiffBIR: Towards Blind Image Restoration with Generative Diffusion Prior", ECCV 2024, repository
XPixelGroup/DiffBIR. The weights keep the licences of their owners: Stable Diffusion 2.1 that of its model card
(CreativeML Open RAIL++-M), DiffBIR's those of its repositories.
"""


def diffbir_card(
    name: str, version: Version, task: TaskName, files: Mapping[str, Path], *, dtype: object | None = None
) -> str:
    """Return the text of the card of the folder `name`; `dtype` is that of the converted files if it was changed."""
    return CARD.format(
        name=name,
        version=version.name,
        task=task,
        cast=f", and the precision to {str(dtype).removeprefix('torch.')}" if dtype is not None else "",
        rows="\n".join(f"| {part} | {path.name} | {sha256(path)} |" for part, path in files.items()),
        prediction="v" if version.prediction_type == "v_prediction" else "the noise",
        end="ends without any signal" if version.zero_snr else "keeps some signal to its end",
        sampler=version.recommended.sampler,
        steps=version.recommended.steps,
        scale=version.recommended.cfg_scale,
        upscale=UPSCALE[task],
    )
