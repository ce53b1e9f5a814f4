"""Images to latents and back, for every kind of VAE."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from milo_latent.files import read_image, read_latents, read_latents_metadata, write_image, write_latents
from milo_latent.latents.codec import decode_latents, encode_image, pad_image, vae_scale_factor
from milo_latent.latents.files import decode_file, encode_file, load_vae

# channels, scaling factor, shift factor, quantizing convolutions, as the published configurations say
FAMILIES = {
    "sd1": (4, 0.18215, None, True),
    "sd2": (4, 0.18215, None, True),
    "sdxl": (4, 0.13025, None, True),
    "sd3": (16, 1.5305, 0.0609, False),
    "flux": (16, 0.3611, 0.1159, False),
}
KINDS = ["tiny", *FAMILIES]


def make_vae(kind):
    torch.manual_seed(0)
    if kind == "tiny":
        widths, blocks = (8,) * 4, (1,) * 4
        return AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=blocks,
            num_decoder_blocks=blocks, scaling_factor=0.7,
        ).requires_grad_(False)  # fmt: skip
    channels, factor, shift, quantizes = FAMILIES[kind]
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, scaling_factor=factor, shift_factor=shift,
        use_quant_conv=quantizes, use_post_quant_conv=quantizes,
    ).requires_grad_(False)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_shifted_and_scaled_mode(kind):
    vae = make_vae(kind)
    image = torch.rand(2, 3, 24, 40)
    latents, encoded = encode_image(vae, image), vae.encode(image * 2 - 1)
    raw = encoded.latents if kind == "tiny" else encoded.latent_dist.mean
    channels, factor, shift, _ = FAMILIES.get(kind, (4, 0.7, None, None))
    assert latents.shape == (2, channels, 3, 5)
    assert torch.allclose(latents, (raw - (shift or 0.0)) * factor, atol=1e-6)
    decoded = decode_latents(vae, latents)
    assert torch.allclose(decoded, (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_latents_record_the_padding_and_decoding_undoes_it(kind, tmp_path):
    vae, sides = make_vae(kind), (21, 38)
    write_image(tmp_path / "photo.png", torch.rand(1, 3, *sides))
    shape = encode_file(vae, tmp_path / "photo.png", tmp_path / "a.safetensors", vae_name=kind)
    metadata = read_latents_metadata(tmp_path / "a.safetensors")
    assert shape == (vae.config.latent_channels, 3, 5)
    assert (metadata["source_size"], metadata["padding"]) == ("38x21", "2x3")
    assert float(metadata["scaling_factor"]) == vae.config.scaling_factor
    assert float(metadata["shift_factor"]) == (FAMILIES.get(kind, (0, 0, None))[2] or 0.0)
    assert decode_file(vae, tmp_path / "a.safetensors", tmp_path / "back.png") == sides[::-1]
    whole = decode_latents(vae, read_latents(tmp_path / "a.safetensors"))[..., : sides[0], : sides[1]]
    assert (read_image(tmp_path / "back.png") - whole).abs().max() <= 0.5 / 255 + 1e-6  # rounded to 8 bit, not moved


def test_files_that_do_not_describe_their_latents_are_refused(tmp_path):
    vae = make_vae("flux")
    latents = torch.rand(1, 16, 3, 5)
    for key, value, match in (
        ("source_size", "41x20", "at most 40x24"),
        ("source_size", "0x7", "WIDTHxHEIGHT"),
        ("source_size", "large", "WIDTHxHEIGHT"),
        ("shift_factor", "0.0609", "shift factor 0.1159"),
        ("scaling_factor", "1.5305", "scaling factor 0.3611"),
    ):
        write_latents(tmp_path / "a.safetensors", latents, metadata={key: value})
        with pytest.raises(ValueError, match=match):
            decode_file(vae, tmp_path / "a.safetensors", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def photo_like():
    """Smooth colours and edges, (1, 3, 408, 560), in [0, 1]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 408), torch.linspace(0, 1, 560), indexing="ij")
    image = torch.stack([rows, columns, 0.5 + 0.5 * torch.sin(20 * rows * columns)])
    image[:, 150:300, 200:400] = 1 - image[:, 150:300, 200:400]
    return (image[None] + 0.03 * torch.randn(1, 3, 408, 560)).clamp(0, 1)


@pytest.mark.parametrize("source", ["random", "nano"])
def test_tiles_of_autoencoder_tiny_equal_the_whole(source):
    vae = load_vae("nano") if source == "nano" else make_vae("tiny")
    torch.manual_seed(0)
    image = photo_like()
    with torch.inference_mode():
        latents = encode_image(vae, image)
        assert (encode_image(vae, image, tile=320) - latents).abs().max() < 1e-4
        assert (decode_latents(vae, latents, tile=320) - decode_latents(vae, latents)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_tiles_of_autoencoder_kl_keep_the_stated_tolerances_and_are_closer_than_those_of_diffusers(kind):
    vae = make_vae(kind)
    torch.manual_seed(0)
    image = photo_like()
    with torch.inference_mode():
        latents, ours = encode_image(vae, image), encode_image(vae, image, tile=320)
        whole, our_image = decode_latents(vae, latents), decode_latents(vae, latents, tile=320)
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 320, 40
        theirs, their_image = encode_image(vae, image), decode_latents(vae, latents)
    assert our_image.shape == whole.shape
    # no tiles are exact where a network normalises over all of the image; the docstring states these tolerances
    assert distance(ours, latents) < 0.9 * latents.std()
    assert distance(our_image, whole) < 0.15
    assert distance(ours, latents) < distance(theirs, latents)
    assert distance(our_image, whole) < distance(their_image, whole)


def distance(left, right):
    return (left - right).square().mean().sqrt()


def test_tiles_bound_what_the_vae_sees_at_once(monkeypatch):
    vae, seen = make_vae("tiny"), []
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda image: seen.append(image.shape[2:]) or real(image))
    latents = encode_image(vae, torch.rand(1, 3, 401, 600), tile=320)
    assert latents.shape == (1, 4, 51, 75)
    assert len(seen) > 3
    assert all(max(sides) <= 320 for sides in seen)
    seen.clear()
    encode_image(vae, torch.rand(1, 3, 320, 300), tile=320)
    assert seen == [(320, 304)]


@pytest.mark.parametrize("tile", [100, 64, 0, -8])
def test_tiles_that_do_not_fit_are_refused(tile):
    with pytest.raises(ValueError, match="`tile` of at least 320"):
        encode_image(make_vae("tiny"), torch.rand(1, 3, 400, 400), tile=tile)
    with pytest.raises(ValueError, match="`tile` of at least 320"):
        decode_latents(make_vae("tiny"), torch.rand(1, 4, 50, 50), tile=tile)


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
    vae = make_vae("sd1").to(torch.bfloat16)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        first, second = encode_image(vae, image), encode_image(vae, image)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)


def test_tensors_that_are_no_images_or_latents_are_refused():
    vae = make_vae("tiny")
    with pytest.raises(ValueError, match="3 channels"):
        encode_image(vae, torch.rand(1, 1, 16, 16))
    with pytest.raises(TypeError, match="floating point"):
        encode_image(vae, torch.zeros(1, 3, 16, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match="4 channels"):
        decode_latents(vae, torch.rand(1, 16, 4, 4))
