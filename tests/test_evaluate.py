"""Agreement with people: correlations, the logistic, layouts of rated sets, distortion settings, tables, figures."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from milo_latent.evaluation.agreement import (
    Logistic,
    agreement,
    agreement_per_kind,
    fit_logistic,
    kendall,
    measure_ratings,
    pearson,
    spearman,
)
from milo_latent.evaluation.distortion_settings import (
    SETTINGS,
    measure_settings,
    read_setting_opinions,
    rising_share,
)
from milo_latent.evaluation.iqa_datasets import LOADERS
from milo_latent.evaluation.metrics import FullReference, by_name, psnr, structural
from milo_latent.evaluation.reports import agreement_rows, format_rows, level_study, rising_rows, scatter, write_rows
from milo_latent.testing import tiny_metric, tiny_pipeline

pytest.importorskip("scipy", reason='agreement needs pip install "milo_latent[eval]"')
PSNR = FullReference("psnr", psnr, True)
SPEARMAN, KENDALL, PEARSON = -0.9318774886236406, -0.8183942350829396, -0.8793016838562481
BEST_FIT = 13.709148582871094  # squared error


@pytest.fixture(scope="module")
def rated():
    """Errors with ties, and opinions."""
    rng = np.random.default_rng(0)
    opinions = rng.uniform(1, 5, 80)
    errors = np.round(np.exp(-opinions) + 0.02 * rng.standard_normal(80), 2)
    return torch.from_numpy(errors), torch.from_numpy(opinions)


def test_correlations_have_their_recorded_values(rated):
    """As recorded from implementations of our own before scipy's took their place; ties share their mean rank."""
    errors, opinions = rated
    assert spearman(errors, opinions) == pytest.approx(SPEARMAN, abs=1e-12)
    assert kendall(errors, opinions) == pytest.approx(KENDALL, abs=1e-12)
    assert pearson(errors, opinions) == pytest.approx(PEARSON, abs=1e-12)


@pytest.mark.parametrize("correlation", [spearman, kendall, pearson])
def test_the_correlation_of_a_constant_is_undefined_without_a_warning(correlation, recwarn):
    assert np.isnan(correlation(torch.ones(9), torch.arange(9.0)))
    assert np.isnan(correlation(torch.ones(1), torch.ones(1)))
    assert not recwarn.list


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"milo_latent\[eval\]"):
        spearman(torch.arange(9.0), torch.arange(9.0))


def test_the_logistic_finds_its_own_parameters_back():
    curve = Logistic(high=4.6, low=1.2, center=0.3, scale=-0.07)
    errors = torch.linspace(0, 1, 60, dtype=torch.float64)
    fitted = fit_logistic(errors, curve(errors))
    assert torch.allclose(fitted(errors), curve(errors), atol=1e-5)


def test_the_logistic_is_the_best_fit(rated):
    """The recorded value is that of an implementation of our own and of scipy's `curve_fit`, which agreed."""
    errors, opinions = rated
    assert (fit_logistic(errors, opinions)(errors) - opinions).square().sum().item() <= BEST_FIT * 1.001


def test_what_no_curve_fits_is_refused():
    with pytest.raises(ValueError, match="5 or more"):
        fit_logistic(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="not all equal"):
        fit_logistic(torch.ones(9), torch.rand(9))


def test_agreement_is_positive_for_a_metric_that_agrees_and_its_interval_holds_it(rated):
    errors, opinions = rated
    result = agreement(errors, opinions, resamples=200)
    assert result.srcc > 0.8
    assert result.srcc_interval[0] < result.srcc < result.srcc_interval[1]
    assert result.plcc_interval[0] < result.plcc < result.plcc_interval[1]
    assert agreement(errors, opinions, resamples=200) == result
    grouped = agreement(errors, opinions, groups=[str(index // 20) for index in range(80)], resamples=200)
    assert grouped.srcc == result.srcc
    assert grouped.srcc_interval != result.srcc_interval


def test_agreement_per_kind_leaves_out_what_says_nothing(rated):
    errors, opinions = rated
    kinds = ["many"] * 70 + ["few"] * 3 + ["flat"] * 7
    flat = errors.clone()
    flat[73:] = 1.0
    table = agreement_per_kind(flat, opinions, kinds)
    assert list(table) == ["many"]
    assert table["many"].count == 70


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:64, 0:64]
    array = np.stack([rows * 3, columns * 3, np.full_like(rows, value)], axis=2).clip(0, 255)
    Image.fromarray(array.astype(np.uint8)).save(path)


def kadid10k(folder):
    lines = ["dist_img,ref_img,dmos,var"]
    for kind in ("01", "02"):
        for level in range(1, 4):
            picture(folder / "images" / f"I01_{kind}_0{level}.png", 100 + 20 * level)
            lines.append(f"I01_{kind}_0{level}.png,I01.png,{5 - level},0.1")
    picture(folder / "images" / "I01.png", 100)
    (folder / "dmos.csv").write_text("\n".join(lines) + "\n")


def tid2013(folder):
    for level in range(1, 6):
        picture(folder / "distorted_images" / f"i01_01_{level}.bmp", 100 + 10 * level)
    picture(folder / "reference_images" / "I01.BMP", 100)
    (folder / "mos_with_names.txt").write_text("".join(f"{6 - n} I01_01_{n}.bmp\n" for n in range(1, 6)))


def csiq(folder):
    rows = [",,,,,,,,", ",,,,,,,,", ",,,,,,,,", ",,,image,dst_idx,dst_type,dst_lev,dmos_std,dmos"]  # from D4 on
    for level in range(1, 6):
        picture(folder / "dst_imgs" / "jpeg2000" / f"1600.jpeg2000.{level}.png", 100 + 10 * level)
        rows.append(f",,,1600,3,jpeg 2000,{level},0.1,{level / 5}")
    picture(folder / "src_imgs" / "1600.png", 100)
    (folder / "csiq.DMOS.csv").write_text("\n".join(rows) + "\n")


def pipal(folder):
    (folder / "Train_Label").mkdir(parents=True)
    lines = []
    for level in range(5):
        picture(folder / "Distortion_1" / f"A0001_00_0{level}.bmp", 110 + 10 * level)
        lines.append(f"A0001_00_0{level}.bmp,{1500 - 10 * level}")
    picture(folder / "Train_Ref" / "A0001.bmp", 100)
    (folder / "Train_Label" / "A0001.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("name", "write"), [(f.__name__, f) for f in (csiq, kadid10k, pipal, tid2013)])
def test_published_layouts_are_read_and_scored(tmp_path, name, write):
    write(tmp_path)
    ratings = LOADERS[name](tmp_path)
    errors, measured = measure_ratings([PSNR], ratings)
    assert measured == ratings
    opinions = torch.tensor([rating.opinion for rating in ratings], dtype=torch.float64)
    assert len(ratings) >= 5
    assert spearman(-errors["psnr"], opinions) > 0.95  # all were made so that larger errors have worse opinions


@pytest.mark.parametrize(
    ("name", "write", "file", "line", "told"),
    [
        ("kadid10k", kadid10k, "dmos.csv", "I01_01_01.png", "Expected 3 values in each row of .*dmos.csv"),
        ("kadid10k", kadid10k, "dmos.csv", "photo.png,I01.png,4.0", "names such as .*dmos.csv, got 'photo.png'"),
        ("kadid10k", kadid10k, "dmos.csv", "I01_01_01.png,I01.png,good", "an opinion score in .*dmos.csv, got 'good'"),
        ("tid2013", tid2013, "mos_with_names.txt", "5.1", "Expected 2 values"),
        ("csiq", csiq, "csiq.DMOS.csv", ",,,1600,3,awgn,1,0.1,0.2", "dst_type in .*csiq.DMOS.csv, got 'awgn'"),
        ("csiq", csiq, "csiq.DMOS.csv", ",,,1600,3", "Expected 9 values"),
        ("pipal", pipal, "Train_Label/A0001.txt", "A0001_00_00.bmp", "Expected 2 values in each row of .*A0001.txt"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, write, file, line, told):
    write(tmp_path)
    with (tmp_path / file).open("a") as table:
        table.write(line + "\n")
    with pytest.raises(ValueError, match=told):
        LOADERS[name](tmp_path)


def test_a_table_of_other_columns_is_refused(tmp_path):
    csiq(tmp_path)
    (tmp_path / "csiq.DMOS.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="Save the sheet all_by_image"):
        LOADERS["csiq"](tmp_path)


def test_missing_scores_and_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="right folder"):
        LOADERS["kadid10k"](tmp_path)
    with pytest.raises(FileNotFoundError, match="Train_Label"):
        LOADERS["pipal"](tmp_path)
    kadid10k(tmp_path)
    (tmp_path / "images" / "I01_01_01.png").write_bytes(b"no image")
    told = []
    _, measured = measure_ratings([PSNR], LOADERS["kadid10k"](tmp_path), report=told.append)
    assert len(measured) == 5
    assert "I01_01_01.png" in told[0]


def test_metrics_have_names_and_one_direction(tmp_path):
    tiny_metric(channels=3).save_pretrained(tmp_path / "image")
    tiny_metric().save_pretrained(tmp_path / "latent")
    vae = tiny_pipeline().vae
    generator = torch.Generator().manual_seed(0)
    ref = torch.rand(2, 3, 192, 192, generator=generator)
    near, far = (ref + amount * torch.randn(ref.shape, generator=generator) for amount in (0.01, 0.2))
    names = ["psnr", "mae", "ssim", "ms-ssim", "vif", "latent-l1", f"milo:{tmp_path / 'image'}"]
    for metric in [by_name(name, vae=vae) for name in [*names, f"milo-latent:{tmp_path / 'latent'}"]]:
        errors = metric.error(ref=ref, dist=near.clamp(0, 1)), metric.error(ref=ref, dist=far.clamp(0, 1))
        assert errors[0].shape == (2,)
        if not metric.name.startswith("milo"):  # whose weights are random here
            assert (errors[0] < errors[1]).all(), metric.name
    vae.save_pretrained(tmp_path / "vae")
    own, given = by_name(f"milo-latent:{tmp_path / 'latent'}@{tmp_path / 'vae'}", vae=tiny_pipeline(seed=1).vae), metric
    assert torch.equal(own.error(ref=ref, dist=near), given.error(ref=ref, dist=near))
    with pytest.raises(ValueError, match="Pass --vae"):
        by_name("latent-l1")
    with pytest.raises(ValueError, match="pyiqa:NAME"):
        by_name("unknown")
    with pytest.raises(ImportError, match="non-commercial"):
        by_name("pyiqa:lpips")


def test_missing_torchmetrics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"milo_latent\[eval\]"):
        structural("ssim")


def test_opinions_of_settings_are_read_in_order(shared, tmp_path):
    opinions = read_setting_opinions(shared / "data" / "iqa_conditions" / "kadid10k_conditions.csv")
    assert len(opinions) == 125
    assert opinions[SETTINGS.index(("JPEG", 5))].item() == pytest.approx(1.350247)
    (tmp_path / "few.csv").write_text("distortion,level,dmos_mean\n1,1,4.5\n")
    with pytest.raises(ValueError, match="125 settings"):
        read_setting_opinions(tmp_path / "few.csv")


def test_settings_are_measured_per_photo(tmp_path):
    picture(tmp_path / "a.png", 90)
    picture(tmp_path / "b.png", 190)
    errors = measure_settings([PSNR], [tmp_path / "a.png", tmp_path / "b.png"], side=64)["psnr"]
    assert errors.shape == (2, 125)
    noise = [errors[:, SETTINGS.index(("white noise", level))] for level in (1, 3, 5)]
    assert (noise[0] < noise[1]).all()
    assert (noise[1] < noise[2]).all()


def test_levels_are_ordered_as_people_ordered_them():
    means = torch.arange(125, 0, -1).double()  # people: every level worse than the one before
    rising = torch.arange(125).double()[None]
    assert set(rising_share(rising, means).values()) == {1.0}
    assert set(rising_share(-rising, means).values()) == {0.0}
    mixed = rising.clone()
    mixed[0, :5] = mixed[0, :5].flip(0)  # the first of the 25 kinds the wrong way round
    rows = rising_rows({"good": rising, "mixed": mixed}, means)
    assert len(rows) == 52
    assert rows[0] == {"metric": "good", "kind": "all", "rising_share": 1.0}
    assert rows[26:28] == [
        {"metric": "mixed", "kind": "all", "rising_share": 0.96},
        {"metric": "mixed", "kind": SETTINGS[0][0], "rising_share": 0.0},
    ]


def test_tables_and_plots_hold_what_was_measured(tmp_path, rated):
    errors, opinions = rated
    kinds = ["a"] * 40 + ["b"] * 40
    rows = agreement_rows("psnr", agreement(errors, opinions), agreement_per_kind(errors, opinions, kinds))
    write_rows(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open() as file:
        assert [row["kind"] for row in csv.DictReader(file)] == ["all", "a", "b"]
    assert str(rows[0]["srcc"]) in format_rows(rows)
    figure = scatter(errors, opinions, kinds, title="psnr")
    assert len(figure.axes[0].lines) == 3  # two kinds and the curve
    study = level_study(torch.rand(3, 125, dtype=torch.float64), torch.linspace(5, 1, 125).double())
    assert len(study.axes) == 25
    assert len(study.axes[0].lines) == 4  # three photos and people
