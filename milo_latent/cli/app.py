"""`milo-latent app`."""

from __future__ import annotations

import argparse
from pathlib import Path

from milo_latent.cli.common import (
    Answer,
    add_answer_options,
    add_command,
    add_restorer_options,
    given_options,
    open_restorer,
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "app",
        "app --open",
        "app --model diffbir-v2.1-sr --port 8080",
        help="restore photos on a page in the browser",
        description="Open a page on which photos are restored and compared. Only this machine can reach it, unless "
        "--host says otherwise. Photos stay on this machine, and are deleted at the end.",
    )
    command.set_defaults(run=run)
    add_restorer_options(command)
    command.add_argument("--detector", type=Path, metavar="FILE", help="YuNet's .onnx file, for faces in photos")
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all (default: 127.0.0.1, this machine)"
    )
    command.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    command.add_argument(
        "--max-megapixels", type=float, default=16.0, metavar="N", help="largest result in megapixels (default: 16)"
    )
    command.add_argument("--max-megabytes", type=int, default=50, metavar="N", help="largest upload (default: 50)")
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    add_answer_options(command)


def run(options: argparse.Namespace) -> Answer:
    """Serve the page until it is interrupted."""
    from milo_latent.app.page import import_gradio, serve
    from milo_latent.app.restoring import PhotoRestorer
    from milo_latent.checks import check_range
    from milo_latent.restoration.face_detector import YuNet

    check_range("--max-megapixels", options.max_megapixels, 0.001, 128.0)
    check_range("--max-megabytes", options.max_megabytes, 1, 1024)
    check_range("--port", options.port or 0, 0, 65535)
    import_gradio()  # before the model, which takes longer to open
    pipe = open_restorer(options)
    restorer = PhotoRestorer(
        pipe,
        model=str(options.model),
        max_pixels=int(options.max_megapixels * 1e6),
        detector=None if options.detector is None else YuNet(options.detector),
    )
    serve(
        restorer,
        host=options.host,
        port=options.port,
        max_megabytes=options.max_megabytes,
        open_browser=options.open,
    )
    return Answer("The page is closed.", settings=given_options(options))
