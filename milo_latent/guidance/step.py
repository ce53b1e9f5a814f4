"""One denoising step seen from its clean estimate: model output to x0, x0 guided, and back; pure functions.

A scheduler's model output, its sample and its clean estimate x0 (`pred_original_sample`) are linear in each other, so a
change of x0 is the same as a change of the model output. That is how guidance acts inside a step of any scheduler: the
scheduler is handed the output that predicts the guided x0.

Symbols: `sample` = alpha * x0 + sigma * noise; v = alpha * noise - sigma * x0; flow = noise - x0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from milo_latent.checks import check_range

BY_TIMESTEP = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler")
BY_SIGMA = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
BY_ALPHA_SIGMA = (
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
BY_FLOW = ("FlowMatchEulerDiscreteScheduler",)
KNOWN_SCHEDULERS = BY_TIMESTEP + BY_SIGMA + BY_ALPHA_SIGMA + BY_FLOW


@dataclass(frozen=True)
class StepCoefficients:
    """How sample, clean estimate and noise relate at one timestep.

    Args:
        alpha: share of the clean latents in the (scaled) sample.
        sigma: share of the noise in it.
        sample_scale: what the scheduler's sample is multiplied by to have these shares.
        prediction_type: what the model predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".
    """

    alpha: float
    sigma: float
    sample_scale: float
    prediction_type: str


def step_coefficients(scheduler: SchedulerMixin, timestep: Tensor | float | int) -> StepCoefficients:
    """Read the coefficients of the step that `scheduler` is about to take.

    Args:
        scheduler: one of `KNOWN_SCHEDULERS`, or of a class derived from one.
        timestep: the timestep about to be passed to `scheduler.step`.

    Returns:
        The coefficients.

    Raises:
        ValueError: for a scheduler that is not known, or an epsilon model at zero terminal SNR, which cannot tell x0.

    Source: the `step` methods of diffusers' schedulers.
    """
    family = _family(scheduler)
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if family == "timestep":
        product = float(scheduler.alphas_cumprod[int(timestep)])
        alpha, sigma, sample_scale = product**0.5, (1.0 - product) ** 0.5, 1.0
    else:
        noise = float(scheduler.sigmas[_step_index(scheduler, timestep)])
        alpha, sigma, sample_scale = 1.0 - noise, noise, 1.0
        if family == "sigma":
            sample_scale = (1.0 + noise**2) ** -0.5
            alpha, sigma = sample_scale, noise * sample_scale
        elif family == "alpha_sigma":
            alpha, sigma = (float(value) for value in scheduler._sigma_to_alpha_sigma_t(torch.tensor(noise)))
        else:
            prediction_type = "flow_prediction"
    if prediction_type == "epsilon" and alpha == 0.0:
        raise ValueError(
            f"At timestep {float(timestep):g} the noise schedule has zero signal, where an epsilon model says nothing "
            "of x0. Use a v-prediction model, or betas without rescale_betas_zero_snr."
        )
    return StepCoefficients(alpha, sigma, sample_scale, prediction_type)


def _family(scheduler: SchedulerMixin) -> str:
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    families = {"timestep": BY_TIMESTEP, "sigma": BY_SIGMA, "alpha_sigma": BY_ALPHA_SIGMA, "flow": BY_FLOW}
    for family, known in families.items():
        if names & set(known):
            return family
    raise ValueError(
        f"Expected a scheduler whose clean estimate is known, got {type(scheduler).__name__}. "
        f"Known: {', '.join(KNOWN_SCHEDULERS)}."
    )


def _step_index(scheduler: Any, timestep: Tensor | float | int) -> int:
    """Return the index of the coming step; a scheduler fixes it only in its first `step`."""
    if scheduler.step_index is not None:
        return int(scheduler.step_index)
    if scheduler.begin_index is not None:
        return int(scheduler.begin_index)
    return int(scheduler.index_for_timestep(timestep))


def predict_original_sample(model_output: Tensor, sample: Tensor, coefficients: StepCoefficients) -> Tensor:
    """Return the clean latents x0 that a model output stands for.

    Args:
        model_output: after classifier-free guidance, (B, C, h, w).
        sample: the noisy latents as `scheduler.step` takes them, (B, C, h, w).
        coefficients: of the step.

    Returns:
        `pred_original_sample`, (B, C, h, w) float32.

    Raises:
        ValueError: for an unknown prediction type.
    """
    output, scaled = model_output.float(), sample.float() * coefficients.sample_scale
    alpha, sigma = coefficients.alpha, coefficients.sigma
    if coefficients.prediction_type == "epsilon":
        return (scaled - sigma * output) / alpha
    if coefficients.prediction_type == "v_prediction":
        return alpha * scaled - sigma * output
    if coefficients.prediction_type == "flow_prediction":
        return scaled - sigma * output
    if coefficients.prediction_type == "sample":
        return output
    raise ValueError(
        f"Expected epsilon, v_prediction, sample or flow_prediction, got {coefficients.prediction_type!r}."
    )


def shift_model_output(model_output: Tensor, change: Tensor, coefficients: StepCoefficients) -> Tensor:
    """Return the model output whose x0 differs by `change` from that of `model_output`.

    Args:
        model_output: (B, C, h, w).
        change: of `pred_original_sample`, (B, C, h, w).
        coefficients: of the step; sigma must not be 0 unless the model predicts the sample.

    Returns:
        Model output, (B, C, h, w), in the dtype of `model_output`.
    """
    if coefficients.prediction_type == "sample":
        shifted = model_output.float() + change
    elif coefficients.prediction_type == "epsilon":
        shifted = model_output.float() - change * (coefficients.alpha / coefficients.sigma)
    else:
        shifted = model_output.float() - change / coefficients.sigma
    return shifted.to(model_output.dtype)


def masked_pull(
    pred_original_sample: Tensor, reference_latents: Tensor, weight: Tensor, *, milo_scale: float
) -> Tensor:
    """Move each latent pixel a fraction of its way to the reference latents.

    Args:
        pred_original_sample: x0, (B, C, h, w).
        reference_latents: r, (B, C, h, w).
        weight: W, (B, 1, h, w).
        milo_scale: s, in [0, 1]; the fraction s * W is capped at 1.

    Returns:
        Guided x0, (B, C, h, w): x0 + min(s * W, 1) * (r - x0).

    Raises:
        ValueError: if `milo_scale` is outside [0, 1].

    Source: own (design, section 4, mode *mask*).
    """
    check_range("milo_scale", milo_scale, 0.0, 1.0, "It is the mean fraction of the way to the reference latents.")
    fraction = (milo_scale * weight).clamp(max=1.0)
    return pred_original_sample + fraction * (reference_latents - pred_original_sample)
