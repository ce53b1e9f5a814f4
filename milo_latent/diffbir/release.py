"""Which DiffBIR a converted folder is: its version and the task that it was converted for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milo_latent.checks import check_choice
from milo_latent.diffbir.versions import Sampling, TaskName, Version, version_of

RELEASE_FILE = "diffbir.json"


@dataclass(frozen=True)
class Release:
    """An official DiffBIR, as converted.

    Args:
        version: its version.
        task: the task whose cleaner it has.
    """

    version: Version
    task: TaskName

    @property
    def sampling(self) -> Sampling:
        """Settings of the official README's own commands."""
        return self.version.recommended

    def check_task(self, task: TaskName) -> None:
        """Raise ValueError for a task that takes other checkpoints than this folder's."""
        if self.version.checkpoints(task) != self.version.checkpoints(self.task):
            raise ValueError(
                f"Expected the task {self.task!r}, for which this DiffBIR {self.version.name} was converted, got "
                f"{task!r}, which takes another cleaner. Convert a folder with --task {task}."
            )

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What `DiffBIRPipeline`'s call is given besides the image."""
        chosen = self.sampling
        return {
            "num_inference_steps": chosen.steps,
            "prompt": chosen.prompt,
            "negative_prompt": chosen.negative_prompt,
            "guidance_scale": chosen.cfg_scale,
            "rescale_cfg": chosen.rescale_cfg,
            "controlnet_conditioning_scale": chosen.strength,
            "start_point": chosen.start_point_type,
            "noise_aug": chosen.noise_aug,
        }


def release_text(version: Version, task: TaskName) -> str:
    """Return what `RELEASE_FILE` of a converted folder holds."""
    return json.dumps({"version": version.name, "task": task}, indent=2) + "\n"


def read_release(folder: str | Path) -> Release | None:
    """Read which DiffBIR a folder is.

    Args:
        folder: of a pipeline.

    Returns:
        The release; None for a folder that no official checkpoint was converted to.

    Raises:
        ValueError: if the folder's file names no version or task.
    """
    path = Path(folder) / RELEASE_FILE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text())
        version, task = version_of(told["version"]), told["task"]
        check_choice("task", task, version.tasks)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected DiffBIR's version and task in {path}: {error}") from error
    return Release(version, task)
