"""The commands in README and docs: their options exist, have values that are accepted, and lack nothing required."""

import argparse
import importlib
import re
import shlex

import pytest

PROGRAM = r"[^`]*(?:python|torchrun|accelerate launch)[^`]* -m (milo_latent[.\w]+)|(?:[^`]*/)?milo-latent"
COMMAND = re.compile(rf"^ *(?:{PROGRAM}) ([^…]+)$")
END = re.compile(r" *(?:#| \|).*")  # a comment, or alternatives


def commands(text):
    """Return the module, or None for `milo-latent`, and the arguments of every command that begins a line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [(found[1], shlex.split(END.sub("", found[2]))) for found in map(COMMAND.match, lines) if found]


def exit_code(module, arguments, monkeypatch):
    """Parse the arguments of a command without running it; return 0 where they are accepted, else 2."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module or "milo_latent.cli").main(arguments)
    return end.value.code


PAGES = {
    "README.md": 15,
    "docs/app.md": 3,
    "docs/fine_tuning.md": 9,
    "docs/restorers.md": 3,
    "docs/scoring.md": 14,
    "docs/training.md": 4,
}


@pytest.mark.parametrize(("page", "count"), PAGES.items())
def test_commands_of_a_page_are_accepted(page, count, repository, monkeypatch):
    found = commands((repository / page).read_text())
    assert len(found) >= count
    for module, arguments in found:
        shown = f"{module or 'milo-latent'} {shlex.join(arguments)}"
        assert exit_code(module, arguments, monkeypatch) == 0, f"{page} shows what is refused: {shown}"


@pytest.mark.parametrize(
    "line",
    [
        "python -m milo_latent.training.train_restorer --images photos --output runs --no-such-option",
        "accelerate launch -m milo_latent.training.train_restorer --output runs \\\n    --train everything",
        "    milo-latent restore photo.jpg --no-such-option",
    ],
)
def test_a_wrong_option_on_a_page_is_found(line, monkeypatch):
    ((module, arguments),) = commands(line)
    assert exit_code(module, arguments, monkeypatch) == 2


def test_links_between_pages_lead_somewhere(repository):
    for page in (repository / "docs").glob("*.md"):
        for link, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.is_file(), f"{page.name}: {link}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
            names = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert not heading or heading in names, f"{page.name}: {link}#{heading}"
