"""How a metric is trained: the paper's recipe, and others from TOML files."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from milo_latent.checks import check_file, shortened
from milo_latent.structure import refusing_damage
from milo_latent.training.engine.loop import SOAP_BETAS
from milo_latent.training.engine.run import Precision, RunConfig

ZERO_IS_FINE = ("warmup", "seed")
NOT_IN_FILES = {"output", "data", "checkpoint_minutes", "trackers"}  # the command settles these


@dataclass(frozen=True)
class Recipe(RunConfig):
    """How to train a metric; the defaults are the paper's where the supplement (section 1) states them.

    The learning rate (the highest one), `step_factor`, `warmup` and `max_grad_norm` are **own**.

    Args:
        steps: number of optimizer steps; the paper states its cost for 100,000.
        batch_size: pairs per step, over all processes.
        betas: of AdamW's defaults; a file that asks for "soap" without betas gets those of SOAP's paper.
        checkpoint_steps: steps between validations, each with a checkpoint; 100,000 in the paper.
        map_weight: weight of the loss of the error map, which needs a training set with maps; 0 as in the paper.
        mirror: whether to flip and transpose pairs at random, for want of pairs; **own**, off as in the paper.
    """

    output: Path = Path()
    steps: int = 100_000
    decay: float = 0.5
    weight_decay: float = 1e-6
    precision: Precision = "no"
    checkpoint_steps: int | None = 1000
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["linear", "step"] = "step"
    step_factor: float = 0.96
    map_weight: float = 0.0
    mirror: bool = False

    def start(self, output: Path, processes: int, data: dict[str, Any]) -> Recipe:
        """Return the settings of the run for each of `processes`; `data` as in `RunConfig`.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        if self.batch_size % processes:
            raise ValueError(f"Expected batch_size to be a multiple of {processes} processes, got {self.batch_size}.")
        return replace(self, output=output, batch_size=self.batch_size // processes, data=data)


def read_recipe(path: str | Path | None) -> Recipe:
    """Read a recipe from TOML; fields that it leaves out, or all for None, are the paper's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not TOML, names a field that `Recipe` does not have, or gives a field a wrong value.
    """
    if path is None:
        return Recipe()
    path = Path(path)
    check_file(path, "a recipe")
    with refusing_damage(f"Expected TOML in {path}"):
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {field.name for field in fields(Recipe)} - NOT_IN_FILES
    if set(content) - known:
        raise ValueError(f"Expected only {sorted(known)} in {path}, got {shortened(sorted(set(content) - known))}.")
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
    elif kind in (int, int | None):
        least = 0 if place.startswith(ZERO_IS_FINE) else 1
        expected = f"a whole number of {least} or more"
        right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    else:
        expected, right = "true or false", isinstance(value, bool)
    if not right:
        raise ValueError(f"Expected {expected} as {place}, got {shortened(repr(value))}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
