"""What several commands share: their options, what they answer, standard input and output."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from milo_latent.jobs import Jobs, Report
    from milo_latent.pipelines.diffbir import DiffBIRPipeline

TASKS = ["sr", "denoise", "face", "unaligned_face"]
DTYPES = ["float32", "float16", "bfloat16"]
TILE = "at least 320, such as 512"  # `latents.codec.SMALLEST_TILE`, which would take seconds to import
NO_SETTINGS = {"command", "action", "run", "inputs", "output", "existing", "quiet", "json", "recursive"}
EXAMPLES = "examples:"
SHOWN = 4  # names of files in a line of a summary


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)


def add_command(commands: argparse._SubParsersAction, name: str, *examples: str, **texts: Any) -> Any:
    """Add the parser of a command, whose help ends with examples, given without the program's name."""
    lines = [EXAMPLES, *(f"  milo-latent {example}" for example in examples)]
    return commands.add_parser(name, epilog="\n".join(lines), formatter_class=HelpFormatter, **texts)


@dataclass
class Answer:
    """What a command has done.

    Args:
        text: for people.
        inputs: files that were read.
        outputs: files that were written.
        settings: of the computation.
        skipped: inputs that were left out, and why.
        failed: inputs that could not be processed, and why.
        more: further values for --json.
        failure: an error to end with, after the answer was printed.
    """

    text: str
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[Any, str] = field(default_factory=dict)
    failed: Mapping[Any, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    failure: Exception | None = None

    def as_json(self, command: str, seconds: float) -> str:
        """Return one JSON object."""
        told = {name: [{"input": str(path), "reason": reason} for path, reason in getattr(self, name).items()]
                for name in ("skipped", "failed")}  # fmt: skip
        values = {
            "command": command,
            "inputs": list(map(str, self.inputs)),
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
            "seconds": round(seconds, 3),
        }
        return json.dumps(values | told | dict(self.more), indent=2, default=str)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that settings are made of, and have a value."""
    return {name: value for name, value in vars(options).items() if name not in NO_SETTINGS and value is not None}


def add_answer_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say how a command answers."""
    command.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    command.add_argument(
        "--json", action="store_true", help="print one JSON object: inputs, outputs, settings, seconds"
    )


def add_existing_options(command: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say what becomes of files that are there."""
    existing = command.add_mutually_exclusive_group()
    add = functools.partial(existing.add_argument, dest="existing", action="store_const")
    add("--overwrite", const="overwrite", default="resume", help=f"replace what is there (default: {default})")
    add("--skip-existing", const="skip", help="leave what is there as it is, whatever it was made of")


def add_device_options(command: argparse.ArgumentParser, networks: str = "of the networks") -> None:
    """Add the options that say where and in which dtype a command computes."""
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--dtype", choices=DTYPES, help=f"{networks} (default: float32)")


def add_file_options(command: argparse.ArgumentParser, *, inputs: str, output: str, required: bool = True) -> None:
    """Add the inputs and the output of a command that makes a file of each of its files."""
    add = command.add_argument
    add("inputs", nargs="+", metavar="IN", help=f"{inputs}, folders, quoted patterns, or - for standard input")
    add("-o", "--output", required=required, metavar="OUT", help=output)
    add("-r", "--recursive", action="store_true", help="also what is in the folders of a folder, in the same folders")
    add_existing_options(command, "a file is refused, a folder resumed")
    add_answer_options(command)


def to_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name in `DTYPES`; None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def place(network: Any, options: argparse.Namespace) -> Any:
    """Move a network to the device and the dtype of the options that `add_device_options` adds."""
    from torch.nn import Module

    from milo_latent.restoration.restorer import find_device

    return Module.to(network, device=find_device(options.device), dtype=to_dtype(options.dtype))  # diffusers' own warns


def add_restorer_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `load_restorer`."""
    command.add_argument("--model", default="nano", help="shipped weights, a folder, or a hub id (default: nano)")
    command.add_argument("--metric", help="MILO_L instead of the model's own: a name, a folder, or an official .pth")
    add_device_options(command)


def open_restorer(options: argparse.Namespace) -> DiffBIRPipeline:
    """Open the pipeline of the options that `add_restorer_options` adds."""
    from milo_latent.restoration.restorer import load_restorer

    hide_loading_bar()
    return load_restorer(options.model, device=options.device, dtype=to_dtype(options.dtype), metric=options.metric)


def add_vae_options(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that encode or decode."""
    command.add_argument("--model", default="nano", help="shipped weights, or a folder with a VAE (default: nano)")
    command.add_argument("--tile", type=int, metavar="PIXELS", help=f"work in tiles of this side, {TILE}")
    add_device_options(command, "of the VAE")


def open_vae(options: argparse.Namespace) -> Any:
    """Open the VAE of the options that `add_vae_options` adds."""
    from milo_latent.latents.files import load_vae

    hide_loading_bar()
    return place(load_vae(options.model), options)


def hide_loading_bar() -> None:
    """Leave the bars of the files and of the denoising steps as the only ones."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def tell_report(
    report: Report,
    jobs: Jobs,
    options: argparse.Namespace,
    *,
    unit: str,
    told: Callable[[Any], str],
    head: str,
    how: str = "",
    tail: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Answer:
    """Return what to print of a report.

    Args:
        report: of `jobs`.
        jobs: that were run.
        options: of the command.
        unit: what the files are, in the plural.
        told: turns what is reported of one file into words.
        head: begins the line, such as the command.
        how: goes on in the brackets.
        tail: ends the line.
        settings: in place of the options.
    """
    from milo_latent.files import files_failed
    from milo_latent.jobs import THERE

    there = sum(reason == THERE for reason in report.skipped.values())
    if jobs.folder is not None:
        given = _list(options.inputs)
        line = f"{head}: {len(report.made)} {unit} of {given} -> {jobs.folder} ({there} were there already{how}){tail}"
    elif report.made:
        ((source, (result, value)),) = report.made.items()
        line = f"{head}: {source} -> {result} ({told(value)}{how}){tail}"
    else:
        line = f"{head}: nothing to do, {options.output} is there already"
    lines = _skipped_lines({path: reason for path, reason in report.skipped.items() if reason != THERE})
    failure = None
    if report.failed:
        root = os.path.commonpath([path.parent for path in (*report.failed, *report.made, *report.skipped)])
        failed = [f"{os.path.relpath(path, root)}: {reason}" for path, reason in sorted(report.failed.items())]
        failure = files_failed(line, failed)
    return Answer(
        "\n".join(lines if failure else [line, *lines]),
        inputs=list(report.made),
        outputs=[result for result, _ in report.made.values()],
        settings=given_options(options) if settings is None else settings,
        skipped=report.skipped,
        failed=report.failed,
        failure=failure,
    )


def _list(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _skipped_lines(skipped: Mapping[Path, str]) -> list[str]:
    """Return a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        reasons.setdefault(reason, []).append(path.name)
    return [f"skipped {len(names)} ({reason}): {_list(names)}" for reason, names in reasons.items()]


def piped(run: Callable[[argparse.Namespace], Answer], suffix: str) -> Callable[[argparse.Namespace], Answer]:
    """Let a command take - for standard input and standard output, by files in a temporary folder.

    Args:
        run: of the command.
        suffix: of what it writes to standard output, such as ".png".
    """

    @functools.wraps(run)
    def run_piped(options: argparse.Namespace) -> Answer:
        if options.inputs == ["-"] and options.output is None:
            options.output = "-"
        if "-" not in (*options.inputs, options.output):
            return run(options)
        if len(options.inputs) > 1 or (options.output == "-" and Path(options.inputs[0]).is_dir()):
            raise ValueError("Expected one file with - for standard input or output, got several.")
        if options.output == "-" and sys.stdout.isatty():
            raise ValueError("Expected a file or a pipe for the result, got a terminal. Pass -o FILE, or add | or >.")
        with tempfile.TemporaryDirectory() as folder:
            names = {}
            if options.inputs == ["-"]:
                content = sys.stdin.buffer.read()
                kind = {"decode": ".npy" if content.startswith(b"\x93NUMPY") else ".safetensors"}
                source = Path(folder, f"standard-input{kind.get(options.command, '')}")
                source.write_bytes(content)
                options.inputs, names[str(source)] = [str(source)], "-"
            result = Path(folder, f"standard-output{suffix}")
            if options.output == "-":
                options.output, options.stream, names[str(result)] = str(result), sys.stderr, "-"
            answer = run(options)
            if result.is_file():
                sys.stdout.buffer.write(result.read_bytes())
                sys.stdout.buffer.flush()
        for path, name in names.items():
            answer.text = answer.text.replace(path, name)
        answer.inputs, answer.outputs = ([names.get(str(each), each) for each in files]
                                         for files in (answer.inputs, answer.outputs))  # fmt: skip
        return answer

    return run_piped
