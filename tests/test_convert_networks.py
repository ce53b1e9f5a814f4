"""Official networks become diffusers' own: the same outputs, every key once, every shape right."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from golden import HEADS, golden, official_shapes, official_weights, relative
from official_checkpoints import make_networks, official_states

from milo_latent.convert.mapping import Layout, check_rest, rename, select
from milo_latent.convert.networks import find_network

CASES = ("a_16x16_t37", "b_16x16_t781", "c_24x16_t37", "d_24x16_t781", "e_batch2_16x16_t999_t0")
FORWARD = 1e-5  # relative to the largest value; rounding alone makes 2.3e-6


@pytest.fixture(scope="module")
def control_ldm():
    unet = find_network("UNet", official_weights("unet"), HEADS).load()
    return unet, find_network("IRControlNet", official_weights("controlnet"), HEADS).load()


@pytest.fixture(scope="module")
def networks():
    return make_networks()


@pytest.fixture(scope="module")
def states(networks):
    return official_states(networks)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_residuals_and_noise_are_the_official_ones(control_ldm, case):
    unet, controlnet = control_ldm
    given = select(golden("control_ldm_tiny_io"), case + ".")
    arguments = {"encoder_hidden_states": given["context"], "return_dict": False}
    down, middle = controlnet(given["x"], given["t"], controlnet_cond=given["hint"], **arguments)
    residuals = [*down, middle]
    assert len(residuals) == 13
    recorded = [key for key in given if key.startswith("control_")]
    assert len(recorded) == (13 if case.startswith("e_") else 0)
    for key in recorded:
        assert relative(residuals[int(key[-2:])], given[key]) < FORWARD, key
    for name, strength in (("eps", 1.0), ("eps_strength_0.5", 0.5), ("eps_without_control", 0.0)):
        scaled = [strength * residual for residual in residuals]
        added = {"down_block_additional_residuals": scaled[:-1], "mid_block_additional_residual": scaled[-1]}
        assert relative(unet(given["x"], given["t"], **arguments, **added)[0], given[name]) < FORWARD, name


def test_the_vae_and_its_gradient_are_the_official_ones():
    vae = find_network("VAE", official_weights("vae")).load()
    given = golden("vae_tiny_io")
    with torch.no_grad():
        posterior = vae.encode(given["image"]).latent_dist
    assert relative(posterior.parameters, given["moments"]) < FORWARD
    assert relative(posterior.mode() * vae.config.scaling_factor, given["latent_mode_scaled"]) < FORWARD
    latents = given["z"].requires_grad_()
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert relative(decoded.detach(), given["decoded"]) < FORWARD
    (gradient,) = torch.autograd.grad((decoded * given["grad_weight"]).sum(), latents)
    assert relative(gradient, given["grad_z"]) < FORWARD


@pytest.mark.parametrize(
    ("network", "kind", "parameters"),
    [("unet", "UNet", 865910724), ("controlnet", "IRControlNet", 363153280), ("vae", "VAE", 83653863)],
)
def test_full_size_key_lists_convert_strictly(network, kind, parameters):
    found = find_network(kind, official_shapes(network))
    assert sum(tensor.numel() for tensor in found.tensors.values()) == parameters
    assert found.tensors.keys() == found.model.state_dict().keys()


def test_the_full_size_text_encoder_loses_its_last_layer_only():
    state = select(official_shapes("clip"), "model.")
    found = find_network("text encoder", state)
    unused = ("transformer.resblocks.23.", "text_projection", "logit_scale")
    used = sum(tensor.numel() for key, tensor in state.items() if not key.startswith(unused))
    assert sum(tensor.numel() for tensor in found.tensors.values()) == used
    assert (found.model.config.num_hidden_layers, found.model.config.num_attention_heads) == (23, 16)
    assert found.model.config.hidden_act == "gelu"


@pytest.mark.parametrize("kind", ["SwinIR", "SCUNet", "BSRNet"])
def test_full_size_cleaners_convert_strictly(kind):
    found = find_network(kind, official_shapes(kind.lower()))
    assert found.tensors.keys() == found.model.state_dict().keys()


def test_full_size_configurations_are_those_of_stable_diffusion_2():
    config = find_network("UNet", official_shapes("unet")).model.config
    assert config.block_out_channels == (320, 640, 1280, 1280)
    assert config.attention_head_dim == (5, 10, 20, 20)
    assert (config.cross_attention_dim, config.layers_per_block, config.use_linear_projection) == (1024, 2, True)
    assert config.down_block_types == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert find_network("IRControlNet", official_shapes("controlnet")).model.config.conditioning_channels == 4


@torch.no_grad()
def test_networks_there_and_back_give_the_same_outputs(networks, states):
    sample, context, hint = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64), torch.randn(1, 4, 16, 16)
    unet = find_network("UNet", select(states["sd"], "model.diffusion_model.")).load()
    assert torch.equal(unet(sample, 5, context).sample, networks["unet"](sample, 5, context).sample)
    controlnet = find_network("IRControlNet", states["controlnet"]).load()
    theirs = networks["controlnet"](sample, 5, context, controlnet_cond=hint).mid_block_res_sample
    assert torch.equal(controlnet(sample, 5, context, controlnet_cond=hint).mid_block_res_sample, theirs)
    vae = find_network("VAE", select(states["sd"], "first_stage_model.")).load()
    assert torch.equal(vae.decode(sample).sample, networks["vae"].decode(sample).sample)
    text_encoder = find_network("text encoder", select(states["sd"], "cond_stage_model.model.")).load()
    tokens = torch.arange(77)[None]
    assert torch.equal(text_encoder(tokens)[0], networks["text_encoder"](tokens)[0])


def test_diffusers_own_converter_agrees(states):
    found = find_network("UNet", select(states["sd"], "model.diffusion_model."))
    theirs = convert_ldm_unet_checkpoint(dict(states["sd"]), dict(found.model.config))
    assert found.tensors.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in found.tensors.items())
    vae = find_network("VAE", select(states["sd"], "first_stage_model."))
    theirs = convert_ldm_vae_checkpoint(dict(states["sd"]), dict(vae.model.config))
    assert vae.tensors.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key].reshape(tensor.shape)) for key, tensor in vae.tensors.items())


def test_finding_a_network_copies_no_tensor(states):
    state = select(states["sd"], "model.diffusion_model.")
    addresses = {tensor.data_ptr() for tensor in state.values()}
    assert {tensor.data_ptr() for tensor in find_network("UNet", state).tensors.values()} == addresses
    assert isinstance(find_network("UNet", state).load(), UNet2DConditionModel)


def test_all_differences_are_listed_at_once_by_their_official_names(states):
    state = select(states["sd"], "model.diffusion_model.")
    state["something.weight"] = state.pop("out.2.bias")
    state["time_embed.0.bias"] = torch.zeros(3)
    for block in (1, 3):
        for part in ("norm1", "norm2", "norm3"):
            state.pop(f"input_blocks.{block}.1.transformer_blocks.0.{part}.weight", None)
    pattern = (
        r"file\.ckpt.* 4 missing \(input_blocks.*out\.2\.bias\), 1 unknown \(something\.weight\), "
        r"1 of another shape \(time_embed\.0\.bias: \(256,\) expected, \(3,\) came\)"
    )
    with pytest.raises(ValueError, match=pattern):
        find_network("UNet", state, what="the UNet in file.ckpt")


def test_long_lists_of_differences_are_counted(states):
    state = {key: value for key, value in states["controlnet"].items() if "middle_block.1" not in key}
    with pytest.raises(ValueError, match=r"missing \(.*; and \d+ more\)|missing \(.*, and \d+ more\)"):
        find_network("IRControlNet", state)


def test_a_network_without_its_first_keys_is_refused():
    for kind in ("UNet", "IRControlNet", "VAE", "text encoder"):
        with pytest.raises(ValueError, match="right file"):
            find_network(kind, {"some.weight": torch.zeros(1)})


def test_unusual_heads_must_be_named():
    with pytest.raises(ValueError, match="attention_head_dim"):
        find_network("UNet", official_weights("unet"))


def test_names_and_patterns_match_whole_keys_only():
    assert rename("conv1.weight", {"conv": "other"}) is None
    assert rename("conv.1.weight", {"conv": "other", "conv.1": "longer"}) == "longer.weight"
    layout = Layout(names={"a": "ours"}, ignorable=("skip",))
    one = torch.ones(1)
    assert layout.convert({"a.weight": one, "skip": one}) == ({"ours.weight": one}, [])
    assert layout.convert({"skip.more": one, "not.skip": one, "ab.weight": one})[1] == [
        "skip.more", "not.skip", "ab.weight",
    ]  # fmt: skip
    check_rest({"net.a": one, "extra": one}, ("net.",), ["extra"], what="a file")
    for key in ("extra.more", "not.extra"):
        with pytest.raises(ValueError, match="1 unknown"):
            check_rest({"net.a": one, key: one}, ("net.",), ["extra"], what="a file")


def test_a_key_given_twice_is_left_over():
    layout = Layout(names={"a": "ours", "b": "ours"})
    one, two = torch.ones(1), torch.zeros(1)
    converted, unknown = layout.convert({"a.weight": one, "b.weight": two})
    assert converted["ours.weight"] is one
    assert unknown == ["b.weight"]
