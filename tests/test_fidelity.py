"""The fidelity dial and the stages: what is returned at both ends, what runs, what is refused."""

import itertools
import warnings

import pytest
import torch

from milo_latent import restore_image
from milo_latent.cli import main
from milo_latent.diffbir.fidelity_join import FidelityJoin
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restorer import load_restorer
from milo_latent.restoration.settings import SAMPLING, RestorationSettings
from milo_latent.testing import generator

IMAGE = torch.rand(2, 3, 37, 51, generator=generator(1))


@pytest.fixture
def joined(pipeline):
    """The tiny pipeline with a join of random weights."""
    torch.manual_seed(0)
    join = FidelityJoin(channels=(8, 8))
    torch.nn.init.normal_(join.conv_out.weight, std=0.05)
    pipeline.register_modules(join=join)
    return pipeline


def run(pipe, image=IMAGE, **arguments):
    seeds = [generator(seed) for seed in range(len(image))]
    arguments = {"num_inference_steps": 2, "generator": seeds, "output_type": "pt"} | arguments
    return pipe(image=image, **arguments).images


def forbid(monkeypatch, pipe, *names):
    for name in names:
        monkeypatch.setattr(getattr(pipe, name), "forward", None)
    monkeypatch.setattr("milo_latent.pipelines.diffbir.encode_image", None)
    monkeypatch.setattr("milo_latent.pipelines.diffbir.decode_latents", None)


def test_an_untrained_join_returns_the_first_stage(pipeline):
    pipeline.register_modules(join=FidelityJoin())
    cleaned = pipeline.clean(IMAGE)
    assert torch.equal(run(pipeline), cleaned)
    assert torch.equal(run(pipeline, stage="join"), cleaned)


def test_the_network_sees_all_three_images_at_any_size(joined):
    decoded, cleaned, degraded = torch.rand(3, 1, 3, 31, 22, generator=generator())
    with torch.no_grad():
        result = joined.join(decoded, cleaned, degraded)
        others = [
            joined.join(1 - decoded, cleaned, degraded),
            joined.join(decoded, 1 - cleaned, degraded) - (1 - cleaned) + cleaned,
            joined.join(decoded, cleaned, 1 - degraded),
        ]
    assert result.shape == cleaned.shape
    assert all((other - result).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("stage", ["join", "all"])
def test_each_result_is_joined_with_its_own_image(joined, stage):
    def results(image, seeds):
        generators = [generator(seed) for seed in seeds]
        return run(joined, image, stage=stage, num_images_per_prompt=2, generator=generators, num_inference_steps=1)

    both = results(IMAGE, range(4))
    alone = torch.cat([results(IMAGE[:1], (0, 1)), results(IMAGE[1:], (2, 3))])
    assert torch.allclose(both, alone, atol=1e-5)


def test_the_network_stays_small():
    join = FidelityJoin()
    assert sum(parameter.numel() for parameter in join.parameters()) < 90_000
    operations = []
    for module in join.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda module, inputs, output: operations.append(
                    module.weight.numel() * (output if isinstance(module, torch.nn.Conv2d) else inputs[0])[0, 0].numel()
                )
            )
    with torch.no_grad():
        join(*torch.rand(3, 1, 3, 64, 64))
    assert sum(operations) * 64 < 3e9  # multiplications at 512x512


def test_fidelity_0_has_the_bits_of_no_join(joined, monkeypatch):
    with_join = DiffBIRPipeline(**joined.components)
    with_join.set_progress_bar_config(disable=True)
    joined.register_modules(join=None)
    plain = run(joined)
    assert torch.equal(run(joined, fidelity=0.0), plain)
    assert (run(with_join) - plain).abs().max() > 0.01
    monkeypatch.setattr(with_join.join, "forward", None)
    assert torch.equal(run(with_join, fidelity=0.0), plain)


def test_fidelity_moves_every_pixel_monotonely_to_exactly_what_the_join_returns(joined):
    results = [run(joined, fidelity=fidelity) for fidelity in (0.0, 0.2, 0.5, 0.75, 1.0)]
    with torch.no_grad():
        expected = joined.join(results[0], joined.clean(IMAGE), IMAGE)
    assert torch.equal(results[-1], expected.clamp(0, 1))
    assert torch.equal(results[-1], run(joined))
    rising = results[-1] >= results[0]
    for before, after in itertools.pairwise(results):
        assert torch.where(rising, after >= before - 1e-6, after <= before + 1e-6).all()
    assert torch.allclose(results[2], ((results[0] + expected) / 2).clamp(0, 1), atol=1e-5)


def test_the_cleaner_stage_is_clean_alone(joined, monkeypatch):
    forbid(monkeypatch, joined, "unet", "controlnet", "join")
    assert torch.equal(run(joined, stage="cleaner"), joined.clean(IMAGE))
    enlarged = run(joined, stage="cleaner", upscale=1.5)
    assert torch.equal(enlarged, joined.clean(IMAGE, (56, 76)))
    assert run(joined, stage="cleaner", num_images_per_prompt=2, generator=None).shape[0] == 4


def test_the_join_stage_joins_the_cleaned_image_and_runs_no_generator(joined, monkeypatch):
    forbid(monkeypatch, joined, "unet", "controlnet")
    cleaned = joined.clean(IMAGE)
    with torch.no_grad():
        expected = joined.join(cleaned, cleaned, IMAGE).clamp(0, 1)
    assert torch.equal(run(joined, stage="join"), expected)
    assert torch.equal(run(joined, stage="join", fidelity=0.0), cleaned)


def test_the_default_stage_is_the_pipelines_own(joined, metric, tmp_path):
    joined.register_to_config(default_stage="join")
    joined.register_modules(metric=metric)
    joined.save_pretrained(tmp_path / "model")
    opened = load_restorer(tmp_path / "model", device="cpu")
    opened.set_progress_bar_config(disable=True)
    join, everything = run(opened, stage="join"), run(opened, stage="all")
    assert torch.equal(run(opened), join)
    assert torch.equal(run(opened, callback_on_step_end=MILOGuidance(metric, milo_scale=0.0)), everything)
    assert torch.equal(run(opened, latents=None), join)
    assert torch.equal(run(DiffBIRPipeline.from_pipe(opened)), join)
    assert run(opened, output_type="latent").shape[1] == 4
    restored = restore_image(IMAGE, model=opened)
    assert torch.equal(restored, join)
    assert torch.equal(restore_image(IMAGE, model=opened, milo_scale=0.0), join)


@pytest.mark.parametrize(
    "given", [{"milo_scale": 0.3}, {"schedule": "linear"}, {"steps": 2}, {"color_fix": "none"}, {"noise_aug": 1}]
)
def test_settings_of_sampling_ask_for_the_whole_pipeline(joined, metric, given):
    joined.register_to_config(default_stage="join")
    joined.register_modules(metric=metric)
    assert RestorationSettings().resolve(joined).stage == "join"
    assert RestorationSettings().resolve(joined).milo_scale == 0.0
    settings = RestorationSettings(**given).resolve(joined)
    assert settings.stage == "all"
    assert settings.milo_scale == given.get("milo_scale", 0.5)
    with pytest.raises(ValueError, match=next(iter(given))):
        RestorationSettings(**given, stage="cleaner").resolve(joined)


def test_a_stage_without_sampling_is_given_nothing_that_acts_on_sampling(joined):
    arguments = RestorationSettings(stage="cleaner").resolve(joined).call_arguments
    assert not arguments.keys() & set(SAMPLING)
    assert (arguments["stage"], arguments["fidelity"]) == ("cleaner", 0.0)


@pytest.mark.parametrize(("scale", "steps"), [(0.0, 1), (0.5, 4), (None, 4)])
def test_one_step_is_the_default_without_guidance(pipeline, metric, scale, steps):
    pipeline.register_modules(metric=metric)
    assert RestorationSettings(milo_scale=scale).resolve(pipeline).steps == steps


def test_results_in_tiles_and_batches_are_those_of_whole_photos_alone(joined):
    image = torch.rand(1, 3, 400, 330, generator=generator())
    whole = run(joined, image, stage="join")
    joined.enable_tiling(320, 96, stages=["decoder"])
    sizes = []
    joined.join.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    assert torch.allclose(run(joined, image, stage="join"), whole, atol=5e-3)
    assert len(sizes) == 4
    assert max(max(size) for size in sizes) == 320
    joined.disable_tiling()
    batch = run(joined)
    alone = joined(image=IMAGE[1:], num_inference_steps=2, generator=generator(1), output_type="pt").images
    assert torch.allclose(batch[1:], alone, atol=1e-4)
    several = run(joined, IMAGE[:1], num_images_per_prompt=2, generator=[generator(0), generator(1)])
    first = run(joined, IMAGE[:1], generator=generator(0))
    assert torch.allclose(several[:1], first, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"fidelity": 0.5}, "train_join"), ({"stage": "join"}, "train_join"), ({"stage": "late"}, "`stage`"),
        ({"fidelity": 1.5}, "`fidelity`"), ({"stage": "cleaner", "output_type": "latent"}, "latent"),
        ({"stage": "cleaner", "callback_on_step_end": lambda *_: {}}, "callback_on_step_end"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_is_refused(pipeline, arguments, match):
    with pytest.raises(ValueError, match=match):
        run(pipeline, **arguments)


def test_the_first_stage_takes_no_fidelity_and_default_stages_are_known(joined):
    with pytest.raises(ValueError, match="stage 'cleaner'"):
        run(joined, stage="cleaner", fidelity=0.5)
    with pytest.raises(ValueError, match="default_stage"):
        DiffBIRPipeline(**joined.components, default_stage="late")


def test_the_shell_names_stage_and_fidelity(joined, photo, tmp_path, capsys):
    joined.save_pretrained(tmp_path / "model")
    command = ["restore", str(photo), "--model", str(tmp_path / "model"), "--device", "cpu", "--overwrite"]
    assert main([*command, "--stage", "join", "--fidelity", "0.5"]) == 0
    assert "stage join, fidelity 0.5)" in capsys.readouterr().out
    assert main([*command, "--stage", "cleaner"]) == 0
    assert "stage cleaner)" in capsys.readouterr().out
    assert main([*command, "--steps", "1", "--fidelity", "0"]) == 0
    assert "1 steps, no guidance, seed 0)" in capsys.readouterr().out
    assert main([*command, "--stage", "cleaner", "--steps", "3"]) == 1
    assert "steps" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_model_without_a_face_model_says_so_in_one_line(pipeline, tmp_path, photo, capsys):
    with pytest.warns(UserWarning, match="no face model"):
        RestorationSettings(task="face").resolve(pipeline)
    pipeline.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--device", "cpu", "--stage", "cleaner", "--task", "face"]
    assert main(["restore", str(photo), *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "face" in line]
    assert len(lines) == 1
    assert "milo-latent convert diffbir --task face" in " ".join(lines)
    pipeline.register_to_config(release_task="face")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RestorationSettings(task="face", stage="cleaner").resolve(pipeline).task == "face"
