"""DiffBIR's samplers as diffusers schedulers: stock ones where those give the official result, else the two in here."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from milo_latent.checks import check_choice

Solver = Literal["euler", "euler_a", "dpm++_2m", "dpm++_2m_sde", "dpm++_3m_sde"]
SOLVERS: tuple[str, ...] = get_args(Solver)
Grid = Literal["trailing", "continuous"]
GRIDS: tuple[str, ...] = get_args(Grid)
OFFICIAL_SAMPLERS = ("spaced", "ddim", "dpm++_m2", *(f"edm_{solver}" for solver in SOLVERS))
INFINITE_SIGMA = 1e4  # the official stand-in for the infinite sigma of zero terminal SNR
SMALLEST_LAMBDA = -5.1  # half log-SNR below which DPM-Solver cuts its continuous grid off


def official_scheduler(
    sampler: str, *, prediction_type: str = "v_prediction", rescale_betas_zero_snr: bool = True
) -> SchedulerMixin:
    """Return the scheduler whose results are those of an official sampler.

    Args:
        sampler: one of `OFFICIAL_SAMPLERS`.
        prediction_type: "epsilon" for v1 and v2, "v_prediction" for v2.1.
        rescale_betas_zero_snr: False for v1 and v2, True for v2.1.

    Returns:
        The scheduler; give it to a pipeline by `pipe.scheduler = ...`.

    Raises:
        ValueError: for an unknown sampler.

    Source: diffbir/sampler/ of the official code, whose `ddim` takes too many steps where they do not divide 1000.
    """
    check_choice("sampler", sampler, OFFICIAL_SAMPLERS)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    model = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    common: dict[str, Any] = betas | model
    if sampler == "spaced":
        return SpacedScheduler(**common, timestep_spacing="linspace", clip_sample=False)
    if sampler == "ddim":
        leading = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
        return DDIMScheduler(**common, **leading, clip_sample=False)
    if sampler == "dpm++_m2":
        return SolverScheduler(**common, solver="dpm++_2m", grid="continuous")
    return SolverScheduler(**common, solver=sampler.removeprefix("edm_"), sigma_max=INFINITE_SIGMA)


class SpacedScheduler(DDPMScheduler):
    """DDPM at evenly spaced timesteps, as DiffBIR's spaced sampler places them.

    These are the timesteps of "linspace" spacing but for 278 numbers of steps (21, 23, 31, ...), where the official
    code sums up the stride in floating point, and for a single step, which starts at the last timestep.

    Source: `space_timesteps` in DiffBIR's diffbir/sampler/spaced_sampler.py.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps by their number, or take descending `timesteps`."""
        if num_inference_steps is None or timesteps is not None:
            super().set_timesteps(num_inference_steps, device, timesteps)
            return
        timesteps = spaced_timesteps(num_inference_steps, self.config.num_train_timesteps)
        super().set_timesteps(timesteps=timesteps, device=device)
        self.num_inference_steps = num_inference_steps


def spaced_timesteps(steps: int, total: int = 1000) -> list[int]:
    """Return `steps` timesteps from `total - 1` down to 0, the positions summed up in floating point."""
    if not 1 <= steps <= total:
        raise ValueError(f"Expected 1 to {total} steps, got {steps}.")
    if steps == 1:
        return [total - 1]
    positions = np.cumsum([0.0] + [(total - 1) / (steps - 1)] * (steps - 1))  # sums one by one
    return [round(position) for position in positions[::-1]]


class SolverScheduler(EulerDiscreteScheduler):
    """Solvers of the diffusion ODE and SDE in k-diffusion's terms, on DiffBIR's noise levels.

    Samples are clean latents plus sigma times noise, as those of `EulerDiscreteScheduler`.

    Args:
        num_train_timesteps: of the model.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: "scaled_linear" or "linear".
        prediction_type: "epsilon", "v_prediction" or "sample".
        rescale_betas_zero_snr: whether the last timestep is pure noise.
        solver: "euler" and "dpm++_2m" are deterministic; "euler_a", "dpm++_2m_sde", "dpm++_3m_sde" draw noise.
        grid: "trailing" timesteps, which start at the last one and end at sigma 0, or the "continuous" times of
            DPM-Solver between timesteps, which end at the first timestep's sigma.
        sigma_max: the first sigma; None takes that of the schedule, 10000 where it is infinite. The official code
            always takes 10000, which is far out of the range of epsilon models.
        eta: share of the noise that the SDE solvers draw; 0 makes them deterministic.
        timestep_spacing, clip_sample: have no effect but on schedulers that are made from this configuration.

    Source: the equations of Karras et al. 2022 (EDM), algorithm 1, and Lu et al. 2022 (DPM-Solver++), as k-diffusion
    (Crowson) turns them into samplers; noise levels of DiffBIR's diffbir/sampler/edm_sampler.py and dpms_sampler.py.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        solver: Solver = "dpm++_3m_sde",
        grid: Grid = "trailing",
        sigma_max: float | None = None,
        eta: float = 1.0,
        timestep_spacing: str = "trailing",
        clip_sample: bool = False,
    ) -> None:
        # not the parent's constructor, which would put its own arguments into the configuration
        check_choice("solver", solver, SOLVERS)
        check_choice("grid", grid, GRIDS)
        check_choice("beta_schedule", beta_schedule, ("scaled_linear", "linear"))
        self.register_to_config(_use_default_values=[])  # else `OtherScheduler.from_config` would drop our defaults
        cumulative = _alphas_cumprod(num_train_timesteps, beta_start, beta_end, beta_schedule, rescale_betas_zero_snr)
        self._alphas_cumprod64 = cumulative
        self.alphas_cumprod = torch.from_numpy(cumulative).float()
        self.num_inference_steps: int | None = None
        self.is_scale_input_called = False
        self.set_timesteps(num_train_timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to start from."""
        return math.sqrt(1.0 + float(self.sigmas[0]) ** 2)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose timesteps and noise levels.

        Raises:
            ValueError: for fewer than 1 or more than all steps.
        """
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(f"Expected 1 to {self.config.num_train_timesteps} steps, got {num_inference_steps}.")
        timesteps, sigmas = getattr(self, f"_{self.config.grid}")(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.from_numpy(sigmas).float()  # on the CPU, where reading one needs no wait
        self.timesteps = torch.from_numpy(timesteps).float().to(device)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._history: list[Tensor] = []  # clean estimates of the last steps, the newest first

    def _trailing(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        last = self.config.num_train_timesteps - 1
        timesteps = np.linspace(last, 0, steps, endpoint=False).astype(int)
        cumulative = self._alphas_cumprod64[timesteps]
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((1.0 - cumulative) / cumulative)
        sigmas[0] = self.config.sigma_max or min(sigmas[0], INFINITE_SIGMA)
        return timesteps.astype(float), np.append(sigmas, 0.0)

    def _continuous(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Interpolate log alpha at times from 1 to 1/N, after the noisiest timesteps are cut off."""
        with np.errstate(divide="ignore"):
            log_alphas = np.log(self._alphas_cumprod64) / 2
            lambdas = log_alphas - np.log(1.0 - self._alphas_cumprod64) / 2
        log_alphas = log_alphas[lambdas >= SMALLEST_LAMBDA]
        count = len(log_alphas)
        times = np.linspace(1.0, 1.0 / count, steps + 1)
        interpolated = np.interp(times, np.linspace(0.0, 1.0, count + 1)[1:], log_alphas)
        sigmas = np.sqrt(np.expm1(-2.0 * interpolated))
        return ((times - 1.0 / count) * self.config.num_train_timesteps)[:-1], sigmas

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step towards clean latents.

        Args:
            model_output: for the sample as `scale_model_input` scaled it, (B, C, h, w).
            timestep: of `timesteps`, in their order.
            sample: (B, C, h, w).
            generator: of the noise that an SDE solver draws.
            variance_noise: unit normal noise, of the sample's shape, instead of drawn noise.
            return_dict: whether to return a dataclass or a tuple.

        Returns:
            The next sample and `pred_original_sample`.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index, last = self.step_index, len(self.sigmas) - 2
        sigma, sigma_next = float(self.sigmas[index]), float(self.sigmas[index + 1])
        sample = sample.float()
        denoised = self._denoised(model_output.float(), sample, sigma)
        if sigma_next == 0.0:
            following = denoised
        else:
            following, deviation = self._solve(sample, denoised, index)
            if deviation > 0.0:
                if variance_noise is None:
                    shape, device = model_output.shape, model_output.device
                    variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=model_output.dtype)
                following = following + variance_noise * deviation
            if index == last:  # noise is left: as a variance-preserving solver returns it
                following = following / math.sqrt(1.0 + sigma_next**2)
        self._history = [denoised, *self._history][:2]
        self._step_index = index + 1
        following = following.to(model_output.dtype)
        if not return_dict:
            return following, denoised
        return EulerDiscreteSchedulerOutput(prev_sample=following, pred_original_sample=denoised)

    def _denoised(self, output: Tensor, sample: Tensor, sigma: float) -> Tensor:
        kind, scale = self.config.prediction_type, 1.0 + sigma**2
        check_choice("prediction_type", kind, ("epsilon", "v_prediction", "sample"))
        if kind == "epsilon":
            return sample - sigma * output
        return output if kind == "sample" else sample / scale - output * (sigma / math.sqrt(scale))

    def _solve(self, sample: Tensor, denoised: Tensor, index: int) -> tuple[Tensor, float]:
        """Return the next sample without the noise to draw, and the standard deviation of that noise."""
        solver, sigma, sigma_next = self.config.solver, float(self.sigmas[index]), float(self.sigmas[index + 1])
        if solver in ("euler", "euler_a"):
            # ancestral: noise of deviation `up` is added, and as much more is removed before (DDPM's posterior)
            up = 0.0 if solver == "euler" else self._ancestral(sigma, sigma_next)
            down = math.sqrt(sigma_next**2 - up**2)
            return sample + (sample - denoised) / sigma * (down - sigma), up
        eta = self.config.eta if solver.endswith("_sde") else 0.0
        # lambda = -log(sigma): the exact solution for a constant clean estimate, plus terms for how that changes
        widths = [float(torch.log(self.sigmas[at] / self.sigmas[at + 1])) for at in range(max(index - 2, 0), index + 1)]
        width = widths[-1] * (1.0 + eta)
        following = math.exp(-width) * sample - math.expm1(-width) * denoised
        following = following + self._correction(denoised, widths, width, index)
        return following, sigma_next * math.sqrt(-math.expm1(-2.0 * widths[-1] * eta))

    def _ancestral(self, sigma: float, sigma_next: float) -> float:
        up = self.config.eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        return min(sigma_next, up)

    def _correction(self, denoised: Tensor, widths: list[float], width: float, index: int) -> Tensor | float:
        """Return the second and third order terms, from differences of the last clean estimates."""
        past, single = self._history, self.config.grid == "continuous" and len(self.sigmas) <= 10
        if not past or (single and index == len(self.sigmas) - 2):  # DPM-Solver: first order last, below 10 steps
            return 0.0
        newer = (denoised - past[0]) * (widths[-1] / widths[-2])
        if self.config.solver != "dpm++_3m_sde":
            return newer * (-math.expm1(-width) / 2)
        phi_2 = math.expm1(-width) / width + 1.0
        if len(past) < 2:
            return newer * phi_2
        older = (past[0] - past[1]) * (widths[-1] / widths[-3])
        ratios = widths[-2] / widths[-1], widths[-3] / widths[-1]
        curvature = (newer - older) / sum(ratios)
        return (newer + curvature * ratios[0]) * phi_2 - curvature * (phi_2 / width - 0.5)


def _alphas_cumprod(total: int, start: float, end: float, schedule: str, zero_snr: bool) -> np.ndarray:
    """Return the signal power left at each timestep, (total,) float64."""
    scaled = schedule == "scaled_linear"
    betas = np.linspace(math.sqrt(start), math.sqrt(end), total) ** 2 if scaled else np.linspace(start, end, total)
    cumulative = np.cumprod(1.0 - betas)
    if not zero_snr:
        return cumulative
    # Lin et al. 2024, algorithm 1: shift the last signal to 0, keep the first
    signal = np.sqrt(cumulative)
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
