"""The training loop that all training commands share: accelerate, checkpoints, exact resume."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, send_to_device
from torch import nn

from milo_latent.extras import import_extra
from milo_latent.training.data.crops import list_images
from milo_latent.training.data.fingerprints import files_digest, source_digest
from milo_latent.training.engine.average import WeightAverage
from milo_latent.training.engine.run import (
    OptimizerName,
    Precision,
    Run,
    RunConfig,
    default_precision,
    start_accelerator,
)

Trained = TypeVar("Trained", bound=nn.Module)
SOAP_BETAS = (0.95, 0.95)  # as in its paper
NETWORKS = ("teacher", "vae", "metric", "cleaner")  # options that name frozen networks


def add_run_options(
    parser: argparse.ArgumentParser,
    *,
    images: bool = True,
    steps: int = 10_000,
    batch_size: int = 16,
    crop_size: int | None = 96,
    learning_rate: float = 1e-3,
    optimizer: OptimizerName = "adamw",
) -> None:
    """Add the options that every training command has, with these defaults; `images` adds folders of images."""
    if images:
        parser.add_argument("--images", nargs="+", required=True, help="folders of clean training images")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained model")
    parser.add_argument("--steps", "--max-train-steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="items per process and batch")
    parser.add_argument("--accumulation", type=int, default=1, help="batches whose gradients are averaged in a step")
    parser.add_argument("--crop-size", type=int, default=crop_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default=optimizer)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision", choices=get_args(Precision), default=default_precision(), help="default: bf16 where it is fast"
    )
    parser.add_argument("--ema-decay", type=float, help="of a moving average of the weights, such as 0.999")
    parser.add_argument("--checkpoint-steps", type=int, help="steps between checkpoints (default: by the clock)")
    parser.add_argument("--checkpoint-limit", type=int, default=1, help="number of checkpoints that are kept")
    parser.add_argument("--trackers", nargs="*", help="accelerate's, such as tensorboard wandb (default: tensorboard)")


def run_config(options: argparse.Namespace, *, data: dict[str, Any] | None = None, **recipe: Any) -> RunConfig:
    """Return the run that a command's options describe.

    Args:
        options: from a parser with `add_run_options`.
        data: what else defines the run besides images, crop size and frozen networks, which are added here by their
            fingerprints: folders may move, their contents must stay.
        recipe: other fields of `RunConfig` that the command settles.
    """
    found: dict[str, Any] = {"crop_size": options.crop_size}
    if options.images:
        found["images"] = files_digest(list_images(options.images))
    found |= {name: source_digest(vars(options)[name]) for name in NETWORKS if vars(options).get(name) is not None}
    shared = ("accumulation", "ema_decay", "checkpoint_steps", "checkpoint_limit")
    recipe = {name: getattr(options, name) for name in shared} | recipe
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
        trackers=None if options.trackers is None else tuple(options.trackers),
        data=found | (data or {}),
        **recipe,
    )


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def build_optimizer(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a run: AdamW, or SOAP, which is Adam in the eigenbasis of Shampoo's preconditioner.

    Raises:
        ImportError: if the library of the optimizer is not installed: bitsandbytes or pytorch-optimizer.
        ValueError: for another name.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if config.optimizer == "adamw-8bit":
        bitsandbytes = import_extra("bitsandbytes.optim", "bitsandbytes", "8-bit AdamW")
        return bitsandbytes.AdamW8bit(parameters, **settings)
    if config.optimizer != "soap":
        raise ValueError(f"Expected the optimizer to be one of {get_args(OptimizerName)}, got {config.optimizer!r}.")
    return import_extra("pytorch_optimizer", "train", "SOAP").SOAP(parameters, **settings)


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """Return the share of `config.learning_rate` used at `step`: rise, hold, fall linearly to zero.

    Holding until the last `decay` of the run means that a run that is stopped early and resumed with fewer `steps`
    equals the shorter run, as long as the learning rate had not begun to fall.
    """
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "step":
        return rise * config.step_factor ** (step // config.step_size)
    fall = (config.steps - step) / max(config.decay * config.steps, 1.0)
    return min(rise, fall, 1.0)


def training_state() -> PartialState:
    """Join the processes that `torchrun` or `accelerate launch` started, and return the state of this one.

    Without an accelerator they are joined over gloo, which accelerate does only if it is told to run on CPUs.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerated)


def splits_weights() -> bool:
    """Return whether `accelerate launch` was asked for FSDP or DeepSpeed, which split weights among the processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def check_can_split(config: RunConfig, *, validated: bool, reopened: bool) -> None:
    """Refuse what needs whole weights in one process, if they are split."""
    refused = {
        "this command": not reopened,
        "--validation": validated,
        "--ema-decay": config.ema_decay is not None,
        f"--optimizer {config.optimizer}": config.optimizer != "adamw",
    }
    found = [name for name, given in refused.items() if given]
    if splits_weights() and found:
        raise ValueError(
            f"Expected no {' and no '.join(found)} with FSDP or DeepSpeed, which split the weights among processes. "
            "Launch it with recipes/accelerate/ddp.yaml."
        )


def whole_module(accelerator: Accelerator, prepared: nn.Module, reopen: Callable[[], Trained]) -> Trained:
    """Return, in the main process, a new module with the weights that all processes together hold."""
    state = accelerator.get_state_dict(prepared)
    if not accelerator.is_main_process:
        return accelerator.unwrap_model(prepared)
    module = reopen()
    module.load_state_dict(state)
    return module


def fit(
    module: Trained,
    draw: Callable[[int, int], tuple[Any, ...]],
    config: RunConfig,
    *,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    reopen: Callable[[], Trained] | None = None,
) -> Trained:
    """Train `module`, whose forward pass returns the loss of a batch, or resume its training.

    Args:
        module: `module(*batch)` is a scalar loss; only parameters that require a gradient are trained.
        draw: `draw(number, process_index)` is a batch; it must depend on nothing else. Batches are numbered from 0;
            `config.accumulation` of them make a step.
        config: settings of the run.
        validate: called with `module` at every checkpoint, by the main process; the figures that it returns are logged.
        reopen: makes `module` anew, with any weights; without it FSDP and DeepSpeed are refused.

    Returns:
        The trained module, on its training device. FSDP and DeepSpeed split its weights; they are gathered in the
        module that the main process reopens, on the CPU.

    Raises:
        FloatingPointError: if the loss or the gradient is not finite; the last checkpoint stays.
        ValueError: if the folder holds a run with other settings, or one that has done more steps, or for settings
            that FSDP and DeepSpeed cannot serve.
    """
    check_can_split(config, validated=validate is not None, reopened=reopen is not None)
    training_state()
    accelerator = start_accelerator(config)
    prepared, optimizer = accelerator.prepare(module, build_optimizer(trained_parameters(module), config))
    parameters = trained_parameters(prepared)  # FSDP replaces them
    average = WeightAverage(accelerator, parameters, config.ema_decay)
    run = Run(accelerator, config)
    start = run.resume()
    average.to(accelerator.device)
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        total = torch.zeros((), device=accelerator.device)
        for number in range(step * config.accumulation, (step + 1) * config.accumulation):
            batch = send_to_device(draw(number, accelerator.process_index), accelerator.device)
            with accelerator.accumulate(prepared):
                with accelerator.autocast():
                    loss = prepared(*batch)
                run.check_finite(loss.detach(), "loss", step)
                total += loss.detach() / config.accumulation
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    if config.precision != "fp16" and norm is not None:  # the scaler of fp16 skips such steps itself
                        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
                        run.check_finite(norm, "gradient", step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        average.update()
        done = step + 1
        run.record_loss(done, total)
        if run.is_checkpoint_due(done):
            if validate is not None and accelerator.is_main_process:
                with average.swapped_in():
                    run.record_validation(done, validate(accelerator.unwrap_model(prepared)))
            run.save_checkpoint(done)
    run.close()
    average.swap_in()
    if reopen is not None and splits_weights():
        return whole_module(accelerator, prepared, reopen)
    return accelerator.unwrap_model(prepared)
