"""Agreement of metrics with people: on rated image sets, or on the means of KADID-10k's 125 distortion settings.

python benchmarks/iqa.py settings --photos FOLDER --opinions kadid10k_conditions.csv --vae nano \
    --metrics milo:MILO.pth milo-latent:nano psnr ssim latent-l1 --output out/
python benchmarks/iqa.py dataset --kind kadid10k --folder KADID --metrics milo:MILO.pth psnr --output out/
python benchmarks/iqa.py levels --photos FOLDER --opinions kadid10k_conditions.csv --metrics milo:MILO.pth --output out/
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.evaluation.agreement import agreement, agreement_per_kind, measure_ratings
from milo_latent.evaluation.distortion_settings import SETTINGS, measure_settings, read_setting_opinions
from milo_latent.evaluation.iqa_datasets import LOADERS
from milo_latent.evaluation.metrics import FullReference, by_name
from milo_latent.evaluation.reports import agreement_rows, format_rows, level_study, rising_rows, scatter, write_rows
from milo_latent.latents.files import load_vae
from milo_latent.programs import run_program
from milo_latent.training.data.crops import list_images, spread_over


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("settings", "dataset", "levels"))
    parser.add_argument("--metrics", nargs="+", required=True, help="psnr ssim vif milo:WEIGHTS milo-latent:WEIGHTS …")
    parser.add_argument("--vae", help="of metrics on latents, nano or a folder; or milo-latent:WEIGHTS@VAE")
    parser.add_argument("--photos", nargs="+", help="folders of clean photos")
    parser.add_argument("--count", type=int, help="number of photos, spread over the folders (default: all)")
    parser.add_argument(
        "--side", type=int, help="side in pixels of the central square that is measured (default: the whole photo)"
    )
    parser.add_argument("--opinions", type=Path, help="CSV of distortion, level, dmos_mean")
    parser.add_argument("--kind", choices=sorted(LOADERS), help="layout of a rated set")
    parser.add_argument("--folder", type=Path, help="folder of a rated set")
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and plots")
    options = parser.parse_args()
    needed = {"dataset": ("kind", "folder"), "settings": ("photos", "opinions"), "levels": ("photos", "opinions")}
    missing = [f"--{name}" for name in needed[options.task] if getattr(options, name) is None]
    if missing:
        parser.error(f"{options.task} needs {' and '.join(missing)}")
    return options


def open_metrics(options: argparse.Namespace) -> list[FullReference]:
    vae = load_vae(options.vae) if options.vae else None
    metrics = [by_name(name, vae=vae) for name in options.metrics]
    names = [metric.name for metric in metrics]
    return [  # two folders of the same name keep their whole paths
        metric if names.count(metric.name) == 1 else replace(metric, name=name)
        for metric, name in zip(metrics, options.metrics, strict=True)
    ]


def study_levels(errors: dict[str, Tensor], opinions: Tensor, output: Path) -> None:
    for name, values in errors.items():
        level_study(values, opinions).savefig(output / f"levels-{file_name(name)}.png")
    rows = rising_rows(errors, opinions)
    write_rows(output / "levels.csv", rows)
    print(format_rows(rows))


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    metrics = open_metrics(options)
    if options.task == "dataset":
        ratings = LOADERS[options.kind](options.folder)
        errors, ratings = measure_ratings(metrics, ratings, report=lambda line: print(line, file=sys.stderr))
        kinds = [rating.kind for rating in ratings]
        groups = [rating.ref.name for rating in ratings]
        opinions = torch.tensor([rating.opinion for rating in ratings], dtype=torch.float64)
    else:
        opinions = read_setting_opinions(options.opinions)
        photos = spread_over(list_images(options.photos), options.count)
        per_photo = measure_settings(metrics, photos, side=options.side)
        if options.task == "levels":
            study_levels(per_photo, opinions, options.output)
            return
        errors = {name: values.mean(dim=0) for name, values in per_photo.items()}
        kinds, groups = [kind for kind, _ in SETTINGS], None
    rows = []
    for name, values in errors.items():
        overall, per_kind = agreement(values, opinions, groups=groups), agreement_per_kind(values, opinions, kinds)
        rows += agreement_rows(name, overall, per_kind)
        scatter(values, opinions, kinds, title=name).savefig(options.output / f"scatter-{file_name(name)}.png")
    write_rows(options.output / f"{options.task}.csv", rows)
    print(format_rows([row for row in rows if row["kind"] == "all"]))


def file_name(metric: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in metric)


if __name__ == "__main__":
    sys.exit(run_program(main))
