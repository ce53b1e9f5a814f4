"""Images to latents and back, for every kind of VAE."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from milo_latent.codec import decode_latents, encode_image, pad_image, vae_scale_factor


def make_vae(kind):
    torch.manual_seed(0)
    if kind == "tiny":
        widths, blocks = (8,) * 4, (1,) * 4
        return AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=blocks,
            num_decoder_blocks=blocks, scaling_factor=0.7,
        )  # fmt: skip
    channels, shift = {"sd": (4, None), "flux": (16, 0.1159)}[kind]
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, scaling_factor=0.18215, shift_factor=shift,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["tiny", "sd", "flux"])
def test_latents_are_the_shifted_and_scaled_mode(kind):
    vae = make_vae(kind)
    image = torch.rand(2, 3, 24, 40)
    with torch.no_grad():
        latents = encode_image(vae, image)
        encoded = vae.encode(image * 2 - 1)
        raw = encoded.latents if kind == "tiny" else encoded.latent_dist.mean
    shift = {"flux": 0.1159}.get(kind, 0.0)
    factor = 0.7 if kind == "tiny" else 0.18215
    assert torch.allclose(latents, (raw - shift) * factor, atol=1e-6)
    with torch.no_grad():
        decoded = decode_latents(vae, latents)
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoded, expected, atol=1e-5)


def test_any_size_is_padded_to_whole_cells():
    vae = make_vae("tiny")
    assert vae_scale_factor(vae) == 8
    with torch.no_grad():
        assert encode_image(vae, torch.rand(1, 3, 17, 30)).shape == (1, 4, 3, 4)


def test_padding_repeats_the_border_and_cuts_off_again():
    image = torch.rand(1, 3, 5, 9)
    padded = pad_image(image, 8, smallest=20)
    assert padded.shape == (1, 3, 24, 24)
    assert torch.equal(padded[..., :5, :9], image)
    assert torch.equal(padded[..., 23, :9], image[..., 4, :])
    assert torch.equal(pad_image(image, 1), image)


def test_encoding_is_deterministic_and_follows_the_dtype():
    vae = make_vae("sd").to(torch.bfloat16)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        first, second = encode_image(vae, image), encode_image(vae, image)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)


def test_what_is_no_image_or_no_latents_is_refused():
    vae = make_vae("tiny")
    with pytest.raises(ValueError, match="3 channels"):
        encode_image(vae, torch.rand(1, 1, 16, 16))
    with pytest.raises(TypeError, match="floating point"):
        encode_image(vae, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 channels"):
        decode_latents(vae, torch.rand(1, 16, 4, 4))
