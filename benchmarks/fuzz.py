"""Damaged and hostile files, and kills: what the commands do with them.

    python benchmarks/fuzz.py --cases 10000 --kills 50

Every case damages one file of a small valid set, by its bytes or by its structure, and reads it in this process as the
commands do. It must end in a result or in one line of error: *tracebacks* counts other exceptions, *hangs* cases above
`LIMIT` seconds, *texts* errors of several lines or that repeat more than 200 characters of a hostile value, *litter*
cases that left a temporary file. A kill ends a command by SIGKILL at a random moment; the same command, run again, must
give the same files as one that was not killed, and nothing else. A case depends on `--seed`, its kind and its number
alone, so `--only KIND --first NUMBER --cases 1` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from milo_latent.cli import main as milo_latent
from milo_latent.convert.diffbir import convert_diffbir
from milo_latent.evaluation.iqa_datasets import load_kadid10k
from milo_latent.evaluation.reports import Row, format_rows
from milo_latent.files import (
    read_latents,
    read_latents_metadata,
    read_photo,
    write_image,
    write_latents,
    write_safetensors,
)
from milo_latent.latents.files import load_vae
from milo_latent.metric.network import MILO
from milo_latent.programs import run_program
from milo_latent.restoration.restorer import load_restorer
from milo_latent.score.table import ScoreTable
from milo_latent.testing import tiny_metric, tiny_pipeline
from milo_latent.training.build_dataset import join_rows, shard_path
from milo_latent.training.data.shards import PairSet
from milo_latent.training.engine.loop import fit
from milo_latent.training.engine.recipe import read_recipe
from milo_latent.training.engine.run import RunConfig
from milo_latent.training.pseudo_mos import DEFAULT_CALIBRATIONS, read_calibrations, write_calibrations

LIMIT = 10.0  # seconds of the processor that a case may take; the slowest valid one takes below 1
ECHO = 200  # characters of a hostile value that an error may repeat
LONG = "A" * 5000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "MPO")  # of most pictures
REFUSED = ("AVIF", "DDS", "GIF", "ICO", "TGA", "PPM", "PCX", "SGI", "IM", "EPS", "PDF", "ICNS")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 0.5, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", LONG, [], {}, [[]], [1, 2],
    [LONG], {"a": 1}, ["x"] * 5000, {LONG: LONG}, "../../etc/passwd", "/etc/passwd",
)  # fmt: skip
WORDS = [b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"]


CASE_COLUMNS = ("accepted", "refused", "tracebacks", "hangs", "texts", "litter")
KILL_COLUMNS = ("kills", "left by the kill", "left by the restart", "other contents", "failed")


class Hang(BaseException):
    """A case took too long; no reader catches this by accident."""


@dataclass(frozen=True)
class Kind:
    """A kind of cases: a folder of valid files, and how they are read."""

    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]  # of the folder and the file that was damaged
    files: str = "*"  # that are damaged
    copied: bool = False  # reading changes the folder


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Change, insert, remove, repeat or cut off bytes, more often near the start, where headers are."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = min(rng.randrange(len(damaged) + 1) for _ in range(rng.choice([1, 4])))
        end, how = place + rng.choice([1, 4, 64]), rng.randrange(7)
        if how == 0:
            damaged[place : place + 1] = bytes([rng.randrange(256)])
        elif how == 1 and place < len(damaged):
            damaged[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            damaged[place : place + 4] = rng.choice(WORDS)
        elif how == 3:
            del damaged[place:]
        elif how == 4:
            del damaged[place:end]
        elif how == 5:
            damaged[place:place] = damaged[place:end]
        else:
            damaged[place:end] = rng.randbytes(end - place)
    return bytes(damaged)


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """Replace, remove or add a value somewhere in what JSON holds."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        key = rng.choice(sorted(tree, key=str) if isinstance(tree, dict) else range(len(tree)))
        how = rng.random()
        if how < 0.1:
            del tree[key]
        elif how < 0.2 and isinstance(tree, dict):
            tree[rng.choice(["x", LONG, str(key)])] = rng.choice(VALUES)
        else:
            tree[key] = damage_tree(rng, tree[key])
        return tree
    if isinstance(tree, int | float) and rng.random() < 0.3:
        return rng.choice([-tree, tree + 1, tree * 1000, tree * 10**6, str(tree), [tree], [tree] * 9])
    return rng.choice(VALUES)


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Change a value in a JSON file, replace its root, nest it deeply, or damage its bytes."""
    how = rng.random()
    if how < 0.1:
        return damage_bytes(rng, content)
    if how < 0.14:
        depth = rng.choice([50, 900, 100_000])
        return rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"9" * depth])
    return json.dumps(rng.choice(VALUES) if how < 0.2 else damage_tree(rng, json.loads(content))).encode()


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the header, such as a dtype, a shape or metadata; its length stays right."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    name = rng.choice(sorted(header))
    how = rng.random()
    if how < 0.25 and name != "__metadata__":
        header[name]["dtype"] = rng.choice(
            ["F4", "F6_E2M3", "F8_E4M3", "F8_E8M0", "BOOL", "U8", "I64", "F64", "F16", "BF16", "C64", "X"]
        )
    elif how < 0.4:
        header[rng.choice(["x", LONG])] = header.pop(name)
    elif how < 0.5 and name != "__metadata__":
        header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [*header[name]["shape"], 1], []])
    else:
        header = damage_tree(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[end:]


def damage_npy(rng: random.Random, content: bytes) -> bytes:
    """Change a part of the header; its length stays right."""
    head, values = content[10:128].decode().rstrip(), content[128:]
    old = rng.choice(["'<f4'", "False", "(4, 16, 16)", "descr", "{", ", ", "4"])
    new = rng.choice(
        ["'O'", "'<f8'", "'<c16'", "'V4'", "[('a', '<f4')]", "(" * 200, "9" * 30, "(4, -16, 16)", "(65536, 65536, 4)",
         "10**9", "1e5", "'''", "\\", "\n", "L", "()", "(0, 16, 16)", "(4, 256)", "True", "None", "{" * 60, LONG]
    )  # fmt: skip
    text = head.replace(old, new, 1).encode() + b"\n"
    return content[:8] + struct.pack("<H", len(text) % 65536) + text + values


def damage_checkpoint(rng: random.Random, content: bytes) -> bytes:
    """Damage the pickle inside a checkpoint's archive, whose checksums stay right; of the old format, the bytes."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return damage_bytes(rng, content)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(packed, "w") as after:
        names = before.namelist()
        chosen = rng.choice([name for name in names if name.endswith("pkl")] + [rng.choice(names)])
        for name in names:
            data = before.read(name)
            after.writestr(name, damage_bytes(rng, data) if name == chosen and data else data)
    return packed.getvalue()


DAMAGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": damage_json, ".safetensors": damage_safetensors, ".npy": damage_npy, ".pth": damage_checkpoint,
    ".bin": damage_checkpoint, ".pkl": damage_checkpoint,
}  # fmt: skip


def damage(rng: random.Random, path: Path, content: bytes) -> bytes:
    """Damage a file by its structure, if its kind is known, or by its bytes."""
    by_structure = DAMAGES.get(path.suffix, damage_bytes)
    return by_structure(rng, content) if rng.random() < 0.6 else damage_bytes(rng, content)


def make_images(folder: Path) -> None:
    """Write a picture in every format that Pillow writes, most of them with EXIF data."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    for mode in ("RGB", "RGBA", "L", "P", "CMYK", "I;16"):
        array = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        picture = Image.fromarray(array[..., 0].astype(np.uint16) if mode == "I;16" else array)
        picture = picture if mode == "I;16" else picture.convert(mode)
        for name in FORMATS if mode != "RGBA" else [*FORMATS, *REFUSED]:
            for options in ({"exif": exif}, {"compression": "tiff_lzw"} if name == "TIFF" else {"progressive": True}):
                path = folder / f"{name}-{mode.replace(';', '')}-{next(iter(options))}.png"
                with contextlib.suppress(Exception):  # no format holds all modes
                    picture.save(path, format=name, **options)
                if path.exists() and not path.stat().st_size:
                    path.unlink()


def make_npy(folder: Path) -> None:
    """Write latents in the dtypes and orders that numpy stores."""
    latents = torch.randn(4, 16, 16).numpy()
    for name, array in (("a", latents), ("half", latents.astype("f2")), ("wide", latents.astype(">f8"))):
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "order.npy", np.asfortranarray(latents))


def make_safetensors(folder: Path) -> None:
    """Write latents with metadata."""
    metadata = {"vae": "nano", "scaling_factor": "0.87094", "source_size": "120x128"}
    write_latents(folder / "a.safetensors", torch.randn(1, 4, 16, 16), metadata=metadata)


def read_whole_latents(folder: Path, path: Path) -> None:
    """Read latents and what is stored beside them."""
    read_latents(path)
    read_latents_metadata(path)


def official_state(channels: int) -> dict[str, Tensor]:
    """Return the weights of a metric under their official names."""
    names = {"mask_finder.": "mask_finder_1.netBasic.", "scaler.": "scaler_network.model."}
    state = tiny_metric(channels=channels).state_dict()
    return {next(new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)): value
            for key, value in state.items()}  # fmt: skip


def make_checkpoints(folder: Path) -> None:
    """Write official weights in both formats of torch, and checkpoints that hold something else."""
    state = official_state(4)
    odd = {
        "zip": state, "module": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "list": [1, 2], "number": 3, "nested": {"state_dict": {"a": {"b": torch.ones(2)}}}, "keys": {1: torch.ones(2)},
        "sparse": {key: value.to_sparse() for key, value in state.items()},
        "wide": {key: torch.zeros(1).expand(10**6, 10**6) for key in state},
        "complex": {key: value.to(torch.complex64) for key, value in state.items()},
    }  # fmt: skip
    for name, content in odd.items():
        torch.save(content, folder / f"{name}.pth")
    for name in ("zip", "module", "list"):
        torch.save(odd[name], folder / f"old-{name}.pth", _use_new_zipfile_serialization=False)


def make_metric(folder: Path) -> None:
    """Save a metric."""
    tiny_metric().save_pretrained(folder)


def compare(metric: MILO) -> None:
    """Use a metric, as `score` does."""
    latents = torch.rand(1, metric.config.channels, 16, 16)
    with torch.inference_mode():
        metric.compare(ref=latents, dist=latents)


def make_vae(folder: Path) -> None:
    """Save a VAE in shards, with their index."""
    tiny_pipeline().vae.save_pretrained(folder, max_shard_size="10KB")


def make_pipeline(folder: Path) -> None:
    """Save a pipeline."""
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=tiny_metric())
    pipeline.prompt_cache.stored = {"a photo": torch.rand(1, 77, 8)}
    pipeline.save_pretrained(folder)


class Point(nn.Module):
    """Three numbers to train."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.ones(3))

    def forward(self, target: Tensor) -> Tensor:
        """Return the squared distance of a target."""
        return (self.place - target).square().mean()


def train(folder: Path, steps: int = 4) -> None:
    """Train three numbers, or resume."""
    config = RunConfig(folder, steps, checkpoint_steps=2, precision="no", trackers=(), ema_decay=0.5)
    fit(Point(), lambda step, process: (torch.full((3,), float(step)),), config)


def make_training_files(folder: Path) -> None:
    """Write a recipe, calibrations, a table of opinions and a training set of two shards."""
    (folder / "recipe.toml").write_text('steps = 10\nbetas = [0.9, 0.99]\noptimizer = "soap"\nmirror = true\n')
    write_calibrations(folder / "calibrations.json", DEFAULT_CALIBRATIONS)
    (folder / "dmos.csv").write_text("dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.5,0.1\n" * 3)
    row = {"dmos": torch.rand(2), "labels": torch.rand(2, 3)}
    row |= {"ref_latents": torch.rand(1, 4, 8, 8), "dist_latents": torch.rand(2, 4, 8, 8)}
    for index in range(2):
        write_safetensors(shard_path(folder, index), join_rows([row, row]), metadata={"record": "{}"})
    (folder / "dataset.json").write_text(json.dumps({"shards": 2}))


def read_training_file(folder: Path, path: Path) -> None:
    """Read the file by its own reader."""
    if path.name == "recipe.toml":
        read_recipe(path)
    elif path.name == "calibrations.json":
        read_calibrations(path)
    elif path.name == "dmos.csv":
        load_kadid10k(folder)
    else:
        pairs = PairSet(folder, space="latents")
        pairs.pairs(pairs.draw(4, seed=0, step=0))


def make_table(folder: Path) -> None:
    """Write two folders of latents, and an interrupted table of their scores."""
    for name in ("ref", "dist"):
        (folder / name).mkdir()
        for index in range(3):
            write_latents(folder / name / f"{index}.npy", torch.randn(1, 4, 16, 16))
    make_metric(folder / "metric")
    with unittest.mock.patch.object(ScoreTable, "finish", return_value=[]):
        score(folder)


def score(folder: Path) -> None:
    """Run the command on the two folders."""
    files = [f"--ref={folder / 'ref'}", f"--dist={folder / 'dist'}", f"--csv={folder / 't.csv'}"]
    milo_latent(["score", *files, f"--weights={folder / 'metric'}"])


KINDS: dict[str, tuple[float, Kind]] = {  # with their share of the cases
    "images": (0.40, Kind(make_images, lambda folder, path: read_photo(path))),
    "npy": (0.12, Kind(make_npy, read_whole_latents)),
    "safetensors": (0.12, Kind(make_safetensors, read_whole_latents)),
    "checkpoints": (0.12, Kind(make_checkpoints, lambda folder, path: compare(MILO.from_official(path)))),
    "metrics": (0.09, Kind(make_metric, lambda folder, path: compare(MILO.from_pretrained(folder)), "*[!d]")),
    "VAEs": (0.06, Kind(make_vae, lambda folder, path: load_vae(folder))),
    "pipelines": (0.03, Kind(make_pipeline, lambda folder, path: load_restorer(folder, device="cpu"), "**/*[!d]")),
    "training sets": (0.03, Kind(make_training_files, read_training_file)),
    "training runs": (0.02, Kind(train, lambda folder, path: train(folder, 6), "**/*", copied=True)),
    "tables": (0.01, Kind(make_table, lambda folder, path: score(folder), "*.partial", copied=True)),
}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in what takes more time of the processor; what never comes back to Python ends the process."""

    def stop(*_: object) -> None:
        raise Hang

    faulthandler.dump_traceback_later(60 * seconds, exit=True, file=sys.__stderr__)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def run_case(kind: Kind, folder: Path, path: Path) -> tuple[str, str]:
    """Read a damaged file; return what came of it, and the text of its error."""
    errors = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="default"),
            time_limit(LIMIT),
        ):
            code = run_program(lambda: kind.read(folder, path))
    except Hang:
        return "hangs", "".join(traceback.format_exc())
    except Exception:
        return "tracebacks", traceback.format_exc()
    text = errors.getvalue()
    told = [line for line in text.splitlines() if line.startswith("milo-latent: ") and ": warning: " not in line]
    if (code and len(told) != 1) or "Traceback" in text or "A" * (ECHO + 1) in text or len(text) > 2000:
        return "texts", text
    if any(each.name.startswith(".") for each in folder.rglob("*")):
        return "litter", text
    return ("refused" if code or told else "accepted"), text


def fuzz(name: str, cases: int, *, seed: int, first: int, show: int) -> Counter[str]:
    """Run cases of one kind; return how many ended how, and print those that ended badly, `show` at most."""
    kind, counts = KINDS[name][1], Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        valid = Path(temporary) / "valid"
        valid.mkdir()
        torch.manual_seed(seed)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            kind.make(valid)
        paths = sorted(path.relative_to(valid) for path in valid.glob(kind.files) if path.is_file())
        for number in range(first, first + cases):
            rng = random.Random(f"{seed} {name} {number}")
            chosen = rng.choice(paths)
            folder = Path(shutil.copytree(valid, Path(temporary) / "copy")) if kind.copied else valid
            path, content = folder / chosen, (valid / chosen).read_bytes()
            path.write_bytes(damage(rng, path, content))
            outcome, text = run_case(kind, folder, path)
            counts[outcome] += 1
            if outcome not in ("refused", "accepted") and sum(counts.values()) - counts["refused"] and show > 0:
                show -= 1
                print(f"{name} {number} {chosen}: {outcome}\n{text[-1500:]}", file=sys.stderr)
            if kind.copied:
                shutil.rmtree(folder)
            else:
                path.write_bytes(content)
    return counts


def make_killed(folder: Path) -> None:
    """Write what the commands that are killed work on."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from official_checkpoints import make_files

    for name in ("photos", "ref", "dist"):
        (folder / name).mkdir()
    for index in range(4):
        write_image(folder / "photos" / f"{index:02}.png", torch.rand(1, 3, 64, 64))
        for name in ("ref", "dist"):
            write_latents(folder / name / f"{index:02}.npy", torch.randn(1, 4, 64, 64))
    make_pipeline(folder / "model")
    make_metric(folder / "metric")
    torch.save(official_state(4), folder / "official.pth")
    torch.save(make_files(folder).convert_arguments(), folder / "diffbir.pt")


def command(*arguments: str) -> Callable[[Path], int]:
    """Return a function that runs a command, in whose arguments DATA is the folder of `make_killed`."""
    return lambda data: milo_latent([argument.replace("DATA", str(data)) for argument in arguments])


def convert(data: Path) -> int:
    """Run `convert diffbir` on tiny networks, whose sizes the command itself does not take."""
    arguments = torch.load(data / "diffbir.pt", weights_only=False)
    return run_program(lambda: convert_diffbir("v2.1", "sr", output="out", **arguments))


KILLED: dict[str, Callable[[Path], int]] = {  # each writes `out` in the working folder
    "restore": command("restore", "DATA/photos", "-o=out", "--model=DATA/model", "--steps=1", "--device=cpu"),
    "encode": command("encode", "DATA/photos", "-o=out", "--model=DATA/model"),
    "score": command("score", "--ref=DATA/ref", "--dist=DATA/dist", "--csv=out.csv", "--weights=DATA/metric"),
    "weights convert": command("weights", "convert", "DATA/official.pth", "-o=out", "--unofficial"),
    "convert diffbir": convert,
}


def start(name: str, data: Path, folder: Path) -> int:
    """Run a command in a child of this process, which has everything imported, and return its process."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(KILLED[name](data))
    return child


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, by name, but the records of what results were made of, which grow by each start."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".record"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def hidden(folder: Path) -> list[Path]:
    """Return the temporary files and folders below a folder."""
    return [path for path in folder.rglob(".*")]


def wait_for_writing(folder: Path, seconds: float) -> None:
    """Wait until a temporary file is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not hidden(folder):
        pass


def kill(name: str, data: Path, seed: int, count: int) -> Counter[str]:
    """Kill a command `count` times, each time run it again, and return how that ended.

    Every other kill comes while a file is written, soon after a random moment.
    """
    counts, rng = Counter[str](), random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        began = time.monotonic()
        code = os.waitpid(start(name, data, whole), 0)[1]
        duration, expected = time.monotonic() - began, contents(whole)
        assert expected, f"{name} made nothing"
        assert not code, f"{name} failed"
        for number in range(count):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            child = start(name, data, folder)
            time.sleep(duration * rng.random() ** (1 + number % 2))
            wait_for_writing(folder, duration if number % 2 else 0)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            counts["left by the kill"] += bool(hidden(folder))
            code = os.waitstatus_to_exitcode(os.waitpid(start(name, data, folder), 0)[1])
            after = contents(folder)
            complete = code == 1 and not hidden(folder)  # the first run was killed at its end, and `out` is not new
            counts["left by the restart"] += bool(hidden(folder) or after.keys() - expected.keys())
            counts["other contents"] += after != expected
            counts["failed"] += code != 0 and not complete
            counts["kills"] += 1
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return 1 if a case ended badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="damaged files, of all kinds together")
    parser.add_argument("--kills", type=int, default=50, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS, *KILLED], help="cases of one kind, or kills of one command")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--show", type=int, default=3, help="cases of each kind that ended badly to print")
    options = parser.parse_args(arguments)
    bad = 0
    torch.set_num_threads(1)  # a child that is forked from a process with more would wait for threads that it lacks
    rows: list[Row] = []
    commands = [name for name in KILLED if options.kills and options.only in (None, name)]
    with tempfile.TemporaryDirectory() as temporary:  # before other cases, which start threads
        if commands:
            make_killed(Path(temporary))
        for name in commands:
            counts = kill(name, Path(temporary), options.seed, options.kills // len(commands))
            rows.append({"command": name} | {column: counts[column] for column in KILL_COLUMNS})
            bad += sum(counts[column] for column in KILL_COLUMNS[2:])
    if rows:
        print(format_rows(rows), flush=True)
    rows = []
    for name in [name for name in KINDS if options.only in (None, name)]:
        cases = options.cases if options.only else round(options.cases * KINDS[name][0])
        began = time.monotonic()
        counts = fuzz(name, cases, seed=options.seed, first=options.first, show=options.show)
        row: Row = {"kind": name, "cases": cases} | {column: counts[column] for column in CASE_COLUMNS}
        rows.append(row | {"s": round(time.monotonic() - began)})
        bad += sum(counts[column] for column in CASE_COLUMNS[2:])
    if rows:
        print(format_rows(rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
