"""The README: its Python blocks run, its links lead somewhere, its commands exist."""

import re
import shlex

import pytest
from PIL import Image
from test_docs import commands, exit_code

from milo_latent.cli import build_parser


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
    assert names["restored"].size == names["photo"].shape[:1:-1]
    assert names["image"].size == names["photo"].shape[:1:-1]


def test_the_links_lead_somewhere(readme, repository):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert len(links) >= 6
    for link in links:
        path, _, heading = link.partition("#")
        assert (repository / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (repository / path).read_text(), re.M) if heading else [heading]
        assert heading in [each.lower().replace(" ", "-") for each in headings], link


def test_the_first_two_blocks_are_the_two_commands(readme, repository):
    first, second = re.findall(r"```bash\n(.*?)```", readme, re.S)
    install, command = first.strip().rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -e ."
    assert command == ".venv/bin/milo-latent restore examples/cat_noisy.png -o photo_restored.png"
    assert second.strip() == 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/pytest'
    for word in command.split():
        assert word.startswith((".venv", "-", "photo_", "restore")) or (repository / word).is_file(), word


@pytest.mark.parametrize("page", ["README.md", "docs/diffbir.md", "docs/restorers.md", "docs/scoring.md"])
def test_the_commands_take_the_options_that_are_shown(repository, page, capsys):
    text = (repository / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *milo-latent ([^#|\n]+)", text, re.M)
    assert commands
    for command in commands:
        try:
            build_parser().parse_args(shlex.split(command))
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


def test_the_animation_shows_the_mask_for_15_seconds(readme, repository):
    (path,) = re.findall(r"!\[[^]]*\]\(([^)]+\.webp)\)", readme)
    assert (repository / path).stat().st_size < 2 * 10**6
    durations, frames = [], set()
    with Image.open(repository / path) as animation:
        for frame in range(animation.n_frames):
            animation.seek(frame)
            animation.load()
            durations.append(animation.info["duration"])
            frames.add(animation.tobytes())
    assert sum(durations) == 15_000
    assert len(frames) == len(durations) >= 20


def test_each_claim_over_others_has_its_test_or_command(readme, repository, monkeypatch):
    table = readme.partition("## What it does that others do not")[2].partition("\n## ")[0]
    claims = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(claims) >= 6
    for claim, proof, others in claims:
        tests, shown = re.findall(r"`(tests/\w+\.py)`", proof), commands("\n".join(re.findall(r"`([^`]+)`", proof)))
        assert tests or shown, claim
        assert len(others) > 10
        assert all((repository / test).is_file() for test in tests), claim
        assert all(exit_code(module, arguments, monkeypatch) == 0 for module, arguments in shown), claim
