"""The layout: data flows one way, inference needs no training code, names are found where they are said to be."""

import ast
import subprocess
import sys
import tomllib

import milo_latent

# a module imports modules of lower levels, and those of its own folder
LEVELS = {
    "milo_latent.pictures": -1,
    "milo_latent.checkpoints": 0,
    "milo_latent.checks": 0,
    "milo_latent.files": 0,
    "milo_latent.programs": 0,
    "milo_latent.resources": 0,
    "milo_latent.weights": 0,
    "milo_latent.metric": 1,
    "milo_latent.latents": 1,
    "milo_latent.distortions": 1,
    "milo_latent.guidance": 2,
    "milo_latent.diffbir": 3,
    "milo_latent.pipelines": 4,
    "milo_latent.score": 5,
    "milo_latent.restoration": 5,
    "milo_latent.convert": 5,
    "milo_latent.evaluation": 5,
    "milo_latent.testing": 5,
    "milo_latent.training.data": 6,
    "milo_latent.training.engine": 7,
    "milo_latent.training": 8,
    "milo_latent.training.distillation": 8,
    "milo_latent.cli": 9,
}


def level(module):
    known = module
    while known and known not in LEVELS:
        known = known.rpartition(".")[0]
    assert known, f"{module} has no level in this test's table"
    return LEVELS[known]


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
