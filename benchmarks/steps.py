"""Quality against the number of steps and the scheduler.

    python benchmarks/steps.py --clean FOLDER --degraded FOLDER --milo-image MILO.pth --limit 6 --csv steps.csv

PSNR in dB and SSIM (torchmetrics) are better when higher; the error E of MILO_I against the clean image when lower.
Each image is cut to `--crop` pixels in the middle, and restored with the same noise by every scheduler.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from tqdm.auto import tqdm

from milo_latent.diffbir.schedulers import official_scheduler
from milo_latent.evaluation.figures import image_error, measure
from milo_latent.evaluation.metrics import by_name
from milo_latent.evaluation.reports import write_rows
from milo_latent.files import read_image
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.metric.network import MILO
from milo_latent.pictures import center_crop
from milo_latent.restoration.restorer import load_restorer
from milo_latent.training.data.crops import list_images

OFFICIAL = ("spaced", "ddim", "dpm++_m2", "edm_euler", "edm_dpm++_2m", "edm_dpm++_3m_sde")
STOCK = {
    "DDIM, trailing": DDIMScheduler,
    "Euler, trailing": EulerDiscreteScheduler,
    "DPM++ 2M, trailing": DPMSolverMultistepScheduler,
    "UniPC, trailing": UniPCMultistepScheduler,
}


def schedulers(config: dict, names: list[str]) -> dict:
    """Return the schedulers of these names (all without any), for the noise schedule of `config`."""
    keys = ("prediction_type", "rescale_betas_zero_snr")
    official = {name: official_scheduler(name, **{key: config[key] for key in keys}) for name in OFFICIAL}
    stock = {name: cls.from_config(config, timestep_spacing="trailing") for name, cls in STOCK.items()}
    every = official | stock
    return {name: every[name] for name in names or every}


def main() -> None:
    """Print the table and, with --csv, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--degraded", type=Path, required=True, help="files of the same names")
    parser.add_argument("--milo-image", required=True, help="official MILO.pth, the judge")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 6, 10, 20, 50])
    parser.add_argument("--schedulers", nargs="*", default=[], help=f"of {[*OFFICIAL, *STOCK]}; all by default")
    parser.add_argument("--milo-scale", type=float, default=0.0, help="of MILO guidance (default: 0, none)")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pipeline, judge = load_restorer(options.model), MILO.from_pretrained(options.milo_image)
    measured = {"psnr": by_name("psnr"), "ssim": by_name("ssim"), "milo_i": image_error(judge)}
    pipeline.set_progress_bar_config(disable=True)
    guide = None
    if options.milo_scale:
        guide = MILOGuidance(pipeline.metric, milo_scale=options.milo_scale)
    paths = list_images([options.clean])[: options.limit]
    every = schedulers(dict(pipeline.scheduler.config), options.schedulers)
    rows = []
    print("| scheduler | steps | PSNR, dB | SSIM | MILO_I | s per image |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, pipeline.scheduler in every.items():
        for steps in options.steps:
            mean = dict.fromkeys([*measured, "seconds"], 0.0)
            for path in tqdm(paths, unit="image", desc=f"{name}, {steps}", file=sys.stderr, leave=False):
                clean, degraded = (
                    center_crop(read_image(each), options.crop) for each in (path, options.degraded / path.name)
                )
                began = time.perf_counter()
                result = pipeline(
                    image=degraded, num_inference_steps=steps, output_type="pt", callback_on_step_end=guide,
                    generator=torch.Generator().manual_seed(options.seed),
                ).images  # fmt: skip
                seconds = time.perf_counter() - began
                figures = measure(measured, result.cpu(), clean) | {"seconds": seconds}
                for column in mean:
                    mean[column] += figures[column] / len(paths)
            rows.append({"scheduler": name, "steps": steps} | mean)
            figures = f"{mean['psnr']:.2f} | {mean['ssim']:.4f} | {mean['milo_i']:.5f} | {mean['seconds']:.1f}"
            print(f"| {name} | {steps} | {figures} |", flush=True)
    if options.csv:
        write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
