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
from milo_latent.convert.mapping import Layout, map_strictly, numbered
from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.swinir import SwinIR
from milo_latent.files import stored_dtype, write_safetensors

SCALING_FACTOR = 0.18215  # of Stable Diffusion's latents
TEXT_PREFIX = "text_model."  # the hub's spelling, which every release of transformers reads
HEAD_WIDTH = 64  # channels of an attention head of Stable Diffusion 2 and of OpenCLIP ViT-H
CLEANERS = {"SwinIR": SwinIR, "SCUNet": SCUNet, "BSRNet": BSRNet}
COMPUTED = ("attn_mask", "relative_position_index")  # buffers in the files of cleaners that ours compute

Config = dict[str, Any]


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
        """Return the model in evaluation mode; with `dtype` None it shares the checkpoint's memory."""
        tensors = {key: tensor.to(stored_dtype(tensor, dtype)) for key, tensor in self.tensors.items()}
        self.model.load_state_dict(tensors, assign=True)
        return self.model.eval()

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write configuration and safetensors, one tensor in memory at a time; `dtype` None keeps the checkpoint's."""
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


def find_network(kind: str, state: Mapping[str, Tensor], config: Config | None = None, *, what: str = "") -> Network:
    """Find a network in official tensors, strictly: each of its tensors and each official key has its counterpart.

    Args:
        kind: "UNet", "IRControlNet" or "VAE" of Stable Diffusion; "text encoder": the text tower of OpenCLIP up to the
            last layer but one, then the final norm, whose output is what the UNet attends to; or one of `CLEANERS`.
        state: official tensors, without prefix.
        config: arguments of our class that replace what the shapes tell; a cleaner's shapes tell nothing, so None
            means the official full-size one.
        what: name and file, for errors.

    Returns:
        `UNet2DConditionModel`, `IRControlNet`, `AutoencoderKL`, `CLIPTextModel` or a cleaner, and its tensors.

    Raises:
        ValueError: if anything is missing, left over, or of another shape.
    """
    what, changes = what or f"the official {kind}", config or {}
    if kind in CLEANERS:
        model: nn.Module = _empty(CLEANERS[kind], changes)
        computed = {f"{name}.{buffer}" for name, _ in model.named_modules() for buffer in COMPUTED}
        state = {key: tensor for key, tensor in state.items() if key not in computed}
        layout = Layout({key: key for key in model.state_dict()})
    else:
        model, layout = _BUILDERS[kind](_Shapes(state, what), changes)
    return Network(model, map_strictly(model, state, layout, what=what))


def _empty(make: Any, config: Config) -> Any:
    """Return `make(**config)` with parameters on the meta device, which takes no memory."""
    with init_empty_weights(include_buffers=False):  # buffers are computed, and real
        return make(**config)


@dataclass(frozen=True)
class _Shapes:
    """The shapes of official tensors, and what they are of."""

    state: Mapping[str, Tensor]
    what: str

    def __getitem__(self, key: str) -> torch.Size:
        if key not in self.state:
            raise ValueError(f"Expected {self.what}, got one without {key}. Is it the right file, downloaded whole?")
        return self.state[key].shape

    def count(self, pattern: str) -> int:
        return len(numbered(self.state, pattern))


def _build_unet(shapes: _Shapes, config: Config) -> tuple[nn.Module, Layout]:
    sizes = _level_sizes(shapes) | {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "sample_size": 64,
    }
    attends = tuple("CrossAttn" in name for name in sizes["down_block_types"])
    sizes["up_block_types"] = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends))
    sizes = _with_heads(sizes | config, shapes.what)
    levels = len(sizes["block_out_channels"])
    return _empty(UNet2DConditionModel, sizes), unet_layout(levels, sizes["layers_per_block"], attends=attends)


def _build_controlnet(shapes: _Shapes, config: Config) -> tuple[nn.Module, Layout]:
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels % 2:
        raise ValueError(f"Expected {shapes.what} with an even number of input channels, got {channels}.")
    sizes = _level_sizes(shapes) | {"in_channels": channels // 2, "conditioning_channels": channels // 2}
    sizes = _with_heads(sizes | config, shapes.what)
    return _empty(IRControlNet, sizes), controlnet_layout(len(sizes["block_out_channels"]), sizes["layers_per_block"])


def _level_sizes(shapes: _Shapes) -> dict[str, Any]:
    """Return the sizes that UNet and ControlNet share, read off the way down."""
    state = shapes.state
    ops = numbered(state, r"input_blocks\.(\d+)\.0\.op\.")
    layers = ops[0] - 1 if ops else max(numbered(state, r"input_blocks\.(\d+)\."), default=0)
    firsts = [1 + level * (layers + 1) for level in range(len(ops) + 1)]
    channels = tuple(shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts)
    attends = tuple(f"input_blocks.{first}.1.norm.weight" in state for first in firsts)
    if not any(attends):
        raise ValueError(f"Expected {shapes.what}, got one without attention to a prompt. Is it the right file?")
    attention = f"input_blocks.{firsts[attends.index(True)]}.1."
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends),
        "cross_attention_dim": shapes[attention + "transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": shapes.count(attention.replace(".", r"\.") + r"transformer_blocks\.(\d+)\."),
        "use_linear_projection": len(shapes[attention + "proj_in.weight"]) == 2,
    }


def _with_heads(sizes: dict[str, Any], what: str) -> dict[str, Any]:
    """Return sizes with the number of heads, which no shape tells; diffusers calls it `attention_head_dim`."""
    channels = sizes["block_out_channels"]
    if "attention_head_dim" not in sizes and any(width % HEAD_WIDTH for width in channels):
        raise ValueError(
            f"Expected channels in multiples of {HEAD_WIDTH}, the width of an attention head, in {what}, got "
            f"{channels}. Give the number of heads of each level as `attention_head_dim`."
        )
    return {"attention_head_dim": tuple(width // HEAD_WIDTH for width in channels)} | sizes


def _build_vae(shapes: _Shapes, config: Config) -> tuple[nn.Module, Layout]:
    levels, layers = shapes.count(r"encoder\.down\.(\d+)\."), shapes.count(r"encoder\.down\.0\.block\.(\d+)\.")
    sizes = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": tuple(shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": SCALING_FACTOR,
        "sample_size": 512,
    }
    return _empty(AutoencoderKL, sizes | config), vae_layout(levels, layers)


def _build_text_encoder(shapes: _Shapes, config: Config) -> tuple[nn.Module, Layout]:
    layers = shapes.count(r"transformer\.resblocks\.(\d+)\.") - 1
    if layers < 1:
        raise ValueError(f"Expected {shapes.what} of at least two layers, got {layers + 1}. Is it the right file?")
    vocabulary, width = shapes["token_embedding.weight"]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": shapes["positional_embedding"][0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    model = _empty(CLIPTextModel, {"config": CLIPTextConfig(**(sizes | config))})
    prefix = TEXT_PREFIX if any(key.startswith(TEXT_PREFIX) for key in model.state_dict()) else ""
    return model, text_layout(layers, prefix=prefix)


_BUILDERS = {
    "UNet": _build_unet,
    "IRControlNet": _build_controlnet,
    "VAE": _build_vae,
    "text encoder": _build_text_encoder,
}
