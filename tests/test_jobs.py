"""The files of a run: folders, patterns, structure, and what becomes of results that are there already."""

import os

import pytest

from milo_latent.files import IMAGE_SUFFIXES, LATENT_SUFFIXES
from milo_latent.jobs import THERE, find_jobs, run_jobs


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Files whose contents are their names, in the working folder."""
    for name in ("a.png", "b.jpg", "c.txt", ".hidden.png", "2023/a.png", "2023/deep/d.PNG", ".trash/e.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def find(inputs, output, suffixes=IMAGE_SUFFIXES, suffix=".png", **options):
    return find_jobs(inputs, output, suffixes=suffixes, suffix=suffix, **options)


def names(jobs):
    return {str(source): str(result) for source, result in jobs.results.items()}


def copy(source, result):
    return result.write_text(source.read_text())


def test_a_folder_is_taken_without_its_folders_and_says_what_it_leaves_out(photos):
    jobs = find(["photos"], "out")
    assert names(jobs) == {"photos/a.png": "out/a.png", "photos/b.jpg": "out/b.png"}
    reasons = {path.name: reason for path, reason in jobs.skipped.items()}
    assert reasons.keys() == {"c.txt", "2023"}
    assert "-r takes what is in it" in reasons["2023"]
    assert "none of .bmp, .jpeg" in reasons["c.txt"]


def test_recursion_keeps_the_structure(photos):
    jobs = find(["photos"], "out", recursive=True)
    assert names(jobs) == {
        "photos/a.png": "out/a.png", "photos/b.jpg": "out/b.png",
        "photos/2023/a.png": "out/2023/a.png", "photos/2023/deep/d.PNG": "out/2023/deep/d.png",
    }  # fmt: skip
    report = run_jobs(jobs, copy, made={})
    assert (photos.parent / "out" / "2023" / "deep" / "d.png").read_text() == "2023/deep/d.PNG"
    assert len(report.made) == 4
    again = run_jobs(find(["photos"], "out/", recursive=True), copy, made={})
    assert (len(again.made), list(again.skipped.values()).count(THERE)) == (0, 4)


def test_results_in_a_folder_of_the_photos_are_not_taken_for_photos(photos):
    for _ in range(2):
        jobs = find(["photos"], "photos/out", recursive=True)
        assert (len(jobs.results), len(jobs.skipped)) == (4, 1)
        run_jobs(jobs, copy, made={})
    assert len(find(["photos/**/*.jpg"], "photos/out").results) == 1
    latents = find(["photos"], "photos", suffix=".npy", recursive=True)  # beside the photos, which is no such case
    assert len(latents.results) == 8


def test_patterns_keep_the_folders_below_their_first_wildcard(photos):
    assert names(find(["photos/20*/*.png"], "out")) == {"photos/2023/a.png": "out/2023/a.png"}
    assert names(find(["photos/*.jpg"], "out")) == {"photos/b.jpg": "out/b.png"}
    absolute = find([f"{photos}/**/*.[Pp][Nn][Gg]"], "out")
    assert sorted(names(absolute).values()) == ["out/2023/a.png", "out/2023/deep/d.png", "out/a.png"]
    (photos / "x[1].png").write_text("a name, not a pattern")
    assert names(find(["photos/x[1].png"], "out.png")) == {"photos/x[1].png": "out.png"}


def test_several_files_and_folders_go_into_one_folder(photos):
    assert sorted(names(find(["photos/b.jpg", "photos/2023"], "out")).values()) == ["out/a.png", "out/b.png"]
    assert list(names(find(["photos/b.jpg", "photos/b.jpg"], "out"))) == ["photos/b.jpg"]
    jobs = find(["photos/a.png", "photos/2023", "photos/b.jpg"], "out")
    assert names(jobs) == {"photos/b.jpg": "out/b.png"}
    assert {str(path) for path in jobs.failed} == {"photos/a.png", "photos/2023/a.png"}
    assert all("each name once" in reason for reason in jobs.failed.values())


@pytest.mark.parametrize("output", ["out/", "there"])
def test_one_file_goes_into_a_folder_that_ends_in_a_slash_or_is_there(photos, output):
    (photos.parent / "there").mkdir()
    jobs = find(["photos/b.jpg"], output)
    assert names(jobs) == {"photos/b.jpg": os.path.join(output, "b.png")}
    run_jobs(jobs, copy, made={})
    assert run_jobs(find(["photos/b.jpg"], output), copy, made={}).made == {}  # a folder is resumed
    assert find(["photos/b.jpg"], "b.webp").folder is None


@pytest.mark.parametrize(
    ("inputs", "output", "error", "match"),
    [
        (["photos/a.png", "absent.png"], "out", FileNotFoundError, r"got absent\.png, which does not exist"),
        (["photos/*.webp"], "out", FileNotFoundError, r"in photos/\*\.webp, found none"),
        (["photos/.trash/.."], "photos/", ValueError, "another folder for the results"),
        (["photos/a.png", "photos/b.jpg"], "photos", ValueError, "where photos/a.png would be replaced"),
        (["photos/a.png", "photos/b.jpg"], "out.png", FileExistsError, r"Expected a folder .* got the file out\.png"),
        (["photos"], "photos/a.png", FileExistsError, "Expected a folder"),
        (["photos/a.png"], "photos/b.jpg", FileExistsError, "--overwrite replaces it, --skip-existing leaves it"),
        (["photos/a.png"], "photos/a.png", ValueError, "which would be overwritten"),
        (["photos/a.png"], "a.txt", ValueError, "ends in one of"),
        (["photos/a.png"], "results", ValueError, "or a folder that ends in a slash, got results"),
        (["photos/a.png"], "absent/a.png", FileNotFoundError, "absent, which does not exist"),
    ],
)
def test_what_cannot_be_named_or_would_replace_something_is_refused(photos, inputs, output, error, match):
    with pytest.raises(error, match=match):
        find(inputs, output)


def test_a_folder_without_files_says_where_some_are(photos):
    for path in (photos / "a.png", photos / "b.jpg"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"found none\. -r takes those in its folders"):
        find(["photos"], "out")
    with pytest.raises(FileNotFoundError, match=r"found none\.$"):
        find(["photos"], "out", suffixes=LATENT_SUFFIXES, recursive=True)


def test_inputs_are_never_replaced_even_where_all_is_overwritten(photos):
    for inputs, output in ((["photos"], "photos"), (["photos/a.png", "photos/b.jpg"], "photos")):
        with pytest.raises(ValueError, match="another folder"):
            find(inputs, output, existing="overwrite")
    with pytest.raises(ValueError, match="overwritten"):
        find(["photos/a.png"], "photos/../photos/a.png", existing="overwrite")


def test_a_file_that_is_there_is_replaced_or_left_as_asked(photos):
    for existing, expected in (("skip", "mine"), ("overwrite", "b.jpg")):
        (photos.parent / "b.png").write_text("mine")
        report = run_jobs(find(["photos/b.jpg"], "b.png", existing=existing), copy, made={})
        assert (photos.parent / "b.png").read_text() == expected
        assert list(report.skipped.values()) == ([THERE] if existing == "skip" else [])


def test_a_folder_is_resumed_left_or_overwritten_as_asked(photos):
    out = photos.parent / "out"

    def run(seed, existing="resume"):
        work = lambda source, result: result.write_text(f"{source.name} {seed}")  # noqa: E731
        report = run_jobs(find(["photos"], "out", existing=existing), work, made={"seed": seed})
        return len(report.made), list(report.skipped.values()).count(THERE), len(report.failed)

    out.mkdir()
    (out / "a.png").write_text("mine")
    assert run(0) == (1, 0, 1)  # what the record does not know is someone's own
    assert run(0, "skip") == (0, 2, 0)
    assert run(1, "skip") == (0, 2, 0)  # whatever it was made of
    assert (out / "b.png").read_text() == "b.jpg 0"
    assert run(1, "overwrite") == (2, 0, 0)
    assert (out / "a.png").read_text() == "a.png 1"
    assert run(1) == (0, 2, 0)
    assert run(1, "overwrite") == (2, 0, 0)


def test_an_error_costs_a_folder_one_file_and_ends_the_run_of_one_file(photos):
    def fail(source, result):
        raise ValueError("no")

    report = run_jobs(find(["photos"], "out"), fail, made={})
    assert set(report.failed.values()) == {"no"}
    with pytest.raises(ValueError, match="no"):
        run_jobs(find(["photos/a.png"], "out.png"), fail, made={})
