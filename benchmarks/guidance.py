"""Table and plot of what guidance does: none, DiffBIR's region-adaptive one, and ours in each mode and curriculum.

    python benchmarks/guidance.py --csv guidance.csv --milo-image MILO.pth --clean FOLDER --degraded FOLDER
    python benchmarks/guidance.py --csv guidance.csv --milo-image MILO.pth --clean FOLDER --task sr
    python benchmarks/guidance.py --csv guidance.csv --plot guidance_fidelity.png  # from what was measured before

The task "sr" makes the degraded images itself: a quarter of the size, bicubic, 8 bit. Options that let the generator
invent more: `--control` below 1, `--noise-aug`, few `--steps`. Sampling starts from noise. A rerun with the same CSV
skips what is there. PSNR in dB and SSIM are better when higher; the error E of MILO_I when lower.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.diffbir.rules import resize
from milo_latent.diffbir.versions import UPSCALE
from milo_latent.evaluation.figures import image_error, measure
from milo_latent.evaluation.metrics import FullReference, by_name
from milo_latent.files import read_image
from milo_latent.guidance.base import Guide
from milo_latent.guidance.curriculum import SCHEDULES
from milo_latent.guidance.milo import MILOGuidance, Mode
from milo_latent.guidance.region_adaptive import RegionAdaptiveGuidance
from milo_latent.metric.network import MILO
from milo_latent.pictures import center_crop, round_to_8bit
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restorer import load_restorer
from milo_latent.training.data.crops import list_images

COLUMNS = ("setting", "row", "image", "psnr", "ssim", "milo_i", "seconds")
CLEANER, NONE = "cleaner only", "no guidance"
COLOURS = {"region-adaptive": "tab:red", "constant": "tab:gray", "linear": "tab:orange", "cosine": "tab:blue"}
PLOTTED_LOSS = 0.2  # dB
Record = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One image: its name, its place in the folder, clean and cleaned, (1, 3, H, W) in [0, 1]."""

    name: str
    index: int
    clean: Tensor
    cleaned: Tensor


def read_examples(restorer: DiffBIRPipeline, options: argparse.Namespace) -> list[Example]:
    """Return the first images, cropped in the middle, after stage 1, which all rows share."""
    examples = []
    upscale, side = int(UPSCALE[options.task]), options.crop or sys.maxsize
    for index, path in enumerate(list_images([options.clean])[: options.images]):
        clean = center_crop(read_image(path), side)
        height, width = clean.shape[2:]
        if options.degraded is None:
            degraded = round_to_8bit(resize(clean, (height // upscale, width // upscale)))
        else:
            degraded = center_crop(read_image(options.degraded / path.name), side)
        cleaned = restorer.clean(degraded, (height, width))
        examples.append(Example(path.name, index, clean, cleaned))
    return examples


def make_rows(restorer: DiffBIRPipeline, scales: Iterable[float]) -> dict[str, Callable[[], Guide | None]]:
    """Return what makes the guidance of each row of the table."""
    vae, metric = restorer.vae, restorer.metric
    assert metric is not None
    rows: dict[str, Callable[[], Guide | None]] = {NONE: lambda: None}
    for scale in scales:
        rows[f"region-adaptive {scale:g}"] = lambda scale=scale: RegionAdaptiveGuidance(vae, scale, loss="w_mse")
        for mode in get_args(Mode):
            # under the flat weight of "constant" the mode metric is the mode mask: no gradient through the mask
            for schedule in SCHEDULES if mode == "mask" else SCHEDULES[1:]:
                rows[f"{mode} {schedule} {scale:g}"] = lambda mode=mode, schedule=schedule, scale=scale: MILOGuidance(
                    metric, scale, schedule, mode=mode
                )
        rows[f"metric milo {scale:g}"] = lambda scale=scale: MILOGuidance(
            metric, scale, mode="metric", objective="milo"
        )
    return rows


def batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Group examples of one size of image."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example.cleaned.shape), []).append(example)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def run_row(
    restorer: DiffBIRPipeline,
    figures: dict[str, FullReference],
    guide: Guide | None,
    batch: list[Example],
    options: argparse.Namespace,
) -> Iterator[Record]:
    """Sample a batch and measure each of its images."""
    generators = [torch.Generator().manual_seed(options.seed + example.index) for example in batch]
    began = time.perf_counter()
    results = restorer(
        image=torch.cat([example.cleaned for example in batch]),
        num_inference_steps=options.steps,
        controlnet_conditioning_scale=options.control,
        noise_aug=options.noise_aug,
        generator=generators,
        output_type="pt",
        callback_on_step_end=guide,
    ).images
    seconds = (time.perf_counter() - began) / len(batch)
    for example, result in zip(batch, results, strict=True):
        yield {"image": example.name, **measure(figures, result[None], example.clean), "seconds": seconds}


def read_records(path: Path) -> list[Record]:
    """Return what was measured before."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: value if name in COLUMNS[:3] else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def append_records(path: Path, records: list[Record]) -> None:
    """Add records to the file, all of a row at once."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(records)


def name_setting(options: argparse.Namespace) -> str:
    """Return all that the figures depend on besides row and image."""
    data = f"{options.clean.name} x{UPSCALE[options.task]:g}"
    if options.degraded is not None:
        data = options.degraded.name
    name = f"{data}, crop {options.crop}, steps {options.steps}, control {options.control:g}"
    return f"{name}, noise_aug {options.noise_aug}, seed {options.seed}, {options.model}"


def measure_setting(options: argparse.Namespace) -> str:
    """Measure what the CSV lacks; return the setting's name."""
    setting = name_setting(options)
    done = {(each["setting"], each["row"], each["image"]) for each in read_records(options.csv)}
    restorer, judge = load_restorer(options.model, device="cpu"), MILO.from_pretrained(options.milo_image)
    figures = {"psnr": by_name("psnr"), "ssim": by_name("ssim"), "milo_i": image_error(judge)}
    restorer.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        examples = read_examples(restorer, options)
        restorer.cleaner = None  # its results are the pipeline's images from here on
        left = [example for example in examples if (setting, CLEANER, example.name) not in done]
        found = [{"image": e.name, **measure(figures, e.cleaned, e.clean), "seconds": 0.0} for e in left]
        append_records(options.csv, [{"setting": setting, "row": CLEANER} | each for each in found])
        for row, make in tqdm(make_rows(restorer, options.scales).items(), setting, file=sys.stderr, mininterval=10):
            left = [example for example in examples if (setting, row, example.name) not in done]
            for batch in batches(left, options.batch):
                found = list(run_row(restorer, figures, make(), batch, options))
                append_records(options.csv, [{"setting": setting, "row": row} | each for each in found])
    return setting


def group(records: list[Record], setting: str) -> dict[str, dict[str, Record]]:
    """Return row ─▶ image ─▶ record of a setting, of the images that every row has."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["setting"] == setting:
            rows.setdefault(record["row"], {})[record["image"]] = record
    shared = set.intersection(*(set(images) for images in rows.values()))
    return {row: {name: each for name, each in images.items() if name in shared} for row, images in rows.items()}


def mean(images: dict[str, Record], column: str) -> float:
    """Return the mean of a column over images."""
    return statistics.fmean(each[column] for each in images.values())


def milo_change(images: dict[str, Record], base: dict[str, Record]) -> tuple[float, float]:
    """Return the change of MILO_I in %: the mean over images of each one's, and its standard error."""
    changes = [100 * (images[name]["milo_i"] / base[name]["milo_i"] - 1) for name in base]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
    return statistics.fmean(changes), error


def print_table(rows: dict[str, dict[str, Record]], setting: str) -> None:
    """Print the means of a setting, and the changes against no guidance."""
    base = rows[NONE]
    print(f"\n| {setting}: {len(base)} images | PSNR, dB | change | SSIM | MILO_I | change, % | s per image |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row, images in rows.items():
        psnr, ssim, milo, seconds = (mean(images, column) for column in ("psnr", "ssim", "milo_i", "seconds"))
        figures = f"{psnr:.2f} | {psnr - mean(base, 'psnr'):+.2f} | {ssim:.4f} | {milo:.5f}"
        change, error = milo_change(images, base)
        print(f"| {row} | {figures} | {change:+.1f} ± {error:.1f} | {seconds:.2f} |")


def print_summary(tables: dict[str, dict[str, dict[str, Record]]]) -> None:
    """Print the changes of PSNR and MILO_I of the rows that all settings have; no guidance itself in full."""
    print("\n| | " + " | ".join(f"{setting} ({len(rows[NONE])})" for setting, rows in tables.items()) + " |")
    print("| --- |" + " ---: |" * len(tables))
    first, *others = tables.values()
    for row in [row for row in first if all(row in other for other in others)]:
        cells = []
        for rows in tables.values():
            psnr, milo, error = mean(rows[row], "psnr"), *milo_change(rows[row], rows[NONE])
            change = f"{psnr - mean(rows[NONE], 'psnr'):+.2f}, {milo:+.1f} ± {error:.1f} %"
            cells.append(f"{psnr:.2f}, {mean(rows[row], 'milo_i'):.5f}" if row == NONE else change)
        print(f"| {row} | " + " | ".join(cells) + " |")


def plot(records: list[Record]) -> Any:
    """Draw PSNR against MILO_I, a panel a setting, a line over the strengths of each method; return the figure."""
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys(record["setting"] for record in records))
    columns = min(len(settings), 3)
    lines = -(-len(settings) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(settings) :]:
        axes.set_visible(False)
    for axes, setting in zip(grid.flat, settings, strict=False):
        _plot_setting(axes, group(records, setting), setting)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _plot_setting(axes: Any, rows: dict[str, dict[str, Record]], setting: str) -> None:
    points = {row: (mean(images, "psnr"), mean(images, "milo_i")) for row, images in rows.items()}
    series: dict[str, list[tuple[float, tuple[float, float]]]] = {}
    for row, point in points.items():
        name, _, scale = row.rpartition(" ")
        if row not in (CLEANER, NONE):
            series.setdefault(name, []).append((float(scale), point))
    for name, entries in series.items():
        path = [points[NONE], *(point for _, point in sorted(entries))]
        colour = COLOURS.get(name.split()[-1], "tab:green")
        dashes = "--" if name.startswith("metric") else "-"
        axes.plot(*zip(*path, strict=True), dashes, color=colour, marker=".", markersize=4, linewidth=1, label=name)
    axes.plot(*points[NONE], "ko", markersize=5, label=NONE)
    # what falls far below no guidance would squeeze the rest: it runs off the panel
    seen = [
        point for point in points.values() if point[0] > points[NONE][0] - PLOTTED_LOSS and point != points.get(CLEANER)
    ]
    for values, limit in zip(zip(*seen, strict=True), (axes.set_xlim, axes.set_ylim), strict=True):
        margin = 0.05 * (max(values) - min(values))
        limit(min(values) - margin, max(values) + margin)
    data, _, steps, control, noise_aug, *_ = setting.split(", ")
    axes.set_title(", ".join([data, steps, control, noise_aug]), fontsize=8)
    axes.set_xlabel("PSNR, dB (more is better)", fontsize=8)
    axes.set_ylabel("MILO_I (less is better)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.3)


def write_plot(path: Path, records: list[Record]) -> None:
    """Write the plot as a small PNG, in 256 colours."""
    buffer = io.BytesIO()
    plot(records).savefig(buffer, dpi=80)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    """Measure, print tables and, with --plot, draw what the CSV holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="read and added to, a line for each image")
    parser.add_argument("--clean", type=Path, help="without it nothing is measured")
    parser.add_argument("--degraded", type=Path, help="files of the same names")
    parser.add_argument("--milo-image", help="official MILO.pth, the judge")
    parser.add_argument("--task", choices=["denoise", "sr"], default="denoise")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--scales", type=float, nargs="*", default=[0.25, 0.5, 1.0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--control", type=float, default=1.0, help="factor of the ControlNet; less invents more")
    parser.add_argument("--noise-aug", type=int, default=0, help="timestep to which the condition is noised")
    parser.add_argument("--images", type=int, default=6, help="only the first of the folder")
    parser.add_argument("--crop", type=int, default=256, help="side of the middle that is used; 0 takes all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args()
    if options.clean and not options.milo_image:
        parser.error("--milo-image is needed to measure: the official MILO.pth")
    if options.clean and (options.degraded is None) != (options.task == "sr"):
        parser.error("--degraded is for the task denoise, which needs it")
    torch.set_num_threads(options.threads)
    wanted = [measure_setting(options)] if options.clean else None
    records = read_records(options.csv)
    tables = {setting: group(records, setting) for setting in dict.fromkeys(each["setting"] for each in records)}
    for setting in wanted or tables:
        print_table(tables[setting], setting)
    if len(tables) > 1 and not wanted:
        print_summary(tables)
    if options.plot:
        write_plot(options.plot, records)


if __name__ == "__main__":
    main()
