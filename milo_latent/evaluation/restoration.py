"""Benchmark of restorations: photos are restored with every setting and seed, measured, tabulated and shown."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.atomic import write_text
from milo_latent.checks import shortened
from milo_latent.diffbir.rules import resize
from milo_latent.evaluation.figures import measure, whole_cells
from milo_latent.evaluation.metrics import FullReference
from milo_latent.evaluation.reports import Row
from milo_latent.evaluation.restoration_cases import Case, Photo
from milo_latent.files import read_image, write_image
from milo_latent.guidance.curriculum import Schedule
from milo_latent.latents.codec import decode_latents, encode_image
from milo_latent.pictures import center_crop, round_to_8bit, to_8bit
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restore import restore
from milo_latent.restoration.settings import RestorationSettings
from milo_latent.structure import read_json, refusing_damage

KEY = ("degradation", "photo", "setting", "seed")  # of a row; what samples nothing has the seed ""
THROUGH_VAE = " through the VAE"  # ends the names of what sheets leave out
DIGITS = {"psnr": 2, "musiq": 2, "milo_i": 5, "milo_l": 5}  # of a figure in a printed table; others have 4
SIDE, LABEL, COLUMNS = 256, 16, 4  # of a sheet: pixels of a picture's side and of its label, pictures side by side
Run = Callable[[Photo], Tensor]


class RowTable:
    """Rows in `rows.csv`, on disk as they come, beside the settings that they depend on.

    Args:
        folder: made where it is missing.
        record: what the rows depend on besides their `KEY`, kept in `settings.json`.
        figures: names of the columns that follow `KEY` and "seconds".

    Raises:
        ValueError: if the folder holds rows of another record; the message names what differs.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], figures: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path, self.columns = folder, folder / "rows.csv", (*KEY, "seconds", *figures)
        self.rows: dict[tuple[str, ...], Row] = {}
        self._check(folder / "settings.json", json.loads(json.dumps(record)))
        text = self.path.read_text(encoding="utf-8", errors="surrogateescape") if self.path.is_file() else ""
        # what follows the last line break was cut off in writing
        text = text[: text.rfind("\n") + 1] or ",".join(self.columns) + "\n"
        write_text(self.path, text)
        with refusing_damage(f"Expected the columns {', '.join(self.columns)} in {self.path}"):
            for row in csv.DictReader(io.StringIO(text)):
                values = {name: float(row[name] or math.nan) for name in self.columns[len(KEY) :]}
                self.rows[tuple(row[name] for name in KEY)] = {name: row[name] for name in KEY} | values

    @staticmethod
    def _check(path: Path, record: dict[str, Any]) -> None:
        if not path.is_file():
            write_text(path, json.dumps(record, indent=2) + "\n")
            return
        earlier = read_json(path)
        for name in sorted(record.keys() | earlier.keys()):
            if record.get(name) != earlier.get(name):
                before = shortened(repr(earlier.get(name)))
                raise ValueError(
                    f"Expected {name} {before}, of the rows in {path.parent}, got {record.get(name)!r}. "
                    "Choose another output folder, or the earlier settings."
                )

    def add(self, row: Row) -> None:
        """Add a row and write it."""
        self.rows[tuple(str(row[name]) for name in KEY)] = row
        with self.path.open("a", encoding="utf-8", errors="surrogateescape", newline="") as file:
            values = ("" if row[name] != row[name] else row[name] for name in self.columns)
            csv.writer(file, lineterminator="\n").writerow(values)


def unguided_runs(pipe: DiffBIRPipeline, settings: RestorationSettings, *, referenced: bool) -> dict[str, Run]:
    """Return what surrounds the restorations, by name: the input, the cleaner, and what the autoencoder loses.

    Args:
        pipe: cleans, encodes and decodes.
        settings: resolved.
        referenced: whether there are clean images.
    """
    tile = whole_cells(pipe.vae, settings.tile)

    def autoencode(image: Tensor | None) -> Tensor:
        assert image is not None
        height, width = image.shape[2:]
        return decode_latents(pipe.vae, encode_image(pipe.vae, image, tile=tile), tile=tile)[..., :height, :width]

    def clean(photo: Photo) -> Tensor:
        with pipe.tiling(settings.tile):
            return pipe.clean(photo.degraded.to(pipe.device), photo.size, compatibility=settings.compatibility)

    runs: dict[str, Run] = {"input": lambda photo: photo.degraded}
    if referenced:
        runs["clean image" + THROUGH_VAE] = lambda photo: autoencode(photo.clean)
    return runs | {"cleaner only": clean, "cleaner" + THROUGH_VAE: lambda photo: autoencode(clean(photo))}


@dataclass(frozen=True, kw_only=True)
class RestorationBenchmark:
    """What is computed for each photo.

    Args:
        pipe: restores.
        settings: of every restoration, unresolved; strength, schedule and seed are those below instead.
        scales: strengths of MILO guidance; 0 is no guidance. Without any, the cleaner alone is measured.
        schedules: of the curriculum.
        seeds: of the sampling.
        figures: by name, as of `open_figures`.
        sheets: how many photos of each degradation are shown in a sheet.
    """

    pipe: DiffBIRPipeline
    settings: RestorationSettings
    scales: Sequence[float]
    schedules: Sequence[Schedule]
    seeds: Sequence[int]
    figures: Mapping[str, FullReference]
    sheets: int = 0

    def run(self, cases: Sequence[Case], table: RowTable) -> list[Row]:
        """Compute the rows that the table lacks, and write sheets beside it; return the rows of these cases.

        Raises:
            ValueError: before the first photo is read, for settings that cannot work with the pipeline.
        """
        groups: dict[str, list[Case]] = {}
        for case in cases:
            groups.setdefault(case.degradation, []).append(case)
        plans = {name: self._plan(group[0]) for name, group in groups.items()}
        rows = []
        for case in tqdm(cases, unit="photo", disable=len(cases) < 2):
            pictures = table.folder / "pictures" / case.degradation / case.photo
            shown = case in groups[case.degradation][: max(self.sheets, 0)]
            rows += self._run_case(case, *plans[case.degradation], table, pictures if shown else None)
        return rows

    def _plan(self, case: Case) -> tuple[dict[tuple[str, str], Run], float]:
        """Return what computes each setting and seed for the degradation of `case`, and the factor of enlargement."""
        settings, pipe = self.settings, self.pipe
        if case.factor > 1:  # what was made smaller is enlarged as much, unless the settings say otherwise
            settings = replace(settings, task=settings.task or "sr", upscale=settings.upscale or float(case.factor))
        if any(self.scales):  # what is compared with guidance samples as well, in as many steps
            strongest = replace(settings, milo_scale=max(self.scales)).resolve(pipe)
            settings = replace(settings, stage=strongest.stage, steps=strongest.steps)
        unguided = replace(settings, milo_scale=0.0).resolve(pipe)
        assert unguided.upscale is not None
        before = unguided_runs(pipe, unguided, referenced=case.clean is not None)
        runs = {(name, ""): run for name, run in before.items()}
        for scale, schedule, seed in product(self.scales, self.schedules, self.seeds):
            name = f"guidance {scale:g} {schedule}" if scale else "no guidance"
            guided = replace(settings, milo_scale=scale, schedule=schedule if scale else None, seed=seed)
            runs[name, str(seed)] = partial(_restore, pipe=pipe, settings=guided.resolve(pipe))
        return runs, unguided.upscale

    @torch.no_grad()
    def _run_case(
        self, case: Case, runs: dict[tuple[str, str], Run], upscale: float, table: RowTable, pictures: Path | None
    ) -> list[Row]:
        """Compute what is missing for a photo, and keep the pictures that its sheet shows where it has one."""
        kept = {}
        if pictures is not None:
            kept = {key: pictures / f"{', seed '.join(filter(None, key))}.png" for key in runs if self._is_shown(*key)}
        keys = {key: (case.degradation, case.photo, *key) for key in runs}
        missing = [key for key in runs if keys[key] not in table.rows or (key in kept and not kept[key].is_file())]
        photo = case.read(upscale) if missing else None
        for key in missing:
            assert photo is not None
            began = time.perf_counter()
            result = runs[key](photo).cpu()
            seconds = time.perf_counter() - began
            result = round_to_8bit(resize(result, photo.size))
            clean = None if photo.clean is None else photo.clean.to(self.pipe.device)
            figures = measure(self.figures, result.to(self.pipe.device), clean)
            if key in kept:
                kept[key].parent.mkdir(parents=True, exist_ok=True)
                write_image(kept[key], result)
            table.add({**dict(zip(KEY, keys[key], strict=True)), "seconds": seconds, **figures})
        if pictures is not None:
            images = {path.stem: read_image(path) for path in kept.values()}
            clean = case.read(upscale).clean
            sheet = draw_sheet(images if clean is None else images | {"clean image": clean})
            sheet.save(table.folder / f"{case.degradation}_{case.photo}.png")
        return [table.rows[key] for key in keys.values()]

    def _is_shown(self, setting: str, seed: str) -> bool:
        return not setting.endswith(THROUGH_VAE) and seed in ("", str(self.seeds[0]))


def _restore(photo: Photo, *, pipe: DiffBIRPipeline, settings: RestorationSettings) -> Tensor:
    return restore(photo.degraded, pipe, settings)


def draw_sheet(images: Mapping[str, Tensor]) -> Image.Image:
    """Return the middle of each image, (1, 3, H, W), at full size, side by side under its name."""
    width, height = SIDE * min(COLUMNS, len(images)), (SIDE + LABEL) * -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, image) in enumerate(images.items()):
        left, top = index % COLUMNS * SIDE, index // COLUMNS * (SIDE + LABEL)
        draw.text((left + 4, top + 2), name, fill="black")
        sheet.paste(Image.fromarray(to_8bit(center_crop(image, SIDE)[0])), (left, top + LABEL))
    return sheet


def summarize(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> list[Row]:
    """Return the means of each degradation and setting, over photos and seeds.

    Args:
        rows: for each setting, one of each photo and seed.
        figures: names of the columns to summarize. `_sd_seeds` is the standard deviation, over seeds, of the mean over
            photos, `_sd_photos` that of the mean over seeds, over photos; NaN for one alone. Photos without a value
            are left out.

    Returns:
        Rows in the order of `rows`, with the median of "seconds", and the change of MILO_I against the input.
    """
    groups: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["degradation"], row["setting"]), []).append(row)
    summaries: list[Row] = []
    for (degradation, setting), group in groups.items():
        seeds = list(dict.fromkeys(row["seed"] for row in group))
        summary: dict[str, Any] = {"degradation": degradation, "setting": setting, "photos": len(group) // len(seeds)}
        summary |= {"seeds": len(seeds), "seconds": float(np.median([row["seconds"] for row in group]))}
        for name in figures:
            values = np.array([[row[name] for row in group if row["seed"] == seed] for seed in seeds])
            summary |= _statistics(name, values[:, ~np.isnan(values).any(axis=0)])
        if "milo_i" in figures:
            inputs = [row["milo_i"] for row in groups[degradation, "input"]]
            summary["milo_i_change"] = summary["milo_i"] / float(np.nanmean(inputs)) - 1
        summaries.append(summary)
    return summaries


def _statistics(name: str, values: np.ndarray) -> dict[str, float]:
    """Return mean and standard deviations of values, (seeds, photos)."""

    def deviation(means: np.ndarray) -> float:
        return float(means.std(ddof=1)) if len(means) > 1 else math.nan

    if not values.size:
        return dict.fromkeys((name, f"{name}_sd_seeds", f"{name}_sd_photos"), math.nan)
    seeds, photos = deviation(values.mean(axis=1)), deviation(values.mean(axis=0))
    return {name: float(values.mean()), f"{name}_sd_seeds": seeds, f"{name}_sd_photos": photos}


def printed(summaries: Sequence[Row], figures: Mapping[str, FullReference]) -> list[Row]:
    """Return the rows to print: each mean, with its standard deviation over seeds where there are several."""
    rows: list[Row] = []
    for summary in summaries:
        row: Row = {name: summary[name] for name in ("degradation", "setting", "photos")}
        for name, figure in figures.items():
            mean, deviation = (f"{summary[key]:.{DIGITS.get(name, 4)}f}" for key in (name, f"{name}_sd_seeds"))
            label = f"{name.upper()} {'↑' if figure.higher_is_better else '↓'}"
            row[label] = mean if deviation == "nan" else f"{mean} ± {deviation}"
        if "milo_i_change" in summary:
            row["change of MILO_I"] = f"{summary['milo_i_change']:+.1%}"
        rows.append(row | {"s": f"{summary['seconds']:.1f}"})
    return rows
