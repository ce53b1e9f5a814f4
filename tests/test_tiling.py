"""Tiles: no gap, no seam, and the untiled result where the margin covers what a network sees."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from milo_latent.latents.tiling import tile_spans, tiled


def convolutions(count, *, seed=0):
    """`count` 3x3 convolutions, which see `count` cells to each side, with a tanh between."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [layer for _ in range(count) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*layers).requires_grad_(False)


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), tile=st.integers(9, 40), margin=st.integers(0, 4),
    extra=st.integers(0, 3), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_size_equals_the_untiled_result_behind_the_margin(height, width, tile, margin, extra, seed):
    overlap = min(2 * margin + extra, tile - 1)
    network = convolutions(margin, seed=seed) if margin else nn.Tanh()
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    result = tiled(network, image, tile=tile, overlap=overlap, margin=margin)
    assert torch.allclose(result, network(image), rtol=0, atol=1e-6)


@given(side=st.integers(1, 400), tile=st.integers(2, 60), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_weights_leave_no_gap_and_add_up_to_one(side, tile, seed):
    overlap = seed % tile
    margin = seed % (overlap // 2 + 1)
    spans = tile_spans(side, tile=tile, overlap=overlap, margin=margin)
    total = torch.zeros(side)
    for span in spans:
        assert 0 <= span.start < span.stop <= side
        assert span.stop - span.start == min(tile, side)
        assert (span.weights >= 0).all()
        total[span.start : span.stop] += span.weights
    assert torch.allclose(total, torch.ones(side), atol=1e-6)
    for before, after in itertools.pairwise(spans):
        assert before.stop - after.start >= overlap
        assert before.weights[len(before.weights) - margin :].sum() == after.weights[:margin].sum() == 0


def test_weights_are_symmetric_and_rise_smoothly():
    spans = tile_spans(88, tile=40, overlap=16, margin=2)
    assert [(span.start, span.stop) for span in spans] == [(0, 40), (24, 64), (48, 88)]
    inner = spans[1].weights
    assert torch.allclose(inner, inner.flip(0), atol=1e-6)
    assert torch.allclose(spans[0].weights, spans[2].weights.flip(0), atol=1e-6)
    assert (inner[1:15].diff() > 0).all()
    assert inner.diff().abs().max() < 2 / 12  # a cosine's steepest step over 12 cells is pi / 2 / 12


@pytest.mark.parametrize("scale", [2, 8, Fraction(1, 8), 0.125, Fraction(1, 2), Fraction(3, 2)])
def test_functions_that_change_the_size_are_tiled(scale):
    image = torch.rand(1, 3, 72, 104)

    def resize(each):
        ratio = float(scale)
        return F.avg_pool2d(each, round(1 / ratio)) if ratio < 1 else F.interpolate(each, scale_factor=ratio)

    result = tiled(resize, image, tile=32, overlap=16, margin=8, scale=scale, multiple=8)
    assert torch.allclose(result, resize(image), atol=1e-6)


def test_tiles_start_at_multiples_and_are_no_larger_than_said():
    seen = []

    def look(each):
        seen.append((int(each[0, 0, 0, 0]), each.shape[3]))
        return each

    image = torch.arange(101.0).expand(1, 1, 8, 101)
    result = tiled(look, image, tile=32, overlap=16, multiple=8)
    assert torch.allclose(result, image)
    assert all(start % 8 == 0 and width <= 32 for start, width in seen)
    assert seen[-1][0] + seen[-1][1] == 101


def test_what_fits_in_a_tile_is_passed_on_whole():
    image = torch.rand(1, 3, 32, 20)
    assert tiled(lambda each: each, image, tile=32, overlap=8) is image


def test_a_step_between_tiles_is_blended_without_a_jump():
    calls = iter(range(100))
    image = torch.zeros(1, 1, 16, 160)
    result = tiled(lambda each: torch.full_like(each, float(next(calls) % 2)), image, tile=64, overlap=32)
    assert result[0, 0, 0].diff().abs().max() < 2 / 32
    assert result.unique().numel() > 10


def test_dtype_is_kept_sums_are_not_rounded_and_gradients_flow():
    image = torch.rand(1, 3, 50, 50)
    half = tiled(lambda each: each.bfloat16(), image, tile=24, overlap=12)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), image, rtol=2**-7, atol=0)
    image.requires_grad_(True)
    tiled(lambda each: each * 3, image, tile=24, overlap=12).sum().backward()
    assert torch.allclose(image.grad, torch.full_like(image, 3.0), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tile": 16, "overlap": 16}, "overlap < tile"),
        ({"tile": 16, "overlap": 8, "margin": 5}, "margin 5, overlap 8"),
        ({"tile": 16, "overlap": 4, "multiple": 8}, "`overlap` to be a multiple of 8"),
        ({"tile": 16, "overlap": 8, "scale": 0.125, "multiple": 4}, "`multiple` to be a multiple of 8"),
        ({"tile": 16, "overlap": 8, "scale": 2}, r"tiles of \(32, 32\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        tiled(lambda each: each, torch.rand(1, 3, 40, 40), **options)
    with pytest.raises(TypeError, match="floating point"):
        tiled(lambda each: each, torch.zeros(1, 3, 40, 40, dtype=torch.uint8), tile=16, overlap=8)
