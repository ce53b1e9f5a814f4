"""What each stage of a model adds: first stage, join, the autoencoder alone, the generator with and without the join.

    python benchmarks/stages.py --clean FOLDER --milo-image official-image

For each degradation the mean PSNR in dB (higher is better), and GMSD and the error E of MILO_I (lower is better) over
the photos, all rounded to 8 bit; beside them the change against the first stage, and on how many photos E is above that
of the input. Photos are reduced by x4 bicubically and enlarged as the pipeline does it for the task sr.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.diffbir.rules import resize
from milo_latent.evaluation.figures import image_error, measure
from milo_latent.evaluation.metrics import by_name
from milo_latent.evaluation.restoration_cases import Case, degrade
from milo_latent.files import read_image
from milo_latent.latents.codec import decode_latents, encode_image
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restore import restore_image
from milo_latent.restoration.restorer import load_restorer
from milo_latent.training.data.crops import list_images, spread_over

LEFT_OUT = "without the generator"  # the latents of the cleaned image, decoded as they are
STAGES: dict[str, dict[str, Any]] = {
    "cleaner": {"stage": "cleaner"},
    "join": {"stage": "join"},
    LEFT_OUT: {"stage": "cleaner"},
    "all": {"stage": "all", "fidelity": 0.0, "milo_scale": 0.0},
    "all, joined": {"stage": "all", "fidelity": 1.0, "milo_scale": 0.0},
}


def read_pair(path: Path, degradation: str) -> tuple[Tensor, Tensor, float]:
    """Return the clean image, the degraded one, (1, 3, H, W) each, and how much larger the clean one is."""
    factor = Case(degradation, path).factor
    clean = read_image(path)
    height, width = (side // factor * factor for side in clean.shape[2:])
    clean = clean[..., :height, :width]
    return clean, clean if degradation == "clean" else degrade(clean, degradation, image_id=path.stem), float(factor)


def restore_to(stage: str, degraded: Tensor, pipe: DiffBIRPipeline, task: dict[str, Any]) -> Tensor:
    """Return what a stage makes of a degraded image, (1, 3, H, W)."""
    restored = restore_image(degraded, model=pipe, **STAGES[stage], **task)
    if stage != LEFT_OUT:
        return restored
    decoded = decode_latents(pipe.vae, encode_image(pipe.vae, restored)).clamp(0, 1)
    return decoded[..., : restored.shape[2], : restored.shape[3]]


def evaluate(
    pipe: DiffBIRPipeline, paths: list[Path], degradation: str, stages: list[str], milo_image: MILO
) -> dict[str, Tensor]:
    """Return the figures of input and stages, (photos, 3) each: PSNR, GMSD and MILO_I."""
    figures = {name: by_name(name) for name in ("psnr", "gmsd")} | {"milo_i": image_error(milo_image)}
    rows: dict[str, list[Tensor]] = {name: [] for name in ("input", *stages)}
    for path in tqdm(paths, desc=degradation, unit="photo"):
        clean, degraded, factor = read_pair(path, degradation)
        images = {"input": resize(degraded, (clean.shape[2], clean.shape[3])).clamp(0, 1) if factor > 1 else degraded}
        task = {"task": "sr", "upscale": factor} if factor > 1 else {}
        images |= {name: restore_to(name, degraded, pipe, task) for name in stages}
        for name, image in images.items():
            rows[name].append(torch.tensor(list(measure(figures, image, clean).values())))
    return {name: torch.stack(row) for name, row in rows.items()}


def table_row(name: str, figures: Tensor, found: dict[str, Tensor]) -> str:
    """Return a row: means, the change against the first stage, and photos whose E is above that of the input."""
    psnr, gmsd, error = figures.mean(dim=0).tolist()
    cells = [name, f"{psnr:.2f}", f"{gmsd:.4f}", f"{error:.5f}"]
    if "cleaner" in found and name not in ("input", "cleaner"):
        before = found["cleaner"].mean(dim=0).tolist()
        cells += [f"{psnr - before[0]:+.2f}", f"{gmsd / before[1] - 1:+.1%}", f"{error / before[2] - 1:+.1%}"]
    else:
        cells += [""] * 3
    return f"| {' | '.join(cells)} | {int((figures[:, 2] > found['input'][:, 2]).sum())} |"


def main(arguments: list[str] | None = None) -> None:
    """Restore, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, nargs="+", required=True, help="folders of clean photos")
    parser.add_argument("--degradation", nargs="+", default=["noise15", "noise25", "noise50", "jpeg10", "x4", "clean"])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--milo-image", default="milo-image", help="judge, such as official-image")
    parser.add_argument("--limit", type=int, help="so many photos, spread over the folders")
    options = parser.parse_args(arguments)
    pipe, judge = load_restorer(options.model), MILO.from_pretrained(options.milo_image)
    pipe.set_progress_bar_config(disable=True)
    paths = spread_over(list_images(options.clean), options.limit)
    print("| degraded | stage | PSNR | GMSD | MILO_I | PSNR | GMSD | MILO_I | above input |\n|" + " --- |" * 9)
    for degradation in options.degradation:
        found = evaluate(pipe, paths, degradation, options.stages, judge)
        for name, figures in found.items():
            print(f"| {degradation} {table_row(name, figures, found)}", flush=True)


if __name__ == "__main__":
    main()
