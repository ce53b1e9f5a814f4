"""Many small photos: their speed and memory against another checkout, and what several processes make of them.

    git worktree add ../before COMMIT
    python benchmarks/many_files.py speed --photos FOLDER --before ../before --count 5000 --side 64
    python benchmarks/many_files.py processes --photos FOLDER --count 60

`speed` runs `encode`, with and without --batch, and `score` of each checkout in turn, whole processes on all cores, on
a tenth of the photos and on all, and prints photos a minute, their ratio and the peak memory, which must not grow with
the number of photos.
`processes` restores, encodes and scores by torchrun in 2 and 3 processes, in 3 of which one is killed and which are
started again, and in 2 on two nodes of one machine, and compares every byte with what one process makes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from milo_latent.files import read_image, write_image
from milo_latent.training.data.crops import list_images

REPOSITORY = Path(__file__).resolve().parents[1]


def make_photos(sources: list[str], folder: Path, *, count: int, side: int) -> None:
    """Write `count` crops of some photos, each another one."""
    folder.mkdir()
    paths = list_images(sources)
    for index in range(count):
        image = read_image(paths[index % len(paths)])
        top, left = (index * step % (size - side + 1) for step, size in zip((37, 91), image.shape[2:], strict=True))
        write_image(folder / f"{index:05}.png", image[..., top : top + side, left : left + side])


def measure(checkout: Path, command: list[str], *, photos: int) -> tuple[float, float]:
    """Return photos a minute and the peak memory in MiB of a command of a checkout, start included."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "milo_latent", *command],
        env=os.environ | {"PYTHONPATH": str(checkout)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    errors = process.stderr.read().decode() if process.stderr else ""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors[-2000:])
    return photos / (time.perf_counter() - began) * 60, used.ru_maxrss / 1024


def print_speed(options: argparse.Namespace, work: Path) -> None:
    """Print photos a minute and peak memory, for all photos and for a tenth of them."""
    make_photos(options.photos, work / "photos", count=options.count, side=options.side)
    (work / "few").mkdir()
    for path in sorted((work / "photos").iterdir())[::10]:
        shutil.copy(path, work / "few")
    checkouts = {"before": options.before.resolve(), "now": REPOSITORY}
    print("| command | photos | before, photos a minute | now | ratio | before, MiB | now, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ("encode", "encode --batch 16", "score"):
        for folder in ("few", "photos"):
            count = len(list((work / folder).iterdir()))
            commands = {
                "encode": ["encode", str(work / folder), "-o", str(work / "out")],
                "score": ["score", "--ref", str(work / folder), "--dist", str(work / folder), "--csv",
                          str(work / "out" / "table.csv"), "--weights", "milo-image"],
            }  # fmt: skip
            found: dict[str, list[tuple[float, float]]] = {which: [] for which in checkouts}
            for _ in range(options.rounds):
                for which, checkout in checkouts.items():
                    shutil.rmtree(work / "out", ignore_errors=True)
                    (work / "out.record").unlink(missing_ok=True)
                    if name == "score":
                        (work / "out").mkdir()
                    command, *more = name.split()
                    given = [*commands[command], *(more if which == "now" else [])]
                    found[which].append(measure(checkout, given, photos=count))
            speeds = {which: statistics.median(speed for speed, _ in runs) for which, runs in found.items()}
            peaks = {which: max(peak for _, peak in runs) for which, runs in found.items()}
            figures = f"{speeds['before']:.0f} | {speeds['now']:.0f} | {speeds['now'] / speeds['before']:.2f}"
            print(f"| {name} | {count} | {figures} | {peaks['before']:.0f} | {peaks['now']:.0f} |", flush=True)


def free_port() -> str:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(command: list[str], *, processes: int, nodes: int = 1) -> list[subprocess.Popen]:
    """Start a command by torchrun, once for each node, in a process group of its own each."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank", str(node),
                "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", port,
                "-m", "milo_latent", *command,
            ],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )
        for node in range(nodes)
    ]  # fmt: skip


def finish(launched: list[subprocess.Popen]) -> None:
    """Wait for all nodes; end with their errors if one failed."""
    for each in launched:
        errors = each.communicate()[1].decode()
        if each.returncode:
            sys.exit(errors[-3000:])


def kill_one(launched: subprocess.Popen, folder: Path, *, after: int) -> int:
    """Kill the youngest process of a run once `after` results are there; return how many were there in the end."""
    while len(list(folder.glob("[0-9]*"))) < after:
        if launched.poll() is not None:
            sys.exit("The run ended before a process could be killed. Take more photos.")
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    launched.communicate()
    return len(list(folder.glob("[0-9]*")))


def commands(work: Path, name: str) -> dict[str, list[str]]:
    """Return the commands of a run, which share nothing with those of other runs."""
    photos, out = str(work / "photos"), work / name
    return {
        "restore": ["restore", photos, "-o", str(out / "restored")],
        "encode": ["encode", photos, "-o", str(out / "latents")],
        "score": ["score", "--ref", photos, "--dist", str(work / "one" / "restored"), "--csv", str(out / "scores.csv")],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, without the records of how it was made."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".record")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def print_processes(options: argparse.Namespace, work: Path) -> None:
    """Print whether each way of sharing the files makes the same bytes as one process."""
    make_photos(options.photos, work / "photos", count=options.count, side=options.side)
    ways: dict[str, dict[str, int]] = {
        "one": {"processes": 1}, "two": {"processes": 2}, "three": {"processes": 3},
        "three, one killed": {"processes": 3}, "two nodes": {"processes": 1, "nodes": 2},
    }  # fmt: skip
    print("| processes | files | differ from one process | made twice | left over |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, shape in ways.items():
        (work / name).mkdir()
        again = 0
        for command, arguments in commands(work, name).items():
            if "killed" in name and command != "score":
                folder = work / name / {"restore": "restored", "encode": "latents"}[command]
                launched = launch(arguments, **shape)
                kill_one(launched[0], folder, after=options.count // 3)
                before = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*")}
                finish(launch(arguments, **shape))
                again += sum(path.stat().st_mtime_ns != stamp for path, stamp in before.items())
            else:
                finish(launch(arguments, **shape))
        made, expected = contents(work / name), contents(work / "one")
        differ = sum(made.get(path) != expected.get(path) for path in made.keys() | expected.keys())
        parts = sum(".part" in path or path.startswith(".") for path in made)
        print(f"| {name} | {len(made)} | {differ} | {again} | {parts} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("speed", "processes"))
    parser.add_argument("--photos", nargs="+", required=True, help="folders of photos of at least --side pixels")
    parser.add_argument("--count", type=int, default=60, help="number of crops")
    parser.add_argument("--side", type=int, default=64, help="of the crops in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command and checkout")
    parser.add_argument("--before", type=Path, help="another checkout")
    options = parser.parse_args()
    if options.task == "speed" and options.before is None:
        parser.error("speed needs --before")
    with tempfile.TemporaryDirectory() as folder:
        (print_speed if options.task == "speed" else print_processes)(options, Path(folder))


if __name__ == "__main__":
    main()
