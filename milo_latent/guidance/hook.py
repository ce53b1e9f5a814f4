"""A hook before `scheduler.step`: several guides on one scheduler, taken off in any order, gone afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers import SchedulerMixin
from torch import Tensor

Entry = Callable[[Tensor, Any, Tensor], Tensor]  # model output, timestep, sample ─▶ model output


def add_hook(scheduler: SchedulerMixin, entry: Entry) -> Callable[[], None]:
    """Let `entry` rewrite the model output of every step of `scheduler`.

    Args:
        scheduler: its `step` is replaced on this object only; the signature stays, which pipelines inspect.
        entry: called with model output, timestep and sample, returns a model output.

    Returns:
        A function that takes the hook off; calling it again does nothing. With the last one the scheduler is as before.
    """
    step = vars(scheduler).get("step")
    if step is None or getattr(step, "milo_step", None) is not step:  # a wrapper by others may carry our attributes on
        step = _guided_step(scheduler)
        scheduler.step = step
    step.milo_entries.append(entry)
    return functools.partial(_remove, scheduler, step, entry)


def _guided_step(scheduler: Any) -> Callable[..., Any]:
    original = scheduler.step
    entries: list[Entry] = []

    @functools.wraps(original)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("s_churn"):
            raise ValueError(
                f"Expected `s_churn` of 0, got {kwargs['s_churn']}: it adds noise inside the step, after which the "
                "clean estimate is another than the guided one. Use an ancestral scheduler for noise."
            )
        for entry in list(entries):
            model_output = entry(model_output, timestep, sample)
        return original(model_output, timestep, sample, *args, **kwargs)

    step.milo_step = step  # type: ignore[attr-defined]
    step.milo_entries = entries  # type: ignore[attr-defined]
    step.milo_previous = vars(scheduler).get("step")  # type: ignore[attr-defined]
    return step


def _remove(scheduler: Any, step: Any, entry: Entry) -> None:
    if entry in step.milo_entries:
        step.milo_entries.remove(entry)
    if step.milo_entries or vars(scheduler).get("step") is not step:
        return  # others are left; or someone wrapped the step after us, then an empty hook stays, and does nothing
    if step.milo_previous is None:
        del scheduler.step
    else:
        scheduler.step = step.milo_previous
