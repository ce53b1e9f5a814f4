"""What users of other metrics complain of does not happen here: properties over random inputs and real photos."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from milo_latent import MILO
from milo_latent.latents.codec import encode_image
from milo_latent.latents.files import load_vae
from milo_latent.testing import tiny_metric

SIDES, SEEDS = st.integers(16, 33), st.integers(0, 10_000)
CHANNELS = st.sampled_from([3, 4])


def random_pair(channels, height, width, seed, *, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)
    amount = 10 ** (4 * torch.rand((), generator=generator, dtype=dtype) - 3)  # differences of 0.001 to 10
    return ref, ref + amount * torch.randn(ref.shape, generator=generator, dtype=dtype)


@given(channels=CHANNELS, height=SIDES, width=SIDES, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_equal_inputs_score_zero_in_every_reading(channels, height, width, seed):
    ref, _ = random_pair(channels, height, width, seed, batch=2)
    result = tiny_metric(channels=channels, seed=seed).compare(ref=ref, dist=ref.clone())
    assert (result.error == 0).all()
    assert result.error_map.abs().max() == 0


@given(channels=CHANNELS, height=SIDES, width=SIDES, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_the_score_is_never_negative_and_zero_for_equal_inputs_only(channels, height, width, seed):
    ref, dist = random_pair(channels, height, width, seed)
    metric = tiny_metric(channels=channels, seed=seed)
    assert metric(ref=ref, dist=dist).item() > 0
    assert metric(ref=dist, dist=ref).item() > 0


@given(seed=SEEDS, height=SIDES, width=SIDES)
@settings(max_examples=15, deadline=None)
def test_the_error_map_of_trained_weights_is_never_negative_and_below_one(seed, height, width):
    ref, dist = random_pair(4, height, width, seed)
    result = MILO.from_pretrained("nano").compare(ref=ref, dist=dist)
    assert result.error_map.min() >= 0
    assert result.error_map.max() < 1
    assert 0 <= result.mos.item() < 5


@given(channels=CHANNELS, height=SIDES, width=SIDES, batch=st.integers(2, 6), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_an_item_scores_alike_alone_in_any_batch_and_in_any_place(channels, height, width, batch, seed):
    metric = tiny_metric(channels=channels, seed=seed)
    ref, dist = random_pair(channels, height, width, seed, batch=batch)
    whole = metric.compare(ref=ref, dist=dist)
    alone = [metric.compare(ref=ref[i : i + 1], dist=dist[i : i + 1]) for i in range(batch)]
    for reading in ("error", "mos"):
        together = getattr(whole, reading)
        singles = torch.cat([getattr(each, reading) for each in alone])
        assert torch.allclose(together, singles, rtol=1e-6, atol=1e-6)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(metric(ref=ref[order], dist=dist[order]), whole.error[order], rtol=1e-6, atol=1e-6)


@example(channels=3, height=16, width=18, seed=1370, reading=False)  # a kink lies within the largest step
@given(channels=CHANNELS, height=st.integers(16, 20), width=st.integers(16, 20), seed=SEEDS, reading=st.booleans())
@settings(max_examples=10, deadline=None)
def test_gradients_match_finite_differences_along_random_directions(channels, height, width, seed, reading):
    metric = tiny_metric(channels=channels, seed=seed).double()
    ref, dist = random_pair(channels, height, width, seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def value(**pair):
        return metric(**pair).sum() if reading else metric.compare(**pair).error_map.mean(dim=(1, 2, 3)).sum()

    for name in ("dist", "ref"):
        pair = {"dist": dist, "ref": ref} | {name: {"dist": dist, "ref": ref}[name].clone().requires_grad_(True)}
        (gradient,) = torch.autograd.grad(value(**pair), pair[name])
        direction = torch.randn(ref.shape, generator=generator, dtype=torch.float64)
        scale = gradient.norm().item() * direction.norm().item() / direction.numel() ** 0.5
        tolerance = {"rel": 1e-3, "abs": 1e-3 * scale + 1e-9}
        # |ref - dist| and ReLU have kinks: where one lies within a step, its sides differ, and a smaller one is taken
        for size in (1e-7, 1e-8, 1e-9):
            step = size / direction.abs().max()
            with torch.no_grad():
                here, ahead, behind = (
                    value(**pair | {name: pair[name] + way * step * direction}) for way in (0, 1, -1)
                )
            if ((ahead - here) / step).item() == pytest.approx(((here - behind) / step).item(), **tolerance):
                break
        expected = ((ahead - behind) / (2 * step)).item()
        assert (gradient * direction).sum().item() == pytest.approx(expected, **tolerance)


@given(channels=CHANNELS, height=SIDES, width=SIDES, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_gradient_is_finite_also_at_equal_inputs(channels, height, width, seed):
    metric = tiny_metric(channels=channels, seed=seed)
    ref, dist = random_pair(channels, height, width, seed)
    for each in (dist, ref.clone()):
        for reading in ("error", "mos", "error_map"):
            leaf = each.clone().requires_grad_(True)
            getattr(metric.compare(ref=ref, dist=leaf), reading).sum().backward()
            assert torch.isfinite(leaf.grad).all()


@given(channels=CHANNELS, height=SIDES, width=SIDES, seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_same_inputs_give_the_same_bits(channels, height, width, seed):
    metric = tiny_metric(channels=channels, seed=seed)
    pair = dict(zip(("ref", "dist"), random_pair(channels, height, width, seed, batch=2), strict=True))
    leaves = [pair["dist"].clone().requires_grad_(True) for _ in range(2)]
    scores = [metric(ref=pair["ref"], dist=leaf) for leaf in leaves]
    gradients = [torch.autograd.grad(score.sum(), leaf)[0] for score, leaf in zip(scores, leaves, strict=True)]
    assert torch.equal(*scores)
    assert torch.equal(*gradients)


def to_tensor(picture):
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1)[None]


def noisy(picture, sigma):
    array = np.asarray(picture) + np.random.default_rng(0).normal(0, sigma, (*picture.size[::-1], 3))
    return Image.fromarray(array.round().clip(0, 255).astype(np.uint8))


def jpeg(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


# from the least to the most distorted: sigma of 255, sigma in pixels, quality of Pillow
DISTORTIONS = {
    "noise": (noisy, (5, 15, 30, 60)),
    "blur": (lambda picture, sigma: picture.filter(ImageFilter.GaussianBlur(sigma)), (0.5, 1, 2, 4)),
    "jpeg": (jpeg, (90, 60, 30, 10)),
}


def mean_scores(metric, pictures, kind, encode=lambda image: image):
    """Return the mean error and the mean of the error map over pictures, per level."""
    distort, levels = DISTORTIONS[kind]
    means = []
    with torch.inference_mode():
        for level in levels:
            results = [
                metric.compare(ref=encode(to_tensor(each)), dist=encode(to_tensor(distort(each, level))))
                for each in pictures
            ]
            means.append(
                [np.mean([getattr(each, name).mean().item() for each in results]) for name in ("error", "error_map")]
            )
    return np.array(means).T


def test_the_official_metric_rises_with_every_level_of_distortion_on_photos(shared):
    metric = MILO.from_pretrained(shared / "milo_official" / "MILO.pth")
    for folder, kind in itertools.product(("kodak24", "imagenet256_val"), DISTORTIONS):
        paths = sorted((shared / "data" / folder).glob("*.*"))[:5]
        pictures = [Image.open(path).convert("RGB").resize((160, 160), Image.Resampling.LANCZOS) for path in paths]
        assert len(pictures) == 5
        for means in mean_scores(metric, pictures, kind):
            assert means[0] > 0
            assert (np.diff(means) > 0).all(), (folder, kind, means)


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_nano_s_metric_rises_with_every_level_of_distortion_on_a_photo(repository, kind):
    vae, metric = load_vae("nano"), MILO.from_pretrained("nano")
    photo = Image.open(repository / "examples" / "cat_noisy.png").convert("RGB")
    photo = photo.filter(ImageFilter.GaussianBlur(1.5)).resize((192, 192), Image.Resampling.LANCZOS)
    for means in mean_scores(metric, [photo], kind, encode=lambda image: encode_image(vae, image)):
        assert means[0] > 0
        assert (np.diff(means) > 0).all(), means


WITHOUT_NETWORK = """
import importlib, pkgutil, socket, sys

def refuse(*args, **kwargs):
    raise SystemExit("a connection was tried")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import milo_latent
for module in pkgutil.walk_packages(milo_latent.__path__, "milo_latent."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in milo_latent.__all__:
    getattr(milo_latent, name)
from milo_latent.metric.network import MILO
from milo_latent.latents.files import load_vae
MILO.from_pretrained("nano"), load_vae("nano")
print(len([name for name in sys.modules if name.startswith("milo_latent")]))
"""


def test_nothing_connects_at_import_nor_when_shipped_weights_are_opened():
    run = subprocess.run([sys.executable, "-c", WITHOUT_NETWORK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 25
