"""The 25 distortions: seeded, in range, in the published order and levels, and doing what their names say."""

import functools

import numpy as np
import pytest
import torch
from golden import golden
from PIL import Image

from milo_latent.distortions import DISTORTIONS, LEVELS, distort, seed_of
from milo_latent.distortions.blurs import disk_kernel, line_kernel
from milo_latent.distortions.color_spaces import lab_to_rgb, rgb_to_lab
from milo_latent.distortions.colors import color_saturation_hsv
from milo_latent.distortions.contact_sheet import contact_sheet, main
from milo_latent.distortions.spatial import best_thresholds
from milo_latent.distortions.tones import tone_curve
from milo_latent.files import read_image
from milo_latent.pictures import round_to_8bit, to_8bit

PUBLISHED = (  # levels 1 to 5 of each kind in its order, as in `imdist_generator.m` of KADID-10k
    (0.1, 0.5, 1, 2, 5), (1, 2, 4, 6, 8), (1, 2, 4, 6, 10), (1, 3, 6, 8, 12), (1, 3, 6, 8, 12), (64, 48, 32, 16, 8),
    (0.4, 0.2, 0.1, 0, -0.4), (1, 2, 3, 6, 9), (16, 32, 45, 120, 400), (43, 36, 24, 7, 4),
    (0.001, 0.002, 0.003, 0.005, 0.01), (0.0001, 0.0005, 0.001, 0.002, 0.003), (0.001, 0.005, 0.01, 0.02, 0.03),
    (0.001, 0.005, 0.01, 0.02, 0.05), (0.01, 0.03, 0.05, 0.1, 0.15), (0.1, 0.2, 0.4, 0.7, 1.1),
    (0.05, 0.1, 0.2, 0.4, 0.8), (0.15, 0.08, 0, -0.08, -0.15), (0.05, 0.1, 0.2, 0.5, 1), (20, 40, 60, 80, 100),
    (0.01, 0.05, 0.1, 0.2, 0.5), (20, 16, 13, 10, 7), (2, 4, 6, 8, 10), (1, 2, 3, 6, 12), (0.3, 0.15, 0, -0.4, -0.6),
)  # fmt: skip
GRADED = [  # whose damage grows from level to level; the others have signed, random or wrapping parameters
    name
    for name in DISTORTIONS
    if name
    not in {
        "mean shift",
        "contrast change",
        "color shift",
        "color saturation 1",
        "motion blur",
        "pixelate",
        "color block",
    }
]


@pytest.fixture(scope="module")
def image():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 104), indexing="ij")
    waves = torch.sin(40 * rows * columns) * 0.2
    grain = 0.03 * torch.randn(96, 104, generator=torch.Generator().manual_seed(0))
    edge = (columns > 0.5).float() * 0.25
    return torch.stack([rows * 0.5 + waves + 0.2, columns * 0.6 + edge, 0.5 - rows * 0.2 + grain])[None].clamp(0, 1)


@functools.cache
def pictures(kind):
    """All levels of a kind, (5, 3, 72, 88) in 8 bit, for an image of waves, edges, grain and pure colors."""
    rows, columns = torch.meshgrid(torch.arange(72.0), torch.arange(88.0), indexing="ij")
    waves = 0.2 * torch.sin(rows * columns / 40)
    small = torch.stack([rows / 100 + waves + 0.1, columns / 120 + 0.25 * (columns > 50), 0.6 - rows / 200 - waves])
    small += 0.04 * torch.randn(3, 72, 88, generator=torch.Generator().manual_seed(0))
    small[0, :24, :30], small[1, 50:, 20:44], small[:, 30:44, 60:80] = 1.0, 0.0, (columns[:14, 60:80] % 8 > 3).float()
    levels = [distort(round_to_8bit(small)[None], kind, level, image_id="small") for level in LEVELS]
    return torch.cat(levels).mul(255).round().to(torch.uint8)


def sampled(kind):
    return pictures(kind)[..., 3::7, 2::7]


def statistics(kind):
    """Mean and standard deviation of each channel, (2, 5, 3)."""
    levels = pictures(kind).double()
    return torch.stack([levels.mean(dim=(2, 3)), levels.std(dim=(2, 3))])


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_each_level_gives_the_recorded_values(kind):
    recorded = golden("distortions")
    differences = (sampled(kind).int() - recorded[f"{kind}.pixels"].int()).abs()
    # another processor may round another way: a step of 8 bit in few pixels, which codecs spread over a block
    assert (differences > 1).float().mean() < 0.01
    assert (differences > 0).float().mean() < 0.03
    assert torch.allclose(statistics(kind).float(), recorded[f"{kind}.statistics"], atol=0.05)


def test_the_levels_are_the_published_ones():
    assert tuple(each.amounts for each in DISTORTIONS.values()) == PUBLISHED
    assert [each.number for each in DISTORTIONS.values()] == list(range(1, 26))


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_every_level_keeps_shape_and_range_and_follows_from_its_name(image, kind):
    for level in LEVELS:
        dist = distort(image, kind, level, image_id="a")
        assert dist.shape == image.shape
        assert dist.dtype == torch.float32
        assert dist.min() >= 0
        assert dist.max() <= 1
        assert torch.equal(dist, distort(image, kind, level, image_id="a"))
        assert torch.allclose(dist * 255, (dist * 255).round(), atol=1e-4)


@pytest.mark.parametrize("kind", GRADED)
def test_damage_grows_with_the_level(image, kind):
    errors = [(distort(image, kind, level, image_id="a") - image).square().mean().item() for level in LEVELS]
    assert errors[0] < errors[2] < errors[4]


def test_random_kinds_differ_between_images_and_batches_do_not_matter(image):
    pair = image.repeat(2, 1, 1, 1)
    for kind in ("white noise", "jitter", "color block", "non-eccentricity patch", "impulse noise"):
        both = distort(pair, kind, 3, image_id=["a", "b"])
        assert not torch.equal(both[0], both[1])
        assert torch.equal(both[1:], distort(image, kind, 3, image_id="b"))


@pytest.mark.parametrize("kind", ["color saturation 1", "denoise", "jitter", "color shift"])
def test_images_of_other_dtypes_are_distorted_in_float32(image, kind):
    image = image.half()
    distorted = [distort(each, kind, 3, image_id="a") for each in (image, image.float(), image.double())]
    assert all(each.dtype == torch.float32 and torch.equal(each, distorted[1]) for each in distorted)


def test_seeds_differ_in_each_of_id_kind_and_level():
    seeds = {seed_of(name, kind, level) for name in ("a", "b") for kind in DISTORTIONS for level in LEVELS}
    assert len(seeds) == 250


def test_order_and_names_are_those_of_the_opinion_scores(shared):
    lines = (shared / "data" / "iqa_conditions" / "kadid10k_conditions.csv").read_text().splitlines()[1:]
    named = {int(line.split(",")[0]): line.split(",")[1] for line in lines}
    assert named == {distortion.number: name for name, distortion in DISTORTIONS.items()}


def test_unchanged_and_extreme_parameters_do_what_the_paper_says(image):
    rounded = round_to_8bit(image)
    assert torch.equal(distort(image, "mean shift", 3, image_id="a"), rounded)  # amount 0
    grey = distort(image, "color saturation 1", 4, image_id="a")  # saturation 0
    assert (grey.amax(dim=1) - grey.amin(dim=1)).max() == 0
    noise = distort(torch.full((1, 3, 200, 200), 0.5), "white noise", 5, image_id="a") - 0.5
    assert noise.var().item() == pytest.approx(0.01, rel=0.03)
    impulses = distort(torch.full((1, 3, 200, 200), 0.5), "impulse noise", 5, image_id="a")
    assert ((impulses == 0) | (impulses == 1)).float().mean().item() == pytest.approx(0.03, rel=0.05)
    levels = distort(image, "quantization", 5, image_id="a").unique()
    assert len(levels) <= 7
    assert len(distort(image, "color quantization", 5, image_id="a").flatten(2)[0].T.unique(dim=0)) <= 8


def test_denoising_removes_the_noise_it_added(image):
    flat = torch.full((1, 3, 96, 96), 0.5)
    noisy = (0.01**0.5, (distort(flat, "denoise", 1, image_id="a") - flat).std().item())
    assert noisy[1] < noisy[0] / 4


def test_kernels_sum_to_one_and_have_the_extent_they_should():
    assert disk_kernel(4).sum().item() == pytest.approx(1.0)
    assert 1 / disk_kernel(4).max().item() == pytest.approx(np.pi * 16, rel=0.01)
    for degrees in (0.0, 30.0, 90.0):
        kernel = line_kernel(10, degrees)
        axis = torch.arange(kernel.shape[0]) - kernel.shape[0] // 2
        spread = (kernel * (axis[:, None] ** 2 + axis[None] ** 2)).sum().sqrt().item()
        assert spread == pytest.approx(10 / 12**0.5, rel=0.15)  # of an even line


def test_color_spaces_round_trip_and_meet_known_values(image):
    assert torch.allclose(lab_to_rgb(rgb_to_lab(image)), image, atol=1e-4)
    red = rgb_to_lab(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).flatten()
    assert red.tolist() == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert torch.allclose(color_saturation_hsv(image, 1.0, torch.Generator()), image, atol=1e-6)


def test_tone_curves_pass_through_their_points():
    values = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0])
    bent = tone_curve(values, [(0.3, 0.2), (0.5, 0.5), (0.7, 0.8)])
    assert bent.tolist() == pytest.approx([0.0, 0.2, 0.5, 0.8, 1.0], abs=1e-5)


def test_thresholds_part_two_clusters_between_them():
    values = torch.cat([torch.full((50,), 0.2), torch.full((50,), 0.8)])
    assert 0.4 < best_thresholds(values, 2).item() < 0.6


def test_what_cannot_be_distorted_is_refused(image):
    with pytest.raises(ValueError, match="kind"):
        distort(image, "gaussian", 1, image_id="a")
    with pytest.raises(ValueError, match="level"):
        distort(image, "JPEG", 6, image_id="a")
    with pytest.raises(ValueError, match="at least 64"):
        distort(image[..., :50, :50], "JPEG", 1, image_id="a")
    with pytest.raises(ValueError, match="each of 1"):
        distort(image, "JPEG", 1, image_id=["a", "b"])


def test_the_contact_sheet_shows_all_kinds_and_levels(tmp_path, image):
    Image.fromarray(to_8bit(image[0])).save(tmp_path / "a.png")
    sheet = np.asarray(contact_sheet(tmp_path / "a.png", side=16))
    assert sheet.shape == (13 * 16, (150 + 16 * 6) * 2, 3)
    square = read_image(tmp_path / "a.png")[..., 4:100]
    for number, name in (
        (1, "gaussian blur"),
        (13, "impulse noise"),
        (14, "multiplicative noise"),
        (25, "contrast change"),
    ):
        top, left = (number - 1) % 13 * 16, (number - 1) // 13 * (150 + 16 * 6)
        tiles = [square] + [distort(square, name, level, image_id="a") for level in LEVELS]
        for column, tile in enumerate(tiles):
            picture = Image.fromarray(to_8bit(tile[0])).resize((14, 14), Image.Resampling.LANCZOS)
            start = left + 150 + column * 16
            assert np.array_equal(sheet[top : top + 14, start : start + 14], np.asarray(picture))
        assert (sheet[top : top + 16, left : left + 150].min(axis=2) < 100).any()
        assert (sheet[top : top + 16, left : left + 6] == 255).all()
    main([str(tmp_path / "a.png"), "--output", str(tmp_path / "sheet.png"), "--side", "10"])
    assert Image.open(tmp_path / "sheet.png").size == ((150 + 60) * 2, 130)
