"""Guidance on diffusers' transformers, whose latents are packed or have more channels; tiny random networks."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Flow

from milo_latent import MILO, MILOGuidance
from milo_latent.latents.codec import decode_latents, encode_image
from milo_latent.latents.spaces import LatentSpace, unpack_latents
from milo_latent.testing import generator

TOKENS, WIDTH = 3, 8
HEADS = {"attention_head_dim": 8, "num_attention_heads": 1}
ROTARY = {"axes_dims_rope": (2, 2, 4)}


def kl(channels=4, *, cls="AutoencoderKL", **options):
    return getattr(diffusers, cls)(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, **options,
    )  # fmt: skip


def embeds(*shape, seed=3):
    return torch.randn(1, *shape, generator=generator(seed))


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=16, in_channels=16, out_channels=16, num_layers=1, joint_attention_dim=WIDTH,
        caption_projection_dim=8, pooled_projection_dim=WIDTH, pos_embed_max_size=16,
    )  # fmt: skip
    parts = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    vae = kl(16, scaling_factor=1.5305, shift_factor=0.0609)
    pipe = diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=Flow(shift=3.0), **parts)
    prompt = {"prompt_embeds": embeds(TOKENS, WIDTH), "pooled_prompt_embeds": embeds(WIDTH)}
    return pipe, prompt | {f"negative_{name}": -each for name, each in prompt.items()} | {"guidance_scale": 3.0}, 32


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        **HEADS, **ROTARY, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    vae = kl(scaling_factor=0.3611, shift_factor=0.1159)
    pipe = diffusers.FluxPipeline(transformer=transformer, vae=vae, scheduler=Flow(use_dynamic_shifting=True), **parts)
    return pipe, {"prompt_embeds": embeds(TOKENS, WIDTH), "pooled_prompt_embeds": embeds(WIDTH)}, 32


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        **HEADS, axes_dims_rope=(2, 2, 2, 2), in_channels=16, num_layers=1, num_single_layers=1,
        joint_attention_dim=WIDTH, timestep_guidance_channels=8,
    )  # fmt: skip
    vae = kl(cls="AutoencoderKLFlux2")
    vae.bn.running_mean.normal_(generator=generator(1))
    vae.bn.running_var.uniform_(0.5, 2.0, generator=generator(2))
    pipe = diffusers.Flux2Pipeline(
        transformer=transformer, vae=vae, scheduler=Flow(use_dynamic_shifting=True), text_encoder=None, tokenizer=None
    )
    return pipe, {"prompt_embeds": embeds(TOKENS, WIDTH)}, 64


def qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        **HEADS, **ROTARY, in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=WIDTH
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.5] * 4,
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer, vae=vae, scheduler=Flow(use_dynamic_shifting=True), text_encoder=None, tokenizer=None
    )
    prompt = {"prompt_embeds": embeds(TOKENS, WIDTH), "prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.long)}
    negative = {
        "negative_prompt_embeds": embeds(TOKENS, WIDTH, seed=4),
        "negative_prompt_embeds_mask": torch.ones(1, TOKENS).long(),
    }
    return pipe, prompt | negative | {"true_cfg_scale": 3.0}, 32


def masked_prompt():
    prompt = {"prompt_embeds": embeds(TOKENS, WIDTH), "prompt_attention_mask": torch.ones(1, TOKENS)}
    negative = {
        "negative_prompt_embeds": embeds(TOKENS, WIDTH, seed=4),
        "negative_prompt_attention_mask": torch.ones(1, TOKENS),
    }
    return prompt | negative | {"negative_prompt": None, "guidance_scale": 3.0, "use_resolution_binning": False}


def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        **HEADS, sample_size=16, num_layers=1, cross_attention_dim=8, caption_channels=WIDTH, norm_num_groups=4
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=kl(scaling_factor=0.5), scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    return pipe, masked_prompt(), 32


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=8, out_channels=8, num_layers=1, num_cross_attention_heads=1, cross_attention_head_dim=8,
        cross_attention_dim=8, caption_channels=WIDTH, sample_size=16,
    )  # fmt: skip
    widths, blocks = (8, 8), ("ResBlock",) * 2
    vae = diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((),) * 2, decoder_qkv_multiscales=((),) * 2,
        scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    return pipe, masked_prompt() | {"complex_human_instruction": None}, 32


@pytest.fixture(params=[sd3, flux, flux2, qwen, pixart, sana], ids=lambda make: make.__name__)
def stock(request):
    """A pipeline; how it is called, for latents or an image; scaled latents of an image, (1, C, 16, 16)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, options, side = request.param()
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)

    def call(output_type="latent", **more):
        call_options = options | {"height": side, "width": side, "num_inference_steps": 3} | more
        return pipe(**call_options, generator=generator(), output_type=output_type).images

    return pipe, call, encode_image(pipe.vae, torch.rand(1, 3, side, side, generator=generator(5)))


def guide_for(pipe, reference, milo_scale, **options):
    space = LatentSpace(pipe.vae)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        metric = MILO(channels=space.channels, latent_space="test", scaling_factor=space.scaling_factor).frozen()
    return MILOGuidance(metric, milo_scale, "constant", reference_latents=reference, **options)


def test_attached_it_reaches_the_reference_and_at_zero_changes_no_bit(stock):
    pipe, call, reference = stock
    before = call()
    with guide_for(pipe, reference, 1.0).attach(pipe):
        end = call()
    assert end.shape == before.shape
    assert (unpack_latents(end, reference.shape[1:]) - reference).abs().max() < 2e-5 * reference.abs().max()
    with guide_for(pipe, reference, 0.0, trace=True).attach(pipe) as off:
        assert torch.equal(call(), before)
    assert len(off.trace) == 3
    assert torch.equal(call(), before)


def test_decoded_latents_are_the_image_of_the_pipeline(stock):
    pipe, call, reference = stock
    latents = unpack_latents(call(), reference.shape[1:])
    assert torch.equal(decode_latents(pipe.vae, latents), call(output_type="pt"))


def test_a_reference_of_another_size_or_another_space_is_refused(stock):
    pipe, call, reference = stock
    with (
        pytest.raises(ValueError, match="Encode the reference image at the pipeline's size, with its own VAE"),
        guide_for(pipe, reference[..., :-2], 0.5).attach(pipe),
    ):
        call()
    metric = MILO(channels=reference.shape[1], latent_space="test", scaling_factor=0.9).frozen()
    with pytest.raises(ValueError, match=rf"got {type(pipe).__name__} with {reference.shape[1]} channels"):
        MILOGuidance(metric, reference_latents=reference).attach(pipe).__enter__()
