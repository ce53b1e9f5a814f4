"""A hook on a scheduler, by which guides act inside the steps of any pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from milo_latent.guidance.coefficients import step_index
from milo_latent.guidance.x0 import guide_model_output


class SchedulerHook:
    """Guides the steps of a pipeline's scheduler by replacing its `step` and `set_timesteps`, on this object only.

    A run begins after `set_timesteps`, and after the last step of a run: loops may set timesteps once for several.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self.guides: list[Any] = []  # in the order in which they act
        self.started: list[Any] = []  # those that know of the current run
        self.passing: list[Any] = []  # those that leave with the current run
        self.done = self.num_steps = 0  # of the current run
        own, replacements = vars(self.scheduler), self._replacements()
        self.methods = {name: (own.get(name), method) for name, method in replacements.items()}
        own.update(replacements)

    def add(self, guide: Any, *, done: int = 0) -> None:
        """Let `guide` act on the coming steps: on those of the current run only where `done` of its steps are over."""
        self.guides.append(guide)
        if done:
            self.passing.append(guide)
            self.done, self.num_steps = done, self.pipeline.num_timesteps

    def remove(self, guide: Any) -> None:
        """Take `guide` off if it is there; with the last one, the scheduler is as it was before."""
        if guide in self.started:
            guide.end()
        for guides in (self.guides, self.started, self.passing):
            guides[:] = [each for each in guides if each is not guide]
        own = vars(self.scheduler)
        for name, (previous, method) in self.methods.items():
            # a method that someone else wrapped stays inside, and does nothing
            if not self.guides and own.get(name) is method:
                own.update({name: previous}) if previous else own.pop(name)

    def _replacements(self) -> dict[str, Callable[..., Any]]:
        scheduler_step, scheduler_set_timesteps = self.scheduler.step, self.scheduler.set_timesteps

        @functools.wraps(scheduler_step)  # pipelines inspect the signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.guides and kwargs.get("s_churn"):
                raise ValueError(
                    f"Expected `s_churn` of 0, got {kwargs['s_churn']}: it adds noise inside the step, which changes "
                    "the clean estimate after guidance. Use an ancestral scheduler for noise."
                )
            model_output = self._guide(model_output, timestep, sample) if self.guides else model_output
            return scheduler_step(model_output, timestep, sample, *args, **kwargs)

        @functools.wraps(scheduler_set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._end_run()
            return scheduler_set_timesteps(*args, **kwargs)

        step._milo_hook = self  # type: ignore[attr-defined]
        return {"step": step, "set_timesteps": set_timesteps}

    def _guide(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        if self.done >= self.num_steps:
            self._end_run()
            known = getattr(self.pipeline, "_num_timesteps", None)  # those that do not tell go through all timesteps
            self.num_steps = known or len(self.scheduler.timesteps) - step_index(self.scheduler, timestep)
        for guide in self.guides:
            if guide not in self.started:
                self.started.append(guide)
                guide.bind(self.pipeline)
                guide.start(guide.reference_latents.to(sample.device), self.num_steps)
        progress, self.done = self.done / max(self.num_steps - 1, 1), self.done + 1
        return guide_model_output(self.guides, self.scheduler, model_output, timestep, sample, progress=progress)

    def _end_run(self) -> None:
        self.done = self.num_steps = 0
        for guide in list(self.passing):
            self.remove(guide)
        self.started.clear()


def find_hook(scheduler: SchedulerMixin) -> SchedulerHook | None:
    """Return the hook that guides `scheduler`; a copy of it, or someone's wrapper of `step`, may carry a stale one."""
    hook: SchedulerHook | None = getattr(vars(scheduler).get("step"), "_milo_hook", None)
    return hook if hook is not None and hook.guides and hook.scheduler is scheduler else None
