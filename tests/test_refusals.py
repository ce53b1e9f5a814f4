"""What people hand to a metric by mistake: refused in one line that names the way out, or warned of once."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from milo_latent import MILO, load_restorer
from milo_latent.checkpoints import rename_keys
from milo_latent.checks import ValueWatch
from milo_latent.cli import main
from milo_latent.files import write_image, write_latents
from milo_latent.guidance.curriculum import curriculum_weight
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.latents import codec
from milo_latent.latents.codec import encode_image
from milo_latent.latents.files import decode_file, load_vae
from milo_latent.metric.loading import OFFICIAL_PREFIXES
from milo_latent.metric.loss import MILOLoss
from milo_latent.score.pairs import match_pairs, score_pairs
from milo_latent.testing import generator, latent_pair, tiny_metric, tiny_pipeline


@pytest.fixture
def weights(tmp_path):
    """Folders of metrics with random weights, for images and for latents of two VAEs."""
    tiny_metric(channels=3).save_pretrained(tmp_path / "image")
    tiny_metric().save_pretrained(tmp_path / "any")
    MILO(latent_space="sd", scaling_factor=0.18215).save_pretrained(tmp_path / "sd")
    return tmp_path


@pytest.fixture
def refused(capsys):
    def run(ref, dist, *arguments):
        assert main(["score", "--ref", str(ref), "--dist", str(dist), *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.err

    return run


def npy(path, array):
    np.save(path, array)
    return path


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_latents_of_no_items_or_beyond_all_range_are_refused(weights, refused):
    empty = npy(weights / "empty.npy", np.zeros((0, 4, 32, 32), np.float32))
    good, huge = (npy(weights / f"{name}.npy", noise(4, 32, 32) * scale) for name, scale in (("a", 1), ("b", 3e37)))
    assert "empty.npy, got (0, 4, 32, 32)" in refused(empty, empty, "--weights", weights / "any")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the range
        assert "Expected a finite error" in (told := refused(good, huge, "--weights", weights / "any", "--json"))
    assert "b.npy" in told


def test_a_scaling_factor_that_is_no_number_names_the_file(weights, refused):
    path = weights / "a.safetensors"
    write_latents(path, torch.randn(1, 4, 32, 32), metadata={"scaling_factor": "abc"})
    assert "`scaling_factor` in" in (told := refused(path, path, "--weights", weights / "sd"))
    assert "a.safetensors, got 'abc'" in told


def test_images_of_a_wrong_range_are_warned_of_once(weights):
    metric, image = MILO.from_pretrained(weights / "image"), np.abs(noise(3, 20, 20)).clip(0, 1)
    image[0, 0, 0] = 0
    for folder, factor in (("ref", 255), ("dist", 200)):
        (weights / folder).mkdir()
        for index in range(3):
            npy(weights / folder / f"{index}.npy", image * factor)
    with pytest.warns(UserWarning, match=r"values in \[0, 1\], got \[0, 255\] in .*0\.npy.*255") as caught:
        rows = list(score_pairs(metric, match_pairs(weights / "ref", weights / "dist")))
    assert len(rows) == 3
    assert len(caught) == 1
    npy(weights / "minus.npy", image * 2 - 1)
    with pytest.warns(UserWarning, match=r"got \[-1, 1\]"):
        list(score_pairs(metric, match_pairs(weights / "minus.npy", weights / "minus.npy")))


@pytest.mark.parametrize("factor", [1 / 0.18215, 0.01])
def test_latents_of_another_scale_are_warned_of(weights, metric, factor):
    ref, dist = latent_pair()
    write_latents(weights / "ref.npy", ref * factor)
    write_latents(weights / "dist.npy", dist * factor)
    with pytest.warns(UserWarning, match=r"root mean square in \[0\.05, 3\], got .*scaling_factor") as caught:
        list(score_pairs(metric, match_pairs(weights / "ref.npy", weights / "dist.npy")))
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="scaled latents"):
        decode_file(tiny_pipeline().vae, weights / "ref.npy", weights / "a.png")


def test_what_is_in_range_is_not_warned_of(weights, metric, shared):
    folder = shared / "milo_official"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = match_pairs(folder / "latents" / "ref.npy", folder / "latents" / "dist.npy")
        list(score_pairs(metric, pairs))
        pairs = match_pairs(folder / "images" / "ref.png", folder / "images" / "dist.png")
        list(score_pairs(MILO.from_pretrained(folder / "MILO.pth"), pairs))
        ValueWatch().look("black and white", torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2), latents=False)


def test_the_command_line_warns_in_one_line_and_still_scores(weights, capsys):
    latents = npy(weights / "a.npy", 6 * noise(4, 16, 16))
    assert main(["score", "--ref", str(latents), "--dist", str(latents), "--weights", str(weights / "any")]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("milo-latent: warning: Expected scaled")]
    assert len(lines) == 1
    assert ".py:" not in captured.err
    assert "error 0.0" in captured.out


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(weights, refused, value):
    bad = noise(4, 16, 16)
    bad[0, 0, :2] = value
    line = refused(npy(weights / "a.npy", noise(4, 16, 16)), npy(weights / "b.npy", bad), "--weights", weights / "any")
    assert "2 NaN or infinite values" in line
    assert "b.npy" in line


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_integers_and_pickles_are_refused(weights, refused):
    whole = npy(weights / "whole.npy", noise(4, 16, 16).astype(np.int64))
    assert "floating point" in refused(whole, whole, "--weights", weights / "any")
    pickled, marker = weights / "pickled.npy", weights / "it ran"
    np.save(pickled, np.array([Harmful(marker)], dtype=object), allow_pickle=True)
    assert "Pickled objects are never read" in refused(pickled, pickled, "--weights", weights / "any")
    assert not marker.exists()


def test_small_images_and_latents_are_refused(weights, refused):
    small = npy(weights / "small.npy", noise(4, 15, 40))
    assert "sides of at least 16, got (15, 40)" in refused(small, small, "--weights", weights / "any")
    write_image(weights / "small.png", torch.rand(1, 3, 30, 12))
    image = weights / "small.png"
    assert "sides of at least 16, got (30, 12)" in refused(image, image, "--weights", weights / "image")


def test_pairs_of_two_sizes_are_refused(weights, refused):
    files = npy(weights / "a.npy", noise(4, 16, 16)), npy(weights / "b.npy", noise(4, 16, 18))
    assert "of one shape" in refused(*files, "--weights", weights / "any")


def test_a_metric_that_does_not_know_its_input_says_what_it_takes(weights, refused):
    write_image(weights / "a.png", torch.rand(1, 3, 64, 64))
    photo, flux = weights / "a.png", npy(weights / "flux.npy", noise(16, 16, 16))
    line = refused(photo, photo, "--weights", weights / "sd")
    assert "Expected latents of sd (4 channels, scaling factor 0.18215), got 3 channels" in line
    assert "Pass --vae" in line
    assert "got 16 channels" in refused(flux, flux, "--weights", weights / "sd")
    assert "Expected images of 3 channels, got 16 channels" in refused(flux, flux, "--weights", weights / "image")
    told = weights / "told.safetensors"
    write_latents(told, torch.rand(1, 3, 16, 16), metadata={"vae": "vq", "scaling_factor": "1.0"})
    assert "Expected images of 3 channels, got latents of vq" in refused(told, told, "--weights", weights / "image")
    write_latents(told, torch.rand(1, 4, 16, 16), metadata={"vae": "xl", "scaling_factor": "0.13025"})
    assert "got those of xl (0.13025)" in refused(told, told, "--weights", weights / "sd")


def test_a_vae_that_the_metric_does_not_know_is_refused(weights, refused):
    write_image(weights / "a.png", torch.rand(1, 3, 128, 128))
    photo = weights / "a.png"
    line = refused(photo, photo, "--vae", "nano", "--weights", weights / "sd")
    factor = load_vae("nano").config.scaling_factor
    assert f"got one of 4 channels and scaling factor {factor:g}" in line
    assert "metric knows, images of 3 channels" in refused(
        photo, photo, "--vae", "nano", "--weights", weights / "image"
    )
    latents = npy(weights / "a.npy", noise(4, 16, 16))
    assert "Leave --vae out" in refused(latents, latents, "--vae", "nano")


def test_mixed_devices_and_dtypes_are_refused(metric):
    ref, dist = latent_pair()
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        metric(ref=ref, dist=dist.to("meta"))
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.bfloat16"):
        metric(ref=ref, dist=dist.bfloat16())


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_weights_are_refused(weights, refused, kept):
    latents = npy(weights / "a.npy", noise(4, 16, 16))
    torch.save(tiny_metric().state_dict(), weights / "whole.pth")
    for source in (weights / "whole.pth", weights / "any" / "diffusion_pytorch_model.safetensors"):
        content = source.read_bytes()
        source.write_bytes(content[: int(kept * len(content))])
    assert "Expected a complete checkpoint" in refused(latents, latents, "--weights", weights / "whole.pth")
    assert "Expected MILO weights" in refused(latents, latents, "--weights", weights / "any")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["mask_finder.4.weight", "scaler.0.bias"])
def test_weights_that_are_not_finite_are_refused(weights, refused, name, value):
    latents, metric = npy(weights / "a.npy", noise(4, 16, 16)), tiny_metric()
    metric.state_dict()[name].flatten()[3] = value
    metric.save_pretrained(weights / "bad")
    official = {own: theirs for theirs, own in OFFICIAL_PREFIXES.items()}
    torch.save(rename_keys(metric.state_dict(), official), weights / "bad.pth")
    for source in ("bad", "bad.pth"):
        assert f"Expected `{name} of the metric` to be finite" in refused(
            latents, latents, "--weights", weights / source
        )
    for user in (MILOLoss, MILOGuidance):
        with pytest.raises(ValueError, match=f"{name} of the metric` to be finite"):
            user(metric)
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=metric)
    pipeline.save_pretrained(weights / "model")
    with pytest.raises(ValueError, match="to be finite"):
        load_restorer(weights / "model", device="cpu")


def test_a_mask_that_is_not_a_number_is_not_taken_for_an_even_one():
    assert curriculum_weight(torch.full((1, 1, 4, 4), torch.nan), 0.5).isnan().all()
    assert torch.equal(curriculum_weight(torch.zeros(1, 1, 4, 4), 1.0), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("scale", [lambda image: 255 * image, lambda image: 2 * image - 1])
def test_images_in_a_wrong_range_are_warned_of_once_wherever_they_enter(scale):
    ref, dist = torch.rand(2, 1, 3, 32, 32, generator=generator())
    wrong, metric, vae = scale(ref), tiny_metric(channels=3), tiny_pipeline().vae
    for use in (
        lambda image: tiny_metric(channels=3)(ref=image, dist=scale(dist)),
        lambda image: MILOLoss(tiny_metric(channels=3))(scale(dist), image),
        lambda image: encode_image(vae, image),
    ):
        codec.WATCH.warned = False
        with pytest.warns(UserWarning, match=r"Expected image values in \[0, 1\]") as caught:
            use(wrong)
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="image values"):
        metric.compare(ref=wrong, dist=wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compare(ref=wrong, dist=wrong)
        encode_image(vae, wrong)  # that warned above


def test_latents_in_a_wrong_range_are_warned_of_by_the_metric(metric):
    ref, dist = latent_pair()
    with pytest.warns(UserWarning, match="Expected scaled latents"):
        metric(ref=ref / 0.18215, dist=dist / 0.18215)


def test_what_overshoots_a_little_is_not_warned_of(metric, monkeypatch):
    monkeypatch.setattr(codec, "WATCH", ValueWatch())
    image = torch.rand(1, 3, 32, 32, generator=generator()) * 1.18 - 0.09
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_metric(channels=3)(ref=image, dist=image)
        encode_image(tiny_pipeline().vae, image)
        encode_image(tiny_pipeline().vae, 9 * image, warn=False)  # as of the pipeline, for what a cleaner made
        metric(ref=latent_pair()[0], dist=latent_pair()[1] * 9)  # a clean estimate may be far off; its reference is not


def test_an_accelerator_is_never_waited_for(metric):
    """The values of tensors elsewhere are not read: those of the device `meta` cannot be."""
    ref = torch.rand(1, 4, 16, 16, device="meta") * 255
    assert metric.to("meta")(ref=ref, dist=ref).device.type == "meta"
    assert not metric.watch.warned


def test_foreign_weights_are_refused(weights, refused):
    latents = npy(weights / "a.npy", noise(4, 16, 16))
    torch.save({"conv.weight": torch.rand(4, 4)}, weights / "other.pth")
    assert "Expected an official MILO checkpoint" in refused(latents, latents, "--weights", weights / "other.pth")
    tiny_pipeline().vae.save_pretrained(weights / "vae")
    told = refused(latents, latents, "--weights", weights / "vae")
    assert "Expected MILO weights in" in told
    assert "the configuration is that of AutoencoderTiny" in told
    assert "neither a shipped set" in refused(latents, latents, "--weights", "absent")


def test_warnings_of_values_name_the_line_of_the_user(metric):
    ref, dist = (latents / 0.18215 for latents in latent_pair())
    for read in (lambda: metric.mask(ref=ref, dist=dist), lambda: metric(ref=ref, dist=dist)):
        metric.watch = ValueWatch()
        with pytest.warns(UserWarning, match="scaled latents") as caught:
            read()
        assert Path(caught[0].filename).name == "test_refusals.py"
