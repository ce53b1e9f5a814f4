"""Table of restoration quality: the input, the cleaner, and the whole pipeline without and with each curriculum.

    python benchmarks/quality.py --clean FOLDER --degraded FOLDER --milo-image MILO.pth

PSNR in dB and SSIM (torchmetrics) are better when higher; the error E of MILO_I against the clean image when lower.
All on images rounded to 8 bit, as a file would be.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm.auto import tqdm

from milo_latent.evaluation.reports import write_rows
from milo_latent.files import read_image
from milo_latent.guidance.curriculum import SCHEDULES
from milo_latent.latents.codec import decode_latents, encode_image, pad_image
from milo_latent.metric.network import MILO
from milo_latent.pictures import round_to_8bit
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restore import restore_image
from milo_latent.restoration.restorer import load_restorer
from milo_latent.training.data.crops import list_images

COLUMNS = ("psnr", "ssim", "milo_i", "seconds")


def measure(clean: Tensor, result: Tensor, metric) -> dict[str, float]:
    """Return PSNR, SSIM and MILO_I of a result, (1, 3, H, W) in [0, 1], against the clean image."""
    result = round_to_8bit(result)
    return {
        "psnr": -10 * torch.log10((result - clean).square().mean()).item(),
        "ssim": structural_similarity_index_measure(result, clean, data_range=1.0).item(),
        "milo_i": metric(dist=result, ref=clean).item(),
    }


def candidates(restorer: DiffBIRPipeline, options: argparse.Namespace) -> dict:
    """Return a function from the degraded (and clean) image to a result for each row of the table."""

    def guided(milo_scale: float, schedule: str):
        return lambda degraded, clean: restore_image(
            degraded, model=restorer, milo_scale=milo_scale, schedule=schedule, steps=options.steps, seed=options.seed
        )

    def autoencode(degraded: Tensor, clean: Tensor) -> Tensor:
        padded = pad_image(clean, 8)
        return decode_latents(restorer.vae, encode_image(restorer.vae, padded))[..., : clean.shape[2], : clean.shape[3]]

    rows = {
        "input": lambda degraded, clean: degraded,
        "clean image through the VAE": autoencode,
        "cleaner only": lambda degraded, clean: restorer.clean(degraded),
        "cleaner through the VAE": lambda degraded, clean: autoencode(degraded, restorer.clean(degraded)),
        "no guidance": guided(0.0, "constant"),
    }
    for scale in options.scales:
        rows |= {f"guidance {scale:g} {schedule}": guided(scale, schedule) for schedule in SCHEDULES}
    return rows


def main() -> None:
    """Print the table and, with --csv, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--degraded", type=Path, required=True, help="files of the same names")
    parser.add_argument("--milo-image", required=True, help="official MILO.pth, the judge")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--scales", type=float, nargs="*", default=[0.5])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    restorer, metric = load_restorer(options.model), MILO.from_pretrained(options.milo_image)
    restorer.set_progress_bar_config(disable=True)
    rows = candidates(restorer, options)
    sums = {name: dict.fromkeys(COLUMNS, 0.0) for name in rows}
    paths = list_images([options.clean])[: options.limit]
    for path in tqdm(paths, unit="image", file=sys.stderr):
        clean, degraded = read_image(path), read_image(options.degraded / path.name)
        for name, run in rows.items():
            began = time.perf_counter()
            with torch.no_grad():
                result = run(degraded, clean)
                seconds = time.perf_counter() - began
                figures = measure(clean, result, metric) | {"seconds": seconds}
            for column in COLUMNS:
                sums[name][column] += figures[column] / len(paths)
    print(
        f"| {options.degraded.name}, {len(paths)} images | PSNR, dB | SSIM | MILO_I | change of MILO_I | s per image |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, mean in sums.items():
        change = mean["milo_i"] / sums["input"]["milo_i"] - 1
        figures = (
            f"{mean['psnr']:.2f} | {mean['ssim']:.4f} | {mean['milo_i']:.5f} | {change:+.1%} | {mean['seconds']:.1f}"
        )
        print(f"| {name} | {figures} |")
    if options.csv:
        write_rows(options.csv, [{"row": name, **mean} for name, mean in sums.items()])


if __name__ == "__main__":
    main()
