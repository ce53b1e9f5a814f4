"""Make the pictures of this folder: a clean and a noisy photo, and the restored one between them."""

from pathlib import Path

import numpy as np
import skimage
import torch

from milo_latent import read_image, restore_image, write_image
from milo_latent.training.data.degradations import add_noise

FOLDER = Path(__file__).resolve().parent
NOISE_SIGMA = 50.0  # of 255
GAP = 6  # white pixels between the pictures


def main() -> None:
    """Write `cat.png` and `cat_noisy.png`, and `before_after.png` in the folder of documents."""
    clean = read_image(Path(skimage.__file__).parent / "data" / "chelsea.png")
    noisy = add_noise(clean[0], NOISE_SIGMA, np.random.default_rng(0))[None]
    write_image(FOLDER / "cat.png", clean)
    write_image(FOLDER / "cat_noisy.png", noisy)
    restored = restore_image(read_image(FOLDER / "cat_noisy.png"))
    gap = torch.ones(1, 3, clean.shape[2], GAP)
    write_image(FOLDER.parent / "docs" / "before_after.png", torch.cat([noisy, gap, restored, gap, clean], dim=3))


if __name__ == "__main__":
    main()
