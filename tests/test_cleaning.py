"""Stage 1 around the cleaner: the official rules where they apply, any module otherwise."""

import numpy as np
import pytest
import torch
from golden import golden, tiny_cleaner
from PIL import Image
from test_cleaners import TINY
from torch import nn

from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.cleaning import clean_image, enlarge_short_side, short_side_size
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.diffbir.rules import DEFAULT, OFFICIAL, pad_black, resize, resize_8bit
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.swinir import SwinIR
from milo_latent.diffbir.tiles import Tile


class Enlarger(nn.Module):
    """Any upscaler: nearest neighbor, so that its result is known."""

    scale = 4

    def forward(self, image):
        return image.repeat_interleave(4, 2).repeat_interleave(4, 3)


class Recorder(nn.Identity):
    """A cleaner that keeps what it was given."""

    def forward(self, image):
        self.seen = image
        return image


@pytest.fixture(scope="module")
def operations():
    return golden("image_ops")


def test_padding_is_the_official_one(operations):
    names = [name.removesuffix(".in") for name in operations if name.startswith("pad.") and name.endswith(".in")]
    assert len(names) == 4
    for name in names:
        multiple = int(name.rpartition("multiple")[2])
        assert torch.equal(pad_black(operations[f"{name}.in"], multiple), operations[f"{name}.out"])


def test_resizing_by_the_short_side_is_the_official_one(operations):
    names = [name.removesuffix(".in") for name in operations if name.startswith("resize.") and name.endswith(".in")]
    assert len(names) == 5
    for name in names:
        image, expected = operations[f"{name}.in"], operations[f"{name}.out"]
        resized = resize(image, short_side_size(image, int(name.rpartition("short")[2])))
        assert resized.shape == expected.shape
        assert torch.allclose(resized, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("cleaner", "run"), [(SwinIR, "swinir_v_zsnr"), (BSRNet, "bsrnet_eps_up4"), (SCUNet, "scunet_eps")]
)
def test_stage_one_is_the_official_one(cleaner, run):
    network, tensors = tiny_cleaner(cleaner), golden("pipeline_tiny")
    image = tensors[f"run.{run}.lq"].permute(0, 3, 1, 2) / 255
    expected = tensors[f"run.{run}.cond_img_every8"]
    output_size = tuple(tensors[f"run.{run}.result"].shape[1:3])
    cleaned = clean_image(network, image, output_size=output_size, rules=OFFICIAL)[..., ::8, ::8]
    assert cleaned.shape == expected.shape
    assert (cleaned - expected).abs().max() / expected.abs().max() < 1e-5


def test_black_padding_is_what_the_default_avoids():
    network = tiny_cleaner(SwinIR)
    image = torch.full((1, 3, 520, 512), 0.9)
    border = (..., slice(512, 520), slice(64, 448))
    black, repeated = clean_image(network, image, rules=OFFICIAL), clean_image(network, image)
    inner = repeated[..., 300:310, 64:448]
    assert (repeated[border].mean() - inner.mean()).abs() < (black[border].mean() - inner.mean()).abs()


@pytest.mark.parametrize("cleaner", list(TINY))
def test_results_of_the_official_cleaners_have_a_short_side_of_512_at_least(cleaner):
    network = cleaner(**TINY[cleaner]).eval()
    with torch.no_grad():
        small = clean_image(network, torch.rand(1, 3, 40, 60), output_size=(80, 120))
    assert small.shape == (1, 3, 512, 768)
    assert 0 <= small.min() <= small.max() <= 1


def test_an_upscaler_enlarges_to_the_output_size_when_that_is_512_or_more():
    network = BSRNet(**TINY[BSRNet]).eval()
    with torch.no_grad():
        assert clean_image(network, torch.rand(1, 3, 64, 80), output_size=(520, 650)).shape == (1, 3, 520, 650)
        assert clean_image(network, torch.rand(1, 3, 64, 80), output_size=(512, 700)).shape == (1, 3, 512, 700)
        assert clean_image(network, torch.rand(1, 3, 64, 80), output_size=(511, 700)).shape == (1, 3, 512, 640)
        assert clean_image(network, torch.rand(1, 3, 140, 150)).shape == (1, 3, 560, 600)


def test_other_cleaners_keep_the_size_and_small_ones_too():
    image = torch.rand(1, 3, 21, 35)
    with torch.no_grad():
        assert clean_image(ResidualCleaner(channels=(4,), blocks=(1,)), image).shape == image.shape
    assert torch.equal(clean_image(Recorder(), image), image)
    assert torch.equal(clean_image(Recorder(), image, output_size=(21, 35)), image)


def test_cleaners_that_keep_the_size_see_the_enlarged_image():
    recorder = Recorder()
    cleaned = clean_image(recorder, torch.rand(1, 3, 21, 35), output_size=(42, 70))
    assert recorder.seen.shape == cleaned.shape == (1, 3, 42, 70)


def test_the_official_rules_enlarge_in_8_bit_before_the_cleaner():
    recorder, image = Recorder(), torch.rand(1, 3, 21, 35)
    clean_image(recorder, image, output_size=(42, 70), rules=OFFICIAL)
    assert torch.equal(recorder.seen, resize_8bit(image, (42, 70)))
    clean_image(recorder, image, output_size=(42, 70))
    assert torch.equal(recorder.seen, resize(image, (42, 70)).clamp(0, 1))


def test_any_upscaler_is_taken_by_its_scale():
    image = torch.rand(1, 3, 10, 12)
    assert torch.equal(clean_image(Enlarger(), image), Enlarger()(image))
    assert clean_image(Enlarger(), image, output_size=(20, 24)).shape == (1, 3, 20, 24)


def test_an_upscaler_without_a_scale_is_refused_with_the_way_out():
    unnamed = Enlarger()
    unnamed.scale = 1
    with pytest.raises(ValueError, match=r"\(10, 12\) pixels .* got \(40, 48\).* `cleaner.scale = 4`"):
        clean_image(unnamed, torch.rand(1, 3, 10, 12))


@pytest.mark.parametrize("cleaner", [Enlarger(), Recorder()])
@pytest.mark.parametrize("rules", [DEFAULT, OFFICIAL])
def test_tiles_of_an_image_give_what_the_whole_gives(cleaner, rules):
    sizes, image = [], torch.rand(1, 3, 100, 150)
    handle = cleaner.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0].shape[2:]))
    tiled = clean_image(cleaner, image, tile=Tile(64, 16), rules=rules)
    handle.remove()
    assert torch.allclose(tiled, clean_image(cleaner, image, rules=rules), atol=1e-6)
    assert sizes == [(64, 64)] * 6


def test_swinir_in_official_tiles_is_enlarged_after_it_otherwise_before():
    network, sizes = SwinIR(**TINY[SwinIR]).eval(), []
    network.register_forward_pre_hook(lambda module, arguments: sizes.append(tuple(arguments[0].shape[2:])))
    with torch.no_grad():
        for rules, tiles in ((OFFICIAL, 1), (DEFAULT, 16)):
            sizes.clear()
            cleaned = clean_image(network, torch.rand(1, 3, 128, 128), tile=Tile(128, 0), rules=rules)
            assert cleaned.shape == (1, 3, 512, 512)
            assert sizes == [(128, 128)] * tiles


def test_the_official_resize_is_pillows_to_the_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    expected = np.asarray(Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC))
    resized = resize_8bit(image, (80, 120)).mul(255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(resized, expected)


def test_images_that_are_large_enough_are_not_resized():
    image = torch.rand(1, 3, 512, 600)
    assert enlarge_short_side(image, 512) is image


def test_a_cleaner_in_half_precision_gives_float32():
    cleaner = ResidualCleaner(channels=(4,), blocks=(1,)).to(torch.bfloat16)
    with torch.no_grad():
        assert clean_image(cleaner, torch.rand(1, 3, 16, 16)).dtype == torch.float32


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="`image` with 3 channels, got 4"):
        clean_image(Recorder(), torch.rand(1, 4, 16, 16))
