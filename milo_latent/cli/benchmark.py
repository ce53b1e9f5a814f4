"""`milo-latent benchmark`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milo_latent.cli.common import (
    TASKS,
    TILE,
    Answer,
    add_answer_options,
    add_command,
    add_restorer_options,
    given_options,
    open_restorer,
)
from milo_latent.cli.restore import SCHEDULES, add_diffusion_settings, given_settings

if TYPE_CHECKING:
    from milo_latent.pipelines.diffbir import DiffBIRPipeline


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("benchmark", help="measure restorations", description="Measure restorations.")
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    restore = add_command(
        actions,
        "restore",
        "benchmark restore --clean photos --degradation noise50 --guidance 0 0.5 -o tables",
        "benchmark restore --degraded photos -o tables    # without references",
        help="compare guidance strengths, curricula and seeds on a folder",
        description="Restore the photos of a folder with every strength of guidance, curriculum and seed, and measure "
        "the results, the input and the cleaner: against clean photos where there are some, and by figures that "
        "need none. The same command resumes; more seeds, strengths, curricula and photos add to the table.",
    )
    restore.set_defaults(run=run, detector=None)
    option = restore.add_argument
    option("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of tables and sheets")
    option("--clean", type=Path, metavar="FOLDER", help="clean photos")
    option("--degraded", type=Path, metavar="FOLDER", help="degraded photos, with the names of the clean ones")
    option(
        "--degradation", nargs="+", default=[], metavar="NAME",
        help="degrade the clean photos: noise15, noise25, noise50 or other noise, jpeg10, x4 (bicubic)",
    )  # fmt: skip
    option("--limit", type=int, metavar="N", help="only the first photos")
    option("--guidance", type=float, nargs="*", default=[0.0, 0.5], help="strengths, 0 is none (default: 0 0.5)")
    option("--curriculum", nargs="+", choices=SCHEDULES, default=["cosine"], help="default: cosine")
    option("--seeds", type=int, nargs="+", default=[0], help="of the sampling (default: 0)")
    option("--figures", nargs="+", metavar="NAME", help="default: all whose packages are installed")
    option("--milo-image", metavar="WEIGHTS", help="of MILO_I (default: official-image once fetched, else milo-image)")
    option("--sheets", type=int, default=4, metavar="N", help="photos shown side by side (default: 4)")
    add_restorer_options(restore)
    option("--task", choices=[each for each in TASKS if each != "unaligned_face"], help="default: sr for x4")
    option("--steps", type=int, help="denoising steps (default: the model's own; else 1, or 4 with guidance)")
    option("--upscale", type=float, help="how much larger (default: that of the degradation or the task)")
    option("--tile", type=int, metavar="PIXELS", help=f"restore in tiles of this side, {TILE}")
    add_diffusion_settings(restore)
    add_answer_options(restore)


def run(options: argparse.Namespace) -> Answer:
    """Restore and measure."""
    from milo_latent.evaluation.figures import open_figures
    from milo_latent.evaluation.reports import format_rows, write_rows
    from milo_latent.evaluation.restoration import RestorationBenchmark, RowTable, printed, summarize
    from milo_latent.evaluation.restoration_cases import list_cases
    from milo_latent.metric.loading import default_image_metric
    from milo_latent.metric.network import MILO

    cases = list_cases(options.clean, options.degraded, options.degradation, options.limit)
    pipe = open_restorer(options)
    pipe.set_progress_bar_config(disable=True)
    judge = options.milo_image or default_image_metric()
    figures, left_out = open_figures(
        pipe, MILO.from_pretrained(judge), referenced=bool(options.clean), names=options.figures, tile=options.tile
    )
    settings = given_settings(options)
    benchmark = RestorationBenchmark(
        pipe=pipe, settings=settings, scales=options.guidance, schedules=options.curriculum, seeds=options.seeds,
        figures=figures, sheets=options.sheets,
    )  # fmt: skip
    table = RowTable(options.output, _record(options, pipe, judge, list(figures)), list(figures))
    summaries = summarize(benchmark.run(cases, table), list(figures))
    write_rows(options.output / "summary.csv", summaries)
    note = [f"MILO_I: the error E of {judge}; MILO_L: that of the model's metric; ±: standard deviation over seeds"]
    written = f"{len(cases)} degraded photos -> {table.path}, summary.csv and sheets beside it"
    lines = [format_rows(printed(summaries, figures)), *left_out, *(note if "milo_i" in figures else []), written]
    return Answer(
        "\n".join(lines), outputs=[table.path, options.output / "summary.csv"], settings=given_options(options),
        more={"summary": summaries},
    )  # fmt: skip


def _record(options: argparse.Namespace, pipe: DiffBIRPipeline, judge: str, figures: list[str]) -> dict[str, Any]:
    """Return what a row depends on besides its degradation, photo, setting and seed."""
    from milo_latent import __version__

    table = {
        "output",
        "limit",
        "guidance",
        "curriculum",
        "seeds",
        "sheets",
        "degradation",
        "command",
        "action",
        "run",
        "quiet",
        "json",
    }
    given = {name: value for name, value in vars(options).items() if name not in table and value is not None}
    folders = {name: str(given[name].resolve()) for name in ("clean", "degraded") if name in given}
    computed = {"figures": figures, "milo_image": judge, "device": pipe.device.type, "version": __version__}
    return given | folders | computed
