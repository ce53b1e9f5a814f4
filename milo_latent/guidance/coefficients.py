"""What a scheduler makes of a model output: the clean estimate x0 as a linear function of it; pure functions.

Symbols: `sample` = alpha * x0 + sigma * noise, and x0 = skip * sample + out * model_output. Each family of diffusers'
schedulers keeps alpha and sigma elsewhere, and some evaluate the model where no entry of `sigmas` stands: the second
half of a step of KDPM2 and of DPMSolverSDE. PNDM and LCM go by the timestep that they are called with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

BY_TIMESTEP = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LCMScheduler",
    "TCDScheduler",
)  # fmt: skip
BY_SIGMA = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
)  # fmt: skip
BY_ALPHA_SIGMA = (
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler",
)  # fmt: skip
BY_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
BY_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
FAMILIES = {
    "timestep": BY_TIMESTEP,
    "sigma": BY_SIGMA,
    "alpha_sigma": BY_ALPHA_SIGMA,
    "edm": BY_EDM,
    "flow": BY_FLOW,
}
KNOWN_SCHEDULERS = tuple(name for names in FAMILIES.values() for name in names)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")

Timestep = Tensor | float | int


@dataclass(frozen=True)
class StepCoefficients:
    """How the clean estimate follows from sample and model output where the model was evaluated.

    Args:
        skip: share of the sample in the clean estimate.
        out: share of the model output in it; 0 where the sample is clean already.
    """

    skip: float
    out: float


def step_coefficients(scheduler: SchedulerMixin, timestep: Timestep) -> StepCoefficients:
    """Read the coefficients of the step that `scheduler` is about to take.

    Args:
        scheduler: one of `KNOWN_SCHEDULERS`, or of a class derived from one.
        timestep: the timestep about to be passed to `scheduler.step`.

    Returns:
        The coefficients.

    Raises:
        ValueError: for a scheduler or a prediction type that is not known, or an epsilon model at zero terminal SNR,
            which cannot tell x0.

    Source: the methods `step`, `convert_model_output` and `precondition_outputs` of diffusers' schedulers.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> step_coefficients(DDIMScheduler(prediction_type="sample"), 500).out
        1.0
    """
    family = scheduler_family(scheduler)
    if family == "edm":
        return _edm(scheduler, timestep)
    alpha, sigma = NOISE_LEVELS[family](scheduler, timestep)
    if family == "flow":
        return StepCoefficients(1.0, -sigma)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        if alpha == 0.0:
            raise ValueError(
                f"At timestep {float(timestep):g} the noise schedule has zero signal, where an epsilon model says "
                "nothing of x0. Use a v-prediction model, or betas without rescale_betas_zero_snr."
            )
        return StepCoefficients(1.0 / alpha, -sigma / alpha)
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2 if family == "sigma" else 1.0  # these alone keep samples whose variance is not 1
        return StepCoefficients(alpha / norm, -sigma / norm**0.5)
    if prediction_type in ("sample", "original_sample"):
        return StepCoefficients(0.0, 1.0)
    if prediction_type == "flow_prediction":
        return StepCoefficients(1.0, -_sigma(scheduler, timestep))
    raise ValueError(f"Expected a prediction type of {PREDICTION_TYPES}, got {prediction_type!r}.")


def scheduler_family(scheduler: SchedulerMixin) -> str:
    """Return the family of `scheduler`, a key of `FAMILIES`.

    Raises:
        ValueError: for a scheduler that is in none, naming it and those that are.
    """
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    for family, known in FAMILIES.items():
        if names & set(known):
            return family
    raise ValueError(
        f"Expected a scheduler whose clean estimate is known, got {type(scheduler).__name__}. "
        f"Known: {', '.join(KNOWN_SCHEDULERS)}."
    )


def step_index(scheduler: Any, timestep: Timestep) -> int:
    """Return the index of the coming step in the scheduler's schedule; a scheduler fixes it only in its first `step`.

    Args:
        scheduler: any of diffusers'.
        timestep: about to be passed to `scheduler.step`.
    """
    for known in ("step_index", "begin_index"):
        if getattr(scheduler, known, None) is not None:
            return int(getattr(scheduler, known))
    if hasattr(scheduler, "index_for_timestep"):
        return int(scheduler.index_for_timestep(timestep))
    return int((scheduler.timesteps == timestep).nonzero()[0])


def _by_timestep(scheduler: Any, timestep: Timestep) -> tuple[float, float]:
    product = float(scheduler.alphas_cumprod[int(timestep)])
    return product**0.5, (1.0 - product) ** 0.5


def _by_sigma(scheduler: Any, timestep: Timestep) -> tuple[float, float]:
    """Return alpha and sigma, in the second half of a step too, where each scheduler has its own point between two."""
    index = step_index(scheduler, timestep)
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if not getattr(scheduler, "state_in_first_order", True):
        if "KDPM2DiscreteScheduler" in names:
            return 1.0, float(scheduler.sigmas_interpol[index])
        if "KDPM2AncestralDiscreteScheduler" in names:
            return 1.0, float(scheduler.sigmas_interpol[index - 1])
        if "DPMSolverSDEScheduler" in names:  # half way in log sigma
            return 1.0, float(scheduler.sigmas[index - 1] * scheduler.sigmas[index]) ** 0.5
    return 1.0, float(scheduler.sigmas[index])


def _by_alpha_sigma(scheduler: Any, timestep: Timestep) -> tuple[float, float]:
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(torch.tensor(_sigma(scheduler, timestep)))
    return float(alpha), float(sigma)


def _by_flow(scheduler: Any, timestep: Timestep) -> tuple[float, float]:
    sigma = _sigma(scheduler, timestep)
    return 1.0 - sigma, sigma


NOISE_LEVELS: dict[str, Callable[[Any, Timestep], tuple[float, float]]] = {
    "timestep": _by_timestep,
    "sigma": _by_sigma,
    "alpha_sigma": _by_alpha_sigma,
    "flow": _by_flow,
}


def _edm(scheduler: Any, timestep: Timestep) -> StepCoefficients:
    """Return the coefficients of a preconditioned model (Karras et al. 2022, table 1)."""
    sigma, data = _sigma(scheduler, timestep), float(scheduler.config.sigma_data)
    total = sigma**2 + data**2
    sign = -1.0 if scheduler.config.prediction_type == "v_prediction" else 1.0
    return StepCoefficients(data**2 / total, sign * sigma * data / total**0.5)


def _sigma(scheduler: Any, timestep: Timestep) -> float:
    return float(scheduler.sigmas[step_index(scheduler, timestep)])
