"""The layout: data flows one way, inference needs no training code, names are found where they are said to be."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib

import milo_latent

# The modules of the package, those that know the fewest others first; a folder stands for everything in it. A module
# may import from the lines above its own and from its own folder, never from a line below.
LEVELS = (
    "checks photo_formats pictures processes threads",
    "provenance",
    "atomic structure",
    "checkpoints extras files programs resources weights",
    "batches datasets inputs jobs",
    "distortions latents",
    "metric",
    "guidance",
    "diffbir",
    "pipelines",
    "convert restoration score testing",
    "evaluation",
    "training.data",
    "training.engine",
    "training training.distillation",
    "app",
    "cli",
    "__main__",
)


def level(module):
    """The line of a module in the table: that of its longest prefix there."""
    found = {f"milo_latent.{name}": number for number, names in enumerate(LEVELS) for name in names.split()}
    known = module
    while known and known not in found:
        known = known.rpartition(".")[0]
    assert known, f"{module} has no level in this test's table"
    return found[known]


def modules(repository):
    for folder, package in (("milo_latent", "milo_latent"), ("pipelines", "milo_latent.pipelines")):
        for path in (repository / folder).rglob("*.py"):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("milo_latent."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("milo_latent."))


def test_no_import_goes_back(repository):
    checked = 0
    for module, path in modules(repository):
        if module == "milo_latent":
            continue
        for imported in imports(path):
            checked += 1
            folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
            same_folder = folder != "milo_latent" and folder in (imported, imported.rpartition(".")[0])
            assert level(imported) < level(module) or same_folder, f"{module} imports {imported}"
    assert checked > 30


def test_inference_never_imports_training(repository):
    for module, path in modules(repository):
        if not module.startswith("milo_latent.training"):
            assert not any(imported.startswith("milo_latent.training") for imported in imports(path)), module


def test_importing_the_package_loads_neither_torch_nor_diffusers():
    code = "import sys, milo_latent; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_is_there():
    for name in milo_latent.__all__:
        assert getattr(milo_latent, name) is not None
    assert set(milo_latent.__all__) <= set(dir(milo_latent))


def test_the_version_is_the_same_everywhere(repository):
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert milo_latent.__version__ == version
    assert f"version: {version}" in (repository / "CITATION.cff").read_text()
    assert f"## [{version}]" in (repository / "CHANGELOG.md").read_text()


def test_the_minimum_versions_are_those_that_are_tested(repository):
    """A file of constraints, which `.ci/run` takes, holds the least version of each requirement."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    required = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    least = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(required), re.M))
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (repository / ".ci" / "minimum.txt").read_text(), re.M))
    assert least.keys() - tested.keys() == {
        "opencv-python-headless",
        "spandrel",
        "bitsandbytes",
        "gradio",
        "shtab",
        "ruff",
        "mypy",
    }
    assert tested.keys() - least.keys() == set()
    for name, version in tested.items():
        assert re.fullmatch(rf"{re.escape(least[name])}(\.0)*", version), name


def test_lines_of_documents_can_be_read_in_a_narrow_window(repository):
    pages = [
        path for path in repository.rglob("*.md") if not {"runs", ".venv"} & set(path.relative_to(repository).parts)
    ]
    assert len(pages) > 30
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 140 or line.startswith("|"), f"{page.relative_to(repository)}:{number} has {len(line)}"
