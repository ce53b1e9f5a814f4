"""Table of our scores against the official code's recorded ones.

    python benchmarks/parity.py --official FOLDER

FOLDER holds `reference_values.json`, `MILO.pth`, `MILO_latent.pth`, and the sample pairs in `images` and `latents`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from milo_latent import MILO, read_image, read_latents

BLOCKS = {
    "latent_pair": (64, 64),
    "latent_pair_61x53": (61, 53),
    "image_pair": (384, 512),
    "image_pair_333x257": (333, 257),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True)
    folder = parser.parse_args().official
    recorded = json.loads((folder / "reference_values.json").read_text())
    print("| pair | quantity | official | ours | relative difference |")
    print("| --- | --- | ---: | ---: | ---: |")
    for block, (height, width) in BLOCKS.items():
        latent = block.startswith("latent")
        metric = MILO.from_pretrained(folder / ("MILO_latent.pth" if latent else "MILO.pth"))
        read, kind, suffix = (read_latents, "latents", "npy") if latent else (read_image, "images", "png")
        ref, dist = (read(folder / kind / f"{name}.{suffix}")[..., :height, :width] for name in ("ref", "dist"))
        with torch.inference_mode():
            result = metric.compare(ref=ref, dist=dist)
        expected = recorded[block]
        rows = {
            "error": (expected["score_model(dist,ref)"], result.error.item()),
            "error map, mean": (expected["MILO_map"]["mean"], result.error_map.mean().item()),
            "mask, mean": (expected["mask"]["mean"], result.mask.mean().item()),
            "mask, largest": (expected["mask"]["max"], result.mask.max().item()),
        }
        for name, (theirs, ours) in rows.items():
            print(f"| {block} | {name} | {theirs:.10f} | {ours:.10f} | {abs(ours / theirs - 1):.1e} |")


if __name__ == "__main__":
    main()
