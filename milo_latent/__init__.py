"""MILO for diffusers: perceptual optimization in the latent space of diffusion models.

Public names are imported when they are first used, so that `import milo_latent` stays fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "DiffBIRPipeline": "milo_latent.pipelines.diffbir",
    "IRControlNet": "milo_latent.diffbir.ircontrolnet",
    "MILO": "milo_latent.metric.network",
    "MILOGuidance": "milo_latent.guidance.milo",
    "MILOLoss": "milo_latent.metric.loss",
    "MILOOutput": "milo_latent.metric.output",
    "BSRNet": "milo_latent.diffbir.bsrnet",
    "ResidualCleaner": "milo_latent.diffbir.residual_cleaner",
    "RestorationSettings": "milo_latent.restoration.settings",
    "SCUNet": "milo_latent.diffbir.scunet",
    "SwinIR": "milo_latent.diffbir.swinir",
    "color_error_map": "milo_latent.metric.visualize",
    "convert_diffbir": "milo_latent.convert.diffbir",
    "curriculum_weight": "milo_latent.guidance.curriculum",
    "decode_latents": "milo_latent.latents.codec",
    "encode_image": "milo_latent.latents.codec",
    "load_restorer": "milo_latent.restoration.restorer",
    "load_upscaler": "milo_latent.diffbir.foreign_cleaner",
    "read_image": "milo_latent.files",
    "read_latents": "milo_latent.files",
    "restore_faces": "milo_latent.restoration.faces",
    "restore_image": "milo_latent.restoration.restore",
    "weights_dir": "milo_latent.resources",
    "write_image": "milo_latent.files",
    "write_latents": "milo_latent.files",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'milo_latent' has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
