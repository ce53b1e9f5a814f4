"""Training any image network: what is degraded how, two steps of each kind of network, resuming, refusals."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.files import read_image
from milo_latent.pictures import round_to_8bit
from milo_latent.testing import tiny_metric
from milo_latent.training import train_image_restorer
from milo_latent.training.data.blind_degradations import sinc_kernel
from milo_latent.training.data.degradations import DEGRADATIONS
from milo_latent.training.growing import grow_cleaner
from milo_latent.training.image_networks import build_network, load_initial, save_network
from milo_latent.training.objectives import with_progress
from milo_latent.training.train_image_restorer import TESTS, ImageRestorerLoss, restoration_psnr

SMALL = '{"channels": [4, 8], "blocks": [1, 1]}'


class Tiny(nn.Module):
    """Stands in for an architecture of spandrel."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, image):
        return image + self.layers(image)


@pytest.fixture
def spandrel(monkeypatch):
    for name in ("spandrel", "spandrel.architectures", "spandrel.architectures.Tiny"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["spandrel.architectures.Tiny"].Tiny = Tiny
    monkeypatch.setitem(sys.modules, "spandrel_extra_arches", None)


@pytest.fixture
def command(images, tmp_path):
    """Call the command with few steps; options that are given again count."""

    def run(*options, output="run", steps=2):
        arguments = ["--images", str(images), "--validation", str(images), "--validation-images", "1"]
        arguments += ["--steps", str(steps), "--batch-size", "2", "--crop-size", "32", "--precision", "no"]
        train_image_restorer.main([*arguments, "--tests", "noise50", "--output", str(tmp_path / output), *options])
        return tmp_path / output

    return run


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
def test_a_degradation_follows_from_its_generator_alone(images, name):
    image = read_image(images / "0.png")[0]
    degraded = [DEGRADATIONS[name](image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(each.shape == image.shape and each.min() >= 0 and each.max() <= 1 for each in degraded)
    assert torch.equal(degraded[3], DEGRADATIONS[name](image, np.random.default_rng(3)))
    assert len({each.sum().item() for each in degraded}) > 10


def test_noise_is_rounded_and_clipped_and_reaches_60():
    grey = torch.full((3, 64, 64), 0.5)
    noisy = [DEGRADATIONS["noise"](grey, np.random.default_rng(seed)) for seed in range(60)]
    spread = [(each - grey).std().item() * 255 for each in noisy]
    assert 0 <= min(spread) < 5
    assert 53 < max(spread) < 61
    assert all(torch.equal(each, round_to_8bit(each)) for each in noisy)


def test_everyday_leaves_a_share_of_the_images_as_they_are(images):
    image = read_image(images / "1.png")[0]
    same = [torch.equal(DEGRADATIONS["everyday"](image, np.random.default_rng(seed)), image) for seed in range(400)]
    assert 0.02 < np.mean(same) < 0.09  # 0.05


def test_blind_degradations_take_small_crops():
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    for name in ("blind-sr", "blind-face"):
        for seed in range(30):
            assert DEGRADATIONS[name](image, np.random.default_rng(seed)).shape == image.shape


def test_the_sinc_filter_keeps_what_is_below_its_cutoff():
    kernel = sinc_kernel(np.pi / 2, 21)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert kernel.min() < 0  # it rings
    response = torch.fft.fft2(kernel).abs()
    assert response[0, 2] > 0.8  # 0.6 radians per pixel
    assert response[0, 10] < 0.1  # 3 radians per pixel


def test_a_clean_image_is_the_best_a_network_can_return(images):
    paths = sorted(images.iterdir())
    assert restoration_psnr(build_identity(), paths, "clean") == pytest.approx(60.0)
    assert restoration_psnr(build_identity(), paths, "noise50") < restoration_psnr(build_identity(), paths, "noise15")
    assert set(TESTS) == {"noise15", "noise25", "noise50", "jpeg10", "x4", "clean"}


def build_identity():
    network = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.zeros_(network.weight)
    network.weight.data[range(3), range(3)] = 1.0
    return network


def test_progress_is_part_of_a_batch():
    draw = with_progress(lambda step, process_index: (torch.zeros(1),), 5)
    assert [draw(step, 0)[1].item() for step in (0, 2, 4)] == [0.0, 0.5, 1.0]
    seen = []
    loss = ImageRestorerLoss(nn.Identity(), lambda pred, target, progress: seen.append(progress) or pred.mean())
    loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.tensor(0.25))
    assert seen == [0.25]


@pytest.mark.parametrize("objective", ["log-mse", "cosine"])
def test_our_network_trains_and_is_opened_as_a_cleaner(command, tmp_path, objective, capsys):
    tiny_metric(channels=3).save_pretrained(tmp_path / "metric")
    options = ["--network-options", SMALL, "--objective", objective, "--metric", str(tmp_path / "metric")]
    folder = command(*options, "--degradation", "everyday")
    network = ResidualCleaner.from_pretrained(folder / "network")
    assert tuple(network.config.channels) == (4, 8)
    assert "Mean PSNR, noise50" in capsys.readouterr().out


def test_a_network_of_spandrel_trains_and_is_saved_by_its_keys(spandrel, command):
    folder = command("--network", "Tiny", "--network-options", '{"width": 6}', "--objective", "mae")
    assert load_file(folder / "network.safetensors")["layers.0.weight"].shape == (6, 3, 3, 3)


def test_a_resumed_run_ends_as_an_uninterrupted_one(command, tmp_path, monkeypatch):
    tiny_metric(channels=3).save_pretrained(tmp_path / "metric")
    options = ["--network-options", SMALL, "--objective", "linear", "--metric", str(tmp_path / "metric")]
    options += ["--checkpoint-minutes", "0"]
    whole = command(*options, output="whole", steps=4)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        command(*options, output="parts", steps=4)
    monkeypatch.undo()
    monkeypatch.setenv("MILO_LATENT_CACHE", str(tmp_path))
    parts = command(*options, output="parts", steps=4)
    first, second = (ResidualCleaner.from_pretrained(folder / "network").state_dict() for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt_at(monkeypatch, step):
    def interrupted(draw, steps):
        def stop(now, process_index):
            if now == step:
                raise KeyboardInterrupt
            return with_progress(draw, steps)(now, process_index)

        return stop

    monkeypatch.setattr(train_image_restorer, "with_progress", interrupted)


def test_a_run_is_settled_by_its_network_objective_degradation_and_start(command, tmp_path):
    command("--network-options", SMALL)
    save_network(ResidualCleaner((4, 8), (1, 1)), tmp_path)
    changed = {
        "objective": ["--objective", "log-mse"],
        "degradation": ["--degradation", "noise"],
        "start": ["--start", str(tmp_path / "network")],
    }
    for name, options in changed.items():
        with pytest.raises(ValueError, match=rf"data\.{name} is"):
            command("--network-options", SMALL, *options)


def test_a_larger_cleaner_starts_as_the_smaller_one():
    torch.manual_seed(0)
    small, large = ResidualCleaner((4, 8), (1, 2)), ResidualCleaner((6, 12, 16), (2, 3, 1))
    grow_cleaner(small, large)
    image = torch.rand(1, 3, 24, 40)
    assert torch.allclose(small(image), large(image), atol=1e-6)
    large(image).square().mean().backward()
    assert all(block.conv2.weight.grad.abs().sum() > 0 for block in large.down_blocks[0])  # new ones learn
    with pytest.raises(ValueError, match="Choose a larger network"):
        grow_cleaner(large, small)


def test_what_cannot_be_trained_is_refused(command, spandrel, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got 'Unheard'"):
        build_network("Unheard", {})
    with pytest.raises(ValueError, match="options of Tiny"):
        build_network("Tiny", {"depth": 3})
    with pytest.raises(FileNotFoundError, match="to start from"):
        load_initial(Tiny(), tmp_path / "none.safetensors")
    save_network(Tiny(width=5), tmp_path)
    with pytest.raises(ValueError, match="weights of the same network"):
        load_initial(Tiny(), tmp_path / "network.safetensors")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ImportError, match=r"milo_latent\[upscalers\]"):
        build_network("Tiny", {})


def test_folders_without_fitting_images_are_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found none"):
        command("--images", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="at least 500 px"):
        command("--crop-size", "500")
    (tmp_path / "small").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "small" / "a.png")
    with pytest.raises(ValueError, match="at least 32 px"):
        command("--images", str(tmp_path / "small"))
