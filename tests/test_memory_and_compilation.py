"""Diffusers' own ways to save memory and to compile, on a pipeline of tiny networks that attend to prompts."""

import copy

import diffusers
import pytest
import torch

from milo_latent import DiffBIRPipeline, IRControlNet
from milo_latent.testing import generator

NEEDS_NEWER_TORCH = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="group offloading without an accelerator needs torch 2.7"
)


@pytest.fixture
def call():
    image, embeds = torch.rand(1, 3, 128, 128, generator=generator(5)), torch.randn(1, 3, 8, generator=generator(3))
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "guidance_scale": 2.0}

    def run(pipeline):
        return pipeline(
            image=image, **options, num_inference_steps=2, generator=generator(), output_type="latent"
        ).images

    return run


def test_repeated_blocks_are_compiled_and_give_the_same(prompted, call):
    before = call(prompted)
    for network in (prompted.unet, prompted.controlnet):
        network.compile_repeated_blocks(backend="eager", fullgraph=True)
        compiled = [each for each in network.modules() if each._compiled_call_impl is not None]
        assert {type(each).__name__ for each in compiled} == {"BasicTransformerBlock"}
    assert torch.allclose(call(prompted), before, atol=1e-6)


def test_a_device_map_loads_the_controlnet(prompted, tmp_path):
    prompted.controlnet.save_pretrained(tmp_path)
    loaded = IRControlNet.from_pretrained(tmp_path, device_map="auto")
    assert set(loaded.hf_device_map.values()) <= {"cpu", "disk"}
    for name, value in prompted.controlnet.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_layerwise_casting_stores_in_half_and_computes_in_full(prompted, call):
    whole = copy.deepcopy(prompted)
    before = call(prompted)
    for network in (prompted.unet, prompted.controlnet):
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    kept = prompted.controlnet.down_blocks[0].resnets[0].conv1.weight
    assert kept.dtype == torch.bfloat16
    after = call(prompted)
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.2 * before.abs().max()
    assert torch.equal(call(whole), before)


@NEEDS_NEWER_TORCH
def test_group_offload_gives_the_same(prompted, call):
    before, cpu = call(prompted), torch.device("cpu")
    for network in (prompted.unet, prompted.controlnet, prompted.vae):
        network.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
        )
    assert torch.equal(call(prompted), before)


@pytest.mark.parametrize("way", ["the UNet", "the pipeline"])
def test_a_unet_is_loaded_in_8_bits_and_gives_nearly_the_same(prompted, call, tmp_path, way):
    quantization = pytest.importorskip("torchao.quantization", reason="quantized loading needs torchao")
    settings = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    expected = call(prompted)
    prompted.save_pretrained(tmp_path)
    if way == "the UNet":
        options = {"subfolder": "unet", "quantization_config": settings, "dtype": torch.float32}
        loaded = DiffBIRPipeline.from_pretrained(
            tmp_path, unet=diffusers.UNet2DConditionModel.from_pretrained(tmp_path, **options)
        )
    else:
        several = diffusers.quantizers.PipelineQuantizationConfig(quant_mapping={"unet": settings})
        loaded = DiffBIRPipeline.from_pretrained(tmp_path, quantization_config=several, dtype=torch.float32)
    linear = [module.weight for module in loaded.unet.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(weight).__name__ for weight in linear} == {"Int8Tensor"}
    got = call(loaded)
    assert not torch.equal(got, expected)
    assert torch.allclose(got, expected, atol=0.05)
