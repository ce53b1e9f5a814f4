"""LoRA and IP-adapters, loaded into DiffBIRPipeline by diffusers' own methods."""

import subprocess
import sys

import pytest
import torch

from milo_latent import DiffBIRPipeline
from milo_latent.diffbir.prompts import repeat_image_prompts, scaled_lora
from milo_latent.testing import generator

WIDTH = 8


def call(pipeline, image_embeds=None, **options):
    embeds = torch.randn(1, 3, WIDTH, generator=generator(3))
    prompts = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "guidance_scale": 2.0}
    options = prompts | {"generator": generator()} | options
    return pipeline(
        image=torch.rand(1, 3, 128, 128, generator=generator(5)), ip_adapter_image_embeds=image_embeds,
        num_inference_steps=2, output_type="latent", **options,
    ).images  # fmt: skip


def ip_adapter(unet):
    """Weights of an adapter from image embeddings of 4 numbers to 4 tokens."""
    weights, rng = {}, generator(7)
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(cross):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * index + 1}.{key}.weight"] = torch.randn(attention.inner_dim, WIDTH, generator=rng)
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, 4, generator=rng), "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": weights}


def test_an_ip_adapter_shows_the_unet_a_picture_and_can_be_unloaded(prompted):
    before = call(prompted)
    prompted.load_ip_adapter(ip_adapter(prompted.unet), subfolder="", weight_name="", image_encoder_folder=None)
    picture = torch.randn(1, 1, 4, generator=generator(8))
    both = torch.cat([torch.zeros_like(picture), picture])  # the negative one first
    seen = []
    hook = prompted.unet.register_forward_pre_hook(
        lambda network, arguments, options: seen.append(options["added_cond_kwargs"]["image_embeds"][0]),
        with_kwargs=True,
    )
    shown = call(prompted, [both])
    hook.remove()
    assert torch.equal(seen[0], both)
    assert not torch.allclose(shown, before, atol=1e-3)
    assert not torch.allclose(call(prompted, [-both]), shown, atol=1e-3)
    several = call(prompted, [both], num_images_per_prompt=2, generator=[generator(), generator()])
    assert torch.allclose(several, shown.expand_as(several), atol=1e-5)
    assert torch.isfinite(call(prompted, [picture], guidance_scale=1.0)).all()
    prompted.set_ip_adapter_scale(0.0)
    assert torch.allclose(call(prompted, [both]), before, atol=1e-5)
    prompted.unload_ip_adapter()
    assert torch.allclose(call(prompted), before, atol=1e-6)


def test_an_ip_adapter_acts_in_every_tile(prompted):
    prompted.load_ip_adapter(ip_adapter(prompted.unet), subfolder="", weight_name="", image_encoder_folder=None)
    both = torch.randn(2, 1, 4, generator=generator(8))
    prompted.enable_tiling(64, stages=["diffusion"])
    assert not torch.allclose(call(prompted, [both]), call(prompted, [-both]), atol=1e-3)


@pytest.mark.parametrize(
    ("embeds", "match"),
    [
        (None, "for each of 1 IP-adapters, got 0"),
        ([torch.zeros(2, 1, 4)] * 2, "for each of 1 IP-adapters, got 2"),
        ([torch.zeros(2, 4)], r"shape \(images, pictures, ..., width\).*got \(2, 4\)"),
        ([torch.zeros(1, 1, 4)], r"the negative ones first, got \(1, 1, 4\)"),
        ([torch.zeros(6, 1, 4)], "Expected 1 or 1 prompts"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(prompted, embeds, match):
    prompted.load_ip_adapter(ip_adapter(prompted.unet), subfolder="", weight_name="", image_encoder_folder=None)
    with pytest.raises(ValueError, match=match):
        call(prompted, embeds)


def test_embeddings_without_an_adapter_are_refused(pipeline):
    with pytest.raises(ValueError, match="for each of 0 IP-adapters, got 1"):
        pipeline(image=torch.rand(1, 3, 128, 128), ip_adapter_image_embeds=[torch.zeros(1, 1, 4)])


def test_a_lora_can_be_saved_loaded_scaled_and_unloaded(prompted, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    before = call(prompted)
    prompted.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    adapted = call(prompted)
    layers = peft.get_peft_model_state_dict(prompted.unet)
    prompted.save_lora_weights(tmp_path, unet_lora_layers=layers)
    prompted.unload_lora_weights()
    assert torch.allclose(call(prompted), before, atol=1e-6)
    prompted.load_lora_weights(tmp_path)
    assert torch.allclose(call(prompted), adapted, atol=1e-5)
    assert not torch.allclose(adapted, before, atol=1e-4)
    prompted.fuse_lora()
    assert torch.allclose(call(prompted), adapted, atol=1e-4)


def test_the_strength_of_a_lora_is_an_argument_of_the_call(prompted):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    before = call(prompted)
    prompted.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = call(prompted)
    assert torch.allclose(call(prompted, cross_attention_kwargs={"scale": 1.0}), adapted, atol=1e-6)
    assert torch.allclose(call(prompted, cross_attention_kwargs={"scale": 0.0}), before, atol=1e-6)
    assert torch.allclose(call(prompted), adapted, atol=1e-6)
    prompted.enable_tiling(64, stages=["diffusion"])
    in_tiles = call(prompted)
    assert not torch.allclose(call(prompted, cross_attention_kwargs={"scale": 0.0}), in_tiles, atol=1e-4)


def test_the_strength_reaches_the_lora_of_the_text_encoder_and_is_put_back():
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    encoder = peft.inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(4, 4)))
    given, base = torch.ones(1, 4), encoder[0].base_layer(torch.ones(1, 4))
    whole = encoder(given)
    with scaled_lora(encoder, 0.5):
        assert torch.allclose(encoder(given), (whole + base) / 2, atol=1e-6)
    with scaled_lora(encoder, None):
        assert torch.equal(encoder(given), whole)
    assert torch.allclose(encoder(given), whole, atol=1e-6)


def test_masks_of_ip_adapters_choose_where_they_act_but_not_in_tiles(prompted):
    prompted.load_ip_adapter(ip_adapter(prompted.unet), subfolder="", weight_name="", image_encoder_folder=None)
    both, mask = torch.randn(2, 1, 4, generator=generator(8)), torch.zeros(1, 1, 128, 128)
    nowhere, everywhere = ({"ip_adapter_masks": [each]} for each in (mask, mask + 1))
    assert torch.allclose(call(prompted, [both], cross_attention_kwargs=everywhere), call(prompted, [both]), atol=1e-4)
    left_out = call(prompted, [both], cross_attention_kwargs=nowhere)
    prompted.set_ip_adapter_scale(0.0)
    assert torch.allclose(left_out, call(prompted, [both]), atol=1e-4)
    prompted.enable_tiling(64, stages=["diffusion"])
    with pytest.raises(ValueError, match="no `ip_adapter_masks` with tiles"):
        call(prompted, [both], cross_attention_kwargs=everywhere)


def test_faces_are_shown_with_an_axis_more():
    ((negative, positive),) = repeat_image_prompts([torch.arange(4.0).view(2, 1, 1, 2)], 1, 3, guided=True)
    assert negative.flatten().tolist() == [0.0, 1.0] * 3
    assert positive.flatten().tolist() == [2.0, 3.0] * 3
    assert positive.shape == (3, 1, 1, 2)


def test_loading_a_lora_forgets_the_encoded_prompts(prompted, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    prompted.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(prompted.unet)
    prompted.save_lora_weights(tmp_path, unet_lora_layers=layers)
    prompted.unload_lora_weights()
    prompted.prompt_cache._kept["a cat", torch.float32] = torch.zeros(3, WIDTH)
    prompted.load_lora_weights(tmp_path)
    assert not prompted.prompt_cache._kept


def test_a_text_encoder_with_a_lora_is_not_saved_without_its_weights(prompted, tmp_path):
    prompted.text_encoder = torch.nn.Linear(1, 1)
    prompted.text_encoder.peft_config = {"default": None}
    with pytest.raises(ValueError, match=r"without a LoRA.*`fuse_lora\(\)` and then `unload_lora_weights\(\)`"):
        prompted.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_saved_can_be_opened_whatever_was_asked_for(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("*.bin"))
    opened = DiffBIRPipeline.from_pretrained(tmp_path)
    assert torch.equal(opened.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_importing_the_pipeline_imports_no_ip_adapters():
    code = "import sys, milo_latent.pipelines.diffbir; sys.exit('diffusers.loaders.ip_adapter' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
