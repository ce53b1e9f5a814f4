"""The memory that `train_restorer` plans before it starts, beside what it then uses in a few steps.

    python benchmarks/training_memory.py --images FOLDER --output RUNS --model nano --resident --csv memory.csv

Used memory is the most that tensors take at any time, by torch's profiler. With --resident, each case also runs in a
process of its own that measures the growth of its resident set: it includes what the allocator keeps, and misses what
the process held before training. Other options are those of `train_restorer`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from milo_latent.evaluation.reports import write_rows
from milo_latent.training import train_restorer
from milo_latent.training.engine.memory import MIB, MemoryPlan, memory_plan, peak_memory

CASES = {
    "controlnet": [],
    "controlnet, checkpointing": ["--gradient-checkpointing"],
    "all": ["--train", "all"],
    "all, checkpointing": ["--train", "all", "--gradient-checkpointing"],
    "all, EMA": ["--train", "all", "--ema-decay", "0.99"],
    "all, SOAP": ["--train", "all", "--optimizer", "soap"],
    "lora": ["--train", "lora"],
    "lora, checkpointing": ["--train", "lora", "--gradient-checkpointing"],
}
fit = train_restorer.fit


def planned_and_used(arguments: list[str]) -> tuple[int, int]:
    """Train, and return the bytes that the command planned and those that its tensors took."""
    plans: list[MemoryPlan] = []
    peaks: list[int] = []

    def plan(*arguments: Any, **options: Any) -> MemoryPlan:
        plans.append(memory_plan(*arguments, **options))
        return plans[-1]

    def measured(*arguments: Any, **options: Any) -> Any:
        modules = []
        peaks.append(peak_memory(lambda: modules.append(fit(*arguments, **options)), torch.device("cpu")))
        return modules[0]

    train_restorer.memory_plan, train_restorer.fit = plan, measured
    train_restorer.main(arguments)
    return plans[0].total, plans[0].parameters + peaks[0]


def grown(arguments: list[str]) -> int:
    """Train, and return by how many bytes the resident set of this process grew (Linux)."""
    growth: list[int] = []

    def resident(key: str) -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
        return int(line.split()[1]) * 1024

    def measured(*arguments: Any, **options: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is the most from here on
        before = resident("VmRSS")
        module = fit(*arguments, **options)
        growth.append(resident("VmHWM") - before)
        return module

    # planning would leave memory with the allocator
    train_restorer.memory_plan, train_restorer.fit = lambda *arguments, **options: "", measured
    train_restorer.main(arguments)
    return growth[0]


def main() -> None:
    """Print the table and, with --csv, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--resident", action="store_true", help="measure the resident set, too")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options, more = parser.parse_known_args()
    common = ["--model", options.model, "--steps", "3", "--crop-size", "128", *more]
    if options.one:
        print(grown([*common, *CASES[options.one], "--output", str(options.output)]))
        return
    rows = []
    for number, case in enumerate(options.cases):
        folder = str(options.output / str(number))
        planned, used = planned_and_used([*common, *CASES[case], "--output", folder])
        row = {"model": options.model, "case": case, "planned": planned, "used": used}
        if options.resident:
            command = [sys.executable, __file__, "--one", case, "--model", options.model, *more]
            done = subprocess.run([*command, "--output", f"{folder}-resident"], stdout=subprocess.PIPE, check=True)
            row["resident"] = int(done.stdout.split()[-1])
        rows.append(row)
    print("\n| trained | planned, MiB | used, MiB | planned / used | growth of the resident set, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        sizes = [f"{row[name] / MIB:.1f}" if name in row else "" for name in ("planned", "used", "resident")]
        print(f"| {row['case']} | {sizes[0]} | {sizes[1]} | {row['planned'] / row['used']:.3f} | {sizes[2]} |")
    if options.csv:
        write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
