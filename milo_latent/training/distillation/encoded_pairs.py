"""Pairs for distillation from the latents of another trained autoencoder, with their channels mixed at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milo_latent.training.data.shards import PairSet
from milo_latent.training.distillation.latent_distortions import LARGEST, distort_latents
from milo_latent.training.distillation.latent_fields import LatentStatistics, uniform

RESCALED, SECOND = 0.4, 0.25  # shares of the pairs whose difference is rescaled, or that are distorted a second time
LARGEST_FACTOR = 1.5  # of the rescaled differences


class EncodedPairs:
    """Latents of photos and distorted photos, whose channels are mixed differently for each pair.

    A trained encoder responds to noise, blur and codecs in ways that distortions of latents do not reproduce. The
    meaning of the channels differs between autoencoders, so they are decorrelated by a random degree and mixed.

    Raises:
        ValueError: if the latents in `folder`, a training set of `build_dataset`, have not `channels` channels.
    """

    def __init__(self, folder: Path, *, channels: int) -> None:
        self.pairs = PairSet(folder, space="latents")
        found = self.pairs.ref.shape[1]
        if found != channels:
            raise ValueError(
                f"Expected latents of {channels} channels in {folder}, got {found}. Build the training set "
                "with another autoencoder, or leave it out."
            )
        values = self.pairs.ref.transpose(0, 1).flatten(1)
        self.variances, self.axes = torch.linalg.eigh(torch.cov(values))  # (C,), (C, C)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Return `ref` and `dist`, (count, C, h, w) each."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        indices = torch.from_numpy(rng.integers(len(self.pairs), size=count))
        ref, dist, _ = self.pairs.pairs(indices)
        axes = [axis for axis in (2, 3) if rng.random() < 0.5]
        turned = (2, 3) if rng.random() < 0.5 else (2, 2)
        ref, dist = (each.flip(axes).transpose(*turned) for each in (ref, dist))
        whiten = self.variances.clamp_min(1e-4) ** (-0.5 * rng.random()) * self.axes  # (C, C)
        ref, dist = (torch.einsum("ij,bihw->bjhw", whiten, each) for each in (ref, dist))
        statistics = LatentStatistics(generator, ref, channels=ref.shape[1])
        ref, dist = statistics(ref), statistics(dist)
        chosen = uniform(generator, 0.0, 1.0, count, 1, 1, 1)
        factor = torch.where(
            chosen < RESCALED, uniform(generator, 0.05, LARGEST_FACTOR, count, 1, 1, 1), torch.ones(())
        )
        dist = ref + factor * (dist - ref)
        dist = torch.where(chosen > 1 - SECOND, distort_latents(generator, dist), dist)
        return ref, ref + (dist - ref).clamp(-LARGEST, LARGEST)


def half_encoded(
    draw: Callable[[int, int], tuple[Tensor, Tensor]], folder: Path, *, channels: int, batch_size: int, seed: int
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return a function that draws a batch by `draw` or, half of the time, from the `EncodedPairs` of `folder`."""
    encoded = EncodedPairs(folder, channels=channels)

    def draw_either(step: int, process_index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step, process_index, 1))
        return draw(step, process_index) if rng.random() < 0.5 else encoded.draw(rng, batch_size)

    return draw_either
