"""MILO as a metric of pyiqa: `register()`, then `pyiqa.create_metric("milo")`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from milo_latent.extras import import_extra
from milo_latent.metric.loss import MILOLoss, Reading
from milo_latent.metric.network import MILO, is_image_metric, open_metric

NAME, PURPOSE = "milo", "milo_latent.metric.pyiqa"


class MILONetwork(nn.Module):
    """The network that pyiqa calls: the distorted images first, one value for each pair.

    Args:
        metric: MILO_I, or what `MILO.from_pretrained` takes, such as "official-image".
        reading: as of `MILOLoss`.
        mask_gradient: as of `MILOLoss`; it counts for `create_metric(..., as_loss=True)` alone.

    Raises:
        TypeError: if `metric` is none.
        ValueError: for another reading, or a metric for latents, which pyiqa does not know.
    """

    def __init__(
        self, metric: MILO | str | Path = "milo-image", *, reading: Reading = "error", mask_gradient: bool = False
    ) -> None:
        super().__init__()
        opened = open_metric(metric)
        if not is_image_metric(opened):
            raise ValueError(f"Expected a metric for images, got one for latents, {str(metric)[:200]!r}.")
        self.loss = MILOLoss(opened, reduction="none", reading=reading, mask_gradient=mask_gradient)

    def forward(self, dist: Tensor, ref: Tensor) -> Tensor:
        """Return the errors, (B,), of images in [0, 1], (B, 3, H, W) or gray, (B, 1, H, W)."""
        return self.loss(dist.expand(-1, 3, -1, -1), ref.expand(-1, 3, -1, -1))


def register() -> None:
    """Let pyiqa make MILO_I by `pyiqa.create_metric("milo")`; to call it again changes nothing.

    Options of `create_metric` such as `metric="official-image"` are those of `MILONetwork`. Mind that the licence of
    pyiqa is non-commercial.

    Raises:
        ImportError: if pyiqa is not installed.
        ValueError: if pyiqa has another metric of this name.
    """
    configs = import_extra("pyiqa.default_model_configs", None, PURPOSE).DEFAULT_CONFIGS
    networks = import_extra("pyiqa.utils.registry", None, PURPOSE).ARCH_REGISTRY
    if configs.get(NAME, {}).get("metric_opts", {}).get("type", MILONetwork.__name__) != MILONetwork.__name__:
        raise ValueError(f"Expected pyiqa without a metric {NAME!r}, got one of its own. Use that, or MILO itself.")
    if NAME not in configs:
        networks.register(MILONetwork)
        configs[NAME] = {
            "metric_opts": {"type": MILONetwork.__name__},
            "metric_mode": "FR",
            "lower_better": True,
            "score_range": "0, ~1",
        }
