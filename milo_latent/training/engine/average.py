"""A moving average of trained weights, which is smoother than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn


class WeightAverage:
    """An exponential moving average of weights, part of the checkpoints of a run; without a decay it does nothing.

    Args:
        accelerator: of the run.
        parameters: that are trained.
        decay: share of the average that a step keeps, smaller in the first steps; None is no average.
    """

    def __init__(self, accelerator: Accelerator, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.parameters = parameters
        self._average = None if decay is None else EMAModel(parameters, decay=decay, foreach=True)
        if self._average is not None:
            accelerator.register_for_checkpointing(self._average)

    def to(self, device: torch.device) -> None:
        """Move the average, which a checkpoint is loaded from, to the device of the weights."""
        if self._average is not None:
            self._average.to(device)

    def update(self) -> None:
        """Take in the weights after a step."""
        if self._average is not None:
            self._average.step(self.parameters)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the parameters the averaged weights for a while."""
        if self._average is None:
            yield
            return
        self._average.store(self.parameters)
        self.swap_in()
        try:
            yield
        finally:
            self._average.restore(self.parameters)

    def swap_in(self) -> None:
        """Give the parameters the averaged weights for good."""
        if self._average is not None:
            self._average.copy_to(self.parameters)
