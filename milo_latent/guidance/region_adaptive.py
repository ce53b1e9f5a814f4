"""DiffBIR's restoration guidance, the baseline of MILO guidance; here it works with any scheduler."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch, check_choice, check_range
from milo_latent.guidance.base import Guide
from milo_latent.guidance.curriculum import flatness
from milo_latent.guidance.reference import check_count, match_reference
from milo_latent.guidance.x0 import decoder_push, official_step, posterior_mean_coefficient
from milo_latent.latents.codec import working_device
from milo_latent.latents.spaces import VAE, LatentSpace

Loss = Literal["mse", "w_mse"]
Space = Literal["latent", "rgb"]


class RegionAdaptiveGuidance(Guide):
    """Pull the clean estimate of every step to the cleaned image, most in flat regions, in latents or in pixels.

    Args:
        vae: the pipeline's; needed in "rgb", and for "w_mse" without `target`.
        scale: in [0, 1], the fraction of the way to the reference latents, or in "rgb" of the step downhill that fits
            the target best; with `compatibility` the official s, >= 0, whose effect shrinks as the image grows.
        loss: "w_mse" weights flat regions more than edges, "mse" all alike.
        space: "latent", or "rgb", where each push costs two passes forward and one back through the decoder.
        repeat: pushes in each step.
        t_start: steps are guided where t_stop < timestep + 1 < t_start.
        t_stop: see `t_start`.
        reference_latents: r, (B, C, h, w); may be left out for `DiffBIRPipeline`.
        target: the image that r encodes, (B, 3, H, W), in [0, 1]; None takes that of `DiffBIRPipeline`, or decodes r.
        compatibility: "official" scales as DiffBIR v2.0.0 does, which needs a DDPM scheduler.

    Raises:
        ValueError: for values outside their range, or without a VAE where one is needed.

    Source: DiffBIR (Lin et al., ECCV 2024), section 3.4 and algorithm 1; diffbir/utils/cond_fn.py and, for how it is
    applied, utils/sampler.py of release v2.0.0. The scaling without `compatibility` is own.
    """

    _target: Tensor | None = None  # of the current run, (B or 1, 3, H, W) in [-1, 1], in "rgb"
    _weight: Tensor | float = 1.0  # of the current run, (B or 1, 1, h, w), or (B or 1, 1, H, W) in "rgb"

    def __init__(
        self,
        vae: VAE | None = None,
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
        check_choice("loss", loss, get_args(Loss))
        check_choice("space", space, get_args(Space))
        check_range("repeat", repeat, 1, 1000, "It is a number of pushes.")
        check_choice("compatibility", compatibility or "official", ("official",))
        high, meaning = (1e6, "the official scale") if compatibility else (1.0, "a fraction of the way")
        check_range("scale", scale, 0.0, high, f"It is {meaning}.")
        if vae is None and (space == "rgb" or (loss == "w_mse" and target is None)):
            raise ValueError(f"Expected a `vae` for {loss} in {space} space, got None. Pass `vae=pipe.vae`.")
        if target is not None:
            check_batch("target", target, 3)
        self.register_to_config(
            scale=scale, loss=loss, space=space, repeat=repeat, t_start=t_start, t_stop=t_stop,
            compatibility=compatibility,
        )  # fmt: skip
        self.vae, self.target, self.scale, self.loss, self.space, self.repeat = vae, target, scale, loss, space, repeat
        self.t_start, self.t_stop, self.official = t_start, t_stop, compatibility == "official"
        self._cleaned: Tensor | None = None  # image of the run to come
        self._scheduler: Any = None

    def accept_image(self, image: Tensor) -> None:
        """Take the cleaned image, (B, 3, H, W) in [0, 1], as the next run's target; `DiffBIRPipeline` calls this."""
        self._cleaned = image

    def bind(self, pipeline: DiffusionPipeline) -> None:
        """Remember the scheduler, which the official scaling asks."""
        self._scheduler = pipeline.scheduler

    def start(self, reference: Tensor, num_steps: int) -> None:
        """Begin a run: find the image to pull towards, where pushes need it, and the weight of its regions."""
        super().start(reference, num_steps)
        image, self._cleaned = self._cleaned, None
        if self.space == "latent" and self.loss == "mse":
            return
        if self.target is not None:
            image = self.target.detach().to(self.reference)
        elif image is not None:  # the results of each image follow each other
            image = image.detach().to(self.reference).repeat_interleave(reference.shape[0] // image.shape[0], dim=0)
        else:
            with torch.no_grad():
                image = self._decode(self.reference) / 2 + 0.5
        if self.loss == "w_mse":
            weight, size = flatness(image), list(reference.shape[2:])  # (B, 1, H, W)
            self._weight = weight if self.space == "rgb" else F.interpolate(weight, size, mode="area")
        if self.space == "rgb":
            self._target = image * 2 - 1

    def end(self) -> None:
        """End the run, and let go of its tensors."""
        super().end()
        self._target, self._weight = None, 1.0

    def active(self, progress: float, timestep: float) -> bool:
        """Return whether the timestep lies in the guided interval, and the scale above 0."""
        return self.scale > 0.0 and self.t_stop < timestep + 1 < self.t_start

    def guide_x0(self, x0: Tensor, *, progress: float, timestep: float) -> Tensor:
        """Return the clean estimate after all pushes of a step, (B, C, h, w) float32."""
        unit = posterior_mean_coefficient(self._scheduler, int(timestep)) if self.official else 1.0
        for _ in range(self.repeat):
            x0 = x0 + self._push(x0) / unit
        return x0

    def _push(self, x0: Tensor) -> Tensor:
        """Return what one push adds to the clean estimate, (B, C, h, w)."""
        if isinstance(self._weight, Tensor):
            check_count("target", self._weight, x0)
        if self._target is None:
            way = match_reference(self.reference, x0) - x0
            return official_step(way, self._weight, self.scale) if self.official else self.scale * self._weight * way
        check_count("target", self._target, x0)
        return decoder_push(
            x0, self._target, self._weight, decode=self._decode, scale=self.scale, official=self.official
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """Return images about [-1, 1], (B, 3, H, W) float32, with a gradient to the latents."""
        assert self.vae is not None
        device = working_device(self.vae.device, latents)
        space = LatentSpace(self.vae)
        raw = space.unscale(latents.to(device=device, dtype=self.vae.dtype))
        return space.decode(raw).float().to(latents.device)
