"""The guidance block in a modular SDXL pipeline of tiny random networks, and as custom code in a folder."""

import re
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLInputStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLBeforeDenoiseStep,
)

from milo_latent import MILO, DiffBIRPipeline, MILOGuidance
from milo_latent.diffbir.modular import DiffBIRBlocks
from milo_latent.guidance.modular import MILOGuidanceStep, save_blocks
from milo_latent.testing import generator, latent_pair, tiny_metric

REFERENCE, _ = latent_pair()
WIDTH = 8


def networks(scheduler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, sample_size=16,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=56,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.13025,
        )  # fmt: skip
        metric = MILO(channels=4, latent_space="test", scaling_factor=0.13025).frozen()
    return {"unet": unet, "vae": vae, "scheduler": scheduler}, metric


def modular(metric=None, scheduler=None):
    """Return a modular pipeline from prompt embeddings to latents, with the block where a metric is given."""
    denoise = StableDiffusionXLDenoiseStep()
    if metric is not None:
        denoise.sub_blocks.insert("milo_guidance", MILOGuidanceStep(), 2)
    blocks = {"input": StableDiffusionXLInputStep(), "before": StableDiffusionXLBeforeDenoiseStep()}
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks | {"denoise": denoise}).init_pipeline()
    parts, own = networks(scheduler or diffusers.EulerDiscreteScheduler())
    pipe.update_components(**{name: each for name, each in parts.items() if name in pipe.component_names})
    pipe.vae = parts["vae"]
    if metric is not None:
        pipe.update_components(metric=own)
    return pipe


def run(pipe, **options):
    embeds = torch.randn(1, 3, WIDTH, generator=generator(3))
    prompts = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
    pooled = {"pooled_prompt_embeds": embeds[:, 0], "negative_pooled_prompt_embeds": -embeds[:, 0]}
    noise = torch.randn(REFERENCE.shape, generator=generator(1))
    return pipe(
        **prompts, **pooled, **options, latents=noise, num_inference_steps=4, height=32, width=32, output="latents"
    )


@pytest.mark.parametrize("scheduler", [diffusers.EulerDiscreteScheduler(), diffusers.HeunDiscreteScheduler()])
@pytest.mark.parametrize("mode", ["mask", "metric"])
def test_the_block_equals_attach_bit_for_bit(scheduler, mode):
    plain, metric = modular(scheduler=scheduler), networks(None)[1]
    guide = MILOGuidance(metric, 0.4, "linear", 0.0, 0.8, reference_latents=REFERENCE, mode=mode)
    with guide.attach(plain):
        attached = run(plain)
    options = {"milo_scale": 0.4, "milo_schedule": "linear", "milo_interval": (0.0, 0.8), "milo_mode": mode}
    guided = modular(metric, scheduler)
    for _ in range(2):
        assert torch.equal(run(guided, reference_latents=REFERENCE, **options), attached)
    assert not torch.equal(attached, run(plain))


def test_at_one_the_block_reaches_the_reference_and_at_zero_it_changes_no_bit():
    guided, plain = modular("with a metric"), modular()
    end = run(guided, reference_latents=REFERENCE, milo_scale=1.0, milo_schedule="constant")
    assert (end - REFERENCE).abs().max() < 2e-5
    assert torch.equal(run(guided, reference_latents=REFERENCE, milo_scale=0.0), run(plain))


def test_a_run_after_an_interrupted_one_begins_anew():
    guided, stop = modular("with a metric"), ValueError("interrupted")
    options = {"milo_scale": 0.4, "milo_schedule": "linear"}
    expected = run(guided, reference_latents=REFERENCE, **options)
    step, calls = guided.scheduler.step, []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise stop
        return step(*arguments, **keywords)

    guided.scheduler.step = interrupted
    with pytest.raises(ValueError, match="interrupted"):
        run(guided, reference_latents=-REFERENCE, milo_scale=1.0, milo_schedule="constant")
    guided.scheduler.step = step
    assert torch.equal(run(guided, reference_latents=REFERENCE, **options), expected)


def test_it_refuses_a_metric_of_other_latents():
    guided = modular("with a metric")
    guided.update_components(metric=MILO(channels=4, scaling_factor=0.5).frozen())
    with pytest.raises(ValueError, match="Train MILO_L for that VAE"):
        run(guided, reference_latents=REFERENCE)


def test_saved_blocks_load_as_custom_code_in_a_fresh_process(tmp_path, repository):
    save_blocks(MILOGuidanceStep(), tmp_path / "block")
    for file in (tmp_path / "block").iterdir():  # the folder for the hub is the same
        shipped = (repository / "hub" / "milo_guidance" / file.name).read_text()
        assert re.sub("_version.*", "", shipped) == re.sub("_version.*", "", file.read_text())
    code = f"""
from diffusers.modular_pipelines import ModularPipelineBlocks
block = ModularPipelineBlocks.from_pretrained({str(tmp_path / "block")!r}, trust_remote_code=True)
print(type(block).__name__, [spec.name for spec in block.expected_components])
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[0] == "MILOGuidanceStep ['metric']"


def test_the_custom_pipeline_for_the_hub_loads(model_folder, repository):
    folder = str(repository / "hub" / "diffbir_pipeline")
    pipe = diffusers.DiffusionPipeline.from_pretrained(model_folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(pipe) is DiffBIRPipeline


def restored(blocks, pipeline, **options):
    pipe = blocks.init_pipeline()
    parts = pipeline.components | {"metric": tiny_metric()}
    pipe.update_components(**{name: parts[name] for name in pipe.component_names})
    image = torch.rand(1, 3, 50, 70, generator=generator(5))
    return pipe(image=image, num_inference_steps=2, generator=generator(), output_type="pt", output="images", **options)


@pytest.mark.parametrize("options", [{}, {"upscale": 2.0, "color_fix": "adain"}])
def test_blocks_of_diffbir_restore_as_the_pipeline(pipeline, options):
    expected = pipeline(
        image=torch.rand(1, 3, 50, 70, generator=generator(5)), num_inference_steps=2, generator=generator(),
        output_type="pt", **options,
    ).images  # fmt: skip
    assert torch.equal(restored(DiffBIRBlocks(), pipeline, **options), expected)


def test_blocks_of_diffbir_take_prompts_and_guidance(prompted):
    embeds = torch.randn(1, 3, 8, generator=generator(3))
    prompts = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "guidance_scale": 2.0}
    blocks = DiffBIRBlocks()
    blocks.sub_blocks["denoise"].sub_blocks.insert("milo_guidance", MILOGuidanceStep(), 1)
    guide = MILOGuidance(tiny_metric(), 0.4)
    expected = prompted(
        image=torch.rand(1, 3, 50, 70, generator=generator(5)), num_inference_steps=2, generator=generator(),
        output_type="pt", callback_on_step_end=guide, **prompts,
    ).images  # fmt: skip
    assert torch.equal(restored(blocks, prompted, milo_scale=0.4, **prompts), expected)


def test_blocks_of_diffbir_are_saved_as_custom_code_and_run_in_a_fresh_process(model_folder, tmp_path, repository):
    save_blocks(DiffBIRBlocks(), tmp_path / "blocks")
    code = f"""
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from milo_latent import DiffBIRPipeline
blocks = ModularPipelineBlocks.from_pretrained({str(tmp_path / "blocks")!r}, trust_remote_code=True)
parts, pipe = DiffBIRPipeline.from_pretrained({str(model_folder)!r}).components, blocks.init_pipeline()
pipe.update_components(**{{name: parts[name] for name in pipe.component_names}})
rng = torch.Generator().manual_seed(5)
image = torch.rand(1, 3, 50, 70, generator=rng)
options = {{"num_inference_steps": 2, "generator": rng, "output_type": "pt", "output": "images"}}
torch.save(pipe(image=image, **options), {str(tmp_path / "restored.pt")!r})
print(list(blocks.sub_blocks))
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "['clean', 'encode', 'prepare', 'denoise', 'decode', 'color']"
    rng = generator(5)
    expected = DiffBIRPipeline.from_pretrained(model_folder)(
        image=torch.rand(1, 3, 50, 70, generator=rng), num_inference_steps=2, generator=rng, output_type="pt"
    ).images
    assert torch.allclose(torch.load(tmp_path / "restored.pt", weights_only=True), expected, atol=1e-6)


def test_a_color_fix_that_is_not_known_is_refused(pipeline):
    with pytest.raises(ValueError, match="`color_fix` to be one of"):
        restored(DiffBIRBlocks(), pipeline, color_fix="sepia")
