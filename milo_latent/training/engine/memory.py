"""How much memory a training run needs, told before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from milo_latent.training.engine.run import RunConfig

MIB = 2**20
MOMENTS = {"adamw": 8, "adamw-8bit": 2, "soap": 8}  # bytes for each trained parameter
LARGEST_SIDE = 10_000  # of SOAP's preconditioners
ADVICE = (
    "Less memory: --gradient-checkpointing, a smaller --batch-size with more --accumulation, a smaller --crop-size, "
    "--train lora, --optimizer adamw-8bit, no --ema-decay."
)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run on one device, in bytes.

    Args:
        parameters: of all networks, trained and frozen.
        gradients: of the trained ones.
        optimizer: its moments, and the preconditioners of SOAP.
        average: moving average of the weights.
        activations: what one batch needs besides, measured, and the batch itself.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        """Return the plan as lines for people."""
        parts = {name: value for name, value in vars(self).items() if value} | {"total": self.total}
        return "\n".join(f"{name:>12}: {value / MIB:9.1f} MiB" for name, value in parts.items()) + f"\n{ADVICE}"


def memory_plan(
    module: nn.Module, batch: tuple[Any, ...], config: RunConfig, *, frozen: tuple[nn.Module, ...] = ()
) -> MemoryPlan:
    """Count what a run keeps, and measure what one batch of it needs besides.

    Args:
        module: `module(*batch)` is a scalar loss.
        batch: of the run, on the device of `module`.
        config: of the run.
        frozen: networks that `module` calls without registering them.
    """
    tensors = {id(each): each for network in (module, *frozen) for each in network.state_dict(keep_vars=True).values()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    device = next(module.parameters()).device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = module(*batch)
        loss.backward()

    peak = peak_memory(run, device)
    module.zero_grad(set_to_none=True)
    return MemoryPlan(
        parameters=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        gradients=gradients,
        optimizer=optimizer_memory(trained, config),
        average=0 if config.ema_decay is None else gradients,
        activations=max(peak - gradients, 0) + sum(each.nbytes for each in batch if isinstance(each, torch.Tensor)),
    )


def optimizer_memory(parameters: Sequence[nn.Parameter], config: RunConfig) -> int:
    """Return the bytes that the optimizer of a run keeps for these parameters."""
    moments = MOMENTS[config.optimizer] * sum(parameter.numel() for parameter in parameters)
    if config.optimizer != "soap":
        return moments
    # each side of a matrix or a convolution has a square preconditioner and its eigenvectors, in float32
    sides = [side for parameter in parameters if parameter.ndim > 1 for side in parameter.shape]
    return moments + sum(8 * side**2 for side in sides if side <= LARGEST_SIDE)


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Return the most memory, in bytes, that `function` holds on `device` at any time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on standard error otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
