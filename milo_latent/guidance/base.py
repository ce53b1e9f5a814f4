"""What a guide is, and its ways in: natively in `DiffBIRPipeline`, attached to another pipeline, as a plain callback.

A guide is any object with `start(reference, num_steps)` and `__call__(x0, *, progress, timestep) -> x0`. It may also
have `active(progress, timestep)`, `bind(pipeline)` and `end()`, which `Guide` explains.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from milo_latent.guidance.coefficients import scheduler_family
from milo_latent.guidance.hook import Attached, attach_guide, find_attached
from milo_latent.guidance.reference import match_reference

CLIPPING = ("clip_sample", "thresholding")  # names in the configurations of schedulers


class Guide(PipelineCallback):
    """Base class of guides, which can be attached to any pipeline; subclasses implement `guide_x0`.

    Args:
        reference_latents: r, (B, C, h, w) or (1, C, h, w); None where the pipeline knows them.
    """

    tensor_inputs = ["latents"]  # noqa: RUF012
    reference_latents: Tensor | None = None
    _reference: Tensor | None = None  # of the current run

    def __init__(self, reference_latents: Tensor | None = None) -> None:
        # detached, or it would keep the encoder's whole graph
        self.reference_latents = None if reference_latents is None else reference_latents.detach()

    def guide_x0(self, x0: Tensor, *, progress: float, timestep: float) -> Tensor:
        """Return the guided clean estimate of one step, as a new tensor; `x0` itself leaves the step as it is.

        Args:
            x0: `pred_original_sample`, (B, C, h, w) float32; it must not be changed in place.
            progress: share of the run's steps already done, from 0 in the first step to 1 in the last.
            timestep: as passed to `scheduler.step`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `guide_x0`.")

    def active(self, progress: float, timestep: float) -> bool:
        """Return False for steps that the guide leaves as they are; it is not called there."""
        return True

    def bind(self, pipeline: DiffusionPipeline) -> None:
        """Raise ValueError if this guide cannot act on `pipeline`; called before each run."""

    def start(self, reference: Tensor, num_steps: int) -> None:
        """Begin a run.

        Args:
            reference: the pipeline's reference latents, (B, C, h, w); the guide's own ones come first.
            num_steps: number of calls of `scheduler.step` in the whole run.
        """
        own = self.reference_latents
        self._reference = (reference if own is None else own.to(reference.device)).detach().float()

    def end(self) -> None:
        """End the run: nothing of it is kept."""
        self._reference = None

    def reference_for(self, x0: Tensor) -> Tensor:
        """Return the reference latents of the current run, in the shape of `x0` and on its device.

        Raises:
            RuntimeError: outside a run.
            ValueError: if the reference latents do not fit `x0`.
        """
        if self._reference is None:
            raise RuntimeError(
                "Expected a run to be going on, got none. Pass `callback_on_step_end=guide` to DiffBIRPipeline, or use "
                "`with guide.attach(pipe):`. A guide serves one run at a time."
            )
        return match_reference(self._reference, x0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the guided x0, or, if called with the four arguments of diffusers' callbacks, what those return."""
        return self.guide_x0(*args, **kwargs) if len(args) == 1 else self.callback_fn(*args, **kwargs)

    @contextmanager
    def attach(self, pipeline: DiffusionPipeline) -> Iterator[Self]:
        """Guide every step of any pipeline called inside this block, by a hook before its scheduler's `step`.

        Args:
            pipeline: with a `scheduler`; it is left as it was, also when a call fails.

        Raises:
            ValueError: without reference latents, for an unknown scheduler, a pipeline that this guide cannot act on,
                or a scheduler to which this guide is attached already.
        """
        scheduler = pipeline.scheduler
        left = find_attached(self, scheduler)
        if left is not None and not left.plain:
            raise ValueError(
                f"Expected a scheduler without this {type(self).__name__}, got one that it is attached to already, "
                "so it would pull twice. Attach once, and to one at a time of the pipelines that share a scheduler."
            )
        if left is not None:  # a run that failed left it behind
            left.detach()
        attached = self._attach(pipeline)
        try:
            yield self
        finally:
            attached.detach()
            if pipeline.scheduler is not scheduler:
                warnings.warn(
                    "The scheduler was replaced inside `with guide.attach(pipe):`, so the new one was not guided. "
                    "Attach after setting it.",
                    stacklevel=3,
                )

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Guide the steps that follow this one; do nothing if the guide is attached to the pipeline.

        Arguments, returned value and moment are those of diffusers' callbacks; errors are those of `attach`.
        """
        attached = find_attached(self, pipeline.scheduler)
        over = step_index >= pipeline.num_timesteps - 1 or getattr(pipeline, "_interrupt", False)
        if over and attached is not None and attached.plain:
            attached.detach()
        elif not over and attached is None:
            warnings.warn(
                f"As a plain callback {type(self).__name__} acts from the second step on. "
                "Use `with guide.attach(pipe):`.",
                stacklevel=2,
            )
            self._attach(pipeline, done=step_index + 1)
        return callback_kwargs

    def _attach(self, pipeline: DiffusionPipeline, *, done: int = 0) -> Attached:
        if self.reference_latents is None:
            raise ValueError(
                "Expected `reference_latents` for a pipeline that knows none, got none. "
                f"Pass them to {type(self).__name__}, which encodes none by itself."
            )
        check_scheduler(pipeline.scheduler)
        self.bind(pipeline)
        return attach_guide(self, pipeline, done=done)


def split_guides(callback: Any, pipeline: DiffusionPipeline) -> tuple[list[Any], Any]:
    """Part the guides from the other callbacks that a pipeline was given, and check that they can act on it.

    Args:
        callback: `callback_on_step_end`: a guide, another callback, or several as a list or `MultiPipelineCallbacks`.
        pipeline: that calls this, to guide its steps itself.

    Returns:
        The guides, without those that are attached to the pipeline and so act already, and the other callbacks: None,
        one, or `MultiPipelineCallbacks`.

    Raises:
        ValueError: if one of them cannot guide `pipeline`.
    """
    several = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else callback
    callbacks = list(several) if isinstance(several, list | tuple) else [callback]
    guides = [each for each in callbacks if callable(getattr(each, "start", None))]
    others = [each for each in callbacks if each not in guides and each is not None]
    if guides:
        check_scheduler(pipeline.scheduler)
    for guide in guides:
        if hasattr(guide, "bind"):
            guide.bind(pipeline)
    attached = [find_attached(guide, pipeline.scheduler) for guide in guides]
    guides = [guide for guide, each in zip(guides, attached, strict=True) if each is None or each.plain]
    return guides, MultiPipelineCallbacks(others) if len(others) > 1 else next(iter(others), None)


@contextmanager
def guided_run(guides: Iterable[Any], reference_latents: Tensor, num_steps: int) -> Iterator[None]:
    """Start the guides, and end them with this block, in which `guide_model_output` calls them.

    Args:
        guides: of a run.
        reference_latents: r, (B, C, h, w).
        num_steps: number of calls of `scheduler.step` in the whole run.
    """
    try:
        for guide in guides:
            guide.start(reference_latents, num_steps)
        yield
    finally:
        for guide in guides:
            if hasattr(guide, "end"):
                guide.end()


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless `scheduler` is known; warn if it clips the clean estimate after guidance."""
    scheduler_family(scheduler)
    active = [name for name in CLIPPING if scheduler.config.get(name)]
    if active:
        off = ", ".join(f"{name}=False" for name in active)
        name = type(scheduler).__name__
        warnings.warn(
            f"{name} has {' and '.join(active)} on, which clips the clean estimate after guidance; latents reach "
            f"beyond that range. Switch it off: pipe.scheduler = {name}.from_config(pipe.scheduler.config, {off}).",
            stacklevel=4,
        )
