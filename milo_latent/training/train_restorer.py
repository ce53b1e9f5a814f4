"""Train or fine-tune a restorer: IRControlNet, the UNet too, or adapters, by the standard loss or weighted by MILO."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from milo_latent.latents.codec import encode_image
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.programs import run_program
from milo_latent.resources import find_weights
from milo_latent.restoration.restorer import load_restorer
from milo_latent.training.card import write_restorer_card
from milo_latent.training.data.degradations import DEGRADATIONS
from milo_latent.training.data.fingerprints import source_digest
from milo_latent.training.data.latent_cache import fill_cache
from milo_latent.training.data.photos import DatasetSource, FolderSource, PhotoSource, ShardSource
from milo_latent.training.data.restoration_pairs import BatchReader, RestorationPairs, noise_and_timestep
from milo_latent.training.denoising_loss import MASKS, OBJECTIVES, MaskWeight, denoising_loss
from milo_latent.training.engine.loop import add_run_options, fit, run_config, splits_weights, training_state
from milo_latent.training.engine.memory import memory_plan
from milo_latent.training.engine.run import RunConfig
from milo_latent.training.hub import open_repository, upload
from milo_latent.training.objectives import training_progress
from milo_latent.training.restorer_networks import TRAINED, DenoisingNetworks, reinitialize, training_scheduler
from milo_latent.training.validation import RestorationValidator


class RestorerLoss(nn.Module):
    """The denoising loss of pairs of images.

    Args:
        pipeline: with the frozen parts: cleaner, VAE and text encoder.
        networks: of that pipeline.
        weight: of latent pixels.
    """

    def __init__(self, pipeline: DiffBIRPipeline, networks: DenoisingNetworks, weight: MaskWeight) -> None:
        super().__init__()
        self.networks = networks
        self._pipeline = [pipeline]  # in a list, so that checkpoints do not hold its frozen parts
        self.weight, self.scheduler = weight, training_scheduler(pipeline.scheduler)
        self.cached = False  # whether batches hold latents in place of images

    @property
    def pipeline(self) -> DiffBIRPipeline:
        """The pipeline that is trained."""
        return self._pipeline[0]

    def frozen_networks(self) -> list[nn.Module]:
        """Return the pipeline's networks that are not trained."""
        own = {id(network) for network in self.networks.networks.values()}
        parts = self.pipeline.components.values()
        return [each for each in parts if isinstance(each, nn.Module) and id(each) not in own]

    @torch.no_grad()
    def encode(self, clean: Tensor, degraded: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return target and condition latents, (B, C, h, w) float32, and prompt embeddings, if the model takes prompts.

        Args:
            clean: (B, 3, H, W), in [0, 1]; its latents if `cached`.
            degraded: (B, 3, H, W), in [0, 1]; its latents, cleaned, if `cached`.
            captions: one for each image.
        """
        pipeline = self.pipeline
        if pipeline.vae.device != clean.device:
            pipeline.to(clean.device)
        latents, condition = clean, degraded
        if not self.cached:
            size = (degraded.shape[2], degraded.shape[3])
            cleaned = degraded if pipeline.cleaner is None else pipeline.clean(degraded, size)
            latents, condition = (encode_image(pipeline.vae, image, warn=False).float() for image in (clean, cleaned))
        prompts = captions if pipeline.takes_prompts else None
        prompt_embeds, _ = pipeline.encode_prompt(prompts, num_images=len(captions), guided=False)
        return latents, condition, prompt_embeds

    def forward(
        self,
        clean: Tensor,
        degraded: Tensor,
        captions: list[str],
        noise: Tensor,
        timestep: Tensor,
        condition_noise: Tensor,
        condition_timestep: Tensor,
        progress: float,
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            clean: as for `encode`.
            degraded: as for `encode`.
            captions: one for each image.
            noise: (B * n, C, h, w); each pair is used at n noise levels, since encoding it costs more than a step.
            timestep: (B * n,).
            condition_noise: (B, C, h, w), of the condition.
            condition_timestep: (B,), to which the condition is noised; -1 leaves it as it is.
            progress: share of the training that is done, in [0, 1].
        """
        latents, condition, prompt_embeds = self.encode(clean, degraded, captions)
        told = self.scheduler.add_noise(condition, condition_noise, condition_timestep.clamp(min=0))
        told = torch.where((condition_timestep < 0).view(-1, 1, 1, 1), condition, told)
        repeats = noise.shape[0] // clean.shape[0]
        latents, condition, told = (each.repeat(repeats, 1, 1, 1) for each in (latents, condition, told))
        if prompt_embeds is not None:
            prompt_embeds = prompt_embeds.repeat(repeats, 1, 1)
        return denoising_loss(
            lambda noisy, time: self.networks(noisy, time, told, prompt_embeds),
            self.scheduler,
            latents=latents,
            condition=condition,
            noise=noise,
            timestep=timestep,
            weight=self.weight,
            progress=progress,
        )


def batch_maker(
    options: argparse.Namespace, shape: tuple[int, ...], num_timesteps: int
) -> Callable[[list[dict[str, Any]]], tuple[Any, ...]]:
    """Return the function from samples to the arguments of `RestorerLoss`, without the last.

    Args:
        options: of the command: `noise_levels` and `noise_aug`.
        shape: of the latents of a crop, (C, h, w).
        num_timesteps: of the noise schedule.
    """

    def collate(samples: list[dict[str, Any]]) -> tuple[Any, ...]:
        seeds = [(each["draws"], level) for level in range(options.noise_levels) for each in samples]
        drawn = [noise_and_timestep(seed, shape, num_timesteps) for seed in seeds]
        # levels count from 0 on, so that this one is the condition's own
        seeds = [(each["draws"], options.noise_levels) for each in samples]
        condition = [noise_and_timestep(seed, shape, max(options.noise_aug, 1)) for seed in seeds]
        return (
            torch.stack([each["clean"] for each in samples]),
            torch.stack([each["degraded"] for each in samples]),
            [each["caption"] for each in samples],
            torch.stack([noise for noise, _ in drawn]),
            torch.tensor([timestep for _, timestep in drawn]),
            torch.stack([noise for noise, _ in condition]),
            torch.tensor([timestep if options.noise_aug else -1 for _, timestep in condition]),
        )

    return collate


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    options = argparse.ArgumentParser(prog="python -m milo_latent.training.train_restorer", description=__doc__)
    add_run_options(options, images=False, crop_size=None, steps=1000, batch_size=4, learning_rate=1e-4)
    options.add_argument("--model", default="nano", help="pipeline that training starts from: a name, folder or hub id")
    options.add_argument("--train", choices=TRAINED, default="controlnet", help="what is trained (default: controlnet)")
    options.add_argument("--rank", type=int, default=16, help="of the adapters of --train lora")
    options.add_argument("--reinitialize", action="store_true", help="train UNet and IRControlNet from random weights")
    options.add_argument("--without-cleaner", action="store_true", help="condition on the degraded images themselves")
    data = options.add_argument_group("data", "one of --images, --dataset and --shards")
    data.add_argument("--images", nargs="+", type=Path, help="folders of clean photos")
    data.add_argument("--degraded", type=Path, help="folder of degraded files of the same names (default: degrade)")
    data.add_argument("--captions", type=Path, help="CSV file with the columns file_name and text")
    data.add_argument("--dataset", help="Hugging Face data set: a folder or an id")
    data.add_argument("--image-column", default="image")
    data.add_argument("--degraded-column")
    data.add_argument("--caption-column")
    data.add_argument("--shards", nargs="+", type=Path, help="webdataset tar files: NAME.png, NAME.lq.png, NAME.txt")
    data.add_argument("--degradation", choices=sorted(DEGRADATIONS), default="mixed")
    data.add_argument("--caption-dropout", type=float, default=0.5, help="share of empty captions (official: 0.5)")
    data.add_argument(
        "--cache-latents",
        type=int,
        default=0,
        metavar="N",
        help="encode N epochs of crops once, into OUTPUT/latents, and use them over and over (default: encode always)",
    )
    data.add_argument("--workers", type=int, default=0, help="processes that read and degrade ahead")
    loss = options.add_argument_group("loss")
    loss.add_argument("--objective", choices=OBJECTIVES, default="standard", help="how MILO's mask weighs the loss")
    loss.add_argument("--metric", help="MILO_L for the latents (default: the pipeline's)")
    loss.add_argument("--mask-of", choices=MASKS, default="prediction")
    loss.add_argument("--mask-timesteps", type=int, nargs=2, default=(0, 999), metavar=("LOW", "HIGH"))
    loss.add_argument("--noise-levels", type=int, default=1, help="noise levels at which each pair is used")
    loss.add_argument("--noise-aug", type=int, default=0, help="condition is noised to a timestep below this")
    loss.add_argument("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    loss.add_argument("--decay", type=float, default=0.4, help="share of the steps in which it falls to zero")
    run = options.add_argument_group("run")
    run.add_argument("--gradient-checkpointing", action="store_true", help="less memory for activations, more time")
    run.add_argument("--validation", type=Path, help="folder of clean photos to restore every so often")
    run.add_argument("--validation-images", type=int, default=4)
    run.add_argument("--push-to-hub", metavar="ID", help="upload the trained pipeline to this repository")
    return options


def open_source(options: argparse.Namespace) -> PhotoSource:
    """Return the photos that the command's options name.

    Raises:
        ValueError: unless exactly one of `images`, `dataset` and `shards` is given.
    """
    given = [name for name in ("images", "dataset", "shards") if getattr(options, name)]
    if len(given) != 1:
        raise ValueError(f"Expected one of --images, --dataset and --shards, got {', '.join(given) or 'none'}.")
    if options.shards:
        return ShardSource(options.shards)
    if options.dataset:
        return DatasetSource(
            options.dataset,
            image_column=options.image_column,
            degraded_column=options.degraded_column,
            caption_column=options.caption_column,
        )
    return FolderSource(options.images, degraded=options.degraded, captions=options.captions)


def make_loss(options: argparse.Namespace) -> RestorerLoss:
    """Open the pipeline and return the loss of its networks."""
    torch.manual_seed(options.seed)
    pipeline = load_restorer(options.model, device="cpu")
    if options.without_cleaner:
        pipeline.register_modules(cleaner=None)
    if options.reinitialize:
        reinitialize(pipeline)
    networks = DenoisingNetworks(pipeline, options.train, rank=options.rank)
    if options.gradient_checkpointing:
        for name in ("unet", "controlnet"):
            networks.network(name).enable_gradient_checkpointing()
    metric = pipeline.metric if options.metric is None else MILO.from_pretrained(options.metric)
    weight = MaskWeight(options.objective, metric, options.mask_of, tuple(options.mask_timesteps))
    return RestorerLoss(pipeline, networks, weight)


def make_reader(options: argparse.Namespace, loss: RestorerLoss, source: PhotoSource) -> BatchReader:
    """Return what draws the batches of a run."""
    pipeline, side = loss.pipeline, options.crop_size
    multiple = pipeline._size_multiple()
    if side % multiple:
        raise ValueError(f"Expected a crop size that is a multiple of {multiple} for this pipeline, got {side}.")
    cells = side // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, cells, cells)
    pairs = RestorationPairs(
        source,
        crop_size=side,
        degradation=DEGRADATIONS[options.degradation],
        seed=options.seed,
        caption_dropout=options.caption_dropout,
    )
    return BatchReader(
        pairs,
        batch_size=options.batch_size,
        processes=training_state().num_processes,
        workers=options.workers,
        collate=batch_maker(options, shape, loss.scheduler.config.num_train_timesteps),
    )


def _settings(options: argparse.Namespace, source: PhotoSource) -> dict[str, Any]:
    """Return what defines the run besides the options that every command has."""
    names = [
        *("train", "rank", "reinitialize", "without_cleaner", "degradation", "caption_dropout", "objective", "mask_of"),
        *("mask_timesteps", "noise_levels", "noise_aug", "cache_latents"),
    ]
    settings = {name: getattr(options, name) for name in names}
    parts = {name: source_digest(find_weights(options.model) / name) for name in ("vae", "cleaner")}
    return settings | parts | {"model": source_digest(options.model), "photos": len(source)}


def cache_latents(options: argparse.Namespace, loss: RestorerLoss, reader: BatchReader, config: RunConfig) -> None:
    """Encode the epochs that `--cache-latents` asks for, and let `reader` and `loss` go on with their latents."""
    state = training_state()

    def encode(clean: Tensor, degraded: Tensor, captions: list[str]) -> tuple[Any, ...]:
        return loss.encode(clean.to(state.device), degraded.to(state.device), captions)

    names = ("crop_size", "images", "photos", "degradation", "caption_dropout", "without_cleaner", "vae", "cleaner")
    settings = {name: config.data.get(name) for name in (*names, "cache_latents")}
    reader.pairs = fill_cache(
        reader,
        encode,
        options.output / "latents",
        epochs=options.cache_latents,
        settings=settings | {"seed": config.seed, "batch_size": config.batch_size},
        process_index=state.process_index,
    )
    state.wait_for_everyone()  # each process has encoded a share
    loss.cached = True


def main(arguments: list[str] | None = None) -> None:
    """Train, validate, save a pipeline."""
    options = parser().parse_args(arguments)
    options.crop_size = options.crop_size or (128 if options.model == "nano" else 512)
    source = open_source(options)
    if options.push_to_hub and training_state().is_main_process:
        open_repository(options.push_to_hub)
    loss = make_loss(options)
    reader = make_reader(options, loss, source)
    config = run_config(options, data=_settings(options, source), decay=options.decay, warmup=options.warmup)

    def draw(step: int, process_index: int) -> tuple[Any, ...]:
        progress = training_progress(step // config.accumulation, config.steps)
        return *reader(step, process_index), progress

    if options.cache_latents:
        cache_latents(options, loss, reader, config)
    if training_state().is_main_process and not splits_weights():
        batch = send_to_device(draw(0, 0), training_state().device)
        print(memory_plan(loss.to(training_state().device), batch, config, frozen=tuple(loss.frozen_networks())))
    validate = None
    if options.validation is not None:
        validate = RestorationValidator(
            options.validation,
            count=options.validation_images,
            degradation=DEGRADATIONS[options.degradation],
            pipeline=loss.pipeline,
            output=options.output,
        )
    loss = fit(loss, draw, config, validate=validate, reopen=lambda: make_loss(options))
    if not training_state().is_main_process:
        return
    loss.networks.save(loss.pipeline.to("cpu"), options.output)
    folder = write_restorer_card(options, config, validate.figures if validate else {})
    print(f"Saved {folder}. Restore with it: milo-latent restore PHOTO --model {folder} --stage all")
    if options.push_to_hub:
        upload(options.push_to_hub, folder)


if __name__ == "__main__":
    sys.exit(run_program(main))
