"""What a photo seems to need: noise, JPEG blocks and sharpness of pictures from formulas, and what is then said."""

import numpy as np
import pytest
import torch

from milo_latent.cli import main
from milo_latent.files import write_image
from milo_latent.pictures import gaussian_blur, jpeg_round_trip, round_to_8bit
from milo_latent.restoration.hints import CLEAN, SMALL, blockiness, blur_share, middle, noise_level, task_hint
from milo_latent.restoration.settings import RestorationSettings

DENOISE = RestorationSettings(task="denoise", upscale=1.0)


def picture(side=256):
    """A sharp picture, (1, 3, side, side): discs of many sizes on a gradient."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:side, 0:side] / side
    image = np.stack([0.25 + 0.4 * rows, 0.3 + 0.3 * columns, 0.6 - 0.3 * rows])
    for _ in range(60):
        top, left, radius = rng.random(), rng.random(), 0.02 + 0.1 * rng.random()
        inside = (rows - top) ** 2 + (columns - left) ** 2 < radius**2
        image = np.where(inside, rng.uniform(0.1, 0.9, (3, 1, 1)), image)
    return round_to_8bit(torch.from_numpy(image).float()[None])


def noisy(image, sigma, seed=0):
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return round_to_8bit(image + noise * sigma / 255)


@pytest.mark.parametrize("sigma", [5, 10, 25, 50])
def test_the_noise_is_estimated_within_a_fifth(sigma):
    assert noise_level(noisy(picture(), sigma)) == pytest.approx(sigma, rel=0.2)
    assert noise_level(picture()) < 1


def test_what_is_black_or_white_has_no_noise_to_measure():
    half = picture()
    half[..., :160] = 1.0
    assert noise_level(noisy(half, 20)) == pytest.approx(20, rel=0.3)
    assert np.isnan(noise_level(torch.ones(1, 3, 64, 64)))


@pytest.mark.parametrize("quality", [10, 30, 50])
def test_blocks_of_jpeg_are_seen_and_nothing_else_is_taken_for_them(quality):
    image = picture()
    assert blockiness(jpeg_round_trip(image, quality)) > 1.3
    for other in (image, noisy(image, 20), gaussian_blur(image, 1.5)):
        assert blockiness(other) < 1.1


def test_a_blur_leaves_less_of_a_sharp_picture():
    image = picture()
    shares = [blur_share(each) for each in (image, gaussian_blur(image, 1.0), gaussian_blur(image, 2.0))]
    assert shares == sorted(shares)
    assert shares[0] < 0.3 < 0.7 < shares[1]
    assert blur_share(torch.full((1, 3, 64, 64), 0.5)) == 1.0


def test_only_a_clean_sharp_photo_gets_a_hint():
    small, large = picture(200), picture(480)
    assert task_hint(small, DENOISE) == [SMALL]
    assert task_hint(large, DENOISE) == [CLEAN]
    for image in (small, large):
        for harmed in (noisy(image, 5), noisy(image, 25), jpeg_round_trip(image, 40), gaussian_blur(image, 2.0)):
            assert task_hint(harmed, DENOISE) == []


def test_the_middle_of_a_large_photo_is_looked_at_and_keeps_its_blocks():
    large = torch.zeros(1, 3, 954, 549)
    large[..., 216 : 216 + 512, 16 : 16 + 512] = 1.0
    assert middle(large).min() == 1.0
    assert middle(large).shape == (1, 3, 512, 512)
    assert blockiness(middle(jpeg_round_trip(picture(549), 40))) > 2
    small = picture(136)
    assert torch.equal(middle(small), small)
    noisy_around = noisy(picture(736), 30)
    noisy_around[..., 112 : 112 + 512, 112 : 112 + 512] = picture(736)[..., 112 : 112 + 512, 112 : 112 + 512]
    assert task_hint(noisy_around, DENOISE) == [CLEAN]


def test_other_tasks_sizes_and_plain_pictures_get_no_hint():
    small = picture(200)
    assert task_hint(small, RestorationSettings(task="sr", upscale=4.0)) == []
    assert task_hint(small, RestorationSettings(task="denoise", upscale=2.0)) == []
    assert task_hint(picture(24), DENOISE) == []
    assert task_hint(torch.full((1, 3, 64, 64), 0.5), DENOISE) == []


def test_the_shell_prints_one_line_for_a_photo_and_one_for_a_folder(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, image in (("a", picture(136)), ("b", picture(200)), ("c", noisy(picture(136), 25))):
        write_image(photos / f"{name}.png", image)
    options = ["--model", str(tmp_path / "model"), "--device", "cpu", "--stage", "cleaner"]
    assert main(["restore", str(photos / "a.png"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [SMALL]
    assert main(["restore", str(photos / "c.png"), *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["restore", str(photos), "-o", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"2 photos: {SMALL}"]
