"""The commands in README and docs: their options exist, have values that are accepted, and lack nothing required."""

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = r"[^`]*(?:python|torchrun|accelerate launch)[^`]* -m (milo_latent[.\w]+)|(?:[^`]*/)?milo-latent"
COMMAND = re.compile(rf"^ *(?:{PROGRAM}) ([^…]+)$")
SCRIPT = re.compile(r"^ *python ((?:benchmarks|docs|examples)/\w+\.py)([^…]*)$")
NUMBER = re.compile(r"\| *[-+]?\d+\.\d|\d\.\d+ ?(?:%|dB|GiB|MiB|seconds|ms)\b")
PROOF = re.compile(r"python |milo-latent |tests?/\w|test_\w+\.py|benchmarks/\w|benchmarks\.md#|notebooks/\w|Spearman")
END = re.compile(r" *(?:#| \|).*")  # a comment, or alternatives


def whole_lines(text):
    """Return lines with what continues them, but those whose arguments are a shell function's."""
    return [line for line in text.replace("\\\n", " ").splitlines() if '"$@"' not in line]


def commands(text):
    """Return the module, or None for `milo-latent`, and the arguments of every command that begins a line."""
    return [(found[1], shlex.split(END.sub("", found[2]))) for found in map(COMMAND.match, whole_lines(text)) if found]


def parse_only(parse):
    def parse_and_end(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise SystemExit(0)

    return parse_and_end


def exit_code(module, arguments, monkeypatch):
    """Parse the arguments of a command without running it; return 0 where they are accepted, else 2."""
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only(argparse.ArgumentParser.parse_args))
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module or "milo_latent.cli").main(arguments)
    return end.value.code


LEAST = {"README.md": 15, "docs/fine_tuning.md": 9, "docs/scoring.md": 14, "docs/benchmarks.md": 3}  # commands
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", DOCUMENTS)
def test_commands_of_a_page_are_accepted(page, repository, monkeypatch):
    found = commands((repository / page).read_text())
    assert len(found) >= LEAST.get(page, 0)
    for module, arguments in found:
        shown = f"{module or 'milo-latent'} {shlex.join(arguments)}"
        assert exit_code(module, arguments, monkeypatch) == 0, f"{page} shows what is refused: {shown}"


def scripts(text):
    """Return the path and the arguments of every script of the repository whose command begins a line."""
    return [(found[1], shlex.split(END.sub("", found[2]))) for found in map(SCRIPT.match, whole_lines(text)) if found]


def script_exit_code(path, arguments, monkeypatch):
    """Parse the arguments of a script without running it; return 0 where they are accepted, else 2."""
    if "add_argument(" not in path.read_text():
        return 2 if arguments else 0
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        patch.setattr(sys, "argv", [str(path), *arguments])
        name = "parse_known_args" if "parse_known_args(" in path.read_text() else "parse_args"
        patch.setattr(argparse.ArgumentParser, name, parse_only(getattr(argparse.ArgumentParser, name)))
        with pytest.raises(SystemExit) as end:
            module.main()
    return end.value.code


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if scripts((ROOT / page).read_text())])
def test_scripts_of_a_page_take_the_options_that_are_shown(page, repository, monkeypatch):
    for script, arguments in scripts((repository / page).read_text()):
        shown = f"{script} {shlex.join(arguments)}"
        assert script_exit_code(repository / script, arguments, monkeypatch) == 0, f"{page}: {shown}"


def test_a_wrong_option_of_a_script_is_found(repository, monkeypatch):
    ((script, arguments),) = scripts("python benchmarks/flops.py --no-such-option  # comment")
    assert script_exit_code(repository / script, arguments, monkeypatch) == 2


@pytest.mark.parametrize("page", DOCUMENTS)
def test_figures_have_their_command_or_test_in_the_same_section(page, repository):
    for section in re.split(r"(?m)^(?=#{1,4} )", (repository / page).read_text()):
        assert not NUMBER.search(section) or PROOF.search(section), f"{page}: {section[:60]}"


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
