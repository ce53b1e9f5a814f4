"""How a metric is trained: the paper's recipe, and others from TOML files."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from milo_latent.training.engine.loop import Precision, RunConfig
from milo_latent.training.engine.optimizers import SOAP_BETAS, OptimizerName

ZERO_IS_FINE = ("warmup", "seed")


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's where it states them (supplement, section 1).

    Args:
        steps: iterations in all; the paper's cost is stated for 100,000.
        batch_size: pairs per iteration, over all processes.
        learning_rate: **own**, the supplement gives none.
        betas: of AdamW: its defaults; a file that asks for "soap" and names none gets those of its paper.
        weight_decay: of AdamW.
        schedule: "step", the paper's MultiStepLR, or "linear".
        step_size: iterations between two steps of the learning rate.
        step_factor: of the learning rate at each step; **own**.
        decay: of "linear": share of the run in which the learning rate falls to zero.
        warmup: iterations in which the learning rate rises; **own**.
        max_grad_norm: gradients are clipped to this norm; **own**.
        map_weight: weight of the loss of the error map, where the training set has maps; 0 as in the paper.
        mirror: flip and transpose pairs at random, which few images need; **own**, off as in the paper.
        validate_every: iterations between validations, each with a checkpoint; the paper: 100,000.
        precision: "no", "bf16" or "fp16".
        optimizer: "adamw", or "soap".
        seed: of the initial weights and the order of the pairs.
    """

    steps: int = 100_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-6
    schedule: Literal["linear", "step"] = "step"
    step_size: int = 1000
    step_factor: float = 0.96
    decay: float = 0.5
    warmup: int = 100
    max_grad_norm: float = 1.0
    map_weight: float = 0.0
    mirror: bool = False
    validate_every: int = 1000
    precision: Precision = "no"
    optimizer: OptimizerName = "adamw"
    seed: int = 0

    def run(self, output: Path, processes: int, data: dict[str, Any] | None = None) -> RunConfig:
        """Return the run of the loop, for each of `processes`; `data` settles it too, as of `RunConfig`."""
        if self.batch_size % processes:
            raise ValueError(f"Expected batch_size to be a multiple of {processes} processes, got {self.batch_size}.")
        return RunConfig(
            output=output,
            steps=self.steps,
            batch_size=self.batch_size // processes,
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            step_size=self.step_size,
            step_factor=self.step_factor,
            decay=self.decay,
            warmup=self.warmup,
            max_grad_norm=self.max_grad_norm,
            checkpoint_steps=self.validate_every,
            precision=self.precision,
            optimizer=self.optimizer,
            seed=self.seed,
            data=(data or {}) | {"map_weight": self.map_weight, "mirror": self.mirror},
        )


def read_recipe(path: str | Path | None) -> Recipe:
    """Read a recipe from TOML; what it leaves out is the paper's, None is all of the paper's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for names that are none of `Recipe`'s, values that are none of theirs, or no TOML.
    """
    if path is None:
        return Recipe()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a recipe, got {path}, which does not exist.")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"Expected TOML in {path}: {error}") from error
    known = {field.name for field in fields(Recipe)}
    if set(content) - known:
        raise ValueError(f"Expected only {sorted(known)} in {path}, got {sorted(set(content) - known)}.")
    for name, kind in get_type_hints(Recipe).items():
        if name in content:
            content[name] = _checked(content[name], kind, f"{name} in {path}")
    if content.get("optimizer") == "soap":
        content = {"betas": SOAP_BETAS} | content
    return Recipe(**content)


def _checked(value: Any, kind: Any, place: str) -> Any:
    """Return what TOML gave as a value of the type `kind`, or raise ValueError."""
    if get_origin(kind) is tuple:
        expected, right = "two numbers", isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
        value = tuple(value) if right else value
    elif get_origin(kind) is Literal:
        expected, right = f"one of {', '.join(map(repr, get_args(kind)))}", value in get_args(kind)
    elif kind is float:
        expected, right = "a number of 0 or more", _is_number(value) and value >= 0
    elif kind is int:
        least = 0 if place.startswith(ZERO_IS_FINE) else 1
        expected = f"a whole number of {least} or more"
        right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    else:
        expected, right = "true or false", isinstance(value, bool)
    if not right:
        raise ValueError(f"Expected {expected} as {place}, got {value!r}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
