"""The one call: defaults of each task, batches, refusals."""

import pytest
import torch

from milo_latent import Restorer, load_restorer
from milo_latent.restore import TASKS, restore_image
from milo_latent.testing import generator


@pytest.fixture
def restorer(pipeline, metric):
    return Restorer(pipeline, metric)


def test_every_task_runs_with_its_defaults(restorer):
    image = torch.rand(1, 3, 20, 24)
    for name, task in TASKS.items():
        restored = restore_image(image, model=restorer, task=name)
        assert restored.shape == (1, 3, 20 * task.upscale, 24 * task.upscale)


def test_an_image_is_restored_in_a_batch_as_alone(restorer):
    images = torch.rand(3, 3, 30, 30, generator=generator())
    batch = restore_image(images, model=restorer, steps=2)
    alone = torch.cat([restore_image(image[None], model=restorer, steps=2) for image in images])
    assert torch.allclose(batch, alone, atol=1e-4)


def test_scale_zero_gives_the_bits_of_no_callback(restorer, pipeline):
    image = torch.rand(1, 3, 30, 30)
    plain = pipeline(image=image, num_inference_steps=2, generator=[generator(4)], output_type="pt").images
    assert torch.equal(restore_image(image, model=restorer, steps=2, seed=4, milo_scale=0.0), plain)


def test_what_cannot_be_restored_is_refused(restorer, pipeline):
    with pytest.raises(ValueError, match="`task`"):
        restore_image(torch.rand(1, 3, 9, 9), model=restorer, task="colourise")
    with pytest.raises(ValueError, match="batch axis"):
        restore_image(torch.rand(3, 9, 9), model=restorer)
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        restore_image(torch.tensor([0.5, 0.5, torch.nan]).reshape(1, 3, 1, 1), model=restorer)
    with pytest.raises(ValueError, match="`metric` folder"):
        restore_image(torch.rand(1, 3, 9, 9), model=Restorer(pipeline, None), milo_scale=0.5)
    with pytest.raises(FileNotFoundError, match="shipped set"):
        load_restorer("nowhere")


def test_too_large_an_image_says_so(restorer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(restorer.pipeline.unet, "forward", fail)
    with pytest.raises(MemoryError, match=r"9x8 pixels: Not enough memory.*enable_tiling.*--tile"):
        restore_image(torch.rand(1, 3, 8, 9), model=restorer, steps=1)


def test_other_errors_are_not_taken_for_a_lack_of_memory(restorer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("unsupported memory format option")

    monkeypatch.setattr(restorer.pipeline.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="memory format"):
        restore_image(torch.rand(1, 3, 8, 9), model=restorer, steps=1)


def test_a_model_without_a_metric_restores_without_guidance(pipeline):
    image = torch.rand(1, 3, 30, 30)
    restored = restore_image(image, model=Restorer(pipeline, None), steps=1)
    assert restored.shape == image.shape
