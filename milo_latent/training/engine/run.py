"""A training run in its folder: where it stands, its logs and trackers, its checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.atomic import saving_weights, write_text
from milo_latent.checks import shortened
from milo_latent.resources import sha256
from milo_latent.structure import read_json, refusing_damage
from milo_latent.training.engine.records import append_row, check_record, drop_rows_after, read_log, write_record

LOG, VALIDATION = "log", "validation"  # names of the tables and, in trackers, of the groups of figures
LOG_EVERY = 50  # steps, over which the logged loss is a mean
PARTIAL = "checkpoint.partial"
LOSS_FILE = "loop.json"  # in a checkpoint
Precision = Literal["no", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adamw-8bit", "soap"]


def default_precision() -> Precision:
    """Return "bf16", but "no" on a CPU without AVX-512, which takes some nine times as long in bfloat16."""
    fast = torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16" if fast else "no"


@dataclass(frozen=True)
class RunConfig:
    """Settings of a training run.

    Args:
        output: folder of checkpoints and logs.
        steps: number of optimizer steps.
        batch_size: items per step and process.
        learning_rate: highest learning rate, reached after `warmup` steps.
        decay: for the schedule "linear": share of the steps, at the end, in which the learning rate falls to zero.
        warmup: steps in which the learning rate rises.
        weight_decay: decoupled weight decay.
        max_grad_norm: norm to which gradients are clipped.
        seed: seed of every random draw.
        precision: of the forward pass.
        checkpoint_minutes: time between checkpoints.
        checkpoint_steps: steps between checkpoints, replaces the time; validations then come at the same steps too.
        checkpoint_limit: number of checkpoints that are kept.
        accumulation: batches whose gradients are averaged in each step.
        betas: decay of the optimizer's two moments.
        schedule: "linear" rises, holds and falls; "step" multiplies the learning rate at regular intervals.
        step_size: for "step": steps between the multiplications.
        step_factor: for "step": factor of each multiplication.
        optimizer: "adamw"; "adamw-8bit", of bitsandbytes, whose moments have 8 bits; or "soap", which fits one network
            to another in far fewer steps.
        ema_decay: decay of the moving average of the weights, which is validated and returned; None: no average.
        trackers: accelerate's trackers, such as "tensorboard" and "wandb"; None takes TensorBoard if it is installed.
        data: what else defines the run, such as fingerprints of its data; a resumed run must have the same.
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
    checkpoint_limit: int = 1
    accumulation: int = 1
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Literal["linear", "step"] = "linear"
    step_size: int = 1000
    step_factor: float = 1.0
    optimizer: OptimizerName = "adamw"
    ema_decay: float | None = None
    trackers: tuple[str, ...] | None = None
    data: dict[str, Any] = field(default_factory=dict)


def start_accelerator(config: RunConfig) -> Accelerator:
    """Return the accelerator of a run, with its precision and trackers.

    Raises:
        ValueError: if a tracker is unknown or not installed.
    """
    installed = [str(each) for each in get_available_trackers()]
    trackers = [each for each in ("tensorboard",) if each in installed] if config.trackers is None else config.trackers
    missing = sorted(set(trackers) - set(installed))
    if missing:
        raise ValueError(f"Expected trackers that are installed ({installed}), got {missing}. Install them with pip.")
    project = ProjectConfiguration(str(config.output), logging_dir=str(config.output / "logs"))
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else config.precision,
        gradient_accumulation_steps=config.accumulation,
        log_with=list(trackers) or None,
        project_config=project,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of gradients
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config.update(deepspeed_settings(config))
    return accelerator


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """Return what DeepSpeed must be told of a run: it clips gradients and casts the forward pass itself."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(config.precision)
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_clipping": config.max_grad_norm,
        "torch_autocast": {"enabled": True, "dtype": dtype} if dtype else {"enabled": False},
    }


class Run:
    """The state of a run beside networks and optimizer; every process has one.

    Args:
        accelerator: of the run.
        config: of the run.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.loss_since_log = torch.zeros((), device=accelerator.device)
        self.figures: dict[str, float] = {}  # of the last validation
        self._wait_for_checkpoint()

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and open the logs; return the first step to run.

        Raises:
            ValueError: if the folder holds a run with other settings, or one that has done more steps, or if the
                checkpoint is damaged.
        """
        output, settings = self.config.output, asdict(self.config) | {"output": str(self.config.output)}
        output.mkdir(parents=True, exist_ok=True)
        checkpoints, step = sorted(path for path in output.glob("checkpoint-*") if path.name[11:].isdigit()), 0
        if checkpoints:
            step = int(checkpoints[-1].name.removeprefix("checkpoint-"))
            check_record(output, settings, done=step)
            with refusing_damage(f"Expected a complete checkpoint in {checkpoints[-1]}"):
                record = read_json(checkpoints[-1] / LOSS_FILE)
                _check_files(checkpoints[-1], record["files"])
                self.accelerator.load_state(str(checkpoints[-1]))
                self.loss_since_log += float(record["loss_since_log"])
        if self.accelerator.is_main_process:
            shutil.rmtree(output / PARTIAL, ignore_errors=True)  # of a run that was killed
            for name in (LOG, VALIDATION):
                drop_rows_after(output / f"{name}.csv", step)
            write_record(output, settings, done=step)
        # TensorBoard hides what was written after the checkpoint
        self.accelerator.init_trackers(output.name, init_kwargs={"tensorboard": {"purge_step": step + 1}})
        rows = read_log(output / f"{LOG}.csv")
        self._began = time.monotonic() - 60 * (rows[-1]["minutes"] if rows else 0.0)
        silent = not self.accelerator.is_main_process
        self._progress = tqdm(total=self.config.steps, initial=step, desc=output.name, disable=silent, mininterval=5)
        return step

    def record_loss(self, done: int, loss: Tensor) -> None:
        """Add the loss of a step to the mean that is logged every `LOG_EVERY` steps."""
        self._progress.update()
        self.loss_since_log += loss.float()
        if done % LOG_EVERY == 0:
            mean = self._mean_over_processes(self.loss_since_log) / LOG_EVERY
            self.loss_since_log.zero_()
            minutes = round((time.monotonic() - self._began) / 60, 2)
            self._log(LOG, done, {"loss": round(mean, 6), "minutes": minutes})
            self._progress.set_postfix({"step": done, "loss": mean} | self.figures)

    def record_validation(self, done: int, figures: dict[str, float]) -> None:
        """Log the figures of a validation; called by the main process."""
        self.figures = figures
        self._log(VALIDATION, done, figures)

    def _log(self, name: str, done: int, figures: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            append_row(self.config.output / f"{name}.csv", {"step": done} | figures)
            self.accelerator.log({f"{name}/{key}": value for key, value in figures.items()}, step=done)

    def is_checkpoint_due(self, done: int) -> bool:
        """Return whether to validate and save after `done` steps, the same in all processes."""
        if self.config.checkpoint_steps is not None:
            return done % self.config.checkpoint_steps == 0 or done == self.config.steps
        late = torch.tensor(float(time.monotonic() > self._due), device=self.accelerator.device)  # clocks differ
        return self._mean_over_processes(late) > 0 or done == self.config.steps

    def save_checkpoint(self, done: int) -> None:
        """Save beside the last checkpoint, then replace it, so that a complete one remains whenever a run is killed."""
        self.accelerator.wait_for_everyone()
        partial = self.config.output / PARTIAL
        with saving_weights(partial):
            self.accelerator.save_state(str(partial), safe_serialization=True)
        loss = self._mean_over_processes(self.loss_since_log)
        if self.accelerator.is_main_process:
            files = {path.name: sha256(path) for path in partial.iterdir() if path.is_file() and path.name != LOSS_FILE}
            write_text(partial / LOSS_FILE, json.dumps({"loss_since_log": loss, "files": files}))
            final = self.config.output / f"checkpoint-{done:08d}"
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(self.config.output.glob("checkpoint-*"))[: -self.config.checkpoint_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self._wait_for_checkpoint()

    def _wait_for_checkpoint(self) -> None:
        self._due = time.monotonic() + 60 * self.config.checkpoint_minutes

    def check_finite(self, value: Tensor, what: str, step: int) -> None:
        """Stop all processes together if one of them has NaN or infinity, before it changes anything.

        Raises:
            FloatingPointError: if `value` is not finite in some process.
        """
        bad = (~torch.isfinite(value)).any().float().to(self.accelerator.device)
        if self._mean_over_processes(bad) > 0:
            raise FloatingPointError(
                f"The {what} is not finite at step {step}. The last checkpoint is good. "
                "Resume with a lower learning rate."
            )

    def _mean_over_processes(self, value: Tensor) -> float:
        if self.accelerator.num_processes > 1:
            value = self.accelerator.reduce(value, reduction="mean")
        return value.item()

    def close(self) -> None:
        """Close the trackers and wait for the other processes.

        `Accelerator.end_training` would also leave the group of processes, which the caller may still use.
        """
        self._progress.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    """Raise ValueError unless the files of a checkpoint have their SHA-256; accelerate loads what it can of others."""
    for name, digest in digests.items():
        if Path(name).name != name or sha256(folder / name) != digest:
            raise ValueError(f"the SHA-256 of {shortened(name)} is not that of the file that was saved.")
