"""Training an autoencoder by any objective, all of it or the decoder alone."""

import pytest
import torch
from diffusers import AutoencoderTiny

from milo_latent.latents.codec import decode_latents, encode_image
from milo_latent.testing import tiny_metric
from milo_latent.training import train_autoencoder
from milo_latent.training.objectives import Objective
from milo_latent.training.train_autoencoder import AutoencoderLoss, nano_autoencoder


@pytest.fixture
def command(images, tmp_path):
    def run(*options, output):
        arguments = ["--images", str(images), "--validation", str(images), "--steps", "2", "--batch-size", "2"]
        arguments += ["--crop-size", "32", "--precision", "no", "--output", str(tmp_path / output)]
        train_autoencoder.main([*arguments, *options])
        return tmp_path / output / "vae"

    return run


def test_the_decoder_trains_alone_and_the_latents_stay(command, tmp_path):
    whole = command(output="whole")
    tiny_metric(channels=3).save_pretrained(tmp_path / "metric")
    options = ["--start", str(whole), "--freeze-encoder", "--objective", "cosine", "--metric", str(tmp_path / "metric")]
    before, after = (AutoencoderTiny.from_pretrained(path) for path in (whole, command(*options, output="decoder")))
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("encoder."))
    assert not all(torch.equal(old[name], new[name]) for name in old if name.startswith("decoder."))
    assert after.config.scaling_factor == before.config.scaling_factor


def test_the_whole_trains_where_the_encoder_is_not_frozen(command):
    whole = command(output="whole")
    old, new = (
        AutoencoderTiny.from_pretrained(path).state_dict()
        for path in (whole, command("--start", str(whole), output="more"))
    )
    assert not all(torch.equal(old[name], new[name]) for name in old if name.startswith("encoder."))


def test_the_loss_is_the_objective_of_the_reconstruction():
    class Halving(torch.nn.Module):
        def encode(self, image):
            return type("Encoded", (), {"latents": image})

        def decode(self, latents):
            return type("Decoded", (), {"sample": latents / 2})

    image = torch.ones(2, 3, 8, 8)  # 1 in [-1, 1], decoded to 0.5, which is 0.75 in [0, 1]
    loss = AutoencoderLoss(Halving(), Objective("mae"))(image, torch.zeros(2, 3, 8, 8), torch.tensor(0.0))
    assert loss.item() == pytest.approx(0.25)


def test_a_frozen_encoder_needs_weights(command, tmp_path):
    with pytest.raises(ValueError, match="--start with --freeze-encoder"):
        command("--freeze-encoder", output="run")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        command("--start", str(tmp_path / "none"), output="run")


def test_latents_may_have_16_channels(command):
    vae = AutoencoderTiny.from_pretrained(command("--latent-channels", "16", output="wide"))
    assert vae.encode(torch.zeros(1, 3, 32, 32)).latents.shape == (1, 16, 4, 4)
    assert vae.config.scaling_factor != 1.0


def test_cells_may_have_32_pixels_a_side_and_crops_must_hold_whole_ones(command):
    folder = command("--latent-channels", "32", "--downsampling", "32", "--crop-size", "64", output="deep")
    vae = AutoencoderTiny.from_pretrained(folder)
    image = torch.rand(1, 3, 64, 96)
    assert encode_image(vae, image).shape == (1, 32, 2, 3)
    assert decode_latents(vae, encode_image(vae, image)).shape == image.shape
    with pytest.raises(ValueError, match="--crop-size to be a multiple of 32, got 48"):
        command("--downsampling", "32", "--crop-size", "48", output="odd")
    with pytest.raises(ValueError, match=r"one of \(8, 16, 32\), got 4"):
        nano_autoencoder(downsampling=4)
