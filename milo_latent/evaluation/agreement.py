"""How well a metric agrees with people: correlations with confidence, overall and per distortion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.evaluation.correlation import kendall, pearson, spearman
from milo_latent.evaluation.iqa_datasets import Rating
from milo_latent.evaluation.logistic import fit_logistic
from milo_latent.evaluation.metrics import FullReference
from milo_latent.files import read_image

RESAMPLES = 500  # of the bootstrap
SMALLEST_GROUP = 5  # ratings of a distortion, under which a correlation says nothing


@dataclass(frozen=True)
class Agreement:
    """Correlations of a metric with opinions; 1 is perfect.

    Args:
        srcc: Spearman's.
        krcc: Kendall's.
        plcc: Pearson's after the four-parameter logistic.
        srcc_interval: of 95 %, from the bootstrap.
        plcc_interval: likewise.
        count: ratings.
    """

    srcc: float
    krcc: float
    plcc: float
    srcc_interval: tuple[float, float]
    plcc_interval: tuple[float, float]
    count: int


def agreement(
    damage: Tensor, quality: Tensor, *, groups: Sequence[str] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Agreement:
    """Compare scores with opinions.

    Args:
        damage: scores of which higher means worse, (n,).
        quality: opinions of which higher means better, (n,).
        groups: what is drawn together in the bootstrap, such as the reference of each rating, since ratings of one
            photo are not independent; None draws each for itself.
        resamples: of the bootstrap; 0 leaves the intervals empty.
        seed: of the bootstrap.

    Returns:
        Correlations, positive where the metric agrees. The logistic is fitted once, over all.

    Raises:
        ValueError: for fewer than 5 ratings, lengths that differ, or scores that are all equal or not finite.
    """
    damage, quality = damage.double().flatten(), quality.double().flatten()
    mapped = fit_logistic(damage, quality)(damage)
    draws = list(_resample(groups or [str(index) for index in range(len(damage))], resamples, seed))
    ranked = [spearman(-damage[draw], quality[draw]) for draw in draws]
    linear = [pearson(mapped[draw], quality[draw]) for draw in draws]
    return Agreement(
        srcc=spearman(-damage, quality),
        krcc=kendall(-damage, quality),
        plcc=pearson(mapped, quality),
        srcc_interval=_interval(ranked),
        plcc_interval=_interval(linear),
        count=len(damage),
    )


def _resample(groups: Sequence[str], resamples: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
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


def agreement_per_kind(damage: Tensor, quality: Tensor, kinds: Sequence[str]) -> dict[str, Agreement]:
    """Return `agreement` for each kind of distortion with enough ratings and scores that are not all equal."""
    table = {}
    for kind in sorted(set(kinds)):
        members = torch.tensor([index for index, each in enumerate(kinds) if each == kind])
        if len(members) >= SMALLEST_GROUP and damage[members].std() > 0 and quality[members].std() > 0:
            table[kind] = agreement(damage[members], quality[members], resamples=0)
    return table


def score_ratings(
    metrics: Sequence[FullReference], ratings: Sequence[Rating], *, report: Callable[[str], None] = lambda message: None
) -> tuple[dict[str, Tensor], list[Rating]]:
    """Score every rated pair; files that cannot be read are reported and left out.

    Args:
        metrics: any.
        ratings: from a loader of `iqa_datasets`.
        report: called with a line for each pair that is left out.

    Returns:
        Damage by metric, (n,) each, and the n ratings that were scored.

    Raises:
        ValueError: if no pair could be scored.
    """
    damage: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    scored = []
    for rating in tqdm(ratings, desc="Scoring", unit="pair"):
        try:
            ref, dist = read_image(rating.ref), read_image(rating.dist)
            if ref.shape != dist.shape:
                raise ValueError(f"{rating.dist} and its reference differ in size.")
        except (OSError, ValueError) as error:
            report(f"Left out: {error}")
            continue
        for metric in metrics:
            damage[metric.name].append(metric.damage(ref=ref, dist=dist).item())
        scored.append(rating)
    if not scored:
        raise ValueError(f"Expected images to score, got none that can be read, of {len(ratings)} ratings.")
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in damage.items()}, scored
