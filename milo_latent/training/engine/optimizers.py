"""The optimizers that the training loop knows by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

OptimizerName = Literal["adamw", "soap"]
SOAP_BETAS = (0.95, 0.95)  # as in its paper


def build_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return the optimizer of that name over `parameters`.

    Args:
        name: "adamw", or "soap" of pytorch-optimizer: Adam in the eigenbasis of Shampoo's preconditioner.
        parameters: parameters to train.
        lr: learning rate.
        betas: decay of the two moments.
        weight_decay: decoupled weight decay.

    Raises:
        ImportError: for "soap", if pytorch-optimizer is not installed.
        ValueError: for another name.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    if name != "soap":
        raise ValueError(f"Expected the optimizer to be 'adamw' or 'soap', got {name!r}.")
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ImportError('SOAP needs pytorch-optimizer: pip install "milo_latent[train]", or take "adamw".') from error
    optimizer: torch.optim.Optimizer = SOAP(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return optimizer
