"""The command `milo-latent`: parses, calls, prints; computes nothing."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milo_latent import __version__
from milo_latent.cli import app, benchmark, convert, decode, encode, restore, score, weights
from milo_latent.extras import import_extra
from milo_latent.processes import join_processes, process_index
from milo_latent.programs import run_program

DESCRIPTION = """\
Restore photos, steered by MILO in the latent space of a diffusion model, and measure what a person would see.

  milo-latent restore photo.jpg                 a restored photo_restored.png beside it
  milo-latent app                               a page in the browser, on which photos are restored and compared
  milo-latent score --ref a.npy --dist b.npy    how visible the difference of two latents is
  milo-latent encode photo.jpg -o photo.npy     the latents of a photo, or of a folder of them
  milo-latent decode photo.npy -o photo.png     and back
  milo-latent benchmark restore -h              tables of settings on a folder of photos, with or without references
  milo-latent weights list                      the metrics and models at hand
  milo-latent convert diffbir -h                official DiffBIR checkpoints to a pipeline folder
"""


class ShowVersions(argparse.Action):
    """Print the versions of what decides over results, and the devices."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Import torch, which takes its time, only now."""
        import platform
        from importlib.metadata import version

        import torch

        names = [f"cuda ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
        names += ["mps"] if torch.backends.mps.is_available() else []
        print(
            f"milo-latent {__version__}\ntorch {torch.__version__}\ndiffusers {version('diffusers')}\n"
            f"python {platform.python_version()}\ndevices {', '.join([*names, f'cpu ({os.cpu_count()} cores)'])}"
        )
        parser.exit()


class PrintCompletion(argparse.Action):
    """Print the script that completes commands, options and files in a shell."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, option: str | None = None) -> None:
        """Print."""
        try:
            shtab = import_extra("shtab", "completion", str(option))
        except ImportError as error:
            parser.exit(1, f"milo-latent: {error}\n")
        for action in _all_actions(parser):
            if action.nargs != 0 and action.choices is None and action.type in (None, Path):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _all_actions(each)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="milo-latent", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=ShowVersions, nargs=0, help="show the versions and the devices, and exit")
    parser.add_argument(
        "--print-completion", action=PrintCompletion, choices=["bash", "zsh", "tcsh"],
        help="print the script that completes this command in a shell, and exit",
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in (restore, app, score, encode, decode, benchmark, weights, convert):
        command.add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` name, or those of the process for None, and return the exit code.

    The code is 0, or 1 after one line on standard error that says what was wrong; wrong arguments exit with 2.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    def program() -> None:
        began = time.perf_counter()
        join_processes(cpu=getattr(options, "device", None) == "cpu")
        answer = options.run(options)
        if process_index() > 0:
            return
        text = answer.as_json(options.command, time.perf_counter() - began) if options.json else answer.text
        if text and (options.json or not options.quiet):
            print(text, file=getattr(options, "stream", sys.stdout))
        if answer.failure is not None:
            raise answer.failure

    return run_program(program, interrupted="no file is half written; the same command resumes")
