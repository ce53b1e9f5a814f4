"""The page: what it shows, and what its buttons do. Gradio draws it; `restoring` works for it."""

from __future__ import annotations

import html
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from milo_latent.app.restoring import Comparison, PhotoRestorer, Progress, Restored
from milo_latent.extras import import_extra
from milo_latent.guidance.curriculum import SCHEDULES
from milo_latent.programs import EXPECTED_ERRORS
from milo_latent.restoration.settings import DEFAULTS, RestorationSettings

F = TypeVar("F", bound=Callable[..., Any])

TITLE = "milo_latent"
TASKS = {
    "denoise": "Remove noise, blur, JPEG artifacts",
    "sr": "Enlarge four times",
    "face": "Restore an aligned face",
    "unaligned_face": "Restore the faces in a photo, and enlarge it twice",
}
STAGES = {
    "cleaner": "Clean: remove the degradation",
    "join": "Join: give details of the photo back",
    "all": "All: let diffusion add what was lost",
}
FAILED, CANCELLED = "Not restored", "Cancelled"
MAX_WAITING = 20  # users in the queue
KEPT = 3600  # seconds for which files of a page are kept
LARGEST_SEED = 2**31 - 1
CSS = """
.gradio-container { max-width: 1280px; margin: 0 auto; }
#title p { color: var(--body-text-color-subdued); margin-top: 2px; }
#status p { margin: 0 0 6px; font-variant-numeric: tabular-nums; }
#status div.bar { height: 6px; border-radius: 3px; overflow: hidden; background: var(--border-color-primary); }
#status i { display: block; height: 100%; border-radius: 3px; background: var(--primary-500); transition: width .3s; }
#status i.unknown { width: 30%; animation: sweep 1.4s ease-in-out infinite alternate; }
@keyframes sweep { from { margin-left: 0; } to { margin-left: 70%; } }
#masks .grid-wrap { height: auto; min-height: 0; max-height: none; padding-top: 34px; }
#masks .grid-container { grid-auto-rows: auto; grid-template-columns: repeat(4, 1fr); }
@media (max-width: 640px) {
  #masks .grid-container { grid-template-columns: repeat(2, 1fr); }
  #masks .grid-wrap { padding-top: 52px; }
}
#numbers table, #numbers th, #numbers td { border-color: var(--border-color-primary); }
#numbers td { white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


def import_gradio() -> Any:
    """Import gradio, which tells nobody that it is used."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return import_extra("gradio", "app", "The app")


def on_gpu(function: F) -> F:
    """Let a function have the GPU on a Space of Hugging Face, where `spaces` lends one while it runs."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(function)


class Page:
    """The components of the page by their names, and what happens with them; `blocks` is the `gradio.Blocks`.

    Args:
        restorer: restores the photos.
        folder: of all files of the page's users; only those in its folder "served" can be reached.

    Raises:
        ImportError: without gradio.
    """

    def __init__(self, restorer: PhotoRestorer, folder: Path) -> None:
        self.restorer, self.gr = restorer, import_gradio()
        served, self.working = folder / "served", folder / "working"
        for each in (served, self.working):
            each.mkdir(exist_ok=True)
        os.environ["GRADIO_TEMP_DIR"] = str(served)  # read when components are made
        with self.gr.Blocks(
            title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True
        ) as self.blocks:
            self.gr.Markdown(f"# {TITLE}\nDrop a photo, restore it, and move the slider.", elem_id="title")
            with self.gr.Row():
                with self.gr.Column(scale=1, min_width=280):
                    self._add_inputs()
                with self.gr.Column(scale=2, min_width=280):
                    self._add_outputs()
            self._connect()
        self.blocks.queue(max_size=MAX_WAITING, api_open=False)

    def _add_inputs(self) -> None:
        gr, pipe = self.gr, self.restorer.pipe
        stages, fidelity = [each for each in STAGES if each != "join" or pipe.join is not None], pipe.choose_stage()[1]
        stage, guided = pipe.config.default_stage, pipe.metric is not None
        self.photo = _file_input(gr, label="Photo", height=240, elem_id="photo")
        tasks = [(TASKS[each], each) for each in self.restorer.tasks]
        self.task = gr.Dropdown(tasks, value=tasks[0][1], label="Task", elem_id="task")
        self.stage = gr.Radio([(STAGES[each], each) for each in stages], value=stage, label="Stage", elem_id="stage")
        self.fidelity = gr.Slider(
            0, 1, fidelity, step=0.05, label="Fidelity", visible=self._joins(stage),
            info="How much of the photo's own details comes back", elem_id="fidelity",
        )  # fmt: skip
        with gr.Group(visible=stage == "all") as self.diffusion:
            self.strength = gr.Slider(
                0, 1, DEFAULTS["milo_scale"] if guided else 0, step=0.05, label="Strength of MILO guidance",
                info="0 is none; more stays closer to the cleaned photo", interactive=guided, elem_id="strength",
            )  # fmt: skip
            self.schedule = gr.Radio(
                list(SCHEDULES), value=DEFAULTS["schedule"], label="Curriculum", elem_id="curriculum",
                info="How guidance moves from what is hardly seen to what is seen well",
            )  # fmt: skip
            with gr.Row():
                steps = RestorationSettings(stage="all").resolve(pipe).steps
                self.steps = gr.Slider(1, 100, steps, step=1, label="Steps", elem_id="steps")
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed")
        with gr.Accordion("Compare with a clean reference", open=False, elem_id="compare"):
            self.reference = _file_input(
                gr, label="Clean photo, of the size of the result", height=180, elem_id="reference"
            )

    def _add_outputs(self) -> None:
        gr = self.gr
        with gr.Row():
            self.start = gr.Button("Restore", variant="primary", min_width=90, elem_id="restore")
            self.cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel")
            self.download = gr.DownloadButton("Download", interactive=False, min_width=90, elem_id="download")
        self.ending = gr.State(FAILED)  # what the status says if the run ends without a result, cancelled or not
        self.status = gr.HTML(_status("Drop a photo and press Restore"), elem_id="status")
        self.slider = gr.ImageSlider(
            label="Before and after", type="filepath", interactive=False, max_height=620, buttons=["fullscreen"],
            elem_id="slider",
        )  # fmt: skip
        self.masks = gr.Gallery(
            label="MILO's mask, step by step: light where a difference would be seen", columns=4, rows=1,
            height="auto", object_fit="contain", visible=False, buttons=["fullscreen"], elem_id="masks",
        )  # fmt: skip
        with gr.Column(visible=False) as self.compared:
            self.numbers = gr.Markdown(elem_id="numbers", container=True)
            self.error_map = gr.Image(
                label="Seen difference from the reference", buttons=["fullscreen"], interactive=False,
                elem_id="map",
            )  # fmt: skip
        with gr.Accordion("The same from the shell", open=False, visible=False, elem_id="shell") as self.shell:
            self.command = gr.Code(language="shell", show_label=False, interactive=False, wrap_lines=True)

    def _connect(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private"}
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", **hidden}
        self.stage.change(self._fit_stage, self.stage, [self.diffusion, self.fidelity], **at_once)
        buttons = [self.start, self.cancel, self.status]
        outputs = [
            *buttons, self.ending, self.slider, self.download, self.masks, self.compared, self.numbers, self.error_map,
            self.shell, self.command,
        ]  # fmt: skip
        inputs = [
            self.photo, self.reference, self.task, self.stage, self.fidelity, self.strength, self.schedule, self.steps,
            self.seed,
        ]  # fmt: skip
        running = self.start.click(
            on_gpu(self._restore), inputs, outputs, show_progress_on=self.status, concurrency_limit=1, **hidden
        )
        running.success(self._rest, None, buttons, **at_once)
        running.failure(self._rest, self.ending, buttons, **at_once)
        self.cancel.click(
            lambda: {**self._rest(CANCELLED), self.ending: CANCELLED}, None, [*buttons, self.ending], cancels=running,
            **at_once,
        )  # fmt: skip

    def _joins(self, stage: str) -> bool:
        return self.restorer.pipe.join is not None and stage != "cleaner"

    def _fit_stage(self, stage: str) -> dict:
        """Show the settings that a stage heeds."""
        return {
            self.diffusion: self.gr.Group(visible=stage == "all"),
            self.fidelity: self.gr.Slider(visible=self._joins(stage)),
        }

    def _restore(self, photo: str | None, reference: str | None, *chosen: Any) -> Iterator[dict]:
        """Restore the photo, and update the page while that goes on."""
        if photo is None:
            raise self.gr.Error("Drop a photo first.", title="No photo")
        yield self._began()
        results, told = Path(tempfile.mkdtemp(dir=self.working)), 0
        try:
            settings = self.restorer.choose(*chosen)
            clean = None if reference is None else Path(reference)
            for news in self.restorer.run(Path(photo), results, settings, reference=clean):
                update: dict = {self.status: _status(*_words(news))}
                if news.done > told:
                    told, update[self.masks] = news.done, self.gr.Gallery(list(news.masks), visible=bool(news.masks))
                if isinstance(news, Restored):
                    update |= self._ended(news)
                yield update
        except EXPECTED_ERRORS as error:
            raise self.gr.Error(_without_folders(error, photo, reference), title="Not restored") from error
        finally:
            shutil.rmtree(results, ignore_errors=True)  # gradio has its copies

    def _began(self) -> dict:
        gr = self.gr
        return {
            self.start: gr.Button(interactive=False), self.cancel: gr.Button(interactive=True), self.slider: None,
            self.download: gr.DownloadButton(interactive=False), self.masks: gr.Gallery([], visible=False),
            self.compared: gr.Column(visible=False), self.shell: gr.Accordion(visible=False),
            self.status: _status("Starting", None), self.ending: FAILED,
        }  # fmt: skip

    def _ended(self, news: Restored) -> dict:
        gr, compared = self.gr, {}
        if news.comparison is not None:
            compared = {self.numbers: _table(news.comparison), self.error_map: news.comparison.picture}
        return {
            self.slider: (str(news.before), str(news.after)), self.command: news.command,
            self.download: gr.DownloadButton(value=str(news.after), interactive=True),
            self.shell: gr.Accordion(visible=True), self.compared: gr.Column(visible=bool(compared)), **compared,
        }  # fmt: skip

    def _rest(self, message: str | None = None) -> dict:
        """Wait for the next photo."""
        words = {} if message is None else {self.status: _status(message)}
        return {self.start: self.gr.Button(interactive=True), self.cancel: self.gr.Button(interactive=False), **words}


def serve(
    restorer: PhotoRestorer,
    *,
    host: str | None = "127.0.0.1",
    port: int | None = None,
    max_megabytes: int = 50,
    open_browser: bool = False,
) -> None:
    """Serve the page until the program is interrupted; all that its users sent or got is deleted then.

    Args:
        restorer: restores the photos.
        host: address to listen at; None leaves it to gradio and the environment, as on a Space.
        port: None takes the first free one from 7860 on.
        max_megabytes: largest upload.
        open_browser: whether to open the page in a browser.

    Raises:
        ImportError: without gradio.
        OSError: if the port is taken.
    """
    import_gradio()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by others, it leaves no photos behind either
    folder = Path(tempfile.mkdtemp(prefix="milo_latent-"))
    page = Page(restorer, folder)
    try:
        page.blocks.launch(
            server_name=host, server_port=port, inbrowser=open_browser, max_file_size=f"{max_megabytes}mb",
            prevent_thread_lock=True, share=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, run_history=False, footer_links=[], css=CSS, theme=_theme(page.gr), quiet=True,
        )  # fmt: skip
        print(f"The page is at {page.blocks.local_url}; Ctrl+C closes it.", flush=True)
        page.blocks.block_thread()
    finally:
        page.blocks.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


def _theme(gr: Any) -> Any:
    """Return colors, and fonts that every machine has, since a page without a network can fetch none."""
    theme = gr.themes.Default(
        primary_hue="orange", neutral_hue="slate", radius_size="md",
        font=gr.themes.Font("sans-serif"), font_mono=gr.themes.Font("monospace"),
    )  # fmt: skip
    return theme.set(block_title_text_weight="600", block_label_text_weight="600")


def _file_input(gr: Any, **options: Any) -> Any:
    """Return an input for an image that hands over the path of the file as it came.

    Gradio itself would open the file first, and report damaged ones in its own words.
    """
    component = gr.Image(type="filepath", sources=["upload"], buttons=[], **options)
    component.preprocess = lambda upload: None if upload is None else upload.path
    return component


def _words(news: Progress | Restored) -> tuple[str, float | None]:
    """Return what the status says, and the share that is done; None for unknown."""
    if isinstance(news, Restored):
        return f"Restored in {news.seconds:.1f} s", 1.0
    step = f", step {news.done} of {news.steps}" if news.steps else ""
    return f"{news.text}{step}, {news.seconds:.0f} s", news.done / news.steps if news.done else None


def _status(text: str, share: float | None = 0.0) -> str:
    width = 'class="unknown"' if share is None else f'style="width: {share:.0%}"'
    return f'<p>{html.escape(text)}</p><div class="bar"><i {width}></i></div>'


def _table(comparison: Comparison) -> str:
    """Return the comparison as a table in Markdown."""
    rows = {"Photo": comparison.before, "Result": (comparison.error, comparison.mos)}
    lines = [f"| {name} | {row[0]:.5f} | {row[1]:.2f} |" for name, row in rows.items() if row is not None]
    return "\n".join(["| | MILO error (0 is identical) | opinion score (0 to 5) |", "| --- | ---: | ---: |", *lines])


def _without_folders(error: Exception, *paths: str | None) -> str:
    """Return an error's message without the folders of uploaded files."""
    message = str(error)
    for path in filter(None, paths):
        message = message.replace(f"{Path(path).parent}{os.sep}", "")
    return message
