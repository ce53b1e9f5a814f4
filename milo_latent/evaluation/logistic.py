"""The four-parameter logistic between scores and opinions, and its least-squares fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 300


@dataclass(frozen=True)
class Logistic:
    """`low + (high - low) * sigmoid((score - centre) / scale)`; it falls where `scale` is negative.

    Args:
        high: value far on the one side.
        low: value far on the other.
        centre: score halfway.
        scale: width, in scores; not 0.

    Source: the mapping of VQEG, which the MILO supplement (section 2.1) names "four-parameter logistic".
    """

    high: float
    low: float
    centre: float
    scale: float

    def __call__(self, scores: Tensor) -> Tensor:
        """Map scores, any shape, to opinions."""
        return self.low + (self.high - self.low) * torch.sigmoid((scores - self.centre) / self.scale)


def _residual(parameters: Tensor, scores: Tensor, opinions: Tensor) -> Tensor:
    high, low, centre, scale = parameters
    return low + (high - low) * torch.sigmoid((scores - centre) / scale) - opinions


def fit_logistic(scores: Tensor, opinions: Tensor) -> Logistic:
    """Fit by damped least squares (Levenberg-Marquardt).

    Args:
        scores: (n,), not all equal.
        opinions: (n,).

    Returns:
        The mapping of the smallest squared error that was found.

    Raises:
        ValueError: for fewer than 5 pairs, values that are not finite, or scores that are all equal.
    """
    scores, opinions = scores.double().flatten(), opinions.double().flatten()
    if len(scores) != len(opinions) or len(scores) < 5:
        raise ValueError(f"Expected as many scores as opinions, 5 or more, got {len(scores)} and {len(opinions)}.")
    if not (torch.isfinite(scores).all() and torch.isfinite(opinions).all()) or scores.std() == 0:
        raise ValueError("Expected finite scores that are not all equal, to fit a curve to.")
    middle, spread = scores.mean(), scores.std()
    parameters = _start((scores - middle) / spread, opinions)
    high, low, centre, scale = _descend(parameters, (scores - middle) / spread, opinions).tolist()
    return Logistic(high, low, (centre * spread + middle).item(), (scale * spread).item())


def _start(scores: Tensor, opinions: Tensor) -> Tensor:
    rising = ((scores - scores.mean()) * (opinions - opinions.mean())).sum() >= 0
    one = scores.new_tensor(1.0)
    return torch.stack([opinions.max(), opinions.min(), scores.median(), one if rising else -one])


def _descend(parameters: Tensor, scores: Tensor, opinions: Tensor) -> Tensor:
    damping = 1e-2
    residual = _residual(parameters, scores, opinions)
    for _ in range(ITERATIONS):
        high, low, centre, scale = parameters
        share = torch.sigmoid((scores - centre) / scale)
        slope = (high - low) * share * (1 - share) / scale
        jacobian = torch.stack([share, 1 - share, -slope, -slope * (scores - centre) / scale], dim=1)
        normal = jacobian.T @ jacobian
        step = torch.linalg.solve(normal + damping * (normal.diag() + 1e-9).diag(), jacobian.T @ residual)
        candidate = parameters - step
        after = _residual(candidate, scores, opinions)
        better = bool(after.square().sum() < residual.square().sum()) and bool(candidate[3] * scale > 1e-12)
        if better:
            settled = residual.square().sum() - after.square().sum() < 1e-12 * residual.square().sum()
            parameters, residual, damping = candidate, after, damping * 0.3
            if settled:
                break
        else:
            damping = min(damping * 4, 1e12)
    return parameters
