"""CONTRIBUTING.md leads to code that exists: each name and path in it is looked up."""

import importlib
import re


def find(name):
    """The object of a name relative to the package, such as `files.read_image` or `metric.network.MILO.mask`."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["milo_latent", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise LookupError(name)


def test_every_name_in_contributing_exists(repository):
    text = (repository / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([a-z]\w*(?:\.\w+)+)`", text)) - {"scheduler.step"}
    assert len(names) > 30
    for name in names:
        assert find(name) is not None


def test_every_path_in_contributing_exists(repository):
    text = (repository / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`([\w./]+/[\w.]*)`", text))
    assert len(paths) > 10
    for path in paths:
        assert any((repository / folder / path).exists() for folder in ("", "milo_latent", "milo_latent/training")), (
            path
        )
