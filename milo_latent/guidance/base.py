"""Guidance on the scheduler of any pipeline: on and off, where a run begins and ends, which steps it has."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from milo_latent.guidance.coefficients import scheduler_family, step_index
from milo_latent.guidance.hook import add_hook

CLIPPING = ("clip_sample", "thresholding")  # of schedulers' configurations


@dataclass
class GuidedRun:
    """One run of a pipeline: what it is pulled towards, how many steps it has, how many are done."""

    reference_latents: Tensor  # (B, C, h, w) float32
    num_steps: int
    step: int = 0


class Attachment:
    """Calls a guide before every step of a pipeline's scheduler, and opens a run of it for each run of the pipeline.

    Args:
        guide: the guidance.
        pipeline: with a `scheduler`.
        reference_latents: r, (B, C, h, w).
        steps_done: steps of the first run that were taken before; above 0 it serves the rest of that run only.
    """

    def __init__(
        self, guide: SchedulerGuidance, pipeline: DiffusionPipeline, reference_latents: Tensor, steps_done: int = 0
    ) -> None:
        self.guide, self.pipeline, self.scheduler = guide, pipeline, pipeline.scheduler
        self.reference_latents, self.steps_done = reference_latents, steps_done
        # of the current run; the rest of one has them now, and a run with others is another, should this one break off
        self._timesteps: Tensor | None = self.scheduler.timesteps if steps_done else None
        self._run: GuidedRun | None = None
        self._take_off = add_hook(self.scheduler, self._before_step)

    def detach(self) -> None:
        """Take the hook off; calling it again does nothing."""
        self._take_off()
        self._run = None

    def _before_step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        if self.guide.is_running:  # the pipeline guides by itself
            return model_output
        if self._is_new_run(timestep):
            if self.steps_done and (self._run is not None or self._timesteps is not self.scheduler.timesteps):
                # what it served is over, or broke off
                self.detach()
                return model_output
            self._timesteps = self.scheduler.timesteps
            reference = self.reference_latents.to(sample.device)
            self._run = self.guide.begin_run(reference, self._num_steps(timestep), steps_done=self.steps_done)
        assert self._run is not None
        with self.guide.resume(self._run):
            return self.guide.guided_model_output(self.scheduler, model_output, timestep, sample)

    def _is_new_run(self, timestep: Any) -> bool:
        """Tell whether this step is the first of a run: `set_timesteps` makes a new tensor in each call of a pipeline.

        Loops of one's own may set timesteps once for several runs: then all steps are done, and noise is back.
        """
        if self._run is None or self._timesteps is not self.scheduler.timesteps:
            return True
        return self._run.step >= self._run.num_steps and float(timestep) > float(self._timesteps[-1])

    def _num_steps(self, timestep: Any) -> int:
        known = getattr(self.pipeline, "_num_timesteps", None)
        if known is not None:
            return int(known)
        # the two upscale pipelines do not say; they go through the whole schedule
        return self.steps_done + len(self.scheduler.timesteps) - step_index(self.scheduler, timestep)


class SchedulerGuidance(PipelineCallback):
    """Guidance that rewrites the model output before the scheduler steps; subclasses say to what.

    Pipelines with a loop of their own open `run` around it and call `guided_model_output`; others are guided inside
    `with guide.attach(pipe):`, or from their second step on if this is their `callback_on_step_end`.

    Args:
        reference_latents: r, (B, C, h, w) or (1, C, h, w); None where the pipeline knows them.
    """

    tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, reference_latents: Tensor | None = None) -> None:
        # detached, or it would keep the encoder's whole graph
        self.reference_latents = None if reference_latents is None else reference_latents.detach()
        self._run: GuidedRun | None = None
        self._attachments: list[Attachment] = []

    @abstractmethod
    def guided_model_output(
        self, scheduler: SchedulerMixin, model_output: Tensor, timestep: Tensor | float | int, sample: Tensor
    ) -> Tensor:
        """Return the model output that predicts the guided clean latents; counts as one step of the run."""

    def check_pipeline(self, pipeline: DiffusionPipeline) -> None:
        """Raise ValueError unless the pipeline's scheduler is known; warn of one that clips what guidance makes."""
        scheduler_family(pipeline.scheduler)
        warn_of_clipping(pipeline.scheduler)

    # One run

    @property
    def is_running(self) -> bool:
        """Whether a run is open: inside `run`, of a pipeline that guides by itself."""
        return self._run is not None

    @contextmanager
    def run(self, reference_latents: Tensor | None, num_steps: int, *, steps_done: int = 0) -> Iterator[Self]:
        """Guide the steps taken inside this block; pipelines with a loop of their own open it around that loop.

        Args:
            reference_latents: r, (B, C, h, w), used where the constructor was given none.
            num_steps: the number of calls of `scheduler.step` in the whole run.
            steps_done: how many of them were made already.

        Raises:
            ValueError: if there are no reference latents, or they are not fit for the guidance.
        """
        with self.resume(self.begin_run(reference_latents, num_steps, steps_done=steps_done)):
            yield self

    def begin_run(self, reference_latents: Tensor | None, num_steps: int, *, steps_done: int = 0) -> GuidedRun:
        """Return a new run, for `resume`; arguments and errors as of `run`."""
        reference = self.reference_latents if self.reference_latents is not None else reference_latents
        if reference is None:
            raise ValueError("Expected reference latents to pull towards, got none. Pass `reference_latents=`.")
        return GuidedRun(reference.detach().float(), num_steps, steps_done)

    @contextmanager
    def resume(self, run: GuidedRun) -> Iterator[None]:
        """Make `run` the one that steps belong to, inside this block."""
        previous, self._run = self._run, run
        try:
            yield
        finally:
            self._run = previous

    # Stock pipelines

    @contextmanager
    def attach(self, pipeline: DiffusionPipeline) -> Iterator[Self]:
        """Guide every step of any pipeline called inside this block, by a hook before its scheduler's `step`.

        Args:
            pipeline: with a `scheduler`; it is left as it was, also when a call fails.

        Raises:
            ValueError: if this guidance has no reference latents, for an unknown scheduler, a pipeline whose latents
                are not those that the metric was trained on, or a scheduler that this guidance is attached to already.
        """
        for each in [each for each in self._attachments if each.scheduler is pipeline.scheduler]:
            if not each.steps_done:
                raise ValueError(
                    f"Expected a scheduler without this {type(self).__name__}, got one that it is attached to already, "
                    "so it would pull twice. Attach once, and to one at a time of the pipelines that share a scheduler."
                )
            self._detach(each)  # left by a run that failed, of a plain callback
        attachment = self._attach(pipeline)
        try:
            yield self
        finally:
            self._detach(attachment)
            if pipeline.scheduler is not attachment.scheduler:
                warnings.warn(
                    "The scheduler was replaced inside `with guide.attach(pipe):`, so the new one was not guided. "
                    "Attach after setting it.",
                    stacklevel=3,
                )

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Do nothing where the steps are guided already; else guide those that follow this one.

        Args:
            pipeline: that called.
            step_index: of the step just taken.
            timestep: of that step.
            callback_kwargs: returned as they came.

        Returns:
            `callback_kwargs`.

        Raises:
            ValueError: see `attach`.
        """
        own = [each for each in self._attachments if each.scheduler is pipeline.scheduler]
        plain = [each for each in own if each.steps_done]
        over = step_index >= pipeline.num_timesteps - 1 or getattr(pipeline, "_interrupt", False)
        if step_index == 0 or over:  # at 0: left by a run that failed
            for each in plain:
                self._detach(each)
                own.remove(each)
        if not own and not self.is_running and not over:
            warnings.warn(
                f"As a plain callback {type(self).__name__} acts from the second step on. "
                "Use `with guide.attach(pipe):`.",
                stacklevel=2,
            )
            self._attach(pipeline, steps_done=step_index + 1)
        return callback_kwargs

    def _attach(self, pipeline: DiffusionPipeline, *, steps_done: int = 0) -> Attachment:
        if self.reference_latents is None:
            raise ValueError(
                "Expected `reference_latents` for a stock pipeline, got none. "
                f"Pass them to {type(self).__name__}, which encodes none by itself."
            )
        self.check_pipeline(pipeline)
        self._attachments.append(Attachment(self, pipeline, self.reference_latents, steps_done))
        return self._attachments[-1]

    def _detach(self, attachment: Attachment) -> None:
        attachment.detach()
        if attachment in self._attachments:
            self._attachments.remove(attachment)


def warn_of_clipping(scheduler: SchedulerMixin) -> None:
    """Warn if `scheduler` clips the clean estimate: it does so after guidance, and to a range that latents leave."""
    active = [name for name in CLIPPING if scheduler.config.get(name)]
    if active:
        off = ", ".join(f"{name}=False" for name in active)
        name = type(scheduler).__name__
        warnings.warn(
            f"{name} has {' and '.join(active)} on, which clips the clean estimate after guidance; latents reach "
            f"beyond that range. Switch it off: pipe.scheduler = {name}.from_config(pipe.scheduler.config, {off}).",
            stacklevel=4,
        )
