"""`milo-latent benchmark restore`: degradations, figures, rows that resume, summaries, sheets, refusals."""

import csv
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import one_error_line

from milo_latent.cli import main
from milo_latent.evaluation import restoration
from milo_latent.evaluation.figures import FIGURES, measure, open_figures
from milo_latent.evaluation.restoration import RowTable, summarize
from milo_latent.evaluation.restoration_cases import Case, degrade, list_cases
from milo_latent.files import read_image
from milo_latent.pictures import round_to_8bit
from milo_latent.testing import tiny_metric, tiny_pipeline

GUIDED = ["no guidance", "guidance 0.5 constant", "guidance 0.5 cosine"]
UNGUIDED = ["input", "clean image through the VAE", "cleaner only", "cleaner through the VAE"]


def tiny_model():
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=tiny_metric())
    return pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bench(model, images, tmp_path):
    """Run the command; `output` is a folder below the test's own."""

    def run(*arguments, output="out", clean=images):
        chosen = ["--clean", clean] if clean else []
        options = ["--model", model, "--steps", 2, "--device", "cpu", "-o", tmp_path / output, *chosen]
        return main(["benchmark", "restore", *map(str, [*options, *arguments])])

    return run


@pytest.fixture
def restored(monkeypatch):
    """Seeds of the restorations that were computed, in their order."""
    seeds, restore = [], restoration.restore

    def counted(image, pipe, settings):
        seeds.append(settings.seed)
        return restore(image, pipe, settings)

    monkeypatch.setattr(restoration, "restore", counted)
    return seeds


def read_rows(folder, name="rows.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_degradations_are_seeded_by_name_and_rounded_as_files_are():
    image = torch.full((1, 3, 64, 64), 0.5)
    noisy = degrade(image, "noise50", image_id="a")
    assert ((noisy - image) * 255).std().item() == pytest.approx(49.5, abs=1.0)  # a little is clipped
    torch.testing.assert_close((noisy * 255).round() / 255, noisy, rtol=0, atol=0)
    assert torch.equal(noisy, degrade(image, "noise50", image_id="a"))
    assert not torch.equal(noisy, degrade(image, "noise50", image_id="b"))
    assert degrade(image, "x4", image_id="a").shape == (1, 3, 16, 16)
    coarse, fine = (degrade(noisy, name, image_id="a") for name in ("jpeg10", "jpeg90"))
    assert (coarse - noisy).abs().mean() > (fine - noisy).abs().mean() > 0
    for name in ("noise", "noise0", "jpeg96", "blur3", "x4.5"):
        with pytest.raises(ValueError, match=r"such as noise25, jpeg10 \(at most 95\) or x4, got"):
            degrade(image, name, image_id="a")


def test_every_figure_says_that_more_noise_is_worse(monkeypatch):
    class Sharp:  # stands for a no-reference metric of pyiqa, higher is better
        lower_better = False

        def __call__(self, dist, ref):
            return -dist.diff(dim=3).abs().mean(dim=(1, 2, 3))

    class Distance(torch.nn.Module):  # stands for LPIPS
        def __init__(self, **options):
            super().__init__()
            assert options == {"net_type": "alex", "normalize": True}

        def forward(self, dist, ref):
            return (dist - ref).abs().mean()

        def reset(self):
            pass

    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda name, as_loss: Sharp()))
    lpip = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Distance)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpip)
    figures, left_out = open_figures(tiny_model(), tiny_metric(channels=3))
    assert (tuple(figures), left_out) == (FIGURES, [])
    rng = torch.Generator().manual_seed(0)
    clean = torch.nn.functional.interpolate(torch.rand(1, 3, 22, 22, generator=rng), scale_factor=8, mode="bilinear")
    clean = round_to_8bit(clean)
    noise = torch.randn(clean.shape, generator=rng)
    weak, strong = (measure(figures, clean + amount * noise, clean) for amount in (0.02, 0.2))
    for name, figure in figures.items():
        assert (weak[name] > strong[name]) == figure.higher_is_better, name
        assert weak[name] != strong[name], name
    small = measure(figures, clean[..., :100, :100], clean[..., :100, :100])
    assert {name for name, value in small.items() if math.isnan(value)} == {"ms-ssim", "milo_l"}
    assert small["ssim"] == pytest.approx(1.0)


def test_figures_whose_package_is_missing_are_left_out_with_a_line_or_refused_if_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    figures, left_out = open_figures(tiny_model(), tiny_metric(channels=3))
    assert tuple(figures) == FIGURES[:7]
    assert [line.partition(" ")[0] for line in left_out] == list(FIGURES[7:])
    assert 'pip install "milo_latent[eval]"' in left_out[0]
    assert left_out[1].endswith("pip install pyiqa")
    with pytest.raises(ImportError, match="pyiqa"):
        open_figures(tiny_model(), tiny_metric(channels=3), names=["psnr", "musiq"])
    assert list(open_figures(tiny_model(), tiny_metric(channels=3), names=["milo_i", "psnr"])[0]) == ["psnr", "milo_i"]
    with pytest.raises(ValueError, match=r"`figure` to be one of \['clip-iqa', 'musiq', 'topiq'\], got 'psnr'"):
        open_figures(tiny_model(), tiny_metric(channels=3), referenced=False, names=["psnr"])


def test_the_command_tabulates_every_photo_setting_and_seed(bench, tmp_path, capsys):
    arguments = ["--degradation", "noise50", "x4", "--limit", "2", "--curriculum", "constant", "cosine"]
    assert bench(*arguments, "--seeds", "0", "1", "--sheets", "1") == 0
    printed, rows = capsys.readouterr().out, read_rows(tmp_path / "out")
    seeded = [(setting, seed) for setting in GUIDED for seed in ("0", "1")]
    expected = [(setting, "") for setting in UNGUIDED] + seeded
    for name in ("noise50", "x4"):
        for photo in ("0", "1"):
            keys = [
                (row["setting"], row["seed"]) for row in rows if (row["degradation"], row["photo"]) == (name, photo)
            ]
            assert sorted(keys) == sorted(expected)
    summary = read_rows(tmp_path / "out", "summary.csv")
    assert [row["setting"] for row in summary] == [*UNGUIDED, *GUIDED] * 2
    psnr = [float(row["psnr"]) for row in rows if (row["degradation"], row["setting"]) == ("x4", GUIDED[2])]
    assert float(summary[-1]["psnr"]) == pytest.approx(np.mean(psnr))
    assert "| noise50 | input | 2 |" in printed
    assert "the error E of milo-image" in printed
    assert "musiq is left out" in printed
    sheets = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert sheets == ["noise50_0.png", "x4_0.png"]
    with Image.open(tmp_path / "out" / "x4_0.png") as sheet:
        assert sheet.size == (4 * 256, 2 * 272)  # input, cleaner, three restorations and the clean image
    assert read_image(tmp_path / "out" / "pictures" / "x4" / "0" / "no guidance, seed 0.png").shape == (1, 3, 136, 140)


def test_the_same_command_computes_nothing_twice_and_more_settings_add_rows(bench, restored, tmp_path):
    command = ["--degradation", "noise25", "--guidance", "0", "--figures", "psnr", "--limit", "2", "--sheets", "1"]
    assert bench(*command) == 0
    assert restored == [0, 0]
    rows = read_rows(tmp_path / "out")
    assert bench(*command) == 0
    assert restored == [0, 0]
    assert read_rows(tmp_path / "out") == rows
    assert bench(*command, "--seeds", "0", "3") == 0
    assert restored == [0, 0, 3, 3]
    assert read_rows(tmp_path / "out")[: len(rows)] == rows
    (tmp_path / "out" / "pictures" / "noise25" / "0" / "no guidance, seed 0.png").unlink()
    assert bench(*command) == 0
    assert restored == [0, 0, 3, 3, 0]  # a picture of the sheet was missing


def test_an_interrupted_run_ends_as_an_uninterrupted_one(bench, tmp_path, monkeypatch):
    command = ["--degradation", "noise25", "--figures", "psnr", "ssim", "--limit", "2"]
    assert bench(*command, output="whole") == 0
    restore, calls = restoration.restore, []

    def interrupted(image, pipe, settings):
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return restore(image, pipe, settings)

    monkeypatch.setattr(restoration, "restore", interrupted)
    assert bench(*command) == 130
    table = tmp_path / "out" / "rows.csv"
    table.write_text(table.read_text()[:-9])  # the last row was being written
    assert bench(*command) == 0
    assert without_times(read_rows(tmp_path / "out")) == without_times(read_rows(tmp_path / "whole"))
    for name in ("noise25_0.png", "noise25_1.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_setting_is_refused_in_the_same_folder(bench, tmp_path, capsys):
    command = ["--degradation", "noise25", "--guidance", "--figures", "psnr"]
    assert bench(*command) == 0
    before = (tmp_path / "out" / "rows.csv").read_bytes()
    capsys.readouterr()
    assert bench(*command, "--steps", "3") == 1
    line = one_error_line(capsys)
    assert "Expected steps 2, of the rows in" in line
    assert "got 3. Choose another output folder" in line
    assert bench("--degradation", "noise25", "--guidance", "--figures", "ssim") == 1
    assert "Expected figures ['psnr']" in one_error_line(capsys)
    assert (tmp_path / "out" / "rows.csv").read_bytes() == before
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["steps"] == 2


def test_without_references_there_are_times_and_sheets(bench, images, tmp_path, capsys):
    assert bench("--degraded", images, "--limit", "1", clean=None) == 0
    printed = capsys.readouterr().out
    assert "| degradation | setting | photos | s |" in printed
    assert "MILO_I" not in printed
    rows = read_rows(tmp_path / "out")
    assert [row["setting"] for row in rows] == ["input", "cleaner only", "cleaner through the VAE", *GUIDED[::2]]
    assert all(float(row["seconds"]) >= 0 for row in rows)
    assert (tmp_path / "out" / f"{images.name}_0.png").is_file()


def test_folders_that_do_not_belong_together_are_refused(bench, images, tmp_path, capsys):
    degraded = tmp_path / "degraded"
    degraded.mkdir()
    for name in ("0.png", "other.png"):
        Image.new("RGB", (140, 136)).save(degraded / name)
    assert bench("--degraded", degraded) == 1
    assert "Expected the same names" in (line := one_error_line(capsys))
    assert "'1', '2', 'other'" in line
    (degraded / "other.png").unlink()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (35, 34)).save(degraded / name)
    assert bench("--degraded", degraded, "--task", "sr") == 1
    assert "of 560x544 pixels, 4 times its degraded, got 140x136" in one_error_line(capsys)
    for arguments in ([], ["--degraded", degraded, "--degradation", "noise25"]):
        assert bench(*arguments) == 1
        assert "Expected a folder of degraded photos, or a clean one" in one_error_line(capsys)
    assert bench("--degradation", "noise25", "--limit", "0") == 1
    assert "at least 1 photo, got 0" in one_error_line(capsys)
    assert bench("--degradation", "noise25", "--guidance", "2", output="strong") == 1
    assert "`milo_scale` in [0, 1], got 2" in one_error_line(capsys)
    assert not read_rows(tmp_path / "strong")


def test_a_clean_image_is_cropped_to_what_is_restored(tmp_path):
    Image.new("RGB", (141, 138)).save(tmp_path / "a.png")
    photo = Case("x4", tmp_path / "a.png").read(4.0)
    assert photo.degraded.shape == (1, 3, 34, 35)
    assert photo.clean.shape[2:] == photo.size == (136, 140)
    assert [case.degradation for case in list_cases(tmp_path, None, ["x4", "noise5", "x4"], None)] == ["x4", "noise5"]


def test_a_summary_separates_the_spread_over_seeds_from_that_over_photos(tmp_path):
    values = {("a", "0"): 1.0, ("a", "1"): 3.0, ("b", "0"): 5.0, ("b", "1"): 9.0, ("c", "0"): math.nan, ("c", "1"): 4.0}
    rows = [
        {"degradation": "noise25", "setting": "input", "photo": photo, "seed": seed, "seconds": 2.0, "milo_i": value}
        for (photo, seed), value in values.items()
    ]
    table = RowTable(tmp_path, {}, ["milo_i"])
    for row in rows:
        table.add(row)
    (summary,) = summarize(list(RowTable(tmp_path, {}, ["milo_i"]).rows.values()), ["milo_i"])
    assert summary["milo_i"] == pytest.approx(4.5)
    assert summary["milo_i_sd_seeds"] == pytest.approx(math.sqrt(4.5))  # of 3 and 6
    assert summary["milo_i_sd_photos"] == pytest.approx(math.sqrt(12.5))  # of 2 and 7
    assert (summary["photos"], summary["seeds"], summary["seconds"]) == (3, 2, 2.0)
