"""Training a restorer by its command: what is trained, by which loss, how it is saved, and what is refused."""

import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from milo_latent import load_restorer
from milo_latent.files import read_image
from milo_latent.restoration.restore import restore_image
from milo_latent.testing import tiny_metric, tiny_pipeline
from milo_latent.training import train_restorer
from milo_latent.training.train_restorer import RestorerLoss, batch_maker, make_loss, parser

PARTS = ("unet", "controlnet", "vae", "cleaner", "metric")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny pipeline with a metric."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=tiny_metric())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def command(model, images, tmp_path):
    """Call the command on three photos with few small steps; options that are given again count."""

    def run(*options, output="run", source=("--images", str(images))):
        common = ["--model", str(model), "--steps", "2", "--batch-size", "2", "--crop-size", "128", "--precision", "no"]
        common += ["--warmup", "1", "--decay", "0"]
        train_restorer.main([*common, *source, "--output", str(tmp_path / output), *map(str, options)])
        return tmp_path / output

    return run


def weights(folder):
    return {part: load_file(next((folder / part).glob("*.safetensors"))) for part in PARTS}


def changed(model, trained):
    before, after = weights(model), weights(trained / "pipeline")
    return {part for part in PARTS if any(not torch.equal(before[part][key], after[part][key]) for key in before[part])}


@pytest.mark.parametrize(
    ("trained", "parts"), [("controlnet", {"controlnet"}), ("all", {"unet", "controlnet"}), ("lora", {"unet"})]
)
def test_the_chosen_networks_are_trained_and_no_others(trained, parts, command, model):
    assert changed(model, command("--train", trained, "--rank", 2, "--learning-rate", 1e-2)) == parts


def test_the_trained_pipeline_restores_and_its_card_names_the_run(command, images, capsys):
    run = command("--objective", "linear", "--validation", images, "--validation-images", 1, "--seed", 3)
    image = read_image(images / "0.png")
    assert restore_image(image, model=load_restorer(run / "pipeline", device="cpu"), steps=1).shape == image.shape
    assert f"restore PHOTO --model {run / 'pipeline'} --stage all" in capsys.readouterr().out  # "join" has no diffusion
    card = (run / "pipeline" / "README.md").read_text()
    figures = {name: f"| validation, {name} | " for name in ("psnr", "milo_error")}
    assert all(figure in card for figure in figures.values())
    assert "| objective | linear |" in card
    assert "| seed | 3 |" in card
    assert "| photos | 3 photos |" in card
    sheet = read_image(run / "validation" / "0000.png")
    assert sheet.shape == (1, 3, 136, 3 * 140)  # degraded, restored, clean
    assert torch.equal(sheet[..., 280:], image)


def test_adapters_loaded_and_merged_and_the_saved_pipeline_give_one_output(command, model, images):
    run = command("--train", "lora", "--rank", 2, "--learning-rate", 0.1)
    image = read_image(images / "0.png")

    def restore(pipeline):
        return restore_image(image, model=pipeline, steps=2, milo_scale=0.0)

    loaded = load_restorer(model, device="cpu")
    plain = restore(loaded)
    loaded.load_lora_weights(run / "lora")
    with_adapters = restore(loaded)
    assert (with_adapters - plain).abs().max() > 1e-3
    loaded.fuse_lora()
    torch.testing.assert_close(restore(loaded), with_adapters, rtol=0, atol=1e-5)
    merged = restore(load_restorer(run / "pipeline", device="cpu"))
    torch.testing.assert_close(merged, with_adapters, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("--objective", "milo"),
        ("--objective", "milo", "--mask-of", "condition"),
        ("--objective", "cosine"),
        ("--noise-aug", "300"),
        ("--noise-levels", "2"),
        ("--without-cleaner",),
        ("--degradation", "noise"),
        ("--reinitialize",),
        ("--seed", "1"),
    ],
)
def test_every_option_of_the_loss_and_the_data_reaches_the_training(options, command):
    standard, other = command(output="standard"), command(*options, output="other")
    key = "conv_in.weight"
    standard, other = (
        load_file(next((run / "pipeline/controlnet").glob("*.safetensors"))) for run in (standard, other)
    )
    assert not torch.equal(standard[key], other[key])


def test_the_mask_is_used_within_its_range_of_timesteps_only(command):
    beyond = command("--objective", "milo", "--mask-timesteps", 999, 999, output="beyond")
    standard = command(output="standard")
    assert changed(standard / "pipeline", beyond) == set()


def test_gradient_checkpointing_and_accumulation_change_memory_and_not_the_result(command):
    results = [
        weights(command(*options, output=f"run{number}") / "pipeline")["controlnet"]
        for number, options in enumerate(
            [(), ("--gradient-checkpointing",), ("--batch-size", "1", "--accumulation", "2", "--max-train-steps", "2")]
        )
    ]
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=2e-6)


def options_of(model, images, *extra):
    return parser().parse_args(
        ["--model", str(model), "--images", str(images), "--output", "x", "--crop-size", "128", *extra]
    )


def sample(seed, caption=""):
    image = torch.from_numpy(np.random.default_rng(seed).random((3, 128, 128), dtype="float32"))
    return {"clean": image, "degraded": image.flip(1), "caption": caption, "draws": seed}


def batch_of(options, *samples):
    return batch_maker(options, (4, 16, 16), 1000)(list(samples))


def test_the_condition_is_noised_to_a_timestep_below_noise_aug(model, images):
    options = options_of(model, images, "--noise-aug", "200")
    *_, timesteps = batch_of(options, *[sample(seed) for seed in range(40)])
    assert (timesteps >= 0).all()
    assert 100 < timesteps.max() < 200
    loss, batch = make_loss(options), batch_of(options, sample(0))
    told = []
    loss.networks.forward = lambda noisy, time, condition, prompts: told.append(condition) or noisy
    loss(*batch, 0.0)
    _, condition, _ = loss.encode(*batch[:3])
    expected = loss.scheduler.add_noise(condition, batch[5], batch[6])
    assert torch.equal(told[0], expected)
    loss(*batch_of(options_of(model, images), sample(0)), 0.0)  # without the option it stays as it is
    assert torch.equal(told[1], condition)


def test_captions_reach_the_networks_of_models_that_take_prompts(model, images, prompted, monkeypatch):
    asked = []

    def encode_prompt(prompts, *, num_images, guided):
        asked.append((prompts, num_images, guided))
        return torch.zeros(num_images, 77, 8), None

    monkeypatch.setattr(prompted, "encode_prompt", encode_prompt)
    plain = make_loss(options_of(model, images))
    loss = RestorerLoss(prompted, plain.networks, plain.weight)
    told = []
    loss.networks.forward = lambda noisy, time, condition, prompts: told.append(prompts) or noisy
    options = options_of(model, images, "--noise-levels", "2")
    loss(*batch_of(options, sample(0, "a cat"), sample(1, "")), 0.0)
    assert asked == [(["a cat", ""], 2, False)]
    assert told[0].shape == (4, 77, 8)  # every pair at two noise levels


def save_pictures(folder, *sizes):
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 90, 30)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("case", ["empty", "half", "small", "rank", "sources", "component", "metric", "crop"])
def test_what_cannot_be_trained_is_refused_in_one_line(case, command, model, images, tmp_path, capsys, monkeypatch):
    photos = save_pictures(tmp_path / "photos", (140, 140), (150, 150))
    options, source, error = {
        "empty": ([], ["--images", tmp_path / "none"], "none"),
        "half": ([], ["--images", photos, "--degraded", tmp_path / "degraded"], "Add it, or remove the photo"),
        "small": ([], ["--images", tmp_path / "small"], "at least 128 pixels"),
        "rank": (["--train", "lora", "--rank", "0"], None, "rank of 1 or more, got 0"),
        "sources": (["--shards", "a.tar"], None, "one of --images, --dataset and --shards, got images, shards"),
        "component": (["--model", tmp_path / "broken"], None, "controlnet"),
        "metric": (["--model", tmp_path / "plain", "--objective", "milo"], None, "metric"),
        "crop": (["--crop-size", "120"], None, "multiple of 16"),
    }[case]
    (tmp_path / "none").mkdir()
    save_pictures(tmp_path / "degraded", (140, 140))
    save_pictures(tmp_path / "small", (140, 100))
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    if case == "component":
        tiny_pipeline().save_pretrained(tmp_path / "broken")
        index = json.loads((tmp_path / "broken" / "model_index.json").read_text())
        index["controlnet"] = [None, None]
        (tmp_path / "broken" / "model_index.json").write_text(json.dumps(index))
    arguments = [
        "--model",
        model,
        "--output",
        tmp_path / "run",
        "--crop-size",
        "128",
        "--precision",
        "no",
        "--steps",
        "1",
    ]
    arguments = list(map(str, [*arguments, *(source or ["--images", images]), *options]))
    assert train_restorer.run_program(lambda: train_restorer.main(arguments)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("milo-latent: ")
    assert error in line
    assert not (tmp_path / "run" / "pipeline").exists()


def test_a_full_disk_loses_no_checkpoint(command, tmp_path, monkeypatch, capsys):
    command("--steps", 2, "--checkpoint-steps", 1)
    checkpoint = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("checkpoint-00000002/*")}

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("accelerate.accelerator.save_accelerator_state", refuse)
    with pytest.raises(OSError, match="No space left"):
        command("--steps", 4, "--checkpoint-steps", 1)
    assert checkpoint
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("checkpoint-00000002/*")} == checkpoint
