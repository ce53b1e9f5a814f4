"""Make the figures of docs/explanation and the animation of the README: `python docs/make_figures.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from milo_latent import (
    MILO,
    MILOGuidance,
    color_error_map,
    curriculum_weight,
    decode_latents,
    encode_image,
    load_restorer,
    read_image,
    restore_image,
    write_image,
)
from milo_latent.pictures import to_8bit

DOCS = Path(__file__).parent
OUTPUT = DOCS / "explanation"
EXAMPLE = DOCS.parent / "examples" / "cat_noisy.png"
STEPS, MILLISECONDS = 30, 500  # of the animation, which lasts 15 seconds
PANEL, GAP, LINE = (288, 432), 12, 26  # pixels: height and width of a panel, space between panels, height of text


def gray(values: Tensor) -> Tensor:
    """Return values in [0, 1], (1, 1, H, W), as an image."""
    return values.clamp(0, 1).expand(-1, 3, -1, -1)


def distort(image: Tensor) -> Tensor:
    """Add equal noise everywhere, and blur the right half."""
    half = image.shape[3] // 2
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (weights[:, None] * weights).div(256).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    mixed = torch.cat([image[..., :half], blurred[..., half:]], dim=3)
    return (mixed + 0.04 * torch.randn(image.shape, generator=torch.manual_seed(0))).clamp(0, 1)


def main() -> None:
    """Write milo_mask.jpg, curriculum.jpg and mask_over_steps.webp."""
    write_animation(DOCS / "mask_over_steps.webp")
    ref = restore_image(read_image(EXAMPLE), model=load_restorer("nano"))
    dist = distort(ref)
    result = MILO.from_pretrained("milo-image").compare(ref=ref, dist=dist)
    mask = gray(result.mask / result.mask.quantile(0.99))
    write_figure("milo_mask.jpg", [ref, dist, mask, color_error_map(result.error_map)])
    mask = latent_mask(ref, dist)
    weights = [curriculum_weight(mask, progress, schedule="cosine") for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    write_figure("curriculum.jpg", [F.interpolate(gray(weight / 2), scale_factor=8) for weight in weights])


def latent_mask(ref: Tensor, dist: Tensor) -> Tensor:
    """Return the mask of MILO_L between the latents of two images."""
    pipe = load_restorer("nano", device="cpu")
    return pipe.metric.mask(ref=encode_image(pipe.vae, ref), dist=encode_image(pipe.vae, dist))


class Watched(MILOGuidance):
    """Keeps the guided clean estimate of each step, (B, C, h, w), and the curriculum's weight, (B, 1, h, w)."""

    def guide_x0(self, x0: Tensor, *, progress: float, timestep: float) -> Tensor:
        """Return the guided x0."""
        self.estimates = self.estimates if progress else []
        self.weights = self.weights if progress else []
        self.estimates.append(super().guide_x0(x0, progress=progress, timestep=timestep))
        self.weights.append(curriculum_weight(4 * self.trace.steps[-1].mask, progress, schedule=self.schedule))
        return self.estimates[-1]


@torch.no_grad()
def write_animation(path: Path) -> None:
    """Guide diffusers' image-to-image pipeline from pure noise to the cleaned photo; show each step.

    The pipeline has the networks of `nano`, whose UNet knows nothing of the photo without its ControlNet: all that
    appears comes through guidance.
    """
    nano = load_restorer("nano", device="cpu")
    nano.unet.register_to_config(sample_size=64)  # the pipeline asks for it
    scheduler = DPMSolverMultistepScheduler.from_config(nano.scheduler.config, steps_offset=1)
    parts = {"vae": nano.vae, "unet": nano.unet, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    pipe = StableDiffusionImg2ImgPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    photo = read_image(EXAMPLE)[..., : PANEL[0], : PANEL[1]]
    guide = Watched(nano.metric, 0.5, "cosine", reference_latents=encode_image(nano.vae, nano.clean(photo)), trace=True)
    embeds = torch.zeros(1, 1, nano.unet.config.cross_attention_dim)
    with guide.attach(pipe):
        pipe(
            image=photo, strength=1.0, num_inference_steps=STEPS, guidance_scale=1.0, prompt_embeds=embeds,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    frames = []
    for step, estimate, weight in zip(guide.trace, guide.estimates, guide.weights, strict=True):
        panels = {
            "clean estimate": decode_latents(nano.vae, estimate).clamp(0, 1),
            "MILO's mask": color_error_map(step.mask, size=PANEL, largest=1.0, bar=False),
            "weight of the pull": color_error_map(weight, size=PANEL, largest=2.0, bar=False),
        }
        frames.append(draw_frame(panels, step.step + 1))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, quality=80, method=6)


def draw_frame(panels: dict[str, Tensor], step: int) -> Image.Image:
    """Return pictures, (1, 3, H, W) each, side by side with their names, and the step's number on a bar below."""
    width = len(panels) * (PANEL[1] + GAP) - GAP
    frame = Image.new("RGB", (width, PANEL[0] + 2 * LINE), "white")
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(18)
    for place, (name, panel) in enumerate(panels.items()):
        left = place * (PANEL[1] + GAP)
        draw.text((left, 0), name, fill="black", font=font)
        frame.paste(Image.fromarray(to_8bit(panel[0])), (left, LINE))
    top = PANEL[0] + LINE + 4
    draw.text((0, top), f"step {step} of {STEPS}", fill="black", font=font)
    left = PANEL[1] + GAP
    draw.rectangle((left, top + 8, width, top + 14), fill="lightgray")
    draw.rectangle((left, top + 8, left + (width - left) * step / STEPS, top + 14), fill="black")
    return frame


def write_figure(name: str, images: list[Tensor]) -> None:
    """Write images of equal height side by side, at most 1200 pixels wide."""
    row = torch.cat(images, dim=3)
    if row.shape[3] > 1200:
        row = F.interpolate(row, scale_factor=1200 / row.shape[3], mode="bilinear", antialias=True)
    write_image(OUTPUT / name, row)


if __name__ == "__main__":
    main()
