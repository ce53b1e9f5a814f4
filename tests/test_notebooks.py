"""The notebooks: a fresh run gives the outputs that are committed."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_docs import commands, exit_code

NOTEBOOKS = [
    "01_restore.ipynb",
    "02_score_latents.ipynb",
    "03_guidance.ipynb",
    "04_train_metric.ipynb",
    "05_training_loss.ipynb",
    "06_diffbir.ipynb",
]
LARGEST = 400_000  # bytes of a notebook
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.(\d+))?(?![\w.]*\d)")


def outputs(notebook):
    """What the cells show, without warnings of the libraries that happen to be installed."""
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in shown if output.get("name") != "stderr"]


def texts(notebook):
    """What the cells printed, all as one text since kernels part it at random, and what they returned."""
    printed = "".join(output["text"] for output in outputs(notebook) if "text" in output)
    returned = [output["data"].get("text/plain") for output in outputs(notebook) if "data" in output]
    return [printed, *returned]


def thumbnails(notebook):
    """The pictures, in gray and small, so that fonts do not matter."""
    data = [output.get("data", {}) for output in outputs(notebook)]
    encoded = [each[kind] for each in data for kind in ("image/png", "image/jpeg") if kind in each]
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in encoded]
    return [np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), float) for picture in pictures]


def assert_alike(fresh: str, committed: str):
    """Numbers may differ by 5 %, or by one in the last digit: processors round differently."""
    assert NUMBER.sub("#", fresh) == NUMBER.sub("#", committed)
    for found, expected in zip(NUMBER.finditer(fresh), NUMBER.finditer(committed), strict=True):
        last_digit = 10.0 ** -len(expected[1] or "")
        assert float(found[0]) == pytest.approx(float(expected[0]), rel=0.05, abs=1.01 * last_digit), (fresh, committed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_fresh_run_gives_the_committed_outputs(name, repository, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason='needs pip install "milo_latent[notebooks]"')
    nbformat = pytest.importorskip("nbformat", reason='needs pip install "milo_latent[notebooks]"')
    path = repository / "notebooks" / name
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads wait for each other where other programs run
    nbclient.NotebookClient(fresh, timeout=900, kernel_name="python3", resources=resources).execute()
    assert len(texts(committed)) >= 3
    for found, expected in zip(texts(fresh), texts(committed), strict=True):
        assert_alike(found, expected)
    for found, expected in zip(thumbnails(fresh), thumbnails(committed), strict=True):
        assert np.abs(found - expected).mean() < 8  # of 255


def test_outputs_are_alike_up_to_rounding_only():
    assert_alike("error 0.41, 12.31 dB", "error 0.42, 12.00 dB")
    for other in ("error 0.45, 12.31 dB", "error 0.41, 14.31 dB", "score 0.41, 12.31 dB", "error 0.41"):
        with pytest.raises(AssertionError):
            assert_alike(other, "error 0.41, 12.31 dB")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_is_small_and_without_warnings(name, repository):
    path = repository / "notebooks" / name
    assert path.stat().st_size < LARGEST
    assert '"stderr"' not in path.read_text(encoding="utf-8")


def test_every_notebook_is_tested(repository):
    assert sorted(path.name for path in (repository / "notebooks").glob("*.ipynb")) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_commands_in_the_text_of_a_notebook_are_accepted(name, repository, monkeypatch):
    cells = json.loads((repository / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for module, arguments in commands(text):
        assert exit_code(module, arguments, monkeypatch) == 0, arguments
