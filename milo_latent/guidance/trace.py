"""What guidance saw and did in each step of a run, as numbers, masks, a plot and an animation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from milo_latent.extras import import_extra
from milo_latent.guidance.curriculum import LEVELS
from milo_latent.metric.network import pixel_mean, visible_error
from milo_latent.metric.visualize import color_error_map, color_ramp
from milo_latent.pictures import to_8bit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

THUMBNAIL = 64  # cells a side at most
PICTURES_IN_PLOT = 8
ANIMATIONS = (".gif", ".webp")


@dataclass(frozen=True)
class TraceStep:
    """One call of the scheduler's step.

    Args:
        step: index in the run, from 0.
        timestep: as passed to the scheduler.
        scale: the strength in this step; 0 outside the guided interval.
        error: E between the clean estimate, before guidance, and the reference latents, (B,).
        weight: mean of what the difference to the reference is multiplied by: min(s * W * region, 1) in the mode
            *mask*, s * region in the mode *metric*, (B,).
        change: Euclidean norm of the change of the clean estimate, over that of its way to the reference, (B,).
        mask: M / LEVELS, (B, 1, h', w') in [0, 1], at most THUMBNAIL cells a side.
    """

    step: int
    timestep: float
    scale: float
    error: Tensor
    weight: Tensor
    change: Tensor
    mask: Tensor


@dataclass
class GuidanceTrace:
    """The steps of the latest run of a `MILOGuidance(..., trace=True)`, on the CPU."""

    steps: list[TraceStep] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    def __iter__(self) -> Iterator[TraceStep]:
        """Go through the steps, first to last."""
        return iter(self.steps)

    def record(
        self,
        timestep: float,
        scale: float,
        *,
        x0: Tensor,
        guided: Tensor,
        reference: Tensor,
        mask: Tensor,
        weight: Tensor,
    ) -> None:
        """Add a step: x0 before guidance and after it, r, (B, C, h, w) each, M and W, (B, 1, h, w) each."""
        difference = reference - x0
        way = difference.flatten(1).norm(dim=1).clamp(min=1e-12)
        size = (min(mask.shape[2], THUMBNAIL), min(mask.shape[3], THUMBNAIL))
        self.steps.append(
            TraceStep(
                step=len(self.steps),
                timestep=timestep,
                scale=scale,
                error=pixel_mean(visible_error(mask, dist=x0, ref=reference)).cpu(),
                weight=weight.mean(dim=(1, 2, 3)).cpu(),
                change=((guided - x0).flatten(1).norm(dim=1) / way).cpu(),
                mask=(F.adaptive_avg_pool2d(mask, size) / LEVELS).cpu(),
            )
        )

    def to_dict(self) -> dict[str, list[float]]:
        """Return the numbers of all steps as columns of a table, which has a row for each step and sample.

        Returns:
            Lists of one length by the names step, timestep, scale, sample (the index in the batch), error, weight and
            change; without the masks.
        """
        rows = [
            (step.step, step.timestep, step.scale, sample, *(getattr(step, name)[sample].item() for name in _CURVES))
            for step in self
            for sample in range(len(step.error))
        ]
        names = ("step", "timestep", "scale", "sample", *_CURVES)
        return {name: [row[index] for row in rows] for index, name in enumerate(names)}

    def to_dataframe(self) -> DataFrame:
        """Return the table of `to_dict` as a DataFrame of pandas.

        Raises:
            ImportError: without pandas, which comes with the extra "data".
        """
        return import_extra("pandas", "data", "The table of a trace").DataFrame(self.to_dict())

    def plot(self, *, sample: int = 0) -> Figure:
        """Draw error, weight and change over the steps, and the masks of some steps below.

        Args:
            sample: index in the batch of the sample to draw.

        Returns:
            A figure, which is not shown.

        Raises:
            ImportError: without matplotlib.
            ValueError: if nothing is recorded, or `sample` is not in the batch.
        """
        self._check(sample)
        plt = import_extra("matplotlib.pyplot", "plots", "The plot")
        colors = import_extra("matplotlib.colors", "plots", "The plot").ListedColormap(color_ramp().numpy())
        shown = [self.steps[int(index)] for index in torch.linspace(0, len(self) - 1, min(len(self), PICTURES_IN_PLOT))]
        figure = plt.figure(figsize=(12, 5.5), layout="constrained")
        rows: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
        curves, masks = rows
        for axes, (name, label) in zip(curves.subplots(1, len(_CURVES)), _CURVES.items(), strict=True):
            values = [getattr(step, name)[sample].item() for step in self]
            axes.plot([step.step for step in self], values, marker=".")
            axes.set(title=label, xlabel="step", ylim=(0, 1.1 * max(values) or 1.0))
            axes.grid(alpha=0.3)
        pictures = masks.subplots(1, len(shown), squeeze=False)[0]
        for axes, step in zip(pictures, shown, strict=True):
            picture = axes.imshow(step.mask[sample, 0].numpy(), vmin=0, vmax=self._largest(sample), cmap=colors)
            axes.set(title=f"step {step.step}", xticks=[], yticks=[])
        masks.colorbar(picture, ax=pictures, label="mask M / 4", shrink=0.8)
        return figure

    def write_animation(self, path: str | Path, *, sample: int = 0, side: int = 256, milliseconds: int = 300) -> None:
        """Write the masks as an animation with one frame for each step, dark where a difference is not visible.

        Args:
            path: `.gif` or `.webp`.
            sample: index in the batch.
            side: pixels of the longer side.
            milliseconds: duration of each frame.

        Raises:
            ValueError: for another suffix, if nothing is recorded, or `sample` is not in the batch.
        """
        self._check(sample)
        path = Path(path)
        if path.suffix.lower() not in ANIMATIONS:
            raise ValueError(f"Expected an animation as one of {ANIMATIONS}, got {path.name!r}.")
        frames = [self._frame(step, sample, side) for step in self]
        options: dict[str, Any] = {"lossless": True} if path.suffix.lower() == ".webp" else {}
        options |= {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
        frames[0].save(path, **options)

    def _frame(self, step: TraceStep, sample: int, side: int) -> Image.Image:
        """Return one frame: the mask in color, with the step's index, timestep and scale below."""
        height, width = step.mask.shape[2:]
        size = (round(height * side / max(height, width)), round(width * side / max(height, width)))
        painted = color_error_map(step.mask[sample : sample + 1], size=size, largest=self._largest(sample), bar=False)
        frame = Image.new("RGB", (size[1], size[0] + 16), "black")
        frame.paste(Image.fromarray(to_8bit(painted[0])))
        draw = ImageDraw.Draw(frame)
        draw.text((4, size[0] + 2), f"step {step.step}  t {step.timestep:g}  s {step.scale:.2f}", fill="white")
        return frame

    def _largest(self, sample: int) -> float:
        return max(max(step.mask[sample].max().item() for step in self), 1e-6)

    def _check(self, sample: int) -> None:
        if not self.steps:
            raise ValueError(
                "Expected a trace with steps, got none. Run a pipeline with MILOGuidance(..., trace=True)."
            )
        batch = self.steps[0].error.shape[0]
        if not 0 <= sample < batch:
            raise ValueError(f"Expected `sample` in [0, {batch - 1}], got {sample}.")


_CURVES = {
    "error": "error E before guidance",
    "weight": "mean weight of the difference",
    "change": "change / way to the reference",
}
