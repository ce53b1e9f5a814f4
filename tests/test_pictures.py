"""Pictures: colors as their profiles mean them; 8 bit and back, crops, blurs and JPEG."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from milo_latent.files import read_image
from milo_latent.pictures import (
    center_crop,
    from_8bit,
    gaussian_blur,
    jpeg_round_trip,
    picture_to_tensor,
    round_to_8bit,
    to_8bit,
)

D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # colorants, adapted to D50
WIDE = ((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1572, 0.0666, 0.7841))  # Display P3's


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def profile(colorants=None, gamma=2.2):
    """Return an ICC profile, version 2, of colorants and a gamma, or of grey alone."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": xyz(D50)}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for letter, colorant in zip((b"r", b"g", b"b"), colorants, strict=True):
            tags |= {letter + b"XYZ": xyz(colorant), letter + b"TRC": curve}
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02400000, b"mntr", space(colorants), b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + b"".join(map(fixed, D50))
    return head.ljust(128, b"\0") + table + body


def space(colorants):
    return b"GRAY" if colorants is None else b"RGB "


def xyz(values):
    return b"XYZ " + bytes(4) + b"".join(map(fixed, values))


def encoded(light):
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(40, 200, (16, 20, 3), dtype=np.uint8)


def test_a_wide_profile_is_applied(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "wide.png", icc_profile=profile(WIDE))
    light = (rgb / 255.0) ** 2.2 @ np.array(WIDE) @ np.linalg.inv(np.array(SRGB))
    expected = encoded(light.clip(0, 1)).clip(0, 1)
    read = read_image(tmp_path / "wide.png")[0].permute(1, 2, 0).numpy()
    assert np.abs(read - expected).max() < 2.5 / 255
    plain = rgb / 255.0
    assert np.abs(read - plain).max() > 20 / 255  # the profile makes the colors more saturated than sRGB would
    with Image.open(tmp_path / "wide.png") as picture:
        assert np.array_equal(picture_to_tensor(picture).permute(1, 2, 0), read)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_profiles_of_other_modes_are_applied_too(tmp_path, rgb, mode):
    picture = Image.fromarray(rgb).convert(mode)
    grey = mode in ("L", "LA")
    picture.save(tmp_path / "a.png", icc_profile=profile(None if grey else WIDE, gamma=1.5))
    read = read_image(tmp_path / "a.png")[0]
    values = np.asarray(picture.convert("RGB")) / 255.0
    light = values**1.5 if grey else values**1.5 @ np.array(WIDE) @ np.linalg.inv(np.array(SRGB))
    assert np.abs(read.permute(1, 2, 0).numpy() - encoded(light.clip(0, 1)).clip(0, 1)).max() < 3 / 255
    assert not grey or (torch.equal(read[0], read[1]) and torch.equal(read[1], read[2]))


def test_a_profile_of_srgb_changes_no_value(tmp_path, rgb):
    from PIL import ImageCms

    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=own)
    assert np.array_equal(to_8bit(read_image(tmp_path / "a.png")[0]), rgb)


def test_grey_pictures_with_a_profile_for_colors_stay_grey(tmp_path, rgb):
    Image.fromarray(rgb).convert("L").save(tmp_path / "a.png", icc_profile=profile(WIDE, gamma=1.5))
    read = read_image(tmp_path / "a.png")[0]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[1], read[2])
    plain = np.asarray(Image.fromarray(rgb).convert("L")) / 255.0
    assert np.abs(read[0].numpy() - encoded(plain**1.5)).max() < 3 / 255


def test_a_profile_named_after_srgb_is_judged_by_what_it_does(tmp_path, rgb):
    named = profile(SRGB, gamma=1.0).replace(b"test\0", b"sRGB\0")
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=named)
    read = read_image(tmp_path / "a.png")[0].permute(1, 2, 0).numpy()
    assert np.abs(read - encoded(rgb / 255.0)).max() < 2.5 / 255


def test_the_profile_of_a_16_bit_picture_is_ignored_with_a_warning(tmp_path):
    grey = np.full((8, 8), 20000, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png", icc_profile=profile(None))
    with pytest.warns(UserWarning, match="16-bit picture is ignored"):
        assert read_image(tmp_path / "a.png").mean().item() == pytest.approx(20000 / 65535)


@pytest.mark.parametrize("broken", [b"no profile", profile(None)])
def test_a_profile_that_cannot_be_applied_is_ignored_with_a_warning(tmp_path, rgb, broken):
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=broken)
    with pytest.warns(UserWarning, match="color profile is ignored"):
        image = read_image(tmp_path / "a.png")
    assert np.array_equal(to_8bit(image[0]), rgb)


def test_8_bit_and_back_is_the_same_and_clips():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    assert np.array_equal(to_8bit(from_8bit(pixels)), pixels)
    image = from_8bit(pixels[0])
    assert image.shape == (3, 5, 7)
    assert torch.equal(round_to_8bit(image), image)
    assert torch.equal(round_to_8bit(3 * image - 1), from_8bit(to_8bit(3 * image - 1)))


def test_the_middle_is_cut():
    image = torch.arange(63.0).view(1, 1, 7, 9)
    assert torch.equal(center_crop(image), image[..., 1:8])
    assert torch.equal(center_crop(image, 3), image[..., 2:5, 3:6])
    assert torch.equal(center_crop(image, 8), image[..., :8])


def test_a_gaussian_blur_spreads_by_sigma_and_keeps_borders_and_the_batch():
    impulse = torch.zeros(2, 3, 41, 41)
    impulse[..., 20, 20] = 1
    blurred = gaussian_blur(impulse, torch.tensor([1.0, 3.0]), radius=12)
    places = torch.arange(41.0) - 20
    variance = (blurred.sum(dim=2) * places**2).sum(dim=2)  # (2, 3)
    assert torch.allclose(variance, torch.tensor([[1.0], [9.0]]).expand(2, 3), rtol=1e-2)
    assert torch.allclose(gaussian_blur(impulse[1], 3.0, radius=12), blurred[1], atol=1e-7)
    assert torch.allclose(gaussian_blur(torch.ones(3, 9, 9), 2.0), torch.ones(3, 9, 9))


@pytest.mark.parametrize(("sigma", "reach"), [(0.2, 1), (1.0, 3), (1.5, 5), (2.0, 6)])
def test_a_gaussian_blur_reaches_three_standard_deviations(sigma, reach):
    impulse = torch.zeros(1, 25, 25)
    impulse[..., 12, 12] = 1
    blurred = gaussian_blur(impulse, sigma)[0]
    offsets = torch.arange(-reach, reach + 1.0)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    expected = torch.zeros(25)
    expected[12 - reach : 13 + reach] = kernel / kernel.sum()
    assert torch.allclose(blurred, torch.outer(expected, expected), atol=1e-7)
    assert (blurred[12] > 0).sum() == 2 * reach + 1


def test_jpeg_loses_more_at_lower_quality():
    image = torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)  # no chroma
    fine, coarse = (jpeg_round_trip(image, quality) for quality in (95, 10))
    assert fine.shape == image.shape
    assert (fine - image).abs().mean() < (coarse - image).abs().mean() / 2
    assert torch.equal(jpeg_round_trip(image[1], 10), coarse[1])
