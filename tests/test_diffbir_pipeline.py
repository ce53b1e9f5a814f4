"""DiffBIRPipeline: any size, any input, any output, saved and loaded, the same for the same seed."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from milo_latent import DiffBIRPipeline
from milo_latent.diffbir.versions import VERSIONS, Release
from milo_latent.testing import generator


def run(pipeline, image=None, **options):
    image = torch.rand(1, 3, 50, 70, generator=generator(5)) if image is None else image
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": generator()} | options
    return pipeline(image=image, **options).images


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (128, 128), (129, 200)])
def test_any_size_comes_back(pipeline, size):
    image = torch.rand(1, 3, *size)
    restored = run(pipeline, image)
    assert restored.shape == image.shape
    assert restored.min() >= 0
    assert restored.max() <= 1


def test_upscale_multiplies_the_size(pipeline):
    assert run(pipeline, torch.rand(1, 3, 20, 31), upscale=4.0).shape == (1, 3, 80, 124)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(pipeline):
    assert torch.equal(run(pipeline), run(pipeline))
    assert not torch.equal(run(pipeline), run(pipeline, generator=generator(1)))


def test_pil_numpy_and_tensors_are_the_same_image(pipeline):
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    expected = run(pipeline, tensor)
    assert torch.allclose(run(pipeline, Image.fromarray(array)), expected, atol=1e-6)
    assert torch.allclose(run(pipeline, array[None].astype(np.float32) / 255), expected, atol=1e-6)
    assert torch.allclose(
        run(pipeline, [Image.fromarray(array)] * 2, generator=[generator(), generator()])[1:], expected, atol=1e-4
    )


def test_outputs_are_the_same_image(pipeline):
    tensor = run(pipeline)
    array = run(pipeline, output_type="np")
    picture = run(pipeline, output_type="pil")[0]
    assert array.shape == (1, 50, 70, 3)
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert picture.size == (70, 50)
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert run(pipeline, output_type="latent").shape == (1, 4, 16, 16)
    image = torch.rand(1, 3, 50, 70, generator=generator(5))
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": generator()}
    assert torch.equal(pipeline(image=image, return_dict=False, **options)[0], tensor)


def test_num_images_per_prompt_gives_the_results_of_each_image_one_after_another(pipeline):
    images = torch.rand(2, 3, 30, 30, generator=generator(9)) * torch.tensor([0.2, 1.0]).view(2, 1, 1, 1)
    seeds, seen = range(6), []
    pipeline.controlnet.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["controlnet_cond"]), with_kwargs=True
    )
    results = run(pipeline, images, num_images_per_prompt=3, generator=[generator(seed) for seed in seeds])
    assert results.shape[0] == 6
    assert all(torch.equal(seen[0][index], seen[0][index // 3 * 3]) for index in seeds)
    assert not torch.allclose(seen[0][0], seen[0][3], atol=1e-3)
    for seed in seeds:
        alone = run(pipeline, images[seed // 3 : seed // 3 + 1], generator=generator(seed))
        assert torch.allclose(results[seed : seed + 1], alone, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        LCMScheduler,
    ],
)
def test_any_scheduler_works(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    assert torch.isfinite(run(pipeline, num_inference_steps=3)).all()


def test_one_step_works(pipeline):
    assert torch.isfinite(run(pipeline, num_inference_steps=1)).all()


def test_it_works_without_a_cleaner(pipeline):
    pipeline.cleaner = None
    image = torch.rand(1, 3, 20, 20)
    assert torch.equal(pipeline.clean(image), image)
    assert run(pipeline, image).shape == image.shape


def test_an_image_that_is_only_enlarged_stays_in_its_range(pipeline):
    pipeline.cleaner = None
    image = torch.zeros(1, 3, 16, 16)
    image[..., 5:9, 5:9] = 1.0
    enlarged = pipeline.clean(image, (40, 40))  # by a kernel that leaves the range
    assert (enlarged.min(), enlarged.max()) == (0, 1)


def test_the_condition_matters_as_much_as_it_is_told_to(pipeline):
    full, half, none = (
        run(pipeline, controlnet_conditioning_scale=scale, output_type="latent") for scale in (1.0, 0.5, 0.0)
    )
    assert (full - none).abs().mean() > (full - half).abs().mean() > 0


def test_save_and_load_round_trip(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffBIRPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(run(loaded), run(pipeline), atol=1e-5)
    assert set(loaded.components) == set(pipeline.components)


def test_the_file_loads_as_a_custom_pipeline(pipeline, tmp_path, repository):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(repository / "pipelines" / "diffbir.py"), trust_remote_code=True
    )
    assert type(loaded).__name__ == "DiffBIRPipeline"
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(run(loaded), run(pipeline), atol=1e-5)


def bits(metric):
    return torch.cat([value.flatten() for value in metric.state_dict().values()])


def test_the_metric_keeps_its_float32_weights_whatever_the_dtype(pipeline, metric, tmp_path, repository):
    expected = bits(metric).clone()
    pipeline.register_modules(metric=metric)
    assert pipeline.to(torch.bfloat16).unet.dtype == torch.bfloat16
    assert torch.equal(bits(pipeline.metric), expected)
    pipeline.save_pretrained(tmp_path)
    custom = {"custom_pipeline": str(repository / "pipelines" / "diffbir.py"), "trust_remote_code": True}
    for cls, options in ((DiffBIRPipeline, {}), (DiffusionPipeline, custom)):
        opened = cls.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
        assert opened.unet.dtype == torch.bfloat16
        assert torch.equal(bits(opened.metric), expected)
        assert torch.equal(bits(opened.to("cpu", torch.float16).metric), expected)
    assert torch.equal(bits(DiffBIRPipeline.from_pipe(opened, dtype=torch.bfloat16).metric), expected)


def test_metric_background_cleaner_and_release_travel_with_the_pipeline(pipeline, metric, tmp_path):
    pipeline.metric = metric  # diffusers alone would forget an attribute that was None before
    pipeline.register_modules(background_cleaner=pipeline.cleaner)
    pipeline.register_to_config(release_version="v2", release_task="face")
    pipeline.save_pretrained(tmp_path)
    opened = DiffBIRPipeline.from_pretrained(tmp_path)
    for each in (opened, DiffBIRPipeline.from_pipe(opened), DiffBIRPipeline(**opened.components, **opened.parameters)):
        assert type(each.metric) is type(metric)
        assert type(each.background_cleaner) is type(pipeline.cleaner)
        assert each.release == Release(VERSIONS["v2"], "face")
    assert opened.for_background().release == opened.release
    with pytest.raises(ValueError, match="unaligned_face"):
        DiffBIRPipeline(**opened.components, release_version="v1", release_task="unaligned_face")


def test_a_function_as_callback_sees_and_changes_the_latents(pipeline):
    steps = []

    def zero_at_the_end(pipe, step_index, timestep, tensors):
        steps.append(step_index)
        if step_index == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    latents = run(pipeline, callback_on_step_end=zero_at_the_end, output_type="latent", num_inference_steps=3)
    assert steps == [0, 1, 2]
    assert (latents == 0).all()


def test_a_callback_can_interrupt(pipeline):
    steps = []

    def interrupt(pipe, step_index, timestep, tensors):
        steps.append(step_index)
        pipe._interrupt = True
        return tensors

    run(pipeline, callback_on_step_end=interrupt, num_inference_steps=5)
    assert steps == [0]


def test_a_callback_replaces_prompts_and_guidance_scale_for_the_steps_that_follow(prompted):
    seen, other = [], torch.zeros(1, 5, 8)
    prompted.unet.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["encoder_hidden_states"]), with_kwargs=True
    )

    def change(pipe, step_index, timestep, tensors):
        if step_index == 0:
            tensors |= {"prompt_embeds": other, "negative_prompt_embeds": other + 1}
        pipe._guidance_scale = 3.0 if step_index == 0 else 1.0
        return tensors

    prompts = {"prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=1)}
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names, "guidance_scale": 3.0}
    run(prompted, num_inference_steps=3, **prompts, **options)
    expected = [torch.cat([prompts["negative_prompt_embeds"], prompts["prompt_embeds"]]), torch.cat([other + 1, other])]
    assert all(torch.equal(*pair) for pair in zip(seen, [*expected, other], strict=True))


def test_the_check_of_arguments_has_the_defaults_of_the_call():
    call, check = (
        inspect.signature(each).parameters for each in (DiffBIRPipeline.__call__, DiffBIRPipeline.check_inputs)
    )
    assert {name: each.default for name, each in check.items()} == {name: call[name].default for name in check} | {
        "self": inspect.Parameter.empty
    }


def test_given_noise_replaces_drawn_noise(pipeline):
    noise = torch.randn(1, 4, 16, 16, generator=generator())
    assert torch.equal(run(pipeline, latents=noise, generator=None), run(pipeline))
    with pytest.raises(ValueError, match=r"`latents` of shape \(1, 4, 16, 16\)"):
        run(pipeline, latents=noise[..., 1:])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image": torch.rand(1, 3, 9, 9) * 255}, "Divide by 255"),
        ({"image": torch.full((1, 3, 9, 9), torch.nan)}, r"in \[0, 1\]"),
        ({"image": torch.rand(1, 1, 9, 9)}, "RGB"),
        ({"image": [Image.new("RGB", (9, 9)), Image.new("RGB", (9, 8))]}, "one size"),
        ({"output_type": "jpeg"}, "`output_type`"),
        ({"color_fix": "magic"}, "`color_fix`"),
        ({"upscale": 0.0}, "`upscale`"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"prompt": "a dog"}, "takes none"),
        ({"guidance_scale": 3.0}, "`guidance_scale` of 1"),
        ({"callback_on_step_end_tensor_inputs": ["secret"]}, "secret"),
    ],
)
def test_arguments_that_cannot_work_are_refused(pipeline, options, match):
    with pytest.raises(ValueError, match=match):
        run(pipeline, **options)


def test_before_the_first_call_no_guidance_is_on(prompted):
    assert prompted.guidance_scale == 1.0
    assert not prompted.do_classifier_free_guidance


def test_an_image_is_needed(pipeline):
    with pytest.raises(ValueError, match="restores an image"):
        pipeline(prompt="a dog")


def embeddings(count=1, seed=0):
    return torch.randn(count, 5, 8, generator=generator(seed))


def test_classifier_free_guidance_extrapolates_from_the_negative_prompt(prompted):
    outputs = []
    original = prompted.scheduler.step

    def step(model_output, *args, **kwargs):
        outputs.append(model_output)
        return original(model_output, *args, **kwargs)

    prompted.scheduler.step = step
    with_prompt, without = {"prompt_embeds": embeddings()}, {"prompt_embeds": embeddings(seed=1)}
    guided = with_prompt | {"negative_prompt_embeds": embeddings(seed=1), "guidance_scale": 3.0}
    for options in (with_prompt, without, guided):
        run(prompted, num_inference_steps=1, output_type="latent", **options)
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.allclose(outputs[2], outputs[1] + 3.0 * (outputs[0] - outputs[1]), atol=1e-4)


def test_without_classifier_free_guidance_no_negative_prompt_is_needed(prompted):
    assert run(prompted, prompt_embeds=embeddings()).shape == (1, 3, 50, 70)
    with pytest.raises(ValueError, match="no text encoder"):
        run(prompted, prompt_embeds=embeddings(), guidance_scale=2.0)


def test_each_image_keeps_its_prompt_in_all_its_results(prompted):
    images, prompts = torch.rand(2, 3, 30, 30, generator=generator(8)), embeddings(2)
    generators = [generator(index) for index in range(4)]
    options = {"num_inference_steps": 1, "output_type": "latent"}
    batch = run(prompted, images, prompt_embeds=prompts, num_images_per_prompt=2, generator=generators, **options)
    for index in range(4):
        image, own = images[index // 2 :][:1], prompts[index // 2 :][:1]
        alone = run(prompted, image, prompt_embeds=own, generator=generator(index), **options)
        assert torch.allclose(batch[index : index + 1], alone, atol=1e-4)
        other = run(prompted, image, prompt_embeds=prompts[1 - index // 2 :][:1], generator=generator(index), **options)
        assert not torch.allclose(batch[index : index + 1], other, atol=1e-3)
    with pytest.raises(ValueError, match="1 or 2 prompts, one for each image, got 3"):
        run(prompted, images, prompt_embeds=embeddings(3), **options)


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match="no folder here"):
        DiffBIRPipeline.from_pretrained("nobody/nothing", local_files_only=True)
