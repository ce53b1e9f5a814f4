"""How well a metric agrees with people: correlations with confidence intervals, overall and per distortion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.evaluation.iqa_datasets import Rating
from milo_latent.evaluation.metrics import FullReference
from milo_latent.extras import import_extra
from milo_latent.files import read_image

RESAMPLES = 500  # of the bootstrap
SMALLEST_GROUP = 5  # a correlation of fewer ratings says nothing


def import_scipy(module: str) -> Any:
    """Import a module of scipy; ImportError tells how to install it."""
    return import_extra(f"scipy.{module}", "eval", "Agreement with people")


def pearson(first: Tensor, second: Tensor) -> float:
    """Return Pearson's linear correlation of two tensors of one shape; NaN if one of them is constant."""
    return _correlation("pearsonr", first, second)


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two tensors of one shape; NaN if one of them is constant."""
    return _correlation("spearmanr", first, second)


def kendall(first: Tensor, second: Tensor) -> float:
    """Return Kendall's tau-b of two tensors of one shape; NaN if one of them is constant."""
    return _correlation("kendalltau", first, second)


def _correlation(name: str, first: Tensor, second: Tensor) -> float:
    stats = import_scipy("stats")
    if first.numel() < 2:
        return float("nan")
    values = [each.detach().double().flatten().cpu().numpy() for each in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # NaN already says that a tensor is constant
        return float(getattr(stats, name)(*values).statistic)


@dataclass(frozen=True)
class Logistic:
    """The four-parameter logistic `low + (high - low) * sigmoid((error - center) / scale)`.

    Source: VQEG's mapping, which the MILO supplement (section 2.1) calls the four-parameter logistic.
    """

    high: float  # limit on one side
    low: float  # limit on the other side
    center: float  # error at which the curve is halfway between the limits
    scale: float  # width of the transition; the curve falls from `high` to `low` if it is negative

    def __call__(self, errors: Tensor) -> Tensor:
        """Map errors, of any shape, to opinions."""
        return self.low + (self.high - self.low) * torch.sigmoid((errors - self.center) / self.scale)


def fit_logistic(errors: Tensor, opinions: Tensor) -> Logistic:
    """Fit the logistic from errors to opinions by least squares (Levenberg-Marquardt).

    Args:
        errors: (n,), not all equal.
        opinions: (n,).

    Raises:
        ValueError: for fewer than 5 pairs, values that are not finite, or errors that are all equal.
        ImportError: if scipy is not installed.
    """
    errors, opinions = errors.double().flatten(), opinions.double().flatten()
    if len(errors) != len(opinions) or len(errors) < 5:
        raise ValueError(f"Expected as many errors as opinions, 5 or more, got {len(errors)} and {len(opinions)}.")
    if not (torch.isfinite(errors).all() and torch.isfinite(opinions).all()) or errors.std() == 0:
        raise ValueError("Expected finite opinions, and finite errors that are not all equal, to fit a curve to.")
    middle, spread = errors.mean().item(), errors.std().item()
    standardized, target = ((errors - middle) / spread).numpy(), opinions.numpy()
    sigmoid = import_scipy("special").expit

    def residuals(parameters: np.ndarray) -> np.ndarray:
        high, low, center, slope = parameters
        return low + (high - low) * sigmoid(slope * (standardized - center)) - target

    start = [target.max(), target.min(), np.median(standardized), np.sign(standardized @ (target - target.mean())) or 1]
    least_squares = import_scipy("optimize").least_squares
    high, low, center, slope = least_squares(residuals, start, method="lm", ftol=1e-12, xtol=1e-12, gtol=1e-12).x
    return Logistic(float(high), float(low), float(center * spread + middle), float(spread / slope))


@dataclass(frozen=True)
class Agreement:
    """Correlations of a metric with opinions; 1 is perfect. Intervals are those of 95 % confidence, by bootstrap."""

    srcc: float  # Spearman's correlation
    krcc: float  # Kendall's correlation
    plcc: float  # Pearson's correlation after the four-parameter logistic
    srcc_interval: tuple[float, float]
    plcc_interval: tuple[float, float]
    count: int  # of ratings


def agreement(
    errors: Tensor, opinions: Tensor, *, groups: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> Agreement:
    """Compare a metric's errors with opinions.

    Args:
        errors: (n,), lower is better.
        opinions: (n,), higher is better.
        groups: what the bootstrap draws together, such as the reference of each rating, since the ratings of one photo
            are not independent; None draws each rating by itself.
        resamples: draws of the bootstrap; the intervals are NaN for 0.

    Returns:
        Correlations, positive where the metric agrees. The logistic is fitted once, over all ratings.

    Raises:
        ValueError: for fewer than 5 ratings, lengths that differ, or errors that are all equal or not finite.
        ImportError: if scipy is not installed.
    """
    errors, opinions = errors.double().flatten(), opinions.double().flatten()
    predicted = fit_logistic(errors, opinions)(errors)
    draws = list(_resample(groups or [str(index) for index in range(len(errors))], resamples))
    return Agreement(
        srcc=spearman(-errors, opinions),
        krcc=kendall(-errors, opinions),
        plcc=pearson(predicted, opinions),
        srcc_interval=_interval([spearman(-errors[draw], opinions[draw]) for draw in draws]),
        plcc_interval=_interval([pearson(predicted[draw], opinions[draw]) for draw in draws]),
        count=len(errors),
    )


def _resample(groups: Sequence[str], resamples: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(0)
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    lists = [np.flatnonzero(members == group) for group in range(members.max() + 1)]
    for _ in range(resamples):
        chosen = rng.integers(len(lists), size=len(lists))
        yield torch.from_numpy(np.concatenate([lists[group] for group in chosen]))


def _interval(values: list[float]) -> tuple[float, float]:
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def agreement_per_kind(errors: Tensor, opinions: Tensor, kinds: Sequence[str]) -> dict[str, Agreement]:
    """Return `agreement` for each kind of distortion with enough ratings and with values that are not all equal."""
    table = {}
    for kind in sorted(set(kinds)):
        members = torch.tensor([index for index, each in enumerate(kinds) if each == kind])
        if len(members) >= SMALLEST_GROUP and errors[members].std() > 0 and opinions[members].std() > 0:
            table[kind] = agreement(errors[members], opinions[members], resamples=0)
    return table


def measure_ratings(
    metrics: Sequence[FullReference], ratings: Sequence[Rating], *, report: Callable[[str], None] = lambda message: None
) -> tuple[dict[str, Tensor], list[Rating]]:
    """Compute the error of every rated pair; pairs that cannot be read are reported and left out.

    Args:
        metrics: metrics with different names.
        ratings: from a loader of `iqa_datasets`.
        report: called with a line for each pair that is left out.

    Returns:
        Errors by metric, (n,) each, and the n ratings that were measured.

    Raises:
        ValueError: if no pair can be read.
    """
    errors: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    measured = []
    for rating in tqdm(ratings, desc="Measuring", unit="pair"):
        try:
            ref, dist = read_image(rating.ref), read_image(rating.dist)
            if ref.shape != dist.shape:
                raise ValueError(f"{rating.dist} and its reference differ in size.")
        except (OSError, ValueError) as error:
            report(f"Left out: {error}")
            continue
        for metric in metrics:
            errors[metric.name].append(metric.error(ref=ref, dist=dist).item())
        measured.append(rating)
    if not measured:
        raise ValueError(f"Expected pairs of images that can be read, got none among {len(ratings)} ratings.")
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in errors.items()}, measured
