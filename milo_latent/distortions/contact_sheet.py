"""Draw a contact sheet of all distortions: a row for each kind, a column for each level, the photo itself first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from milo_latent.distortions import DISTORTIONS, LEVELS, distort
from milo_latent.files import read_image
from milo_latent.pictures import center_crop, to_8bit
from milo_latent.programs import run_program

LABEL_WIDTH = 150  # pixels
BLOCKS = 2  # of rows, side by side


def contact_sheet(path: Path, *, side: int = 128) -> Image.Image:
    """Return the sheet for the largest centered square of a photo, shown `side` pixels wide."""
    image = center_crop(read_image(path))
    rows, block = -(-len(DISTORTIONS) // BLOCKS), LABEL_WIDTH + side * (len(LEVELS) + 1)
    sheet = Image.new("RGB", (block * BLOCKS, rows * side), "white")
    draw = ImageDraw.Draw(sheet)
    for index, distortion in enumerate(DISTORTIONS.values()):
        left, top = index // rows * block, index % rows * side
        label = f"{distortion.number} {distortion.name}".replace(" in ", "\nin ")
        draw.text((left + 6, top + side // 2 - 10), label, fill="black")
        tiles = [image] + [distort(image, distortion.name, level, image_id=path.stem) for level in LEVELS]
        for column, tile in enumerate(tiles):
            picture = Image.fromarray(to_8bit(tile[0])).resize((side - 2, side - 2), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + LABEL_WIDTH + column * side, top))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="an image file")
    parser.add_argument("--side", type=int, default=128, help="pixels of a tile")
    options = parser.parse_args(arguments)
    contact_sheet(options.image, side=options.side).save(options.output)


if __name__ == "__main__":
    sys.exit(run_program(main))
