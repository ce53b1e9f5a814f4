"""Settings of a restoration: every option, its default, and a check of all of them before the first photo is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milo_latent.checks import check_choice
from milo_latent.diffbir.color import ColorFix
from milo_latent.diffbir.rules import Compatibility
from milo_latent.diffbir.sampling import StartPoint
from milo_latent.diffbir.stages import LastStage
from milo_latent.diffbir.versions import UPSCALE, TaskName
from milo_latent.guidance.base import split_guides
from milo_latent.guidance.curriculum import Schedule
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.faces import Detector

# an official DiffBIR has its own steps and options, those of its README's commands
DEFAULTS: Mapping[str, Any] = {
    "milo_scale": 0.5, "schedule": "cosine", "guidance_scale": 1.0, "rescale_cfg": False,
    "guidance_rescale": 0.0, "controlnet_conditioning_scale": 1.0, "start_point": "noise", "noise_aug": 0,
    "color_fix": "wavelet", "eta": 0.0,
}  # fmt: skip
STEPS, GUIDED_STEPS = 1, 4  # one is as good as more without guidance (docs/benchmarks.md); its curriculum needs some
# the fields that act on sampling alone, beside `milo_scale`
SAMPLING = (
    "schedule", "steps", "prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "guidance_scale",
    "rescale_cfg", "guidance_rescale", "controlnet_conditioning_scale", "start_point", "noise_aug", "color_fix", "eta",
)  # fmt: skip
# the fields used here; `DiffBIRPipeline.__call__` is given all others by their names
FACE_TASKS = ("face", "unaligned_face")
OWN = frozenset({"task", "milo_scale", "schedule", "steps", "upscale", "seed", "tile", "detector"})

CHECKED = (  # by `DiffBIRPipeline.check_inputs`
    "num_inference_steps", "guidance_scale", "guidance_rescale", "start_point", "noise_aug", "color_fix",
    "compatibility", "upscale",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RestorationSettings:
    """How photos are restored; None stands for the default.

    Args:
        task: "denoise" keeps the size, "sr" enlarges, "face" takes an aligned face, as in FFHQ, "unaligned_face" a
            photo with faces in it; the default is the task that the model was converted for, or "denoise", which
            removes noise, blur and JPEG artifacts alike.
        milo_scale: strength of MILO guidance, in [0, 1]; 0 switches it off, the default where the model has no metric.
        schedule: curriculum of the guidance, "constant", "linear" or "cosine".
        steps: denoising steps; the default is that of an official DiffBIR, else 1, or 4 with guidance.
        stage: as in `DiffBIRPipeline.__call__`; the default is "all" where a field is given that acts on sampling
            alone, such as `milo_scale` above 0, `schedule` or `steps`, and else the pipeline's `default_stage`.
        upscale: how much larger the result is; the default is 4 for "sr", 2 for "unaligned_face", else 1.
        seed: the same seed gives the same result; each image of a batch is restored as it would be alone. A sequence
            holds one seed for each image.
        tile: side in pixels of the tiles that larger images are restored in, at least 320; by default they are restored
            whole, or as the pipeline's `enable_tiling` says.
        detector: finds the faces of "unaligned_face", such as `milo_latent.restoration.face_detector.YuNet(path)`.

    All other fields are options of `DiffBIRPipeline.__call__`, whose docstring explains them.
    """

    task: TaskName | None = None
    milo_scale: float | None = None
    schedule: Schedule | None = None
    steps: int | None = None
    upscale: float | None = None
    seed: int | Sequence[int] = 0
    tile: int | None = None
    detector: Detector | None = None
    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    guidance_scale: float | None = None
    rescale_cfg: bool | None = None
    guidance_rescale: float | None = None
    controlnet_conditioning_scale: float | None = None
    start_point: StartPoint | None = None
    noise_aug: int | None = None
    color_fix: ColorFix | None = None
    eta: float | None = None
    compatibility: Compatibility | None = None
    stage: LastStage | None = None
    fidelity: float | None = None

    def resolve(self, pipe: DiffBIRPipeline) -> RestorationSettings:
        """Fill in the defaults for a pipeline, and refuse what cannot work with it.

        Args:
            pipe: that is to restore the photos. The prompts are encoded and kept in it.

        Returns:
            The settings with a value for everything that has a default.

        Raises:
            ValueError: for values out of their range, a task that is unknown or not the model's, guidance where the
                model has no metric, prompts where it takes none, faces without a detector, a stage or a fidelity for
                which the model has no join, or fields of sampling for a stage that does not sample.
        """
        release = pipe.release
        sampling = [name for name in SAMPLING if getattr(self, name) is not None]
        stage, fidelity = pipe.choose_stage(
            self.stage, self.fidelity, sampling=[*(["milo_scale"] if self.milo_scale else []), *sampling]
        )
        task = self.task or ("denoise" if release is None else release.task)
        check_choice("task", task, UPSCALE)
        defaults = {**DEFAULTS, "task": task, "upscale": UPSCALE[task]}
        if pipe.metric is None or stage != "all":
            defaults["milo_scale"] = 0.0
        guided = defaults["milo_scale"] if self.milo_scale is None else self.milo_scale
        defaults["steps"] = GUIDED_STEPS if guided else STEPS
        if release is not None:
            release.check_task(task)
            defaults |= release.call_arguments
            defaults["steps"] = defaults.pop("num_inference_steps")
        chosen = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        settings = replace(self, **chosen, stage=stage, fidelity=fidelity)
        settings._check(pipe)
        _check_face_model(task, pipe)
        return settings

    @torch.no_grad()
    def _check(self, pipe: DiffBIRPipeline) -> None:
        if self.task == "unaligned_face" and self.detector is None:
            raise ValueError(
                "Expected a `detector` of faces, got None. Pass YuNet(path) of "
                "`milo_latent.restoration.face_detector`, or --detector FILE."
            )
        self.seeds(1 if isinstance(self.seed, int | np.integer) else len(self.seed))  # refuses those that are too large
        with pipe.tiling(self.tile):  # refuses tiles that do not fit
            split_guides(self.guide(pipe), pipe)  # and guides that cannot act
        arguments = vars(self) | {"num_inference_steps": self.steps}
        pipe.check_inputs(**{name: arguments[name] for name in CHECKED})
        if self.stage != "all":
            return
        pipe.encode_prompt(
            self.prompt,
            self.negative_prompt,
            guided=arguments["guidance_scale"] > 1.0,
            prompt_embeds=self.prompt_embeds,
            negative_prompt_embeds=self.negative_prompt_embeds,
        )

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What `DiffBIRPipeline.__call__` is given besides image, upscale, generators and guide."""
        left_out = OWN if self.stage == "all" else OWN.union(SAMPLING)
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {"num_inference_steps": self.steps} | options

    def as_text(self) -> dict[str, str]:
        """Return the settings that have a value, by their names, for a record of how results were made."""
        return {
            field.name: repr(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) is not None
        }

    def as_record(self) -> dict[str, Any]:
        """Return resolved settings that were at work, as values that JSON can hold and `restore_image` takes."""
        idle = {"detector"} if self.stage == "all" else {"detector", "milo_scale", *SAMPLING}
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in idle}
        return {name: value for name, value in values.items() if value is not None and not torch.is_tensor(value)}

    def guide(self, pipe: DiffBIRPipeline) -> MILOGuidance | None:
        """Return the guidance of resolved settings by the pipeline's metric; None where it is switched off.

        Raises:
            ValueError: if the pipeline has no metric, or a value is out of its range.
        """
        assert self.milo_scale is not None
        assert self.schedule is not None
        if pipe.metric is None:
            if self.milo_scale:
                raise ValueError(
                    "Expected a model with a `metric` for MILO guidance, got one without. Pass milo_scale=0, or a "
                    "metric to load_restorer."
                )
            return None
        guide = MILOGuidance(pipe.metric, milo_scale=self.milo_scale, schedule=self.schedule)
        return guide if self.milo_scale else None  # switched off, it asks nothing of the scheduler

    def seeds(self, count: int) -> list[int]:
        """Return the seed of each of `count` images.

        Raises:
            ValueError: if there are several seeds, but not `count`, or one has more than 64 bits.
        """
        seeds = [self.seed] * count if isinstance(self.seed, int | np.integer) else self.seed
        if len(seeds) != count:
            raise ValueError(f"Expected one seed, or {count}, one for each image, got {len(seeds)}.")
        for seed in seeds:
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"Expected seeds of 64 bits, got {seed}.")
        return [int(seed) for seed in seeds]


def _check_face_model(task: str, pipe: DiffBIRPipeline) -> None:
    """Warn if a model that was made for no face is to restore one."""
    if task in FACE_TASKS and pipe.config.release_task not in FACE_TASKS and pipe.background_cleaner is None:
        warnings.warn(
            f"This model has no face model, so task {task!r} restores faces as any photo. `milo-latent convert diffbir "
            f"--task {task}` makes one of official checkpoints.",
            stacklevel=4,  # that of the caller of `restore_image`
        )
