"""A score sheet: one HTML file that shows every pair with its scores, the worst first."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from PIL import Image

from milo_latent.atomic import write_atomically
from milo_latent.datasets import Item, as_file
from milo_latent.files import read_image
from milo_latent.pictures import to_8bit
from milo_latent.score.pairs import Pair, is_latents
from milo_latent.score.table import ScoreRow

THUMBNAIL = 192  # pixels of the longer side
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: 0.3em 1em; text-align: left }}
tr:nth-child(even) {{ background: #f4f4f4 }} img {{ display: block }} td.number {{ font-variant-numeric: tabular-nums }}
</style></head><body><h1>{title}</h1>
<p>{count} pairs, the largest error first. Error: 0 = identical, lower is better. MOS: 0 to 5, higher is better.</p>
<table><tr><th>name</th><th>error</th><th>MOS</th><th>reference</th><th>distorted</th></tr>
"""


def write_sheet(path: str | Path, rows: Iterable[ScoreRow], pairs: Iterable[Pair], *, title: str) -> None:
    """Write the scores of pairs as a page that needs no other file: thumbnails are in it, the largest error is first.

    One thumbnail is in memory at a time. Latents have none, nor has a file that is no image any more.

    Args:
        path: the HTML file.
        rows: the scores.
        pairs: the files of each row, by its name; rows without a pair have no pictures.
        title: of the page, such as the metric's name.

    Raises:
        OSError: if the file cannot be written, as `write_atomically`.
    """
    ordered = sorted(rows, key=lambda row: (-row.error, row.name))
    files = {pair.name: pair for pair in pairs}

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(HEAD.format(title=escape(title), count=len(ordered)))
            for row in ordered:
                file.write(_line(row, files))
            file.write("</table></body></html>\n")

    write_atomically(Path(path), write)


def _line(row: ScoreRow, files: Mapping[str, Pair]) -> str:
    pair = files.get(row.name)
    pictures = [] if pair is None else [_thumbnail(pair.ref), _thumbnail(pair.dist)]
    cells = "".join(f"<td>{picture}</td>" for picture in pictures)
    numbers = f'<td class="number">{row.error:.6f}</td><td class="number">{row.mos:.4f}</td>'
    return f"<tr><td>{escape(row.name)}</td>{numbers}{cells}</tr>\n"


def _thumbnail(path: Path | Item) -> str:
    """Return an image as an element of HTML that holds it; for latents and damaged files the name of the file."""
    try:
        with as_file(path) as file:
            picture = None if is_latents(path) else Image.fromarray(to_8bit(read_image(file)[0]))
    except (ValueError, FileNotFoundError, MemoryError):
        picture = None
    if picture is None:
        return escape(path.name)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return (
        f'<img alt="{escape(path.name)}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
