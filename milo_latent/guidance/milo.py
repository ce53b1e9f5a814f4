"""MILO guidance of any latent diffusion pipeline: a callback for diffusers that acts inside every denoising step."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks
from torch import Tensor

from milo_latent.checks import check_batch, check_choice, check_finite, check_range, check_region
from milo_latent.guidance.base import GuidedRun, SchedulerGuidance
from milo_latent.guidance.coefficients import step_coefficients
from milo_latent.guidance.curriculum import AnySchedule, check_schedule, curriculum_weight
from milo_latent.guidance.reference import (
    check_latent_space,
    encode_reference,
    match_reference,
    match_region,
)
from milo_latent.guidance.trace import GuidanceTrace
from milo_latent.guidance.x0 import (
    OBJECTIVES,
    Objective,
    gradient_push,
    masked_pull,
    predict_original_sample,
    shift_model_output,
)
from milo_latent.metric.network import MILO, check_metric

Mode = Literal["mask", "metric"]
MODES: tuple[str, ...] = get_args(Mode)
Strength = float | Callable[[float], float]


class MILOGuidance(SchedulerGuidance):
    """Pull the clean estimate of every denoising step to reference latents, where and when MILO's curriculum says.

    Give it as `callback_on_step_end` to `DiffBIRPipeline`, which knows its reference latents and guides every step.
    Around a stock pipeline use `with guide.attach(pipe):`. As a plain callback of a stock pipeline it misses the first
    step. Nothing is decoded.

    Args:
        metric: MILO_L for the pipeline's latents; it is moved to the latents' device, and computes in float32.
        milo_scale: s, or a function of the timestep. Mode *mask*: in [0, 1], the mean fraction of the way to the
            reference latents in each step; mode *metric*: >= 0, the length of the push in lengths of that way. 0
            changes no bit.
        schedule: of the curriculum: "constant", "linear", "cosine", or a function from progress to alpha in [0, 1].
        start: fraction of the denoising steps at which guidance begins.
        stop: fraction at which it ends.
        reference_latents: r, (B, C, h, w) or (1, C, h, w); may be left out for `DiffBIRPipeline`.
        mode: "mask", x0 + min(s * W, 1) * (r - x0), or "metric", x0 - s * n(grad of the objective).
        objective: of the mode *metric*: "weighted", mean(W * |x0 - r|), or "milo", the raw error E.
        region: where to guide, (B or 1, 1, h, w), >= 0: the change is multiplied by it; None guides everywhere alike.
        trace: whether to record each step; `guide.trace` is the record of the latest run.

    Raises:
        TypeError: if `metric` is no MILO.
        ValueError: for values outside their range.

    Source: own (design, section 4); the curriculum is MILO's (ACM TOG 44(6), 2025).
    """

    def __init__(
        self,
        metric: MILO,
        milo_scale: Strength = 0.5,
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
        check_metric(metric)
        check_choice("mode", mode, MODES)
        check_choice("objective", objective, OBJECTIVES)
        self.mode, self.objective = mode, objective
        if not callable(milo_scale):
            self._check_scale(milo_scale)
            milo_scale = float(milo_scale)
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
        self.metric, self.region = metric, region
        self.milo_scale, self.schedule, self.start, self.stop = milo_scale, schedule, start, stop
        self.trace: GuidanceTrace | None = GuidanceTrace() if trace else None

    reference_from_image = staticmethod(encode_reference)

    def begin_run(self, reference_latents: Tensor | None, num_steps: int, *, steps_done: int = 0) -> GuidedRun:
        """Return a new run, after checks; arguments and errors as of `run`."""
        run = super().begin_run(reference_latents, num_steps, steps_done=steps_done)
        check_batch("reference_latents", run.reference_latents, self.metric.config.channels)
        check_finite("reference_latents", run.reference_latents)
        with torch.inference_mode(False):  # weights moved inside it could never again take part in a gradient
            self.metric.to(run.reference_latents.device).float()
        if self.trace is not None:
            self.trace = GuidanceTrace()
        return run

    def check_pipeline(self, pipeline: DiffusionPipeline) -> None:
        """Raise ValueError unless guidance knows the pipeline's scheduler, and the metric its latents."""
        super().check_pipeline(pipeline)
        check_latent_space(self.metric, getattr(pipeline, "vae", None), type(pipeline).__name__)

    def guided_model_output(
        self, scheduler: SchedulerMixin, model_output: Tensor, timestep: Tensor | float | int, sample: Tensor
    ) -> Tensor:
        """Return the model output that predicts the guided clean latents; counts as one step of the run.

        Args:
            scheduler: about to step.
            model_output: after classifier-free guidance, (B, C, h, w).
            timestep: as passed to `scheduler.step`.
            sample: noisy latents, as passed to `scheduler.step`, (B, C, h, w).

        Returns:
            Model output, (B, C, h, w); `model_output` itself outside the guided interval or at scale 0.

        Raises:
            ValueError: for an unknown scheduler, or reference latents whose shape does not fit.
            RuntimeError: outside of `run`.
        """
        if self._run is None:
            raise RuntimeError("Guidance works inside `with guide.run(...)` or `with guide.attach(pipe):` only.")
        fraction = min(self._run.step / max(self._run.num_steps - 1, 1), 1.0)
        self._run.step += 1
        scale = self._scale_at(timestep) if self.start <= fraction <= self.stop else 0.0
        if scale == 0.0 and self.trace is None:
            return model_output
        progress = (fraction - self.start) / (self.stop - self.start) if self.stop > self.start else 1.0
        coefficients = step_coefficients(scheduler, timestep)
        x0 = predict_original_sample(model_output, sample, coefficients)
        guided = self.guided_original_sample(x0, min(max(progress, 0.0), 1.0), scale=scale, timestep=float(timestep))
        return model_output if scale == 0.0 else shift_model_output(model_output, guided - x0, coefficients)

    def guided_original_sample(
        self, pred_original_sample: Tensor, progress: float, *, scale: float, timestep: float
    ) -> Tensor:
        """Return the guided x0 of a step of the run.

        Args:
            pred_original_sample: x0, (B, C, h, w) float32.
            progress: share of the guided steps already done, in [0, 1].
            scale: the strength in this step.
            timestep: for the record.

        Returns:
            Guided x0, (B, C, h, w) float32.

        Raises:
            ValueError: if the reference latents or the region do not fit `pred_original_sample`.
        """
        assert self._run is not None
        x0, reference = pred_original_sample, match_reference(self._run.reference_latents, pred_original_sample)
        region = match_region(self.region, x0)
        if self.mode == "mask":
            with torch.no_grad():
                mask = self.metric.mask(dist=x0, ref=reference)  # (B, 1, h, w)
            weight = curriculum_weight(mask, progress, schedule=self.schedule) * region
            guided, applied = masked_pull(x0, reference, weight, milo_scale=scale), (scale * weight).clamp(max=1.0)
        else:
            pushed, mask = gradient_push(
                x0,
                reference,
                find_mask=lambda dist, ref: self.metric.mask(dist=dist, ref=ref),
                find_weight=lambda mask: curriculum_weight(mask, progress, schedule=self.schedule),
                milo_scale=scale,
                objective=self.objective,
            )
            guided, applied = x0 + region * (pushed - x0), (scale * region).expand_as(mask)
        if self.trace is not None:
            self.trace.record(
                timestep=timestep, scale=scale, pred_original_sample=x0, guided=guided, reference_latents=reference,
                mask=mask, weight=applied,
            )  # fmt: skip
        return guided

    def _scale_at(self, timestep: Tensor | float | int) -> float:
        if not callable(self.milo_scale):
            return self.milo_scale
        scale = float(self.milo_scale(float(timestep)))
        self._check_scale(scale)
        return scale

    def _check_scale(self, scale: float) -> None:
        if not isinstance(scale, Real):
            raise ValueError(f"Expected `milo_scale` as a number or a function of the timestep, got {scale!r}.")
        if self.mode == "mask":
            check_range("milo_scale", scale, 0.0, 1.0, "It is the mean fraction of the way to the reference latents.")
        elif not (scale >= 0 and math.isfinite(scale)):
            raise ValueError(f"Expected `milo_scale` of at least 0, got {scale}. It is the length of the push.")


def find_guidance(callback: Any, pipeline: DiffusionPipeline | None = None) -> list[SchedulerGuidance]:
    """Return the guidance in `callback`: itself, or those among `MultiPipelineCallbacks`.

    Args:
        callback: what a pipeline was given as `callback_on_step_end`.
        pipeline: checked by each, before it works.

    Raises:
        ValueError: if one of them cannot guide `pipeline`.
    """
    callbacks = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
    guides = [entry for entry in callbacks if isinstance(entry, SchedulerGuidance)]
    for guide in guides if pipeline is not None else []:
        guide.check_pipeline(pipeline)
    return guides


def _for_config(value: Any) -> Any:
    """Return what a configuration file can hold: a function by its name, which loading refuses, so that it is seen."""
    return f"<function {getattr(value, '__name__', type(value).__name__)}>" if callable(value) else value
