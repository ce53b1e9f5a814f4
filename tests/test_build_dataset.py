"""Building a training set: labels, latents, shards; the same by any number of workers, after a kill, or at once."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from milo_latent.distortions import distort
from milo_latent.evaluation.agreement import Logistic
from milo_latent.evaluation.distortion_settings import SETTINGS
from milo_latent.evaluation.metrics import FullReference, by_name, psnr
from milo_latent.files import read_image
from milo_latent.testing import tiny_metric, tiny_pipeline
from milo_latent.training import build_dataset, pseudo_mos
from milo_latent.training.build_dataset import DatasetConfig, build, draw_settings, estimated_bytes, square
from milo_latent.training.data.fingerprints import metric_digests
from milo_latent.training.data.shards import PairSet
from milo_latent.training.pseudo_mos import (
    Calibration,
    Ensemble,
    calibrate,
    format_agreement,
    member_agreement,
    read_calibrations,
)

MEMBERS = ["psnr", "mae"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder of images, one of them damaged; a VAE; a MILO_I; calibrations."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "images").mkdir()
    for index in range(5):
        rows, columns = np.mgrid[0:80, 0:100]
        array = np.stack([rows * 3, columns * 2, (rows // 8 + columns // 8 + index) % 2 * 200], axis=2)
        Image.fromarray(array.astype(np.uint8)).save(folder / "images" / f"{index}.png")
    (folder / "images" / "2.png").write_bytes(b"not an image")
    tiny_pipeline().vae.save_pretrained(folder / "vae")
    tiny_metric(channels=3).save_pretrained(folder / "teacher")
    curves = {"psnr": Calibration(Logistic(5, 1, -25, -5), -60.0), "mae": Calibration(Logistic(5, 1, 0.1, -0.03), 0.0)}
    pseudo_mos.write_calibrations(folder / "calibrations.json", curves)
    return folder


def arguments(material, output, *more):
    return [
        *("--images", str(material / "images"), "--output", str(output), "--members", *MEMBERS),
        *("--calibrations", str(material / "calibrations.json"), "--vae", str(material / "vae"), "--side", "64"),
        *("--map-teacher", str(material / "teacher"), "--per-image", "4", "--images-per-shard", "2", *more),
    ]


@pytest.fixture(scope="module")
def built(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "set"
    build_dataset.main(arguments(material, output, "--keep-images"))
    return output


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shard-*"))}


def test_a_set_holds_pairs_labels_latents_and_maps(built):
    summary = json.loads((built / "dataset.json").read_text())
    assert summary["images"] == 4
    assert summary["pairs"] == 16
    assert len(summary["skipped"]) == 1
    assert summary["skipped"][0].startswith("2.png")
    pairs, images = PairSet(built, space="latents"), PairSet(built, space="images")
    ref, dist, dmos = pairs.pairs(torch.arange(16))
    assert ref.shape == dist.shape == (16, 4, 8, 8)
    assert pairs.maps.shape == (16, 1, 8, 8)
    assert dmos.min() >= 0
    clean, damaged, _ = images.pairs(torch.arange(16))
    assert clean.shape == damaged.shape == (16, 3, 64, 64)
    assert clean.max() <= 1
    assert (clean[0] == clean[3]).all()
    assert not (clean[3] == clean[4]).all()  # the next image begins


def test_labels_are_those_of_the_ensemble_for_the_distortion_named(material, built):
    images = PairSet(built, space="images")
    ensemble = Ensemble([by_name(name) for name in MEMBERS], read_calibrations(material / "calibrations.json"))
    ref, dist, dmos = images.pairs(torch.tensor([1]))
    setting = SETTINGS[int(load_file(built / "shard-00000.safetensors")["setting"][1])]
    assert torch.allclose(distort(ref, *setting, image_id="0"), dist, atol=1e-6)
    assert ensemble.labels(ref=ref, dist=dist).mean().item() == pytest.approx(dmos.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["high", "low", "center", "scale", "best"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1e300", "null", '"3"'])
def test_calibrations_that_are_not_finite_numbers_are_refused(tmp_path, name, value):
    written = {"high": 5, "low": 1, "center": -25, "scale": -5, "best": -60} | {name: "VALUE"}
    content = {"psnr": {"curve": {key: written[key] for key in written if key != "best"}, "best": written["best"]}}
    (tmp_path / "a.json").write_text(json.dumps(content).replace('"VALUE"', value))
    with pytest.raises(ValueError, match="Expected calibrations in"):
        read_calibrations(tmp_path / "a.json")
    with pytest.raises(ValueError, match="scale"):
        Calibration(Logistic(5, 1, -25, 0), -60)


def test_workers_change_nothing(material, built, tmp_path):
    build_dataset.main(arguments(material, tmp_path / "set", "--keep-images", "--workers", "2"))
    assert digests(tmp_path / "set") == digests(built)


def test_a_killed_build_resumes_and_ends_identical(material, built, tmp_path):
    command = [sys.executable, "-m", "milo_latent.training.build_dataset"]
    output = tmp_path / "set"
    process = subprocess.Popen(
        [*command, *arguments(material, output, "--keep-images")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("shard-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    complete = digests(output)
    assert complete.items() <= digests(built).items()
    assert complete
    build_dataset.main(arguments(material, output, "--keep-images"))
    assert digests(output) == digests(built)


def test_another_configuration_and_a_full_disk_are_refused(material, built, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="another configuration: keep_images differ"):
        build_dataset.main(arguments(material, built))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="GB free"):
        build_dataset.main(arguments(material, tmp_path / "set"))
    assert not list((tmp_path / "set").glob("shard-*"))


def test_other_files_of_the_same_names_are_refused(material, tmp_path):
    mine = shutil.copytree(material, tmp_path / "material")
    build_dataset.main(arguments(mine, tmp_path / "set"))
    tiny_metric(channels=3, seed=5).save_pretrained(mine / "teacher")
    curves = {name: Calibration(Logistic(5, 1, -20, -5), -60.0) for name in MEMBERS}
    pseudo_mos.write_calibrations(mine / "calibrations.json", curves)
    Image.new("RGB", (90, 90)).save(mine / "images" / "0.png")
    with pytest.raises(ValueError, match="sources differ"):
        build_dataset.main(arguments(mine, tmp_path / "set"))
    before = json.loads((tmp_path / "set" / "config.json").read_text())["sources"]
    build_dataset.main(arguments(mine, tmp_path / "other"))
    after = json.loads((tmp_path / "other" / "config.json").read_text())["sources"]
    assert {name for name in before if before[name] != after[name]} == {"calibrations", "images", "map_teacher"}
    assert list(metric_digests(["ssim", f"milo:{mine / 'teacher'}", "pyiqa:lpips"])) == [f"milo:{mine / 'teacher'}"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_mistyped_member_ends_at_once_and_leaves_no_trace(material, tmp_path, workers):
    wrong = [{"psnr": "foo"}.get(each, each) for each in arguments(material, tmp_path / "set", "--workers", workers)]
    with pytest.raises(ValueError, match="got 'foo'"):
        build_dataset.main(wrong)
    assert not (tmp_path / "set").exists()


def test_a_side_that_cuts_cells_is_refused(material, tmp_path):
    with pytest.raises(ValueError, match="multiple of 8 px, a cell of the latents, got 60"):
        build_dataset.main([*arguments(material, tmp_path / "set"), "--side", "60"])


def test_a_set_that_is_not_whole_is_refused(built, tmp_path):
    part = shutil.copytree(built, tmp_path / "part")
    (part / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Expected 3 shards in .*part, found 2"):
        PairSet(part, space="latents")
    (part / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"complete training set in .*part, found no dataset.json"):
        PairSet(part, space="latents")


def test_a_disk_that_fills_up_leaves_whole_shards_only(material, tmp_path, monkeypatch):
    write, calls = build_dataset.write_safetensors, []

    def full(path, tensors, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(path, tensors, **options)

    monkeypatch.setattr(build_dataset, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        build_dataset.main(arguments(material, tmp_path / "set"))
    monkeypatch.undo()
    assert list(digests(tmp_path / "set")) == ["shard-00000.safetensors"]
    build_dataset.main(arguments(material, tmp_path / "set"))
    assert len(digests(tmp_path / "set")) == 3


def test_only_unreadable_images_are_an_error(tmp_path, material):
    (tmp_path / "a.png").write_bytes(b"")
    config = DatasetConfig(images=("a.png",), members=("psnr",), calibrations=str(material / "calibrations.json"))
    with pytest.raises(ValueError, match="can be read"):
        build(config, [tmp_path / "a.png"], tmp_path / "set")


def test_the_draw_of_settings_follows_from_image_and_seed():
    assert draw_settings("a", 125, 0) == list(range(125))
    assert draw_settings("a", 5, 0) == draw_settings("a", 5, 0) != draw_settings("b", 5, 0)
    assert draw_settings("a", 5, 0) != draw_settings("a", 5, 1)


def test_squares_are_resized_or_cut():
    image = torch.rand(1, 3, 90, 120, generator=torch.Generator().manual_seed(0))
    assert square(image, 64, resize=True).shape == (1, 3, 64, 64)
    cut = square(image, 64, resize=False)
    assert torch.allclose(cut, image[..., 13:77, 28:92], atol=1 / 255)
    assert square(image[..., :50, :50], 64, resize=False).shape == (1, 3, 64, 64)


def test_the_size_is_estimated_within_a_tenth(material, built):
    config = json.loads((built / "config.json").read_text())
    config.pop("sources")
    estimate = estimated_bytes(DatasetConfig(**config))
    actual = sum(path.stat().st_size for path in built.glob("shard-*")) * 5 / 4  # one of five images cannot be read
    assert actual == pytest.approx(estimate, rel=0.1)


def test_missing_labels_and_spaces_are_named(built, tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard"):
        PairSet(tmp_path, space="latents")
    tensors = load_file(built / "shard-00000.safetensors")
    tensors.pop("dmos")
    save_file(tensors, tmp_path / "shard-00000.safetensors")
    (tmp_path / "dataset.json").write_text('{"shards": 1}')
    with pytest.raises(ValueError, match="dmos"):
        PairSet(tmp_path, space="latents")
    tensors["dmos"] = torch.full((8,), torch.nan)
    save_file(tensors, tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match="finite label"):
        PairSet(tmp_path, space="latents")
    (tmp_path / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="build the training set again"):
        PairSet(tmp_path, space="latents")


def test_every_epoch_shows_every_pair_once_to_one_process(built):
    pairs = PairSet(built, space="latents")
    drawn = [
        pairs.draw(2, seed=1, step=step, process_index=index, processes=2) for step in range(4) for index in (0, 1)
    ]
    assert sorted(torch.cat(drawn).tolist()) == list(range(16))
    again = pairs.draw(2, seed=1, step=4, process_index=0, processes=2)
    assert not torch.equal(again, drawn[0])


def test_calibrated_labels_are_zero_for_equal_images_and_grow():
    metric = FullReference("psnr", psnr, True)
    opinions = torch.linspace(4.6, 1.2, 20)
    calibration = calibrate(metric, torch.linspace(-45, -15, 20), opinions)
    labels = calibration(torch.tensor([-60.0, -35.0, -15.0]))
    assert labels[0].item() == pytest.approx(0, abs=1e-3)  # psnr of equal images is 60 but for rounding
    assert labels[0] < labels[1] < labels[2] <= 1
    with pytest.raises(ValueError, match="missing"):
        Ensemble([metric], {})


def test_members_keep_their_own_calibration_and_the_label_is_higher_for_the_worse():
    """Two members of opposite scales, whose curves differ: 4.5 to 1.5 about 0.3, and 5 to 3 about -20."""
    calibrations = {
        "first": pseudo_mos.Calibration(Logistic(4.5, 1.5, 0.3, -0.1), best=0.0),
        "second": pseudo_mos.Calibration(Logistic(5.0, 3.0, -20.0, -5.0), best=-60.0),
    }
    values = {"first": torch.tensor([0.0, 0.3, 9.0]), "second": torch.tensor([-60.0, -20.0, 100.0])}

    def error(name, ref, dist):
        return values[name] * (dist - ref).mean(dim=(1, 2, 3))

    members = [FullReference(name, partial(error, name), False) for name in ("second", "first")]
    labels = Ensemble(members, calibrations).labels(ref=torch.zeros(3, 3, 8, 8), dist=torch.ones(3, 3, 8, 8))

    def label(error, best, high, low, center, width):
        best, worse = (low + (high - low) / (1 + math.exp((each - center) / width)) for each in (best, error))
        return (best - worse) / 4

    expected = [
        [label(second, -60, 5, 3, -20, 5), label(first, 0, 4.5, 1.5, 0.3, 0.1)]
        for first, second in zip(*(values[name].tolist() for name in ("first", "second")), strict=True)
    ]
    assert torch.allclose(labels.float(), torch.tensor(expected), atol=1e-5)
    assert labels[2].tolist() == pytest.approx([0.5, 0.714], abs=1e-3)


def test_the_shipped_metric_labels_without_any_file():
    pytest.importorskip("torchmetrics", reason='SSIM needs pip install "milo_latent[eval]"')
    ensemble = pseudo_mos.build_ensemble(["milo:milo-image", "ssim"])
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    ref = torch.stack([rows, columns, (rows > 0.5).float()])[None]
    noisy = [distort(ref, "white noise", level, image_id="0") for level in (1, 3, 5)]
    labels = [ensemble.labels(ref=ref, dist=dist).mean().item() for dist in noisy]
    assert ensemble.labels(ref=ref, dist=ref).mean().item() == pytest.approx(0, abs=1e-3)
    assert 0 < labels[0] < labels[1] < labels[2] < 1


def test_members_are_calibrated_to_the_scale_of_another_metric(images, tmp_path, capsys):
    """A metric calibrated to its own scale labels by its own errors."""
    tiny_metric(channels=3).save_pretrained(tmp_path / "teacher")
    name = f"milo:{tmp_path / 'teacher'}"
    measured = ["--photos", str(images), "--count", "1", "--side", "64"]
    pseudo_mos.main([*measured, "--members", name, "--like", name, "--output", str(tmp_path / "like.json")])
    ensemble = pseudo_mos.build_ensemble([name], tmp_path / "like.json")
    ref = read_image(images / "0.png")
    dist = distort(ref, "white noise", 5, image_id="0")
    error = ensemble.members[0].error(ref=ref, dist=dist).item()
    assert ensemble.labels(ref=ref, dist=dist).item() == pytest.approx(error, rel=0.1)
    assert "SRCC of the ensemble with the opinions of 125 settings: 1.000" in capsys.readouterr().out


def test_agreement_between_members_is_a_matrix():
    first = torch.rand(50, generator=torch.Generator().manual_seed(0))
    matrix = member_agreement(torch.stack([first, first**2, -first], dim=1))
    assert torch.allclose(torch.tensor(matrix), torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]]))
    assert format_agreement(["a", "b", "c"], matrix).splitlines()[2] == "| a | 1.000 | 1.000 | -1.000 |"
