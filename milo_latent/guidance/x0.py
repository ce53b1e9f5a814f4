"""One denoising step seen from its clean estimate: from model output to x0, guided x0, and back.

A scheduler's clean estimate x0 (`pred_original_sample`) is linear in its sample and model output, so a change of x0 is
the same as a change of the model output. This is how guidance acts inside a step of any scheduler: the scheduler
receives the output that predicts the guided x0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from milo_latent.checks import check_choice, check_range, stacklevel_of_caller
from milo_latent.guidance.coefficients import StepCoefficients, Timestep, scheduler_family, step_coefficients
from milo_latent.latents.spaces import pack_latents, unpack_latents

Objective = Literal["weighted", "milo"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
SMALLEST = 1e-12  # a norm below this is taken as 0, which has no direction
PROBE = 1e-2  # distance at which a decoder's slope is measured, in lengths of x0
OFFICIAL_FACTOR = 3000.0  # by which DiffBIR's official code multiplies its scale


def guide_model_output(
    guides: Sequence[Callable[..., Tensor]],
    scheduler: SchedulerMixin,
    model_output: Tensor,
    timestep: Timestep,
    sample: Tensor,
    *,
    progress: float,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Return the model output that predicts the guided x0; every guided step, of any pipeline, passes here.

    Args:
        guides: functions `(x0, *, progress, timestep) -> x0`, which act in turn; `active`, if a guide has it, tells
            whether it acts in this step.
        scheduler: about to step.
        model_output: after classifier-free guidance, (B, C, h, w) or (B, 2C, h, w), or packed.
        timestep: as passed to `scheduler.step`.
        sample: noisy latents, as passed to `scheduler.step`, (B, C, h, w), or packed.
        progress: share of the run's steps already done, in [0, 1].
        shape: C, h and w of the guides' x0, where the pipeline may keep its latents packed (`unpack_latents`).

    Returns:
        Model output, in the shape and dtype of `model_output`; itself where no guide changes x0.

    Raises:
        ValueError: for an unknown scheduler, an epsilon model at zero terminal SNR, or packed latents of another shape.
    """
    if not guides:  # reading the timestep would make an accelerator wait
        return model_output
    time = float(timestep)
    acting = [guide for guide in guides if not hasattr(guide, "active") or guide.active(progress, time)]
    if not acting:
        return model_output
    coefficients, output = step_coefficients(scheduler, timestep), model_output
    if shape is not None:
        output, sample = unpack_latents(output, shape), unpack_latents(sample, shape)
    x0 = guided = predict_original_sample(output, sample, coefficients)
    for guide in acting:
        guided = guide(guided, progress=progress, timestep=time)
    if guided is x0:
        return model_output
    return pack_latents(shift_model_output(output, guided - x0, coefficients), model_output)


@contextmanager
def guided_run(guides: Iterable[Any], reference_latents: Tensor, num_steps: int) -> Iterator[None]:
    """Start the guides for a run of `num_steps` calls of `guide_model_output`, and end them with this block."""
    try:
        for guide in guides:
            guide.start(reference_latents, num_steps)
        yield
    finally:
        for guide in guides:
            if hasattr(guide, "end"):
                guide.end()


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless `scheduler` is known; warn if it clips the clean estimate after guidance."""
    scheduler_family(scheduler)
    active = [name for name in ("clip_sample", "thresholding") if scheduler.config.get(name)]
    if active:
        off, name = ", ".join(f"{each}=False" for each in active), type(scheduler).__name__
        warnings.warn(
            f"{name} has {' and '.join(active)} on, which clips the clean estimate after guidance; latents reach "
            f"beyond that range. Switch it off: pipe.scheduler = {name}.from_config(pipe.scheduler.config, {off}).",
            stacklevel=stacklevel_of_caller(),
        )


def predict_original_sample(model_output: Tensor, sample: Tensor, coefficients: StepCoefficients) -> Tensor:
    """Return the clean latents x0, (B, C, h, w) float32, that a model output predicts, before the scheduler clips them.

    The model output is (B, C, h, w), or (B, 2C, h, w) where it also predicts a variance, and the sample the noisy
    latents, as `scheduler.step` takes both.
    """
    predicted = coefficients.out * model_output[:, : sample.shape[1]].float()
    if coefficients.skip == 0.0:  # 0 times a sample that overflowed would be NaN
        return predicted
    return coefficients.skip * sample.float() + predicted


def shift_model_output(model_output: Tensor, change: Tensor, coefficients: StepCoefficients) -> Tensor:
    """Return the model output whose x0 differs by `change`, (B, C, h, w), from that of `model_output`.

    It has the shape and dtype of `model_output`, whose predicted variance is kept. Where the sample is clean already,
    `model_output` itself is returned, since the scheduler ignores it there.
    """
    if coefficients.out == 0.0:
        return model_output
    channels = change.shape[1]
    shifted = (model_output[:, :channels].float() + change / coefficients.out).to(model_output.dtype)
    if model_output.shape[1] == channels:
        return shifted
    return torch.cat([shifted, model_output[:, channels:]], dim=1)


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

    Source: own, the mode *mask*.
    """
    check_range("milo_scale", milo_scale, 0.0, 1.0, "It is the mean fraction of the way to the reference latents.")
    fraction = (milo_scale * weight).clamp(max=1.0)
    return pred_original_sample + fraction * (reference_latents - pred_original_sample)


def gradient_push(
    pred_original_sample: Tensor,
    reference_latents: Tensor,
    *,
    find_mask: Callable[..., Tensor],
    find_weight: Callable[[Tensor], Tensor],
    milo_scale: float,
    objective: Objective = "weighted",
) -> tuple[Tensor, Tensor]:
    """Move x0 against the gradient of a visible error, through the metric.

    n(g) = |d| * g * (|d|_2 / ||d| * g|_2) per sample, where d = r - x0 and g is the gradient. The first factor removes
    the jump of the gradient of |d| at 0, which would push a pixel just off the reference past it as far as it pushes
    the worst pixel towards it. The last one gives the push the length of the way to the reference, so that `milo_scale`
    means the same whatever the metric, the size and the noise, and the push fades as the estimate comes near. For a
    fixed weight, n(g) is W * d scaled, the direction of the mode *mask*.

    Args:
        pred_original_sample: x0, (B, C, h, w).
        reference_latents: r, (B, C, h, w).
        find_mask: MILO's mask M, (B, 1, h, w), of `dist` and `ref`, such as `metric.mask`.
        find_weight: W, (B, 1, h, w), of M.
        milo_scale: s >= 0, the length of the push in lengths of the way to r.
        objective: "weighted", mean(W * |x0 - r|), or "milo", the error E = mean(M * |x0 - r|), whose gradient can close
            the mask rather than the difference.

    Returns:
        Guided x0, (B, C, h, w): x0 - s * n(g), and M, (B, 1, h, w). Gradients are taken in `torch.inference_mode` too.

    Raises:
        ValueError: if `milo_scale` is negative or not finite, or for another objective.

    Source: own, the mode *metric*.
    """
    check_range("milo_scale", milo_scale, 0.0, 1e6, "It is the length of the push, in lengths of the way to r.")
    check_choice("objective", objective, OBJECTIVES)
    # only copies of tensors made in inference mode can take part in a gradient
    with torch.inference_mode(False), torch.enable_grad():
        leaf = pred_original_sample.detach().clone().requires_grad_(True)
        reference = reference_latents.detach().clone()
        mask = find_mask(dist=leaf, ref=reference)
        weight = find_weight(mask) if objective == "weighted" else mask
        error = (weight * (leaf - reference).abs()).mean(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(error.sum(), leaf)
    difference = reference - leaf.detach()
    gradient = gradient * difference.abs()
    way, length = _norm(difference), _norm(gradient)
    push = torch.where(length > SMALLEST, gradient * (way / length.clamp(min=SMALLEST)), 0.0)
    return leaf.detach() - milo_scale * push, mask.detach()


def decoder_push(
    x0: Tensor,
    target: Tensor,
    weight: Tensor | float,
    *,
    decode: Callable[[Tensor], Tensor],
    scale: float,
    official: bool = False,
) -> Tensor:
    """Return what moves x0 downhill in mean(weight * (target - decode(x0))^2), through the decoder.

    Args:
        x0: (B, C, h, w).
        target: image, (B or 1, 3, H, W), in the range of `decode`.
        weight: (B or 1, 1, H, W), or 1.
        decode: from latents to images.
        scale: fraction of the step that would minimise the loss if the decoder were linear, or the official s.
        official: whether to step as far as the official code does.

    Returns:
        (B, C, h, w). Gradients are taken in `torch.inference_mode` too.

    Source: DiffBIR, diffbir/utils/cond_fn.py of release v2.0.0; the length of the step without `official` is own.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x0.detach().clone().requires_grad_(True)
        decoded = decode(leaf)
        way = (target.clone() - decoded).detach()
        wanted = official_step(way, weight, scale) if official else weight * way
        (push,) = torch.autograd.grad(decoded, leaf, wanted)  # the decoder's transposed Jacobian times `wanted`
    if official:
        return push
    probe = PROBE * _norm(x0) / _norm(push).clamp(min=SMALLEST)
    with torch.no_grad():
        slope = (decode(x0 + probe * push) - decoded.detach()) / probe.clamp(min=SMALLEST)
    curvature = (weight * slope.square()).sum(dim=(1, 2, 3), keepdim=True)
    return push * (scale * _norm(push).square() / curvature.clamp(min=SMALLEST))


def official_step(way: Tensor, weight: Tensor | float, scale: float) -> Tensor:
    """Return minus the official gradient, 3000 * scale times that of mean(weight * way^2), for each item of a batch.

    The way is target - estimate, (B, C, H, W), and the weight (B, 1, H, W), or 1.
    """
    return (2.0 * OFFICIAL_FACTOR * scale / way[0].numel()) * weight * way


def posterior_mean_coefficient(scheduler: Any, timestep: int) -> float:
    """Return the factor of x0 in the mean of DDPM's posterior of the next sample (Ho et al. 2020, equation 7).

    Raises:
        ValueError: for a scheduler without `previous_timestep`.
    """
    if not hasattr(scheduler, "previous_timestep"):
        raise ValueError(
            f"Expected a DDPM scheduler for the official scaling, got {type(scheduler).__name__}. "
            "Leave `compatibility` out, or set `pipe.scheduler` to SpacedScheduler."
        )
    previous = int(scheduler.previous_timestep(timestep))
    signal = float(scheduler.alphas_cumprod[timestep])
    signal_next = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else 1.0
    return signal_next**0.5 * (1.0 - signal / signal_next) / (1.0 - signal)


def _norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
