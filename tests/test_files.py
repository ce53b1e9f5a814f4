"""Files: every kind of image reads right or fails with one clear line; nothing is written in part."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from milo_latent.files import (
    read_image,
    read_latents,
    read_latents_metadata,
    read_photo,
    write_atomically,
    write_image,
    write_latents,
)
from milo_latent.pictures import to_8bit


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_png_reads_as_written(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 3, 9, 7)
    assert np.array_equal(to_8bit(image[0]), rgb)


def test_write_then_read_is_the_same_to_half_a_grey_level(tmp_path):
    image = torch.rand(1, 3, 8, 6)
    write_image(tmp_path / "a.png", image)
    assert (read_image(tmp_path / "a.png") - image).abs().max() <= 0.5 / 255 + 1e-6


def test_16_bit_grey_reads_in_full_depth(tmp_path):
    grey = np.array([[0, 256, 65535], [1, 1000, 40000]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert torch.allclose(image[0, 0], torch.from_numpy(grey.astype(np.float32) / 65535))
    assert torch.equal(image[0, 0], image[0, 2])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA"])
def test_every_mode_reads_as_rgb(tmp_path, rgb, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(rgb).convert(mode).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}").shape == (1, 3, 9, 7)


def test_transparency_is_kept_apart(tmp_path, rgb):
    alpha = np.arange(63, dtype=np.uint8).reshape(9, 7)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.png")
    image, read = read_photo(tmp_path / "a.png")
    assert torch.equal(image, read_image(tmp_path / "a.png"))
    assert np.array_equal(to_8bit(read[0])[..., 0], alpha)
    write_image(tmp_path / "b.png", image, alpha=read)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), np.dstack([rgb, alpha]))
    with pytest.raises(ValueError, match="cannot hold transparency"):
        write_image(tmp_path / "b.jpg", torch.rand(1, 3, 4, 4), alpha=torch.rand(1, 1, 4, 4))


def test_opaque_images_have_no_alpha(tmp_path, rgb):
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png")[1] is None


def test_orientation_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (1, 3, 7, 9)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.png, which does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_image(tmp_path)


def test_text_as_png_and_truncated_jpeg_are_refused(tmp_path, rgb):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match="PNG, JPEG, WEBP, BMP, TIFF"):
        read_image(tmp_path / "a.png")
    Image.fromarray(rgb.repeat(20, 0).repeat(20, 1)).save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:1500])
    with pytest.raises(ValueError, match="damaged"):
        read_image(tmp_path / "b.jpg")


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("milo_latent.files.MAX_PIXELS", 50)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"at most 50 pixels.*10x10"):
        read_image(tmp_path / "a.png")


def test_text_is_kept_in_png_and_refused_elsewhere(tmp_path):
    write_image(tmp_path / "a.png", torch.zeros(3, 2, 2), text={"Software": "milo", "note": "größer"})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text == {"Software": "milo", "note": "größer"}
    with pytest.raises(ValueError, match=r"a\.jpg cannot hold text\. Choose \.png\."):
        write_image(tmp_path / "a.jpg", torch.zeros(3, 2, 2), text={"note": ""})


@pytest.mark.parametrize(
    ("image", "name", "match"),
    [
        (torch.rand(1, 3, 4, 4), "a.txt", "ends in one of"),
        (torch.rand(2, 3, 4, 4), "a.png", "one image"),
        (torch.full((1, 3, 4, 4), torch.nan), "a.png", "finite"),
    ],
)
def test_a_tensor_that_is_no_image_is_not_written(tmp_path, image, name, match):
    with pytest.raises(ValueError, match=match):
        write_image(tmp_path / name, image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("batch", [1, 3])
def test_latents_round_trip(tmp_path, suffix, batch):
    latents = torch.randn(batch, 4, 5, 6)
    write_latents(tmp_path / f"a.{suffix}", latents, metadata={"vae": "nano"})
    assert torch.equal(read_latents(tmp_path / f"a.{suffix}"), latents)
    if suffix == "safetensors":
        assert read_latents_metadata(tmp_path / "a.safetensors") == {"vae": "nano"}


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickled_arrays_are_never_read_and_run_nothing(tmp_path):
    marker = tmp_path / "it ran"
    np.save(tmp_path / "a.npy", np.array([Harmful(marker)], dtype=object), allow_pickle=True)
    with (tmp_path / "b.npy").open("wb") as file:  # a pickle alone, which numpy would load, too
        pickle.dump(Harmful(marker), file)
    for name in ("a.npy", "b.npy"):
        with pytest.raises(ValueError, match="Pickled objects are never read"):
            read_latents(tmp_path / name)
    assert not marker.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert marker.exists()  # it would have run


def test_files_without_latents_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match=r"\(C, h, w\)"):
        read_latents(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((4, 4, 4), dtype=np.int32))
    with pytest.raises(ValueError, match="floating point"):
        read_latents(tmp_path / "b.npy")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="plain array"):
        read_latents(tmp_path / "c.npy")
    save_file({"other": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="entry `latents`"):
        read_latents(tmp_path / "d.safetensors")
    (tmp_path / "e.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="complete safetensors"):
        read_latents(tmp_path / "e.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_latents(tmp_path / "f.npy")
    with pytest.raises(ValueError, match="finite"):
        write_latents(tmp_path / "g.npy", torch.full((1, 4, 2, 2), torch.inf))


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
