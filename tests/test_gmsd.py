"""GMSD: equal images, the order of damage, and a value from a calculation by loops."""

import math

import pytest
import torch

from milo_latent.evaluation.gmsd import gmsd


def image(seed=0):
    return torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(seed))


def test_it_is_zero_for_equal_images_and_rises_with_noise():
    ref, noise = image(), image(1) - 0.5
    values = [gmsd(ref=ref, dist=(ref + amount * noise).clamp(0, 1)).item() for amount in (0.0, 0.05, 0.2)]
    assert values[0] == 0.0
    assert values == sorted(values)
    assert values[2] > 0.01


def test_it_is_what_the_paper_says():
    ref, dist = image(), image(2)
    similarities = []
    gradients = [by_loops(each) for each in (ref, dist)]
    for one, other in zip(*gradients, strict=True):
        similarities.append((2 * one * other + 170) / (one**2 + other**2 + 170))
    mean = sum(similarities) / len(similarities)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in similarities) / (len(similarities) - 1))
    assert gmsd(ref=ref, dist=dist).item() == pytest.approx(deviation, rel=1e-4)


def by_loops(picture):
    """Gradient magnitudes of the luma in [0, 255], reduced by 2; zeros around it."""
    red, green, blue = (255 * picture[0]).tolist()
    luma = [
        [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in zip(*rows, strict=True)]
        for rows in zip(red, green, blue, strict=True)
    ]
    small = [
        [sum(luma[2 * y + dy][2 * x + dx] for dy in (0, 1) for dx in (0, 1)) / 4 for x in range(7)] for y in range(6)
    ]

    def at(y, x):
        return small[y][x] if 0 <= y < 6 and 0 <= x < 7 else 0.0

    magnitudes = []
    for y in range(6):
        for x in range(7):
            across = sum(at(y + d, x - 1) - at(y + d, x + 1) for d in (-1, 0, 1)) / 3
            down = sum(at(y - 1, x + d) - at(y + 1, x + d) for d in (-1, 0, 1)) / 3
            magnitudes.append(math.hypot(across, down))
    return magnitudes


def test_items_of_a_batch_do_not_matter_to_each_other():
    ref, dist = torch.cat([image(), image(3)]), torch.cat([image(1), image(2)])
    both = gmsd(ref=ref, dist=dist)
    assert both.shape == (2,)
    assert both[1].item() == pytest.approx(gmsd(ref=ref[1:], dist=dist[1:]).item(), rel=1e-5)
