"""`milo-latent convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from milo_latent.cli.common import DTYPES, TASKS, Answer, add_answer_options, add_command, given_options, to_dtype

VERSIONS = ["v1", "v2", "v2.1"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "convert",
        help="convert official DiffBIR checkpoints to a pipeline folder",
        description="Convert official checkpoints to a folder that DiffBIRPipeline opens without a network.",
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    diffbir = add_command(
        actions, "diffbir",
        "convert diffbir --version v2 --task sr --sd sd21.ckpt --controlnet v2.pth --cleaner bsrnet.pth -o sr",
        "convert diffbir --version v1 --task face --sd sd21.ckpt --controlnet face.pth --cleaner swinir.ckpt -o faces",
        help="convert files that you have",
    )  # fmt: skip
    diffbir.set_defaults(run=run_diffbir)
    diffbir.add_argument("--sd", type=Path, required=True, metavar="FILE", help="Stable Diffusion 2.1")
    diffbir.add_argument("--controlnet", type=Path, required=True, metavar="FILE", help="IRControlNet, stage 2")
    diffbir.add_argument("--cleaner", type=Path, required=True, metavar="FILE", help="SwinIR, SCUNet or BSRNet")
    diffbir.add_argument("--background", type=Path, metavar="FILE", help="cleaner around the faces of unaligned_face")
    diffbir.add_argument(
        "--ignore", action="append", default=[], metavar="REGEX", help="further keys of --sd that are not needed"
    )
    pull = add_command(
        actions, "pull", "convert pull --version v2.1 --task sr -o diffbir-v2.1-sr",
        "convert pull --version v2 --task denoise -o denoiser --dtype float16",
        help="fetch the official files, check and convert them",
    )  # fmt: skip
    pull.set_defaults(run=run_pull)
    pull.add_argument("--downloads", type=Path, metavar="FOLDER", help="where fetched files are kept (default: cache)")
    for action in (diffbir, pull):
        action.add_argument("--version", choices=VERSIONS, required=True, help="release of DiffBIR", dest="release")
        action.add_argument("--task", choices=TASKS, required=True)
        action.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
        action.add_argument("--dtype", choices=DTYPES, help="of the files written (default: the checkpoints')")
        action.add_argument(
            "--tokenizer",
            metavar="FOLDER|HUB ID|FILE|none",
            help="CLIP's tokenizer, or bpe_simple_vocab_16e6.txt.gz (default: the hub's; none if that fails)",
        )
        add_answer_options(action)


def run_diffbir(options: argparse.Namespace) -> Answer:
    """Convert."""
    from milo_latent.convert.diffbir import convert_diffbir

    convert_diffbir(
        options.release,
        options.task,
        sd=options.sd,
        controlnet=options.controlnet,
        cleaner=options.cleaner,
        background=options.background,
        output=options.output,
        dtype=to_dtype(options.dtype),
        tokenizer=options.tokenizer,
        ignore=options.ignore,
    )
    inputs = [path for path in (options.sd, options.controlnet, options.cleaner, options.background) if path]
    return Answer(_line(options), inputs, [options.output], given_options(options))


def run_pull(options: argparse.Namespace) -> Answer:
    """Fetch and convert."""
    from milo_latent.convert.pull import pull_diffbir

    files = pull_diffbir(
        options.release,
        options.task,
        output=options.output,
        downloads=options.downloads,
        dtype=to_dtype(options.dtype),
        tokenizer=options.tokenizer,
    )
    size = sum(path.stat().st_size for path in files.values()) / 2**30
    names = ", ".join(path.name for path in files.values())
    folder = files["sd"].parent
    text = f"{_line(options)}\nThe fetched files stay in {folder}: {names} ({size:.1f} GiB); no longer needed."
    return Answer(text, list(files.values()), [options.output], given_options(options))


def _line(options: argparse.Namespace) -> str:
    takes = "prompts" if (options.output / "tokenizer").is_dir() else "prompt_embeds, no tokenizer"
    return f"convert: DiffBIR {options.release} {options.task} -> {options.output} (takes {takes})"
