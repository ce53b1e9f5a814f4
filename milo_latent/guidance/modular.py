"""MILO guidance as a block of diffusers' modular pipelines, and folders of blocks that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks

from milo_latent.atomic import write_text
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.guidance.x0 import guide_model_output
from milo_latent.metric.network import MILO


class MILOGuidanceStep(ModularPipelineBlocks):
    """Guides a step of a modular pipeline's loop: a leaf block between its denoiser and its scheduler's step.

    `loop.sub_blocks.insert("milo_guidance", MILOGuidanceStep(), 2)` puts it there. It rewrites `noise_pred`, bit for
    bit as `MILOGuidance.attach` does. The metric is the component "metric". A guider cannot do this: `BaseGuidance`
    sees neither the sample nor its sigma.
    """

    _guide: MILOGuidance | None = None  # of the current run

    @property
    def description(self) -> str:
        """What the block is for."""
        return "Pulls the clean estimate of a step to reference latents, where and when MILO's curriculum says."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """MILO_L for the pipeline's latents; the scheduler is the loop's."""
        return [ComponentSpec("metric", MILO)]

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments of `MILOGuidance`, and what the loop keeps."""
        return [
            InputParam("reference_latents", required=True, description="scaled latents, (B, C, h, w) or (1, C, h, w)"),
            InputParam("milo_scale", default=0.5, description="0 leaves the step as it is, 1 pulls all the way"),
            InputParam("milo_schedule", default="cosine", description="constant, linear or cosine"),
            InputParam("milo_interval", default=(0.0, 1.0), description="start and stop, as fractions of the steps"),
            InputParam("milo_mode", default="mask", description="mask or metric"),
            InputParam("timesteps", required=True),
            InputParam("latents", required=True),
        ]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        """Guide step `i`, at timestep `t`."""
        num_steps, reference = len(block_state.timesteps), block_state.reference_latents
        if i == 0 or self._guide is None:
            start, stop = block_state.milo_interval
            self._guide = MILOGuidance(
                components.metric, block_state.milo_scale, block_state.milo_schedule, start, stop,
                reference_latents=reference, mode=block_state.milo_mode,
            )  # fmt: skip
            self._guide.bind(components)
            self._guide.start(reference.to(block_state.latents.device), num_steps)
        block_state.noise_pred = guide_model_output(
            [self._guide], components.scheduler, block_state.noise_pred, t, block_state.latents,
            progress=i / max(num_steps - 1, 1), shape=reference.shape[1:],
        )  # fmt: skip
        if i == num_steps - 1:
            self._guide = None
        return components, block_state


def save_blocks(blocks: ModularPipelineBlocks, folder: str | Path) -> None:
    """Save blocks of this package in a folder that `ModularPipelineBlocks.from_pretrained` loads as custom code.

    Beside the configuration, which names a file and a class, it writes that file, which imports the class from here.
    """
    cls = type(blocks)
    blocks.save_pretrained(folder)
    write_text(
        Path(folder) / f"{cls.__module__.rpartition('.')[2]}.py",
        f'"""Custom block of diffusers; it needs `pip install milo_latent`."""\n\n'
        f"from {cls.__module__} import {cls.__name__}  # noqa: F401 (diffusers looks for it here)\n",
    )
