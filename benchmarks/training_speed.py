"""Time of one training iteration of MILO_I on 256x256 images and of MILO_L on their cached latents, in one run.

Forward, backward, optimizer step; batch 16 as in the paper. Prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from milo_latent.metric.network import MILO
from milo_latent.training.train_metric import OpinionLoss, initialize


def iteration_times(channels: int, side: int, *, batch: int, repeats: int) -> list[float]:
    torch.manual_seed(0)
    metric = MILO(channels=channels).to(memory_format=torch.channels_last)
    initialize(metric)
    loss = OpinionLoss(metric)
    optimizer = torch.optim.AdamW(metric.parameters(), lr=1e-3, weight_decay=1e-6)
    ref = torch.rand(batch, channels, side, side)
    dist, dmos = ref + 0.1 * torch.randn_like(ref), torch.rand(batch)
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()  # of this process alone, so that other work on the machine does not count
        loss(ref, dist, dmos).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="iterations of MILO_I; MILO_L runs ten times as often")
    options = parser.parse_args()
    image = iteration_times(3, 256, batch=options.batch, repeats=options.repeats)
    latent = iteration_times(4, 32, batch=options.batch, repeats=10 * options.repeats)
    medians = statistics.median(image), statistics.median(latent)
    print(f"MILO_I, {options.batch} x 3x256x256: {medians[0] * 1e3:.0f} ms of processor time per iteration")
    print(f"MILO_L, {options.batch} x 4x32x32:   {medians[1] * 1e3:.1f} ms")
    print(f"ratio: {medians[0] / medians[1]:.0f}x")


if __name__ == "__main__":
    main()
