"""The same guided step for any Stable Diffusion pipeline: a callback for diffusers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from milo_latent.checks import check_batch, check_choice, check_range
from milo_latent.guidance.curriculum import SCHEDULES, Schedule, curriculum_weight
from milo_latent.guidance.step import masked_pull, predict_original_sample, shift_model_output, step_coefficients
from milo_latent.metric.network import MILO


@dataclass
class _GuidedRun:
    """One run of a pipeline: what it is pulled towards, how many steps it has, how many are done."""

    reference_latents: Tensor  # (B, C, h, w) float32
    num_steps: int
    step: int = 0


class MILOGuidance(PipelineCallback):
    """Pull the clean estimate of every denoising step to reference latents, where and when MILO's curriculum says.

    Give it as `callback_on_step_end` to `DiffBIRPipeline`, which knows its reference latents and guides every step.
    Around a stock pipeline use `with guide.attach(pipe):`. As a plain callback of a stock pipeline it misses the first
    step. Nothing is decoded.

    Args:
        metric: MILO_L for the pipeline's latents; its copy of the weights is moved to the latents' device.
        milo_scale: s, in [0, 1], the mean fraction of the way to the reference latents in each step; 0 changes no bit.
        schedule: of the curriculum: "constant", "linear" or "cosine".
        start: fraction of the denoising steps at which guidance begins.
        stop: fraction at which it ends.
        reference_latents: r, (B, C, h, w) or (1, C, h, w); may be left out for `DiffBIRPipeline`.

    Raises:
        ValueError: for values outside their range.

    Source: own (design, section 4); the curriculum is MILO's (ACM TOG 44(6), 2025).
    """

    tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        metric: MILO,
        milo_scale: float = 0.5,
        schedule: Schedule = "cosine",
        start: float = 0.0,
        stop: float = 1.0,
        reference_latents: Tensor | None = None,
    ) -> None:
        check_range("milo_scale", milo_scale, 0.0, 1.0, "It is the mean fraction of the way to the reference latents.")
        check_choice("schedule", schedule, SCHEDULES)
        check_range("start", start, 0.0, 1.0, "It is a fraction of the denoising steps.")
        check_range("stop", stop, start, 1.0, "It is a fraction of the denoising steps, not before `start`.")
        if reference_latents is not None:
            check_batch("reference_latents", reference_latents, metric.config.channels)
        # not by diffusers' decorator, which would write the metric into the configuration where it is given by position
        self.register_to_config(milo_scale=milo_scale, schedule=schedule, start=start, stop=stop)
        self.metric = metric
        self.milo_scale, self.schedule, self.start, self.stop = milo_scale, schedule, start, stop
        self.reference_latents = reference_latents
        self._run: _GuidedRun | None = None
        self._hook = ExitStack()  # holds `attach`, where a plain callback has to

    # One run

    @contextmanager
    def run(self, reference_latents: Tensor | None, num_steps: int, *, steps_done: int = 0) -> Iterator[MILOGuidance]:
        """Guide the steps taken inside this block; pipelines with a loop of their own open it around that loop.

        Args:
            reference_latents: r, (B, C, h, w), used where the constructor was given none.
            num_steps: the number of calls of `scheduler.step` in the whole run.
            steps_done: how many of them were made already.

        Raises:
            ValueError: if there are no reference latents, or they are not as many or as wide as the metric needs.
        """
        reference = self.reference_latents if self.reference_latents is not None else reference_latents
        if reference is None:
            raise ValueError("Expected reference latents to pull towards, got none. Pass `reference_latents=`.")
        check_batch("reference_latents", reference, self.metric.config.channels)
        self.metric.to(reference.device).float()
        previous, self._run = self._run, _GuidedRun(reference.detach().float(), num_steps, steps_done)
        try:
            yield self
        finally:
            self._run = previous

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
        if self.milo_scale == 0.0 or not self.start <= fraction <= self.stop:
            return model_output
        progress = (fraction - self.start) / (self.stop - self.start) if self.stop > self.start else 1.0
        coefficients = step_coefficients(scheduler, timestep)
        x0 = predict_original_sample(model_output, sample, coefficients)
        guided = self.guided_original_sample(x0, min(max(progress, 0.0), 1.0))
        return shift_model_output(model_output, guided - x0, coefficients)

    def guided_original_sample(self, pred_original_sample: Tensor, progress: float) -> Tensor:
        """Return the guided x0 of a step of the run.

        Args:
            pred_original_sample: x0, (B, C, h, w) float32.
            progress: share of the guided steps already done, in [0, 1].

        Returns:
            Guided x0, (B, C, h, w) float32.

        Raises:
            ValueError: if the reference latents do not fit `pred_original_sample`.
        """
        assert self._run is not None
        reference = _match_batch(self._run.reference_latents, pred_original_sample)
        with torch.no_grad():
            mask = self.metric.mask(dist=pred_original_sample, ref=reference)  # (B, 1, h, w)
        weight = curriculum_weight(mask, progress, schedule=self.schedule)
        return masked_pull(pred_original_sample, reference, weight, milo_scale=self.milo_scale)

    # Stock pipelines

    @contextmanager
    def attach(self, pipeline: DiffusionPipeline, *, steps_done: int = 0) -> Iterator[MILOGuidance]:
        """Guide every step of any pipeline called inside this block, by wrapping its scheduler's `step`.

        Args:
            pipeline: with a `scheduler`; it is left as it was, also when a call fails.
            steps_done: steps of the first call that were taken before this block was entered.

        Raises:
            ValueError: if this guidance has no reference latents.
        """
        scheduler: Any = pipeline.scheduler
        if self.reference_latents is None:
            raise ValueError("Expected `reference_latents` for a stock pipeline, got none. Pass them to MILOGuidance.")
        reference, original, timesteps, calls = self.reference_latents, scheduler.step, None, ExitStack()

        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal timesteps, steps_done
            if timesteps is not scheduler.timesteps:  # `set_timesteps` makes a new tensor in each call of a pipeline
                timesteps = scheduler.timesteps
                calls.close()
                left = len(timesteps) - int((timesteps == timestep).nonzero()[0])
                calls.enter_context(self.run(reference.to(sample.device), left + steps_done, steps_done=steps_done))
                steps_done = 0
            model_output = self.guided_model_output(scheduler, model_output, timestep, sample)
            return original(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = step
        try:
            yield self
        finally:
            del scheduler.step
            calls.close()

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Do nothing where the pipeline guides by itself; else guide the steps that follow this one.

        Args:
            pipeline: that called.
            step_index: of the step just taken.
            timestep: of that step.
            callback_kwargs: returned as they came.

        Returns:
            `callback_kwargs`.

        Raises:
            ValueError: if a stock pipeline calls and there are no reference latents.
        """
        last = step_index >= pipeline.num_timesteps - 1
        if step_index == 0 or last:  # at 0: left behind by a run that failed
            self._hook.close()
        if self._run is None and not last:
            warnings.warn(
                "As a plain callback MILOGuidance acts from the second step on. Use `with guide.attach(pipe):`.",
                stacklevel=2,
            )
            self._hook.enter_context(self.attach(pipeline, steps_done=step_index + 1))
        return callback_kwargs


def find_guidance(callback: Any) -> list[MILOGuidance]:
    """Return the guidance in `callback`: itself, or those among `MultiPipelineCallbacks`."""
    callbacks = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
    return [entry for entry in callbacks if isinstance(entry, MILOGuidance)]


def _match_batch(reference: Tensor, sample: Tensor) -> Tensor:
    if reference.shape[0] != sample.shape[0] and sample.shape[0] % reference.shape[0] == 0:
        reference = reference.repeat_interleave(sample.shape[0] // reference.shape[0], dim=0)
    if reference.shape != sample.shape:
        raise ValueError(
            f"Expected reference latents of shape {tuple(sample.shape)}, got {tuple(reference.shape)}. "
            "Encode the reference image at the pipeline's size, with its own VAE."
        )
    return reference.to(sample.device)
