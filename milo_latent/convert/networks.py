"""Networks of official checkpoints as diffusers' classes: sizes are read off the shapes, tensors stay in their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from milo_latent.convert.layouts import controlnet_layout, text_layout, unet_layout, vae_layout
from milo_latent.convert.mapping import convert_dtype, map_strictly, numbered
from milo_latent.convert.writing import write_safetensors
from milo_latent.diffbir.ircontrolnet import IRControlNet

SCALING_FACTOR = 0.18215  # of Stable Diffusion's latents
TEXT_PREFIX = "text_model."  # the hub's spelling, which every release of transformers reads
HEAD_WIDTH = 64  # channels of an attention head of Stable Diffusion 2 and of OpenCLIP ViT-H

State = Mapping[str, Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """A network whose tensors have been found, but not read.

    Args:
        model: ours, with parameters on the meta device.
        tensors: its state dict; views of the checkpoint's tensors.
    """

    model: nn.Module
    tensors: dict[str, Tensor]

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """Return the model with its tensors, in evaluation mode.

        Args:
            dtype: of the parameters; None keeps the checkpoint's, and shares its memory.
        """
        tensors = {key: convert_dtype(tensor, dtype) for key, tensor in self.tensors.items()}
        self.model.load_state_dict(tensors, assign=True)
        return self.model.eval()

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write configuration and safetensors, one tensor in memory at a time.

        Args:
            folder: made where it is missing.
            dtype: of the file; None keeps the checkpoint's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, ModelMixin):
            self.model.save_config(folder)
            write_safetensors(folder / "diffusion_pytorch_model.safetensors", self.tensors, dtype=dtype)
            return
        config: Any = self.model.config
        config.architectures = [type(self.model).__name__]
        config.dtype = dtype or next(iter(self.tensors.values())).dtype
        config.save_pretrained(folder)
        named = {TEXT_PREFIX + key.removeprefix(TEXT_PREFIX): tensor for key, tensor in self.tensors.items()}
        write_safetensors(folder / "model.safetensors", named, dtype=dtype)


def empty(make: Any, config: Config) -> Any:
    """Return `make(**config)` with parameters on the meta device, which takes no memory."""
    with init_empty_weights(include_buffers=False):  # buffers are computed, and real
        return make(**config)


def _ask(state: State, key: str, what: str) -> torch.Size:
    if key not in state:
        raise ValueError(f"Expected {what}, got one without {key}. Is it the right file, downloaded whole?")
    return state[key].shape


def _levels(state: State, what: str) -> dict[str, Any]:
    """Return the sizes that UNet and ControlNet share, read off the way down."""
    _ask(state, "input_blocks.0.0.weight", what)
    ops = list(numbered(state, r"input_blocks\.(\d+)\.0\.op\."))
    layers = ops[0] - 1 if ops else max(numbered(state, r"input_blocks\.(\d+)\."))
    firsts = [1 + level * (layers + 1) for level in range(len(ops) + 1)]
    channels = tuple(_ask(state, f"input_blocks.{first}.0.out_layers.3.weight", what)[0] for first in firsts)
    attends = tuple(f"input_blocks.{first}.1.norm.weight" in state for first in firsts)
    attention = next((f"input_blocks.{first}.1." for first, has in zip(firsts, attends, strict=True) if has), None)
    if attention is None:
        raise ValueError(f"Expected {what}, got one without attention to a prompt. Is it the right file?")
    depth = len(list(numbered(state, attention.replace(".", r"\.") + r"transformer_blocks\.(\d+)\.")))
    sizes = {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends),
        "cross_attention_dim": _ask(state, attention + "transformer_blocks.0.attn2.to_k.weight", what)[1],
        "transformer_layers_per_block": depth,
        "use_linear_projection": len(_ask(state, attention + "proj_in.weight", what)) == 2,
    }
    if all(width % HEAD_WIDTH == 0 for width in channels):
        sizes["attention_head_dim"] = tuple(width // HEAD_WIDTH for width in channels)  # diffusers' name: it is a count
    return sizes


def _require_heads(sizes: Config, what: str) -> None:
    if "attention_head_dim" not in sizes:
        raise ValueError(
            f"Expected channels in multiples of {HEAD_WIDTH}, the width of an attention head, in {what}, got "
            f"{sizes['block_out_channels']}. Give the number of heads of each level as `attention_head_dim`."
        )


def _attends(sizes: Config) -> tuple[bool, ...]:
    return tuple("CrossAttn" in name for name in sizes["down_block_types"])


def find_unet(state: State, config: Config | None = None, *, what: str = "the official UNet") -> Network:
    """Find the UNet of Stable Diffusion in official tensors.

    Args:
        state: official tensors, without prefix.
        config: arguments of `UNet2DConditionModel` that replace what the shapes tell.
        what: name and file, for errors.

    Returns:
        `UNet2DConditionModel` and its tensors.

    Raises:
        ValueError: if anything is missing, left over, or of another shape.
    """
    sizes = _levels(state, what) | {
        "in_channels": _ask(state, "input_blocks.0.0.weight", what)[1],
        "out_channels": _ask(state, "out.2.weight", what)[0],
        "sample_size": 64,
    }
    up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(_attends(sizes)))
    sizes |= {"up_block_types": up} | dict(config or {})
    _require_heads(sizes, what)
    model = empty(UNet2DConditionModel, sizes)
    layout = unet_layout(len(sizes["block_out_channels"]), sizes["layers_per_block"], attends=_attends(sizes))
    return Network(model, map_strictly(model, state, layout, what=what))


def find_controlnet(state: State, config: Config | None = None, *, what: str = "the official IRControlNet") -> Network:
    """Find IRControlNet in official tensors.

    Args:
        state: official tensors, without prefix.
        config: arguments of `IRControlNet` that replace what the shapes tell.
        what: name and file, for errors.

    Returns:
        `IRControlNet` and its tensors.

    Raises:
        ValueError: if anything is missing, left over, or of another shape.
    """
    channels = _ask(state, "input_blocks.0.0.weight", what)[1]
    if channels % 2:
        raise ValueError(f"Expected {what} with as many channels of latents as of the condition, got {channels}.")
    sizes = _levels(state, what) | {"in_channels": channels // 2, "conditioning_channels": channels // 2}
    sizes |= dict(config or {})
    _require_heads(sizes, what)
    model = empty(IRControlNet, sizes)
    layout = controlnet_layout(len(sizes["block_out_channels"]), sizes["layers_per_block"])
    return Network(model, map_strictly(model, state, layout, what=what))


def find_vae(state: State, config: Config | None = None, *, what: str = "the official VAE") -> Network:
    """Find the VAE of Stable Diffusion in official tensors.

    Args:
        state: official tensors, without prefix.
        config: arguments of `AutoencoderKL` that replace what the shapes tell.
        what: name and file, for errors.

    Returns:
        `AutoencoderKL` and its tensors.

    Raises:
        ValueError: if anything is missing, left over, or of another shape.
    """
    levels = len(list(numbered(state, r"encoder\.down\.(\d+)\.")))
    layers = len(list(numbered(state, r"encoder\.down\.0\.block\.(\d+)\.")))
    firsts = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(max(levels, 1))]
    sizes = {
        "in_channels": _ask(state, "encoder.conv_in.weight", what)[1],
        "out_channels": _ask(state, "decoder.conv_out.weight", what)[0],
        "latent_channels": _ask(state, "post_quant_conv.weight", what)[0],
        "block_out_channels": tuple(_ask(state, key, what)[0] for key in firsts),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": SCALING_FACTOR,
        "sample_size": 512,
    } | dict(config or {})
    model = empty(AutoencoderKL, sizes)
    return Network(model, map_strictly(model, state, vae_layout(levels, layers), what=what))


def find_text_encoder(
    state: State, config: Config | None = None, *, what: str = "the official text encoder"
) -> Network:
    """Find the text tower of OpenCLIP in official tensors, up to the last layer but one, then the final norm.

    Args:
        state: official tensors, without prefix.
        config: arguments of `CLIPTextConfig` that replace what the shapes tell.
        what: name and file, for errors.

    Returns:
        `CLIPTextModel`, whose last hidden state is what the UNet attends to, and its tensors.

    Raises:
        ValueError: if anything is missing, left over, or of another shape.
    """
    layers = len(list(numbered(state, r"transformer\.resblocks\.(\d+)\."))) - 1
    if layers < 1:
        raise ValueError(f"Expected {what} of at least two layers, got {layers + 1}. Is it the right file?")
    vocabulary, width = _ask(state, "token_embedding.weight", what)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _ask(state, "transformer.resblocks.0.mlp.c_fc.weight", what)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": _ask(state, "positional_embedding", what)[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    } | dict(config or {})
    model = empty(CLIPTextModel, {"config": CLIPTextConfig(**sizes)})
    prefix = TEXT_PREFIX if any(key.startswith(TEXT_PREFIX) for key in model.state_dict()) else ""
    return Network(model, map_strictly(model, state, text_layout(layers, prefix=prefix), what=what))
