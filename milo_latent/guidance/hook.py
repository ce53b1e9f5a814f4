"""A hook on a scheduler, by which guides act inside the steps of any pipeline, and which leaves no trace behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from milo_latent.guidance.coefficients import step_index
from milo_latent.guidance.x0 import guide_model_output


@dataclass(eq=False)
class Attached:
    """A guide on a scheduler's hook, until `detach`."""

    hook: SchedulerHook
    guide: Any
    plain: bool  # a plain callback attached it, for the rest of one run
    started: bool = False

    def detach(self) -> None:
        """Take the guide off; calling this again does nothing."""
        self.hook.remove(self)


class SchedulerHook:
    """Guides the steps of a scheduler by replacing its `step` and `set_timesteps`, on this object only.

    A run begins with the first step after `set_timesteps`. Loops may also set timesteps once for several runs, so
    another run begins with the step that follows the last one of a run.

    Args:
        pipeline: with the `scheduler`.
        done: number of steps that the current run has taken already.
        num_steps: number of steps of the current run; 0 where none has begun.
    """

    def __init__(self, pipeline: DiffusionPipeline, done: int, num_steps: int) -> None:
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self.attached: list[Attached] = []  # in the order in which the guides act
        self.done, self.num_steps = done, num_steps
        own = vars(self.scheduler)
        self.previous = {name: own.get(name) for name in ("step", "set_timesteps")}
        self.methods = {
            "step": self._guided(self.scheduler.step),
            "set_timesteps": self._watched(self.scheduler.set_timesteps),
        }
        own.update(self.methods)

    def remove(self, attached: Attached) -> None:
        """Take a guide off; with the last one the scheduler is as it was before."""
        if attached not in self.attached:
            return
        self.attached.remove(attached)
        if attached.started:
            attached.guide.end()
        for name, method in self.methods.items() if not self.attached else ():
            if vars(self.scheduler).get(name) is not method:
                continue  # someone else wrapped ours, which stays inside and does nothing
            delattr(self.scheduler, name)
            if self.previous[name] is not None:
                setattr(self.scheduler, name, self.previous[name])

    def _guided(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)  # pipelines inspect the signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.attached:
                if kwargs.get("s_churn"):
                    raise ValueError(
                        f"Expected `s_churn` of 0, got {kwargs['s_churn']}: it adds noise inside the step, which "
                        "changes the clean estimate after guidance. Use an ancestral scheduler for noise."
                    )
                model_output = self._guide(model_output, timestep, sample)
            return original(model_output, timestep, sample, *args, **kwargs)

        step._milo_hook = self  # type: ignore[attr-defined]
        return step

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._end_run()
            return original(*args, **kwargs)

        return set_timesteps

    def _guide(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        if self.done >= self.num_steps:
            self._end_run()
            self.num_steps = self._count_steps(timestep)
        for each in self.attached:
            if not each.started:
                each.guide.bind(self.pipeline)
                each.guide.start(each.guide.reference_latents.to(sample.device), self.num_steps)
                each.started = True
        progress = self.done / max(self.num_steps - 1, 1)
        self.done += 1
        guides = [each.guide for each in self.attached]
        return guide_model_output(guides, self.scheduler, model_output, timestep, sample, progress=progress)

    def _end_run(self) -> None:
        self.done = self.num_steps = 0
        for each in list(self.attached):
            if each.plain:
                each.detach()
            each.started = False

    def _count_steps(self, timestep: Any) -> int:
        known = getattr(self.pipeline, "_num_timesteps", None)
        # the two upscale pipelines of diffusers do not tell; they go through the whole schedule
        return len(self.scheduler.timesteps) - step_index(self.scheduler, timestep) if known is None else int(known)


def attach_guide(guide: Any, pipeline: DiffusionPipeline, *, done: int = 0) -> Attached:
    """Let `guide` act on every coming step of the pipeline's scheduler, after the guides that are there already.

    Args:
        guide: with `reference_latents`.
        pipeline: with a `scheduler`.
        done: number of steps of the current run that are over; above 0 the guide serves the rest of that run only.
    """
    hook = _find_hook(pipeline.scheduler) or SchedulerHook(pipeline, done, pipeline.num_timesteps if done else 0)
    hook.attached.append(Attached(hook, guide, plain=done > 0))
    return hook.attached[-1]


def find_attached(guide: Any, scheduler: SchedulerMixin) -> Attached | None:
    """Return what attaches `guide` to `scheduler`, None where nothing does."""
    hook = _find_hook(scheduler)
    return next((each for each in hook.attached if each.guide is guide), None) if hook else None


def _find_hook(scheduler: SchedulerMixin) -> SchedulerHook | None:
    """Return the hook in use; a copy of the scheduler, or someone's wrapper of `step`, may carry one that is not."""
    hook: SchedulerHook | None = getattr(vars(scheduler).get("step"), "_milo_hook", None)
    return hook if hook is not None and hook.attached and hook.scheduler is scheduler else None
