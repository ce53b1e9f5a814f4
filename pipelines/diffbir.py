"""DiffBIR as a diffusers pipeline: cleaner, VAE encoder, IRControlNet and UNet, VAE decoder, colour fix."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from milo_latent.codec import decode_latents, encode_image, pad_image, vae_scale_factor
from milo_latent.diffbir.colour import COLOR_FIXES, ColorFix, fix_colour
from milo_latent.diffbir.inputs import enlarge, images_to_tensor
from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.diffbir.residual_cleaner import ResidualCleaner  # noqa: F401 (saved pipelines name its module)
from milo_latent.guidance.callback import find_guidance

HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SMALLEST_LATENTS = 16  # cells a side: the metric's four levels need them


class DiffBIRPipeline(DiffusionPipeline):
    """Restore images: a cleaner removes the degradation, latent diffusion then restores what was lost with it.

    Args:
        vae: turns images into latents and back.
        text_encoder: CLIP text model, for models that take prompts; None for those that do not.
        tokenizer: its tokenizer.
        unet: denoises latents.
        controlnet: tells the UNet the latents of the cleaned image.
        scheduler: any of diffusers'.
        cleaner: stage 1, any model from images (B, 3, H, W) in [0, 1] to images; None where inputs are clean already.

    Source: DiffBIR (Lin et al., ECCV 2024) and its official code, diffbir/pipeline.py.
    """

    model_cpu_offload_seq = "cleaner->text_encoder->controlnet->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "cleaner"]  # noqa: RUF012 (diffusers reads plain lists)
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        controlnet: IRControlNet,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        cleaner: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            cleaner=cleaner,
        )
        self.vae_scale_factor = vae_scale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> DiffBIRPipeline:
        """Open a saved pipeline.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id, whose files are fetched first: diffusers would refuse
                the hub's folders of classes that are not its own.
            **kwargs: as of `DiffusionPipeline.from_pretrained`; `revision`, `cache_dir`, `token` and `local_files_only`
                choose what is fetched.

        Returns:
            The pipeline.

        Raises:
            FileNotFoundError: if there is no such folder, nor such a repository on the hub or in its cache.
        """
        source = Path(pretrained_model_name_or_path)
        if not source.is_dir():
            choices = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
            try:
                source = Path(snapshot_download(str(pretrained_model_name_or_path), **choices))
            except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
                raise FileNotFoundError(
                    f"Expected a pipeline folder or a hub id, got {str(pretrained_model_name_or_path)!r}, which is no "
                    f"folder here and could not be fetched ({type(error).__name__}). Pass a folder downloaded by hand."
                ) from error
        return super().from_pretrained(source, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance in the current call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call predicts with and without the prompt."""
        return self._guidance_scale > 1 and self.text_encoder_dim is not None

    @property
    def text_encoder_dim(self) -> int | None:
        """Width of the prompt embeddings that the UNet attends to; None if it takes no prompt."""
        attends = any("CrossAttn" in name for name in self.unet.config.down_block_types)
        return self.unet.config.cross_attention_dim if attends else None

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
        image: Any,
        output_type: str,
        color_fix: str,
        upscale: float,
        num_inference_steps: int,
        guidance_scale: float,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Refuse arguments that cannot work.

        Args:
            image: as in `__call__`.
            output_type: as in `__call__`.
            color_fix: as in `__call__`.
            upscale: as in `__call__`.
            num_inference_steps: as in `__call__`.
            guidance_scale: as in `__call__`.
            callback_on_step_end_tensor_inputs: as in `__call__`.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if guidance_scale > 1 and self.text_encoder_dim is None:
            raise ValueError(
                f"Expected `guidance_scale` of 1, since this model takes no prompt, got {guidance_scale}. "
                "MILO guidance is `callback_on_step_end=MILOGuidance(...)`."
            )
        if image is None:
            raise ValueError(
                "Expected `image`, got None. DiffBIR restores an image; it does not make one from a prompt."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"Expected `output_type` to be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if color_fix not in COLOR_FIXES:
            raise ValueError(f"Expected `color_fix` to be one of {COLOR_FIXES}, got {color_fix!r}.")
        if not upscale > 0:
            raise ValueError(f"Expected `upscale` above 0, got {upscale}.")
        if num_inference_steps < 1:
            raise ValueError(f"Expected `num_inference_steps` of at least 1, got {num_inference_steps}.")
        known, unknown = self._callback_tensor_inputs, set(callback_on_step_end_tensor_inputs or [])
        unknown -= set(known)
        if unknown:
            raise ValueError(f"Expected `callback_on_step_end_tensor_inputs` among {known}, got {sorted(unknown)}.")

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        *,
        num_images: int = 1,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode prompts once for all steps.

        Args:
            prompt: one for all images, or a list, one for each; None means the empty prompt.
            negative_prompt: likewise.
            num_images: the number of images.
            num_images_per_prompt: the number of results for each of them.
            guided: whether classifier-free guidance is on; without it the negative prompt is not encoded.
            prompt_embeds: (num_images or 1, tokens, width), instead of `prompt`.
            negative_prompt_embeds: likewise.

        Returns:
            Embeddings of prompt and negative prompt, (num_images * num_images_per_prompt, tokens, width) each; None for
            what is not needed.

        Raises:
            ValueError: for a prompt where the model takes none, or a list of the wrong length.
        """
        if self.text_encoder_dim is None:
            if prompt or negative_prompt or prompt_embeds is not None:
                raise ValueError("Expected no prompt, since this model takes none, got one. Leave it out.")
            return None, None

        def repeated(text: str | list[str] | None, embeds: Tensor | None) -> Tensor:
            embeds = self._encode_text(text) if embeds is None else embeds
            if embeds.shape[0] not in (1, num_images):
                raise ValueError(f"Expected 1 or {num_images} prompts, one for each image, got {embeds.shape[0]}.")
            each = embeds if embeds.shape[0] == num_images else embeds.expand(num_images, -1, -1)
            return each.repeat_interleave(num_images_per_prompt, dim=0)

        negative = repeated(negative_prompt, negative_prompt_embeds) if guided else None
        return repeated(prompt, prompt_embeds), negative

    def _encode_text(self, text: str | list[str] | None) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline has no text encoder. Pass `prompt_embeds` and `negative_prompt_embeds`.")
        texts = [text or ""] if not isinstance(text, list) else text
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        embeds = self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
        return embeds.to(self.unet.dtype)  # (1 or B, tokens, width)

    def clean(self, image: Tensor) -> Tensor:
        """Run stage 1, the cleaner, alone.

        Args:
            image: (B, 3, H, W), in [0, 1].

        Returns:
            Cleaned image, (B, 3, H, W) float32, clipped to [0, 1]; the image itself without a cleaner.
        """
        if self.cleaner is None:
            return image
        with torch.no_grad():
            return self.cleaner(image.to(self.cleaner.dtype)).float().clamp(0, 1)

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Draw the noise that sampling starts from, or scale the given one.

        Args:
            shape: (B, C, h, w).
            dtype: of the result.
            device: of the result.
            generator: one for the batch, or one for each image.
            latents: instead of drawn noise, unscaled.

        Returns:
            Noise, (B, C, h, w), scaled by the scheduler's `init_noise_sigma`.

        Raises:
            ValueError: if `latents` have another shape.
        """
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"Expected `latents` of shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    # The loop

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
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
    ) -> ImagePipelineOutput | tuple:
        """Restore one image or a batch of images of one size.

        Args:
            prompt: what the photo shows, for models with a text encoder.
            image: degraded image or images of any size: PIL, numpy (B, H, W, 3) or tensors (B, 3, H, W), in [0, 1].
            negative_prompt: what the result should not be.
            upscale: factor by which the image is enlarged (bicubic) before it is cleaned.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance; 1 switches it off.
            controlnet_conditioning_scale: how strictly the result follows the cleaned image.
            color_fix: "wavelet", "adain" or "none": the colours of the cleaned image are put back after decoding.
            num_images_per_prompt: how many results for each image.
            eta: of DDIM.
            generator: one for the batch, or one for each result; fixes the output.
            latents: noise to start from, (B, C, h, w), instead of drawn noise.
            prompt_embeds: instead of `prompt`, (B, tokens, width).
            negative_prompt_embeds: instead of `negative_prompt`.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), or "latent": scaled latents of the padded image.
            return_dict: whether to return a dataclass or a tuple.
            callback_on_step_end: a function or diffusers callback; `MILOGuidance` guides every step from inside.
            callback_on_step_end_tensor_inputs: names of tensors given to the callback.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: for arguments that cannot work, and if the result is not finite.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self.check_inputs(image, output_type, color_fix, upscale, num_inference_steps, guidance_scale, tensor_inputs)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device

        # 1. Stage 1: clean the image, then encode it: the latents that condition the UNet, and that guidance pulls to
        degraded = enlarge(images_to_tensor(image).to(device), upscale)
        cleaned = self.clean(degraded)  # (B, 3, H, W)
        padded = pad_image(cleaned, self._size_multiple(), smallest=SMALLEST_LATENTS * self.vae_scale_factor)
        condition = encode_image(self.vae, padded).to(self.unet.dtype)
        condition = condition.repeat_interleave(num_images_per_prompt, dim=0)  # (B, C, h, w)
        batch_size = condition.shape[0]

        # 2. Prompts, noise, timesteps
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            num_images=cleaned.shape[0],
            num_images_per_prompt=num_images_per_prompt,
            guided=self.do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(tuple(condition.shape), self.unet.dtype, device, generator, latents)
        step_arguments = self._step_arguments(generator, eta)

        # 3. Stage 2: denoise
        with ExitStack() as stack, self.progress_bar(total=self._num_timesteps) as progress_bar:
            guides = [
                stack.enter_context(guide.run(condition, self._num_timesteps))
                for guide in find_guidance(callback_on_step_end)
            ]
            for step_index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                model_output = self._predict(
                    latents, timestep, condition, prompt_embeds, negative_prompt_embeds, controlnet_conditioning_scale
                )
                for guide in guides:
                    model_output = guide.guided_model_output(self.scheduler, model_output, timestep, latents)
                latents = self.scheduler.step(model_output, timestep, latents, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    tensors = {name: tensors[name] for name in tensor_inputs}
                    returned = callback_on_step_end(self, step_index, timestep, tensors)
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = returned.pop("negative_prompt_embeds", negative_prompt_embeds)
                progress_bar.update()

        # 4. Decode, give the colours back, cut the padding off
        if not torch.isfinite(latents).all():
            raise ValueError(f"The latents are not finite in {self.unet.dtype}. Use torch.bfloat16 or torch.float32.")
        if output_type == "latent":
            images = latents
        else:
            decoded = decode_latents(self.vae, latents)[..., : cleaned.shape[2], : cleaned.shape[3]]
            colour = cleaned.repeat_interleave(num_images_per_prompt, dim=0)
            images = fix_colour(decoded, colour, method=color_fix).clamp(0, 1)
            images = self.image_processor.postprocess(
                images, output_type=output_type, do_denormalize=[False] * batch_size
            )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        condition: Tensor,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        conditioning_scale: float,
    ) -> Tensor:
        """Return the model output of one step, after classifier-free guidance, (B, C, h, w)."""
        sample = self.scheduler.scale_model_input(latents, timestep)
        embeds = prompt_embeds
        if self.do_classifier_free_guidance:
            sample, condition = torch.cat([sample, sample]), torch.cat([condition, condition])
            embeds = torch.cat([negative_prompt_embeds, prompt_embeds])  # type: ignore[list-item]
        down_residuals, mid_residual = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states=embeds,
            controlnet_cond=condition,
            conditioning_scale=conditioning_scale,
            return_dict=False,
        )
        output = self.unet(
            sample,
            timestep,
            encoder_hidden_states=embeds,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
            return_dict=False,
        )[0]
        if not self.do_classifier_free_guidance:
            return output
        without, with_prompt = output.chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    def _size_multiple(self) -> int:
        """Pixels of which both sides must be multiples for every level of VAE and UNet to halve evenly."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def _step_arguments(self, generator: Any, eta: float) -> dict[str, Any]:
        """Return those of `generator` and `eta` that the scheduler's step takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in taken}
