"""Agreement with people: correlations, the logistic, layouts of rated sets, conditions, tables and plots."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from milo_latent.evaluation import conditions as conditions_module
from milo_latent.evaluation.agreement import agreement, agreement_per_kind, score_ratings
from milo_latent.evaluation.conditions import CONDITIONS, read_condition_means, rising_share, score_conditions
from milo_latent.evaluation.correlation import kendall, pearson, ranks, spearman
from milo_latent.evaluation.iqa_datasets import LOADERS
from milo_latent.evaluation.logistic import Logistic, fit_logistic
from milo_latent.evaluation.metrics import FullReference, by_name, psnr, structural
from milo_latent.evaluation.reports import agreement_rows, format_rows, level_study, rising_rows, scatter, write_rows
from milo_latent.testing import tiny_metric, tiny_pipeline

stats = pytest.importorskip("scipy.stats")
PSNR = FullReference("psnr", psnr, True)


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    quality = rng.uniform(1, 5, 80)
    damage = np.round(np.exp(-quality) + 0.02 * rng.standard_normal(80), 2)  # with ties
    return torch.from_numpy(damage), torch.from_numpy(quality)


def test_correlations_are_those_of_scipy(scores):
    damage, quality = scores
    assert torch.equal(ranks(damage), torch.from_numpy(stats.rankdata(damage)))
    assert spearman(damage, quality) == pytest.approx(stats.spearmanr(damage, quality)[0], abs=1e-12)
    assert kendall(damage, quality) == pytest.approx(stats.kendalltau(damage, quality)[0], abs=1e-12)
    assert pearson(damage, quality) == pytest.approx(stats.pearsonr(damage, quality)[0], abs=1e-12)


def test_the_logistic_finds_its_own_parameters_back():
    curve = Logistic(high=4.6, low=1.2, centre=0.3, scale=-0.07)
    damage = torch.linspace(0, 1, 60, dtype=torch.float64)
    fitted = fit_logistic(damage, curve(damage))
    assert torch.allclose(fitted(damage), curve(damage), atol=1e-5)


def test_the_logistic_fits_as_well_as_scipy(scores):
    damage, quality = scores
    from scipy.optimize import curve_fit

    def logistic(x, high, low, centre, scale):
        return low + (high - low) / (1 + np.exp(-(x - centre) / scale))

    start = [5, 1, 0.1, -0.1]
    expected = curve_fit(logistic, damage.numpy(), quality.numpy(), p0=start, maxfev=20_000)[0]
    best = ((logistic(damage.numpy(), *expected) - quality.numpy()) ** 2).sum()
    ours = (fit_logistic(damage, quality)(damage) - quality).square().sum().item()
    assert ours <= best * 1.001


def test_what_no_curve_fits_is_refused():
    with pytest.raises(ValueError, match="5 or more"):
        fit_logistic(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="not all equal"):
        fit_logistic(torch.ones(9), torch.rand(9))


def test_agreement_is_positive_for_a_metric_that_agrees_and_its_interval_holds_it(scores):
    damage, quality = scores
    result = agreement(damage, quality, resamples=200)
    assert result.srcc > 0.8
    assert result.srcc_interval[0] < result.srcc < result.srcc_interval[1]
    assert result.plcc_interval[0] < result.plcc < result.plcc_interval[1]
    assert agreement(damage, quality, resamples=200) == result
    grouped = agreement(damage, quality, groups=[str(index // 20) for index in range(80)], resamples=200)
    assert grouped.srcc == result.srcc
    assert grouped.srcc_interval != result.srcc_interval


def test_agreement_per_kind_leaves_out_what_says_nothing(scores):
    damage, quality = scores
    kinds = ["many"] * 70 + ["few"] * 3 + ["flat"] * 7
    flat = damage.clone()
    flat[73:] = 1.0
    table = agreement_per_kind(flat, quality, kinds)
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
    damage, scored = score_ratings([PSNR], ratings)
    assert scored == ratings
    quality = torch.tensor([rating.quality for rating in ratings], dtype=torch.float64)
    assert len(ratings) >= 5
    assert spearman(-damage["psnr"], quality) > 0.95  # all were made so that more damage has a worse score


@pytest.mark.parametrize(
    ("name", "write", "file", "line", "told"),
    [
        ("kadid10k", kadid10k, "dmos.csv", "I01_01_01.png", "Expected 3 values in each row of .*dmos.csv"),
        ("kadid10k", kadid10k, "dmos.csv", "photo.png,I01.png,4.0", "names such as .*dmos.csv, got 'photo.png'"),
        ("kadid10k", kadid10k, "dmos.csv", "I01_01_01.png,I01.png,good", "a score in .*dmos.csv, got 'good'"),
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
    _, scored = score_ratings([PSNR], LOADERS["kadid10k"](tmp_path), report=told.append)
    assert len(scored) == 5
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
        damage = metric.damage(ref=ref, dist=near.clamp(0, 1)), metric.damage(ref=ref, dist=far.clamp(0, 1))
        assert damage[0].shape == (2,)
        if not metric.name.startswith("milo"):  # whose weights are random here
            assert (damage[0] < damage[1]).all(), metric.name
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


def test_condition_means_are_read_in_order(shared, tmp_path):
    means = read_condition_means(shared / "data" / "iqa_conditions" / "kadid10k_conditions.csv")
    assert len(means) == 125
    assert means[CONDITIONS.index(("JPEG", 5))].item() == pytest.approx(1.350247)
    (tmp_path / "few.csv").write_text("distortion,level,dmos_mean\n1,1,4.5\n")
    with pytest.raises(ValueError, match="125 conditions"):
        read_condition_means(tmp_path / "few.csv")


def test_conditions_are_scored_per_photo(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", 90)
    picture(tmp_path / "b.png", 190)
    scores = score_conditions([PSNR], [tmp_path / "a.png", tmp_path / "b.png"], side=64)
    assert scores.damage["psnr"].shape == (2, 125)
    noise = [scores.damage["psnr"][:, CONDITIONS.index(("white noise", level))] for level in (1, 3, 5)]
    assert (noise[0] < noise[1]).all()
    assert (noise[1] < noise[2]).all()
    assert conditions_module.centred_crop(torch.zeros(1, 3, 70, 50), 64).shape == (1, 3, 64, 50)


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
        {"metric": "mixed", "kind": CONDITIONS[0][0], "rising_share": 0.0},
    ]


def test_tables_and_plots_hold_what_was_measured(tmp_path, scores):
    damage, quality = scores
    kinds = ["a"] * 40 + ["b"] * 40
    rows = agreement_rows("psnr", agreement(damage, quality), agreement_per_kind(damage, quality, kinds))
    write_rows(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open() as file:
        assert [row["kind"] for row in csv.DictReader(file)] == ["all", "a", "b"]
    assert str(rows[0]["srcc"]) in format_rows(rows)
    figure = scatter(damage, quality, kinds, title="psnr")
    assert len(figure.axes[0].lines) == 3  # two kinds and the curve
    study = level_study(torch.rand(3, 125, dtype=torch.float64), torch.linspace(5, 1, 125).double(), ["x", "y", "z"])
    assert len(study.axes) == 25
    assert len(study.axes[0].lines) == 4  # three photos and people
