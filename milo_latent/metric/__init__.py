"""MILO as a metric: the network, and what is computed from its mask."""

from milo_latent.metric.loss import MILOLoss
from milo_latent.metric.network import MILO
from milo_latent.metric.output import MILOOutput

__all__ = ["MILO", "MILOLoss", "MILOOutput"]
