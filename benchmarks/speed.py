"""Speed of MILO against the official network: error and gradient with respect to `dist`, paired in one run.

    git clone https://github.com/ugurcogalan06/MILO milo_official
    python benchmarks/speed.py --official milo_official

Medians over alternating runs; the ratio is the official time over ours, so above 1 is faster. One row of CSV a case.
Then the mask alone, as guidance computes it, without a gradient. Then, without the official code, one reference
against many candidates in one call against a call for each; with --compile also `torch.compile` against none. --memory
compares the peak memory of the two instead, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milo_latent import MILO
from milo_latent.evaluation.reports import write_rows
from milo_latent.training.engine.records import commit

CASES = {  # name: shape of `ref` and `dist`, whether they are latents
    "latents 1x4x64x64": ((1, 4, 64, 64), True),
    "latents 8x4x64x64": ((8, 4, 64, 64), True),
    "latents 1x4x256x256": ((1, 4, 256, 256), True),
    "image 1x3x512x512": ((1, 3, 512, 512), False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def cpu_only(folder: Path) -> Iterator[None]:
    """Let the official files import and load on a machine without CUDA and torchvision, from their own folder."""
    stub = types.ModuleType("torchvision")
    stub.transforms = types.ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
    modules = {name: sys.modules.get(name) for name in ("torchvision", "torchvision.transforms")}
    to_cuda, here = nn.Module.cuda, Path.cwd()
    sys.modules |= {"torchvision": stub, "torchvision.transforms": stub.transforms}  # type: ignore[attr-defined]
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        nn.Module.cuda = to_cuda  # type: ignore[method-assign]
        for name, module in modules.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_official(folder: Path, *, latent: bool) -> nn.Module:
    """Return the official network with its weights, from a checkout of its repository."""
    path = folder / ("MILO_runner_latent.py" if latent else "MILO_runner.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with cpu_only(folder):
        spec.loader.exec_module(module)
        return module.MILO()


def official_step(network: nn.Module, ref: Tensor, dist: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a call that computes the official error and its gradient with respect to `dist`."""

    def step() -> tuple[Tensor, Tensor]:
        leaf = dist.clone().requires_grad_(True)
        error = network(leaf, ref)
        error.backward()
        return error, leaf.grad

    return step


def our_step(metric: Any, ref: Tensor, dist: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a call that computes our error and its gradient with respect to `dist`."""

    def step() -> tuple[Tensor, Tensor]:
        leaf = dist.clone().requires_grad_(True)
        error = metric(dist=leaf, ref=ref).mean()
        (gradient,) = torch.autograd.grad(error, leaf)
        return error, gradient

    return step


def paired_times(steps: list[Callable], repeats: int) -> list[list[float]]:
    """Return the seconds of each call in each of `repeats` rounds, in which the calls take turns."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(repeats):
        for step, taken in zip(steps, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    return times


def print_mask(official: Path, repeats: int) -> None:
    """Print the time of the mask of latents alone, without a gradient, as guidance computes it."""
    print("\n| mask alone | dtype | official, ms | ours, ms | ratio |")
    print("| --- | --- | ---: | ---: | ---: |")
    for shape in ((1, 4, 64, 64), (2, 4, 64, 64), (1, 4, 128, 128), (1, 4, 256, 256)):
        ref = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        dist = ref + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for dtype_name, dtype in DTYPES.items():
            theirs = load_official(official, latent=True).to(dtype)
            ours = MILO.from_pretrained(official / "weights" / "MILO_latent.pth").to(dtype)
            inputs = {"ref": ref.to(dtype), "dist": dist.to(dtype)}
            steps = [
                torch.no_grad()(lambda theirs=theirs, pair=inputs: theirs.mask_generator(pair["ref"], pair["dist"])),
                torch.no_grad()(lambda ours=ours, pair=inputs: ours.mask(**pair)),
            ]
            official_ms, ours_ms = (statistics.median(times) * 1e3 for times in paired_times(steps, repeats))
            name = "x".join(map(str, shape))
            print(
                f"| {name} | {dtype_name} | {official_ms:.2f} | {ours_ms:.2f} | {official_ms / ours_ms:.2f} |",
                flush=True,
            )


def print_many(weights: Path, repeats: int) -> None:
    """Print the time of one reference against N candidates in one call, and in N calls."""
    print("\n| one reference against N | N calls, ms | one call, ms | ratio | gradient |")
    print("| --- | ---: | ---: | ---: | --- |")
    metric = MILO.from_pretrained(weights)
    for side, count in ((64, 8), (64, 32), (32, 64)):
        generator = torch.Generator().manual_seed(0)
        ref = torch.randn(1, 4, side, side, generator=generator)
        dist = ref + 0.1 * torch.randn(count, 4, side, side, generator=generator)
        for gradient in (False, True):
            one = our_step(metric, ref, dist) if gradient else lambda ref=ref, dist=dist: metric(dist=dist, ref=ref)
            each = [
                our_step(metric, ref, item) if gradient else lambda ref=ref, item=item: metric(dist=item, ref=ref)
                for item in dist.split(1)
            ]
            steps = [lambda each=each: [step() for step in each], one]
            apart, together = (statistics.median(times) * 1e3 for times in paired_times(steps, repeats))
            name = f"4x{side}x{side}, N = {count}"
            print(f"| {name} | {apart:.1f} | {together:.1f} | {apart / together:.2f} | {'yes' if gradient else 'no'} |")


def print_compiled(weights: Path, repeats: int) -> None:
    """Print the time of the error and its gradient with `torch.compile` and without."""
    print("\n| torch.compile | eager, ms | compiled, ms | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for name, (shape, latent) in CASES.items():
        if latent:
            ref = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            dist = ref + 0.1
            metric = MILO.from_pretrained(weights)
            steps = [our_step(metric, ref, dist), our_step(torch.compile(metric, fullgraph=True), ref, dist)]
            eager, compiled = (statistics.median(times) * 1e3 for times in paired_times(steps, repeats))
            print(f"| {name} | {eager:.1f} | {compiled:.1f} | {eager / compiled:.2f} |", flush=True)


def peak_memory(official: Path, name: str, which: str) -> float:
    """Return by how many MiB two steps of a case raise the peak memory of this process."""
    shape, latent = CASES[name]
    weights = official / "weights" / ("MILO_latent.pth" if latent else "MILO.pth")
    ref, dist = torch.rand(shape), torch.rand(shape)
    if which == "official":
        network = load_official(official.resolve(), latent=latent)
        step = official_step(network, ref, dist)
    else:
        step = our_step(MILO.from_pretrained(weights), ref, dist)
    small = [tensor[..., :32, :32] for tensor in (ref, dist)]
    model = network if which == "official" else MILO.from_pretrained(weights)
    (official_step if which == "official" else our_step)(model, *small)()  # what a first call takes once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def print_memory(official: Path, threads: int) -> None:
    """Print the peak memory of error and gradient in float32, each side in a process of its own."""
    print("| error and gradient, float32 | official, MiB | ours, MiB | ours / official |")
    print("| --- | ---: | ---: | ---: |")
    for name in CASES:
        sides = []
        for which in ("official", "ours"):
            command = [sys.executable, __file__, "--official", str(official), "--threads", str(threads)]
            output = subprocess.run([*command, "--peak", name, which], capture_output=True, text=True, check=True)
            sides.append(float(output.stdout.strip().splitlines()[-1]))
        print(f"| {name} | {sides[0]:.1f} | {sides[1]:.1f} | {sides[1] / sides[0]:.2f} |", flush=True)


def main() -> None:
    """Print a table and, with --csv, add rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of the official repository")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    parser.add_argument("--memory", action="store_true", help="peak memory, and not speed")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.official / "MILO_runner.py").is_file():
        sys.exit(f"The official code is absent: {options.official} has no MILO_runner.py. See this file's first lines.")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_memory(options.official, *options.peak))
        return
    if options.memory:
        print_memory(options.official, options.threads)
        return
    rows = []
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repeats} alternating runs")
    print("| case | dtype | official float32, ms | official, ms | ours, ms | to float32 | ratio | difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (shape, latent) in CASES.items():
        official = load_official(options.official.resolve(), latent=latent)
        weights = options.official / "weights" / ("MILO_latent.pth" if latent else "MILO.pth")
        generator = torch.Generator().manual_seed(0)
        ref = torch.randn(shape, generator=generator) if latent else torch.rand(shape, generator=generator)
        dist = ref + 0.1 * torch.randn(shape, generator=generator)
        for dtype_name, dtype in DTYPES.items():
            metric = MILO.from_pretrained(weights).to(dtype)
            same = copy.deepcopy(official).to(dtype)
            steps = [
                official_step(official, ref, dist),
                official_step(same, ref.to(dtype), dist.to(dtype)),
                our_step(metric, ref.to(dtype), dist.to(dtype)),
            ]
            single, theirs, ours = (statistics.median(times) * 1e3 for times in paired_times(steps, options.repeats))
            expected, got = steps[0]()[0].item(), steps[2]()[0].item()
            row = {
                "case": name, "device": "cpu", "dtype": dtype_name, "threads": options.threads,
                "official_float32_ms": single, "official_ms": theirs,
                "ours_ms": ours, "ratio": theirs / ours, "difference": abs(got / expected - 1),
                "torch": torch.__version__, "commit": commit(),
            }  # fmt: skip
            rows.append(row)
            times = f"{single:.1f} | {theirs:.1f} | {ours:.1f}"
            figures = f"{times} | {single / ours:.2f} | {row['ratio']:.2f} | {row['difference']:.1e}"
            print(f"| {name} | {dtype_name} | {figures} |", flush=True)
    print_mask(options.official.resolve(), options.repeats)
    latent_weights = options.official / "weights" / "MILO_latent.pth"
    print_many(latent_weights, options.repeats)
    if options.compile:
        print_compiled(latent_weights, options.repeats)
    if options.csv:
        write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
