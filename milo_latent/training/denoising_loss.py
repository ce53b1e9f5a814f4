"""The loss of a restorer's denoising networks: the standard one, and the one weighted by MILO's mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from milo_latent.checks import check_choice
from milo_latent.guidance.coefficients import step_coefficients
from milo_latent.guidance.curriculum import curriculum_weight
from milo_latent.guidance.x0 import predict_original_sample
from milo_latent.metric.network import MILO, open_metric

Objective = Literal["standard", "milo", "linear", "cosine"]
OBJECTIVES = ("standard", "milo", "linear", "cosine")
MASKS = ("prediction", "condition")
Denoise = Callable[[Tensor, Tensor], Tensor]  # noisy latents (B, C, h, w), timesteps (B,) -> model output


@dataclass(frozen=True)
class MaskWeight:
    """How latent pixels weigh in the loss, by MILO's visibility mask M, through which no gradient passes.

    Args:
        objective: "standard" weighs all alike; "milo" by M; "linear" and "cosine" by the curriculum's weight W(p), at
            p = share of the training that is done: less visible regions first, visible ones last. All have mean 1.
        metric: MILO_L for the latents, or what `MILO.from_pretrained` takes; not used by "standard".
        mask_of: M between the target and the "prediction", the clean latents that the model output stands for, or the
            "condition", which needs no prediction and is the same at every noise level.
        timesteps: lowest and highest timestep at which the weight is used; beyond them all latent pixels weigh alike,
            since from much noise the prediction is hardly an image.

    Raises:
        TypeError: if `metric` is missing.
        ValueError: for values outside their choices.

    Source: the idea and the names of the curriculum are MILO's (ACM TOG 44(6), 2025); that it weighs the denoising
    loss by its mean-1 weight is own.
    """

    objective: str = "standard"
    metric: MILO | str | Path | None = None
    mask_of: str = "prediction"
    timesteps: tuple[int, int] = (0, 999)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("mask_of", self.mask_of, MASKS)
        if self.objective != "standard":
            object.__setattr__(self, "metric", open_metric(self.metric))
        if not 0 <= self.timesteps[0] <= self.timesteps[1]:
            raise ValueError(f"Expected timesteps (lowest, highest), got {self.timesteps}.")

    @torch.no_grad()
    def __call__(
        self,
        scheduler: SchedulerMixin,
        *,
        model_output: Tensor,
        noisy: Tensor,
        timestep: Tensor,
        latents: Tensor,
        condition: Tensor,
        progress: float,
    ) -> Tensor | None:
        """Return the weight of each latent pixel, (B, 1, h, w), mean 1 per sample; None where all weigh alike."""
        if self.objective == "standard":
            return None
        assert isinstance(self.metric, MILO)
        dist = condition
        if self.mask_of == "prediction":
            dist = predict_clean_latents(scheduler, model_output, noisy, timestep)
        with torch.autocast(latents.device.type, enabled=False):  # in bfloat16, masks are off by some 8 %
            mask = self.metric.to(latents.device).mask(dist=dist.float(), ref=latents.float())
        schedule, progress = ("linear", 1.0) if self.objective == "milo" else (self.objective, progress)
        weight = curriculum_weight(mask, progress, schedule=schedule)  # type: ignore[arg-type]
        low, high = self.timesteps
        used = ((timestep >= low) & (timestep <= high)).view(-1, 1, 1, 1).to(weight.device)
        return torch.where(used, weight, torch.ones_like(weight))


def denoising_loss(
    denoise: Denoise,
    scheduler: SchedulerMixin,
    *,
    latents: Tensor,
    condition: Tensor,
    noise: Tensor,
    timestep: Tensor,
    weight: MaskWeight | None = None,
    progress: float = 0.0,
) -> Tensor:
    """Return the mean squared error of what the model predicts: noise, v or the clean latents.

    Args:
        denoise: the networks, from noisy latents and timesteps to the model output.
        scheduler: with the noise schedule and the prediction type, such as `DDPMScheduler`.
        latents: target, (B, C, h, w).
        condition: latents that the networks are told, of the same shape; here only for the mask.
        noise: of the same shape.
        timestep: (B,).
        weight: None, and a weight of 1, give the standard loss to the bit.
        progress: share of the training that is done, in [0, 1].

    Returns:
        A scalar.

    Raises:
        ValueError: for another prediction type.

    Source: `p_losses` of diffbir/model/gaussian_diffusion.py in DiffBIR's official code.
    """
    noisy = scheduler.add_noise(latents, noise, timestep)
    model_output = denoise(noisy, timestep).float()
    error = (model_output - _target(scheduler, latents, noise, timestep)).square()
    if weight is not None:
        factor = weight(
            scheduler,
            model_output=model_output.detach(),
            noisy=noisy,
            timestep=timestep,
            latents=latents,
            condition=condition,
            progress=progress,
        )
        error = error if factor is None else error * factor
    return error.mean()


def _target(scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timestep)
    if prediction_type == "sample":
        return latents
    raise ValueError(f'Expected a model that predicts "epsilon", "v_prediction" or "sample", got {prediction_type!r}.')


def predict_clean_latents(scheduler: SchedulerMixin, model_output: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """Return the clean latents that a model output stands for, each sample at its own timestep.

    Args:
        scheduler: with the noise schedule and the prediction type.
        model_output: (B, C, h, w).
        noisy: (B, C, h, w).
        timestep: (B,).

    Returns:
        `pred_original_sample`, (B, C, h, w) float32.
    """
    return torch.cat(
        [
            predict_original_sample(output[None], sample[None], step_coefficients(scheduler, time))
            for output, sample, time in zip(model_output, noisy, timestep.tolist(), strict=True)
        ]
    )
