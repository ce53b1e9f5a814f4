"""MILO as a loss, and the reductions of its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from milo_latent.checks import check_batch, check_choice
from milo_latent.metric.network import MILO, open_metric, pixel_mean, visible_error

Reduction = Literal["mean", "sum", "none"]
Reading = Literal["error", "error_map"]


def reduce_errors(errors: Tensor, reduction: Reduction) -> Tensor:
    """Reduce the errors of a batch, (B,), as torch's losses do.

    Args:
        errors: (B,).
        reduction: "mean" and "sum" give a scalar, "none" the errors themselves.

    Raises:
        ValueError: for another reduction.
    """
    check_choice("reduction", reduction, get_args(Reduction))
    if reduction == "none":
        return errors
    return errors.mean() if reduction == "mean" else errors.sum()


class MILOLoss(nn.Module):
    """MILO as a loss: 0 for equal inputs, lower is better, a finite gradient everywhere; NaN stays NaN.

    Args:
        metric: for images or latents, or what `MILO.from_pretrained` takes, such as "official-image"; its parameters
            are not trained, and it stays out of `state_dict`.
        reduction: "mean", "sum" or "none", over the batch.
        reading: "error", E, never negative and unbounded above; or "error_map", the mean of the error map, which is on
            the scale on which people judged, in [0, 1) for the shipped and the official weights.
        mask_gradient: whether the gradient passes through the visibility mask, too. Leave it off to train a network:
            through the mask it learns to make differences invisible to the metric instead of small. On means the
            gradient of the metric itself, for optimizing or studying single images.

    Raises:
        TypeError: if `metric` is none.
        ValueError: for another reduction or reading.

    Example:
        >>> from milo_latent.testing import latent_pair, tiny_metric
        >>> target, pred = latent_pair()
        >>> bool(MILOLoss(tiny_metric())(pred, target) > 0)
        True
    """

    def __init__(
        self,
        metric: MILO | str | Path,
        *,
        reduction: Reduction = "mean",
        reading: Reading = "error",
        mask_gradient: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(Reduction))
        check_choice("reading", reading, get_args(Reading))
        # in a list, so that checkpoints of a model do not hold it
        self._metric = [open_metric(metric).requires_grad_(False)]
        self.reduction, self.reading, self.mask_gradient = reduction, reading, mask_gradient

    @property
    def metric(self) -> MILO:
        """The metric."""
        return self._metric[0]

    def forward(self, pred: Tensor, target: Tensor, *, region: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            pred: (B, C, H, W).
            target: (B, C, H, W).
            region: weights of pixels, (B or 1, 1, H, W), >= 0.

        Returns:
            A scalar, or (B,) for the reduction "none".

        Raises:
            TypeError: for dtypes that differ or are not floating point.
            ValueError: for shapes or devices that differ, or sides below 2^levels.
        """
        check_batch("pred", pred, self.metric.config.channels)
        metric = self.metric.to(pred.device)
        with torch.set_grad_enabled(self.mask_gradient and torch.is_grad_enabled()):
            mask = metric.mask(dist=pred, ref=target)
        values = visible_error(mask, dist=pred, ref=target)  # (B, 1, H, W)
        if self.reading == "error_map":
            values = metric.scale_error(values)
        return reduce_errors(pixel_mean(values, region), self.reduction)
