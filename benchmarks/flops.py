"""What guidance costs: FLOPs and time of a denoising step alone, with ours, and with guidance through the VAE decoder.

    python benchmarks/flops.py                      # FLOPs, at 512 and 1024 px; needs no memory
    python benchmarks/flops.py --time 512           # and the time, full-size networks with random weights; 9 GB
    python benchmarks/flops.py --time 512 --decoder # and of guidance through the decoder; 17 GB
    python benchmarks/flops.py --training           # FLOPs of a training step, and of MILO's weight in it
    python benchmarks/flops.py --metric-training    # FLOPs of a step of train_metric_online, for large autoencoders

The networks are those of Stable Diffusion 2.1 (UNet, VAE), DiffBIR's IRControlNet, and MILO as it is shipped. FLOPs are
those of convolutions and matrix products, a multiplication and an addition counted as two (torch.utils.flop_counter),
counted on tensors without data; batch 1, without classifier-free guidance, which doubles the step and not the guidance.
"Through the decoder" is what pixel-space guidance has to do: decode x0, MILO_I against the reference image, and back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from milo_latent import MILO, IRControlNet, MILOGuidance
from milo_latent.evaluation.reports import write_rows
from milo_latent.guidance.base import Guide
from milo_latent.guidance.x0 import guide_model_output
from milo_latent.metric.loss import MILOLoss
from milo_latent.training.denoising_loss import MaskWeight, denoising_loss
from milo_latent.training.engine.records import commit

SHAPE = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
VAE_SHAPE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TOKENS = 77
Call = Callable[[], object]


def make_networks(device: str, *, decoder: bool = True) -> dict[str, torch.nn.Module]:
    """Return the networks at full size, with random weights or, on the device "meta", without."""
    with torch.device(device):
        networks: dict[str, torch.nn.Module] = {
            "unet": UNet2DConditionModel(**SHAPE, down_block_types=DOWN, up_block_types=UP),
            "controlnet": IRControlNet(**SHAPE, down_block_types=DOWN, conditioning_channels=4),
            "latent metric": MILO(channels=4),
        }
        if decoder:
            networks["vae"] = AutoencoderKL(**VAE_SHAPE, latent_channels=4)
            networks["image metric"] = MILO(channels=3)
    for network in networks.values():
        network.eval().requires_grad_(False)
    return networks


def make_calls(networks: dict[str, torch.nn.Module], size: int, device: str) -> dict[str, Call]:
    """Return a call for each row of the table."""
    with torch.device(device):
        shape = (1, 4, size // 8, size // 8)
        latents, reference, condition = torch.randn(shape), torch.randn(shape), torch.randn(shape)
        image, prompt, timestep = torch.rand(1, 3, size, size), torch.randn(1, TOKENS, 1024), torch.tensor(500)

    def unet(down: object = None, middle: object = None) -> Tensor:
        return networks["unet"](
            latents, timestep, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    def step() -> Tensor:
        with torch.no_grad():
            return unet(
                *networks["controlnet"](latents, timestep, prompt, controlnet_cond=condition, return_dict=False)
            )

    def through_decoder() -> Tensor:
        leaf = latents.clone().requires_grad_(True)
        # times 1, since the counter of FLOPs refuses leaves that go into a module
        decoded = networks["vae"].decode(leaf * 1.0).sample / 2 + 0.5
        error = MILOLoss(networks["image metric"], mask_gradient=True)(decoded, image)
        return torch.autograd.grad(error, leaf)[0]

    calls: dict[str, Call] = {
        "UNet": torch.no_grad()(unet),
        "UNet + IRControlNet": step,
        "ours, mask": ours(networks, latents, reference, "mask"),
        "ours, metric": ours(networks, latents, reference, "metric"),
    }
    return calls | ({"through the decoder": through_decoder} if "vae" in networks else {})


def ours(networks: dict[str, torch.nn.Module], latents: Tensor, reference: Tensor, mode: str) -> Call:
    """Return all that our guidance adds to a step: x0 from the model output, mask, weight, pull, and back."""
    guide = MILOGuidance(networks["latent metric"], mode=mode)
    # `Guide.start` alone where there are no values to check for NaN
    start = partial(Guide.start, guide) if latents.device.type == "meta" else guide.start

    def call() -> Tensor:
        start(reference, 10)
        return guide_model_output([guide], DDIMScheduler(), latents, 500, latents, progress=1 / 3)

    return call


def count_flops(size: int) -> dict[str, float]:
    """Return the FLOPs of each call, on tensors without data."""
    flops = {}
    for name, call in make_calls(make_networks("meta"), size, "meta").items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[name] = float(counter.get_total_flops())
    return flops


class ScheduleWithData(DDPMScheduler):
    """A scheduler whose own method would move its noise schedule to the device of the latents, which has no data."""

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return latents of the right shape."""
        return latents + noise


def count_training_flops(size: int) -> dict[str, float]:
    """Return the FLOPs of training IRControlNet on one pair of latents, with the frozen UNet, forward and backward.

    Encoding the pair, the optimizer and the prompt are left out, so that the share of MILO's weight is an upper bound.
    """
    networks, flops = make_networks("meta", decoder=False), {}
    networks["controlnet"].requires_grad_(True)
    for objective in ("standard", "milo"):
        with torch.device("meta"):
            shape = (1, 4, size // 8, size // 8)
            latents, condition, noise = torch.randn(shape), torch.randn(shape), torch.randn(shape)
            prompt = torch.randn(1, TOKENS, 1024)

        def denoise(noisy: Tensor, timestep: Tensor, prompt: Tensor = prompt, told: Tensor = condition) -> Tensor:
            timestep = timestep.to("meta")
            down, middle = networks["controlnet"](noisy, timestep, prompt, controlnet_cond=told, return_dict=False)
            return networks["unet"](
                noisy, timestep, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample

        # tensors without data know no autocast, which the loss turns off
        with FlopCounterMode(display=False) as counter, mock.patch("torch.autocast", return_value=nullcontext()):
            denoising_loss(
                denoise, ScheduleWithData(), latents=latents, condition=condition, noise=noise,
                timestep=torch.tensor([500]), weight=MaskWeight(objective, networks["latent metric"]),
            ).backward()  # fmt: skip
        flops[objective] = float(counter.get_total_flops())
    return flops


def count_metric_training_flops(latent_channels: int, *, batch_size: int = 16, size: int = 128) -> dict[str, float]:
    """Return the FLOPs of a step of `train_metric_online` by part, for a VAE of the size of Stable Diffusion's."""
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_SHAPE, latent_channels=latent_channels)
        teacher, metric = MILO(channels=3), MILO(channels=latent_channels)
        images = torch.zeros(batch_size, 3, size, size)
        latents = torch.zeros(batch_size, latent_channels, size // 8, size // 8)
        counts = {}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.cat([images, images]))
        counts["encoding"] = float(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            teacher.error_map(ref=images, dist=images)
        counts["teacher"] = float(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            metric.error_map(ref=latents, dist=latents.clone()).mean().backward()
        counts["metric"] = float(counter.get_total_flops())
    return counts


def measure_times(size: int, *, decoder: bool, repeats: int) -> dict[str, float]:
    """Return the median seconds of each call; the slow ones run `repeats` times, ours ten times as often."""
    times = {}
    for name, call in make_calls(make_networks("cpu", decoder=decoder), size, "cpu").items():
        call()
        rounds = []
        for _ in range(repeats * (10 if name.startswith("ours") else 1)):
            began = time.perf_counter()
            call()
            rounds.append(time.perf_counter() - began)
        times[name] = statistics.median(rounds)
        print(f"{size} px, {name}: {times[name] * 1e3:.1f} ms", flush=True)
    return times


def main() -> None:
    """Print a table and, with --csv, write rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, nargs="*", default=[], metavar="SIZE", help="sizes to measure the time at")
    parser.add_argument("--decoder", action="store_true", help="measure the time through the decoder too")
    parser.add_argument("--training", action="store_true", help="count a training step instead of a denoising step")
    parser.add_argument("--metric-training", action="store_true", help="count a step of train_metric_online instead")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.training:
        for size in (512, 1024):
            flops = count_training_flops(size)
            extra = flops["milo"] - flops["standard"]
            print(f"{size} px: step {flops['standard'] / 1e9:,.0f} GFLOP, MILO {extra / 1e9:.3f} GFLOP,", end=" ")
            print(f"{extra / flops['standard']:.4%}")
        return
    if options.metric_training:
        for name, channels in {"SD and SDXL": 4, "SD3 and Flux": 16}.items():
            flops = count_metric_training_flops(channels)
            parts = ", ".join(f"{part} {count / 1e9:,.1f} GFLOP" for part, count in flops.items())
            print(f"{name}, 16 pairs of 128 px: {sum(flops.values()) / 1e12:.2f} TFLOP a step ({parts})")
        return
    rows = []
    print(f"torch {torch.__version__}, {options.threads} threads, float32")
    for size in sorted({512, 1024, *options.time}):
        flops = count_flops(size)
        times = measure_times(size, decoder=options.decoder, repeats=options.repeats) if size in options.time else {}
        print(f"\n| {size} px | GFLOP | of UNet + IRControlNet | less than through the decoder | s | of the step |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, count in flops.items():
            share, factor = count / flops["UNet + IRControlNet"], flops["through the decoder"] / count
            seconds, part = times.get(name), None
            if seconds is not None:
                part = seconds / times["UNet + IRControlNet"]
            timing = f"{seconds:.4f} | {part:.3%}" if seconds is not None else "|"
            print(f"| {name} | {count / 1e9:,.3f} | {share:.4%} | {factor:,.0f}x | {timing} |")
            row = {"size": size, "case": name, "flops": count, "share": share, "decoder_over_this": factor}
            row |= {"seconds": seconds, "time_share": part, "device": "cpu", "dtype": "float32"}
            rows.append(row | {"threads": options.threads, "torch": torch.__version__, "commit": commit()})
    if options.csv:
        write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
