"""Agreement of metrics with people: on rated image sets, or on the means of KADID-10k's 125 conditions.

python benchmarks/iqa.py conditions --photos FOLDER --opinions kadid10k_conditions.csv --vae nano \
    --metrics milo:MILO.pth milo-latent:nano psnr ssim latent-l1 --output out/
python benchmarks/iqa.py dataset --kind kadid10k --folder KADID --metrics milo:MILO.pth psnr --output out/
python benchmarks/iqa.py levels --photos FOLDER --opinions kadid10k_conditions.csv --metrics milo:MILO.pth --output out/
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from milo_latent.evaluation.agreement import agreement, agreement_per_kind, score_ratings
from milo_latent.evaluation.conditions import CONDITIONS, read_condition_means, score_conditions
from milo_latent.evaluation.iqa_datasets import LOADERS
from milo_latent.evaluation.metrics import by_name
from milo_latent.evaluation.reports import agreement_rows, format_rows, level_study, rising_rows, scatter, write_rows
from milo_latent.latents.files import load_vae
from milo_latent.programs import run_program
from milo_latent.training.data.crops import list_images, spread_over


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("conditions", "dataset", "levels"))
    parser.add_argument("--metrics", nargs="+", required=True, help="psnr ssim vif milo:WEIGHTS milo-latent:WEIGHTS …")
    parser.add_argument("--vae", help="for the metrics on latents: nano, or a folder")
    parser.add_argument("--photos", nargs="+", help="folders of clean photos")
    parser.add_argument("--count", type=int, help="use so many of the photos, spread over them")
    parser.add_argument("--side", type=int, help="score the centred square of so many pixels only")
    parser.add_argument("--opinions", type=Path, help="CSV of distortion, level, dmos_mean")
    parser.add_argument("--kind", choices=sorted(LOADERS), help="layout of a rated set")
    parser.add_argument("--folder", type=Path, help="of a rated set")
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and plots")
    options = parser.parse_args()
    needed = {"dataset": ("kind", "folder"), "conditions": ("photos", "opinions"), "levels": ("photos", "opinions")}
    missing = [f"--{name}" for name in needed[options.task] if getattr(options, name) is None]
    if missing:
        parser.error(f"{options.task} needs {' and '.join(missing)}")
    return options


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    vae = load_vae(options.vae) if options.vae else None
    opened = [by_name(name, vae=vae) for name in options.metrics]
    short = [metric.name for metric in opened]
    metrics = [  # two folders of the same name keep what tells them apart
        metric if short.count(metric.name) == 1 else replace(metric, name=name)
        for metric, name in zip(opened, options.metrics, strict=True)
    ]
    if options.task == "dataset":
        ratings = LOADERS[options.kind](options.folder)
        damage, ratings = score_ratings(metrics, ratings, report=lambda line: print(line, file=sys.stderr))
        kinds = [rating.kind for rating in ratings]
        groups = [rating.ref.name for rating in ratings]
        quality = damage[metrics[0].name].new_tensor([rating.quality for rating in ratings])
    else:
        photos = spread_over(list_images(options.photos), options.count)
        scores = score_conditions(metrics, photos, side=options.side)
        quality = read_condition_means(options.opinions)
        if options.task == "levels":
            for name, values in scores.damage.items():
                level_study(values, quality, scores.photos).savefig(options.output / f"levels-{file_name(name)}.png")
            rows = rising_rows(scores.damage, quality)
            write_rows(options.output / "levels.csv", rows)
            print(format_rows(rows))
            return
        damage = {name: values.mean(dim=0) for name, values in scores.damage.items()}
        kinds, groups = [kind for kind, _ in CONDITIONS], None
    rows = []
    for name, values in damage.items():
        rows += agreement_rows(
            name, agreement(values, quality, groups=groups), agreement_per_kind(values, quality, kinds)
        )
        scatter(values, quality, kinds, title=name).savefig(options.output / f"scatter-{file_name(name)}.png")
    write_rows(options.output / f"{options.task}.csv", rows)
    print(format_rows([row for row in rows if row["kind"] == "all"]))


def file_name(metric: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in metric)


if __name__ == "__main__":
    sys.exit(run_program(main))
