"""CONTRIBUTING.md leads to code that exists: each name and path in it is looked up."""

import importlib
import re

import yaml


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


def test_issue_forms_can_be_shown(repository):
    forms = [path for path in (repository / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"]
        assert form["description"]
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields)
        assert {field["type"] for field in form["body"]} <= {"textarea", "input"}
        assert all(field["attributes"]["label"] for field in form["body"])
