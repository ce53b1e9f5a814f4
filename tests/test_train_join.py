"""Training the join of a pipeline: what it is shown, a run from start to end, resuming, refusals."""

from argparse import Namespace

import pytest
import torch

from milo_latent.diffbir.fidelity_join import FidelityJoin
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.testing import tiny_metric, tiny_pipeline
from milo_latent.training import train_join
from milo_latent.training.train_join import (
    NO_GENERATOR,
    JoinLoss,
    draw_seeded,
    join_figures,
    named_figures,
    open_pipeline,
)

SMALL = '{"channels": [4, 4], "blocks": [1, 1]}'


@pytest.fixture
def command(images, tmp_path):
    """Call the command with few steps; options that are given again count."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    tiny_metric(channels=3).save_pretrained(tmp_path / "metric")

    def run(*options, output="run", steps=2):
        arguments = ["--images", str(images), "--validation", str(images), "--validation-images", "1"]
        arguments += ["--steps", str(steps), "--batch-size", "2", "--crop-size", "32", "--precision", "no"]
        arguments += ["--model", str(tmp_path / "model"), "--metric", str(tmp_path / "metric"), "--tests", "noise50"]
        train_join.main([*arguments, "--network-options", SMALL, "--output", str(tmp_path / output), *options])
        return tmp_path / output

    return run


class Recorder(FidelityJoin):
    def forward(self, decoded, cleaned, degraded):
        self.seen = decoded, cleaned, degraded
        return cleaned


def loss_of(join, pipe=None):
    return JoinLoss(join, pipe or tiny_pipeline(), lambda pred, target, progress: (pred - target).abs().mean())


def test_the_generator_decodes_only_where_a_seed_is_given():
    loss, degraded = loss_of(Recorder()), torch.rand(2, 3, 32, 48)
    cleaned, _ = loss.restore(degraded)
    assert torch.equal(loss.join.seen[0], cleaned)
    assert torch.equal(loss.join.seen[2], degraded)
    loss.restore(degraded, seed=3)
    same_layout = degraded.contiguous(memory_format=torch.channels_last)  # or last bits may differ
    expected = tiny_pipeline()(
        image=same_layout, num_inference_steps=1, generator=torch.Generator().manual_seed(3), output_type="pt"
    )
    assert torch.equal(loss.join.seen[0], expected.images)
    assert (loss.join.seen[0] - cleaned).abs().max() > 1e-3
    assert torch.equal(loss.join.seen[1], cleaned)


def test_only_the_join_gets_a_gradient_and_is_saved():
    loss = loss_of(FidelityJoin(channels=(4, 4)))
    clean = torch.rand(1, 3, 32, 32)
    loss(clean, clean, torch.tensor(NO_GENERATOR), torch.tensor(0.0)).backward()
    assert loss.join.conv_out.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss.pipe.cleaner.parameters())
    assert all(name.startswith("join.") for name in loss.state_dict())


def test_a_share_of_the_batches_has_a_seed_and_it_follows_from_the_step():
    def seeds(share):
        draw = draw_seeded(lambda step, process_index: (torch.zeros(1), torch.ones(1)), share=share, seed=0)
        return [draw(step, 0)[2].item() for step in range(200)]

    assert set(seeds(0.0)) == {NO_GENERATOR}
    assert NO_GENERATOR not in seeds(1.0)
    assert len(set(seeds(1.0))) == 200
    assert 0.2 < sum(seed != NO_GENERATOR for seed in seeds(0.3)) / 200 < 0.4
    assert seeds(0.3) == seeds(0.3)


def test_an_untrained_join_has_the_figures_of_the_first_stage(images):
    metric, paths = tiny_metric(channels=3), sorted(images.iterdir())
    loss = loss_of(FidelityJoin(channels=(4, 4)))
    degradation = train_join.TESTS["noise25"]
    figures = join_figures(loss, metric, paths, degradation, NO_GENERATOR)
    assert figures.shape == (2, 3)
    assert torch.equal(figures[0], figures[1])
    torch.nn.init.constant_(loss.join.conv_out.bias, 0.2)
    harmed = join_figures(loss, metric, paths, degradation, NO_GENERATOR)
    assert torch.equal(harmed[0], figures[0])
    named = named_figures(harmed)
    assert named["gain"] == pytest.approx((harmed[1, 0] - harmed[0, 0]).item(), abs=1e-3)
    assert named["milo_ratio"] == pytest.approx((harmed[1, 1] / harmed[0, 1]).item(), abs=1e-3)
    assert named["gain"] != 0 != named["milo_ratio"] - 1


@pytest.mark.parametrize(("share", "modes"), [("0", {"join"}), ("0.5", {"join", "all"}), ("1", {"all"})])
def test_a_run_saves_a_join_and_validates_the_stages_it_is_for(command, share, modes, capsys):
    folder = command("--generator-share", share)
    join = FidelityJoin.from_pretrained(folder / "join")
    assert tuple(join.config.channels) == (4, 4)
    assert join.conv_out.weight.abs().sum() > 0
    header = (folder / "validation.csv").read_text().splitlines()[0]
    assert {name.split("_")[0] for name in header.split(",")} - {"step"} == modes
    assert {line.split("; stage ")[1].split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]} == modes


def test_a_run_starts_from_a_trained_join(command, tmp_path):
    first = command()
    again = command("--start", str(first / "join"), "--learning-rate", "0", output="again")
    before, after = (FidelityJoin.from_pretrained(folder / "join").state_dict() for folder in (first, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_cleaner_takes_the_place_of_the_models_own(command, tmp_path):
    command()
    ResidualCleaner(channels=(4,), blocks=(1,)).save_pretrained(tmp_path / "cleaner")
    options = Namespace(model=str(tmp_path / "model"), cleaner=tmp_path / "cleaner", crop_size=32)
    assert tuple(open_pipeline(options).cleaner.config.channels) == (4,)
    with pytest.raises(ValueError, match="cleaner"):
        command("--cleaner", str(tmp_path / "cleaner"), steps=4)  # of a run that began with another


def test_a_resumed_run_ends_as_an_uninterrupted_one(command, monkeypatch):
    options = ["--generator-share", "0.5", "--checkpoint-minutes", "0"]
    whole = command(*options, output="whole", steps=4)

    def interrupted(draw, steps):
        def stop(now, process_index):
            if now == 3:
                raise KeyboardInterrupt
            return original(draw, steps)(now, process_index)

        return stop

    original = train_join.with_progress
    monkeypatch.setattr(train_join, "with_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*options, output="parts", steps=4)
    monkeypatch.setattr(train_join, "with_progress", original)
    parts = command(*options, output="parts", steps=4)
    first, second = (FidelityJoin.from_pretrained(folder / "join").state_dict() for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_work_is_refused(command, tmp_path):
    with pytest.raises(ValueError, match="generator-share"):
        command("--generator-share", "1.5")
    options = Namespace(model=str(tmp_path / "model"), cleaner=None, crop_size=128)
    pipe = tiny_pipeline()
    pipe.cleaner = None
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="Pass --cleaner"):
        open_pipeline(options)


def test_crops_below_what_the_cleaner_returns_are_refused(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(ResidualCleaner, "short_side", 512, raising=False)
    with pytest.raises(ValueError, match="at least 512 px"):
        open_pipeline(Namespace(model=str(tmp_path), cleaner=None, crop_size=128))
