"""Tables and plots of a metric's agreement with people; plots need matplotlib and are returned as figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milo_latent.distortions import DISTORTIONS, LEVELS
from milo_latent.evaluation.agreement import Agreement
from milo_latent.evaluation.conditions import rising_share
from milo_latent.evaluation.logistic import fit_logistic
from milo_latent.files import write_text

Row = dict[str, str | float | int]


def agreement_rows(metric: str, overall: Agreement, per_kind: dict[str, Agreement]) -> list[Row]:
    """Return a row for all ratings and one per kind of distortion."""
    rows: list[Row] = []
    for kind, each in {"all": overall, **per_kind}.items():
        low, high = each.srcc_interval
        plcc_low, plcc_high = each.plcc_interval
        rows.append(
            {
                "metric": metric,
                "kind": kind,
                "srcc": round(each.srcc, 4),
                "srcc_low": round(low, 4),
                "srcc_high": round(high, 4),
                "krcc": round(each.krcc, 4),
                "plcc": round(each.plcc, 4),
                "plcc_low": round(plcc_low, 4),
                "plcc_high": round(plcc_high, 4),
                "count": each.count,
            }
        )
    return rows


def rising_rows(damage: dict[str, Tensor], means: Tensor) -> list[Row]:
    """Return how often each metric orders neighbouring levels as people do: a row over all kinds, and one per kind.

    Args:
        damage: of each metric, (photos, 125).
        means: of people, (125,), higher is better.
    """
    rows: list[Row] = []
    for metric, scores in damage.items():
        shares = rising_share(scores, means)
        overall = sum(shares.values()) / len(shares)
        for kind, share in [("all", overall), *sorted(shares.items(), key=lambda item: item[1])]:
            rows.append({"metric": metric, "kind": kind, "rising_share": round(share, 4)})
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, completely or not at all."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def format_rows(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _pyplot() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "milo_latent[plots]".') from error
    return Figure


def scatter(damage: Tensor, quality: Tensor, kinds: Sequence[str], *, title: str) -> Any:
    """Return a figure of opinions over scores, a colour per kind, with the four-parameter logistic.

    Args:
        damage: (n,), higher means worse.
        quality: opinions, (n,), higher means better.
        kinds: of distortion, n of them.
        title: of the figure.

    Raises:
        ImportError: where matplotlib is missing.
    """
    figure = _pyplot()(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(kinds))
    for index, name in enumerate(names):
        members = torch.tensor([each == name for each in kinds])
        colour, marker = f"C{index % 10}", "osD^v"[index // 10 % 5]
        axes.plot(damage[members].tolist(), quality[members].tolist(), marker, color=colour, markersize=4, label=name)
    line = torch.linspace(damage.min().item(), damage.max().item(), 200, dtype=torch.float64)
    axes.plot(line.tolist(), fit_logistic(damage, quality)(line).tolist(), color="black", linewidth=1)
    axes.set(xlabel=f"{title} (higher is worse)", ylabel="opinion (higher is better)")
    figure.legend(loc="outside right upper", fontsize=6)
    return figure


def level_study(damage: Tensor, quality: Tensor, photos: Sequence[str]) -> Any:
    """Return a figure of predicted opinion against level, a panel per distortion, a line per photo.

    Args:
        damage: (photos, 125), in the order of `CONDITIONS`.
        quality: mean opinions of people, (125,), drawn as a dashed line.
        photos: names.

    Raises:
        ImportError: where matplotlib is missing.

    Source: supplement, section 2.2, Fig. 1.
    """
    predicted = fit_logistic(damage.mean(dim=0), quality)(damage).reshape(len(photos), len(DISTORTIONS), len(LEVELS))
    people = quality.reshape(len(DISTORTIONS), len(LEVELS))
    figure = _pyplot()(figsize=(13, 12), layout="constrained")
    for index, kind in enumerate(DISTORTIONS):
        axes = figure.add_subplot(5, 5, index + 1)
        for row in predicted[:, index].tolist():
            axes.plot(LEVELS, row, linewidth=0.8, alpha=0.6)
        axes.plot(LEVELS, people[index].tolist(), "k--", linewidth=1.5)
        axes.set(ylim=(1, 5), xticks=LEVELS)
        axes.set_title(kind, fontsize=8)
    figure.supxlabel("level")
    figure.supylabel("opinion: predicted, and of people (dashed)")
    return figure
