"""DiffBIRPipeline's options: tiles, prompts, starts, growing and rescaled guidance, one step, compiled networks."""

import copy
import dataclasses
import functools
import gc
import itertools
import math
import pickle
import shutil
import weakref
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from replay import replayed_noise

from milo_latent import DiffBIRPipeline
from milo_latent.diffbir import sampling
from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.foreign_cleaner import ForeignCleaner
from milo_latent.diffbir.prompts import PromptCache, listed
from milo_latent.diffbir.rules import OFFICIAL, RULES
from milo_latent.diffbir.schedulers import OFFICIAL_SAMPLERS, SolverScheduler, official_scheduler
from milo_latent.diffbir.swinir import SwinIR
from milo_latent.diffbir.tiles import STAGES, Tile, official_tiled
from milo_latent.guidance.coefficients import step_coefficients
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.guidance.region_adaptive import RegionAdaptiveGuidance
from milo_latent.guidance.x0 import predict_original_sample
from milo_latent.restoration.restore import restore_image
from milo_latent.testing import generator, tiny_metric

REPOSITORY = Path(__file__).resolve().parent.parent

NEEDS_NEWER_TORCH = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="group offloading without an accelerator needs torch 2.7"
)


def run(pipeline, image=None, **options):
    image = torch.rand(1, 3, 50, 70, generator=generator(5)) if image is None else image
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": generator()} | options
    return pipeline(image=image, **options).images


# Schedulers


@pytest.mark.parametrize("sampler", OFFICIAL_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_official_sampler_ends_at_a_clean_estimate_also_in_one_step(pipeline, sampler, steps):
    """The UNet's output is zero: with v-prediction, the estimate is the sample times its share of signal."""
    pipeline.scheduler = official_scheduler(sampler, rescale_betas_zero_snr=False)
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    torch.nn.init.zeros_(pipeline.unet.conv_out.bias)
    estimates, original = [], pipeline.scheduler.step

    @functools.wraps(original)
    def step(output, timestep, sample, **options):
        coefficients = step_coefficients(pipeline.scheduler, timestep)
        estimates.append(predict_original_sample(output, sample, coefficients))
        return original(output, timestep, sample, **options)

    pipeline.scheduler.step = step
    result = run(pipeline, num_inference_steps=steps, output_type="latent")
    assert len(estimates) == steps
    assert steps == 3 or pipeline.scheduler.timesteps.tolist() == [999]
    if sampler in ("ddim", "dpm++_m2"):  # which leave the noise of the first timestep
        assert (result - estimates[-1]).abs().mean() < 0.1 * result.abs().mean() + 0.05
    else:
        assert torch.allclose(result, estimates[-1], atol=1e-5)
    assert torch.equal(run(pipeline, num_inference_steps=steps, output_type="latent"), result)


def ancestral_noise(sigma, sigma_next):
    """Standard deviations of the noise that is added and of what is left of the old, k-diffusion's `up` and `down`."""
    up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return up, (sigma_next**2 - up**2) ** 0.5


def sampled_by_hand(solver, sigmas, sample, denoised, noises):
    """Run k-diffusion's `sample_euler_ancestral` or `sample_dpmpp_2m_sde` (midpoint), eta and s_noise 1."""
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        estimate = denoised[index]
        if following == 0:
            return estimate
        if solver == "euler_a":
            up, down = ancestral_noise(sigma, following)
            sample = sample + (sample - estimate) / sigma * (down - sigma) + noises[index] * up
            continue
        width = math.log(sigma / following)
        sample = following / sigma * math.exp(-width) * sample + (1 - math.exp(-2 * width)) * estimate
        if index:
            ratio = math.log(sigmas[index - 1] / sigma) / width
            sample = sample + 0.5 * (1 - math.exp(-2 * width)) / ratio * (estimate - denoised[index - 1])
        sample = sample + noises[index] * following * (1 - math.exp(-2 * width)) ** 0.5
    return sample


@pytest.mark.parametrize("solver", ["euler_a", "dpm++_2m_sde"])
def test_solvers_that_draw_noise_are_those_of_k_diffusion(solver):
    scheduler = SolverScheduler(solver=solver, prediction_type="sample")
    scheduler.set_timesteps(6)
    drawn = torch.randn(13, 1, 4, 5, 5, generator=generator(), dtype=torch.float64)
    start, denoised, noises = drawn[0] * scheduler.init_noise_sigma, drawn[1:7], drawn[7:]
    sample = start
    for timestep, estimate, noise in zip(scheduler.timesteps, denoised, noises, strict=True):
        sample = scheduler.step(estimate, timestep, sample, variance_noise=noise).prev_sample
        if scheduler.step_index == 5:
            expected = sampled_by_hand(solver, scheduler.sigmas[:6].tolist(), start, denoised, noises)
            assert torch.allclose(sample, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sample, denoised[-1], atol=1e-6)


@pytest.mark.parametrize("solver", ["euler_a", "dpm++_2m_sde", "dpm++_3m_sde"])
def test_drawn_noise_is_unit_noise_of_the_generator_and_eta_scales_it(solver):
    ends = []
    for eta in (1.0, 0.5, 0.0):
        scheduler = SolverScheduler(solver=solver, prediction_type="sample", eta=eta)
        scheduler.set_timesteps(4)
        estimate, sample = torch.zeros(1, 4, 64, 64), torch.zeros(1, 4, 64, 64)
        ends.append(scheduler.step(estimate, scheduler.timesteps[0], sample, generator=generator(3)).prev_sample)
    noise = torch.randn(1, 4, 64, 64, generator=generator(3))
    assert torch.allclose(ends[0] / ends[0].std() * noise.std(), noise, atol=1e-4)
    sigma, following = SolverScheduler(), None
    sigma.set_timesteps(4)
    sigma, following = (float(each) for each in sigma.sigmas[:2])
    expected = [
        eta * ancestral_noise(sigma, following)[0]
        if solver == "euler_a"
        else following * (1 - (following / sigma) ** (2 * eta)) ** 0.5
        for eta in (1.0, 0.5)
    ]
    assert [(end / noise).median().item() for end in ends[:2]] == pytest.approx(expected, rel=1e-4)
    assert (ends[2] == 0).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_betas_of_our_solvers_are_those_of_diffusers(schedule):
    betas = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": schedule}
    for zero in (False, True):
        ours, theirs = (cls(**betas, rescale_betas_zero_snr=zero) for cls in (SolverScheduler, DDIMScheduler))
        assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)


def test_one_step_of_a_spacing_that_starts_at_the_end_starts_from_the_noise(pipeline):
    for scheduler, spacing in [
        (DDIMScheduler, "leading"),
        (DDPMScheduler, "linspace"),
        (EulerDiscreteScheduler, "linspace"),
    ]:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        run(pipeline, num_inference_steps=1)
        assert pipeline.scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_one_step_of_a_scheduler_that_takes_no_timesteps_starts_from_the_noise(pipeline, name, spacing):
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    pipeline.scheduler = scheduler
    run(pipeline, num_inference_steps=1)
    assert scheduler.timesteps[0] == 999
    assert scheduler.sigmas.max() > 14
    assert scheduler.config.timestep_spacing == spacing
    run(pipeline, num_inference_steps=3)
    fresh = getattr(diffusers, name).from_config(scheduler.config)
    fresh.set_timesteps(3)
    assert torch.equal(scheduler.timesteps, fresh.timesteps)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_one_step_of_schedulers_whose_timesteps_are_noise_levels(pipeline, name):
    pipeline.scheduler = getattr(diffusers, name)()
    assert torch.isfinite(run(pipeline, num_inference_steps=1)).all()


def test_schedulers_that_cannot_work_are_refused_before_anything_runs(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.cleaner, "forward", lambda image: pytest.fail("cleaned"))
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler, which is for flow matching"):
        run(pipeline)
    monkeypatch.undo()
    pipeline.scheduler = diffusers.PNDMScheduler()
    for steps in (1, 3):
        with pytest.raises(ValueError, match=rf"4 steps or more .*PNDMScheduler, got {steps}.*skip_prk_steps=True"):
            run(pipeline, num_inference_steps=steps)
    assert torch.isfinite(run(pipeline, num_inference_steps=4)).all()


@pytest.mark.parametrize("sampler", OFFICIAL_SAMPLERS)
def test_a_scheduler_made_from_an_official_ones_configuration_does_not_clip_latents(sampler):
    assert DDIMScheduler.from_config(official_scheduler(sampler).config).config.clip_sample is False
    assert DDIMScheduler.from_config(SolverScheduler().config).config.beta_schedule == "scaled_linear"


def test_our_schedulers_are_saved_and_opened(pipeline, tmp_path):
    pipeline.scheduler = official_scheduler("edm_dpm++_3m_sde", prediction_type="epsilon", rescale_betas_zero_snr=False)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffBIRPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, SolverScheduler)
    assert loaded.scheduler.config.solver == "dpm++_3m_sde"
    assert loaded.scheduler.config.sigma_max == 1e4
    assert isinstance(DDIMScheduler.from_config(loaded.scheduler.config), DDIMScheduler)


def test_the_first_noise_is_the_schedules_own_unless_it_is_infinite():
    own, infinite = SolverScheduler(), SolverScheduler(rescale_betas_zero_snr=True)
    for scheduler in (own, infinite):
        scheduler.set_timesteps(10)
    assert float(own.sigmas[0]) == pytest.approx(14.61, abs=0.01)
    assert float(infinite.sigmas[0]) == 1e4


def test_milo_guidance_works_with_our_schedulers(pipeline):
    guide = MILOGuidance(tiny_metric(), milo_scale=0.5)
    for sampler in ("edm_dpm++_3m_sde", "dpm++_m2", "spaced"):
        pipeline.scheduler = official_scheduler(sampler, prediction_type="epsilon", rescale_betas_zero_snr=False)
        guided, free = (run(pipeline, output_type="latent", callback_on_step_end=each) for each in (guide, None))
        assert torch.isfinite(guided).all()
        assert not torch.allclose(guided, free)


@pytest.mark.parametrize("solver", ["euler", "dpm++_2m", "dpm++_2m_sde", "dpm++_3m_sde"])
def test_solvers_reach_a_clean_estimate_that_never_changes(solver):
    clean = torch.randn(1, 4, 8, 8, generator=generator(1))
    scheduler = SolverScheduler(prediction_type="sample", solver=solver)
    scheduler.set_timesteps(6)
    sample = torch.randn(1, 4, 8, 8, generator=generator(2)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.step(clean, timestep, sample, generator=generator(3)).prev_sample
    assert torch.allclose(sample, clean, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SolverScheduler(solver="magic"), "`solver`"),
        (lambda: SolverScheduler(grid="none"), "`grid`"),
        (lambda: official_scheduler("plms"), "`sampler`"),
        (lambda: SolverScheduler().set_timesteps(0), "1 to 1000 steps"),
        (lambda: official_scheduler("spaced").set_timesteps(1001), "1 to 1000 steps"),
    ],
)
def test_schedulers_refuse_what_they_cannot_do(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Starts and guidance scales


@pytest.mark.parametrize(("compatibility", "timestep"), [(None, 750), ("official", 999)])
def test_a_run_that_starts_from_the_condition_noises_it_to_the_timestep_of_its_rules(pipeline, compatibility, timestep):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    seen, noise = [], torch.randn(1, 4, 16, 16, generator=generator(1))
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    conditions = []
    pipeline.controlnet.register_forward_pre_hook(
        lambda module, arguments, options: conditions.append(options["controlnet_cond"]), with_kwargs=True
    )
    image, options = torch.rand(1, 3, 128, 128), {"num_inference_steps": 4, "latents": noise}
    run(pipeline, image, start_point="cond", compatibility=compatibility, **options)
    expected = sampling.add_noise(conditions[0], noise, pipeline.scheduler, timestep)
    assert torch.allclose(seen[0], expected, atol=1e-6)


def test_starting_from_the_condition_or_with_a_noised_one_changes_the_result(pipeline):
    free = run(pipeline)
    for options in ({"start_point": "cond"}, {"noise_aug": 400}):
        assert not torch.allclose(run(pipeline, **options), free)
        assert torch.equal(run(pipeline, **options), run(pipeline, **options))


def test_the_official_rules_noise_the_condition_to_the_last_timestep_the_default_to_the_first_of_the_run(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    pipeline.scheduler.set_timesteps(4)
    reference, noise = (torch.randn(1, 4, 16, 16, generator=generator(index)) for index in range(2))
    for compatibility, timestep in ((None, 750), ("official", 999)):
        start = pipeline.prepare_latents(reference, latents=noise, start_point="cond", compatibility=compatibility)
        assert torch.equal(start, sampling.add_noise(reference, noise, pipeline.scheduler, timestep))


def test_the_noise_is_drawn_in_a_known_order(pipeline):
    pipeline.scheduler = official_scheduler("spaced", prediction_type="epsilon", rescale_betas_zero_snr=False)
    drawn = [torch.randn(1, 4, 16, 16, generator=generator(index)) for index in range(4)]
    with replayed_noise(drawn):  # start, augmentation, first step; the last step draws none
        result = run(pipeline, noise_aug=100)
    assert torch.isfinite(result).all()
    with replayed_noise(drawn[:2]), pytest.raises(ValueError, match="to replay, got none"):
        run(pipeline, noise_aug=100)
    with replayed_noise([drawn[0][..., 1:]]), pytest.raises(ValueError, match=r"got \(1, 4, 16, 15\)"):
        run(pipeline)


def test_rescaled_guidance_keeps_the_standard_deviation():
    without, with_prompt = (torch.randn(2, 4, 8, 8, generator=generator(index)) for index in range(2))
    guided = sampling.extrapolate(without, with_prompt, scale=7.0, rescale=1.0)
    assert torch.allclose(guided.std(dim=(1, 2, 3)), with_prompt.std(dim=(1, 2, 3)), rtol=1e-4)
    assert torch.equal(sampling.extrapolate(without, with_prompt, scale=1.0), without + (with_prompt - without))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start_point": "image"}, "`start_point`"),
        ({"noise_aug": 1000}, "`noise_aug`"),
        ({"guidance_rescale": 2.0}, "`guidance_rescale`"),
        ({"compatibility": "old"}, "`compatibility`"),
    ],
)
def test_options_that_cannot_work_are_refused(pipeline, options, match):
    with pytest.raises(ValueError, match=match):
        run(pipeline, **options)


def test_the_official_picture_is_cut_to_8_bit_not_rounded(pipeline, monkeypatch):
    cut = run(pipeline, compatibility="official")
    monkeypatch.setitem(RULES, "official", dataclasses.replace(OFFICIAL, quantize=lambda image: image))
    exact = run(pipeline, compatibility="official")
    assert torch.equal(cut, (exact * 255).floor() / 255)
    assert not torch.allclose(cut, (exact * 255).round() / 255, atol=1e-3)
    own = 255 * run(pipeline)
    assert not torch.allclose(own, own.round(), atol=1e-2)  # the default keeps values between those of 8 bits
    assert OFFICIAL.quantize(torch.tensor([0.0, 0.499, 0.9999, 1.0, 1.2])).mul(255).round().tolist() == [
        0, 127, 254, 255, 255,
    ]  # fmt: skip


# Prompts


class CountingEncoder(torch.nn.Module):
    """Stands for CLIP: embeds each text by its length, and counts the texts."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, ids):
        self.seen += len(ids)
        return (ids.float()[..., None].expand(-1, -1, 8) / 10,)


class Lengths:
    model_max_length = 5

    def __call__(self, texts, **options):
        return type("Tokens", (), {"input_ids": torch.tensor([[len(text)] * 5 for text in texts])})


def test_each_prompt_is_encoded_once():
    cache, encoder = PromptCache(size=2), CountingEncoder().eval()
    encode = lambda *texts: cache.encode(list(texts), encoder, Lengths(), torch.device("cpu"))  # noqa: E731
    first = encode("a", "bb", "a")
    assert encoder.seen == 2
    assert torch.equal(encode("a", "bb", "a"), first)
    assert encoder.seen == 2
    encode("ccc")  # drops the oldest
    encode("a")
    assert encoder.seen == 4
    other = CountingEncoder().eval()
    cache.encode(["ccc"], other, Lengths(), torch.device("cpu"))
    assert other.seen == 1


@pytest.mark.parametrize("changing", ["training", "a LoRA"])
def test_prompts_are_encoded_anew_while_the_text_encoder_changes_and_after(changing):
    cache, encoder = PromptCache(), CountingEncoder().eval()
    encode = lambda: cache.encode(["a"], encoder, Lengths(), torch.device("cpu"))  # noqa: E731
    encode()
    if changing == "training":
        encoder.train()
    else:
        encoder.peft_config = {"default": None}
    encode(), encode()
    assert encoder.seen == 3
    encoder.eval()
    encoder.peft_config = None
    encode(), encode()
    assert encoder.seen == 4


def test_a_text_encoder_can_be_removed_and_its_prompts_are_kept():
    cache, encoder = PromptCache(), CountingEncoder().eval()
    encode = lambda text, given: cache.encode([text], given, Lengths(), torch.device("cpu"))  # noqa: E731
    before, alive = encode("a", encoder), weakref.ref(encoder)
    del encoder
    gc.collect()
    assert alive() is None
    assert pickle.loads(pickle.dumps(cache)).size == cache.size
    assert torch.equal(encode("a", None), before)
    with pytest.raises(ValueError, match="no text encoder for 'b'"):
        encode("b", None)


def test_stored_prompts_come_along_however_the_pipeline_is_opened(prompted, tmp_path):
    prompted.prompt_cache.stored = {"": torch.randn(1, 5, 8, generator=generator())}
    expected = run(prompted)
    prompted.save_pretrained(tmp_path)
    own = DiffBIRPipeline.from_pretrained(tmp_path)
    custom = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(REPOSITORY / "pipelines" / "diffbir.py"), trust_remote_code=True
    )
    copied = copy.deepcopy(own)
    custom.prompt_cache  # noqa: B018 (read with its first use)
    shutil.rmtree(tmp_path)
    for each in (own, custom, DiffBIRPipeline.from_pipe(own), copied):
        assert torch.allclose(run(each), expected, atol=1e-5)


def test_a_cleaner_that_cannot_be_saved_is_not_left_out_silently(pipeline, tmp_path):
    network = torch.nn.Conv2d(3, 3, 1)
    pipeline.cleaner = ForeignCleaner(network, network, scale=1)
    with pytest.raises(ValueError, match=r"got ForeignCleaner.*register_modules\(cleaner=None\)"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_prompts_that_a_folder_stores_need_no_text_encoder(prompted):
    stored = torch.randn(1, 5, 8, generator=generator())
    prompted.prompt_cache.stored = {"": stored}
    assert torch.equal(run(prompted), run(prompted, prompt_embeds=stored))
    with pytest.raises(ValueError, match="no text encoder for 'a dog'"):
        run(prompted, prompt="a dog")


def test_a_growing_guidance_scale_starts_without_guidance(prompted):
    embeds = {"prompt_embeds": torch.randn(1, 5, 8), "negative_prompt_embeds": torch.randn(1, 5, 8)}
    options = {"num_inference_steps": 1, "output_type": "latent"} | embeds
    pipeline = prompted
    pipeline.scheduler = official_scheduler("edm_euler", prediction_type="epsilon", rescale_betas_zero_snr=False)
    grown = run(pipeline, guidance_scale=5.0, rescale_cfg=True, **options)
    without = run(pipeline, guidance_scale=1.0, **options)
    constant = run(pipeline, guidance_scale=5.0, **options)
    assert torch.allclose(grown, without, rtol=1e-3)
    assert not torch.allclose(constant, without, rtol=1e-3)
    assert pipeline.guidance_scale == 5.0


@pytest.mark.slow
def test_compiled_networks_give_the_same(prompted):
    options = {"prompt_embeds": torch.randn(1, 5, 8), "output_type": "latent", "num_inference_steps": 1}
    expected = run(prompted, **options)
    prompted.unet = torch.compile(prompted.unet, backend="eager")
    prompted.controlnet = torch.compile(prompted.controlnet, backend="eager")
    assert torch.allclose(run(prompted, **options), expected, atol=1e-5)


def test_attention_backends_can_be_chosen(prompted):
    options = {"prompt_embeds": torch.randn(1, 5, 8), "output_type": "latent"}
    expected = run(prompted, **options)
    prompted.unet.set_attention_backend("native")
    prompted.controlnet.set_attention_backend("native")
    assert torch.allclose(run(prompted, **options), expected, atol=1e-5)


# Tiles


def test_small_images_are_not_tiled(pipeline):
    expected = run(pipeline)
    pipeline.enable_tiling(512)
    assert torch.allclose(run(pipeline), expected, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_tiles_of_each_stage_come_near_the_whole(pipeline, stage):
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 10, generator=generator(2)), (400, 440), mode="bicubic")
    image = image.clamp(0, 1)
    whole = run(pipeline, image)
    pipeline.enable_tiling(320, 160, stages=(stage,))
    calls = []
    network = {"cleaner": "cleaner", "diffusion": "unet"}.get(stage)
    if network:
        getattr(pipeline, network).register_forward_hook(lambda *_: calls.append(1))
    tiled = run(pipeline, image)
    assert (tiled - whole).abs().max() < (1e-3 if stage in ("encoder", "decoder") else 0.1)
    assert not network or len(calls) > 2
    pipeline.disable_tiling()
    assert torch.equal(run(pipeline, image), whole)


def test_vae_tiles_alone(pipeline):
    pipeline.enable_vae_tiling(320)
    assert pipeline._tile_size("encoder") == pipeline._tile_size("decoder") == 320
    assert pipeline._tile_size("diffusion") is None
    pipeline.disable_vae_tiling()
    assert pipeline._tile_size("encoder") is None


def test_guidance_acts_on_the_blended_estimate(pipeline):
    sizes = []
    guide = MILOGuidance(tiny_metric(), milo_scale=0.5)
    original = guide.guide_x0
    guide.guide_x0 = lambda x0, *args, **kwargs: sizes.append(x0.shape) or original(x0, *args, **kwargs)
    pipeline.enable_tiling(128, stages=("diffusion",))
    run(pipeline, torch.rand(1, 3, 256, 192), callback_on_step_end=guide)
    assert set(sizes) == {(1, 4, 32, 24)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tile": 32}, "tile of at least 64 pixels .* got tile 32 and overlap 8"),
        ({"tile": 512.5}, r"whole numbers, got tile 512\.5"),
        ({"tile": 128, "overlap": 128}, "0 <= overlap < tile.* got tile 128 and overlap 128"),
        ({"tile": 384, "overlap": -1}, "0 <= overlap < tile.* and overlap -1"),
        ({"stages": ("unet",)}, "`stages` to be one of .*'unet'"),
        ({"tile": 128}, "at least 320.*128"),
    ],
)
def test_tiles_that_cannot_work_are_refused(pipeline, options, match):
    with pytest.raises(ValueError, match=match):
        pipeline.enable_tiling(**options)
    assert pipeline._tiles == {}


def test_an_overlap_of_none_is_a_quarter_and_0_is_0(pipeline):
    pipeline.enable_tiling(336, stages=("encoder",))
    pipeline.enable_tiling(128, 0, stages=("diffusion",))
    assert pipeline._tiles == {"encoder": Tile(336, 84), "diffusion": Tile(128, 0)}
    whole, seen = torch.randn(1, 4, 32, 48, generator=generator()), []

    def note(part):
        seen.append(part)
        return part

    for rules in RULES.values():
        seen.clear()
        result = rules.tiles(Tile(128, 0), (32, 48), multiple=16, cell=8)(note, whole)
        assert torch.allclose(result, whole, atol=1e-6)
        assert [tuple(part.shape[2:]) for part in seen] == [(16, 16)] * 6
    assert Tile(200, 10).aligned(64, 8) == {"tile": 24, "overlap": 8, "multiple": 8}
    assert Tile(64, 63).aligned(64) == {"tile": 64, "overlap": 0, "multiple": 64}


def test_the_official_rule_takes_tiles_only_where_one_fits(pipeline):
    pipeline.cleaner = SwinIR(embed_dim=12, depths=(2,), num_heads=(2,)).eval()
    small, large = (torch.rand(1, 3, *size, generator=generator()) for size in ((200, 180), (520, 576)))
    whole = pipeline.clean(small, (200, 180), compatibility="official")
    pipeline.enable_tiling(512)
    assert torch.equal(pipeline.clean(small, (200, 180), compatibility="official"), whole)
    expected = official_tiled(pipeline.cleaner, large, tile=512, stride=384)
    assert torch.allclose(pipeline.clean(large, (520, 576), compatibility="official"), expected, atol=1e-6)


@pytest.mark.parametrize("stage", ["encoder", "diffusion"])
def test_the_official_rule_pads_latents_where_it_padded_the_image_less(pipeline, stage):
    seen, image = [], torch.rand(1, 3, 136, 150, generator=generator())
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape[2:])))
    encoded = []
    pipeline.vae.encoder.register_forward_pre_hook(lambda module, arguments: encoded.append(arguments[0].shape[2:]))
    pipeline.enable_tiling(320, stages=(stage,))  # which neither image nor latents hold
    result = run(pipeline, image, compatibility="official")
    assert encoded == [(136, 152)]  # padded to cells only
    assert result.shape == image.shape
    assert set(seen) == {(18, 20)}  # 17 and 19 cells, padded to those that the UNet halves
    for loss, space in (("mse", "rgb"), ("w_mse", "latent")):  # whose images are those of the latents
        guide = RegionAdaptiveGuidance(pipeline.vae, 0.5, loss=loss, space=space)
        guided = run(pipeline, image, compatibility="official", callback_on_step_end=guide)
        assert not torch.equal(guided, result)


def test_the_official_rule_cuts_the_size(pipeline):
    image = torch.rand(1, 3, 65, 65, generator=generator())
    shapes = [run(pipeline, image, upscale=1.5, compatibility=each).shape[2:] for each in (None, "official")]
    assert shapes == [(98, 98), (97, 97)]


def test_restore_image_takes_tiles_for_one_call(pipeline):
    image = torch.rand(1, 3, 330, 330, generator=generator(2))
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    assert restore_image(image, model=pipeline, steps=1, tile=320).shape == image.shape
    assert len(calls) == 4
    restore_image(image, model=pipeline, steps=1)
    assert len(calls) == 5


def test_tiles_of_the_background_stay_with_it(pipeline):
    pipeline.register_modules(background_cleaner=BSRNet(channels=8, blocks=1, growth=4))
    with pipeline.for_background().tiling(320):
        assert pipeline._tiles == {}
    pipeline.enable_tiling(320)
    background = pipeline.for_background()
    background.disable_vae_tiling()
    assert set(pipeline._tiles) == set(STAGES)
    assert set(background._tiles) == {"cleaner", "diffusion"}


def test_a_lack_of_memory_names_the_ways_out(pipeline, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pipeline.unet, "forward", fail)
    with pytest.raises(MemoryError, match=r"enable_tiling\(512\).*--tile 512.*enable_model_cpu_offload"):
        run(pipeline)
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        run(pipeline)


def test_any_vae_fits(pipeline):
    torch.manual_seed(0)
    pipeline.vae = AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    latents, result = run(pipeline, output_type="latent"), run(pipeline, color_fix="none")
    assert pipeline.vae.config.scaling_factor == 0.18215
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.18215).sample
    assert torch.allclose(result, (decoded / 2 + 0.5).clamp(0, 1)[..., :50, :70], atol=1e-5)


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 2.5}, "`num_inference_steps` to be a whole number"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` to be a whole number of at least 1"),
        ({"noise_aug": 10.5}, "`noise_aug` to be a timestep"),
        ({"upscale": float("inf")}, "`upscale` above 0 and at most 64, got inf"),
        ({"generator": [generator(), generator()]}, "one `generator`, or 1"),
        ({"negative_prompt_embeds": torch.zeros(1, 5, 8)}, "Expected no prompt"),
        ({"image": []}, "at least one pixel"),
        ({"image": torch.zeros(1, 3, 8, 0)}, "at least one pixel"),
        ({"image": torch.full((1, 3, 8, 8), torch.nan)}, "finite"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline, **options)


def test_a_picture_of_16_bit_is_not_cut_to_white(pipeline):
    values = (np.linspace(0, 65535, 48 * 40).reshape(48, 40)).astype(np.uint16)
    picture = PIL.Image.fromarray(values)
    rgb = torch.from_numpy(values.astype(np.float32) / 65535).expand(1, 3, 48, 40)
    assert torch.allclose(run(pipeline, picture), run(pipeline, rgb), atol=1e-6)


def test_a_tuple_of_prompts_is_one_for_each_image():
    assert listed(("a cat", "a dog")) == ["a cat", "a dog"]


def test_from_pipe_takes_the_cleaner_along(pipeline):
    assert DiffBIRPipeline.from_pipe(pipeline).cleaner is pipeline.cleaner
    pipeline.register_modules(cleaner=BSRNet(channels=8, blocks=1, growth=4))
    assert DiffBIRPipeline.from_pipe(pipeline).cleaner is pipeline.cleaner


def test_the_pipeline_around_faces_knows_the_stored_prompts_and_the_tiles(prompted):
    prompted.prompt_cache.stored = {"": torch.randn(1, 5, 8, generator=generator())}
    prompted.enable_tiling(320)
    prompted.register_modules(background_cleaner=BSRNet(channels=8, blocks=1, growth=4))
    background = prompted.for_background()
    assert background._tiles == prompted._tiles
    background.register_modules(cleaner=None)
    assert torch.isfinite(run(background)).all()


def offload_model(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")


def offload_groups(pipeline):
    pipeline.enable_group_offload(torch.device("cpu"), exclude_modules="vae", num_blocks_per_group=1)


def offload_leaves(pipeline):
    pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize(
    "offload",
    [
        offload_model,
        pytest.param(offload_groups, marks=NEEDS_NEWER_TORCH),
        pytest.param(offload_leaves, marks=NEEDS_NEWER_TORCH),
    ],
)
def test_offloading_changes_no_result(pipeline, metric, offload):
    """Without an accelerator, all is moved from the CPU to the CPU, by the same hooks of diffusers."""
    pipeline.register_modules(metric=metric)
    options = {"image": torch.rand(1, 3, 50, 70, generator=generator(5)), "num_inference_steps": 2, "output_type": "pt"}

    def run():
        guide = MILOGuidance(pipeline.metric)
        return pipeline(generator=generator(), callback_on_step_end=guide, **options).images

    expected = run()
    offload(pipeline)
    for _ in range(2):
        assert torch.equal(run(), expected)
    assert not hasattr(pipeline.metric, "_hf_hook")
    assert not hasattr(pipeline.metric, "_diffusers_hook")
    assert next(pipeline.metric.parameters()).device.type == "cpu"
