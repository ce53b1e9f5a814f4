"""Third-party notices: every dependency and its licence, as installed, and whatever the weights derive from."""

import importlib.metadata
import re
import tomllib

import pytest

FAMILIES = ("Apache", "BSD", "MIT", "MPL", "PSF", "ISC")
OTHER_WORDS = {"PSF": "Python Software Foundation|matplotlib", "MPL": "Mozilla"}


@pytest.fixture(scope="module")
def notices(repository):
    return (repository / "THIRD_PARTY.md").read_text(encoding="utf-8")


def licences(notices):
    table = notices.partition("## Dependencies")[2]
    return dict(re.findall(r"^\| ([\w-]+) \| (?:always|extra `\w+`) \| (.+) \|$", table, re.M))


def dependencies(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    return {re.match(r"[\w-]+", each)[0] for each in wanted} - {"milo_latent"}


def test_every_dependency_is_listed(repository, notices):
    assert set(licences(notices)) == dependencies(repository)


def test_licences_are_those_that_the_installed_packages_state(notices):
    checked = 0
    for package, licence in licences(notices).items():
        try:
            stated = importlib.metadata.metadata(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        family = next(each for each in FAMILIES if licence.startswith(each))
        told = [stated.get("License-Expression"), stated.get("License"), *(stated.get_all("Classifier") or [])]
        told = " ".join(each for each in told if each and not each.startswith(("Topic", "Programming", "Framework")))
        if "License ::" in told or stated.get("License-Expression") or stated.get("License"):
            checked += 1
            assert re.search(f"{family}|{OTHER_WORDS.get(family, family)}", told), (
                f"{package}: {licence}, not {told[:200]}"
            )
    assert checked >= 10


def test_every_set_of_weights_is_named(repository, notices):
    for card in (repository / "weights").glob("*/README.md"):
        assert f"weights/{card.parent.name}/README.md" in notices
