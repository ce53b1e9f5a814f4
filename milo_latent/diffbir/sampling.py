"""What DiffBIR's denoising loop is made of: timesteps, noise, the networks, guidance scale; pure functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from milo_latent.diffbir.rules import DEFAULT, Rules

StartPoint = Literal["noise", "cond"]
START_POINTS: tuple[str, ...] = get_args(StartPoint)
PRK_STEPS = 4  # the fewest that PNDM's Runge-Kutta start takes


def check_scheduler(scheduler: SchedulerMixin, steps: int) -> None:
    """Raise ValueError for a scheduler of models that predict flow, or that needs more steps."""
    if scheduler.config.get("skip_prk_steps") is False and steps < PRK_STEPS:
        name = type(scheduler).__name__
        raise ValueError(
            f"Expected {PRK_STEPS} steps or more with the Runge-Kutta start of {name}, got {steps}. Leave it out: "
            f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, skip_prk_steps=True)."
        )
    if not hasattr(scheduler, "init_noise_sigma"):
        raise ValueError(
            f"Expected a scheduler of models that predict noise, v or a sample, got {type(scheduler).__name__}, which "
            "is for flow matching. Take another, such as EulerDiscreteScheduler."
        )


def set_timesteps(scheduler: SchedulerMixin, steps: int, device: torch.device) -> Tensor:
    """Choose the timesteps of a run.

    A single step starts from the last timestep. Schedulers with "linspace" or "leading" spacing would start it from the
    first, whose model takes the noise for a clean image.

    Returns:
        Timesteps, (steps,), or more for schedulers that call the model twice in a step.
    """
    scheduler.set_timesteps(steps, device=device)
    last = scheduler.config.num_train_timesteps - 1
    # the timesteps of EDM's schedulers are noise levels, and start from the highest anyway
    counts = "timestep_spacing" in scheduler.config or not hasattr(scheduler, "sigmas")
    low = counts and float(scheduler.timesteps[0]) < last / 2
    if steps == 1 and low and not scheduler.config.get("use_flow_sigmas"):
        if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=[last], device=device)
        elif hasattr(scheduler, "sigmas"):  # their noise level must be that of the timestep
            spacing = scheduler.config.timestep_spacing
            scheduler.register_to_config(timestep_spacing="trailing")
            scheduler.set_timesteps(steps, device=device)
            scheduler.register_to_config(timestep_spacing=spacing)
        else:
            scheduler.timesteps = torch.full_like(scheduler.timesteps[:1], last)
    return scheduler.timesteps


def step_arguments(scheduler: SchedulerMixin, generator: Any, eta: float) -> dict[str, Any]:
    """Return those of `generator` and `eta` that the scheduler's step takes."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in taken}


def draw_noise(
    shape: tuple[int, ...], *, generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> Tensor:
    """Draw unit normal noise in float32, so that a seed gives the same noise whatever the dtype of the networks."""
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


def add_noise(latents: Tensor, noise: Tensor, scheduler: SchedulerMixin, timestep: int) -> Tensor:
    """Noise latents, (B, C, h, w), to a timestep by unit normal noise of their shape.

    The result is sqrt(a) * latents + sqrt(1 - a) * noise, where a is the scheduler's `alphas_cumprod`.

    Raises:
        ValueError: if the scheduler has no `alphas_cumprod`.
    """
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"Expected a scheduler with `alphas_cumprod` to noise latents with, got {type(scheduler).__name__}. "
            'Take another, or `start_point="noise"` and `noise_aug=0`.'
        )
    signal = float(scheduler.alphas_cumprod[timestep])
    return math.sqrt(signal) * latents + math.sqrt(1.0 - signal) * noise


def augment(condition: Tensor, scheduler: SchedulerMixin, timestep: int, generator: Any) -> Tensor:
    """Noise the condition, (B, C, h, w), to a timestep by noise drawn anew; at 0 it is returned as it is."""
    if timestep == 0:
        return condition
    noise = draw_noise(tuple(condition.shape), generator=generator, device=condition.device)
    return add_noise(condition, noise, scheduler, timestep)


def guidance_scale_at(scale: float, timestep: float, *, total: int = 1000, rules: Rules = DEFAULT) -> float:
    """Return the scale of classifier-free guidance where it grows, from 1, while the noise decreases.

    Args:
        scale: `guidance_scale`; 1 or less stays as it is.
        timestep: of the step, `total - 1` down to 0.
        total: number of timesteps that the model was trained with.
        rules: say by how much the scale grows until the last step.

    Source: `get_cfg_scale` in DiffBIR's diffbir/sampler/sampler.py.
    """
    if scale <= 1.0:
        return scale
    share = (1.0 - math.cos(math.pi * ((total - timestep) / total) ** 5)) / 2
    return 1.0 + rules.guidance_growth(scale) * share


def extrapolate(without: Tensor, with_prompt: Tensor, *, scale: float, rescale: float = 0.0) -> Tensor:
    """Extrapolate from the output for the negative prompt through that for the prompt: classifier-free guidance.

    Args:
        without: model output for the negative prompt, (B, C, h, w).
        with_prompt: model output for the prompt.
        scale: 1 gives `with_prompt`.
        rescale: share in which each sample's standard deviation is put back to that of `with_prompt`, in [0, 1].

    Source: the rescaling is Lin et al., arXiv 2305.08891, section 3.4.
    """
    guided = without + scale * (with_prompt - without)
    if rescale == 0.0:
        return guided
    deviation, wanted = (each.std(dim=(1, 2, 3), keepdim=True) for each in (guided, with_prompt))
    return guided * (1.0 + rescale * (wanted / deviation - 1.0))


def controlled_output(
    unet: Any,
    controlnet: Any,
    sample: Tensor,
    condition: Tensor,
    *,
    timestep: Tensor,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    conditioning_scale: float,
    scale: float,
    rescale: float,
    image_embeds: Sequence[tuple[Tensor | None, Tensor]] | None = None,
    attention: Mapping[str, Any] | None = None,
    tiles: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Run ControlNet and UNet once, on a batch of both prompts where there is a negative one.

    Args:
        unet: denoiser.
        controlnet: IRControlNet.
        sample: as the scheduler scaled it, (B, C, h, w).
        condition: latents of the cleaned image, (B, C, h, w).
        timestep: of the step.
        prompt_embeds: (B, tokens, width); None for models without prompts.
        negative_prompt_embeds: (B, tokens, width); None without classifier-free guidance.
        conditioning_scale: factor of the ControlNet's residuals.
        scale: of classifier-free guidance.
        rescale: as in `extrapolate`.
        image_embeds: of IP-adapters, as `prompts.repeat_image_prompts` returns them; None for a UNet without.
        attention: what diffusers' pipelines call `cross_attention_kwargs`, for the UNet.
        tiles: applies a function to tiles of the latents, as `Rules.tiles` returns it; None predicts from the whole.

    Returns:
        Model output, (B, C, h, w) float32.
    """
    if tiles is not None:
        step: dict[str, Any] = {
            "timestep": timestep, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds,
            "conditioning_scale": conditioning_scale, "scale": scale, "rescale": rescale, "image_embeds": image_embeds,
            "attention": attention,
        }  # fmt: skip
        both = torch.cat([sample, condition.to(sample.dtype)], dim=1)
        return tiles(lambda part: controlled_output(unet, controlnet, *part.tensor_split(2, dim=1), **step), both)
    dtype, embeds = unet.dtype, prompt_embeds
    sample, condition = sample.to(dtype), condition.to(dtype)
    if negative_prompt_embeds is not None:
        sample, condition = torch.cat([sample, sample]), torch.cat([condition, condition])
        embeds = torch.cat([negative_prompt_embeds, prompt_embeds.to(negative_prompt_embeds)])  # type: ignore[union-attr]
    embeds = embeds if embeds is None else embeds.to(device=sample.device, dtype=dtype)
    shared = {"encoder_hidden_states": embeds, "return_dict": False}
    down_residuals, mid_residual = controlnet(
        sample, timestep, controlnet_cond=condition, conditioning_scale=conditioning_scale, **shared
    )
    residuals: dict[str, Any] = {
        "down_block_additional_residuals": down_residuals, "mid_block_additional_residual": mid_residual,
        "cross_attention_kwargs": attention,
    }  # fmt: skip
    if image_embeds is not None:
        guided = negative_prompt_embeds is not None
        shown = [
            torch.cat([negative, each]) if guided and negative is not None else each for negative, each in image_embeds
        ]
        residuals["added_cond_kwargs"] = {"image_embeds": [each.to(sample) for each in shown]}
    output = unet(sample, timestep, **residuals, **shared)[0].float()
    if negative_prompt_embeds is None:
        return output
    return extrapolate(*output.chunk(2), scale=scale, rescale=rescale)
