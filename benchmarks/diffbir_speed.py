"""Speed and memory of a restoration by `DiffBIRPipeline` against the official DiffBIR code, stage by stage and whole.

    git clone https://github.com/XPixelGroup/DiffBIR diffbir_official
    pip install einops ftfy regex scipy torchsde
    python benchmarks/diffbir_speed.py --official diffbir_official

Both sides hold the same full-size random weights (DiffBIR v1: SwinIR, IRControlNet, UNet, VAE, text encoder) and get
the same image on the same CPU. They take turns, the first to go alternates, figures are medians; the ratio is the
official time over ours, so above 1 is faster. On a machine that others use, take `--threads 1 --processor-time`: what
others do then counts for little. The official code runs as on a GPU, but for its memory monitor; in bfloat16 under
`torch.autocast`, with the networks cast as its own `--precision bf16` does. Peak memory is what a call adds to the
process (Linux only). The whole restoration is that of a 512x512 image, the least that the official code takes, and the
two results are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffbir_parity import fill, import_official, official_configs
from torch import nn

from milo_latent.convert.mapping import select
from milo_latent.convert.networks import find_network
from milo_latent.convert.tokenizer import open_tokenizer
from milo_latent.diffbir.color import fix_color
from milo_latent.diffbir.sampling import controlled_output
from milo_latent.diffbir.schedulers import official_scheduler
from milo_latent.diffbir.versions import NEGATIVE_PROMPT, PROMPT
from milo_latent.latents.codec import decode_latents, encode_image
from milo_latent.pipelines.diffbir import DiffBIRPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GUIDANCE_SCALE = 4.0
SMALLEST_WHOLE = 512  # pixels a side, of which the official pipeline asserts its cleaned image to be
LONGEST_WARM_UP = 6.0  # seconds; a first round that takes longer counts: what it does once is little beside
SEED = 0

Side = Callable[[], Any]


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Leave weights as allocated while networks are made: they are filled right after."""
    drawn = {name: getattr(nn.init, name) for name in ("kaiming_uniform_", "normal_", "xavier_uniform_")}
    for name in drawn:
        setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the official networks print while they are made
            yield
    finally:
        for name, function in drawn.items():
            setattr(nn.init, name, function)


def load_official(checkout: Path) -> Any:
    """Return the official pipeline for v1 on the CPU, with random weights in float32."""
    torch.cuda.synchronize = lambda *args: None  # its memory monitor calls it, with a GPU or without
    torch.Tuple = typing.Tuple  # type: ignore[attr-defined]  # noqa: UP006 (older releases of torch had it)
    with contextlib.redirect_stdout(io.StringIO()):
        model = import_official(checkout)
    from diffbir.pipeline import SwinIRPipeline  # type: ignore[import-not-found]

    settings = checkout / "configs" / "inference"
    configs = official_configs(checkout, full=True)
    generator = torch.Generator().manual_seed(SEED)
    with empty_weights():
        ldm = fill(model.ControlLDM(**configs), generator)
        cleaner = fill(model.SwinIR(**yaml.safe_load((settings / "swinir.yaml").read_text())["params"]), generator)
    diffusion = model.Diffusion(**yaml.safe_load((settings / "diffusion.yaml").read_text())["params"])
    return SwinIRPipeline(cleaner, ldm, diffusion, None, "cpu")


def convert(official: Any, checkout: Path, dtype: torch.dtype, *, channels_last: bool) -> DiffBIRPipeline:
    """Return our pipeline with the weights of the official one, whose memory it shares where nothing changes them."""
    ldm = official.cldm
    networks = {
        "unet": find_network("UNet", ldm.unet.state_dict()),
        "controlnet": find_network("IRControlNet", ldm.controlnet.state_dict()),
        "vae": find_network("VAE", ldm.vae.state_dict()),
        "text_encoder": find_network("text encoder", select(ldm.clip.state_dict(), "model.")),
        "cleaner": find_network("SwinIR", official.cleaner.state_dict()),
    }
    loaded = {name: network.load(dtype) for name, network in networks.items()}
    if channels_last:
        loaded["vae"].to(memory_format=torch.channels_last)
    pipeline = DiffBIRPipeline(
        **loaded,
        scheduler=official_scheduler("spaced", prediction_type="epsilon", rescale_betas_zero_snr=False),
        tokenizer=open_tokenizer(next(checkout.rglob("bpe_simple_vocab_16e6.txt.gz"))),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stages(official: Any, ours: DiffBIRPipeline, size: int) -> dict[str, tuple[Side, Side]]:
    """Return, for each stage, a call of the official code and the same of ours."""
    from diffbir.sampler import SpacedSampler  # type: ignore[import-not-found]
    from diffbir.utils.common import wavelet_reconstruction  # type: ignore[import-not-found]

    ldm, generator = official.cldm, torch.Generator().manual_seed(SEED)
    image = torch.rand(1, 3, size, size, generator=generator)
    sample, hint = torch.randn(2, 1, 4, size // 8, size // 8, generator=generator).unbind()
    context, other = torch.randn(2, 1, 77, 1024, generator=generator).unbind()
    sampler = SpacedSampler(official.diffusion.betas, "eps", False)
    conditions = [{"c_txt": each, "c_img": hint} for each in (context, other)]
    given = {"timestep": torch.tensor(500), "conditioning_scale": 1.0, "scale": GUIDANCE_SCALE, "rescale": 0.0}
    embeds = {"prompt_embeds": context, "negative_prompt_embeds": other}

    def encode_anew() -> Any:
        ours.prompt_cache.clear()
        return ours.encode_prompt(PROMPT, NEGATIVE_PROMPT)

    def encode_officially() -> Any:
        return [ldm.clip.encode([text]) for text in (PROMPT, NEGATIVE_PROMPT)]

    return {
        "both prompts, first call": (encode_officially, encode_anew),
        "both prompts, later calls": (encode_officially, lambda: ours.encode_prompt(PROMPT, NEGATIVE_PROMPT)),
        "cleaner (SwinIR)": (
            lambda: official.apply_cleaner(image, False, 512, 256),
            lambda: ours.clean(image, compatibility="official"),
        ),
        "VAE encoding, once": (
            lambda: ldm.vae_encode(image * 2 - 1, sample=False),
            lambda: encode_image(ours.vae, image),
        ),
        "denoising step": (
            lambda: sampler.apply_model(ldm, sample, torch.tensor([500]), *conditions, GUIDANCE_SCALE),
            lambda: controlled_output(ours.unet, ours.controlnet, sample, hint, **given, **embeds),
        ),
        "VAE decoding": (lambda: ldm.vae_decode(hint), lambda: decode_latents(ours.vae, hint)),
        "colour fix": (
            lambda: wavelet_reconstruction(image, image.flip(-1)),
            lambda: fix_color(image, image.flip(-1), method="wavelet"),
        ),
    }


def whole(official: Any, ours: DiffBIRPipeline, size: int, steps: int) -> tuple[Side, Side]:
    """Return a call of each side that restores one picture, from 8 bit to 8 bit."""
    lq = np.random.default_rng(SEED).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    tiles = {
        "cleaner_tiled": False, "cleaner_tile_size": 512, "cleaner_tile_stride": 256, "vae_encoder_tiled": False,
        "vae_encoder_tile_size": 256, "vae_decoder_tiled": False, "vae_decoder_tile_size": 256, "cldm_tiled": False,
        "cldm_tile_size": 512, "cldm_tile_stride": 256,
    }  # fmt: skip
    edm = {"s_churn": 0, "s_tmin": 0, "s_tmax": 300, "s_noise": 1, "eta": 1, "order": 1}
    sampling = {
        "steps": steps, "strength": 1.0, "pos_prompt": PROMPT, "neg_prompt": NEGATIVE_PROMPT, "noise_aug": 0,
        "cfg_scale": GUIDANCE_SCALE, "start_point_type": "noise", "sampler_type": "spaced", "rescale_cfg": False,
    }  # fmt: skip

    def restore_officially() -> Any:
        torch.manual_seed(SEED)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return official.run(lq, **tiles, **sampling, **edm)

    def restore() -> Any:
        torch.manual_seed(SEED)
        pixels = ours(
            PROMPT, lq.astype(np.float32) / 255, NEGATIVE_PROMPT, num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE, output_type="np", compatibility="official",
        ).images  # fmt: skip
        return np.rint(pixels * 255).astype(np.uint8)

    return restore_officially, restore


def peak_memory(*, reset: bool = False) -> float:
    """Return the most memory that this process has held since the last reset, in MiB; nan where Linux is not."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return float("nan")
    return int(fields["VmRSS" if reset else "VmHWM"].split()[0]) / 1024


def measure(side: Side, clock: Callable[[], float]) -> tuple[float, float, Any]:
    """Return the seconds of a call, the MiB that it added at most, and its result."""
    before, began = peak_memory(reset=True), clock()
    result = side()
    seconds = clock() - began
    return seconds, peak_memory() - before, result


def compare(name: str, sides: tuple[Side, Side], *, rounds: int, budget: float, clock: Side) -> tuple[Any, Any]:
    """Let both sides take turns, print a row, and return their last results.

    Args:
        name: of the row.
        sides: official, ours.
        rounds: the most.
        budget: seconds after which no further round begins, if there has been one.
        clock: returns seconds.
    """
    measured: list[list[tuple[float, float]]] = [[], []]
    results, began, turn = [None, None], clock(), 0
    while not measured[0] or (len(measured[0]) < rounds and clock() - began < budget):
        taken: dict[int, tuple[float, float]] = {}
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds, mebibytes, results[which] = measure(sides[which], clock)
            taken[which] = seconds, mebibytes
        if turn > 0 or sum(seconds for seconds, _ in taken.values()) > LONGEST_WARM_UP:
            for which, figures in taken.items():
                measured[which].append(figures)
        turn += 1
    (theirs, their_peak), (mine, my_peak) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in measured
    )
    ratio = f"{theirs / mine:.2f}" if theirs < 100 * mine else "above 100"
    print(
        f"| {name} | {theirs:.3g} | {mine:.3g} | {ratio} | {their_peak:.0f} | {my_peak:.0f} | {len(measured[0])} |",
        flush=True,
    )
    return results[0], results[1]


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of the official repository")
    parser.add_argument("--size", type=int, default=256, help="side of the stages' images, a multiple of 64")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of the whole restoration, at least 2")
    parser.add_argument("--rounds", type=int, default=9, help="the most for each row")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for a row; at least one round is run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="count the processor's seconds, not the clock's")
    parser.add_argument("--channels-last", action="store_true", help="our VAE with channels last")
    parser.add_argument("--only", help="rows whose name has this in it, such as VAE, step, whole")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Print the table; exit with 1 if the two restored pictures differ."""
    options = parse()
    if not (options.official / "diffbir" / "pipeline.py").is_file():
        sys.exit(f"The official code is absent: {options.official} has no diffbir/pipeline.py. See the first lines.")
    if options.size % 64 or options.steps < 2:
        sys.exit("Expected --size in multiples of 64 and --steps of at least 2, with which the official code works.")
    torch.set_num_threads(options.threads)
    dtype, checkout = DTYPES[options.dtype], options.official.resolve()
    official = load_official(checkout)
    ours = convert(official, checkout, dtype, channels_last=options.channels_last)
    if dtype != torch.float32:
        official.cldm.cast_dtype(dtype)
    side = max(options.size, SMALLEST_WHOLE)
    rows = stages(official, ours, options.size)
    rows[f"whole, {side}x{side}, {options.steps} steps"] = whole(official, ours, side, options.steps)
    clock = time.process_time if options.processor_time else time.perf_counter
    layout = ", our VAE channels last" if options.channels_last else ""
    kind = ", processor time" if options.processor_time else ""
    print(f"torch {torch.__version__}, {options.dtype}, {options.threads} threads{kind}, {options.size} px{layout}\n")
    print("| stage | official, s | ours, s | ratio | official peak, MiB | ours peak, MiB | rounds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (theirs, mine) in rows.items():
        if options.only is None or options.only in name:
            sides = (lambda run=theirs: _autocast(run, dtype)), mine
            results = compare(name, sides, rounds=options.rounds, budget=options.budget, clock=clock)
    if name.startswith("whole") and (options.only is None or options.only in name):
        apart = np.abs(results[0].astype(int) - results[1].astype(int))
        print(f"\nThe two pictures differ by at most {apart.max()} grey levels, {apart.mean():.4f} on average.")
        sys.exit(0 if dtype != torch.float32 or apart.max() <= 1 else 1)


def _autocast(run: Side, dtype: torch.dtype) -> Any:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return run()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
