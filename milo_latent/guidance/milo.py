"""MILO guidance: pull each clean estimate towards reference latents, where and when MILO's curriculum says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from milo_latent.checks import check_batch, check_choice, check_finite, check_range, check_region
from milo_latent.guidance.base import Guide
from milo_latent.guidance.curriculum import AnySchedule, check_schedule, curriculum_weight
from milo_latent.guidance.reference import check_latent_space, encode_reference, match_reference, match_region
from milo_latent.guidance.trace import GuidanceTrace
from milo_latent.guidance.x0 import OBJECTIVES, Objective, gradient_push, masked_pull
from milo_latent.metric.network import MILO, open_metric

Mode = Literal["mask", "metric"]


class MILOGuidance(Guide):
    """Pull the clean estimate of every denoising step to reference latents, where and when MILO's curriculum says.

    Give it as `callback_on_step_end` to `DiffBIRPipeline`, which knows its reference latents; around other pipelines
    use `with guide.attach(pipe):`. Nothing is decoded.

    Args:
        metric: MILO_L for the pipeline's latents, or what `MILO.from_pretrained` takes, such as "milo-sd"; it is moved
            to the latents' device, and computes in float32.
        milo_scale: s, or a function of the timestep: in the mode *mask* the mean fraction of the way to r in each step,
            in [0, 1]; in the mode *metric* the length of the push in lengths of that way, >= 0. 0 changes no bit.
        schedule: "constant", "linear", "cosine", or a function from progress to alpha in [0, 1].
        start: of the guided interval, as a fraction of the denoising steps.
        stop: end of the guided interval.
        reference_latents: r, (B, C, h, w) or (1, C, h, w); may be left out for `DiffBIRPipeline`.
        mode: "mask", x0 + min(s * W, 1) * (r - x0), or "metric", x0 - s * n(grad of the objective).
        objective: "weighted", mean(W * |x0 - r|), or "milo", the error E, whose gradient can close the mask rather than
            the difference.
        region: factor of the change, (B or 1, 1, h, w), >= 0; None guides everywhere alike.
        trace: whether to record each step; `guide.trace` is the record of the latest run.

    Raises:
        TypeError: if `metric` is none.
        ValueError: for values outside their range.

    Source: own; the idea of the curriculum is MILO's (ACM TOG 44(6), 2025), its formula ours (`curriculum_weight`).
    """

    def __init__(
        self,
        metric: MILO | str | Path,
        milo_scale: float | Callable[[float], float] = 0.5,
        schedule: AnySchedule = "cosine",
        start: float = 0.0,
        stop: float = 1.0,
        reference_latents: Tensor | None = None,
        *,
        mode: Mode = "mask",
        objective: Objective = "weighted",
        region: Tensor | None = None,
        trace: bool = False,
    ) -> None:
        super().__init__(reference_latents)
        metric = open_metric(metric)
        check_choice("mode", mode, get_args(Mode))
        check_choice("objective", objective, OBJECTIVES)
        self.mode: Mode = mode
        milo_scale = milo_scale if callable(milo_scale) else self._checked(milo_scale)
        check_schedule(schedule)
        check_range("start", start, 0.0, 1.0, "It is a fraction of the denoising steps.")
        check_range("stop", stop, start, 1.0, "It is a fraction of the denoising steps, not before `start`.")
        if reference_latents is not None:
            check_batch("reference_latents", reference_latents, metric.config.channels)
        if region is not None:
            check_region(region)
        # not by diffusers' decorator, which would write the metric into the configuration where it is given by position
        self.register_to_config(
            milo_scale=_for_config(milo_scale), schedule=_for_config(schedule), start=start, stop=stop, mode=mode,
            objective=objective,
        )  # fmt: skip
        self.metric, self.region, self.milo_scale, self.schedule = metric, region, milo_scale, schedule
        self.interval, self.objective = (start, stop), objective
        self.trace: GuidanceTrace | None = GuidanceTrace() if trace else None

    reference_from_image = staticmethod(encode_reference)

    def bind(self, pipeline: DiffusionPipeline) -> None:
        """Raise ValueError unless the metric knows the latents of `pipeline`."""
        check_latent_space(self.metric, getattr(pipeline, "vae", None), type(pipeline).__name__)

    def start(self, reference: Tensor, num_steps: int) -> None:
        """Begin a run: check the reference latents, move the metric to their device, and empty the trace."""
        super().start(reference, num_steps)
        check_finite("reference_latents", self.reference)
        with torch.inference_mode(False):  # weights moved inside it could never again take part in a gradient
            self.metric.to(reference.device).float()
        if self.trace is not None:
            self.trace = GuidanceTrace()

    def active(self, progress: float, timestep: float) -> bool:
        """Return whether the step is guided, or recorded in the trace."""
        return self.trace is not None or (self.milo_scale != 0.0 and self.interval[0] <= progress <= self.interval[1])

    def guide_x0(self, x0: Tensor, *, progress: float, timestep: float) -> Tensor:
        """Return the guided x0, (B, C, h, w) float32; `x0` itself outside the interval and at scale 0."""
        start, stop = self.interval
        scale = self.milo_scale if start <= progress <= stop else 0.0
        scale = self._checked(float(scale(timestep))) if callable(scale) else scale
        if scale == 0.0 and self.trace is None:
            return x0
        within = min(max((progress - start) / (stop - start), 0.0), 1.0) if stop > start else 1.0
        find_weight = partial(curriculum_weight, progress=within, schedule=self.schedule)
        reference, region = match_reference(self.reference, x0), match_region(self.region, x0)
        if self.mode == "mask":
            with torch.no_grad():
                mask = self.metric.mask(dist=x0, ref=reference)  # (B, 1, h, w)
            weight = find_weight(mask) * region
            guided, applied = masked_pull(x0, reference, weight, milo_scale=scale), (scale * weight).clamp(max=1.0)
        else:
            pushed, mask = gradient_push(
                x0, reference, find_mask=self.metric.mask, find_weight=find_weight, milo_scale=scale,
                objective=self.objective,
            )  # fmt: skip
            guided, applied = x0 + region * (pushed - x0), (scale * region).expand_as(mask)
        if self.trace is not None:
            self.trace.record(timestep, scale, x0=x0, guided=guided, reference=reference, mask=mask, weight=applied)
        return x0 if scale == 0.0 else guided

    def _checked(self, scale: float) -> float:
        if not isinstance(scale, Real):
            raise ValueError(f"Expected `milo_scale` as a number or a function of the timestep, got {scale!r}.")
        high, meaning = (1.0, "mean fraction of") if self.mode == "mask" else (1e6, "length of the push over that of")
        check_range("milo_scale", scale, 0.0, high, f"It is the {meaning} the way to the reference latents.")
        return float(scale)


def _for_config(value: Any) -> Any:
    """Return what a configuration file can hold: a function by its name, which loading refuses, so that it is seen."""
    return f"<function {getattr(value, '__name__', type(value).__name__)}>" if callable(value) else value
