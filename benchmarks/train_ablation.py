"""What each training objective does to a restorer: equal budgets, several seeds, metrics that nothing was trained with.

    python benchmarks/train_ablation.py --part image --images FOLDER --metric milo-image --start weights/nano/cleaner \
        --clean FOLDER --degraded NOISY15 NOISY25 NOISY50 --judges MILO.pth milo-image --output RUNS

`--part` says what is trained: an "image" network, the diffusion of a "restorer", judged by one step without guidance,
join and color fix, or the "decoder" of an autoencoder, judged by what it makes of the images that the cleaner of `nano`
restored. Options that are not listed below go to the training command of the part, such as `--images`, `--steps`,
`--metric` and `--start`. A folder of degraded images holds files of the same names as `--clean`; FOLDER:TEST, such as
`kodak24:x4`, degrades the clean images of FOLDER instead, by a test of `train_image_restorer`.

Every run starts from the same weights, and runs of one seed see the same crops and degradations. "milo" in the results
is the error E of each MILO_I of `--judges`. PSNR in dB, SSIM, MS-SSIM and VIF (torchmetrics) are better when higher,
GMSD and MILO when lower; all are taken on images rounded to 8 bit. A verdict needs a judge that was not trained with:
GMSD, or a MILO_I whose masks were not used. `RUNS/ablation.csv` has a row for each run and folder of degraded images.
The same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from milo_latent.atomic import write_text
from milo_latent.evaluation.metrics import by_name
from milo_latent.evaluation.reports import Row, write_rows
from milo_latent.files import read_image
from milo_latent.latents.codec import decode_latents, encode_image
from milo_latent.metric.network import MILO
from milo_latent.pictures import center_crop, round_to_8bit
from milo_latent.restoration.restore import restore_image
from milo_latent.restoration.restorer import load_restorer
from milo_latent.training import denoising_loss, objectives, train_autoencoder, train_image_restorer, train_restorer
from milo_latent.training.data.crops import list_images, spread_over

ORDER = tuple(dict.fromkeys((*denoising_loss.OBJECTIVES[:1], *objectives.OBJECTIVES)))
BASELINES = ("standard", "mae")
METRICS = ("psnr", "ssim", "ms-ssim", "vif", "gmsd")
MULTIPLE = 64  # of the sides that a network is given
Restore = Callable[[Tensor], Tensor]  # an image (1, 3, H, W) to one of the same size, or larger at the ends


def full_reference_metrics(judges: list[str]) -> dict[str, Callable[..., Tensor]]:
    """Return the metrics of the table, called with the keywords `ref` and `dist`."""
    errors = {f"milo:{Path(judge).stem}": MILO.from_pretrained(judge) for judge in judges}
    return {name: by_name(name).compute for name in METRICS} | errors


@torch.no_grad()
def evaluate(restore: Restore, degraded: str, options: argparse.Namespace, metrics: dict[str, Callable]) -> Row:
    """Return the mean of each metric over the restored images of `degraded`, a folder or FOLDER:TEST."""
    source, _, test = degraded.rpartition(":")
    paths = spread_over(list_images([Path(source) if source else options.clean]), options.limit)
    sums = dict.fromkeys(metrics, 0.0)
    for index, path in enumerate(tqdm(paths, desc=degraded, unit="image")):
        ref = center_crop(read_image(path), options.side)
        if source:
            dist = train_image_restorer.TESTS[test](ref[0], np.random.default_rng(index))[None]
        else:
            dist = center_crop(read_image(Path(degraded) / path.name), options.side)
        restored = round_to_8bit(restore(dist)[..., : ref.shape[2], : ref.shape[3]].float())
        for name, metric in metrics.items():
            sums[name] += metric(ref=ref, dist=restored).item() / len(paths)
    return {name: round(value, 8) for name, value in sums.items()}


def train_image(arguments: list[str], output: Path) -> Restore:
    """Train an image network, or take the one in `output`."""
    defaults = "--batch-size 8 --learning-rate 1e-3 --optimizer soap --warmup 20 --decay 0.7 --degradation noise"
    defaults += " --steps 300 --validation-images 1"
    options = train_image_restorer.parser().parse_args([*defaults.split(), *arguments])
    network = train_image_restorer.train(options).cpu().eval()

    def restore(dist: Tensor) -> Tensor:
        height, width = dist.shape[2:]
        # reflected, since the noise of a repeated border becomes streaks that networks keep as edges
        return network(F.pad(dist, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="reflect"))

    return restore


def train_diffusion(arguments: list[str], output: Path) -> Restore:
    """Train UNet and IRControlNet of a pipeline, or take the ones in `output`."""
    defaults = "--train all --batch-size 4 --noise-levels 4 --learning-rate 5e-4 --warmup 20 --steps 150"
    train_restorer.main([*defaults.split(), *arguments])
    pipe = load_restorer(output / "pipeline", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    # without the join, which shows the cleaned photo again and hardly depends on what was decoded
    return partial(
        restore_image, model=pipe, stage="all", fidelity=0.0, steps=1, milo_scale=0.0, color_fix="none", seed=0
    )


def train_decoder(arguments: list[str], output: Path) -> Restore:
    """Train the decoder of an autoencoder, or take the one in `output`."""
    defaults = "--freeze-encoder --batch-size 8 --learning-rate 5e-4 --steps 250"
    train_autoencoder.main([*defaults.split(), *arguments])
    vae, pipe = AutoencoderTiny.from_pretrained(output / "vae"), load_restorer("nano", device="cpu")
    return lambda dist: decode_latents(vae, encode_image(vae, pipe.clean(dist, tuple(dist.shape[2:]))))


PARTS = {"image": train_image, "restorer": train_diffusion, "decoder": train_decoder}


def train(options: argparse.Namespace, training: list[str], objective: str, seed: int) -> Restore:
    """Return what one run restores with, trained now or before."""
    output = options.output / f"{objective}-{seed}"
    arguments = ["--output", str(output), "--seed", str(seed), "--objective", objective]
    arguments += [] if options.part == "restorer" else ["--validation", str(options.clean)]
    return PARTS[options.part]([*arguments, *training], output)


def check_settings(options: argparse.Namespace, training: list[str]) -> None:
    """Keep the settings beside the results, and refuse to add results of other settings."""
    varying = ("output", "objectives", "seeds")
    settings = {name: value for name, value in vars(options).items() if name not in varying} | {"training": training}
    settings = json.loads(json.dumps(settings, default=str))
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
        for objective in sorted({str(row["objective"]) for row in rows}, key=ORDER.index):
            runs = [row for row in rows if (row["degraded"], row["objective"]) == (degraded, objective)]
            values = {name: [float(row[name]) for row in runs] for name in names}
            means[objective] = {name: statistics.mean(column) for name, column in values.items() if column}
            cells = [_cell(column, means, objective, name) for name, column in values.items() if column]
            lines.append(f"| {degraded} | {objective} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: list[float], means: dict[str, dict[str, float]], objective: str, name: str) -> str:
    spread = statistics.stdev(column) if len(column) > 1 else 0.0
    cell = f"{means[objective][name]:.4g} ± {spread:.1g}"
    baseline = next(iter(means))
    if baseline not in BASELINES or objective == baseline:
        return cell
    before, after = means[baseline][name], means[objective][name]
    return f"{cell} ({after - before:+.2f})" if name == "psnr" else f"{cell} ({after / before - 1:+.1%})"


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--part", choices=PARTS, default="image", help="what is trained (default: image)")
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean test images")
    parser.add_argument("--degraded", nargs="+", required=True, help="folders of files of the same names, FOLDER:TEST")
    parser.add_argument("--judges", nargs="+", required=True, help="weights of MILO_I, such as MILO.pth")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--objectives", nargs="+", choices=ORDER, required=True, help="those of the training command")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="so many images of each folder, spread over it")
    parser.add_argument("--side", type=int, default=10_000, help="judge the middle of images, of this side in pixels")
    options, training = parser.parse_known_args(arguments)
    check_settings(options, training)
    metrics, path = full_reference_metrics(options.judges), options.output / "ablation.csv"
    rows = read_results(path)
    for seed in options.seeds:
        for objective in options.objectives:
            if any((row["objective"], int(row["seed"])) == (objective, seed) for row in rows):
                continue
            restore = train(options, training, objective, seed)
            run: Row = {"objective": objective, "seed": seed}
            rows += [
                run | {"degraded": Path(each).name} | evaluate(restore, each, options, metrics)
                for each in options.degraded
            ]
            write_rows(path, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
