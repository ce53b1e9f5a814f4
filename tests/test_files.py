"""Files: every kind of image reads right or fails with one clear line; nothing is written in part."""

import os
import pickle
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from safetensors.torch import save_file

from milo_latent.files import (
    open_photo,
    read_image,
    read_latents,
    read_latents_metadata,
    read_photo,
    write_atomically,
    write_image,
    write_latents,
)
from milo_latent.photo_formats import srgb_profile
from milo_latent.pictures import to_8bit
from milo_latent.testing import generator


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
    with pytest.raises(ValueError, match=r"a\.bmp cannot hold text\. Choose one of .*\.jpeg"):
        write_image(tmp_path / "a.bmp", torch.zeros(3, 2, 2), text={"note": ""})


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
def test_other_formats_keep_text_in_their_exif(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_image(path, torch.zeros(3, 8, 8), text={"Software": "milo", "note": '{"ü": 1}'})
    with Image.open(path) as picture:
        exif = picture.getexif()
        assert exif[0x0131] == "milo"
        assert exif.get_ifd(0x8769)[0x9286] == b'ASCII\0\0\0note: {"\\xfc": 1}'


def taken(path, rgb, **options):
    """Write a photo as a camera does: turned, with its maker, copyright, time, place, thumbnail tags and notes."""
    exif = Image.Exif()
    exif.update({0x010F: "Maker", 0x0112: 6, 0x8298: "somebody", 0x0131: "firmware"})
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00", 0x927C: b"notes", 0xA001: 65535, 0xA002: 7, 0xA003: 9}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    Image.fromarray(rgb).save(path, exif=exif.tobytes(), **options)
    return open_photo(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("source", [".jpg", ".png", ".webp", ".tif"])
def test_who_took_a_photo_when_and_where_is_kept_but_not_how_it_was_stored(tmp_path, rgb, source, suffix):
    photo = taken(tmp_path / f"a{source}", rgb, dpi=(300, 200))
    assert photo.image.shape == (1, 3, 7, 9)
    image = torch.rand(1, 3, 14, 18)
    write_image(tmp_path / f"b{suffix}", image, like=photo, text={"Software": "milo", "note": "text"})
    assert read_image(tmp_path / f"b{suffix}").shape == image.shape  # it is not turned once more
    with Image.open(tmp_path / f"b{suffix}") as picture:
        exif = picture.getexif()
        assert (exif[0x010F], exif[0x8298]) == ("Maker", "somebody")
        assert 0x0112 not in exif
        details = exif.get_ifd(0x8769)
        assert details[0x9003] == "2020:01:01 00:00:00"
        assert (details[0xA001], details[0xA002], details[0xA003]) == (1, 18, 14)
        assert 0x927C not in details
        assert exif.get_ifd(0x8825)[2] == (1.0, 2.0, 3.0)
        if source != ".webp" and suffix != ".webp":  # which stores none
            assert picture.info["dpi"] == pytest.approx((300, 200), abs=0.1)


def test_a_profile_is_replaced_by_that_of_srgb_which_the_pixels_are_in(tmp_path, rgb):
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in (("a", srgb_profile()), ("b", swapped), ("c", None)):
        Image.fromarray(rgb).save(tmp_path / f"{name}.png", icc_profile=profile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that of Lab cannot be applied to RGB
            photo = open_photo(tmp_path / f"{name}.png")
        for suffix in (".png", ".jpg", ".webp", ".tif"):
            write_image(tmp_path / f"result{suffix}", photo.image, like=photo)
            with Image.open(tmp_path / f"result{suffix}") as picture:
                assert picture.info.get("icc_profile") == (None if profile is None else srgb_profile())
    assert srgb_profile()[24:28] == b"\x07\xd0\0\1"  # no time of today, which would change the bytes


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.TIFF"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_color_is_read_and_written_in_full_depth(tmp_path, channels, name):
    values = torch.randint(0, 65536, (channels, 9, 7), generator=generator())
    deep = SimpleNamespace(depth=16, exif=None, dpi=(300, 300), profiled=True)
    alpha = None if channels == 3 else values[None, 3:] / 65535
    software = "milo_latent 1" if "tif" in name.lower() else "größer"  # EXIF holds ASCII
    write_image(tmp_path / name, values[:3] / 65535, alpha=alpha, like=deep, text={"Software": software})
    photo = open_photo(tmp_path / name)
    assert (photo.depth, photo.profiled, photo.lost) == (16, True, ())
    assert torch.equal((photo.image[0] * 65535).round().long(), values[:3])
    assert photo.alpha is None if channels == 3 else torch.equal((photo.alpha[0] * 65535).round().long(), values[3:])
    with Image.open(tmp_path / name) as picture:
        told = picture.getexif()[ExifTags.Base.Software] if "tif" in name.lower() else picture.text["Software"]
        assert told == software
        assert picture.size == (7, 9)
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.02)
        assert np.array_equal(np.asarray(picture), values.movedim(0, -1).numpy() // 256)  # the high bytes
    write_image(tmp_path / "b.jpg", photo.image, like=photo)
    assert open_photo(tmp_path / "b.jpg").depth == 8


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_tiff_is_read_in_full_depth(tmp_path, order, channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff_of_16bit(values, order))
    photo = open_photo(tmp_path / "a.tif")
    assert photo.depth == 16
    read = photo.image if channels == 3 else torch.cat([photo.image, photo.alpha], dim=1)
    assert np.array_equal((read[0].movedim(0, -1) * 65535).round().numpy(), values)


def tiff_of_16bit(values, order):
    """Return an uncompressed TIFF of one strip."""
    height, width, channels = values.shape
    data, start = values.astype(f"{order}u2").tobytes(), 8
    shorts = {256: width, 257: height, 259: 1, 262: 2, 277: channels, 278: height, 284: 1} | (
        {338: 2} if channels == 4 else {}
    )
    entries = {tag: struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items()}
    entries |= {tag: struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in ((273, start), (279, len(data)))}
    end = start + len(data) + 2 + 12 * (len(entries) + 1) + 4
    entries[258] = struct.pack(f"{order}HHII", 258, 3, channels, end)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start + len(data))
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    return head + data + directory + struct.pack(f"{order}{channels}H", *[16] * channels)


def test_16_bit_with_another_profile_is_read_in_8_bit_and_says_so(tmp_path, monkeypatch):
    values = torch.rand(3, 9, 7, generator=generator())
    deep = SimpleNamespace(depth=16, exif=None, dpi=None, profiled=True)
    monkeypatch.setattr("milo_latent.photo_formats.srgb_profile", lambda: with_gamma(srgb_profile()))
    write_image(tmp_path / "a.png", values, like=deep)
    photo = open_photo(tmp_path / "a.png")
    assert (photo.depth, photo.lost) == (8, ("16 bit, since its color profile is applied in 8 bit",))
    assert (photo.image[0] - values).abs().max() > 0.05


def with_gamma(profile):
    """Return a profile of sRGB with a linear tone curve."""
    changed = bytearray(profile)
    place = changed.index(b"para")
    changed[place : place + 12] = b"curv" + bytes(8)
    return bytes(changed)


def test_what_a_file_cannot_hold_is_told(tmp_path, rgb):
    frames = [Image.fromarray(np.dstack([rgb + shift, rgb[..., :1]])) for shift in (0, 9, 20)]
    for name in ("a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        photo = open_photo(tmp_path / name)
        assert photo.lost_in(tmp_path / "b.png") == ["2 further pages or frames"], name
    assert photo.lost_in(tmp_path / "b.jpg") == ["2 further pages or frames", "transparency, which .jpg cannot hold"]
    photo = taken(tmp_path / "c.png", rgb)
    assert photo.lost_in(tmp_path / "d.BMP") == ["EXIF, which .bmp cannot hold"]
    assert photo.lost_in(tmp_path / "d.webp") == []
    assert replace(photo, depth=16).lost_in(tmp_path / "d.tif") == []
    assert replace(photo, depth=16).lost_in(tmp_path / "d.webp") == ["16 bit, which .webp cannot hold"]
    write_image(tmp_path / "d.bmp", photo.image, like=photo)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg"])
def test_a_damaged_tiff_is_refused_without_a_word_of_libtiff(tmp_path, rgb, capfd, compression):
    Image.fromarray(rgb).save(tmp_path / "a.tif", compression=compression)
    with Image.open(tmp_path / "a.tif") as picture:
        (start, *_), (length, *_) = (picture.tag_v2[tag] for tag in (273, 279))  # of the first strip
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[start : start + length] = np.random.default_rng(0).bytes(length)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match="Expected a complete image"):
        read_image(tmp_path / "a.tif")
    os.write(2, b"mine")
    assert capfd.readouterr().err == "mine"


def test_a_process_without_standard_error_reads_tiff(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.tif")
    code = "import sys; from milo_latent import read_image; print(read_image(sys.argv[1]).shape)"
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", code, str(tmp_path / "a.tif")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.startswith("torch.Size([1, 3, ")


def test_damaged_metadata_cost_themselves_alone(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x87\x69half", dpi=(300, 300))
    photo = open_photo(tmp_path / "a.jpg")
    assert photo.exif is None
    write_image(tmp_path / "b.jpg", photo.image, like=photo)


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
