"""What each training objective does to a restorer: equal budgets, several seeds, metrics that nothing was trained with.

    python benchmarks/train_ablation.py --images FOLDER --clean FOLDER --degraded NOISY15 NOISY25 NOISY50 \
        --judges MILO.pth milo-image --start weights/nano/cleaner --output RUNS

Every run starts from the same weights, and runs of one seed see the same crops and degradations. The masks are those
of `--metric`; "milo" in the results is the error E of each MILO_I of `--judges`. PSNR in dB, SSIM, MS-SSIM and VIF
(torchmetrics) are better when higher, GMSD and MILO when lower; all are taken on images rounded to 8 bit. A verdict
needs a judge that was not trained with: GMSD, or a MILO_I whose masks were not used. `RUNS/ablation.csv` has a row for
each run and folder of degraded images. The same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from milo_latent.evaluation.metrics import by_name
from milo_latent.evaluation.reports import Row, write_rows
from milo_latent.files import read_image, write_text
from milo_latent.latents.codec import pad_image
from milo_latent.metric.network import MILO
from milo_latent.pictures import round_to_8bit
from milo_latent.training import train_image_restorer
from milo_latent.training.data.crops import list_images, spread_over
from milo_latent.training.engine.run import OptimizerName
from milo_latent.training.objectives import OBJECTIVES

BASELINE = "mae"
METRICS = ("psnr", "ssim", "ms-ssim", "vif", "gmsd")
MULTIPLE = 64  # of the sides that a network is given


def full_reference_metrics(judges: list[str]) -> dict[str, Callable[..., Tensor]]:
    """Return the metrics of the table, called with the keywords `ref` and `dist`."""
    errors = {f"milo:{Path(judge).stem}": MILO.from_pretrained(judge) for judge in judges}
    return {name: by_name(name).compute for name in METRICS} | errors


@torch.no_grad()
def evaluate(network: nn.Module, degraded: Path, clean: list[Path], metrics: dict[str, Callable[..., Tensor]]) -> Row:
    """Return the mean of each metric over the restored images of `degraded`, whose names are those of `clean`."""
    sums = dict.fromkeys(metrics, 0.0)
    for path in tqdm(clean, desc=degraded.name, unit="image"):
        ref, dist = read_image(path), read_image(degraded / path.name)
        restored = network(pad_image(dist, MULTIPLE))[..., : ref.shape[2], : ref.shape[3]]
        restored = round_to_8bit(restored.float())
        for name, metric in metrics.items():
            sums[name] += metric(ref=ref, dist=restored).item() / len(clean)
    return {name: round(value, 8) for name, value in sums.items()}


def train(options: argparse.Namespace, objective: str, seed: int) -> nn.Module:
    """Return the network of one run, trained now or before."""
    arguments = [
        "--images", *options.images, "--validation", str(options.clean), "--validation-images", "1",
        "--output", str(options.output / f"{objective}-{seed}"), "--seed", str(seed), "--objective", objective,
        "--metric", options.metric, "--degradation", options.degradation, "--steps", str(options.steps),
        "--batch-size", str(options.batch_size), "--crop-size", str(options.crop_size),
        "--learning-rate", str(options.learning_rate), "--optimizer", options.optimizer, "--warmup", "20",
        "--decay", "0.7",
        "--network", options.network, "--network-options", json.dumps(options.network_options),
    ]  # fmt: skip
    arguments += ["--start", str(options.start)] if options.start else []
    return train_image_restorer.train(train_image_restorer.parser().parse_args(arguments)).cpu().eval()


def check_settings(options: argparse.Namespace) -> None:
    """Keep the settings beside the results, and refuse to add results of other settings."""
    varying = ("output", "objectives", "seeds")
    settings = json.loads(json.dumps({k: v for k, v in vars(options).items() if k not in varying}, default=str))
    path = options.output / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"Expected the settings in {path}, got others. Choose another --output.")
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=2) + "\n")


def read_results(path: Path) -> list[Row]:
    """Read the rows of runs that are done; none where there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]


def table(rows: list[Row]) -> str:
    """Return mean and standard deviation over seeds as a Markdown table, with the change against the baseline."""
    names = [name for name in rows[0] if name not in ("objective", "seed", "degraded")]
    lines = ["| degraded | objective | runs | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 3)]
    for degraded in dict.fromkeys(row["degraded"] for row in rows):
        means: dict[str, dict[str, float]] = {}
        for objective in sorted({str(row["objective"]) for row in rows}, key=OBJECTIVES.index):
            runs = [row for row in rows if (row["degraded"], row["objective"]) == (degraded, objective)]
            values = {name: [float(row[name]) for row in runs] for name in names}
            means[objective] = {name: statistics.mean(column) for name, column in values.items() if column}
            cells = [_cell(column, means, objective, name) for name, column in values.items() if column]
            lines.append(f"| {degraded} | {objective} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: list[float], means: dict[str, dict[str, float]], objective: str, name: str) -> str:
    spread = statistics.stdev(column) if len(column) > 1 else 0.0
    cell = f"{means[objective][name]:.4g} ± {spread:.1g}"
    if BASELINE not in means or objective == BASELINE:
        return cell
    before, after = means[BASELINE][name], means[objective][name]
    return f"{cell} ({after - before:+.2f})" if name == "psnr" else f"{cell} ({after / before - 1:+.1%})"


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, help="folders of clean training images")
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean test images")
    parser.add_argument("--degraded", type=Path, nargs="+", required=True, help="folders of files of the same names")
    parser.add_argument("--judges", nargs="+", required=True, help="weights of MILO_I, such as MILO.pth")
    parser.add_argument("--metric", default="milo-image", help="MILO_I whose masks the objectives use")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="weights that every run starts from")
    parser.add_argument("--network", default=train_image_restorer.OWN)
    parser.add_argument("--network-options", type=json.loads, default={})
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--degradation", default="noise")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="soap")
    parser.add_argument("--limit", type=int, help="so many test images, spread over the folder")
    options = parser.parse_args(arguments)
    check_settings(options)
    metrics = full_reference_metrics(options.judges)
    clean, path = spread_over(list_images([options.clean]), options.limit), options.output / "ablation.csv"
    rows = read_results(path)
    for seed in options.seeds:
        for objective in options.objectives:
            if any((row["objective"], int(row["seed"])) == (objective, seed) for row in rows):
                continue
            network = train(options, objective, seed)
            run: Row = {"objective": objective, "seed": seed}
            rows += [
                run | {"degraded": each.name} | evaluate(network, each, clean, metrics) for each in options.degraded
            ]
            write_rows(path, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
