"""MILO as metrics of torchmetrics, for its collections, trackers, plots and distributed training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from milo_latent.checks import check_choice
from milo_latent.extras import import_extra
from milo_latent.inputs import Images, Latents, images_to_tensor, latents_to_tensor
from milo_latent.metric.loss import Reduction
from milo_latent.metric.network import MILO, is_image_metric, open_metric

if TYPE_CHECKING:
    from milo_latent.latents.codec import VAE

Reading = Literal["error", "mos"]
Metric: Any = import_extra("torchmetrics", "eval", "milo_latent.metric.torchmetrics").Metric
dim_zero_cat = import_extra("torchmetrics.utilities", "eval", "milo_latent.metric.torchmetrics").dim_zero_cat


class MILOMetric(Metric):
    """MILO_I of pairs of images, over all batches and processes.

    Args:
        metric: MILO_I, or what `MILO.from_pretrained` takes, such as "official-image"; it is frozen, and stays out of
            `state_dict`.
        reading: "error", E, 0 = identical, lower is better; or "mos", 0 to 5, higher is better.
        reduction: over all pairs, "mean", "sum", or "none" for the values in their order, (N,).
        **kwargs: those of `torchmetrics.Metric`.

    Raises:
        ImportError: if torchmetrics is not installed, with the command that installs it.
        TypeError: if `metric` is none.
        ValueError: for another reading or reduction, or a metric for latents.

    Example:
        >>> metric = MILOMetric()
        >>> metric.update(torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.5))
        >>> metric.compute().item()
        0.0
    """

    is_differentiable = True
    full_state_update = False
    plot_lower_bound = 0.0
    total: Tensor
    count: Tensor
    values: list[Tensor]

    def __init__(
        self,
        metric: MILO | str | Path = "milo-image",
        *,
        reading: Reading = "error",
        reduction: Reduction = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("reading", reading, get_args(Reading))
        check_choice("reduction", reduction, get_args(Reduction))
        opened = open_metric(metric).requires_grad_(False)
        self._check_space(opened)
        self._milo = [opened]  # in a list, so that it is no part of the state
        self.reading, self.reduction = reading, reduction
        if reduction == "none":
            self.add_state("values", default=[], dist_reduce_fx="cat")
        else:
            self.add_state("total", default=torch.zeros(()), dist_reduce_fx="sum")
            self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better, which depends on the reading."""
        return self.reading == "mos"

    def update(self, preds: Images, target: Images) -> None:
        """Add pairs.

        Args:
            preds: distorted images, (B, 3, H, W) in [0, 1], or what else `images_to_tensor` takes.
            target: their references.
        """
        dist, ref = self._to_input(preds, "preds"), self._to_input(target, "target")
        milo = self._milo[0].to(dist.device)
        dist, ref = (each.to(next(milo.parameters()).dtype) for each in (dist, ref))
        values = milo(dist=dist, ref=ref)
        values = values if self.reading == "error" else milo.mos(values)
        if self.reduction == "none":
            self.values.append(values)
        else:
            self.total = self.total + values.sum()
            self.count = self.count + len(values)

    def compute(self) -> Tensor:
        """Return the mean or the sum over all pairs, or the values, (N,)."""
        if self.reduction == "none":
            return dim_zero_cat(self.values)
        return self.total if self.reduction == "sum" else self.total / self.count

    def plot(self, val: Tensor | list[Tensor] | None = None, ax: Any = None) -> Any:
        """Return matplotlib's figure and axes of a value, by default the current one, or of several."""
        return self._plot(val, ax)

    def _check_space(self, metric: MILO) -> None:
        if not is_image_metric(metric):
            raise ValueError("Expected a metric for images, got one for latents. MILOLatentMetric takes those.")

    def _to_input(self, given: Any, name: str) -> Tensor:
        return images_to_tensor(given, name)


class MILOLatentMetric(MILOMetric):
    """MILO_L of pairs of latents, or of images that a VAE encodes, over all batches and processes.

    Args:
        metric: MILO_L for the latents, or what `MILO.from_pretrained` takes, such as "milo-sd" or "official-latent".
        vae: encodes images, or what `load_vae` takes, such as "nano"; None takes scaled latents, (B, C, h, w).
        **kwargs: those of `MILOMetric`.

    Raises:
        ValueError: as `MILOMetric`, or for a metric for images.
    """

    def __init__(self, metric: MILO | str | Path = "milo-sd", *, vae: VAE | str | Path | None = None, **kwargs: Any):
        super().__init__(metric, **kwargs)
        if isinstance(vae, str | Path):
            from milo_latent.latents.files import load_vae

            vae = load_vae(vae)
        self._vae = [vae]  # in a list, as the metric

    def _check_space(self, metric: MILO) -> None:
        if is_image_metric(metric):
            raise ValueError("Expected a metric for latents, got one for images. MILOMetric takes those.")

    def _to_input(self, given: Images | Latents, name: str) -> Tensor:
        vae = self._vae[0]
        if vae is None:
            return latents_to_tensor(given, name)  # type: ignore[arg-type]
        from milo_latent.latents.codec import encode_image

        return encode_image(vae, given).float()
