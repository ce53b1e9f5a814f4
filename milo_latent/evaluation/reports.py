"""Tables and figures of a metric's agreement with people; figures need matplotlib."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milo_latent.atomic import write_text
from milo_latent.distortions import DISTORTIONS, LEVELS
from milo_latent.evaluation.agreement import Agreement, fit_logistic
from milo_latent.evaluation.distortion_settings import rising_share
from milo_latent.extras import import_extra

Row = dict[str, str | float | int]


def agreement_rows(metric: str, overall: Agreement, per_kind: dict[str, Agreement]) -> list[Row]:
    """Return a row for all ratings and one for each kind of distortion."""
    rows: list[Row] = []
    for kind, each in {"all": overall, **per_kind}.items():
        (srcc_low, srcc_high), (plcc_low, plcc_high) = each.srcc_interval, each.plcc_interval
        figures = {"srcc": each.srcc, "srcc_low": srcc_low, "srcc_high": srcc_high, "krcc": each.krcc}
        figures |= {"plcc": each.plcc, "plcc_low": plcc_low, "plcc_high": plcc_high}
        rounded = {name: round(value, 4) for name, value in figures.items()}
        rows.append({"metric": metric, "kind": kind, **rounded, "count": each.count})
    return rows


def rising_rows(errors: dict[str, Tensor], opinions: Tensor) -> list[Row]:
    """Return how often each metric orders neighboring levels as people do: a row for all kinds, then one for each.

    Args:
        errors: by metric, (photos, 125).
        opinions: mean opinions, (125,), higher is better.
    """
    rows: list[Row] = []
    for metric, values in errors.items():
        shares = rising_share(values, opinions)
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


def _new_figure(width: float, height: float) -> Any:
    figure = import_extra("matplotlib.figure", "plots", "A figure")
    return figure.Figure(figsize=(width, height), layout="constrained")


def scatter(errors: Tensor, opinions: Tensor, kinds: Sequence[str], *, title: str) -> Any:
    """Return a figure of opinions over errors, a color per kind, with the four-parameter logistic.

    Args:
        errors: (n,), lower is better.
        opinions: (n,), higher is better.
        kinds: kind of distortion of each pair.
        title: label of the horizontal axis, such as the metric's name.

    Raises:
        ImportError: if matplotlib or scipy is not installed.
    """
    figure = _new_figure(7, 5)
    axes = figure.add_subplot()
    for index, name in enumerate(dict.fromkeys(kinds)):
        members = torch.tensor([each == name for each in kinds])
        color, marker = f"C{index % 10}", "osD^v"[index // 10 % 5]
        axes.plot(errors[members].tolist(), opinions[members].tolist(), marker, color=color, markersize=4, label=name)
    line = torch.linspace(errors.min().item(), errors.max().item(), 200, dtype=torch.float64)
    axes.plot(line.tolist(), fit_logistic(errors, opinions)(line).tolist(), color="black", linewidth=1)
    axes.set(xlabel=f"{title} (higher is worse)", ylabel="opinion (higher is better)")
    figure.legend(loc="outside right upper", fontsize=6)
    return figure


def level_study(errors: Tensor, opinions: Tensor) -> Any:
    """Return a figure of predicted opinion against level, a panel per kind of distortion, a line per photo.

    Args:
        errors: (photos, 125), in the order of `SETTINGS`.
        opinions: mean opinions, (125,), drawn as a dashed line.

    Raises:
        ImportError: if matplotlib or scipy is not installed.

    Source: supplement, section 2.2, Fig. 1.
    """
    predicted = fit_logistic(errors.mean(dim=0), opinions)(errors).reshape(-1, len(DISTORTIONS), len(LEVELS))
    people = opinions.reshape(len(DISTORTIONS), len(LEVELS))
    figure = _new_figure(13, 12)
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
