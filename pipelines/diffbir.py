"""DiffBIR as a diffusers pipeline: cleaner, VAE encoder, IRControlNet and UNet, VAE decoder, color fix, join."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from milo_latent.checks import check_choice, check_range
from milo_latent.diffbir import sampling, schedulers  # noqa: F401 (saved pipelines name their modules)
from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.cleaning import clean_image
from milo_latent.diffbir.color import COLOR_FIXES, ColorFix, fix_color
from milo_latent.diffbir.fidelity_join import FidelityJoin, join_images
from milo_latent.diffbir.inputs import OUTPUT_TYPES, degraded_images, explained_memory, to_output
from milo_latent.diffbir.ip_adapters import IPAdaptersMixin
from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.loading import FolderMixin
from milo_latent.diffbir.prompts import listed, repeat_image_prompts, repeat_prompts, scaled_lora
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.diffbir.rules import COMPATIBILITIES, RULES, SMALLEST_LATENTS, Compatibility, Rules, resize
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.stages import LAST_STAGES, LastStage, choose_stage
from milo_latent.diffbir.swinir import SwinIR
from milo_latent.diffbir.tiles import TilingMixin
from milo_latent.diffbir.versions import Release, version_of
from milo_latent.guidance.base import split_guides
from milo_latent.guidance.x0 import guide_model_output, guided_run
from milo_latent.inputs import Images
from milo_latent.latents.codec import decode_latents, encode_image, vae_scale_factor
from milo_latent.metric.network import MILO

MAX_UPSCALE = 64  # a photo of one megapixel becomes one of four thousand


class DiffBIRPipeline(FolderMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin, IPAdaptersMixin, TilingMixin):
    """Restore images: a cleaner removes the degradation, latent diffusion then restores what was lost with it.

    Args:
        vae: turns images into latents and back.
        text_encoder: CLIP text model, for models that take prompts; None for those that do not.
        tokenizer: its tokenizer.
        unet: denoises latents.
        controlnet: tells the UNet what the cleaned image shows, by its latents.
        scheduler: any of diffusers', or those of `milo_latent.diffbir.schedulers`.
        cleaner: stage 1, any model from images (B, 3, H, W) in [0, 1] to images; None where inputs are clean already.
        metric: MILO_L for the VAE's latents, for `callback_on_step_end=MILOGuidance(pipe.metric)`; it stays in float32.
        background_cleaner: stage 1 of what is around faces, where that is another cleaner than the faces'.
        join: joins the decoded image with the cleaned and the degraded one, as `fidelity` says; `train_join` makes it.
        default_stage: `stage` of calls that do not name one.
        release_version: the official version that this was converted from, such as "v2.1"; None for other models.
        release_task: the task whose cleaner was converted.

    Source: DiffBIR (Lin et al., ECCV 2024) and its official code, diffbir/pipeline.py.
    """

    # without the controlnet, which alternates with the UNet and would be moved at every step
    model_cpu_offload_seq = "cleaner->text_encoder->unet->vae->join"
    _exclude_from_cpu_offload = ["metric"]  # noqa: RUF012 (diffusers reads plain lists)
    _optional_components = ["text_encoder", "tokenizer", "cleaner", "metric", "background_cleaner", "join"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        controlnet: IRControlNet,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        cleaner: BSRNet | ResidualCleaner | SCUNet | SwinIR | ModelMixin | None = None,  # `from_pipe` asks for each
        metric: MILO | None = None,
        background_cleaner: BSRNet | ResidualCleaner | SCUNet | SwinIR | ModelMixin | None = None,
        join: FidelityJoin | None = None,
        default_stage: str = "all",  # diffusers reads annotations, and knows no Literal
        release_version: str | None = None,
        release_task: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, unet=unet, controlnet=controlnet, scheduler=scheduler, text_encoder=text_encoder,
            tokenizer=tokenizer, cleaner=cleaner, metric=metric, background_cleaner=background_cleaner,
            join=join,
        )  # fmt: skip
        check_choice("default_stage", default_stage, LAST_STAGES)
        self.register_to_config(default_stage=default_stage, release_version=release_version, release_task=release_task)
        _ = self.release  # refuses an unknown one
        self.vae_scale_factor = vae_scale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
        self._prompt_cache = None  # made at its first use
        if text_encoder is not None:  # then the pipeline needs it
            self._optional_components = ["cleaner", "metric", "background_cleaner", "join"]
        self._tiles = {}
        self._guidance_scale = 1.0

    @property
    def release(self) -> Release | None:
        """The official DiffBIR that this pipeline was converted from; None for other models.

        Raises:
            ValueError: for an unknown version or task.
        """
        version, task = self.config.release_version, self.config.release_task
        return None if version is None else Release(version_of(version), task)

    def for_background(self) -> DiffBIRPipeline:
        """Return a pipeline of the same networks with the cleaner for what is around faces; itself if it has none."""
        if self.background_cleaner is None:
            return self
        cleaners = {"cleaner": self.background_cleaner, "background_cleaner": None}
        background = DiffBIRPipeline(**{**self.components, **self.parameters, **cleaners})
        background.prompt_cache = self.prompt_cache  # with the prompts that need no text encoder
        background._tiles = self._tiles
        background.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return background

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast the networks as any pipeline does; the metric is moved only, and stays in float32."""
        metric, self.__dict__["metric"] = self.metric, None
        try:
            super().to(*args, **kwargs)
        finally:
            self.__dict__["metric"] = metric
        if metric is not None:
            metric.to(self.device)
        return self

    def enable_group_offload(self, *args: Any, exclude_modules: str | list[str] | None = None, **kwargs: Any) -> None:
        """Offload groups of layers as any pipeline does; the metric, which is small and no such network, is moved."""
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        super().enable_group_offload(*args, exclude_modules=[*excluded, *self._exclude_from_cpu_offload], **kwargs)

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance in the current call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call predicts with and without the prompt."""
        return self._guidance_scale > 1 and self.takes_prompts

    @property
    def takes_prompts(self) -> bool:
        """Whether the UNet attends to prompt embeddings."""
        return self.unet is None or any("CrossAttn" in name for name in self.unet.config.down_block_types)

    @property
    def num_timesteps(self) -> int:
        """Number of calls of the scheduler's step in the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` from a callback to stop the denoising."""
        return self._interrupt

    # Inputs

    def check_inputs(
        self,
        *,
        guidance_scale: float = 1.0,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        output_type: str = "pil",
        color_fix: str = "wavelet",
        start_point: str = "noise",
        compatibility: str | None = None,
        upscale: float = 1.0,
        num_inference_steps: int = 20,
        num_images_per_prompt: int = 1,
        noise_aug: int = 0,
        guidance_rescale: float = 0.0,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse arguments of `__call__` that cannot work; images and prompts are checked where they are read.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if guidance_scale > 1 and not self.takes_prompts:
            raise ValueError(
                f"Expected `guidance_scale` of 1, since this model takes no prompt, got {guidance_scale}. "
                "MILO guidance is `callback_on_step_end=MILOGuidance(...)`."
            )
        known = self._callback_tensor_inputs
        unknown = sorted(set(callback_on_step_end_tensor_inputs or ()) - set(known))
        if unknown:
            raise ValueError(f"Expected `callback_on_step_end_tensor_inputs` among {known}, got {unknown}.")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("color_fix", color_fix, COLOR_FIXES)
        check_choice("start_point", start_point, sampling.START_POINTS)
        check_choice("compatibility", compatibility or "official", COMPATIBILITIES)
        if not 0 < upscale <= MAX_UPSCALE:
            raise ValueError(f"Expected `upscale` above 0 and at most {MAX_UPSCALE}, got {upscale}.")
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, count in counts.items():
            if not isinstance(count, Integral) or count < 1:
                raise ValueError(f"Expected `{name}` to be a whole number of at least 1, got {count}.")
        total = self.scheduler.config.num_train_timesteps
        if not isinstance(noise_aug, Integral) or not 0 <= noise_aug < total:
            raise ValueError(f"Expected `noise_aug` to be a timestep, 0 to {total - 1}, got {noise_aug}.")
        check_range("guidance_rescale", guidance_rescale, 0.0, 1.0, "It is a share.")
        sampling.check_scheduler(self.scheduler, num_inference_steps)
        projections = getattr(self.unet, "encoder_hid_proj", None)
        adapters, given = len(getattr(projections, "image_projection_layers", ())), len(ip_adapter_image_embeds or ())
        if adapters != given:
            raise ValueError(
                f"Expected `ip_adapter_image_embeds` for each of {adapters} IP-adapters, got {given}. "
                "`load_ip_adapter` adds one, `unload_ip_adapter` removes all."
            )
        if "ip_adapter_masks" in (cross_attention_kwargs or {}) and "diffusion" in self._tiles:
            raise ValueError(
                "Expected no `ip_adapter_masks` with tiles, since each tile would see the whole mask. Call "
                "`disable_tiling()`, or leave the masks out."
            )

    def choose_stage(
        self, stage: LastStage | None = None, fidelity: float | None = None, *, sampling: Sequence[str] = ()
    ) -> tuple[LastStage, float]:
        """Return `stage` and `fidelity` with their defaults for this pipeline, as `stages.choose_stage` does."""
        default, has_join = self.config.default_stage, self.join is not None
        return choose_stage(stage, fidelity, default=default, has_join=has_join, sampling=sampling)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        *,
        num_images: int | None = None,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode prompts, each text once for all calls (`pipe.prompt_cache`).

        Args:
            prompt: one for all images, or a list, one for each; None means the empty prompt.
            negative_prompt: one for all images, or a list.
            num_images: the number of images; None means as many as prompts.
            num_images_per_prompt: the number of results for each of them.
            guided: whether classifier-free guidance is on; without it the negative prompt is not encoded.
            prompt_embeds: (num_images or 1, tokens, width), instead of `prompt`.
            negative_prompt_embeds: (num_images or 1, tokens, width), instead of `negative_prompt`.
            lora_scale: factor of the text encoder's LoRA; None leaves it as it is.

        Returns:
            Embeddings of prompt and negative prompt, (num_images * num_images_per_prompt, tokens, width) each; None for
            what is not needed.

        Raises:
            ValueError: for a prompt where the model takes none, or a list of the wrong length.
        """
        count, repeats = num_images, num_images_per_prompt
        if self.takes_prompts:
            encode = partial(self._encode_text, lora_scale=lora_scale)
            if guided and prompt_embeds is None and negative_prompt_embeds is None:
                encode([*listed(prompt), *listed(negative_prompt)])  # both at once, kept for below
            prompt_embeds = encode(prompt) if prompt_embeds is None else prompt_embeds
            count = count or prompt_embeds.shape[0]
            prompt_embeds = repeat_prompts(prompt_embeds, count, repeats)
            if guided:
                if negative_prompt_embeds is None:
                    negative_prompt_embeds = encode(negative_prompt)
                negative_prompt_embeds = repeat_prompts(negative_prompt_embeds, count, repeats)
        elif prompt or negative_prompt or prompt_embeds is not None or negative_prompt_embeds is not None:
            raise ValueError("Expected no prompt, since this model takes none, got one. Leave it out.")
        return prompt_embeds, negative_prompt_embeds  # the only return: diffusers' tests read the names off it

    def _encode_text(self, text: str | list[str] | None, *, lora_scale: float | None) -> Tensor:
        with scaled_lora(self.text_encoder, lora_scale):
            return self.prompt_cache.encode(listed(text), self.text_encoder, self.tokenizer, self._execution_device)

    @torch.no_grad()
    def clean(
        self, image: Tensor, output_size: tuple[int, int] | None = None, *, compatibility: Compatibility | None = None
    ) -> Tensor:
        """Run stage 1, the cleaner, alone.

        Args:
            image: (B, 3, H, W), in [0, 1].
            output_size: height and width of the restored image; None means the cleaner's own.
            compatibility: as in `__call__`.

        Returns:
            Cleaned image, (B, 3, H', W') float32: what stage 2 works on, at least 512 pixels a side for the official
            cleaners; the resized image itself without a cleaner.
        """
        if self.cleaner is None:
            return image if output_size is None else resize(image, output_size).clamp(0, 1)
        tile, rules = self._tiles.get("cleaner"), RULES[compatibility]
        return clean_image(self.cleaner, image, output_size=output_size, tile=tile, rules=rules)

    def prepare_latents(
        self,
        reference: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        *,
        start_point: sampling.StartPoint = "noise",
        compatibility: Compatibility | None = None,
    ) -> Tensor:
        """Return what sampling starts from; the scheduler's timesteps are set already.

        Args:
            reference: latents of the cleaned image, (B, C, h, w).
            generator: one for the batch, or one for each result.
            latents: unit normal noise, (B, C, h, w), instead of drawn noise.
            start_point: "noise", or "cond" for the noised reference, which differs by the little signal that the first
                timestep has left. It steadies deterministic samplers of v1 and v2.
            compatibility: as in `__call__`.

        Returns:
            Latents, (B, C, h, w) float32, times the scheduler's `init_noise_sigma`.

        Raises:
            ValueError: if `latents` have another shape, or there are not as many generators as results.
        """
        shape, device, scheduler = tuple(reference.shape), reference.device, self.scheduler
        if isinstance(generator, list) and len(generator) not in (1, shape[0]):
            raise ValueError(f"Expected one `generator`, or {shape[0]}, one for each result, got {len(generator)}.")
        if latents is None:
            latents = sampling.draw_noise(shape, generator=generator, device=device)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"Expected `latents` of shape {shape}, got {tuple(latents.shape)}.")
        latents = latents.to(device=device, dtype=torch.float32)
        if start_point == "cond":
            total = scheduler.config.num_train_timesteps
            timestep = RULES[compatibility].start_timestep(scheduler.timesteps, total)
            latents = sampling.add_noise(reference, latents, scheduler, timestep)
        return latents * scheduler.init_noise_sigma

    # The loop

    @torch.no_grad()
    @explained_memory()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Images | None = None,
        negative_prompt: str | list[str] | None = None,
        upscale: float = 1.0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        controlnet_conditioning_scale: float = 1.0,
        color_fix: ColorFix = "wavelet",
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance_rescale: float = 0.0,
        rescale_cfg: bool = False,
        start_point: sampling.StartPoint = "noise",
        noise_aug: int = 0,
        compatibility: Compatibility | None = None,
        stage: LastStage | None = None,
        fidelity: float | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Restore one image or a batch of images of one size.

        Args:
            prompt: what the photo shows, for models with a text encoder.
            image: degraded image or images of any size: PIL, paths, numpy ([B, ]H, W, 3) or tensors ([B, ]3, H, W), in
                [0, 1] where they are floating point.
            negative_prompt: what the result should not be.
            upscale: factor by which the image is enlarged (bicubic) before it is cleaned.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance; 1 switches it off.
            controlnet_conditioning_scale: how strictly the result follows the cleaned image.
            color_fix: "wavelet", "adain" or "none": how the decoded image takes its colors from the cleaned one.
            num_images_per_prompt: number of results for each image.
            eta: share of the noise that DDIM draws, in [0, 1].
            generator: one for the batch, or one for each result; fixes the output.
            latents: noise to start from, (B, C, h, w), instead of drawn noise.
            prompt_embeds: instead of `prompt`, (B, tokens, width).
            negative_prompt_embeds: instead of `negative_prompt`.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), or "latent": scaled latents of the padded image.
            return_dict: whether to return a dataclass or a tuple.
            callback_on_step_end: a function, a callback of diffusers, a guide, which acts inside every step, or several
                as a list or `MultiPipelineCallbacks`.
            callback_on_step_end_tensor_inputs: names of tensors given to the callback.
            guidance_rescale: share of the standard deviation added by classifier-free guidance that is removed, in
                [0, 1].
            rescale_cfg: whether `guidance_scale` grows, from 1 in the first step to its value in the last.
            start_point: "noise", or "cond": the noised latents of the cleaned image; steadies v1 and v2 models.
            noise_aug: timestep to which the condition is noised; more lets the result depart further from it.
            compatibility: "official" computes as DiffBIR's own code does, where this package has other rules
                (`milo_latent.diffbir.rules`).
            stage: "cleaner" ends after the first stage, "join" joins its result with the degraded image, and "all"
                samples as well. The default is "all" where an argument is given that acts on sampling alone, such as a
                prompt or a guide, and the pipeline's `default_stage` otherwise.
            fidelity: share of the way from the decoded image, after the color fix, to the one that the join makes of
                it, in [0, 1]: 0 leaves the join out, and 1, the default with a join, keeps all that is known.
            ip_adapter_image_embeds: after `load_ip_adapter`, the embeddings of what each adapter shows the UNet,
                (images, pictures, ..., width); with classifier-free guidance the negative ones first, in the same
                tensor.
            cross_attention_kwargs: for the UNet's attention, as in diffusers' pipelines: `scale` of a LoRA,
                `ip_adapter_masks`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: for arguments that cannot work, and if the result is not finite.
            MemoryError: if the image is too large for the device; `enable_tiling` helps.
        """
        sampling_arguments = {
            "prompt": prompt, "negative_prompt": negative_prompt, "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds, "latents": latents,
            "callback_on_step_end": callback_on_step_end, "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "cross_attention_kwargs": cross_attention_kwargs,
            "output_type 'latent'": output_type == "latent" or None,
        }  # fmt: skip
        stage, fidelity = self.choose_stage(
            stage, fidelity, sampling=[name for name, value in sampling_arguments.items() if value is not None]
        )
        guides, callback_on_step_end = split_guides(callback_on_step_end, self)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            guidance_scale=guidance_scale, callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            output_type=output_type, color_fix=color_fix, start_point=start_point, compatibility=compatibility,
            upscale=upscale, num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt,
            noise_aug=noise_aug, guidance_rescale=guidance_rescale, ip_adapter_image_embeds=ip_adapter_image_embeds,
            cross_attention_kwargs=cross_attention_kwargs,
        )  # fmt: skip
        rules = RULES[compatibility]
        self._guidance_scale, self._interrupt = guidance_scale, False

        # 1. Prepare: clean and encode the image, encode the prompts, draw the noise
        image = degraded_images(image).to(self._execution_device)  # one name, so that the degraded image is let go
        size, degraded = rules.scaled_size(image, upscale), image if fidelity else None
        image = self.clean(image, size, compatibility=compatibility)  # (B, 3, H, W)
        join = partial(self._join, degraded=degraded, fidelity=fidelity, rules=rules)
        if stage != "all":
            images = join(image, cleaned=image).repeat_interleave(num_images_per_prompt, dim=0)
            return self._returned(images, size, output_type, rules, return_dict=return_dict)

        reference, cells = self._encode(image, guides, rules)
        reference = reference.repeat_interleave(num_images_per_prompt, dim=0)  # (B, C, h, w)
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, negative_prompt, num_images=image.shape[0], num_images_per_prompt=num_images_per_prompt,
            guided=self.do_classifier_free_guidance, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )  # fmt: skip
        self._num_timesteps = len(sampling.set_timesteps(self.scheduler, num_inference_steps, reference.device))
        latents = self.prepare_latents(
            reference, generator, latents, start_point=start_point, compatibility=compatibility
        )
        condition = sampling.augment(reference, self.scheduler, noise_aug, generator)

        # 2. Denoise
        tile, multiple, cell = self._tiles.get("diffusion"), self._size_multiple(), self.vae_scale_factor
        tiles = rules.tiles(tile, condition.shape[2:], multiple=multiple, cell=cell)
        networks = partial(
            sampling.controlled_output, self.unet, self.controlnet, condition=condition, tiles=tiles,
            conditioning_scale=controlnet_conditioning_scale, rescale=guidance_rescale,
            attention=cross_attention_kwargs,
            image_embeds=None if ip_adapter_image_embeds is None else repeat_image_prompts(
                ip_adapter_image_embeds, image.shape[0], num_images_per_prompt, guided=self.do_classifier_free_guidance
            ),
        )  # fmt: skip
        with guided_run(guides, reference, self._num_timesteps):
            latents = self._denoise(
                {"latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
                networks,
                guides,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs or ["latents"],
                growth=rules if rescale_cfg else None,
                step_arguments=sampling.step_arguments(self.scheduler, generator, eta),
            )

        # 3. Decode, cut the padding off, give the colors back, join with what was known
        latents = latents[..., : cells[0], : cells[1]]
        if not torch.isfinite(latents).all():
            raise ValueError(f"The latents are not finite in {self.unet.dtype}. Use torch.bfloat16 or torch.float32.")
        if output_type == "latent":
            return self._returned(latents, size, output_type, rules, return_dict=return_dict)
        if num_images_per_prompt > 1:
            image = image.repeat_interleave(num_images_per_prompt, dim=0)
        images = join(self._decode(latents, image, color_fix=color_fix, rules=rules), cleaned=image)
        return self._returned(images, size, output_type, rules, return_dict=return_dict)

    def _encode(self, image: Tensor, guides: Sequence[Any], rules: Rules) -> tuple[Tensor, tuple[int, ...]]:
        """Return the latents of the padded image, (B, C, h, w), and the height and width of what is decoded at last.

        The latents tell the networks what the image shows, and guides pull towards them; guides may see the image, too.
        """
        cell, multiple = self.vae_scale_factor, self._size_multiple()
        unpadded = not rules.pads_tiles and {"encoder", "diffusion"} & self._tiles.keys()
        padded = rules.pad(image, cell if unpadded else multiple, smallest=SMALLEST_LATENTS * cell)
        reference = encode_image(self.vae, padded, tile=self._tile_size("encoder"), warn=False).float()
        cells, tile = tuple(reference.shape[2:]), self._tiles.get("diffusion")
        if tile is None or not tile.fits(cells, cell):  # whole latents must be multiples, which they mostly are
            reference = rules.pad(reference, multiple // cell)
        rows, columns = (side * cell for side in reference.shape[2:])
        for guide in guides:
            if hasattr(guide, "accept_image"):
                guide.accept_image(F.pad(padded, (0, columns - padded.shape[3], 0, rows - padded.shape[2])))
        return reference, cells

    def _denoise(
        self,
        tensors: dict[str, Tensor | None],
        networks: Callable[..., Tensor],
        guides: Sequence[Any],
        callback: Callable[..., dict] | None,
        tensor_inputs: Sequence[str],
        *,
        growth: Rules | None,
        step_arguments: dict[str, Any],
    ) -> Tensor:
        """Take all steps, and return the latents; a callback may replace any of the `tensors` for the next steps."""
        scheduler, total = self.scheduler, self.scheduler.config.num_train_timesteps
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for step_index, timestep in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                latents, guided = tensors["latents"], self.do_classifier_free_guidance
                assert latents is not None
                scale = self._guidance_scale
                if growth is not None:
                    scale = sampling.guidance_scale_at(scale, float(timestep), total=total, rules=growth)
                model_output = networks(
                    scheduler.scale_model_input(latents, timestep),
                    timestep=timestep,
                    prompt_embeds=tensors["prompt_embeds"],
                    negative_prompt_embeds=tensors["negative_prompt_embeds"] if guided else None,
                    scale=scale,
                )
                progress = step_index / max(self._num_timesteps - 1, 1)
                model_output = guide_model_output(guides, scheduler, model_output, timestep, latents, progress=progress)
                step = scheduler.step(model_output, timestep, latents, **step_arguments, return_dict=False)
                tensors["latents"] = step[0]
                if callback is not None:
                    returned = callback(self, step_index, timestep, {name: tensors[name] for name in tensor_inputs})
                    tensors |= {name: returned.pop(name) for name in tensors if name in returned}
                progress_bar.update()
        return tensors["latents"]  # type: ignore[return-value]

    def _decode(self, latents: Tensor, cleaned: Tensor, *, color_fix: ColorFix, rules: Rules) -> Tensor:
        """Decode, cut the padding off and fix the colors."""
        if getattr(self, "final_offload_hook", None) is not None:  # make room for the decoder
            self.unet.to("cpu")
            self.controlnet.to("cpu")
        decoded = decode_latents(self.vae, latents, tile=self._tile_size("decoder"), clip=rules.clips)
        decoded = decoded[..., : cleaned.shape[2], : cleaned.shape[3]]
        return fix_color(decoded, cleaned, method=color_fix, tile=self._tiles.get("decoder"))

    def _join(
        self, decoded: Tensor, *, cleaned: Tensor, degraded: Tensor | None, fidelity: float, rules: Rules
    ) -> Tensor:
        """Join the decoded image with the cleaned one, of the same shape, and the degraded one, None for no join."""
        if degraded is None:
            return decoded
        degraded = resize(degraded, (cleaned.shape[2], cleaned.shape[3])).clamp(0, 1)
        degraded = degraded.repeat_interleave(cleaned.shape[0] // degraded.shape[0], dim=0)
        images = {"decoded": decoded, "cleaned": cleaned, "degraded": degraded}
        return join_images(self.join, **images, fidelity=fidelity, tile=self._tiles.get("decoder"), rules=rules)

    def _returned(
        self, images: Tensor, size: tuple[int, int], output_type: str, rules: Rules, *, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        """Resize images to what was asked for and convert them; latents are returned as they are."""
        self.maybe_free_model_hooks()
        result: Any = images
        if output_type != "latent":
            result = to_output(rules.quantize(resize(images, size).clamp_(0, 1)), output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _size_multiple(self) -> int:
        """Pixels of which both sides must be multiples for every level of VAE and UNet to halve evenly."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
