"""Schedulers and pipeline give what the official code gives, for its tiny random networks and its noise."""

import pytest
import torch
from golden import golden, golden_pipeline, numbered, part, relative, scheduler_for, tiny_cleaner, tiny_networks
from replay import replayed_noise
from torch.nn import functional as F

from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.color import fix_color
from milo_latent.diffbir.rules import OFFICIAL
from milo_latent.diffbir.sampling import add_noise, controlled_output, guidance_scale_at, step_arguments
from milo_latent.diffbir.schedulers import official_scheduler, spaced_timesteps
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.swinir import SwinIR
from milo_latent.diffbir.tiles import Tile, gaussian_weights, official_tiled, tile_starts

RUN = 1e-4


@pytest.fixture(scope="module")
def networks():
    return tiny_networks()


@pytest.fixture(scope="module")
def runs():
    return golden("sampler_runs")


@torch.no_grad()
def sample(networks, scheduler, inputs, steps, *, scale=4.0, rescale=False, noises=(), tile=None):
    """Run the official sampler's loop with a scheduler; return the samples after each step and the model outputs."""
    scheduler.set_timesteps(steps)
    latents, samples, outputs = inputs["x_T"] * scheduler.init_noise_sigma, [], []
    with replayed_noise(noises):
        for timestep in scheduler.timesteps:
            grown = guidance_scale_at(scale, float(timestep), rules=OFFICIAL) if rescale else scale
            output = controlled_output(
                networks["unet"], networks["controlnet"], scheduler.scale_model_input(latents, timestep),
                inputs["c_img"], timestep=timestep, prompt_embeds=inputs["c_txt"],
                negative_prompt_embeds=inputs["uc_txt"] if scale > 1 else None, conditioning_scale=1.0, scale=grown,
                rescale=0.0, tiles=OFFICIAL.tiles(tile, latents.shape[2:], cell=8),
            )  # fmt: skip
            arguments = step_arguments(scheduler, None, 0.0)
            latents = scheduler.step(output, timestep, latents, **arguments, return_dict=False)[0]
            samples.append(latents)
            outputs.append(output)
    return samples, outputs


@pytest.mark.parametrize("parameterization", ["eps", "v_zsnr"])
@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
def test_the_spaced_schedule_is_the_official_one(parameterization, steps):
    expected = part(golden("sampler_schedules"), f"{parameterization}.")
    scheduler = scheduler_for(parameterization)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.flip(0).tolist() == expected[f"steps{steps}.timesteps"].tolist()
    cumulative = expected["alphas_cumprod"]
    assert (scheduler.alphas_cumprod - cumulative).abs().max() < 1e-6
    variance = [float(scheduler._get_variance(timestep)) for timestep in scheduler.timesteps.flip(0)]
    official = expected[f"steps{steps}.posterior_variance"].tolist()
    assert variance[1:] == pytest.approx(official[1:], rel=1e-4)


def test_odd_numbers_of_steps_are_summed_up_as_the_official_code_does():
    scheduler = scheduler_for("eps")
    scheduler.set_timesteps(21)
    assert scheduler.timesteps[10] == 499  # the README of the golden files: not 500
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("parameterization", ["eps", "v_zsnr"])
@pytest.mark.parametrize(("steps", "scale", "rescale"), [(5, 1, 0), (5, 4, 0), (5, 4, 1), (10, 4, 1)])
def test_spaced_runs(networks, runs, parameterization, scale, rescale, steps):
    expected = part(runs, f"{parameterization}.steps{steps}.cfg{scale}.rescale{rescale}.")
    options = {"scale": float(scale), "rescale": bool(rescale), "noises": numbered(runs, "noise_")}
    samples, outputs = sample(networks, scheduler_for(parameterization), part(runs, "inputs."), steps, **options)
    assert max(map(relative, samples, numbered(expected, "x_"))) < RUN
    assert relative(samples[-1], expected["z"]) < RUN
    if steps == 5:
        assert max(map(relative, outputs, numbered(expected, "model_output_"))) < RUN


def test_the_tiled_run(networks, runs):
    tiled = part(runs, "tiled.")
    expected = part(tiled, "v_zsnr.steps5.cfg4.tile16.stride8.")
    samples, _ = sample(
        networks, scheduler_for("v_zsnr"), part(tiled, "inputs."), 5, tile=Tile(128, 64),
        noises=numbered(expected, "noise_"),
    )  # fmt: skip
    assert relative(samples[-1], expected["z"]) < RUN


@pytest.mark.parametrize(
    ("parameterization", "sampler", "steps", "limit"),
    [
        ("eps", "ddim", 5, RUN),
        ("v_zsnr", "ddim", 5, RUN),
        ("eps", "dpm++_m2", 5, RUN),
        ("v_zsnr", "dpm++_m2", 10, RUN),  # from 10 steps on the last one is of second order
        ("v_zsnr", "edm_dpm++_2m", 5, RUN),
        ("v_zsnr", "edm_dpm++_3m_sde", 5, RUN),
        ("v_zsnr", "edm_dpm++_3m_sde", 10, RUN),
        ("v_zsnr", "edm_euler", 10, 1e-3),
    ],
)
def test_the_other_samplers(networks, parameterization, sampler, limit, steps):
    others = golden("sampler_others")
    expected = part(others, f"{parameterization}.{sampler}.steps{steps}.cfg4.rescale0.")
    scheduler = scheduler_for(parameterization, sampler)
    noises = numbered(others, "sde_noise_")
    samples, _ = sample(networks, scheduler, part(others, "inputs."), steps, noises=noises)
    assert relative(samples[-1], expected["z"]) < limit
    calls = expected["model_calls_t"].tolist()
    calls = calls[::2] if len(calls) == 2 * steps else calls
    assert scheduler.timesteps.tolist() == pytest.approx(calls, abs=1e-3)
    if "sigmas" in expected:
        assert relative(scheduler.sigmas, expected["sigmas"]) < 1e-6


def test_the_default_sampler_with_a_growing_guidance_scale(networks):
    others = golden("sampler_others")
    options = {"rescale": True, "noises": numbered(others, "sde_noise_")}
    scheduler = scheduler_for("v_zsnr", "edm_dpm++_3m_sde")
    samples, _ = sample(networks, scheduler, part(others, "inputs."), 10, **options)
    assert relative(samples[-1], others["v_zsnr.edm_dpm++_3m_sde.steps10.cfg4.rescale1.z"]) < RUN


def test_the_guidance_scale_grows_as_the_official_one():
    expected = golden("sampler_schedules")["rescaled_cfg_scale_4_by_timestep"].tolist()
    assert [guidance_scale_at(4.0, each, rules=OFFICIAL) for each in range(1000)] == pytest.approx(expected)
    assert guidance_scale_at(4.0, 0) == pytest.approx(4.0)
    assert guidance_scale_at(4.0, 999) == pytest.approx(1.0)
    assert guidance_scale_at(1.0, 0, rules=OFFICIAL) == 1.0


@pytest.mark.parametrize("parameterization", ["eps", "v_zsnr"])
def test_noise_is_added_as_the_official_code_does(parameterization):
    example = part(golden("sampler_schedules"), f"{parameterization}.q_sample.")
    for latents, noise, timestep, expected in zip(
        example["x_start"], example["noise"], example["t"].tolist(), example["out"], strict=True
    ):
        noisy = add_noise(latents, noise, scheduler_for(parameterization), timestep)
        assert relative(noisy, expected) < 1e-5


# The pipeline

APPLIED = {
    "plain": ("eps", {}),
    "strength_0.5": ("eps", {"controlnet_conditioning_scale": 0.5}),
    "start_cond": ("eps", {"start_point": "cond"}),
    "start_cond_noise_aug_50": ("eps", {"start_point": "cond", "noise_aug": 50}),
    "noise_aug_150": ("v_zsnr", {"noise_aug": 150}),
    "rescale_cfg": ("v_zsnr", {"rescale_cfg": True}),
}


@pytest.mark.parametrize("name", APPLIED)
def test_the_pipeline_gives_the_official_pictures(networks, name):
    tensors = part(golden("pipeline_tiny"), "")
    expected = part(tensors, f"apply.{name}.")
    parameterization, options = APPLIED[name]
    pipeline = golden_pipeline(networks, parameterization)
    with replayed_noise(numbered(expected, "draw_")):
        result = pipeline(
            image=tensors["apply.cond_img"], num_inference_steps=3, guidance_scale=4.0, output_type="pt",
            prompt_embeds=tensors["prompts.good"], negative_prompt_embeds=tensors["prompts.bad"], color_fix="none",
            compatibility="official", **options,
        ).images  # fmt: skip
    official = (expected["out"] / 2 + 0.5).clamp(0, 1)
    assert (result - official).abs().max() < 1 / 255 + 1e-4  # cut to 8 bit
    assert (result - official).mean() < 0  # cut, not rounded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cleaner", "parameterization", "upscale"),
    [
        ("swinir_v_zsnr", SwinIR, "v_zsnr", 1.0),
        ("bsrnet_eps_up4", BSRNet, "eps", 4.0),
        ("scunet_eps", SCUNet, "eps", 1.0),
    ],
)
def test_the_whole_pipeline_gives_the_official_8_bit_picture(networks, name, cleaner, parameterization, upscale):
    tensors = golden("pipeline_tiny")
    expected = part(tensors, f"run.{name}.")
    pipeline = golden_pipeline(networks, parameterization, cleaner=tiny_cleaner(cleaner))
    image = expected["lq"].permute(0, 3, 1, 2).float() / 255
    with replayed_noise(numbered(expected, "draw_")):
        result = pipeline(
            image=image, upscale=upscale, num_inference_steps=2, guidance_scale=4.0, output_type="np",
            prompt_embeds=tensors["prompts.good"], negative_prompt_embeds=tensors["prompts.bad"],
            compatibility="official",
        ).images  # fmt: skip
    picture = torch.from_numpy(result).mul(255).round()
    assert picture.shape == expected["result"].shape
    assert (picture - expected["result"]).abs().max() <= 1
    assert (picture != expected["result"]).float().mean() < 0.01


def test_the_color_fix_gives_the_official_picture():
    tensors = golden("pipeline_tiny")
    fixed = fix_color(tensors["apply.plain.out"] / 2 + 0.5, tensors["apply.cond_img"], method="wavelet")
    assert relative(fixed, tensors["apply.plain.colour_fixed"]) < 1e-5


# Tiles


def minus_mean(tile):
    return tile - tile.mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("name", "function", "scale"),
    [
        ("minus_mean.gaussian.size12.stride5", minus_mean, 1),
        ("minus_mean.gaussian.size8.stride4", minus_mean, 1),
        ("minus_mean.gaussian.size8.stride8", minus_mean, 1),
        ("up4_channel3.gaussian.size8.stride4", lambda tile: F.interpolate(minus_mean(tile), scale_factor=4)[:, :3], 4),
    ],
)
def test_official_tiles(name, function, scale):
    tensors = golden("image_ops")
    image = tensors["tiled.x"] if scale != 4 else tensors["tiled.x"][:, :, :12, :16]
    *_, size, stride = name.split(".")
    tiled = official_tiled(function, image, tile=int(size[4:]), stride=int(stride[6:]), scale=scale)
    assert relative(tiled, tensors[f"tiled.{name}"]) < 1e-5


def test_official_weights_and_windows():
    tensors = golden("image_ops")
    for key in ("8x8", "9x9", "16x16", "64x64"):
        assert relative(gaussian_weights(int(key.split("x")[0])), tensors[f"gaussian_weights.{key}"]) < 1e-12
    for height, width, size, stride in [(20, 30, 12, 5), (20, 30, 8, 4), (64, 64, 64, 32), (64, 96, 64, 32)]:
        starts = [(top, left) for top in tile_starts(height, size, stride) for left in tile_starts(width, size, stride)]
        windows = [[top, top + size, left, left + size] for top, left in starts]
        assert windows == tensors[f"windows.h{height}.w{width}.size{size}.stride{stride}"].tolist()


def test_official_tiles_refuse_what_would_leave_gaps():
    with pytest.raises(ValueError, match="stride of 1 to 8"):
        official_tiled(minus_mean, torch.zeros(1, 3, 16, 16), tile=8, stride=9)


def test_as_many_steps_as_timesteps_are_all_timesteps():
    assert spaced_timesteps(8, 8) == [7, 6, 5, 4, 3, 2, 1, 0]
    for steps in (0, 9):
        with pytest.raises(ValueError, match="Expected 1 to 8 steps"):
            spaced_timesteps(steps, 8)


@pytest.mark.parametrize("name", ["dpm++_m2", "edm_euler"])
def test_timesteps_are_floats_whatever_the_grid(name):
    scheduler = official_scheduler(name)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.dtype == torch.float32
