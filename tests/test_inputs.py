"""What people have is taken: pictures, paths, arrays and tensors, alone or in batches; names of metrics."""

import numpy as np
import pytest
import torch
from PIL import Image

from milo_latent import MILO, MILOGuidance, MILOLoss, encode_image, restore_image
from milo_latent.diffbir.inputs import degraded_images
from milo_latent.files import read_image, write_latents
from milo_latent.inputs import images_to_tensor, is_one_image, latents_to_tensor
from milo_latent.testing import latent_pair, tiny_metric
from milo_latent.training.denoising_loss import MaskWeight
from milo_latent.training.objectives import Objective


@pytest.fixture
def expected(photo):
    return read_image(photo)  # (1, 3, 45, 61)


@pytest.fixture
def forms(photo, expected):
    """The same photo in all forms."""
    picture = Image.open(photo)
    pixels = np.asarray(picture)
    eight_bit = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return {
        "picture": picture, "path": photo, "name": str(photo), "8 bit": pixels, "array": (pixels / 255),
        "float16 array": (pixels / 255).astype(np.float32), "16 bit": pixels.astype(np.uint16) * 257,
        "batch of arrays": pixels[None], "8-bit tensor": eight_bit, "tensor": expected[0], "batch": expected,
        "8-bit batch": eight_bit[None], "list": [picture], "tuple of paths": (photo,),
    }  # fmt: skip


def test_every_form_of_a_photo_gives_the_same_tensor(forms, expected):
    for name, form in forms.items():
        tensor = images_to_tensor(form)
        assert tensor.dtype == torch.float32, name
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-7), name
        assert is_one_image(form) == ("batch" not in name and name not in ("list", "tuple of paths")), name


def test_a_batch_is_returned_as_it_is_and_differentiable():
    batch = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert images_to_tensor(batch) is batch
    (grad,) = torch.autograd.grad(images_to_tensor(batch[0]).sum(), batch)
    assert grad[0].eq(1).all()


def test_several_images_make_a_batch_and_gray_arrays_get_three_channels(photo, expected):
    assert torch.equal(images_to_tensor([photo, Image.open(photo)]), torch.cat([expected, expected]))
    gray = np.arange(20, dtype=np.uint8).reshape(4, 5)
    for form in (gray, gray[..., None], gray[None, ..., None]):
        tensor = images_to_tensor(form)
        assert tensor.shape == (1, 3, 4, 5)
        assert torch.equal(tensor[0, 2], torch.from_numpy(gray) / 255)


def test_the_orientation_of_a_picture_is_applied(photo):
    picture = Image.open(photo)
    picture.getexif()[0x0112] = 6  # to be turned by 90 degrees
    assert images_to_tensor(picture).shape == (1, 3, 61, 45)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (None, TypeError, r"`ref` as a PIL image, a path, an array .* got NoneType"),
        ([], ValueError, "`ref` of at least one pixel, got none"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "at least one pixel"),
        (np.zeros((3, 16, 16), np.uint8), ValueError, r"array \(H, W, 3\).*\(3, 16, 16\).*channels last"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"\(8, 8, 4\).*no transparency"),
        (np.zeros((8, 8, 3), np.int64), TypeError, "`ref` to be floating point, got torch.int64"),
        (torch.rand(16, 16), ValueError, r"`ref` of shape \(B, C, H, W\), got \(16, 16\)"),
        (torch.rand(16, 16, 3), ValueError, "`ref` as RGB, 3 channels"),
        ([torch.rand(3, 8, 9), torch.rand(3, 8, 8)], ValueError, r"`ref` of one size.*\[\(8, 8\), \(9, 8\)\]"),
        ("nowhere.png", FileNotFoundError, "nowhere.png, which does not exist"),
        (Image.new("F", (8, 8)), TypeError, "32-bit floating point"),
    ],
)
def test_what_is_no_image_is_refused(given, error, told):
    with pytest.raises(error, match=told):
        images_to_tensor(given, "ref")


def test_latents_are_taken_from_files_arrays_and_without_batch_axis(tmp_path):
    latents, _ = latent_pair()
    write_latents(tmp_path / "a.npy", latents)
    for form in (latents, latents[0], latents.numpy(), latents[0].numpy(), tmp_path / "a.npy"):
        assert torch.equal(latents_to_tensor(form), latents)
    with pytest.raises(TypeError, match=r"`dist` as latents.*got Image\. `encode_image\(vae, image\)`"):
        latents_to_tensor(Image.new("RGB", (8, 8)), "dist")


@pytest.mark.parametrize("name", ["__call__", "mask", "error_map", "compare"])
def test_a_metric_takes_every_form(forms, expected, name):
    metric = tiny_metric(channels=3)
    read, dist = getattr(metric, name), expected * 0.5

    def result(ref, dist):
        given = read(ref=ref, dist=dist)
        return given.error if name == "compare" else given

    reference = result(expected, dist)
    for key, form in forms.items():
        assert torch.allclose(result(form, dist), reference, rtol=1e-4, atol=1e-7), key
        assert not result(dist, form).equal(reference), key  # the order counts
    assert metric.double()(ref=forms["path"], dist=forms["picture"]).dtype == torch.float64


def test_a_latent_metric_takes_latents_alone(metric, tmp_path, photo):
    ref, dist = latent_pair()
    write_latents(tmp_path / "dist.npy", dist)
    assert torch.equal(metric(ref=ref[0].numpy(), dist=tmp_path / "dist.npy"), metric(ref=ref, dist=dist))
    with pytest.raises(TypeError, match="`ref` as latents"):
        metric(ref=Image.open(photo), dist=dist)


def test_inputs_by_position_are_refused_since_their_order_matters(metric):
    ref, dist = latent_pair()
    for read in (metric, metric.mask, metric.error_map, metric.compare):
        with pytest.raises(TypeError, match=r"by keyword, as in metric\(dist=\.\.\., ref=\.\.\.\).*got 2 by position"):
            read(ref, dist)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'dist'"):
        metric(ref=ref)


def test_an_image_is_encoded_from_every_form(pipeline, forms, expected):
    latents = encode_image(pipeline.vae, expected)
    for name, form in forms.items():
        assert torch.allclose(encode_image(pipeline.vae, form), latents, atol=1e-5), name
        assert torch.allclose(MILOGuidance.reference_from_image(pipeline.vae, form), latents, atol=1e-5), name


def test_a_restored_image_has_the_form_of_the_degraded_one(pipeline, photo, forms, expected):
    tensor = restore_image(expected, model=pipeline, steps=1)
    assert tensor.shape == expected.shape
    pixels = tensor[0].permute(1, 2, 0).numpy()
    for name in ("picture", "path"):
        restored = restore_image(forms[name], model=pipeline, steps=1)
        assert isinstance(restored, Image.Image)
        assert np.abs(np.asarray(restored) / 255 - pixels).max() < 0.51 / 255
    assert torch.equal(restore_image(forms["tensor"], model=pipeline, steps=1), tensor[0])
    assert np.allclose(restore_image(forms["array"], model=pipeline, steps=1), pixels, atol=1e-5)
    assert restore_image(forms["batch of arrays"], model=pipeline, steps=1).shape == (1, *pixels.shape)
    (restored,) = restore_image([photo], model=pipeline, steps=1)
    assert restored.size == (61, 45)


def test_the_output_type_is_chosen_as_in_diffusers(pipeline, photo, expected):
    assert restore_image(photo, model=pipeline, steps=1, output_type="pt").shape == expected.shape[1:]
    assert restore_image(photo, model=pipeline, steps=1, output_type="np").shape == (45, 61, 3)
    assert restore_image(expected, model=pipeline, steps=1, output_type="pil")[0].size == (61, 45)
    with pytest.raises(ValueError, match=r"`output_type` to be one of.*'latent'"):
        restore_image(photo, model=pipeline, output_type="latent")


def test_a_pipeline_takes_paths_and_refuses_a_wrong_range(pipeline, photo, expected):
    assert torch.equal(degraded_images(photo), expected)
    with pytest.raises(ValueError, match="Divide by 255"):
        degraded_images(np.full((8, 8, 3), 200.0))


def test_a_metric_may_be_given_by_its_name():
    weight = MILO.from_pretrained("nano").scaler[0].weight
    for taker in (MILOLoss, MILOGuidance, lambda name: Objective("milo", name), lambda name: MaskWeight("milo", name)):
        assert torch.equal(taker("nano").metric.scaler[0].weight, weight)
        with pytest.raises(FileNotFoundError, match="Expected metric weights, got 'no-such-set'"):
            taker("no-such-set")
        with pytest.raises(TypeError, match="`metric` to be a MILO, its name or its folder, got float"):
            taker(0.5)
