"""Write the pruned golden values: the part of the reference material that the tests in this repository compare with.

The reference material holds what the official DiffBIR code (github.com/XPixelGroup/DiffBIR, commit 3f8b530) computes,
in float32 on a CPU, for tiny networks with seeded random weights and for images made from a formula. There are no
trained weights and no photos in it. This script selects: each tensor and each number is stored as it was recorded.

- The random weights are not stored, since `golden.official_weights` draws them again from their seeds; the script
  checks that it draws the recorded ones, bit for bit. `tiny_shapes.json` holds their names and shapes.
- Of the recorded results, those are kept that a test reads, by `KEPT`; of some, every second pixel or one channel.
- `official_shapes.json` holds the names and shapes of the full-size networks, `official_facts.json` the official
  program's options, addresses and configurations.

Run it again with: python tests/data/make_golden.py --shared FOLDER
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from golden import NETWORKS, official_weights, part  # noqa: E402

RUN = r"(eps|v_zsnr)\.steps"
KEPT = {  # file -> patterns of the names that are kept
    "cleaner_bsrnet": (r".*\.(input|output)",),
    "cleaner_scunet": (r".*\.(input|output)",),
    "cleaner_swinir": (r".*\.(input|output)",),
    "control_ldm_tiny_io": (r".*\.(x|t|hint|context|eps.*)", r"e_batch2.*\.control_\d+"),
    "guidance": (r"rgb\..*(gradient|weight_map|target|pred_x0)", r"latent\..*(gradient|target|pred_x0)"),
    "guided_runs_v2.0.0": (r"inputs\..*", "target", r".*\.(draw|pred_x0|x)_\d+"),
    "image_ops": (
        r"(pad|resize|gaussian_weights)\..*",
        r"windows\.h(20|64)\..*",
        r"tiled\.(x|minus_mean\..*|down2\..*|up4_channel3\..*)",
        r"wavelet(_small)?\.(content|style|out|content_low)",
    ),
    "pipeline_tiny": (r"apply\..*", r"prompts\..*", r"run\..*\.(cond_img_every8|draw_\d+|lq|result)"),
    "sampler_others": (
        r"inputs\..*",
        r"sde_noise_\d+",
        r"(eps|v_zsnr)\.(ddim|dpm\+\+_m2)\..*",
        r"v_zsnr\.edm_.*",
    ),
    "sampler_runs": (
        r"inputs\..*",
        r"noise_\d+",
        RUN + r"5\..*\.(x_\d+|z|model_output_\d+)",
        RUN + r"10\.cfg4\.rescale1\.(x_\d+|z)",
        r"tiled\.inputs\..*",
        r"tiled\.v_zsnr\..*\.(noise_\d+|z)",
    ),
    "sampler_schedules": (
        r".*\.(alphas_cumprod|q_sample\..*)",
        RUN + r"\d+\.(timesteps|posterior_variance|posterior_mean_coef1)",
        "rescaled_cfg_scale_4_by_timestep",
    ),
    "vae_tiny_io": ("image|moments|latent_mode_scaled|z|decoded|grad_weight|grad_z",),
}


def pruned(source, name):
    """Return what is kept of a recorded file."""
    kept = {}
    for key, value in load_file(source / f"{name}.safetensors").items():
        if not any(re.fullmatch(pattern, key) for pattern in KEPT[name]):
            continue
        if name.startswith("cleaner_") and key.endswith(".output"):
            kept[f"{key}_every2"] = value[..., ::2, ::2].contiguous()
        elif key.startswith(("pad.", "resize.")):  # they treat each channel alike
            kept[key] = value[:, :1].contiguous()
        else:
            kept[key] = value
    return kept


def recorded_weights(source):
    """Return the recorded random weights of each tiny network, without the buffers that are computed."""
    found = load_file(source / "control_ldm_tiny_weights.safetensors")
    weights = {network: part(found, f"{network}.") for network in ("unet", "controlnet", "vae")}
    for network in ("swinir", "scunet", "bsrnet"):
        weights[network] = part(load_file(source / f"cleaner_{network}.safetensors"), "weights.")
    return {
        network: {key: value for key, value in state.items() if not key.endswith(("_index", "attn_mask"))}
        for network, state in weights.items()
    }


def tables(source):
    """Return the JSON files, by name."""
    return {
        "official_shapes": json.loads((source / "official_state_dict_shapes.json").read_text()),
        "official_facts": json.loads((source / "official_facts.json").read_text()),
        "tiny_shapes": {
            network: {key: list(value.shape) for key, value in sorted(state.items())}
            for network, state in recorded_weights(source).items()
        },
    }


def main():
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="the folder of reference material")
    source = parser.parse_args().shared / "diffbir_golden"
    for name, table in tables(source).items():
        (DATA / f"{name}.json").write_text(json.dumps(table, separators=(",", ":")) + "\n")
    for network, recorded in recorded_weights(source).items():
        drawn = official_weights(network)
        different = [key for key, value in recorded.items() if not torch.equal(value.float(), drawn[key])]
        if different or NETWORKS[network].half != (next(iter(recorded.values())).dtype == torch.float16):
            raise SystemExit(f"Expected the recorded weights of {network} from its seed; these differ: {different}.")
    for name in KEPT:
        save_file(pruned(source, name), DATA / f"{name}.safetensors")
    size = sum(path.stat().st_size for path in DATA.iterdir() if path.is_file())
    print(f"{DATA}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
