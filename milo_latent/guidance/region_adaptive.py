"""DiffBIR's restoration guidance: keep each clean estimate near the cleaned image, most in its flat regions.

This is the baseline of MILO guidance. DiffBIR's code of 2024 accepts it and never applies it; here it works with any
scheduler.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch, check_choice, check_range
from milo_latent.guidance.base import Guide
from milo_latent.guidance.reference import check_count
from milo_latent.latents.codec import unscale_latents

Loss = Literal["mse", "w_mse"]
LOSSES: tuple[str, ...] = get_args(Loss)
Space = Literal["latent", "rgb"]
SPACES: tuple[str, ...] = get_args(Space)
OFFICIAL_FACTOR = 3000.0  # by which the official code multiplies its scale
GRAY = (0.2989, 0.5870, 0.1140)
BLOCK = 2  # pixels a side over which edges are gathered
SMALLEST = 1e-12
PROBE = 1e-2  # distance at which the decoder's slope is measured, in lengths of the estimate


class RegionAdaptiveGuidance(Guide):
    """Move the clean estimate of every step towards the cleaned image, in latents or through the VAE's decoder.

    Give it as `callback_on_step_end` to `DiffBIRPipeline`; around other pipelines use `with guide.attach(pipe):`.

    Args:
        vae: the pipeline's; needed in "rgb", and for "w_mse" without `target`.
        scale: strength, in [0, 1], whatever the image's size: the fraction of the way to the reference latents, or in
            "rgb" of the step downhill that fits the target best; with `compatibility` the official s, >= 0, whose
            effect shrinks as the image grows.
        loss: "w_mse" weights flat regions more than edges, "mse" all alike.
        space: "latent", or "rgb", which costs two passes forward and one back through the decoder for each push.
        repeat: pushes in each step.
        t_start: the guide acts where t_stop < timestep + 1 < t_start.
        t_stop: the lower end of that interval.
        reference_latents: r, (B, C, h, w); may be left out for `DiffBIRPipeline`.
        target: the image that r encodes, (B, 3, H, W), in [0, 1]; None takes the cleaned image of `DiffBIRPipeline`,
            and elsewhere decodes r.
        compatibility: "official" scales as DiffBIR v2.0.0 does, which needs a DDPM scheduler; None scales as `scale`
            says.

    Raises:
        ValueError: for values outside their range, or without a VAE where one is needed.

    Source: DiffBIR (Lin et al., ECCV 2024), section 3.4 and algorithm 1; diffbir/utils/cond_fn.py and, for how it is
    applied, utils/sampler.py of release v2.0.0. The scaling without `compatibility` is own.
    """

    _target: Tensor | None = None  # (B or 1, 3, H, W) in [-1, 1], where pushes go through the decoder
    _weight: Tensor | float = 1.0  # (B or 1, 1, h, w), or (B or 1, 1, H, W) in "rgb"

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        scale: float = 0.5,
        *,
        loss: Loss = "w_mse",
        space: Space = "latent",
        repeat: int = 1,
        t_start: int = 1001,
        t_stop: int = -1,
        reference_latents: Tensor | None = None,
        target: Tensor | None = None,
        compatibility: Literal["official"] | None = None,
    ) -> None:
        super().__init__(reference_latents)
        check_choice("loss", loss, LOSSES)
        check_choice("space", space, SPACES)
        check_range("repeat", repeat, 1, 1000, "It is a number of pushes.")
        if compatibility is None:
            check_range("scale", scale, 0.0, 1.0, "It is a fraction of the way.")
        else:
            check_choice("compatibility", compatibility, ("official",))
            check_range("scale", scale, 0.0, 1e6, "It is the official scale.")
        if vae is None and (space == "rgb" or (loss == "w_mse" and target is None)):
            raise ValueError(f"Expected a `vae` for {loss} in {space} space, got None. Pass `vae=pipe.vae`.")
        if target is not None:
            check_batch("target", target, 3)
        self.register_to_config(
            scale=scale, loss=loss, space=space, repeat=repeat, t_start=t_start, t_stop=t_stop,
            compatibility=compatibility,
        )  # fmt: skip
        self.vae, self.target = vae, target
        self.scale, self.loss, self.space, self.repeat = scale, loss, space, repeat
        self.t_start, self.t_stop, self.official = t_start, t_stop, compatibility == "official"
        self._cleaned: Tensor | None = None  # the cleaned image of the run to come
        self._scheduler: Any = None

    def accept_image(self, image: Tensor) -> None:
        """Take the cleaned image, (B, 3, H, W) in [0, 1], as the next run's target; `DiffBIRPipeline` calls this."""
        self._cleaned = image

    def bind(self, pipeline: DiffusionPipeline) -> None:
        """Remember the scheduler of `pipeline`; raise ValueError if the official scaling needs another."""
        self._scheduler = pipeline.scheduler
        if self.official and not hasattr(self._scheduler, "previous_timestep"):
            raise ValueError(
                f"Expected a DDPM scheduler for the official scaling, got {type(self._scheduler).__name__}. "
                "Leave `compatibility` out, or set `pipe.scheduler` to SpacedScheduler."
            )

    def start(self, reference: Tensor, num_steps: int) -> None:
        """Begin a run: find the image to pull towards, where pushes need it, and the weight of its regions."""
        super().start(reference, num_steps)
        cleaned, self._cleaned = self._cleaned, None
        if self.space == "latent" and self.loss == "mse":
            return
        image = self._find_target(reference, cleaned).to(reference.device)
        if self.loss == "w_mse":
            weight = flatness(image)  # (B, 1, H, W)
            size = (reference.shape[2], reference.shape[3])
            self._weight = weight if self.space == "rgb" else F.adaptive_avg_pool2d(weight, size)
        if self.space == "rgb":
            self._target = image * 2 - 1

    def end(self) -> None:
        """End the run: nothing of it is kept."""
        super().end()
        self._target, self._weight = None, 1.0

    def active(self, progress: float, timestep: float) -> bool:
        """Return whether the timestep is in the guided interval, and the scale above 0."""
        return self.scale > 0.0 and self.t_stop < timestep + 1 < self.t_start

    def guide_x0(self, x0: Tensor, *, progress: float, timestep: float) -> Tensor:
        """Return the clean estimate after `repeat` pushes, (B, C, h, w) float32."""
        reference, guided = self.reference_for(x0), x0
        for _ in range(self.repeat):
            push = self._push(guided, reference)
            if self.official:
                push = push / posterior_mean_coefficient(self._scheduler, int(timestep))
            guided = guided + push
        return guided

    def _find_target(self, reference: Tensor, cleaned: Tensor | None) -> Tensor:
        """Return the image to pull towards, (B or 1, 3, H, W), in [0, 1]."""
        if self.target is not None:
            return self.target.detach().float()
        if cleaned is not None:  # the results of each image follow each other
            return cleaned.detach().float().repeat_interleave(reference.shape[0] // cleaned.shape[0], dim=0)
        assert self._reference is not None
        with torch.no_grad():
            return self._decode(self._reference) / 2 + 0.5

    def _push(self, x0: Tensor, reference: Tensor) -> Tensor:
        """Return what one push adds to the clean estimate, (B, C, h, w)."""
        way, weight, target = reference - x0, self._weight, self._target
        if isinstance(weight, Tensor):
            check_count("target", weight, x0)
        if target is None:
            return official_step(way, weight, self.scale) if self.official else self.scale * weight * way
        check_count("target", target, x0)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x0.detach().clone().requires_grad_(True)
            decoded = self._decode(leaf)
            towards = (target.clone() - decoded).detach()
            wanted = official_step(towards, weight, self.scale) if self.official else weight * towards
            (push,) = torch.autograd.grad(decoded, leaf, wanted)  # the decoder's transposed Jacobian times `wanted`
        if self.official:
            return push
        # the step that would minimise the loss along `push` if the decoder were linear, times the scale
        probe = PROBE * _norm(x0) / _norm(push).clamp(min=SMALLEST)
        with torch.no_grad():
            slope = (self._decode(x0 + probe * push) - decoded.detach()) / probe.clamp(min=SMALLEST)
        curvature = (weight * slope.square()).sum(dim=(1, 2, 3), keepdim=True)
        return push * (self.scale * _norm(push).square() / curvature.clamp(min=SMALLEST))

    def _decode(self, latents: Tensor) -> Tensor:
        """Return images about [-1, 1], (B, 3, H, W) float32, with a gradient to the latents."""
        assert self.vae is not None
        device = latents.device if self.vae.device.type == "meta" else self.vae.device
        raw = unscale_latents(self.vae, latents.to(device=device, dtype=self.vae.dtype))
        return self.vae.decode(raw).sample.float().to(latents.device)


def official_step(towards: Tensor, weight: Tensor | float, scale: float) -> Tensor:
    """Return the official gradient: 3000 * scale times minus that of mean(weight * difference^2), summed over a batch.

    Args:
        towards: target - estimate, (B, C, H, W).
        weight: (B, 1, H, W), or 1.
        scale: s.

    Returns:
        (B, C, H, W).
    """
    return (2.0 * OFFICIAL_FACTOR * scale / towards[0].numel()) * weight * towards


def flatness(image: Tensor) -> Tensor:
    """Return a weight that is 1 where nothing changes and 0 at strong edges.

    Args:
        image: (B, 3, H, W), in [0, 1].

    Returns:
        Weight, (B, 1, H, W): in each block of 2x2 pixels, 1 - tanh(sum of Sobel's gradient magnitudes).

    Source: DiffBIR, equation 6.
    """
    height, width = image.shape[2:]
    gray = (image * torch.tensor(GRAY, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, -1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None].to(gray)  # (2, 1, 3, 3)
    magnitude = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), kernels).square().sum(1, keepdim=True).sqrt()
    padded = F.pad(magnitude, (0, -width % BLOCK, 0, -height % BLOCK))
    edges = (F.avg_pool2d(padded, BLOCK) * BLOCK**2).tanh()
    return 1.0 - F.interpolate(edges, scale_factor=BLOCK, mode="nearest")[..., :height, :width]


def posterior_mean_coefficient(scheduler: Any, timestep: int) -> float:
    """Return the factor of x0 in the mean of DDPM's posterior of the next sample (Ho et al. 2020, equation 7)."""
    previous = int(scheduler.previous_timestep(timestep))
    signal = float(scheduler.alphas_cumprod[timestep])
    signal_next = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else 1.0
    return signal_next**0.5 * (1.0 - signal / signal_next) / (1.0 - signal)


def _norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
