"""What a guide is, and its ways in: natively in `DiffBIRPipeline`, attached to another pipeline, as a plain callback.

A guide is any object with `start(reference, num_steps)` and `__call__(x0, *, progress, timestep) -> x0`. It may also
have `active(progress, timestep)`, `bind(pipeline)` and `end()`, which `Guide` explains.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from milo_latent.guidance.hook import SchedulerHook, find_hook
from milo_latent.guidance.x0 import check_scheduler


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
            raise RuntimeError("Expected a run, got none. Call DiffBIRPipeline, or use `with guide.attach(pipe):`.")
        return self._reference

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the guided x0, or serve as a callback if called with a callback's four arguments."""
        return self.guide_x0(*args, **kwargs) if len(args) == 1 else self.callback_fn(*args, **kwargs)

    @contextmanager
    def attach(self, pipeline: DiffusionPipeline) -> Iterator[Self]:
        """Guide every step of the pipeline inside this block, which leaves it as it was, also when a call fails.

        Raises:
            ValueError: without reference latents, for an unknown scheduler, a pipeline that this guide cannot act on,
                or a scheduler to which this guide is attached already.
        """
        scheduler, hook = pipeline.scheduler, find_hook(pipeline.scheduler)
        if hook and self in hook.passing:  # a run that failed left it behind
            hook.remove(self)
        elif hook and self in hook.guides:
            raise ValueError(
                f"Expected a scheduler without this {type(self).__name__}, got one that it is attached to already, "
                "so it would pull twice. Attach once, and to one at a time of the pipelines that share a scheduler."
            )
        hook = self._attach(pipeline)
        try:
            yield self
        finally:
            hook.remove(self)
            if pipeline.scheduler is not scheduler:
                message = "The scheduler was replaced inside `with guide.attach(pipe):`. Attach after setting it."
                warnings.warn(message, stacklevel=3)

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Guide the steps after this one, unless this guide is attached; takes and returns what callbacks do."""
        hook = find_hook(pipeline.scheduler)
        if step_index >= pipeline.num_timesteps - 1 or getattr(pipeline, "_interrupt", False):
            if hook and self in hook.passing:
                hook.remove(self)
        elif not hook or self not in hook.guides:
            message = "As a plain callback a guide acts from the second step on. Use `with guide.attach(pipe):`."
            warnings.warn(message, stacklevel=2)
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
