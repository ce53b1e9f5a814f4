"""Training: a resumed run equals an uninterrupted one; every command trains two steps on generated images."""

import argparse
import json
import subprocess
import sys
import types
from dataclasses import asdict
from importlib.metadata import version
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from torch import nn

from milo_latent import MILO, load_restorer
from milo_latent.diffbir.fidelity_join import FidelityJoin
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.files import read_image
from milo_latent.pictures import jpeg_round_trip
from milo_latent.restoration.restore import restore_image
from milo_latent.testing import tiny_metric
from milo_latent.training import (
    assemble,
    train_autoencoder,
    train_image_restorer,
    train_metric_online,
    train_restorer,
)
from milo_latent.training.data.crops import ImageCrops, list_images, spread_over
from milo_latent.training.data.degradations import add_noise, degrade, downscale_and_back
from milo_latent.training.engine.loop import RunConfig, add_run_options, fit, learning_rate_factor, run_config
from milo_latent.training.engine.records import read_log
from milo_latent.training.pseudo_mos import DEFAULT_CALIBRATIONS
from milo_latent.training.train_autoencoder import nano_autoencoder


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.ones(3))

    def forward(self, target):
        return (self.point - target).square().mean()


def draw_target(step, process_index):
    return (torch.from_numpy(np.random.default_rng((7, step, process_index)).standard_normal(3)).float(),)


def train(folder, steps, stop_at=None, **options):
    torch.manual_seed(0)
    module = Quadratic()

    def draw(step, process_index):
        if step == stop_at:
            raise KeyboardInterrupt
        return draw_target(step, process_index)

    options = {"checkpoint_minutes": 0.0, "precision": "no", "warmup": 2, "learning_rate": 0.1} | options
    config = RunConfig(folder, steps, **options)
    return fit(module, draw, config).point.detach()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 12, stop_at=7)
    assert torch.equal(train(tmp_path / "parts", 12), whole)


def test_the_average_of_the_weights_is_validated_and_returned_and_resumed(tmp_path):
    seen = []

    def validate(module):
        seen.append(module.point.detach().clone())
        return {"first": 0.0}

    points = [train(tmp_path / f"{steps}", steps) for steps in range(1, 5)]
    average = torch.ones(3)
    for step, point in enumerate(points):
        decay = min(0.7, (1 + step) / (10 + step)) if step else 0.0  # as diffusers' EMAModel, which starts slowly
        average = decay * average + (1 - decay) * point
    torch.manual_seed(0)
    options = {"checkpoint_minutes": 0.0, "precision": "no", "warmup": 2, "learning_rate": 0.1, "ema_decay": 0.7}
    config = RunConfig(tmp_path / "whole", 4, **options)
    whole = fit(Quadratic(), draw_target, config, validate=validate).point.detach()
    assert torch.allclose(whole, average, atol=1e-6)
    assert torch.equal(seen[-1], whole)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 4, stop_at=2, ema_decay=0.7)
    assert torch.equal(train(tmp_path / "parts", 4, ema_decay=0.7), whole)


def test_only_the_last_checkpoint_is_kept_with_the_run_s_record(tmp_path):
    train(tmp_path / "run", 5)
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint*"))] == ["checkpoint-00000005"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 5


def test_a_run_records_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/train_metric.py", "--output", "runs/my metric"])
    train(tmp_path / "run", 2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["seed"] == 0
    [start] = record["starts"]
    assert start["step"] == 0
    assert start["versions"]["torch"] == version("torch")
    assert start["command"] == "/a/train_metric.py --output 'runs/my metric'"
    assert start["commit"] is None or len(start["commit"].rstrip("+")) == 40


def test_what_a_command_trains_on_is_part_of_the_run(images, tmp_path):
    parser = argparse.ArgumentParser()
    add_run_options(parser)
    given = ["--images", str(images), "--output", str(tmp_path / "run"), "--steps", "2", "--precision", "no"]
    options, smaller = (parser.parse_args([*given, *more]) for more in ([], ["--crop-size", "32"]))
    fit(Quadratic(), draw_target, run_config(options, data={"noise_levels": 4}))
    fit(Quadratic(), draw_target, run_config(options, data={"noise_levels": 4}))
    fewer = run_config(options, data={"noise_levels": 1})
    for config, name in ((run_config(smaller, data={"noise_levels": 4}), "crop_size"), (fewer, "noise_levels")):
        with pytest.raises(ValueError, match=rf"data\.{name} is"):
            fit(Quadratic(), draw_target, config)


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    train(tmp_path / "run", 4)
    with pytest.raises(ValueError, match=r"run: seed is 0 there and 5 here; optimizer is 'adamw' there and 'soap'"):
        train(tmp_path / "run", 8, seed=5, optimizer="soap")
    with pytest.raises(ValueError, match="Expected 4 steps or more"):
        train(tmp_path / "run", 2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 4
    train(tmp_path / "run", 6, checkpoint_minutes=1.0, learning_rate=0.01)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 6
    assert [(start["step"], start["learning_rate"]) for start in record["starts"]] == [(0, 0.1), (4, 0.01)]


def test_time_and_tensorboard_continue_at_the_checkpoint(tmp_path, monkeypatch):
    boards, written = [], []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, purge_step: (
        boards.append(purge_step)
        or SimpleNamespace(
            add_scalar=lambda key, value, global_step: written.append((key, global_step)),
            flush=lambda: None,
            close=lambda: None,
        )
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    train(tmp_path / "run", 60, checkpoint_minutes=1.0)
    log = tmp_path / "run" / "log.csv"
    log.write_text("step,loss,minutes\n50,0.5,7.5\n100,0.4,9.0\n")  # the last row came after the checkpoint
    train(tmp_path / "run", 110, checkpoint_minutes=1.0)
    assert boards == [1, 61]  # TensorBoard hides what was written after the checkpoint
    assert ("log/loss", 100) in written
    rows = read_log(log)
    assert [row["step"] for row in rows] == [50, 100]
    assert 7.5 <= rows[1]["minutes"] < 8.5


def test_trackers_that_are_missing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"installed .*, got \['nothing'\]"):
        train(tmp_path / "run", 2, trackers=("nothing",))


def test_a_training_program_ends_in_one_line(tmp_path):
    command = [sys.executable, "-m", "milo_latent.training.build_dataset", "--images", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "--members", "psnr", "--output", str(tmp_path / "set")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"milo-latent: Expected a folder, got {tmp_path / 'none'}, which is not a folder."
    ]


def test_some_of_many_are_spread_over_all():
    names = [f"{index:03d}" for index in range(112)]
    some = spread_over(names, 60)
    assert len(set(some)) == 60
    assert some[0] == "000"
    assert some[-1] >= "110"
    assert spread_over(names, 12) == [names[index] for index in (0, 9, 18, 28, 37, 46, 56, 65, 74, 84, 93, 102)]
    assert spread_over(names, None) == spread_over(names, 500) == names
    with pytest.raises(ValueError, match="1 or more, got 0"):
        spread_over(names, 0)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    train(tmp_path / "run", 3)

    def draw(step, process_index):
        return (torch.full((3,), torch.nan),)

    with pytest.raises(FloatingPointError, match="lower learning rate"):
        fit(Quadratic(), draw, RunConfig(tmp_path / "run", 6, precision="no", warmup=2))
    assert (tmp_path / "run" / "checkpoint-00000003").is_dir()


def test_the_learning_rate_rises_holds_and_falls(tmp_path):
    config = RunConfig(tmp_path, 100, warmup=10, decay=0.5)
    factors = [learning_rate_factor(step, config) for step in (0, 9, 49, 75, 99)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])


def test_crops_follow_from_seed_and_step_alone(images):
    crops = ImageCrops([images], crop_size=32, seed=3)
    first, again, other = (crops.batch(crops.generator(step), 4) for step in (5, 5, 6))
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, crops.batch(crops.generator(5, process_index=1), 4))
    crops.seed = 4
    assert not torch.equal(first, crops.batch(crops.generator(5), 4))


def test_folders_without_images_are_refused(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="found none"):
        list_images([tmp_path])
    with pytest.raises(FileNotFoundError, match="not a folder"):
        list_images([tmp_path / "absent"])
    with pytest.raises(ValueError, match="at least 500 px"):
        ImageCrops([images], crop_size=500)


def test_degradations_do_what_they_say(images):
    image = read_image(images / "0.png")[0]
    rng = np.random.default_rng(0)
    noisy = add_noise(torch.full((3, 100, 100), 0.5), 25.0, rng)
    assert (noisy - 0.5).std().item() * 255 == pytest.approx(25.0, rel=0.03)
    assert torch.allclose(noisy * 255, (noisy * 255).round(), atol=1e-4)
    assert downscale_and_back(image, 3.0).shape == image.shape
    errors = [(jpeg_round_trip(image, quality) - image).abs().mean() for quality in (90, 50, 10)]
    assert errors == sorted(errors)
    degraded = [degrade(image, np.random.default_rng(seed)) for seed in range(30)]
    assert all(each.shape == image.shape and each.min() >= 0 and each.max() <= 1 for each in degraded)
    assert torch.equal(degraded[4], degrade(image, np.random.default_rng(4)))


def test_the_commands_train_a_pipeline_that_restores(images, tmp_path):
    """All of `weights/nano`, in small: two steps of each part, joined, loaded, run."""
    common = ["--images", str(images), "--steps", "2", "--batch-size", "2", "--precision", "no"]
    validation = ["--validation", str(images)]
    train_autoencoder.main([*common, *validation, "--output", str(tmp_path / "a"), "--crop-size", "64"])
    train_image_restorer.main([*common, *validation, "--output", str(tmp_path / "c"), "--crop-size", "64"])
    vae, cleaner = tmp_path / "a" / "vae", tmp_path / "c" / "network"
    tiny_metric(channels=3).save_pretrained(tmp_path / "teacher")
    teacher = ["--teacher", str(tmp_path / "teacher"), "--latent-space", "test", "--members", "psnr"]
    train_metric_online.main([*common, *validation, "--vae", str(vae), *teacher, "--output", str(tmp_path / "m")])
    members = json.loads((tmp_path / "m" / "run.json").read_text())["data"]["members"]
    assert members == {"psnr": asdict(DEFAULT_CALIBRATIONS["psnr"])}
    parts = {"--vae": vae, "--cleaner": cleaner, "--metric": tmp_path / "m" / "metric"}
    parts = [str(each) for pair in parts.items() for each in pair]
    assemble.main([*parts, "--output", str(tmp_path / "untrained")])
    untrained = ["--model", str(tmp_path / "untrained"), "--train", "all", "--crop-size", "64"]
    train_restorer.main([*common, *untrained, "--output", str(tmp_path / "r")])
    assemble.main([*parts, "--restorer", str(tmp_path / "r" / "pipeline"), "--output", str(tmp_path / "model")])
    restorer = load_restorer(tmp_path / "model", device="cpu")
    image = read_image(images / "0.png")
    assert restorer.metric.config.scaling_factor == restorer.vae.config.scaling_factor != 1.0
    assert restore_image(image, model=restorer, steps=1).shape == image.shape


def test_a_metric_with_fewer_levels_suits_latents_of_few_cells(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train_metric_online, "teacher_agreement", lambda *_, **options: 0.5)  # which takes long
    nano_autoencoder(latent_channels=32, downsampling=32).save_pretrained(tmp_path / "vae")
    tiny_metric(channels=3).save_pretrained(tmp_path / "teacher")
    train_metric_online.main([
        "--images", str(images), "--validation", str(images), "--steps", "1", "--batch-size", "1", "--crop-size", "128",
        "--vae", str(tmp_path / "vae"), "--teacher", str(tmp_path / "teacher"), "--latent-space", "f32c32",
        "--precision", "no", "--levels", "2", "--output", str(tmp_path / "run"),
    ])  # fmt: skip
    metric = MILO.from_pretrained(tmp_path / "run" / "metric")
    assert (metric.config.channels, metric.config.levels, metric.config.latent_space) == (32, 2, "f32c32")
    assert metric(dist=torch.rand(1, 32, 4, 4), ref=torch.rand(1, 32, 4, 4)).item() > 0


def assembled(tmp_path, pipeline, *options):
    pipeline.save_pretrained(tmp_path / "model")
    assemble.main(["--model", str(tmp_path / "model"), *map(str, options), "--output", str(tmp_path / "out")])
    return load_restorer(tmp_path / "out", device="cpu")


def test_a_pipeline_is_assembled_from_another_with_a_join_and_a_default_stage(pipeline, tmp_path, capsys):
    join = FidelityJoin(channels=(4, 4))
    torch.nn.init.normal_(join.conv_out.weight)
    join.save_pretrained(tmp_path / "join")
    made = assembled(tmp_path, pipeline, "--join", tmp_path / "join", "--default-stage", "join")
    assert made.config.default_stage == "join"
    assert torch.equal(made.join.conv_out.weight, join.conv_out.weight.half().float())
    assert torch.equal(made.unet.conv_in.weight, pipeline.unet.conv_in.weight.half().float())
    printed = capsys.readouterr().out
    assert "Default stage: join" in printed
    assert f"| `join` | `FidelityJoin` | {sum(each.numel() for each in join.parameters()):,} |" in printed
    assert "| `join/diffusion_pytorch_model.safetensors` |" in printed
    assert '"block_out_channels"' not in (tmp_path / "out" / "vae" / "config.json").read_text()
    assert (tmp_path / "out" / "unet" / "config.json").read_text().count('"block_out_channels"') == 1


def test_parts_that_are_missing_for_an_assembly_are_named(pipeline, tmp_path):
    with pytest.raises(ValueError, match="train_join"):
        assembled(tmp_path, pipeline, "--default-stage", "join")
    assert not (tmp_path / "out").exists()
    ResidualCleaner(channels=(4,), blocks=(1,)).save_pretrained(tmp_path / "cleaner")
    with pytest.raises(ValueError, match="--metric, --vae"):
        assemble.main(["--cleaner", str(tmp_path / "cleaner"), "--output", str(tmp_path / "out")])
    made = assembled(tmp_path, pipeline, "--cleaner", tmp_path / "cleaner")
    assert tuple(made.cleaner.config.channels) == (4,)
    assert made.config.default_stage == "all"
