"""Photos that are restored every so often while a restorer is trained: figures, and a sheet of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from milo_latent.files import read_image, write_image
from milo_latent.metric.network import MILO
from milo_latent.pictures import center_crop
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restore import restore_image
from milo_latent.training.data.crops import list_images, spread_over
from milo_latent.training.data.degradations import Degradation

SIDE = 256  # pixels, of the centers of validation photos


class RestorationValidator:
    """Restores the same degraded photos at every call, and writes `validation/NNNN.png`: degraded, restored, clean.

    Args:
        folder: clean photos.
        count: how many of them.
        degradation: drawn with the photo's number as seed.
        pipeline: that is trained.
        output: folder of the run.
    """

    def __init__(
        self, folder: Path, *, count: int, degradation: Degradation, pipeline: DiffBIRPipeline, output: Path
    ) -> None:
        paths = spread_over(list_images([folder]), count)
        self.clean = [center_crop(read_image(path), SIDE) for path in paths]
        self.degraded = [
            degradation(image[0], np.random.default_rng(number))[None] for number, image in enumerate(self.clean)
        ]
        self.pipeline, self.output, self.metric = pipeline, output / "validation", MILO.from_pretrained("milo-image")
        self.figures: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> dict[str, float]:
        """Return the mean PSNR in dB and the mean error E of MILO_I over the restored photos."""
        module.eval()
        settings: dict[str, Any] = {"milo_scale": 0.0, "seed": 0, "stage": "all", "fidelity": 0.0}
        restored = [restore_image(image, model=self.pipeline, **settings) for image in self.degraded]
        module.train()
        pairs = list(zip(restored, self.clean, strict=True))
        psnr = [-10 * (image - clean).square().mean().clamp_min(1e-10).log10() for image, clean in pairs]
        error = [self.metric(dist=image, ref=clean) for image, clean in pairs]
        self.figures = {
            "psnr": round(torch.stack(psnr).mean().item(), 3),
            "milo_error": round(torch.cat(error).mean().item(), 6),
        }
        rows = [torch.cat(row, dim=3) for row in zip(self.degraded, restored, self.clean, strict=True)]
        width = max(row.shape[3] for row in rows)
        sheet = torch.cat([nn.functional.pad(row, (0, width - row.shape[3])) for row in rows], dim=2)
        self.output.mkdir(parents=True, exist_ok=True)
        number = len(list(self.output.glob("*.png")))
        write_image(self.output / f"{number:04d}.png", sheet)
        return self.figures
