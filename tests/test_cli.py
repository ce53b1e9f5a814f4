"""The command line: right results for odd inputs, one clear line and a non-zero exit for bad ones."""

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from official_checkpoints import official_metric_file
from PIL import Image

from milo_latent import __version__, batches, load_restorer, restore_image
from milo_latent.cli import build_parser, main
from milo_latent.cli.common import TILE
from milo_latent.files import (
    open_photo,
    read_image,
    read_latents,
    read_latents_metadata,
    write_image,
    write_latents,
)
from milo_latent.latents.codec import SMALLEST_TILE
from milo_latent.metric.loading import OFFICIAL
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration import restore as restoration
from milo_latent.testing import latent_pair, tiny_metric, tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder of tiny random networks, with a metric."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=tiny_metric())
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def restore(model):
    def run(*arguments):
        return main(["restore", *map(str, arguments), "--model", model, "--steps", "2", "--device", "cpu"])

    return run


def one_error_line(capsys):
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("milo-latent:")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_restore_writes_a_photo_of_the_same_size_and_says_so(restore, photo, capsys):
    assert restore(photo) == 0
    output = photo.with_name("photo_restored.png")
    assert read_image(output).shape == read_image(photo).shape
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"denoise: {photo} -> {output} (61x45 to 61x45")
    assert "2 steps, MILO guidance" in line
    assert line.endswith(" s")


def test_sr_enlarges_four_times(restore, photo, tmp_path):
    assert restore(photo, "-o", tmp_path / "large.png", "--task", "sr") == 0
    assert read_image(tmp_path / "large.png").shape == (1, 3, 180, 244)


def test_a_folder_is_restored_and_gone_on_with(restore, photo, tmp_path, capsys):
    folder, output = tmp_path / "photos", tmp_path / "results"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    assert restore(folder, "-o", output) == 1
    message = capsys.readouterr().err
    assert "2 photos" in message
    assert "1 failed:" in message
    assert message.splitlines()[-1].startswith("milo-latent: broken.png: Expected a complete image")
    assert restore(photo, "-o", tmp_path / "alone.png") == 0
    assert (output / "a.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    (folder / "broken.png").unlink()
    before = (output / "a.png").stat().st_mtime_ns
    (output / "b.png").unlink()
    capsys.readouterr()
    assert restore(folder, "-o", output) == 0
    assert "1 photos" in (line := capsys.readouterr().out)
    assert "1 were there already" in line
    assert (output / "a.png").stat().st_mtime_ns == before
    assert (output / "b.png").exists()


def test_photos_of_one_size_are_restored_together_and_nearly_as_alone(restore, tmp_path, monkeypatch, capsys):
    """Each in its own mode, with its own depth, and with the same seed."""
    folder, rng, seen = tmp_path / "photos", np.random.default_rng(0), []
    folder.mkdir()
    for index, mode in enumerate(("RGB", "L", "RGBA", "RGB", "RGB")):
        size = (50, 44) if index == 3 else (45, 61)
        Image.fromarray(rng.integers(0, 256, (*size, 4), dtype=np.uint8)).convert(mode).save(folder / f"{index}.png")
    (folder / "1a.png").write_bytes(b"no image")
    real = restoration.restore
    monkeypatch.setattr(restoration, "restore", lambda image, *given: seen.append(len(image)) or real(image, *given))
    assert restore(folder, "-o", tmp_path / "alone") == restore(folder, "-o", tmp_path / "one", "--batch", 1) == 1
    assert seen == [1] * 10
    assert restore(folder, "-o", tmp_path / "together", "--batch", 4, "--upscale", 2) == 1
    assert seen[10:] == [3, 1, 1]  # 0, 1, 2 of the four that were read; 3; 4
    assert "1a.png: Expected a complete image" in capsys.readouterr().err
    assert restore(folder, "-o", tmp_path / "alone", "--upscale", 2, "--overwrite") == 1
    assert len(list((tmp_path / "together").glob("*.png"))) == 5
    for path in (tmp_path / "together").glob("*.png"):
        one, other = (np.asarray(Image.open(each), np.int16) for each in (path, tmp_path / "alone" / path.name))
        assert abs(one - other).max() <= 1
        assert (one != other).mean() < 1e-3
    for name in ("0.png", "4.png"):
        (tmp_path / "together" / name).unlink()
    seen.clear()
    assert restore(folder, "-o", tmp_path / "together", "--batch", 4, "--upscale", 2) == 1
    assert seen == [2]  # the two that are missing, and none of the others
    monkeypatch.setattr(batches, "LARGEST_BATCH", 2 * 4 * 45 * 61)
    seen.clear()
    assert restore(folder, "-o", tmp_path / "few", "--batch", 4, "--upscale", 2) == 1
    assert seen == [2, 2, 1]  # 0, 1; 2, 4; 3


def test_batches_that_cannot_be_are_refused(restore, photo, capsys):
    assert restore(photo, "--batch", 0) == 1
    assert "at least 1 photo, got 0" in one_error_line(capsys)


def test_folders_whose_names_hold_dots_have_results_of_their_own(restore, photo, tmp_path, monkeypatch, capsys):
    for name in ("trip.2023", "trip.2024"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(photo.read_bytes())
        assert restore(tmp_path / name) == 0
        assert "1 photos" in capsys.readouterr().out
        assert (tmp_path / f"{name}_restored" / "a.png").is_file()
    monkeypatch.chdir(tmp_path / "trip.2023")
    assert restore(".") == 0
    assert "1 were there already" in capsys.readouterr().out  # the same results as from outside


def test_a_folder_is_not_its_own_result(restore, photo, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(photo.read_bytes())
    assert restore(folder, "-o", folder) == 1
    assert "another folder for the results" in one_error_line(capsys)
    (folder / "a.jpg").write_bytes(photo.read_bytes())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--tile", "100"], "at least 320 pixels, got 100"),
        (["--steps", "0"], "`num_inference_steps` to be a whole number of at least 1"),
        (["--guidance", "5"], "`milo_scale` in [0, 1]"),
        (["--upscale", "0"], "`upscale` above 0"),
        (["--noise-aug", "5000"], "`noise_aug` to be a timestep"),
        (["--task", "unaligned_face"], "`detector` of faces"),
        (["--prompt", "a dog"], "takes none"),
        (["--cfg-scale", "4"], "this model takes no prompt"),
    ],
)
def test_options_that_cannot_work_are_told_once_for_a_folder(model, photo, tmp_path, capsys, arguments, match):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_bytes(photo.read_bytes())
    assert main(["restore", str(folder), "--model", model, *arguments]) == 1
    assert match in (line := one_error_line(capsys))
    assert "a.png" not in line
    assert not (tmp_path / "photos_restored").exists()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGB"])
def test_grey_photos_stay_grey(restore, tmp_path, mode):
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "grey.png")
    assert restore(tmp_path / "grey.png") == 0
    result = read_image(tmp_path / "grey_restored.png")
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 1], result[:, 2])
    assert result.std() > 0


def test_names_that_are_no_text_are_shown_and_kept(restore, model, photo, tmp_path, capfd):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    command = [sys.executable, "-m", "milo_latent.cli"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    arguments = ["restore", str(tmp_path / name), "--model", model, "--steps", "1", "-o", str(tmp_path / "out.png")]
    done = subprocess.run([*command, *arguments], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "ref", tmp_path / "dist"]
    for folder in folders:
        folder.mkdir()
        (folder / name).write_bytes(photo.read_bytes())
    table = tmp_path / "t.csv"
    assert main(["score", "--ref", str(folders[0]), "--dist", str(folders[1]), "--csv", str(table)]) == 0
    assert b"caf\xe9" in table.read_bytes()


def test_the_photo_is_enlarged_as_asked(restore, photo, tmp_path):
    assert restore(photo, "-o", tmp_path / "large.png", "--upscale", 1.5) == 0
    assert Image.open(tmp_path / "large.png").size == (92, 68)


def test_a_metric_of_ones_own_is_used_and_must_fit(restore, photo, tmp_path, capsys):
    tiny_metric(channels=3).save_pretrained(tmp_path / "metric")
    assert restore(photo, "--metric", tmp_path / "metric") == 1
    assert "3 channels" in one_error_line(capsys)


def test_the_same_seed_gives_the_same_file(restore, photo, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert restore(photo, "-o", tmp_path / f"{name}.png", "--seed", seed) == 0
    first, second, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second != other


def test_guidance_and_curriculum_reach_the_pipeline(model, tmp_path, monkeypatch):
    """A tiny model's 8-bit results of different curricula may agree, so the settings themselves are looked at."""
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "a.png")
    guides = []
    original = DiffBIRPipeline.__call__

    def call(pipeline, **arguments):
        guides.append(arguments["callback_on_step_end"])
        return original(pipeline, **arguments)

    monkeypatch.setattr(DiffBIRPipeline, "__call__", call)
    command = ["restore", str(tmp_path / "a.png"), "--model", model, "--steps", "1", "--device", "cpu", "-o"]
    options = [["--guidance", "0"], ["--curriculum", "linear"], ["--guidance", "0.25", "--curriculum", "constant"], []]
    for index, each in enumerate(options):
        assert main([*command, str(tmp_path / f"{index}.png"), *each]) == 0
    assert guides[0] is None
    assert [(guide.milo_scale, guide.schedule) for guide in guides[1:]] == [
        (0.5, "linear"), (0.25, "constant"), (0.5, "cosine"),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16", "1"])
def test_every_kind_of_png_is_restored(restore, tmp_path, mode):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    if mode == "I;16":
        Image.fromarray(array[..., 0].astype(np.uint16) * 257).save(tmp_path / "a.png")
    else:
        picture = Image.fromarray(array).convert(mode)
        if mode == "RGBA":
            picture.putalpha(Image.fromarray(array[..., 0]))
        picture.save(tmp_path / "a.png")
    assert restore(tmp_path / "a.png") == 0
    restored = Image.open(tmp_path / "a_restored.png")
    assert restored.size == (30, 20)
    assert restored.mode == ("RGBA" if mode == "RGBA" else "RGB")
    if mode == "RGBA":
        assert np.array_equal(np.asarray(restored)[..., 3], array[..., 0])


def test_an_image_of_one_pixel_is_restored(restore, tmp_path):
    Image.new("RGB", (1, 1), (200, 30, 90)).save(tmp_path / "a.png")
    assert restore(tmp_path / "a.png") == 0
    assert Image.open(tmp_path / "a_restored.png").size == (1, 1)


def make_bad(tmp_path, kind):
    path = tmp_path / "bad.png"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path = tmp_path / "bad.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "empty", "folder"])
def test_bad_files_give_one_line_and_no_output(restore, tmp_path, capsys, kind):
    path = make_bad(tmp_path, kind)
    before = set(tmp_path.iterdir())
    assert restore(path) == 1
    assert path.name in one_error_line(capsys)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["-o", "absent/a.png"], "absent, which does not exist"),
        (["-o", "a.txt"], "ends in one of"),
        (["--guidance", "2"], "`milo_scale` in [0, 1]"),
        (["--guidance", "nan"], "`milo_scale` in [0, 1]"),
        (["--steps", "0"], "at least 1"),
        (["--device", "abacus"], "got 'abacus'"),
    ],
)
def test_bad_arguments_give_one_line(model, photo, capsys, arguments, match):
    assert main(["restore", str(photo), "--model", model, *arguments]) == 1
    assert match in one_error_line(capsys)
    assert not photo.with_name("photo_restored.png").exists()


def test_a_model_that_does_not_exist_is_named(photo, capsys):
    assert main(["restore", str(photo), "--model", "no-such-model"]) == 1
    assert "'no-such-model'" in one_error_line(capsys)


def test_a_failed_write_leaves_the_old_file(restore, photo, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.png"
    output.write_bytes(b"old")
    assert restore(photo, "-o", output) == 1
    told = one_error_line(capsys)
    assert "out.png, which exists. --overwrite replaces it, --skip-existing leaves it" in told

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert restore(photo, "-o", output, "--overwrite") == 1
    assert "No space left" in one_error_line(capsys)
    assert output.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "out.png"}


def test_wrong_options_and_no_command_exit_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["restore"])
    assert caught.value.code == 2
    assert main([]) == 2
    assert "restore" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["restore"], ["score"], ["encode"]])
def test_help_reads(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: milo-latent" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["milo-latent"] == __version__
    assert lines["torch"] == torch.__version__
    assert lines.keys() == {"milo-latent", "torch", "diffusers", "python", "devices"}
    assert "cpu (" in lines["devices"]


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_encode_writes_latents_that_read_again(model, photo, tmp_path, suffix, capsys):
    output = tmp_path / f"photo.{suffix}"
    assert main(["encode", str(photo), "-o", str(output), "--model", model]) == 0
    assert read_latents(output).shape == (1, 4, 6, 8)
    if suffix == "safetensors":
        assert read_latents_metadata(output)["source_size"] == "61x45"


def test_score_of_latents_is_the_metric_s(model, tmp_path, capsys):
    ref, dist = latent_pair()
    write_latents(tmp_path / "ref.npy", ref)
    write_latents(tmp_path / "dist.npy", dist)
    files = ["--ref", str(tmp_path / "ref.npy"), "--dist", str(tmp_path / "dist.npy")]
    assert main(["score", *files, "--weights", model]) == 0
    expected = tiny_metric()(ref=ref, dist=dist).item()
    assert f"error {expected:.10f}" in capsys.readouterr().out


def test_the_official_pairs_score_their_recorded_values(shared, capsys):
    folder = shared / "milo_official"
    for kind, weights, suffix, expected in (
        ("latents", "MILO_latent.pth", "npy", "error 0.667855"),
        ("images", "MILO.pth", "png", "MOS 2.4477"),
    ):
        files = [f"--{name}={folder / kind / f'{name}.{suffix}'}" for name in ("ref", "dist")]
        assert main(["score", *files, "--weights", str(folder / weights)]) == 0
        assert expected in capsys.readouterr().out


def test_images_are_scored_without_being_told_the_weights(photo, monkeypatch, tmp_path, capsys):
    assert main(["score", "--ref", str(photo), "--dist", str(photo)]) == 0
    out = capsys.readouterr().out
    assert "error 0.0000000000, MOS " in out
    assert "\nMILO_I (milo-image)" in out
    file = official_metric_file(tiny_metric(channels=3), tmp_path / "MILO.pth")
    monkeypatch.setitem(OFFICIAL, "official-image", file)
    assert main(["weights", "pull", "official-image"]) == 0
    assert main(["score", "--ref", str(photo), "--dist", str(photo)]) == 0
    assert "MILO_I (official-image)" in capsys.readouterr().out


def test_score_refuses_mixtures(photo, tmp_path, capsys):
    write_latents(tmp_path / "a.npy", torch.rand(1, 4, 16, 16))
    assert main(["score", "--ref", str(photo), "--dist", str(tmp_path / "a.npy")]) == 1
    assert "two images or two latent files" in one_error_line(capsys)


def test_results_that_are_there_are_replaced_or_left_as_asked(restore, photo, tmp_path, capsys):
    output = tmp_path / "out.png"
    output.write_bytes(b"old")
    assert restore(photo, "-o", output, "--skip-existing") == 0
    assert capsys.readouterr().out == f"restore: nothing to do, {output} is there already\n"
    assert output.read_bytes() == b"old"
    assert restore(photo, "-o", output, "--overwrite") == 0
    assert read_image(output).shape == (1, 3, 45, 61)
    with pytest.raises(SystemExit):
        main(["restore", str(photo), "--overwrite", "--skip-existing"])


def test_several_photos_patterns_and_folders_need_a_folder_for_their_results(
    restore, photo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("2023/a.png", "2024/a.png", "2024/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo.read_bytes())
    for inputs in (["photo.png", "2023"], ["20*/*.png"]):
        assert restore(*inputs) == 1
        assert "Expected -o FOLDER for the results of several photos" in one_error_line(capsys)
    assert restore("photo.png", "2024", "-o", "out") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("denoise: 2 photos of photo.png, 2024 -> out (0 were there already, ")
    assert told[1] == "skipped 1 (none of .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp): notes.txt"
    assert restore("20*/*.png", "-o", "out") == 0
    assert sorted(map(str, (tmp_path / "out").rglob("*.png"))) == [
        str(tmp_path / "out" / name) for name in ("2023/a.png", "2024/a.png", "a.png", "photo.png")
    ]
    assert restore("2024", "-r", "-o", "out/") == 0
    assert "1 were there already" in capsys.readouterr().out


class Pipe:
    """A standard stream of bytes."""

    def __init__(self, content=b"", terminal=False):
        self.buffer, self.terminal = io.BytesIO(content), terminal

    def isatty(self):
        return self.terminal


def test_a_photo_comes_from_standard_input_and_goes_to_standard_output(
    restore, model, photo, tmp_path, monkeypatch, capsys
):
    assert restore(photo, "-o", tmp_path / "whole.png") == 0
    capsys.readouterr()
    for inputs, output in (["-"], []), ([photo], ["-o", "-"]):
        monkeypatch.setattr(sys, "stdin", Pipe(photo.read_bytes()))
        monkeypatch.setattr(sys, "stdout", out := Pipe())
        assert restore(*inputs, *output) == 0
        assert out.buffer.getvalue() == (tmp_path / "whole.png").read_bytes()
        assert f"denoise: {inputs[0]} -> - (61x45 to 61x45, " in capsys.readouterr().err  # the line
    for kind in ("npy", "safetensors"):  # which decode tells apart
        monkeypatch.setattr(sys, "stdout", latents := Pipe())
        assert main(["encode", str(photo), "-o", "-", "--model", model, "--format", kind]) == 0
        monkeypatch.setattr(sys, "stdin", Pipe(latents.buffer.getvalue()))
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert main(["decode", "-", "-o", str(tmp_path / f"{kind}.png"), "--model", model]) == 0
        assert read_image(tmp_path / f"{kind}.png").shape[2:] == ((48, 64) if kind == "npy" else (45, 61))


def test_streams_that_cannot_be_used_are_refused(restore, photo, tmp_path, monkeypatch, capsys):
    assert restore("-", photo, "-o", tmp_path / "out") == 1
    assert "Expected one file with -" in one_error_line(capsys)
    (tmp_path / "photos").mkdir()
    assert restore(tmp_path / "photos", "-o", "-") == 1
    assert "Expected one file with -" in one_error_line(capsys)
    monkeypatch.setattr(sys, "stdout", Pipe(terminal=True))
    assert restore(photo, "-o", "-") == 1
    assert "got a terminal" in one_error_line(capsys)
    monkeypatch.setattr(sys, "stdin", Pipe(b"no image"))
    monkeypatch.setattr(sys, "stdout", out := Pipe())
    assert restore("-") == 1
    assert "standard-input, which is damaged" in one_error_line(capsys)
    assert out.buffer.getvalue() == b""


def test_quiet_prints_nothing_but_errors(restore, photo, tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(photo.read_bytes())
    capfd.readouterr()
    assert restore(tmp_path / "photos", "--quiet") == 0
    assert restore(photo, "--quiet") == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "photo/s" not in captured.err
    assert "it/s" not in captured.err
    assert restore(photo, "--quiet") == 1
    assert "--overwrite" in capfd.readouterr().err


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_json_tells_what_was_read_written_left_out_and_failed(restore, model, photo, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(photo.read_bytes())
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "notes.txt").touch()
    assert restore(photos, "-o", tmp_path / "out", "--json", "--seed", "3") == 1
    answer = told(capsys)
    assert answer["command"] == "restore"
    assert answer["inputs"] == [str(photos / "a.png")]
    assert answer["outputs"] == [str(tmp_path / "out" / "a.png")]
    assert (answer["settings"]["seed"], answer["settings"]["task"]) == (3, "denoise")
    assert answer["seconds"] > 0
    assert [each["input"] for each in answer["skipped"]] == [str(photos / "notes.txt")]
    assert [each["input"] for each in answer["failed"]] == [str(photos / "broken.png")]
    assert "complete image" in answer["failed"][0]["reason"]
    for command, output in (("encode", "a.npy"), ("decode", "b.png")):
        source = photo if command == "encode" else tmp_path / "a.npy"
        assert main([command, str(source), "-o", str(tmp_path / output), "--model", model, "--json"]) == 0
        answer = told(capsys)
        assert (answer["inputs"], answer["outputs"]) == ([str(source)], [str(tmp_path / output)])
        assert answer["settings"]["model"] == model
    for command in (["weights", "list"], ["weights", "info", "nano"]):
        assert main([*command, "--json"]) == 0
        assert told(capsys).keys() >= {"inputs", "outputs", "settings", "seconds", "skipped", "failed"}


def test_score_takes_two_files_and_tells_error_and_mos_in_json(model, tmp_path, capsys):
    for name, latents in zip(("a", "b"), latent_pair(), strict=True):
        write_latents(tmp_path / f"{name}.npy", latents)
    files, table = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")], tmp_path / "t.csv"
    assert main(["score", *files, "--weights", model, "--json", "--csv", str(table)]) == 0
    answer = told(capsys)
    expected = tiny_metric()(ref=latent_pair()[0], dist=latent_pair()[1]).item()
    assert answer["mean"]["error"] == pytest.approx(expected)
    assert 0 < answer["mean"]["mos"] < 5
    assert answer["pairs"][0].keys() == {"name", "error", "mos"}
    assert (answer["inputs"], answer["outputs"]) == (files, [str(table)])
    assert main(["score", "--ref", files[0], "--dist", files[1], "--weights", model]) == 0
    assert f"error {expected:.10f}" in capsys.readouterr().out
    assert main(["score", *files[::-1], "--weights", model]) == 0
    assert f"error {expected:.10f}" not in capsys.readouterr().out
    for wrong in ([files[0]], ["--ref", files[0]], ["--dist", files[0]]):
        assert main(["score", *wrong, "--weights", model]) == 1
        assert "milo-latent score REF DIST" in one_error_line(capsys)


def test_tables_and_maps_that_are_there_are_refused_left_or_replaced(model, tmp_path, capsys):
    for name, latents in zip(("a", "b"), latent_pair(), strict=True):
        write_latents(tmp_path / f"{name}.npy", latents)
    command = ["score", str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), "--weights", model]
    for option, name in (("--csv", "t.csv"), ("--map", "m.png")):
        output = tmp_path / name
        output.write_bytes(b"mine")
        assert main([*command, option, str(output)]) == 1
        assert f"{name}, which exists. --overwrite replaces it" in one_error_line(capsys)
        assert main([*command, option, str(output), "--skip-existing"]) == 0
        assert capsys.readouterr().out == f"score: nothing to do, {output} is there already\n"
        assert output.read_bytes() == b"mine"
        assert main([*command, option, str(output), "--overwrite"]) == 0
        assert output.read_bytes() != b"mine"


@pytest.mark.parametrize("command", ["encode", "score"])
def test_devices_and_dtypes_are_those_that_are_asked_for(model, photo, tmp_path, capsys, command):
    write_latents(tmp_path / "a.npy", torch.randn(1, 4, 16, 16))
    if command == "encode":
        arguments, output = ["encode", str(photo), "-o"], "half.npy"
        assert main([*arguments, str(tmp_path / "a8.npy"), "--model", model]) == 0
        assert main([*arguments, str(tmp_path / output), "--model", model, "--dtype", "bfloat16"]) == 0
        half, whole = read_latents(tmp_path / output), read_latents(tmp_path / "a8.npy")
        assert not torch.equal(half, whole)
        assert torch.allclose(half, whole, atol=0.1 * whole.abs().max().item())
        arguments = [*arguments, str(tmp_path / "b.npy"), "--model", model]
    else:
        arguments = ["score", str(tmp_path / "a.npy"), str(tmp_path / "a.npy"), "--weights", model]
        assert main([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--device", "abacus"]) == 1
    assert "got 'abacus'" in one_error_line(capsys)


def test_help_names_the_least_tile():
    assert f"at least {SMALLEST_TILE}" in TILE


def test_the_list_of_weights_says_what_each_is_for(capsys):
    assert main(["weights", "list"]) == 0
    text = capsys.readouterr().out
    for words in (
        "milo-image  A MILO_I (for images)",
        "Stable Diffusion 1.x and 2.x",
        "nano  A complete, small restoration",
    ):
        assert words in text
    assert text.count("\n  ") == 5  # the place of each


def test_results_say_how_they_were_made(restore, model, photo, tmp_path):
    for name, seed in (("a.png", 3), ("b.jpg", 3), ("c.bmp", 3)):
        assert restore(photo, "-o", tmp_path / name, "--seed", seed, "--guidance", "0.25") == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["Software"] == f"milo_latent {__version__}"
        record = json.loads(picture.text["milo_latent"])
    with Image.open(tmp_path / "b.jpg") as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"ASCII\0\0\0milo_latent: " + json.dumps(record).encode()
    assert (record["model"], len(record["weights"])) == (model, 64)
    assert {"task": "denoise", "seed": 3, "milo_scale": 0.25, "schedule": "cosine", "steps": 2}.items() <= (
        record["settings"].items()
    )
    again = restore_image(read_image(photo), model=load_restorer(model, device="cpu"), **record["settings"])
    assert (read_image(tmp_path / "a.png") - again).abs().max() <= 0.5 / 255 + 1e-6
    assert main(["encode", str(photo), "-o", str(tmp_path / "a.npy"), "--model", model]) == 0
    assert main(["decode", str(tmp_path / "a.npy"), "-o", str(tmp_path / "d.png"), "--model", model]) == 0
    with Image.open(tmp_path / "d.png") as picture:
        assert json.loads(picture.text["milo_latent"])["vae"] == model


def test_what_a_result_does_not_keep_is_told_in_a_line(restore, photo, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    with Image.open(photo) as picture:
        picture.putalpha(90)
        picture.save(tmp_path / "photos" / "a.tif", save_all=True, append_images=[picture])
    assert restore(tmp_path / "photos" / "a.tif", "-o", tmp_path / "a.jpg") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["not kept: 1 further pages or frames.", "not kept: transparency, which .jpg cannot hold."]
    assert restore(tmp_path / "photos") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["1 photos: not kept: 1 further pages or frames."]


def test_16_bit_photos_stay_so(restore, photo, tmp_path):
    deep = SimpleNamespace(depth=16, exif=None, dpi=(300, 300), profiled=False)
    write_image(tmp_path / "deep.png", read_image(photo) * 0.999, like=deep)
    assert restore(tmp_path / "deep.png") == 0
    result = open_photo(tmp_path / "deep_restored.png")
    assert result.depth == 16
    assert result.dpi == pytest.approx((300, 300), abs=0.1)
    assert not torch.equal(result.image, result.image.mul(255).round().div(255))


def commands_of(parser, name=()):
    """Yield the words and the parser of every command that does something."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not found:
        yield name, parser
    for word, each in found[0].choices.items() if found else ():
        yield from commands_of(each, (*name, word))


def test_the_help_of_every_command_ends_with_examples_that_are_accepted():
    parser = build_parser()
    commands = dict(commands_of(parser))
    assert len(commands) == 12
    for words, command in commands.items():
        lines = command.format_help().splitlines()
        examples = [line.split("#")[0] for line in lines if line.startswith("  milo-latent ")]
        assert len(examples) >= 2, words
        for example in examples:
            arguments = shlex.split(re.sub(" [<>].*", "", example))[1:]
            assert tuple(arguments[: len(words)]) == words
            assert parser.parse_args(arguments).run == command.get_default("run")


def test_every_command_answers_in_json_or_not_at_all_and_all_that_compute_take_a_device():
    for words, command in commands_of(build_parser()):
        options = command._option_string_actions.keys()
        assert {"--json", "--quiet"} <= options
        computes = words[0] not in ("weights", "convert")
        assert ({"--device", "--dtype"} <= options) == computes, words
        files = words[0] in ("restore", "encode", "decode", "score")
        assert ({"--overwrite", "--skip-existing"} <= options) == files, words


def test_completion_needs_a_library_and_says_which(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 1
    assert 'pip install "milo_latent[completion]"' in one_error_line(capsys)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_options_and_files(shell, capsys):
    pytest.importorskip("shtab", reason="needs shtab, of the extra `completion`")
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    for word in ("restore", "benchmark", "skip-existing", "bfloat16", "unaligned_face"):
        assert word in script
    if shell == "bash":
        assert "_shtab_milo_latent_restore_pos_0_COMPGEN=_shtab_compgen_files" in script
        assert "_shtab_milo_latent_restore___tile_COMPGEN" not in script  # a number
