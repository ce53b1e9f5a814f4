"""DiffBIR's stages as blocks of a modular pipeline: clean, encode, denoise, decode, and give the colors back.

`DiffBIRBlocks().init_pipeline()` assembles them. The result is that of `DiffBIRPipeline` without tiles and join.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)

from milo_latent.checks import check_choice
from milo_latent.diffbir import sampling
from milo_latent.diffbir.cleaning import clean_image
from milo_latent.diffbir.color import COLOR_FIXES, fix_color
from milo_latent.diffbir.inputs import OUTPUT_TYPES, degraded_images, to_output
from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.rules import DEFAULT, SMALLEST_LATENTS, resize
from milo_latent.latents.codec import decode_latents, encode_image, vae_scale_factor

CLEANER, VAE = ComponentSpec("cleaner", ModelMixin), ComponentSpec("vae", AutoencoderKL)
UNET, CONTROLNET = ComponentSpec("unet", UNet2DConditionModel), ComponentSpec("controlnet", IRControlNet)
SCHEDULER = ComponentSpec("scheduler", DDPMScheduler)


class Block(ModularPipelineBlocks):
    """A block whose class attributes say what it takes and gives; the docstring's first line describes it."""

    COMPONENTS: tuple[ComponentSpec, ...] = ()
    INPUTS: tuple[InputParam, ...] = ()
    OUTPUTS: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """What the block is for."""
        return (type(self).__doc__ or "").partition("\n")[0]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Networks that the block runs."""
        return list(self.COMPONENTS)

    @property
    def inputs(self) -> list[InputParam]:
        """What the block reads."""
        return list(self.INPUTS)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the block leaves for the next ones."""
        return [OutputParam(name) for name in self.OUTPUTS]

    def run(self, components: Any, values: Any) -> None:
        """Read and write the `values`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `run`.")

    @torch.no_grad()
    def __call__(self, components: Any, state: Any, i: int | None = None, t: Any = None) -> tuple[Any, Any]:
        """Run on the pipeline's state, or in step `i` of a loop, at timestep `t`, on the loop's."""
        if i is not None:
            state.timestep = t
            self.run(components, state)
            return components, state
        values = self.get_block_state(state)
        self.run(components, values)
        self.set_block_state(state, values)
        return components, state


class CleanStep(Block):
    """Enlarges the degraded image and removes its degradation, stage 1."""

    COMPONENTS = (CLEANER, VAE)
    INPUTS = (InputParam("image", required=True), InputParam("upscale", default=1.0))
    OUTPUTS = ("cleaned", "output_size")

    def run(self, components: Any, values: Any) -> None:
        """Make `cleaned`, (B, 3, H', W') in [0, 1], and `output_size`, the height and width of the result."""
        image = degraded_images(values.image).to(components.vae.device)
        values.output_size = size = DEFAULT.scaled_size(image, values.upscale)
        if components.cleaner is None:
            values.cleaned = resize(image, size).clamp(0, 1)
        else:
            values.cleaned = clean_image(components.cleaner, image, output_size=size, rules=DEFAULT)


class EncodeStep(Block):
    """Encodes the cleaned image: the condition of IRControlNet, and what guides pull to."""

    COMPONENTS = (VAE, UNET)
    INPUTS = (InputParam("cleaned", required=True),)
    OUTPUTS = ("reference_latents",)

    def run(self, components: Any, values: Any) -> None:
        """Make `reference_latents`, (B, C, h, w) float32, of the padded image."""
        cell = vae_scale_factor(components.vae)
        multiple = cell * 2 ** (len(components.unet.config.block_out_channels) - 1)
        padded = DEFAULT.pad(values.cleaned, multiple, smallest=SMALLEST_LATENTS * cell)
        values.reference_latents = encode_image(components.vae, padded, warn=False).float()


class PrepareStep(Block):
    """Sets the timesteps and draws the noise."""

    COMPONENTS = (SCHEDULER,)
    INPUTS = (
        InputParam("reference_latents", required=True), InputParam("num_inference_steps", default=20),
        InputParam("generator"),
    )  # fmt: skip
    OUTPUTS = ("timesteps", "latents")

    def run(self, components: Any, values: Any) -> None:
        """Make `timesteps` and the first `latents`."""
        reference, scheduler = values.reference_latents, components.scheduler
        sampling.check_scheduler(scheduler, values.num_inference_steps)
        values.timesteps = sampling.set_timesteps(scheduler, values.num_inference_steps, reference.device)
        noise = sampling.draw_noise(tuple(reference.shape), generator=values.generator, device=reference.device)
        values.latents = noise * scheduler.init_noise_sigma


class DenoiserStep(Block):
    """Runs IRControlNet and UNet, with classifier-free guidance where there is a negative prompt."""

    COMPONENTS = (UNET, CONTROLNET, SCHEDULER)
    INPUTS = (
        InputParam("latents", required=True), InputParam("reference_latents", required=True),
        InputParam("prompt_embeds"), InputParam("negative_prompt_embeds"), InputParam("guidance_scale", default=1.0),
        InputParam("controlnet_conditioning_scale", default=1.0),
    )  # fmt: skip

    def run(self, components: Any, values: Any) -> None:
        """Make `noise_pred`, (B, C, h, w)."""
        sample = components.scheduler.scale_model_input(values.latents, values.timestep)
        guided = values.guidance_scale > 1
        values.noise_pred = sampling.controlled_output(
            components.unet, components.controlnet, sample, values.reference_latents, timestep=values.timestep,
            prompt_embeds=values.prompt_embeds,
            negative_prompt_embeds=values.negative_prompt_embeds if guided else None, scale=values.guidance_scale,
            conditioning_scale=values.controlnet_conditioning_scale, rescale=0.0,
        )  # fmt: skip


class SchedulerStep(Block):
    """Takes the scheduler's step."""

    COMPONENTS = (SCHEDULER,)
    INPUTS = (InputParam("generator"), InputParam("eta", default=0.0))
    OUTPUTS = ("latents",)

    def run(self, components: Any, values: Any) -> None:
        """Make the next `latents`."""
        arguments = sampling.step_arguments(components.scheduler, values.generator, values.eta)
        values.latents = components.scheduler.step(
            values.noise_pred, values.timestep, values.latents, **arguments, return_dict=False
        )[0]


class DenoiseStep(LoopSequentialPipelineBlocks):
    """The loop: `sub_blocks.insert("milo_guidance", MILOGuidanceStep(), 1)` guides it to the cleaned image."""

    block_classes = [DenoiserStep, SchedulerStep]  # noqa: RUF012 (diffusers reads plain lists)
    block_names = ["denoiser", "scheduler_step"]  # noqa: RUF012

    @property
    def description(self) -> str:
        """What the block is for."""
        return "Runs its blocks once for each timestep."

    @property
    def loop_inputs(self) -> list[InputParam]:
        """What the loop itself reads."""
        return [InputParam("timesteps", required=True)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Take all steps."""
        values = self.get_block_state(state)
        for index, timestep in enumerate(values.timesteps):
            components, values = self.loop_step(components, values, i=index, t=timestep)
        self.set_block_state(state, values)
        return components, state


class DecodeStep(Block):
    """Decodes the latents, and cuts the padding off."""

    COMPONENTS = (VAE,)
    INPUTS = (InputParam("latents", required=True), InputParam("cleaned", required=True))
    OUTPUTS = ("decoded",)

    def run(self, components: Any, values: Any) -> None:
        """Make `decoded`, (B, 3, H', W') in [0, 1]."""
        height, width = values.cleaned.shape[2:]
        values.decoded = decode_latents(components.vae, values.latents)[..., :height, :width]


class ColorStep(Block):
    """Gives the decoded image the colors of the cleaned one, and the size that was asked for."""

    INPUTS = (
        InputParam("decoded", required=True), InputParam("cleaned", required=True),
        InputParam("output_size", required=True), InputParam("color_fix", default="wavelet"),
        InputParam("output_type", default="pil"),
    )  # fmt: skip
    OUTPUTS = ("images",)

    def run(self, components: Any, values: Any) -> None:
        """Make `images` as `output_type` says: "pil", "np" or "pt"."""
        check_choice("color_fix", values.color_fix, COLOR_FIXES)
        check_choice("output_type", values.output_type, [name for name in OUTPUT_TYPES if name != "latent"])
        images = fix_color(values.decoded, values.cleaned, method=values.color_fix)
        values.images = to_output(resize(images, values.output_size).clamp(0, 1), values.output_type)


class DiffBIRBlocks(SequentialPipelineBlocks):
    """All stages, from a degraded `image` to restored `images`."""

    block_classes = [CleanStep, EncodeStep, PrepareStep, DenoiseStep, DecodeStep, ColorStep]  # noqa: RUF012
    block_names = ["clean", "encode", "prepare", "denoise", "decode", "color"]  # noqa: RUF012

    @property
    def description(self) -> str:
        """What the blocks are for."""
        return "Restores an image as DiffBIR does: clean, encode, denoise, decode, give the colors back."
