"""The one training loop: accelerate, progress, checkpoints, exact resume."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from tqdm.auto import tqdm

from milo_latent.files import write_text
from milo_latent.training.data.crops import list_images
from milo_latent.training.data.fingerprints import files_digest, shards_digest, source_digest
from milo_latent.training.engine.optimizers import SOAP_BETAS, OptimizerName, build_optimizer
from milo_latent.training.engine.run_logs import RunLogs
from milo_latent.training.engine.run_record import check_record, write_record

NETWORKS = ("teacher", "vae", "metric", "cleaner")  # options that name frozen networks
LOG_EVERY = 50  # steps, over which the logged loss is a mean
LOSS_FILE = "loop.json"  # in a checkpoint
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class RunConfig:
    """What a training run is: where it writes, how long it lasts, how it steps.

    Args:
        output: folder of checkpoints and the log.
        steps: optimizer steps in all.
        batch_size: items per step and process.
        learning_rate: the highest learning rate, reached after `warmup` steps.
        decay: share of the steps, at the end, in which the learning rate falls to zero.
        warmup: steps in which the learning rate rises.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        seed: start of every random draw.
        precision: of the forward pass.
        checkpoint_minutes: time between checkpoints.
        checkpoint_steps: steps between checkpoints, in place of the time; then validation comes at the same steps too.
        betas: of AdamW.
        schedule: "linear" rises, holds and falls; "step" multiplies the learning rate every so often.
        step_size: steps between the multiplications.
        step_factor: what is multiplied by.
        optimizer: "adamw", or "soap", which fits one network to another in far fewer steps.
        data: what else settles the run, such as fingerprints of what it trains on; only kept and compared.
    """

    output: Path
    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    decay: float = 0.25
    warmup: int = 100
    weight_decay: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: Precision = "bf16"
    checkpoint_minutes: float = 4.0
    checkpoint_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Literal["linear", "step"] = "linear"
    step_size: int = 1000
    step_factor: float = 1.0
    optimizer: OptimizerName = "adamw"
    data: dict[str, Any] = field(default_factory=dict)


def add_run_options(
    parser: argparse.ArgumentParser,
    *,
    steps: int = 10_000,
    crop_size: int = 96,
    learning_rate: float = 1e-3,
    optimizer: OptimizerName = "adamw",
) -> None:
    """Add the options that every training command has.

    Args:
        parser: of the command.
        steps: default.
        crop_size: default, in pixels.
        learning_rate: default.
        optimizer: default.
    """
    parser.add_argument("--images", nargs="+", required=True, help="folders of clean training images")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained model")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop-size", type=int, default=crop_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default=optimizer)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")


def run_config(options: argparse.Namespace, **recipe: Any) -> RunConfig:
    """Return the run that `add_run_options` was told, with the rest of the command's recipe."""
    if options.optimizer == "soap":
        recipe = {"betas": SOAP_BETAS} | recipe
    return RunConfig(
        output=options.output,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        precision=options.precision,
        optimizer=options.optimizer,
        data=_data(options),
        **recipe,
    )


def _data(options: argparse.Namespace) -> dict[str, Any]:
    """Return fingerprints of what a command trains on: folders may move, their contents may not change."""
    found: dict[str, Any] = {"crop_size": options.crop_size, "images": files_digest(list_images(options.images))}
    found |= {name: source_digest(vars(options)[name]) for name in NETWORKS if vars(options).get(name) is not None}
    if "encoded" in vars(options):
        found["encoded"] = options.encoded and shards_digest(options.encoded[0])
    if "noise_levels" in vars(options):
        found["noise_levels"] = options.noise_levels
    return found


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """Return the share of `config.learning_rate` used at `step`: rise, hold, fall linearly to zero.

    Holding until the last `decay` of the run means that a run stopped early and resumed with fewer `steps` equals the
    shorter run, as long as it had not begun to fall.
    """
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "step":
        return rise * config.step_factor ** (step // config.step_size)
    fall = (config.steps - step) / max(config.decay * config.steps, 1.0)
    return min(rise, fall, 1.0)


def training_state() -> PartialState:
    """Join the processes that `torchrun` or `accelerate launch` started, and return this one's state.

    Without an accelerator they are joined over gloo, which accelerate does only where it is told that it runs on CPUs.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerated)


def fit(
    module: nn.Module,
    draw: Callable[[int, int], tuple[Tensor, ...]],
    config: RunConfig,
    *,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> nn.Module:
    """Train `module`, whose forward pass returns the loss of a batch.

    Args:
        module: `module(*batch)` is a scalar loss; only parameters that require a gradient are trained.
        draw: `draw(step, process_index)` is the batch; it must depend on nothing else.
        config: the run.
        validate: called at every checkpoint on the main process; its figures go to the progress bar.

    Returns:
        The trained module, on its training device.

    Raises:
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
        ValueError: if the folder holds a run with other settings, or one that has done more steps.
    """
    training_state()
    accelerator = Accelerator(mixed_precision=config.precision)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(
        config.optimizer, parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    prepared, optimizer = accelerator.prepare(module, optimizer)
    logs = RunLogs(config.output, active=accelerator.is_main_process)
    start, total = _resume(accelerator, config, logs)
    if accelerator.is_main_process:
        write_record(config.output, _settings(config), done=start)
    progress = tqdm(
        total=config.steps,
        initial=start,
        desc=config.output.name,
        disable=not accelerator.is_main_process,
        mininterval=5,
    )
    due = time.monotonic() + 60 * config.checkpoint_minutes
    began = time.monotonic() - 60 * logs.minutes
    figures: dict[str, float] = {}
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        batch = tuple(tensor.to(accelerator.device) for tensor in draw(step, accelerator.process_index))
        with accelerator.autocast():
            loss = prepared(*batch)
        _check_finite(accelerator, loss.detach(), "loss", step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        if config.precision != "fp16" and norm is not None:  # whose scaler skips such steps itself
            _check_finite(accelerator, torch.as_tensor(norm), "gradient", step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update()
        total += loss.detach().float()
        if (step + 1) % LOG_EVERY == 0:
            mean = _mean_over_processes(accelerator, total) / LOG_EVERY
            total.zero_()
            minutes = round((time.monotonic() - began) / 60, 2)
            logs.write("log.csv", {"step": step + 1, "loss": round(mean, 6), "minutes": minutes})
            progress.set_postfix({"step": step + 1, "loss": mean} | figures)
        if _is_due(accelerator, config, step + 1, due):
            if validate is not None and accelerator.is_main_process:
                figures = validate(accelerator.unwrap_model(prepared))
                logs.write("validation.csv", {"step": step + 1} | figures)
            _checkpoint(accelerator, config, step + 1, total)
            due = time.monotonic() + 60 * config.checkpoint_minutes
    progress.close()
    logs.close()
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(prepared)


def _is_due(accelerator: Accelerator, config: RunConfig, done: int, due: float) -> bool:
    if config.checkpoint_steps is not None:
        return done % config.checkpoint_steps == 0 or done == config.steps
    late = torch.tensor(float(time.monotonic() > due), device=accelerator.device)  # clocks of processes differ
    return _mean_over_processes(accelerator, late) > 0 or done == config.steps


def _mean_over_processes(accelerator: Accelerator, value: Tensor) -> float:
    return value.item() if accelerator.num_processes == 1 else accelerator.reduce(value, reduction="mean").item()


def _check_finite(accelerator: Accelerator, value: Tensor, what: str, step: int) -> None:
    """Stop all processes together if one of them meets NaN or infinity, before anything is changed."""
    bad = (~torch.isfinite(value)).any().float()
    if accelerator.num_processes > 1:
        bad = accelerator.reduce(bad.to(accelerator.device), reduction="sum")
    if bad.item():
        raise FloatingPointError(
            f"The {what} is not finite at step {step}. The last checkpoint is good. Resume with a lower learning rate."
        )


def _settings(config: RunConfig) -> dict[str, Any]:
    return asdict(config) | {"output": str(config.output)}


def _checkpoint(accelerator: Accelerator, config: RunConfig, step: int, total: Tensor) -> None:
    """Save beside the last checkpoint, then take its place, so that a kill at any point leaves one whole."""
    accelerator.wait_for_everyone()
    partial = config.output / "checkpoint.partial"
    accelerator.save_state(str(partial), safe_serialization=True)
    loss = _mean_over_processes(accelerator, total)
    if accelerator.is_main_process:
        write_text(partial / LOSS_FILE, json.dumps({"loss_since_log": loss}))
        final = config.output / f"checkpoint-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(config.output.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, config: RunConfig, logs: RunLogs) -> tuple[int, Tensor]:
    """Return the first step to run and the loss summed since the last line of the log."""
    config.output.mkdir(parents=True, exist_ok=True)
    checkpoints = sorted(config.output.glob("checkpoint-*"))
    total = torch.zeros((), device=accelerator.device)
    if not checkpoints:
        logs.keep_until(0)
        return 0, total
    step = int(checkpoints[-1].name.removeprefix("checkpoint-"))
    check_record(config.output, _settings(config), done=step)
    accelerator.load_state(str(checkpoints[-1]))
    logs.keep_until(step)
    record = checkpoints[-1] / LOSS_FILE
    if record.is_file():
        total += json.loads(record.read_text())["loss_since_log"]
    return step, total
