"""How the official networks (of Latent Diffusion and OpenCLIP) name what diffusers and transformers name otherwise.

The number of resolutions is `levels`, and that of the residual blocks of a level on the way down is `layers`.
"""

from __future__ import annotations

from milo_latent.convert.mapping import Layout

RESNET = {  # residual block with a time embedding
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TIME = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _below(official: str, ours: str, table: dict[str, str]) -> dict[str, str]:
    return {f"{official}.{name}": f"{ours}.{target}" for name, target in table.items()}


def _encoder_names(levels: int, layers: int) -> dict[str, str]:
    """Return the names that UNet and ControlNet share: time embedding, the way down, the middle."""
    names, index = dict(TIME), 1  # input_blocks.0 is the first convolution
    for level in range(levels):
        for layer in range(layers):
            names |= _below(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}", RESNET)
            names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{layer}"
            index += 1
        names[f"input_blocks.{index}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        index += 1
    names |= _below("middle_block.0", "mid_block.resnets.0", RESNET)
    names["middle_block.1"] = "mid_block.attentions.0"
    return names | _below("middle_block.2", "mid_block.resnets.1", RESNET)


def unet_layout(levels: int, layers: int, *, attends: tuple[bool, ...]) -> Layout:
    """Return the layout of the UNet; `attends` tells for each level, from the finest, whether it has attention."""
    names = _encoder_names(levels, layers) | {"input_blocks.0.0": "conv_in"}
    index = 0
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(layers + 1):  # one more than on the way down
            names |= _below(f"output_blocks.{index}.0", f"up_blocks.{block}.resnets.{layer}", RESNET)
            if attends[level]:
                names[f"output_blocks.{index}.1"] = f"up_blocks.{block}.attentions.{layer}"
            index += 1
        upsampler = f"output_blocks.{index - 1}.{2 if attends[level] else 1}.conv"
        names[upsampler] = f"up_blocks.{block}.upsamplers.0.conv"
    return Layout(names | {"out.0": "conv_norm_out", "out.2": "conv_out"})


def controlnet_layout(levels: int, layers: int) -> Layout:
    """Return the layout of IRControlNet.

    Its first convolution takes noisy latents and condition latents, concatenated. Split along its input channels, it
    becomes `conv_in` and the convolution of the condition.
    """
    names = _encoder_names(levels, layers) | {"input_blocks.0.0.bias": "conv_in.bias"}
    for index in range(levels * (layers + 1)):
        names[f"zero_convs.{index}.0"] = f"controlnet_down_blocks.{index}"
    names["middle_block_out.0"] = "controlnet_mid_block"
    halves = ("conv_in.weight", "controlnet_cond_embedding.weight")
    return Layout(names, splits={"input_blocks.0.0.weight": (halves, 1)})


def vae_layout(levels: int, layers: int) -> Layout:
    """Return the layout of the VAE. The official decoder counts its levels from the finest, ours from the coarsest."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    flattened = set()
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{level}"
        ours_down, ours_up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            names |= _below(f"{down}.block.{layer}", f"{ours_down}.resnets.{layer}", VAE_RESNET)
        for layer in range(layers + 1):
            names |= _below(f"{up}.block.{layer}", f"{ours_up}.resnets.{layer}", VAE_RESNET)
        names[f"{down}.downsample.conv"] = f"{ours_down}.downsamplers.0.conv"
        names[f"{up}.upsample.conv"] = f"{ours_up}.upsamplers.0.conv"
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        names |= _below(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", VAE_RESNET)
        names |= _below(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        names |= _below(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", VAE_RESNET)
        flattened |= {f"{half}.mid.attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out")}
    return Layout(names, flattened=frozenset(flattened), ignorable=(r"loss\..*", r"model_ema\..*"))


def text_layout(layers: int, *, prefix: str) -> Layout:
    """Return the layout of the first `layers` of OpenCLIP's text tower, which lacks the last that DiffBIR does not use.

    The prefix of our names depends on the release of transformers.
    """
    names = {
        "token_embedding": f"{prefix}embeddings.token_embedding",
        "positional_embedding": f"{prefix}embeddings.position_embedding.weight",
        "ln_final": f"{prefix}final_layer_norm",
    }
    splits = {}
    for layer in range(layers):
        official, ours = f"transformer.resblocks.{layer}", f"{prefix}encoder.layers.{layer}"
        names |= _below(official, ours, TEXT_LAYER)
        for kind in ("weight", "bias"):
            thirds = tuple(f"{ours}.self_attn.{name}_proj.{kind}" for name in "qkv")
            splits[f"{official}.attn.in_proj_{kind}"] = (thirds, 0)
    unused = (rf"transformer\.resblocks\.{layers}\..*", "text_projection", "logit_scale", "attn_mask", "position_ids")
    return Layout(names, splits=splits, ignorable=unused)
