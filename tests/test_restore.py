"""The one call and its settings: defaults, batches, refusals."""

import inspect
import itertools
import os
import shutil

import numpy as np
import pytest
import torch

from milo_latent import load_restorer
from milo_latent.diffbir.versions import VERSIONS, Release
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.latents.codec import encode_image
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.faces import TEMPLATE, Face
from milo_latent.restoration.restore import restore_image
from milo_latent.restoration.settings import RestorationSettings
from milo_latent.testing import generator


@pytest.fixture
def restorer(pipeline, metric):
    pipeline.register_modules(metric=metric)
    return pipeline


def test_every_task_runs_with_its_defaults(restorer):
    image = torch.rand(1, 3, 20, 24)
    restorer.register_modules(background_cleaner=restorer.cleaner)  # the other is that of faces
    for task, upscale in (("denoise", 1), ("sr", 4), ("face", 1)):
        restored = restore_image(image, model=restorer, task=task)
        assert restored.shape == (1, 3, 20 * upscale, 24 * upscale)


def test_an_image_is_restored_in_a_batch_as_alone(restorer):
    images = torch.rand(3, 3, 30, 30, generator=generator())
    batch = restore_image(images, model=restorer, steps=2)
    alone = torch.cat([restore_image(image[None], model=restorer, steps=2) for image in images])
    assert torch.allclose(batch, alone, atol=1e-4)


def test_scale_zero_gives_the_bits_of_no_callback(restorer, pipeline):
    image = torch.rand(1, 3, 30, 30)
    plain = pipeline(image=image, num_inference_steps=2, generator=[generator(4)], output_type="pt").images
    assert torch.equal(restore_image(image, model=restorer, steps=2, seed=4, milo_scale=0.0), plain)


def test_strength_and_curriculum_are_those_of_the_guide(restorer):
    """In four steps all schedules differ; in two or three, "linear" and "cosine" are alike."""
    image, results = torch.rand(1, 3, 30, 30, generator=generator(2)), []
    for schedule in ("constant", "linear", "cosine"):
        guide = MILOGuidance(restorer.metric, 0.7, schedule)
        options = {"num_inference_steps": 4, "generator": [generator(4)], "output_type": "pt"}
        expected = restorer(image=image, callback_on_step_end=guide, **options).images
        settings = {"steps": 4, "seed": 4, "milo_scale": 0.7, "schedule": schedule}
        results.append(restore_image(image, model=restorer, **settings))
        assert torch.equal(results[-1], expected)
    assert torch.equal(restore_image(image, model=restorer, steps=4, seed=4, milo_scale=0.7), results[2])
    assert all(not torch.equal(*pair) for pair in itertools.combinations(results, 2))


def test_what_is_saved_opens_again_whole(restorer, pipeline, tmp_path):
    pipeline.prompt_cache.stored = {"a photo": torch.rand(1, 77, 8)}
    restorer.register_modules(background_cleaner=pipeline.cleaner)
    restorer.register_to_config(release_version="v2", release_task="face")
    restorer.save_pretrained(tmp_path / "model")
    opened = load_restorer(tmp_path / "model", device="cpu")
    assert opened.release == Release(VERSIONS["v2"], "face")
    assert torch.equal(opened.prompt_cache.stored["a photo"], pipeline.prompt_cache.stored["a photo"])
    ref, dist = torch.randn(2, 1, 4, 16, 16, generator=generator())
    assert torch.equal(opened.metric(ref=ref, dist=dist), restorer.metric(ref=ref, dist=dist))
    for part in ("cleaner", "unet", "controlnet", "vae"):
        expected = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(opened, part).state_dict().items())
    assert type(opened.background_cleaner) is type(pipeline.cleaner)


def test_what_is_saved_can_be_read_by_others_and_what_is_opened_is_frozen(restorer, tmp_path):
    umask = os.umask(0o022)
    try:
        restorer.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(umask)
    weights = list((tmp_path / "saved").rglob("*.safetensors"))
    assert len(weights) > 3
    assert {path.stat().st_mode & 0o777 for path in weights} == {0o644}
    other = tmp_path / "saved" / "other"
    other.mkdir()
    shutil.copy(weights[0], other / "private.safetensors")
    (other / "private.safetensors").chmod(0o600)
    restorer.save_pretrained(tmp_path / "saved")
    assert (other / "private.safetensors").stat().st_mode & 0o777 == 0o600  # none of ours
    opened = load_restorer(tmp_path / "saved", device="cpu")
    assert not encode_image(opened.vae, torch.rand(1, 3, 64, 64)).requires_grad


def test_what_cannot_be_restored_is_refused(restorer, pipeline):
    with pytest.raises(ValueError, match="`task`"):
        restore_image(torch.rand(1, 3, 9, 9), model=restorer, task="colorize")
    with pytest.raises(ValueError, match="batch axis"):
        restore_image(torch.rand(9, 9), model=restorer)
    with pytest.raises(ValueError, match="NaN or infini"):
        restore_image(torch.tensor([0.5, 0.5, torch.nan]).reshape(1, 3, 1, 1), model=restorer)
    pipeline.register_modules(metric=None)
    with pytest.raises(ValueError, match="`metric`"):
        restore_image(torch.rand(1, 3, 9, 9), model=pipeline, milo_scale=0.5)
    with pytest.raises(FileNotFoundError, match="shipped set"):
        load_restorer("nowhere")
    with pytest.raises(FileNotFoundError, match="a metric alone"):
        load_restorer("milo-sd")


def test_too_large_an_image_says_so(restorer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(restorer.unet, "forward", fail)
    with pytest.raises(MemoryError, match=r"9x8 pixels: Not enough memory.*enable_tiling.*--tile"):
        restore_image(torch.rand(1, 3, 8, 9), model=restorer, steps=1)


def test_other_errors_are_not_taken_for_a_lack_of_memory(restorer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("unsupported memory format option")

    monkeypatch.setattr(restorer.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="memory format"):
        restore_image(torch.rand(1, 3, 8, 9), model=restorer, steps=1)


def test_a_model_without_a_metric_restores_without_guidance(pipeline):
    image = torch.rand(1, 3, 30, 30)
    restored = restore_image(image, model=pipeline, steps=1)
    assert restored.shape == image.shape


def a_face(image):
    """Say that there is one face, where its landmarks are those of the template, shrunk to the photo."""
    landmarks = torch.tensor(TEMPLATE) * (image.shape[3] / 512)
    return [Face((0.0, 0.0, float(image.shape[3]), float(image.shape[2])), landmarks)]


def test_faces_and_background_are_restored_by_their_own_cleaners(restorer, monkeypatch):
    seen = []

    def call(pipeline, *, image, **arguments):
        seen.append((tuple(image.shape[2:]), arguments["upscale"], type(pipeline.cleaner).__name__))
        size = [round(side * arguments["upscale"]) for side in image.shape[2:]]
        return type("Result", (), {"images": torch.full((1, 3, *size), 0.5)})

    monkeypatch.setattr(type(restorer), "__call__", call)
    other = type(restorer.cleaner)(channels=(4, 4), blocks=(1, 1))
    restorer.register_modules(background_cleaner=other)
    photo = torch.rand(1, 3, 128, 128)
    restored = restore_image(photo, model=restorer, task="unaligned_face", detector=a_face)
    assert restored.shape == (1, 3, 256, 256)
    assert [entry[:2] for entry in seen] == [((128, 128), 2.0), ((512, 512), 1.0)]
    assert restorer.for_background().cleaner is other
    assert restorer.for_background().unet is restorer.unet


def test_faces_need_a_detector_and_a_face(restorer):
    photo = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="`detector`"):
        restore_image(photo, model=restorer, task="unaligned_face")
    restorer.register_modules(background_cleaner=restorer.cleaner)
    with pytest.raises(ValueError, match="found none"):
        restore_image(photo, model=restorer, task="unaligned_face", detector=lambda image: [])


def test_a_seed_for_each_image_is_that_of_the_image_alone(restorer):
    images = torch.rand(2, 3, 30, 30, generator=generator())
    batch = restore_image(images, model=restorer, steps=2, seed=[3, 8])
    alone = torch.cat(
        [
            restore_image(image[None], model=restorer, steps=2, seed=seed)
            for image, seed in zip(images, (3, 8), strict=True)
        ]
    )
    assert torch.allclose(batch, alone, atol=1e-4)
    assert torch.equal(restore_image(images, model=restorer, steps=2, seed=np.array([3, 8])), batch)
    alike = [restore_image(images, model=restorer, steps=2, seed=seed) for seed in (3, np.int64(3))]
    assert torch.equal(*alike)
    with pytest.raises(ValueError, match="2, one for each"):
        restore_image(images, model=restorer, steps=1, seed=[1, 2, 3])


@pytest.mark.parametrize("version", VERSIONS)
def test_an_official_diffbir_samples_as_its_readme_says(prompted, version):
    recommended = VERSIONS[version].recommended
    texts = (recommended.prompt, recommended.negative_prompt)
    prompted.prompt_cache.stored = dict.fromkeys(texts, torch.rand(1, 5, 8))
    prompted.register_to_config(release_version=version, release_task="sr")
    settings = RestorationSettings(noise_aug=5).resolve(prompted)
    assert (settings.task, settings.upscale, settings.steps) == ("sr", 4.0, recommended.num_inference_steps)
    official = prompted.release.call_arguments | {"noise_aug": 5}  # the caller's
    assert {name: settings.call_arguments[name] for name in official} == official
    assert RestorationSettings(steps=3).resolve(prompted).call_arguments["num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "a dog"), ("negative_prompt", "a cat"), ("guidance_scale", 2.0), ("rescale_cfg", True),
        ("guidance_rescale", 0.5), ("controlnet_conditioning_scale", 0.5), ("start_point", "cond"), ("noise_aug", 7),
        ("color_fix", "adain"), ("eta", 0.5), ("compatibility", "official"), ("prompt_embeds", torch.rand(1, 5, 8)),
        ("negative_prompt_embeds", torch.rand(1, 5, 8)),
    ],
)  # fmt: skip
def test_every_option_of_the_pipeline_reaches_it(prompted, monkeypatch, name, value):
    prompted.prompt_cache.stored = dict.fromkeys(("a dog", "a cat", ""), torch.rand(1, 5, 8))
    given = {}

    def call(pipeline, *, image, **arguments):
        given.update(arguments)
        return type("Result", (), {"images": image})

    monkeypatch.setattr(type(prompted), "__call__", call)
    restore_image(torch.rand(1, 3, 20, 20), model=prompted, **{name: value})
    assert given[name] is value


def test_what_is_not_said_is_the_pipeline_s_default(prompted):
    prompted.prompt_cache.stored = {"": torch.rand(1, 5, 8)}
    defaults = {name: each.default for name, each in inspect.signature(DiffBIRPipeline.__call__).parameters.items()}
    arguments = RestorationSettings().resolve(prompted).call_arguments
    assert arguments.pop("num_inference_steps") == 1
    assert (arguments.pop("stage"), arguments.pop("fidelity")) == ("all", 0.0)
    assert arguments == {name: defaults[name] for name in arguments}


def test_unknown_settings_are_refused_by_name(restorer):
    for name in ("num_inference_steps", "num_steps"):
        with pytest.raises(TypeError, match=name):
            restore_image(torch.rand(1, 3, 20, 20), model=restorer, **{name: 3})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tile": 100}, "at least 320"), ({"steps": 0}, "num_inference_steps"), ({"milo_scale": 5.0}, "milo_scale"),
        ({"schedule": "late"}, "schedule"), ({"upscale": 0.0}, "upscale"), ({"noise_aug": 5000}, "noise_aug"),
        ({"prompt": "a dog"}, "takes none"), ({"guidance_scale": 4.0}, "takes no prompt"),
        ({"color_fix": "sepia"}, "color_fix"), ({"task": "unaligned_face"}, "detector"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_computed(restorer, monkeypatch, settings, match):
    monkeypatch.setattr(type(restorer), "__call__", None)
    with pytest.raises(ValueError, match=match):
        RestorationSettings(**settings).resolve(restorer)


def test_a_release_is_not_used_for_a_task_that_takes_another_cleaner(restorer):
    restorer.register_to_config(release_version="v2", release_task="sr")
    with pytest.raises(ValueError, match="Convert a folder with --task denoise"):
        restore_image(torch.rand(1, 3, 20, 20), model=restorer, task="denoise")
