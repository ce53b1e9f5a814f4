"""The ablation over objectives: what it writes, that it resumes, and that settings are not mixed."""

import csv
import importlib.util

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from milo_latent.testing import tiny_metric


@pytest.fixture
def ablation(repository, tmp_path):
    pytest.importorskip("torchmetrics")
    specification = importlib.util.spec_from_file_location(
        "train_ablation", repository / "benchmarks/train_ablation.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def command(ablation, tmp_path):
    """Call the benchmark on photos of 192 px, the least that MS-SSIM takes, with networks of two levels."""
    rng = np.random.default_rng(0)
    for folder in ("clean", "noisy"):
        (tmp_path / folder).mkdir()
    clean = np.add.outer(np.arange(192), np.arange(192))[..., None].repeat(3, 2) / 2
    noisy = (clean + rng.normal(0, 25, clean.shape)).clip(0, 255)
    for folder, image in (("clean", clean), ("noisy", noisy)):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / folder / "a.png")
    tiny_metric(channels=3).save_pretrained(tmp_path / "metric")

    def run(*options, part="image", degraded=("noisy",)):
        arguments = ["--part", part, "--images", str(tmp_path / "clean"), "--clean", str(tmp_path / "clean")]
        arguments += ["--degraded", *(str(tmp_path / each) for each in degraded), "--output", str(tmp_path / "runs")]
        arguments += ["--judges", str(tmp_path / "metric"), "--steps", "1", "--batch-size", "1"]
        if part == "image":
            arguments += ["--network-options", '{"channels": [4, 8], "blocks": [1, 1]}', "--crop-size", "32"]
            arguments += ["--metric", str(tmp_path / "metric"), "--optimizer", "adamw"]
        ablation.main([*arguments, *options])
        with (tmp_path / "runs" / "ablation.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    AcceleratorState._reset_state(reset_partial_state=True)  # the ablation trains in bfloat16, other tests do not
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_objective_and_seed_has_a_row_and_what_is_done_stays(command, capsys):
    first = command("--seeds", "0", "--objectives", "mae")
    assert [(row["objective"], row["seed"], row["degraded"]) for row in first] == [("mae", "0", "noisy")]
    rows = command("--seeds", "0", "1", "--objectives", "mae", "milo")
    assert [(row["objective"], row["seed"]) for row in rows] == [
        ("mae", "0"),
        ("milo", "0"),
        ("mae", "1"),
        ("milo", "1"),
    ]
    assert rows[0] == first[0]
    assert {"psnr", "ssim", "ms-ssim", "vif", "gmsd", "milo:metric"} <= rows[0].keys()
    table = capsys.readouterr().out.splitlines()
    assert table[-2].startswith("| noisy | mae | 2 |")
    assert "%)" in table[-1]


def test_results_of_other_settings_are_not_added(command):
    command("--seeds", "0", "--objectives", "mae")
    with pytest.raises(ValueError, match="Choose another --output"):
        command("--seeds", "1", "--objectives", "mae", "--learning-rate", "0.1")


@pytest.mark.parametrize(
    ("part", "baseline", "options"),
    [("restorer", "standard", ["--noise-levels", "1"]), ("decoder", "mae", ["--crop-size", "128"])],
)
def test_a_restorer_and_a_decoder_are_trained_and_judged(command, repository, part, baseline, options, capsys):
    if part == "decoder":
        options = [*options, "--start", str(repository / "weights/nano/vae")]
    tests = ("noisy", "clean:clean")
    rows = command("--seeds", "0", "--objectives", baseline, "milo", *options, part=part, degraded=tests)
    assert [(row["objective"], row["degraded"]) for row in rows] == [
        (objective, degraded) for objective in (baseline, "milo") for degraded in tests
    ]
    assert float(rows[1]["psnr"]) > float(rows[0]["psnr"]) > 20  # from the weights of nano, and without noise better
    assert rows[0]["psnr"] != rows[2]["psnr"]  # the objective reached the training
    assert capsys.readouterr().out.splitlines()[-4].startswith(f"| noisy | {baseline} | 1 |")


def test_only_the_middle_of_photos_is_judged_where_asked(command):
    whole = command("--seeds", "0", "--objectives", "mae")
    with pytest.raises(ValueError, match="Choose another --output"):
        command("--seeds", "0", "--objectives", "mae", "--side", "168")
    assert whole


def test_the_table_has_the_mean_and_the_change(ablation):
    rows = [
        {"objective": objective, "seed": str(seed), "degraded": "noisy", "psnr": str(psnr), "gmsd": str(gmsd)}
        for objective, seed, psnr, gmsd in [("mae", 0, 27.0, 0.1), ("mae", 1, 27.2, 0.1), ("milo", 0, 27.0, 0.09)]
    ]
    assert ablation.table(rows).splitlines()[2:] == [
        "| noisy | mae | 2 | 27.1 ± 0.1 | 0.1 ± 0 |",
        "| noisy | milo | 1 | 27 ± 0 (-0.10) | 0.09 ± 0 (-10.0%) |",
    ]
