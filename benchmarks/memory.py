"""Peak memory against image size, whole and in tiles, each size in a process of its own.

    python benchmarks/memory.py --sizes 512 1024 2048 4096 --tile 512 --csv memory.csv

Memory is the largest resident set of the process (MiB), on the CPU; "above" is without what the process takes for a
64x64 image: imports and weights. One step by default: steps change the time, not the peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SMALLEST = 64


def measure(size: int, tile: int | None, options: argparse.Namespace) -> dict:
    """Restore one image of `size` pixels a side in a fresh process; return its figures, empty ones if it failed."""
    command = [sys.executable, __file__, "--one", str(size), "--model", options.model, "--steps", str(options.steps)]
    command += ["--threads", str(options.threads)] + (["--tile", str(tile)] if tile else [])
    done = subprocess.run(command, capture_output=True, text=True)
    row = {"size": size, "tile": tile or "", "steps": options.steps, "model": options.model}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return row | {"mib": "", "seconds": "", "note": reason[:200]}
    return row | json.loads(done.stdout.splitlines()[-1])


def one(size: int, options: argparse.Namespace) -> None:
    """Restore in this process and print its figures."""
    import torch

    from milo_latent.restoration.restorer import load_restorer

    torch.set_num_threads(options.threads)
    pipeline = load_restorer(options.model, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    if options.tile:
        pipeline.enable_tiling(options.tile)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    pipeline(image=image, num_inference_steps=options.steps, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"mib": round(peak_mib), "seconds": round(seconds, 1), "note": ""}))


def main() -> None:
    """Print the table and, with --csv, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tile", type=int, default=None, help="only with these tiles (default: 512)")
    parser.add_argument("--whole-up-to", type=int, default=1024, help="largest size that is restored whole, too")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options)
        return
    tile = options.tile or 512
    base = measure(SMALLEST, None, options)
    rows = [base]
    print(f"| size, px | tiles, px | peak, MiB | above {SMALLEST} px, MiB | s |\n| ---: | ---: | ---: | ---: | ---: |")
    for size in options.sizes:
        for each in [None, tile] if size <= options.whole_up_to else [tile]:
            row = measure(size, each, options)
            rows.append(row)
            above = row["mib"] - base["mib"] if row["mib"] != "" else row["note"]
            print(f"| {size} | {each or 'whole'} | {row['mib']} | {above} | {row['seconds']} |", flush=True)
    if options.csv:
        from milo_latent.evaluation.reports import write_rows  # here, so that measured processes do not load it

        write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
