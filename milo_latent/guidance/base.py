"""What a guide is, and its ways in: natively in `DiffBIRPipeline`, attached to another pipeline, as a plain callback.

A guide is any object with `start(reference, num_steps)` and `__call__(x0, *, progress, timestep) -> x0`. It may also
have `active(progress, timestep)`, `bind(pipeline)` and `end()`, which `Guide` explains.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from milo_latent.checks import stacklevel_of_caller
from milo_latent.guidance.coefficients import step_index
from milo_latent.guidance.x0 import check_scheduler, guide_model_output


class Guide(PipelineCallback):
    """Base class of guides that can be attached to any pipeline; subclasses implement `guide_x0`.

    Args:
        reference_latents: r, (B, C, h, w) or (1, C, h, w); None where the pipeline knows them.
    """

    tensor_inputs = ["latents"]  # noqa: RUF012
    _reference: Tensor | None = None  # of the current run

    def __init__(self, reference_latents: Tensor | None = None) -> None:
        # detached, or it would keep the encoder's whole graph
        self.reference_latents = None if reference_latents is None else reference_latents.detach()
        self._attached: list[tuple[DiffusionPipeline, SchedulerHook]] = []

    def guide_x0(self, x0: Tensor, *, progress: float, timestep: float) -> Tensor:
        """Return the guided clean estimate of a step as a new tensor; returning `x0` itself leaves the step as it is.

        Args:
            x0: `pred_original_sample`, (B, C, h, w) float32; it must not be changed in place.
            progress: 0 in the first step of the run, 1 in the last.
            timestep: as passed to `scheduler.step`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `guide_x0`.")

    def active(self, progress: float, timestep: float) -> bool:
        """Return False for steps that the guide leaves as they are; it is not called there."""
        return True

    def bind(self, pipeline: DiffusionPipeline) -> None:
        """Raise ValueError if this guide cannot act on `pipeline`; called before each run."""

    def start(self, reference: Tensor, num_steps: int) -> None:
        """Begin a run of `num_steps` steps; the guide's own reference latents, if any, replace the pipeline's."""
        own = self.reference_latents
        self._reference = (reference if own is None else own.to(reference.device)).detach().float()

    def end(self) -> None:
        """End the run, and let go of its tensors."""
        self._reference = None

    @property
    def reference(self) -> Tensor:
        """Reference latents of the current run, (B or 1, C, h, w) float32; RuntimeError outside a run."""
        if self._reference is None:
            raise RuntimeError("Expected a run, got none. Call DiffBIRPipeline, or `guide.attach(pipe)`.")
        return self._reference

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the guided x0, or serve as a callback if called with a callback's four arguments."""
        return self.guide_x0(*args, **kwargs) if len(args) == 1 else self.callback_fn(*args, **kwargs)

    def attach(self, pipeline: DiffusionPipeline) -> Attachment:
        """Guide every step of the pipeline until `detach`, or to the end of the block `with guide.attach(pipe):`.

        Either leaves the pipeline as it was, the block also when a call fails. A guide that is dropped while it is
        attached guides no longer, and a warning says so.

        Raises:
            ValueError: without reference latents, for an unknown scheduler, a pipeline that this guide cannot act on,
                or a scheduler to which this guide is attached already.
        """
        hook = find_hook(pipeline.scheduler)
        if hook and self in hook.passing:  # a run that failed left it behind
            hook.remove(self)
        elif hook and self in hook.guides:
            raise ValueError(
                f"Expected a scheduler without this {type(self).__name__}, got one that it is attached to already, "
                "so it would pull twice. Attach once, and to one at a time of the pipelines that share a scheduler; "
                "`guide.detach()` ends an attachment."
            )
        self._attached.append((pipeline, self._attach(pipeline)))
        return Attachment(self, pipeline)

    def detach(self, pipeline: DiffusionPipeline | None = None) -> None:
        """Leave the pipeline, or all pipelines that this guide is attached to, as they were before `attach`."""
        left = [each for each in self._attached if pipeline in (None, each[0])]
        self._attached = [each for each in self._attached if each not in left]
        for one, hook in left:
            hook.remove(self)
            if one.scheduler is not hook.scheduler:
                message = "The scheduler was replaced while a guide was attached to it. Attach after setting it."
                warnings.warn(message, stacklevel=stacklevel_of_caller())

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Guide the steps after this one, unless this guide is attached; takes and returns what callbacks do."""
        hook = find_hook(pipeline.scheduler)
        if step_index >= pipeline.num_timesteps - 1 or getattr(pipeline, "_interrupt", False):
            if hook and self in hook.passing:
                hook.remove(self)
        elif not hook or self not in hook.guides:
            message = "As a plain callback a guide acts from the second step on. Use `guide.attach(pipe)`."
            warnings.warn(message, stacklevel=stacklevel_of_caller())
            self._attach(pipeline, done=step_index + 1)
        return callback_kwargs

    def _attach(self, pipeline: DiffusionPipeline, *, done: int = 0) -> SchedulerHook:
        if self.reference_latents is None:
            raise ValueError("Expected `reference_latents` outside DiffBIRPipeline, got none. Pass them to the guide.")
        check_scheduler(pipeline.scheduler)
        self.bind(pipeline)
        hook = find_hook(pipeline.scheduler) or SchedulerHook(pipeline)
        hook.add(self, done=done)
        return hook


def split_guides(callback: Any, pipeline: DiffusionPipeline) -> tuple[list[Any], Any]:
    """Part the guides from the other callbacks, for pipelines that guide their steps themselves.

    Args:
        callback: a guide, another callback, or several as a list or `MultiPipelineCallbacks`.
        pipeline: ValueError is raised for guides that cannot act on it; those attached to it are left out.

    Returns:
        The guides, and the other callbacks: None, one, or `MultiPipelineCallbacks`.
    """
    several = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else callback
    callbacks = [each for each in (several if isinstance(several, list) else [several]) if each is not None]
    guides = [each for each in callbacks if callable(getattr(each, "start", None))]
    others = [each for each in callbacks if each not in guides]
    for guide in guides:
        check_scheduler(pipeline.scheduler)
        getattr(guide, "bind", lambda pipeline: None)(pipeline)
    hook = find_hook(pipeline.scheduler)
    guides = [each for each in guides if not hook or each not in hook.guides or each in hook.passing]
    return guides, MultiPipelineCallbacks(others) if len(others) > 1 else next(iter(others), None)


class Attachment:
    """What `Guide.attach` returns; as a context manager it detaches the guide at the end of the block."""

    def __init__(self, guide: Guide, pipeline: DiffusionPipeline) -> None:
        self.guide, self.pipeline = guide, pipeline

    def __enter__(self) -> Guide:
        """Return the guide, which is attached already."""
        return self.guide

    def __exit__(self, *exception: object) -> None:
        """Detach the guide from the pipeline."""
        self.guide.detach(self.pipeline)


@dataclass(eq=False)
class _Attached:
    """A guide in a hook, which does not keep it alive."""

    owner: weakref.finalize
    passing: bool  # whether it leaves with the current run
    started: bool = False  # whether it knows of the current run

    @property
    def guide(self) -> Any:
        """The guide; None once it was dropped."""
        found = self.owner.peek()
        return None if found is None else found[0]


class SchedulerHook:
    """Guides the steps of a pipeline's scheduler by replacing its `step` and `set_timesteps`, on this object only.

    A run begins after `set_timesteps`, and after the last step of a run: loops may set timesteps once for several.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self.attached: list[_Attached] = []  # in the order in which they act
        self.done = self.num_steps = 0  # of the current run
        own, replacements = vars(self.scheduler), self._replacements()
        self.methods = {name: (own.get(name), method) for name, method in replacements.items()}
        own.update(replacements)

    def add(self, guide: Any, *, done: int = 0) -> None:
        """Let `guide` act on the coming steps: on those of the current run only where `done` of its steps are over."""
        owner = weakref.finalize(guide, self._say_dropped, type(guide).__name__, passing=bool(done))
        owner.atexit = False
        self.attached.append(_Attached(owner, passing=bool(done)))
        if done:
            self.done, self.num_steps = done, self.pipeline.num_timesteps

    @property
    def guides(self) -> list[Any]:
        """The guides that are attached."""
        return [each.guide for each in self.attached if each.owner.alive]

    @property
    def passing(self) -> list[Any]:
        """The guides that leave with the current run."""
        return [each.guide for each in self.attached if each.owner.alive and each.passing]

    def remove(self, guide: Any) -> None:
        """Take `guide` off if it is there; with the last one, the scheduler is as it was before."""
        for each in self.attached:
            if each.guide is guide:
                if each.started:
                    guide.end()
                each.owner.detach()
        self._forget_dead()

    def _say_dropped(self, name: str, *, passing: bool) -> None:
        """Go on without a guide that nobody holds any more."""
        self._forget_dead()
        if not passing:
            message = (
                f"A {name} was dropped while attached to a pipeline, which is no longer guided by it. Keep the guide, "
                "and end with `guide.detach()`, or use `with guide.attach(pipe):`."
            )
            warnings.warn(message, stacklevel=stacklevel_of_caller())

    def _forget_dead(self) -> None:
        self.attached = [each for each in self.attached if each.owner.alive]
        own = vars(self.scheduler)
        for name, (previous, method) in self.methods.items():
            # a method that someone else wrapped stays inside, and does nothing
            if not self.attached and own.get(name) is method:
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
        guides = self.guides
        for each in self.attached:
            if not each.started:
                each.started, guide = True, each.guide
                guide.bind(self.pipeline)
                guide.start(guide.reference_latents.to(sample.device), self.num_steps)
        progress, self.done = self.done / max(self.num_steps - 1, 1), self.done + 1
        shape = guides[0].reference_latents.shape[1:]
        return guide_model_output(
            guides, self.scheduler, model_output, timestep, sample, progress=progress, shape=shape
        )

    def _end_run(self) -> None:
        self.done = self.num_steps = 0
        for guide in self.passing:
            self.remove(guide)
        for each in self.attached:
            each.started = False


def find_hook(scheduler: SchedulerMixin) -> SchedulerHook | None:
    """Return the hook that guides `scheduler`; a copy of it, or someone's wrapper of `step`, may carry a stale one."""
    hook: SchedulerHook | None = getattr(vars(scheduler).get("step"), "_milo_hook", None)
    return hook if hook is not None and hook.guides and hook.scheduler is scheduler else None
