"""How a metric is trained: the paper's recipe, and others from TOML files."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from milo_latent.training.engine.optimizers import SOAP_BETAS, OptimizerName
from milo_latent.training.engine.run import Precision, RunConfig

ZERO_IS_FINE = ("warmup", "seed")


@dataclass(frozen=True)
class Recipe:
    """How to train a metric; the defaults are the paper's where the supplement (section 1) states them.

    Fields that are not listed here mean what they mean in `RunConfig`.

    Args:
        steps: number of optimizer steps; the paper states its cost for 100,000.
        batch_size: pairs per step, over all processes.
        learning_rate: highest learning rate; **own**, as are `step_factor`, `warmup` and `max_grad_norm`.
        betas: of AdamW's defaults; a file that asks for "soap" without betas gets those of SOAP's paper.
        map_weight: weight of the loss of the error map, which needs a training set with maps; 0 as in the paper.
        mirror: whether to flip and transpose pairs at random, which helps if there are few; **own**, off as in the
            paper.
        validate_every: steps between validations, each with a checkpoint; 100,000 in the paper.
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
        """Return the settings of the run for each of `processes`; `data` as in `RunConfig`.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        if self.batch_size % processes:
            raise ValueError(f"Expected batch_size to be a multiple of {processes} processes, got {self.batch_size}.")
        settings = asdict(self) | {"batch_size": self.batch_size // processes}
        own = {name: settings.pop(name) for name in ("map_weight", "mirror")}
        every = settings.pop("validate_every")
        return RunConfig(output=output, checkpoint_steps=every, data=(data or {}) | own, **settings)


def read_recipe(path: str | Path | None) -> Recipe:
    """Read a recipe from TOML; fields that it leaves out, or all for None, are the paper's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not TOML, names a field that `Recipe` does not have, or gives a field a wrong value.
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
