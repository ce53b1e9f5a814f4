"""Folders of results: each is of the file, the weights and the settings that it should be, or is made anew."""

import json
import os
import warnings

import pytest
import torch

from milo_latent.cli import main
from milo_latent.files import write_image
from milo_latent.jobs import find_jobs, run_jobs
from milo_latent.provenance import FolderRecord, weights_digest
from milo_latent.testing import tiny_metric, tiny_pipeline

MADE = {"weights": "abc", "seed": 0}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    return tmp_path / "in"


def process(folder, made=MADE, work=None):
    """Write what each file holds and what it was made with; return how many were made and how many were there."""
    work = work or (lambda path, result: result.write_text(path.read_text() + json.dumps(made)))
    jobs = find_jobs([folder], folder.parent / "out", suffixes=frozenset({".txt"}), suffix=".txt")
    report = run_jobs(jobs, work, made=made)
    assert not report.failed, report.failed
    return len(report.made), len(report.skipped)


def results(folder):
    return {path.name: path.read_text() for path in (folder.parent / "out").iterdir()}


def test_what_is_up_to_date_is_left_alone(folder):
    assert process(folder) == (3, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert process(folder) == (0, 3)
    assert results(folder).keys() == {"a.txt", "b.txt", "c.txt"}


def test_a_file_that_changed_is_processed_anew_and_that_is_said(folder):
    process(folder)
    (folder / "b.txt").write_text("d")
    os.utime(folder / "b.txt", ns=(0, 1))
    with pytest.warns(UserWarning, match=r"1 results are made anew, as the files .* changed: b\.txt"):
        assert process(folder) == (1, 2)
    assert results(folder)["b.txt"].startswith("d")


@pytest.mark.parametrize("changed", [{"seed": 5}, {"weights": "other"}, {"tile": 320}])
def test_other_settings_are_said_and_every_result_is_made_anew(folder, changed):
    process(folder)
    with pytest.warns(UserWarning, match=rf"3 results are made anew, as {next(iter(changed))} changed: a\.txt"):
        assert process(folder, MADE | changed) == (3, 0)
    assert results(folder)["a.txt"] == "a" + json.dumps(MADE | changed)
    with pytest.warns(UserWarning, match="made anew"):
        assert process(folder) == (3, 0)


def test_a_result_of_an_interrupted_work_is_made_anew(folder):
    def stop_behind(path, result):
        result.write_text("of other settings")
        if path.name == "b.txt":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process(folder, work=stop_behind)
    (folder.parent / "out" / "a.txt").unlink()
    with pytest.warns(UserWarning, match=r"1 results are made anew, .*: b\.txt"):
        assert process(folder) == (3, 0)
    assert all("seed" in text for text in results(folder).values())


def test_a_file_that_is_no_result_of_ours_is_not_replaced(folder):
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "b.txt").write_text("mine")
    jobs = find_jobs([folder], folder.parent / "out", suffixes=frozenset({".txt"}), suffix=".txt")
    report = run_jobs(jobs, lambda path, result: result.write_text(path.read_text()), made=MADE)
    assert list(report.failed) == [folder / "b.txt"]
    assert "--overwrite replaces it, --skip-existing leaves it" in report.failed[folder / "b.txt"]
    assert results(folder) == {"a.txt": "a", "b.txt": "mine", "c.txt": "c"}


def test_a_damaged_record_never_lets_a_stale_result_pass(folder):
    process(folder)
    path, out = folder.parent / "out.record", folder.parent / "out"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        for seed, allowed in ((0, {True, False}), (1, {False})):
            record = FolderRecord(out, MADE | {"seed": seed})
            assert {record.is_current(out / f"{name}.txt", folder / f"{name}.txt") for name in "abc"} <= allowed
    path.write_bytes(content + b"4e, a line that a killed process left")
    (folder / "d.txt").write_text("d")
    assert process(folder) == (1, 3)
    assert process(folder) == (0, 4)


def test_the_digest_tells_values_settings_and_dtypes_apart():
    pipelines = [tiny_pipeline(), tiny_pipeline(seed=1), tiny_pipeline().to(torch.bfloat16)]
    pipelines.append(tiny_pipeline(prediction_type="v_prediction"))
    parts = [pipeline.components for pipeline in pipelines]
    parts += [parts[0] | {"metric": tiny_metric()}, parts[0] | {"prompt": torch.ones(2)}]
    changed = tiny_pipeline()
    with torch.no_grad():
        changed.unet.conv_out.bias[0] = torch.nextafter(changed.unet.conv_out.bias[0], torch.tensor(9.0))
    digests = [weights_digest(each) for each in (*parts, changed.components)]
    assert len(set(digests)) == 7
    assert weights_digest(tiny_pipeline().components) == digests[0]


@pytest.mark.filterwarnings("default::UserWarning")  # as for users, not as errors
def test_restored_photos_of_another_seed_or_model_are_made_anew(photo, tmp_path, capsys):
    for seed in (0, 1):
        tiny_pipeline(seed=seed).save_pretrained(tmp_path / f"model{seed}")
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "a.png").write_bytes(photo.read_bytes())

    def restore(source, *arguments, model=0):
        model = str(tmp_path / f"model{model}")
        assert main(["restore", str(source), "--model", model, "--device", "cpu", "--steps", "1", *arguments]) == 0
        return capsys.readouterr()

    assert "1 photos" in restore(photos, "-o", str(out)).out
    assert "1 were there already" in restore(photos, "-o", str(out)).out
    for arguments, model, reason in ((["--seed", "5"], 0, "seed"), (["--seed", "5"], 1, "weights")):
        told = restore(photos, "-o", str(out), *arguments, model=model)
        assert "0 were there already" in told.out
        assert f"1 results are made anew, as {reason} changed" in told.err
        restore(photo, "-o", str(tmp_path / "alone.png"), *arguments, "--overwrite", model=model)
        assert (out / "a.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    entry = json.loads((tmp_path / "out.record").read_bytes().splitlines()[-1][9:])
    assert entry["input"] == f"a.png {(photos / 'a.png').stat().st_size} {(photos / 'a.png').stat().st_mtime_ns}"
    assert entry["seed"] == "5"
    assert len(entry["weights"]) == 64


@pytest.mark.filterwarnings("default::UserWarning")  # as for users, not as errors
def test_latents_of_another_vae_or_with_other_tiles_are_made_anew(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "a.png", torch.rand(1, 3, 32, 32))
    for seed in (0, 1):
        tiny_pipeline(seed=seed).save_pretrained(tmp_path / f"model{seed}")
    for command, source, output in (("encode", "photos", "latents"), ("decode", "latents", "back")):
        arguments = [command, str(tmp_path / source), "-o", str(tmp_path / output)]
        for model, more, count in ((0, [], 1), (0, [], 0), (1, [], 1), (1, ["--tile", "320"], 1)):
            capsys.readouterr()
            assert main([*arguments, "--model", str(tmp_path / f"model{model}"), *more]) == 0
            assert f": {count} " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["restore", "encode"])
def test_a_photo_is_not_its_own_result(photo, tmp_path, capsys, command):
    before = photo.read_bytes()
    link = tmp_path / ("link.png" if command == "restore" else "link.npy")
    link.hardlink_to(photo)
    for output in [photo, link] if command == "restore" else [link]:
        assert main([command, str(photo), "-o", str(output)]) == 1
        assert "which would be overwritten" in capsys.readouterr().err
    assert photo.read_bytes() == before
