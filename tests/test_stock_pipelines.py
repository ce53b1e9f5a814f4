"""Guidance on diffusers' own pipelines, each of tiny random networks, with and without classifier-free guidance."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers import UNet2DConditionModel as UNet
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from milo_latent import MILO, MILOGuidance
from milo_latent.testing import generator, latent_pair, tiny_metric, tiny_pipeline

REFERENCE, _ = latent_pair()
WIDTH, TOKENS, SIDE = 8, 5, 32  # of the prompt embeddings; of the images in pixels
SHAPE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet(channels=4, **options):
    shape = {**SHAPE, "down_block_types": DOWN, "up_block_types": UP, "cross_attention_dim": WIDTH}
    return UNet(in_channels=channels, sample_size=64, attention_head_dim=4, **(shape | options))


def upscaler_unet():
    """Return the shape of the latent upscaler's UNet, which takes and returns preconditioned latents."""
    return UNet(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=(32, 32, 64, 64), in_channels=8,
        layers_per_block=1, time_cond_proj_dim=128 + WIDTH, conv_in_kernel=1, conv_out_kernel=1, out_channels=5,
        cross_attention_dim=WIDTH, mid_block_type=None,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier", timestep_post_act="gelu",
    )  # fmt: skip


def controlnet(**options):
    return ControlNetModel(
        **SHAPE, down_block_types=DOWN, cross_attention_dim=WIDTH, attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 8), **options,
    )  # fmt: skip


def vae(levels=2, scaling_factor=0.18215):
    return AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, scaling_factor=scaling_factor,
    )  # fmt: skip


def ddim():
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True)


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NO_TEXT_XL = NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None}


def image(side=SIDE):
    return torch.rand(1, 3, side, side, generator=generator(5))


IMAGE_TO_IMAGE = {"image": image(), "strength": 0.8}  # three of four steps


def prompts(*, pooled):
    embeds = torch.randn(1, TOKENS, WIDTH, generator=generator(3))
    both = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
    if pooled:
        both |= {"pooled_prompt_embeds": embeds[:, 0], "negative_pooled_prompt_embeds": -embeds[:, 0]}
    return both


def text_to_image():
    size = {"height": SIDE, "width": SIDE}
    return diffusers.StableDiffusionPipeline(vae=vae(), unet=unet(), scheduler=ddim(), **NO_TEXT, **NO_CHECKER), size


def image_to_image():
    parts = {"vae": vae(), "unet": unet(), "scheduler": ddim()}
    return diffusers.StableDiffusionImg2ImgPipeline(**parts, **NO_TEXT, **NO_CHECKER), IMAGE_TO_IMAGE


def inpaint():
    parts = {"vae": vae(), "unet": unet(9), "scheduler": ddim()}
    options = {"image": image(), "mask_image": torch.ones(1, 1, SIDE, SIDE), "height": SIDE, "width": SIDE}
    return diffusers.StableDiffusionInpaintPipeline(**parts, **NO_TEXT, **NO_CHECKER), options


def control():
    parts = {"vae": vae(), "unet": unet(), "controlnet": controlnet(), "scheduler": ddim()}
    return diffusers.StableDiffusionControlNetPipeline(**parts, **NO_TEXT, **NO_CHECKER), {"image": image()}


def control_image_to_image():
    parts = {"vae": vae(), "unet": unet(), "controlnet": controlnet(), "scheduler": ddim()}
    options = IMAGE_TO_IMAGE | {"control_image": image()}
    return diffusers.StableDiffusionControlNetImg2ImgPipeline(**parts, **NO_TEXT, **NO_CHECKER), options


def latent_upscale():
    parts = {"vae": vae(), "unet": upscaler_unet()}
    scheduler = EulerDiscreteScheduler(**SCHEDULE, prediction_type="sample")
    return diffusers.StableDiffusionLatentUpscalePipeline(**parts, scheduler=scheduler, **NO_TEXT), {"image": image(16)}


def upscale():
    """x4: its latents have the low-resolution image's size, and are those of its own VAE."""
    parts = {"vae": vae(3, 0.08333), "unet": unet(7, num_class_embeds=1000), "scheduler": ddim()}
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        **parts, low_res_scheduler=DDPMScheduler(), max_noise_level=350, **NO_TEXT
    )
    return pipeline, {"image": image(16)}


def image_to_image_xl():
    parts = {"vae": vae(2, 0.13025), "unet": unet(**XL), "scheduler": ddim()}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, **NO_TEXT_XL, requires_aesthetics_score=False)
    return pipeline, IMAGE_TO_IMAGE


def control_xl():
    parts = {"vae": vae(2, 0.13025), "unet": unet(**XL), "controlnet": controlnet(**XL), "scheduler": ddim()}
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, **NO_TEXT_XL), {"image": image()}


MAKERS = [
    text_to_image, image_to_image, inpaint, control, control_image_to_image, latent_upscale, upscale, image_to_image_xl,
    control_xl,
]  # fmt: skip


class Stock:
    """A stock pipeline and how to call it."""

    def __init__(self, make):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.pipe, self.options = make()
        self.pipe.set_progress_bar_config(disable=True)
        self.options = self.options | prompts(pooled="XL" in type(self.pipe).__name__ or make is latent_upscale)

    def __call__(self, guidance_scale=3.0, steps=4, **options):
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "generator": generator()} | options
        return self.pipe(**(self.options | options), output_type="latent").images


def metric_for(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MILO(channels=4, latent_space="test", scaling_factor=pipe.vae.config.scaling_factor).frozen()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["without cfg", "with cfg"])
@pytest.mark.parametrize("make", MAKERS)
def test_attached_to_a_stock_pipeline_it_guides_every_step_and_leaves_it_as_it_was(make, guidance_scale):
    stock = Stock(make)
    before = stock(guidance_scale)
    assert before.shape == REFERENCE.shape
    guide = MILOGuidance(metric_for(stock.pipe), 1.0, "constant", reference_latents=REFERENCE)
    with guide.attach(stock.pipe):
        ends = [stock(guidance_scale), stock(guidance_scale)]
    for end in ends:
        assert (end - REFERENCE).abs().max() < 2e-5
    assert torch.equal(stock(guidance_scale), before)
    with MILOGuidance(metric_for(stock.pipe), 0.0, reference_latents=REFERENCE, trace=True).attach(stock.pipe) as off:
        assert torch.equal(stock(guidance_scale), before)
    assert len(off.trace) == (3 if "Img2Img" in type(stock.pipe).__name__ else 4)


@pytest.mark.parametrize("make", MAKERS)
def test_half_strength_lies_between(make):
    stock = Stock(make)
    guide = MILOGuidance(metric_for(stock.pipe), 0.4, reference_latents=REFERENCE)
    with guide.attach(stock.pipe):
        guided = stock()
    assert 0.0 < (guided - REFERENCE).abs().mean() < (stock() - REFERENCE).abs().mean()


def test_a_pipeline_of_another_latent_space_is_refused():
    sd, xl = Stock(image_to_image), Stock(image_to_image_xl)
    guide = MILOGuidance(metric_for(sd.pipe), reference_latents=REFERENCE)
    with pytest.raises(ValueError, match=r"StableDiffusionXLImg2ImgPipeline with 4 channels, scaling factor 0\.13025"):
        guide.attach(xl.pipe).__enter__()


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
def test_progress_reaches_one_from_the_middle_of_a_schedule_with_half_steps(scheduler):
    stock, seen = Stock(image_to_image), []
    stock.pipe.scheduler = getattr(diffusers, scheduler)(**SCHEDULE)
    guide = MILOGuidance(
        tiny_metric(), 0.4, lambda progress: seen.append(progress) or progress, reference_latents=REFERENCE
    )
    with guide.attach(stock.pipe):
        stock(steps=8, strength=0.6)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert len(seen) == stock.pipe.num_timesteps


def test_the_guide_of_the_docs_is_short_and_works_in_all_ways(repository):
    text = (repository / "docs" / "guidance.md").read_text()
    code = text.partition("## A guide of your own")[2].partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) < 20
    names = {}
    exec(code, names)
    stock, reference = Stock(text_to_image), 3 * REFERENCE

    def way(latents):
        return torch.nn.functional.avg_pool2d(latents - reference, 4).abs().mean()

    guide, plain = names["CoarseGuide"](reference), stock()
    with guide.attach(stock.pipe):
        attached = stock()
    with pytest.warns(UserWarning, match="from the second step on"):
        late = stock(callback_on_step_end=guide)
    restored = tiny_pipeline()(
        image=image(128), callback_on_step_end=guide, output_type="latent", num_inference_steps=4
    )
    assert way(attached) < 0.8 * way(plain)
    assert way(attached) < way(late) < way(plain)
    assert torch.isfinite(restored.images).all()


# As a plain callback


class Stop(PipelineCallback):
    """Interrupts, or fails, after a step."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, after, error=None):
        self.after, self.error = after, error

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.after:
            if self.error:
                raise self.error
            pipeline._interrupt = True
        return callback_kwargs


def plain_guide(**options):
    return MILOGuidance(tiny_metric(), 1.0, "constant", reference_latents=REFERENCE, **options)


def test_as_a_plain_callback_it_starts_at_the_second_step_and_says_so():
    stock, guide = Stock(text_to_image), plain_guide(trace=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match="from the second step on"):
            guided = stock(callback_on_step_end=guide)
        assert (guided - REFERENCE).abs().max() < 2e-5
        assert len(guide.trace) == 3
        assert guide.trace.steps[0].timestep == stock.pipe.scheduler.timesteps[1]
        assert "step" not in vars(stock.pipe.scheduler)


@pytest.mark.filterwarnings("ignore:As a plain callback")
def test_it_composes_with_others_and_with_another_guide():
    stock = Stock(text_to_image)
    half = MILOGuidance(tiny_metric(), 0.5, "constant", reference_latents=-REFERENCE)
    both = stock(callback_on_step_end=MultiPipelineCallbacks([half, Stop(after=99), plain_guide()]))
    assert (both - REFERENCE).abs().max() < 2e-5  # the second has the last word
    other = stock(callback_on_step_end=MultiPipelineCallbacks([plain_guide(), half]))
    assert other.abs().max() < 2e-5  # half way from r to -r
    assert "step" not in vars(stock.pipe.scheduler)


@pytest.mark.filterwarnings("ignore:As a plain callback")
@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")], ids=["interrupted", "failed"])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_breaks_off_does_not_reach_into_the_next(error, first):
    stock = Stock(text_to_image)
    before, guide, stop = stock(), plain_guide(), Stop(after=1, error=error)
    callbacks = MultiPipelineCallbacks([guide, stop] if first else [stop, guide])
    if error:
        with pytest.raises(RuntimeError, match="out of memory"):
            stock(callback_on_step_end=callbacks)
    else:
        stock(callback_on_step_end=callbacks)
    assert torch.equal(stock(), before)  # not guided
    assert "step" not in vars(stock.pipe.scheduler)
    assert (stock(callback_on_step_end=guide) - REFERENCE).abs().max() < 2e-5
    other = Stock(image_to_image)
    with guide.attach(other.pipe):
        assert (other() - REFERENCE).abs().max() < 2e-5


@pytest.mark.filterwarnings("ignore:As a plain callback")
def test_a_network_that_fails_before_the_second_step_leaves_no_guidance_behind(monkeypatch):
    stock, fresh = Stock(text_to_image), Stock(text_to_image)
    guide = MILOGuidance(tiny_metric(), 0.4, reference_latents=REFERENCE)
    before, calls, forward = stock(), [], stock.pipe.unet.forward

    def fail_at_second(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    def broken_run():
        calls.clear()
        monkeypatch.setattr(stock.pipe.unet, "forward", fail_at_second)
        with pytest.raises(RuntimeError, match="out of memory"):
            stock(callback_on_step_end=guide)
        monkeypatch.undo()

    broken_run()
    assert torch.equal(stock(), before)  # not guided
    assert "step" not in vars(stock.pipe.scheduler)
    broken_run()
    with guide.attach(stock.pipe):
        attached = stock()
    with guide.attach(fresh.pipe):
        assert torch.equal(attached, fresh())  # guided once
    assert "step" not in vars(stock.pipe.scheduler)


def test_attached_it_is_gone_after_an_interrupted_run():
    stock, guide = Stock(text_to_image), plain_guide()
    before = stock()
    with guide.attach(stock.pipe):
        broken = stock(callback_on_step_end=Stop(after=1))
        whole = stock()
    assert not torch.equal(broken, whole)
    assert (whole - REFERENCE).abs().max() < 2e-5
    assert torch.equal(stock(), before)


def test_attached_and_as_a_callback_at_once_it_acts_once():
    stock = Stock(text_to_image)
    guide = MILOGuidance(tiny_metric(), 0.4, reference_latents=REFERENCE)
    with guide.attach(stock.pipe):
        assert torch.equal(stock(callback_on_step_end=guide), stock())


def test_sampling_never_decodes(monkeypatch):
    stock = Stock(text_to_image)
    monkeypatch.setattr(stock.pipe.vae, "decode", lambda *args, **kwargs: pytest.fail("decoded while sampling"))
    with MILOGuidance(tiny_metric(), reference_latents=REFERENCE, mode="metric").attach(stock.pipe):
        stock()


def test_a_batch_of_prompts_and_several_images_for_each_share_the_reference():
    stock = Stock(text_to_image)
    with plain_guide().attach(stock.pipe):
        ends = stock(num_images_per_prompt=3)
    assert (ends - REFERENCE).abs().max() < 2e-5
    assert ends.shape[0] == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_stay_in_their_dtype(dtype):
    stock = Stock(text_to_image)
    stock.pipe.to(dtype)
    stock.options = {name: each.to(dtype) if torch.is_tensor(each) else each for name, each in stock.options.items()}
    with plain_guide().attach(stock.pipe):
        end = stock()
    assert end.dtype == dtype
    assert (end - REFERENCE).abs().max() < (0.02 if dtype == torch.float16 else 0.1)  # rounding of their model outputs
