"""The README: its Python blocks run, its links lead somewhere, its commands exist."""

import re

import pytest


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text()


def test_the_python_blocks_run(readme, repository, monkeypatch):
    monkeypatch.chdir(repository)
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["restored"].shape == names["photo"].shape
    assert names["image"].size == names["photo"].shape[:1:-1]


def test_the_links_lead_somewhere(readme, repository):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert len(links) >= 6
    for link in links:
        path, _, heading = link.partition("#")
        assert (repository / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (repository / path).read_text(), re.M) if heading else [heading]
        assert heading in [each.lower().replace(" ", "-") for each in headings], link


def test_the_first_two_blocks_are_the_two_commands(readme):
    first, second = re.findall(r"```bash\n(.*?)```", readme, re.S)
    assert "milo-latent restore" in first
    assert "pytest" in second
