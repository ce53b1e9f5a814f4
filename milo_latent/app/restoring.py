"""What the page does with a photo: restore it in a thread, tell how far that is, stop when asked."""

from __future__ import annotations

import functools
import queue
import shlex
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from milo_latent.diffbir.stages import LastStage
from milo_latent.diffbir.versions import TaskName
from milo_latent.files import read_photo, write_image
from milo_latent.guidance.curriculum import Schedule
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.guidance.trace import GuidanceTrace, TraceStep
from milo_latent.metric.loading import default_image_metric
from milo_latent.metric.network import MILO
from milo_latent.metric.visualize import color_error_map
from milo_latent.pictures import to_8bit
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.faces import Detector
from milo_latent.restoration.files import describe_result, restore_file
from milo_latent.restoration.restore import restore
from milo_latent.restoration.restorer import pipeline_digest
from milo_latent.restoration.settings import RestorationSettings

TILE = 768  # pixels; larger photos are worked on in tiles, which bounds the memory and lets them be stopped soon
TICK = 0.5  # seconds between two signs of life
MASKS, MASK_SIDE = 8, 320  # pictures of masks at most, and pixels of their longer sides
COMPARED_PIXELS = 4 * 1024 * 1024  # MILO needs about 0.5 GB for a megapixel
FLAGS = {"milo_scale": "guidance", "schedule": "curriculum"}  # options of `milo-latent restore` with names of their own

MaskPicture = tuple[Image.Image, str]  # with its caption


class StoppedError(Exception):
    """Nobody waits for the result any longer."""


@dataclass(frozen=True)
class Progress:
    """How far a restoration is.

    Args:
        text: what is done at the moment.
        done: denoising steps that are done.
        steps: denoising steps in all; 0 where nothing is sampled.
        seconds: since the start.
        masks: MILO's mask in the steps that are done.
    """

    text: str
    done: int = 0
    steps: int = 0
    seconds: float = 0.0
    masks: tuple[MaskPicture, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A result compared with a clean reference by MILO_I.

    Args:
        error: E of the result.
        mos: its mean opinion score, 0 to 5.
        before: E and mean opinion score of the degraded photo; None if it has another size than the result.
        picture: the error map over the result.
    """

    error: float
    mos: float
    before: tuple[float, float] | None
    picture: Image.Image


@dataclass(frozen=True)
class Restored:
    """A restored photo.

    Args:
        before: the photo as it came, enlarged to the size of the result.
        after: the result, a PNG file with the text of `describe_result`.
        done: denoising steps.
        masks: MILO's mask in them.
        comparison: with the clean reference; None without one.
        command: of the shell, which makes the same result.
        seconds: that it took.
    """

    before: Path
    after: Path
    done: int
    masks: tuple[MaskPicture, ...]
    comparison: Comparison | None
    command: str
    seconds: float


class PhotoRestorer:
    """Restore photos with one pipeline for any number of users, one after the other.

    Args:
        pipe: the pipeline.
        model: what it was opened from, for the record in the results.
        max_pixels: of a result; photos that would become larger are refused before they are decoded.
        detector: of faces, for the task "unaligned_face".
    """

    def __init__(
        self, pipe: DiffBIRPipeline, *, model: str, max_pixels: int = 16 * 10**6, detector: Detector | None = None
    ) -> None:
        self.pipe, self.model, self.max_pixels, self.detector = pipe, model, max_pixels, detector
        self._turn = threading.Lock()

    @functools.cached_property
    def tasks(self) -> list[str]:
        """The tasks that the model was made for; the first is its default."""
        default = RestorationSettings().resolve(self.pipe).task
        return sorted(filter(self._knows, get_args(TaskName)), key=lambda task: task != default)

    def _knows(self, task: TaskName) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning tells of a model that knows nothing of faces
            try:
                RestorationSettings(task=task, detector=self.detector).resolve(self.pipe)
            except (ValueError, UserWarning):
                return False
        return True

    def choose(
        self,
        task: TaskName,
        stage: LastStage,
        fidelity: float,
        milo_scale: float,
        schedule: Schedule,
        steps: float,
        seed: float | None,
    ) -> RestorationSettings:
        """Return the settings that a page shows, without those that the stage does not heed."""
        heeded: dict[str, Any] = {}
        if self.pipe.join is not None and stage != "cleaner":
            heeded["fidelity"] = fidelity
        if stage == "all":
            heeded |= {"milo_scale": milo_scale, "schedule": schedule, "steps": int(steps), "seed": int(seed or 0)}
        return RestorationSettings(task=task, stage=stage, tile=TILE, **heeded)

    @functools.cached_property
    def _digest(self) -> str:
        return pipeline_digest(self.pipe)

    def command(self, photo: Path, settings: RestorationSettings) -> str:
        """Return the command of the shell that makes the same result."""
        options = [f"--{FLAGS.get(name, name)}={value}" for name, value in given(settings).items()]
        return shlex.join(["milo-latent", "restore", photo.name, f"--model={self.model}", *options])

    def run(
        self, photo: Path, folder: Path, settings: RestorationSettings, *, reference: Path | None = None
    ) -> Iterator[Progress | Restored]:
        """Restore a photo, and tell every half second how far that is; closing the iterator stops the work.

        Args:
            photo: an image file.
            folder: where the result and what else is shown are written.
            settings: not yet resolved.
            reference: an image file of the clean photo, of the result's size.

        Yields:
            `Progress`, and `Restored` at last.

        Raises:
            ValueError: for damaged or too large files, a reference of another size, or settings that cannot work.
            MemoryError: if the photo is too large for the device.
        """
        news: queue.SimpleQueue[Progress | Restored | Exception] = queue.SimpleQueue()
        stop, began = threading.Event(), time.perf_counter()

        def work() -> None:
            try:
                with self._turn, stopping(self.pipe, stop):
                    news.put(self._restore(photo, folder, settings, reference, news))
            except Exception as error:  # raised again in the thread that waits
                news.put(error)

        threading.Thread(target=work, daemon=True).start()
        latest: Progress | Restored | Exception = Progress("Waiting for the model")
        try:
            while True:
                try:
                    latest = news.get(timeout=TICK)
                except queue.Empty:
                    assert isinstance(latest, Progress)
                if isinstance(latest, Exception):
                    raise latest
                yield replace(latest, seconds=time.perf_counter() - began)
                if isinstance(latest, Restored):
                    return
        finally:
            stop.set()  # the thread ends at its next network; waiting for it would stop the server

    def _restore(
        self,
        photo: Path,
        folder: Path,
        settings: RestorationSettings,
        reference: Path | None,
        news: queue.SimpleQueue[Any],
    ) -> Restored:
        news.put(Progress("Cleaning"))
        settings = replace(settings, detector=self.detector if settings.task == "unaligned_face" else None)
        resolved = settings.resolve(self.pipe)
        upscale = resolved.upscale
        assert upscale is not None
        clean = None if reference is None else read_photo(reference, max_pixels=COMPARED_PIXELS)[0]
        watch = StepWatch(self.pipe, resolved, news)
        pictures: list[Tensor] = []

        def restore_photo(image: Tensor) -> Tensor:
            height, width = (round(side * upscale) for side in image.shape[2:])
            if clean is not None and tuple(clean.shape[2:]) != (height, width):
                size = f"{clean.shape[3]}x{clean.shape[2]}"
                raise ValueError(f"Expected a clean reference of the result's size, {width}x{height}, got {size}.")
            restored = restore(image, self.pipe, resolved, callbacks=watch.callbacks)
            pictures.extend([image, restored])
            return restored

        before, after = folder / "before.png", folder / f"{photo.stem}_restored.png"
        limit = int(self.max_pixels / upscale**2)
        text = describe_result(self.model, self._digest, resolved)
        restore_file(photo, after, restore_photo, text=text, max_pixels=limit)
        degraded, restored = pictures
        enlarged = F.interpolate(degraded, size=restored.shape[2:], mode="bicubic").clamp(0, 1)
        write_image(before, degraded if degraded.shape == restored.shape else enlarged)
        comparison = None
        if clean is not None:
            news.put(Progress("Comparing with the reference", watch.done, watch.steps, masks=watch.masks))
            comparison = compare(clean, restored, degraded)
        return Restored(before, after, watch.done, watch.masks, comparison, self.command(photo, settings), 0.0)


class StepWatch:
    """Tell of every denoising step, with MILO's mask in it; `callbacks` are for `restore`, None if nothing is sampled.

    The mask is shown without guidance, too: a strength of 0 changes no bit.
    """

    def __init__(self, pipe: DiffBIRPipeline, settings: RestorationSettings, news: queue.SimpleQueue[Any]) -> None:
        self.done, self.steps = 0, 0
        self.masks: tuple[MaskPicture, ...] = ()
        self.callbacks: list | None = None
        if settings.stage != "all":
            return
        assert settings.steps is not None
        assert settings.milo_scale is not None
        assert settings.schedule is not None
        self.steps, self._news = settings.steps, news
        self.callbacks = [self._tell]
        self._guide = None
        if pipe.metric is not None:
            self._guide = MILOGuidance(pipe.metric, settings.milo_scale, settings.schedule, trace=True)
            self.callbacks.insert(0, self._guide)

    def _tell(self, pipe: DiffBIRPipeline, step_index: int, timestep: Tensor, tensors: dict) -> dict:
        self.done, self.steps = step_index + 1, pipe.num_timesteps
        if self._guide is not None and self._guide.trace is not None:
            self.masks = paint_masks(self._guide.trace)
        text = "Denoising" if self.done < self.steps else "Decoding"
        self._news.put(Progress(text, self.done, self.steps, masks=self.masks))
        return {}


def paint_masks(trace: GuidanceTrace) -> tuple[MaskPicture, ...]:
    """Return MILO's mask in up to `MASKS` of the steps, on one scale: light where a person would see a difference."""
    largest = max(step.mask.max().item() for step in trace)
    places = torch.linspace(0, len(trace) - 1, min(len(trace), MASKS)).round().int().tolist()
    return tuple(_paint_mask(trace.steps[place], largest) for place in places)


def _paint_mask(step: TraceStep, largest: float) -> MaskPicture:
    painted = color_error_map(step.mask, size=_fit(step.mask), largest=largest, bar=False)
    return to_picture(painted), f"step {step.step + 1}"


def _fit(mask: Tensor) -> tuple[int, int]:
    height, width = mask.shape[2:]
    return round(height * MASK_SIDE / max(height, width)), round(width * MASK_SIDE / max(height, width))


@torch.no_grad()
def compare(reference: Tensor, restored: Tensor, degraded: Tensor) -> Comparison:
    """Compare a result with a clean reference, (1, 3, H, W) each in [0, 1], and the photo that it was made of."""
    metric = _image_metric()
    result = metric.compare(ref=reference, dist=restored)
    before = None
    if degraded.shape == reference.shape:
        photo = metric.compare(ref=reference, dist=degraded)
        before = (photo.error.item(), photo.mos.item())
    picture = to_picture(color_error_map(result.error_map, image=restored))
    return Comparison(result.error.item(), result.mos.item(), before, picture)


@functools.cache
def _image_metric() -> MILO:
    return MILO.from_pretrained(default_image_metric()).requires_grad_(False)


def to_picture(image: Tensor) -> Image.Image:
    """Return an image, (1, 3, H, W), in [0, 1], as a picture."""
    return Image.fromarray(to_8bit(image[0]))


def given(settings: RestorationSettings) -> dict[str, str | float]:
    """Return the settings that were given, by name; the detector of faces is none that a record can hold."""
    values = asdict(replace(settings, detector=None))
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def stopping(pipe: DiffBIRPipeline, stop: threading.Event) -> Iterator[None]:
    """Within this context, the pipeline raises `StoppedError` at its next network, tile or step once `stop` is set."""

    def check(*_: object) -> None:
        if stop.is_set():
            raise StoppedError

    modules = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    handles = [module.register_forward_pre_hook(check) for module in modules]
    try:
        check()
        yield
    finally:
        for handle in handles:
            handle.remove()
