"""Every VAE class gives, bit for bit, the latents of diffusers' own pipelines; tiny random networks."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from milo_latent.files import read_latents, read_latents_metadata, write_image, write_latents
from milo_latent.latents.codec import check_tile, decode_latents, encode_image
from milo_latent.latents.files import decode_file, encode_file, load_vae
from milo_latent.latents.spaces import KINDS, LatentSpace, pack_latents, unpack_latents
from milo_latent.testing import generator

SIDE = 64
IMAGE = torch.rand(1, 3, SIDE, SIDE, generator=generator(5))


def statistics(channels):
    return {"latents_mean": [0.1 * each for each in range(channels)], "latents_std": [1.5] * channels}


def kl(channels=4, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, **options,
    )  # fmt: skip


def tiny():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )  # fmt: skip


def asymmetric():
    return diffusers.AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_out_channels=(8, 8), up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def consistency():
    return diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8), encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=4, decoder_block_out_channels=(32, 32), decoder_layers_per_block=1,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip


def dc():
    widths, blocks = (8,) * 4, ("ResBlock",) * 4
    return diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.41407,
    )  # fmt: skip


def flux2():
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    vae.bn.running_mean.normal_(generator=generator(1))
    vae.bn.running_var.uniform_(0.5, 2.0, generator=generator(2))
    return vae


def video(name, channels=4, **options):
    shape = {"base_dim": 8, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return getattr(diffusers, name)(
        **shape, temperal_downsample=[False, True, True], **statistics(channels), **options
    )  # fmt: skip


def vq():
    return diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip


def hunyuan():
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=32, scaling_factor=0.75,
    )  # fmt: skip


def bare(name, **parts):
    """Return a pipeline of the named class that has these parts only."""
    cls = getattr(diffusers, name)
    required = [each.name for each in inspect.signature(cls).parameters.values() if each.default is inspect._empty]
    keep = {"add_noise": lambda sample, *rest: sample, "scale_noise": lambda sample, *rest: sample}
    pipe = cls(**{each: None for each in required} | parts)
    pipe.scheduler = SimpleNamespace(**keep, config=SimpleNamespace(sigma_data=1.0))
    return pipe


def image_to_image(name):
    """Latents that an image-to-image pipeline begins with, before it adds noise."""

    def latents(vae, image):
        return bare(name, vae=vae).prepare_latents(image, None, 1, 1, torch.float32, torch.device("cpu"))

    return latents


def encoding(name):
    return lambda vae, image: bare(name, vae=vae)._encode_vae_image(image, None)


def of_frames(name):
    return lambda vae, image: encoding(name)(vae, image.unsqueeze(2)).squeeze(2)


def qwen21(vae, image):
    pipe = SimpleNamespace(vae=vae, latent_channels=4)  # its constructor needs a processor
    opaque = torch.cat([image, torch.ones_like(image[:, :1])], dim=1).unsqueeze(2)
    return diffusers.QwenImage21Pipeline._encode_vae_image(pipe, opaque, None).squeeze(2)


def sana(vae, image):
    pipe, side = bare("SanaSprintImg2ImgPipeline", vae=vae), image.shape[2]
    zero = torch.zeros(1)  # no noise
    return pipe.prepare_latents(image, zero, 1, 8, side, side, torch.float32, torch.device("cpu"), None)


def wan(vae, image):
    frames = image.unsqueeze(2)
    pipe = bare("WanVideoToVideoPipeline", vae=vae)
    return pipe.prepare_latents(frames, 1, 4, SIDE, SIDE, torch.float32, torch.device("cpu")).squeeze(2)


CASES = {
    "SD": (kl, image_to_image("StableDiffusionImg2ImgPipeline")),
    "SDXL": (lambda: kl(scaling_factor=0.13025), image_to_image("StableDiffusionXLImg2ImgPipeline")),
    "SDXL, mean": (lambda: kl(scaling_factor=0.5, **statistics(4)), image_to_image("StableDiffusionXLImg2ImgPipeline")),
    "SD3": (
        lambda: kl(16, scaling_factor=1.5305, shift_factor=0.0609), image_to_image("StableDiffusion3Img2ImgPipeline"),
    ),
    "Flux": (lambda: kl(16, scaling_factor=0.3611, shift_factor=0.1159), encoding("FluxImg2ImgPipeline")),
    "Tiny": (tiny, image_to_image("StableDiffusionImg2ImgPipeline")),
    "asymmetric": (asymmetric, image_to_image("StableDiffusionImg2ImgPipeline")),
    "consistency": (consistency, image_to_image("StableDiffusionImg2ImgPipeline")),
    "DC": (dc, sana),
    "Flux2": (flux2, encoding("Flux2Pipeline")),
    "Qwen": (lambda: video("AutoencoderKLQwenImage"), of_frames("QwenImageImg2ImgPipeline")),
    "Qwen 2.1": (lambda: video("AutoencoderKLQwenImage21", decoder_base_dim=8, scale_factor_spatial=8), qwen21),
    "Wan": (lambda: video("AutoencoderKLWan"), wan),
    "Kandinsky": (vq, lambda vae, image: vae.encode(image)["latents"]),
    "Hunyuan": (hunyuan, lambda vae, image: vae.encode(image).latent_dist.mode() * 0.75),  # its pipeline only decodes
}  # fmt: skip


NEWER = {"Qwen 2.1"} if not hasattr(diffusers, "QwenImage21Pipeline") else set()  # of releases after 0.40


@pytest.fixture(params=[name for name in CASES if name not in NEWER])
def case(request):
    make, latents = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = make()
    return vae.requires_grad_(False).eval(), latents


@pytest.fixture(autouse=True)
def _mode(monkeypatch):
    """Let pipelines that draw from the posterior take its mode."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def test_latents_are_bit_for_bit_those_of_the_pipeline(case):
    vae, latents = case
    space = LatentSpace(vae)
    expected = latents(vae, diffusers.image_processor.VaeImageProcessor().preprocess(IMAGE))
    ours = encode_image(vae, IMAGE)
    assert torch.equal(ours, expected)
    assert ours.shape == (1, space.channels, SIDE // space.factor, SIDE // space.factor)
    assert ours.std() > 0


def test_decoding_undoes_scaling(case):
    vae, _ = case
    space, latents = LatentSpace(vae), encode_image(vae, IMAGE)
    assert torch.allclose(space.scale(space.unscale(latents)), latents, atol=1e-5)
    assert decode_latents(vae, latents).shape == IMAGE.shape


def test_a_vae_of_an_unknown_class_is_refused_by_name_and_a_derived_one_is_known():
    with pytest.raises(ValueError, match=r"got OddVAE\. Known: AutoencoderKL, .*derived"):
        encode_image(type("OddVAE", (diffusers.ModelMixin,), {})(), IMAGE)
    derived = type("MyVAE", (diffusers.AutoencoderTiny,), {})
    assert LatentSpace(derived(num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)).name == "AutoencoderTiny"
    made = {LatentSpace(make()).name for name, (make, _) in CASES.items() if name not in NEWER}
    assert {name for name in KINDS if hasattr(diffusers, name)} == made


@pytest.mark.parametrize("name", ["SDXL, mean", "DC", "Flux2", "Qwen"])
def test_folders_and_files_of_latents_know_the_scale(name, tmp_path):
    vae = CASES[name][0]()
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_vae(tmp_path / "vae")
    write_image(tmp_path / "photo.png", IMAGE)
    file = tmp_path / "photo.safetensors"
    encode_file(loaded, tmp_path / "photo.png", file, vae_name=name)
    assert decode_file(loaded, file, tmp_path / "back.png") == (SIDE, SIDE)
    assert (read_latents(file) - encode_image(vae, IMAGE)).abs().max() < 0.1  # of 8 bits
    key = "scaling_factor" if name == "DC" else "normalization"
    write_latents(file, read_latents(file), metadata=read_latents_metadata(file) | {key: "0.5"})
    with pytest.raises(ValueError, match=f"{key.replace('_', ' ')} .*says 0.5. Use its VAE"):
        decode_file(loaded, file, tmp_path / "other.png")


def test_tiles_fit_every_size_of_cells():
    vae, image = flux2(), torch.rand(1, 3, 180, 150, generator=generator(5))
    with pytest.raises(ValueError, match="`tile` of at least 160"):
        encode_image(vae, image, tile=159)
    with torch.no_grad():
        latents = encode_image(vae, image, tile=160)
        assert latents.shape == (1, 16, 45, 38)
        assert decode_latents(vae, latents, tile=160).shape == (1, 3, 180, 152)
    deep = SimpleNamespace(config={"spatial_compression_ratio": 32})
    check_tile(type("AutoencoderDC", (SimpleNamespace,), {})(config=deep.config), 320)  # not 40 cells of 32 pixels


LATENTS = torch.randn(2, 4, 6, 8, generator=generator(6))
PACKED = {
    "Flux": (lambda latents: diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8), (2, 12, 16)),
    "Qwen": (lambda latents: diffusers.QwenImagePipeline._pack_latents(latents, 2, 4, 6, 8), (2, 12, 16)),
    "Flux2": (diffusers.Flux2Pipeline._pack_latents, (2, 48, 4)),
    "Qwen 2.1": (lambda latents: diffusers.QwenImage21Pipeline._pack_latents(latents, 2, 4, 6, 8), (2, 48, 4)),
    "one frame": (lambda latents: latents.unsqueeze(2), (2, 4, 1, 6, 8)),
    "plain": (lambda latents: latents, (2, 4, 6, 8)),
}


@pytest.mark.parametrize("name", [name for name in PACKED if name not in NEWER])
def test_packed_latents_are_unpacked_and_packed_as_pipelines_do(name):
    pack, shape = PACKED[name]
    packed = pack(LATENTS)
    assert packed.shape == shape
    assert torch.equal(unpack_latents(packed, LATENTS.shape[1:]), LATENTS)
    assert torch.equal(pack_latents(LATENTS, packed), packed)


@pytest.mark.parametrize("shape", [(2, 11, 16), (2, 12, 20), (2, 12, 3), (2, 4, 2, 6, 8), (2, 12)])
def test_packed_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"Expected packed latents of 4 x 6 x 8.*Encode the reference"):
        unpack_latents(torch.zeros(shape), (4, 6, 8))
