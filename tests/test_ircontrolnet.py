"""IRControlNet: a ControlNet conditioned on latents, whose split convolution equals the official one."""

import torch
from torch import nn

from milo_latent import IRControlNet
from milo_latent.testing import tiny_pipeline


def test_the_split_convolution_is_the_concatenated_one():
    controlnet = tiny_pipeline().controlnet
    joined = nn.Conv2d(8, controlnet.config.block_out_channels[0], 3, padding=1)
    joined.weight.data = torch.cat([controlnet.conv_in.weight, controlnet.controlnet_cond_embedding.weight], dim=1)
    joined.bias.data = controlnet.conv_in.bias
    sample, condition = torch.randn(2, 1, 4, 16, 16).unbind()
    split = controlnet.conv_in(sample) + controlnet.controlnet_cond_embedding(condition)
    assert torch.allclose(split, joined(torch.cat([sample, condition], dim=1)), atol=1e-5)


def test_save_and_load_round_trip_without_a_word(tmp_path, caplog):
    controlnet = tiny_pipeline().controlnet
    controlnet.save_pretrained(tmp_path)
    loaded, info = IRControlNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert dict(loaded.config)["conditioning_channels"] == 4
    for name, value in controlnet.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
