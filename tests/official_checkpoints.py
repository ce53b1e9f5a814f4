"""Files laid out as the official ones, of tiny random networks: what the converter reads, without any download."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from milo_latent import IRControlNet
from milo_latent.convert.layouts import controlnet_layout, text_layout, unet_layout, vae_layout
from milo_latent.diffbir.swinir import SwinIR
from milo_latent.metric.loading import OFFICIAL_PREFIXES, PinnedFile
from milo_latent.resources import sha256

WIDTHS = (64, 128)
SWINIR = {"embed_dim": 24, "depths": (2,), "num_heads": (3,), "window_size": 8}
SHAPE = {
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}


@dataclass
class Tiny:
    """Networks, and files with the same weights."""

    networks: dict
    files: dict[str, Path]
    configs: dict

    def convert_arguments(self):
        return {**self.files, "configs": self.configs, "tokenizer": "none"}


def to_official(tensors, layout, *, flattened=()):
    """Turn our tensors into official ones: the inverse of `Layout.convert`."""
    state, parts = {}, {}
    for key, tensor in tensors.items():
        official = layout.official_key(key)
        if official in layout.splits:
            parts.setdefault(official, {})[key] = tensor
        else:
            state[official] = tensor[..., None, None] if official in layout.flattened else tensor
    for official, pieces in parts.items():
        targets, axis = layout.splits[official]
        state[official] = torch.cat([pieces[target] for target in targets], dim=axis)
    return {key: value.clone() for key, value in state.items()}


def fill(network):
    """Give every tensor values, those that begin at zero too."""
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1).add_(1.0 if parameter.ndim == 1 else 0.0)
    return network.eval()


def make_networks(*, vocabulary=100):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1,
            max_position_embeddings=77, hidden_act="gelu", bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
        )  # fmt: skip
        unet = UNet2DConditionModel(**SHAPE, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), sample_size=64)
        vae = AutoencoderKL(
            block_out_channels=(32, 64), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        networks = {
            "unet": unet,
            "controlnet": IRControlNet(**SHAPE, conditioning_channels=4),
            "vae": vae,
            "text_encoder": CLIPTextModel(text),
            "cleaner": SwinIR(**SWINIR),
        }
        return {name: fill(network) for name, network in networks.items()}


def official_states(networks):
    """Return states of the three official files: "sd", "controlnet", "cleaner"."""
    text = networks["text_encoder"].state_dict()
    prefix = "text_model." if any(key.startswith("text_model.") for key in text) else ""
    layouts = {
        "model.diffusion_model.": (networks["unet"].state_dict(), unet_layout(2, 1, attends=(True, False))),
        "first_stage_model.": (networks["vae"].state_dict(), vae_layout(2, 2)),
        "cond_stage_model.model.": (text, text_layout(2, prefix=prefix)),
    }
    sd = {
        start + key: value
        for start, (tensors, layout) in layouts.items()
        for key, value in to_official(tensors, layout).items()
    }
    last = "cond_stage_model.model.transformer.resblocks."
    sd |= {
        last + "2." + key.removeprefix(last + "1."): value for key, value in sd.items() if key.startswith(last + "1.")
    }
    sd["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    sd["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
    sd |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.linspace(0.99, 0.0047, 1000)}
    return {
        "sd": sd,
        "controlnet": to_official(networks["controlnet"].state_dict(), controlnet_layout(2, 1)),
        "cleaner": networks["cleaner"].state_dict(),
    }


def make_files(folder, *, vocabulary=100):
    """Write the files; the Stable Diffusion one as a training program leaves it, with other things beside."""
    networks = make_networks(vocabulary=vocabulary)
    states = official_states(networks)
    files = {"sd": folder / "sd.ckpt", "controlnet": folder / "controlnet.pth", "cleaner": folder / "cleaner.ckpt"}
    torch.save({"state_dict": states["sd"], "epoch": 3, "global_step": 7}, files["sd"])
    torch.save(states["controlnet"], files["controlnet"])
    torch.save({"state_dict": {"module." + key: value for key, value in states["cleaner"].items()}}, files["cleaner"])
    return Tiny(networks, files, {"cleaner": SWINIR})


def official_metric_file(metric, path):
    """Save a metric in the layout of the official MILO; return what its pinned entry would be, at a file:// address."""
    names = {ours: theirs for theirs, ours in OFFICIAL_PREFIXES.items()}
    state = {
        next(theirs + key.removeprefix(ours) for ours, theirs in names.items() if key.startswith(ours)): value
        for key, value in metric.state_dict().items()
    }
    torch.save(state, path)
    return PinnedFile(path.as_uri(), path.stat().st_size, sha256(path))
