"""Record what the distortions make of the small image in `test_distortions.py`, for `distortions.safetensors`.

    python tests/data/record_distortions.py

The levels were checked against `imdist_generator.m` of the published generator of KADID-10k, and so were the formulas
of color diffusion and shift, noise, brightening, contrast, jitter, moved patches, pixelation and sharpening. The code
is our own: random draws, codecs, "denoise", "quantization", the direction of a color shift and YCbCr's range differ.
Of each picture every seventh pixel is kept, in 8 bit, and mean and standard deviation of its channels.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from test_distortions import sampled, statistics  # noqa: E402

from milo_latent.distortions import DISTORTIONS  # noqa: E402


def main():
    """Write the file."""
    values = {f"{kind}.pixels": sampled(kind) for kind in DISTORTIONS}
    values |= {f"{kind}.statistics": statistics(kind).float() for kind in DISTORTIONS}
    save_file({name: value.contiguous() for name, value in values.items()}, DATA / "distortions.safetensors")
    print(
        f"{len(DISTORTIONS)} kinds, {sum(value.nbytes for value in values.values()) / 1e3:.0f} kB, {torch.__version__}"
    )


if __name__ == "__main__":
    main()
