"""DiffBIR's restoration guidance: the official gradients and runs, and by default any size and scheduler."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from golden import golden, golden_pipeline, numbered, part, relative, scheduler_for, tiny_networks
from replay import replayed_noise

from milo_latent.diffbir.sampling import controlled_output
from milo_latent.guidance.curriculum import flatness
from milo_latent.guidance.region_adaptive import RegionAdaptiveGuidance
from milo_latent.guidance.x0 import guide_model_output, guided_run, official_step, posterior_mean_coefficient
from milo_latent.latents.codec import scale_latents
from milo_latent.testing import generator, tiny_pipeline

CLOSE = 1e-4


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("loss", ["mse", "w_mse"])
def test_the_gradient_is_the_official_one(loss, scale):
    tensors = part(golden("guidance"), "rgb.")
    weight = flatness(tensors["target"] / 2 + 0.5) if loss == "w_mse" else 1.0
    step = official_step(tensors["target"] - tensors["pred_x0"], weight, scale)
    assert relative(step, tensors[f"{loss}.scale{scale:g}.gradient"]) < 1e-5
    if loss == "w_mse":
        assert relative(weight, tensors["w_mse.weight_map"]) < 1e-5


def test_the_gradient_in_latents_is_the_official_one():
    tensors = part(golden("guidance"), "latent.")
    step = official_step(tensors["target"] - tensors["pred_x0"], 1.0, 0.5)
    assert relative(step, tensors["mse.scale0.5.gradient"]) < 1e-5


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("parameterization", ["eps", "v_zsnr"])
def test_the_posterior_mean_coefficient_is_the_official_one(parameterization, steps):
    scheduler = scheduler_for(parameterization)
    scheduler.set_timesteps(steps)
    expected = golden("sampler_schedules")[f"{parameterization}.steps{steps}.posterior_mean_coef1"].tolist()
    ours = [posterior_mean_coefficient(scheduler, int(timestep)) for timestep in scheduler.timesteps.flip(0)]
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def networks():
    return tiny_networks()


RUNS = {
    "none": {"scale": 0.0, "loss": "mse", "space": "rgb"},
    "rgb_mse": {"scale": 5.0, "loss": "mse", "space": "rgb"},
    "rgb_w_mse": {"scale": 5.0, "loss": "w_mse", "space": "rgb"},
    "rgb_w_mse_repeat2_window": {
        "scale": 5.0, "loss": "w_mse", "space": "rgb", "repeat": 2, "t_start": 800, "t_stop": 200,
    },
    "latent_mse": {"scale": 0.002, "loss": "mse", "space": "latent"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_guided_runs_are_those_of_the_release_that_applied_it(networks, name):
    tensors = golden("guided_runs_v2.0.0")
    expected, inputs, target = part(tensors, f"{name}."), part(tensors, "inputs."), tensors["target"]
    vae, draws, scheduler = networks["vae"], numbered(expected, "draw_"), scheduler_for("eps")
    guide = RegionAdaptiveGuidance(vae, target=target / 2 + 0.5, compatibility="official", **RUNS[name])
    guide.bind(SimpleNamespace(scheduler=scheduler))
    scheduler.set_timesteps(5)
    latents = inputs["x_T"]
    with torch.no_grad():
        posterior = vae.encode(target).latent_dist
    for index, timestep in enumerate(scheduler.timesteps):
        reference = scale_latents(vae, posterior.mode())
        if name == "latent_mse":  # the official code draws the target anew in each step
            reference, draws = scale_latents(vae, posterior.mean + posterior.std * draws[0]), draws[1:]
        with torch.no_grad():
            output = controlled_output(
                networks["unet"], networks["controlnet"], latents, inputs["c_img"], timestep=timestep,
                prompt_embeds=inputs["c_txt"], negative_prompt_embeds=inputs["uc_txt"], conditioning_scale=1.0,
                scale=4.0, rescale=0.0,
            )  # fmt: skip
        with guided_run([guide], reference, 5):
            output = guide_model_output([guide], scheduler, output, timestep, latents, progress=index / 4)
        with replayed_noise(draws[:1]):
            stepped = scheduler.step(output, timestep, latents)
        latents, draws = stepped.prev_sample, draws[1:]
        assert relative(stepped.pred_original_sample, expected[f"pred_x0_{index}"]) < CLOSE
        assert relative(latents, expected[f"x_{index}"]) < CLOSE


@torch.no_grad()
def run(pipeline, guide=None, size=(40, 56), **options):
    image = torch.rand(1, 3, *size, generator=generator(5))
    options = {"num_inference_steps": 4, "output_type": "latent", "generator": generator()} | options
    return pipeline(image=image, callback_on_step_end=guide, **options).images


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("space", ["latent", "rgb"])
@pytest.mark.parametrize("loss", ["mse", "w_mse"])
def test_it_pulls_the_result_towards_the_cleaned_image(pipeline, scheduler, space, loss):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    kept = []

    class Keeping(RegionAdaptiveGuidance):
        def start(self, reference, num_steps):
            super().start(reference, num_steps)
            kept.append(reference if self.space == "latent" else self._target)

    guide = Keeping(pipeline.vae, 0.5, loss=loss, space=space)
    guided, free = run(pipeline, guide), run(pipeline)
    if space == "rgb":
        with torch.no_grad():
            guided, free = (pipeline.vae.decode(each).sample for each in (guided, free))
    limit = 0.9 if space == "latent" else 0.99  # a random decoder cannot come near an image
    assert (guided - kept[0]).square().mean() < limit * (free - kept[0]).square().mean()


def test_a_strength_of_one_in_latents_gives_the_reference_and_zero_changes_no_bit(pipeline):
    reference = torch.randn(1, 4, 16, 16, generator=generator(3))
    whole = RegionAdaptiveGuidance(scale=1.0, loss="mse", reference_latents=reference)
    assert torch.allclose(run(pipeline, whole), reference, atol=1e-4)
    assert torch.equal(run(pipeline, RegionAdaptiveGuidance(scale=0.0, loss="mse")), run(pipeline))


def test_the_default_strength_does_not_shrink_with_the_image():
    target = torch.full((1, 3, 128, 128), 0.25)
    for side in (16, 64):
        towards = torch.ones(1, 4, side, side)
        guide = RegionAdaptiveGuidance(scale=0.5, loss="mse", target=target)
        with guided_run([guide], towards, 1):
            assert torch.allclose(guide(torch.zeros_like(towards), progress=0.0, timestep=0.0), towards / 2)
    small, large = (official_step(torch.ones(1, 4, side, side), 1.0, 1.0).mean() for side in (16, 64))
    assert large < small / 15  # the official one does


def test_it_attaches_to_other_pipelines(pipeline):
    reference = torch.randn(1, 4, 16, 16, generator=generator(3))
    guide = RegionAdaptiveGuidance(scale=1.0, loss="mse", reference_latents=reference)
    with guide.attach(pipeline):
        guided = run(pipeline)
    assert torch.allclose(guided, reference, atol=1e-4)


def test_one_reference_serves_several_images(pipeline):
    reference, images = torch.zeros(1, 4, 16, 16), torch.rand(2, 3, 128, 128, generator=generator())
    guide = RegionAdaptiveGuidance(pipeline.vae, 0.5, reference_latents=reference)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    generators = [generator(0), generator(1)]
    both = pipeline(image=images, callback_on_step_end=guide, generator=generators, **options).images
    second = pipeline(image=images[1:], callback_on_step_end=guide, generator=generator(1), **options).images
    assert torch.allclose(both[1:], second, atol=1e-4)


def test_each_result_of_an_image_is_guided(pipeline):
    guide = RegionAdaptiveGuidance(pipeline.vae, 0.5, loss="w_mse", space="rgb")
    generators = [generator(0), generator(1)]
    both = run(pipeline, guide, num_images_per_prompt=2, generator=generators)
    assert torch.allclose(both[1:], run(pipeline, guide, generator=generator(1)), atol=1e-4)


def test_a_run_leaves_no_image_behind_and_two_runs_do_not_mix(pipeline):
    guide = RegionAdaptiveGuidance(pipeline.vae, 0.5, loss="w_mse", space="rgb")
    targets = []
    for value in (0.1, -0.4):
        with guided_run([guide], torch.full((1, 4, 16, 16), value), 4):
            targets.append(guide._target)
            assert guide._weight.shape == (1, 1, 128, 128)
    assert not torch.equal(*targets)
    small = RegionAdaptiveGuidance(pipeline.vae, 0.5, loss="w_mse", space="latent")
    run(pipeline, small)
    with guided_run([small], torch.zeros(1, 4, 16, 16), 4):
        assert small._target is None
        assert small._weight.shape == (1, 1, 16, 16)
    kept = [value for guide in (guide, small) for value in vars(guide).values() if isinstance(value, torch.Tensor)]
    assert not kept


def test_flat_regions_weigh_one_and_edges_less():
    image = torch.zeros(1, 3, 9, 11)
    image[..., 6:] = 1.0
    weight = flatness(image)
    assert weight.shape == (1, 1, 9, 11)
    assert (weight[..., :4] == 1).all()
    assert weight[..., 5:7].max() < 0.1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "l1"}, "`loss`"),
        ({"space": "pixels"}, "`space`"),
        ({"scale": 1.1, "loss": "mse"}, "fraction of the way"),
        ({"loss": "w_mse"}, "`vae`"),
        ({"space": "rgb", "loss": "mse"}, "`vae`"),
        ({"repeat": 0, "loss": "mse"}, "number of pushes"),
        ({"target": torch.zeros(1, 4, 8, 8)}, "`target` with 3 channels"),
        ({"loss": "mse", "compatibility": "old"}, "`compatibility`"),
    ],
)
def test_options_that_cannot_work_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        RegionAdaptiveGuidance(**options)


def test_the_official_scaling_needs_a_ddpm_scheduler(networks):
    guide = RegionAdaptiveGuidance(scale=0.5, loss="mse", compatibility="official")
    pipeline = golden_pipeline(networks, "v_zsnr", "ddim")
    embeds = torch.zeros(1, 77, 32)
    with pytest.raises(ValueError, match="DDPM"):
        run(pipeline, guide, prompt_embeds=embeds)


def test_settings_are_a_configuration(tmp_path):
    assert RegionAdaptiveGuidance(loss="mse").config.scale == 0.5
    given = {"scale": 7.0, "loss": "mse", "repeat": 2, "t_start": 800, "t_stop": 100, "compatibility": "official"}
    RegionAdaptiveGuidance(**given).save_config(tmp_path)
    config = RegionAdaptiveGuidance.from_config(RegionAdaptiveGuidance.load_config(tmp_path)).config
    assert {name: config[name] for name in given} == given


@pytest.mark.parametrize("own", [True, False])
def test_each_result_is_pulled_to_its_own_image_whose_graph_is_not_kept(own):
    image, reference = torch.rand(2, 3, 128, 128).requires_grad_(True), torch.zeros(2 if own else 4, 4, 16, 16)
    guide = RegionAdaptiveGuidance(tiny_pipeline().vae, space="rgb", target=image if own else None)
    if not own:
        guide.accept_image(image)
    guide.start(reference, 4)
    assert not guide._target.requires_grad
    assert not guide._weight.requires_grad
    assert torch.equal(guide._target, (image.detach() * 2 - 1).repeat_interleave(1 if own else 2, dim=0))
