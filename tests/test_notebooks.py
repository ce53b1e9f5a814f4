"""The notebooks: a fresh run gives the outputs that are committed."""

import pytest

NOTEBOOKS = ["01_restore.ipynb"]


def texts(notebook):
    """What the cells printed and returned, pictures as their size."""
    return [
        output.get("text") or output.get("data", {}).get("text/plain")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_fresh_run_gives_the_committed_outputs(name, repository):
    nbclient = pytest.importorskip("nbclient", reason='needs pip install "milo_latent[notebooks]"')
    nbformat = pytest.importorskip("nbformat", reason='needs pip install "milo_latent[notebooks]"')
    path = repository / "notebooks" / name
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute()
    assert texts(fresh) == texts(committed)
    assert len(texts(fresh)) >= 4


def test_every_notebook_is_tested(repository):
    assert sorted(path.name for path in (repository / "notebooks").glob("*.ipynb")) == NOTEBOOKS
