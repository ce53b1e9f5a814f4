"""Correlations of scores: Pearson's, Spearman's, Kendall's."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(first: Tensor, second: Tensor) -> float:
    """Return the linear correlation of two tensors of one shape; NaN where one of them is constant."""
    first, second = (each.flatten().double() - each.double().mean() for each in (first, second))
    return ((first * second).sum() / (first.norm() * second.norm())).item()


def ranks(values: Tensor) -> Tensor:
    """Return the ranks of (n,), equal values sharing the mean of theirs, as Spearman's correlation needs."""
    _, inverse, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two (n,) tensors; NaN where one of them is constant."""
    return pearson(ranks(first), ranks(second))


def kendall(first: Tensor, second: Tensor) -> float:
    """Return Kendall's tau-b of two (n,) tensors: the excess of agreeing over disagreeing pairs, ties allowed for.

    Args:
        first: (n,).
        second: (n,).

    Returns:
        Tau-b, in [-1, 1]; NaN where one of them is constant.
    """
    agreeing = ties_first = ties_second = 0.0
    for index in range(len(first)):  # a row of the n x n comparison at a time: 20,000 scores would need 3 GB at once
        sign_first = torch.sign(first[index + 1 :] - first[index])
        sign_second = torch.sign(second[index + 1 :] - second[index])
        agreeing += float((sign_first * sign_second).sum())
        ties_first += float((sign_first == 0).sum())
        ties_second += float((sign_second == 0).sum())
    pairs = len(first) * (len(first) - 1) / 2
    scale = ((pairs - ties_first) * (pairs - ties_second)) ** 0.5
    return agreeing / scale if scale else float("nan")
