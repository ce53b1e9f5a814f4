"""Color fixes, held to the official code's results."""

import pytest
import torch
from golden import golden

from milo_latent.diffbir.color import fix_color, low_frequencies
from milo_latent.diffbir.tiles import Tile


@pytest.fixture(scope="module")
def recorded():
    return golden("image_ops")


@pytest.mark.parametrize("case", ["wavelet", "wavelet_small"])
def test_the_wavelet_fix_is_the_official_one(recorded, case):
    fixed = fix_color(recorded[f"{case}.content"], recorded[f"{case}.style"], method="wavelet")
    assert (fixed - recorded[f"{case}.out"]).abs().max() <= 1e-5 * recorded[f"{case}.out"].abs().max()


def test_low_frequencies_are_the_official_ones(recorded):
    low = low_frequencies(recorded["wavelet.content"])
    assert (low - recorded["wavelet.content_low"]).abs().max() <= 1e-5 * recorded["wavelet.content_low"].abs().max()


@pytest.mark.parametrize("method", ["wavelet", "adain", "none"])
def test_an_image_fixed_by_itself_is_itself(method):
    image = torch.rand(2, 3, 20, 30)
    assert torch.allclose(fix_color(image, image, method=method), image, atol=1e-5)


def test_each_method_takes_what_it_says():
    image, colors = torch.rand(1, 3, 64, 64) * 0.2, torch.rand(1, 3, 64, 64) * 0.5 + 0.5
    adain = fix_color(image, colors, method="adain")
    assert torch.allclose(adain.mean(dim=(2, 3)), colors.mean(dim=(2, 3)), atol=1e-4)
    assert torch.allclose(adain.std(dim=(2, 3)), colors.std(dim=(2, 3)), atol=1e-3)
    wavelet = fix_color(image, colors, method="wavelet")
    assert torch.allclose(wavelet - image, low_frequencies(colors) - low_frequencies(image), atol=1e-6)
    assert fix_color(image, colors, method="none") is image


@pytest.mark.parametrize("tile", [Tile(64, 0), Tile(192, 96)])
def test_tiles_change_nothing_since_they_overlap_by_the_reach_of_the_blurs(tile):
    """Black and white noise, for which a tile that sees one pixel too few differs."""
    image, colors = torch.rand(2, 1, 3, 300, 280, generator=torch.Generator().manual_seed(0)).round().unbind()
    assert torch.allclose(fix_color(image, colors, tile=tile), fix_color(image, colors), atol=1e-5)


def test_low_frequencies_depend_on_the_pixels_within_the_sum_of_the_gaps():
    impulse = torch.zeros(1, 1, 101, 101, dtype=torch.float64)
    impulse[..., 50, 50] = 1.0
    row = low_frequencies(impulse)[0, 0, 50]
    assert (row > 0).nonzero().flatten().tolist() == list(range(50 - 31, 50 + 32))


def test_bad_arguments_are_refused():
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="one shape"):
        fix_color(image, image[..., 1:])
    with pytest.raises(ValueError, match="`color_fix`"):
        fix_color(image, image, method="histogram")
