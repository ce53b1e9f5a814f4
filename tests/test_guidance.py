"""Guidance as a whole, on a bare scheduler: modes, strengths, regions, dtypes, batches, the hook, the trace."""

import copy
import dataclasses
import functools
import inspect
import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, IPNDMScheduler

from milo_latent import MILO, MILOGuidance
from milo_latent.guidance.base import Guide, split_guides
from milo_latent.guidance.reference import match_reference, match_region
from milo_latent.guidance.trace import GuidanceTrace
from milo_latent.latents.codec import encode_image
from milo_latent.metric.visualize import color_error_map
from milo_latent.pictures import to_8bit
from milo_latent.testing import generator, latent_pair, tiny_metric, tiny_pipeline

REFERENCE, START = latent_pair(noise=2.0)
OPTIONS = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True}


def pipeline_with(scheduler=None):
    return SimpleNamespace(scheduler=scheduler or DDIMScheduler(**OPTIONS))


class Seen(Guide):
    """Notes its name at each step, and leaves the step as it is."""

    def __init__(self, seen, name):
        super().__init__(REFERENCE)
        self.seen, self.name = seen, name

    def guide_x0(self, x0, *, progress, timestep):
        self.seen.append(self.name)
        return x0


def sample_with(pipe, *, steps=4, dtype=torch.float32, batch=1):
    """Run a loop whose model predicts that its whole input is noise."""
    pipe.scheduler.set_timesteps(steps)
    sample = START.repeat(batch, 1, 1, 1).to(dtype)
    for timestep in pipe.scheduler.timesteps:
        sample = pipe.scheduler.step(0.9 * sample, timestep, sample).prev_sample
    return sample


def guided_sample(metric, *args, dtype=torch.float32, batch=1, steps=4, **options):
    guide, pipe = MILOGuidance(metric, *args, **({"reference_latents": REFERENCE} | options)), pipeline_with()
    with guide.attach(pipe):
        return sample_with(pipe, dtype=dtype, batch=batch, steps=steps)


@pytest.mark.parametrize("objective", ["weighted", "milo"])
def test_the_metric_mode_comes_nearer_the_reference_by_its_own_measure(metric, objective):
    plain = sample_with(pipeline_with())
    pushed = guided_sample(metric, 0.3, mode="metric", objective=objective)
    assert metric(dist=pushed, ref=REFERENCE) < metric(dist=plain, ref=REFERENCE)


@pytest.mark.parametrize("mode", ["mask", "metric"])
def test_inference_mode_changes_nothing(metric, mode):
    expected = guided_sample(metric, 0.3, mode=mode)
    with torch.inference_mode():
        assert torch.equal(guided_sample(metric, 0.3, mode=mode), expected)
    assert torch.equal(guided_sample(metric, 0.3, mode=mode), expected)  # also afterwards


@pytest.mark.parametrize("mode", ["mask", "metric"])
def test_only_the_region_is_guided(metric, mode):
    region = torch.zeros(1, 1, 16, 16)
    region[..., :8] = 1.0
    plain, everywhere = sample_with(pipeline_with()), guided_sample(metric, 0.4, mode=mode)
    inside = guided_sample(metric, 0.4, mode=mode, region=region)
    assert torch.equal(inside[..., 8:], plain[..., 8:])
    assert (inside[..., :8] - plain[..., :8]).abs().mean() > 0.01
    assert torch.equal(guided_sample(metric, 0.4, mode=mode, region=torch.ones(1, 1, 16, 16)), everywhere)


def test_the_strength_may_be_a_function_of_the_timestep(metric):
    assert torch.equal(guided_sample(metric, lambda timestep: 0.4), guided_sample(metric, 0.4))
    seen = []
    late = guided_sample(metric, lambda timestep: seen.append(timestep) or (0.4 if timestep < 500 else 0.0))
    assert seen == [750.0, 500.0, 250.0, 0.0]
    assert not torch.equal(late, guided_sample(metric, 0.4))
    with pytest.raises(ValueError, match=r"`milo_scale` in \[0, 1\], got 2.0"):
        guided_sample(metric, lambda timestep: 2.0)


def test_the_metric_mode_takes_strengths_above_one_and_refuses_those_below_zero(metric):
    assert MILOGuidance(metric, 1.5, mode="metric").milo_scale == 1.5
    for bad in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"`milo_scale` in \[0, 1e\+06\]"):
            MILOGuidance(metric, bad, mode="metric")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mask", "metric"])
def test_half_precision_agrees_with_float32(metric, dtype, mode):
    expected, got = (guided_sample(metric, 0.4, mode=mode, dtype=each) for each in (torch.float32, dtype))
    assert got.dtype == dtype
    rounding = (sample_with(pipeline_with(), dtype=dtype).float() - sample_with(pipeline_with())).abs().max()
    assert (got.float() - expected).abs().max() < 4 * rounding  # of the scheduler's own arithmetic in that dtype


def test_a_batch_is_guided_as_its_samples_alone(metric):
    one = guided_sample(metric, 0.4)
    for mode, reference in (("mask", REFERENCE), ("mask", REFERENCE.repeat(3, 1, 1, 1)), ("metric", REFERENCE)):
        many = guided_sample(metric, 0.4, mode=mode, reference_latents=reference, batch=3)
        alone = one if mode == "mask" else guided_sample(metric, 0.4, mode=mode)
        assert torch.allclose(many, alone.expand_as(many), atol=1e-5)


def test_the_hook_keeps_the_signature_that_pipelines_inspect(metric):
    pipe = pipeline_with()
    before = inspect.signature(pipe.scheduler.step)
    with MILOGuidance(metric, reference_latents=REFERENCE).attach(pipe):
        assert inspect.signature(pipe.scheduler.step) == before
        assert {"eta", "generator"} <= set(inspect.signature(pipe.scheduler.step).parameters)
    assert "step" not in vars(pipe.scheduler)


def test_hooks_come_off_in_any_order():
    pipe, seen = pipeline_with(), []
    pipe.scheduler.set_timesteps(4)
    first, second = Seen(seen, "first"), Seen(seen, "second")
    with first.attach(pipe):
        inner = second.attach(pipe)
        inner.__enter__()
        pipe.scheduler.step(START, pipe.scheduler.timesteps[0], START)
    pipe.scheduler.step(START, pipe.scheduler.timesteps[1], START)
    inner.__exit__(None, None, None)
    assert seen == ["first", "second", "second"]
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


def test_a_wrapper_of_someone_else_around_ours_stays():
    pipe, seen = pipeline_with(), []
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    with Seen(seen, "ours").attach(pipe):

        @functools.wraps(scheduler.step)  # which takes our attributes along
        def theirs(*arguments, **options):
            seen.append("theirs")
            return theirs.__wrapped__(*arguments, **options)

        scheduler.step = theirs
    with Seen(seen, "again").attach(pipe):
        pass
    assert vars(scheduler)["step"] is theirs
    scheduler.step(START, scheduler.timesteps[0], START)
    assert seen == ["theirs"]


def test_a_step_that_someone_else_replaced_is_put_back(metric):
    pipe = pipeline_with()
    pipe.scheduler.step = mine = pipe.scheduler.step
    with MILOGuidance(metric, reference_latents=REFERENCE).attach(pipe):
        assert pipe.scheduler.step is not mine
    assert vars(pipe.scheduler)["step"] is mine


def test_a_guide_lets_go_of_its_reference_after_the_block_or_the_run_that_it_was_called_back_in(metric):
    pipe, guide = pipeline_with(), MILOGuidance(metric, 0.4, reference_latents=REFERENCE)
    with guide.attach(pipe):
        sample_with(pipe)
        assert torch.equal(guide.reference, REFERENCE)
    with pytest.raises(RuntimeError, match="Expected a run"):
        _ = guide.reference


def test_one_guide_on_two_pipelines_guides_both(metric):
    base, refiner = pipeline_with(), pipeline_with()
    guide = MILOGuidance(metric, 0.4, reference_latents=REFERENCE)
    with guide.attach(base), guide.attach(refiner):
        results = [sample_with(base), sample_with(refiner), sample_with(base)]
    assert all(torch.equal(result, guided_sample(metric, 0.4)) for result in results)


def test_a_loop_that_sets_timesteps_once_is_two_runs(metric):
    pipe, guide = pipeline_with(), MILOGuidance(metric, 0.4, reference_latents=REFERENCE)
    results = []
    with guide.attach(pipe):
        pipe.scheduler.set_timesteps(4)
        for _ in range(2):
            sample = START
            for timestep in pipe.scheduler.timesteps:
                sample = pipe.scheduler.step(0.9 * sample, timestep, sample).prev_sample
            results.append(sample)
    assert torch.equal(*results)


def test_replacing_the_scheduler_inside_the_block_gives_a_warning(metric):
    pipe = pipeline_with()
    with (
        pytest.warns(UserWarning, match="scheduler was replaced"),
        MILOGuidance(metric, reference_latents=REFERENCE).attach(pipe),
    ):
        pipe.scheduler = DDIMScheduler(**OPTIONS)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_after_guidance_gives_a_warning_with_the_way_out(metric, option):
    guide = MILOGuidance(metric, reference_latents=REFERENCE)
    pipe = pipeline_with(DDIMScheduler(**OPTIONS | {option: True}))
    with pytest.warns(UserWarning, match=rf"DDIMScheduler has {option} on.*{option}=False"), guide.attach(pipe):
        pass
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **{option: False})
    with warnings.catch_warnings(action="error"), guide.attach(pipe):
        pass


def test_warnings_name_the_line_of_the_caller(metric):
    guide, pipe = MILOGuidance(metric, reference_latents=REFERENCE), pipeline_with()
    clipping = pipeline_with(DDIMScheduler(**OPTIONS | {"clip_sample": True}))
    pipe.num_timesteps = 4
    with warnings.catch_warnings(record=True, action="always") as caught:
        guide.attach(clipping)
        clipping.scheduler = DDIMScheduler(**OPTIONS)
        guide.detach()
        guide(pipe, 0, 1, {})
        split_guides(guide, pipeline_with(DDIMScheduler(**OPTIONS | {"thresholding": True})))
    named = ["clip_sample on", "scheduler was replaced", "from the second step on", "thresholding on"]
    assert all(words in str(each.message) for words, each in zip(named, caught, strict=True))
    assert [each.filename for each in caught] == [__file__] * 4


def test_noise_added_inside_the_step_is_refused(metric):
    pipe = pipeline_with(EulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(4)
    with (
        pytest.raises(ValueError, match="`s_churn` of 0"),
        MILOGuidance(metric, reference_latents=REFERENCE).attach(pipe),
    ):
        pipe.scheduler.step(START, pipe.scheduler.timesteps[0], START, s_churn=1.0)


def test_a_scheduler_is_guided_once(metric):
    pipe, guide = pipeline_with(), MILOGuidance(metric, 0.4, reference_latents=REFERENCE)
    other = pipeline_with(pipe.scheduler)
    with guide.attach(pipe):
        expected = sample_with(pipe)
        for again in (pipe, other):
            with pytest.raises(ValueError, match="would pull twice"), guide.attach(again):
                pass
        assert torch.equal(sample_with(pipe), expected)
    assert "step" not in vars(pipe.scheduler)
    with guide.attach(other):
        assert torch.equal(sample_with(other), expected)


def test_strengths_of_numpy_are_numbers(metric, tmp_path):
    guide = MILOGuidance(metric, np.float32(0.5), reference_latents=REFERENCE)
    assert guide.milo_scale == 0.5
    guide.save_config(tmp_path)
    assert MILOGuidance.from_config(tmp_path, metric=metric).milo_scale == 0.5


def test_an_unknown_scheduler_is_refused_when_attaching(metric):
    with (
        pytest.raises(ValueError, match=r"got IPNDMScheduler.*DDIMScheduler.*UniPC"),
        MILOGuidance(metric, reference_latents=REFERENCE).attach(pipeline_with(IPNDMScheduler())),
    ):
        pass


def test_latents_of_another_vae_are_refused():
    metric = MILO(channels=4, latent_space="stable-diffusion", scaling_factor=0.18215).frozen()
    guide, pipe = MILOGuidance(metric, reference_latents=REFERENCE), pipeline_with()
    pipe.vae = AutoencoderKL(latent_channels=4, scaling_factor=0.13025)
    with pytest.raises(ValueError, match=r"0\.18215\), got SimpleNamespace with 4 channels.*0\.13025.*Train MILO_L"):
        guide.attach(pipe).__enter__()
    pipe.vae = AutoencoderKL(latent_channels=16, scaling_factor=0.18215)
    with pytest.raises(ValueError, match="16 channels"):
        guide.attach(pipe).__enter__()
    pipe.vae = AutoencoderKL(latent_channels=4, scaling_factor=0.18215)
    with guide.attach(pipe):
        pass


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "both"}, "`mode` to be one of"),
        ({"objective": "lpips"}, "`objective` to be one of"),
        ({"region": -torch.ones(1, 1, 16, 16)}, "`region` >= 0, got -1"),
        ({"region": torch.ones(1, 4, 16, 16)}, "`region` with 1 channels"),
        ({"milo_scale": "strong"}, "number or a function"),
    ],
)
def test_bad_settings_are_refused(metric, options, match):
    with pytest.raises(ValueError, match=match):
        MILOGuidance(metric, **options)


def test_a_region_or_a_reference_of_another_size_is_refused(metric):
    with pytest.raises(ValueError, match=r"`region` of shape \(B or 1, 1, 16, 16\), got \(1, 1, 8, 8\).*interpolate"):
        guided_sample(metric, region=torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 4, 16, 16\), got \(1, 4, 20, 20\)"):
        guided_sample(metric, reference_latents=torch.zeros(1, 4, 20, 20))
    with pytest.raises(ValueError, match=r"`reference_latents` for one or for each of 1 results, got 2\. Give one"):
        guided_sample(metric, reference_latents=torch.zeros(2, 4, 16, 16))
    with pytest.raises(ValueError, match="`reference_latents` to be finite"):
        guided_sample(metric, reference_latents=torch.full((1, 4, 16, 16), torch.nan))


def test_which_reference_belongs_to_which_result_is_not_guessed():
    reference, sample = torch.randn(2, 4, 16, 16, generator=generator()), torch.zeros(4, 4, 16, 16)
    for function in (match_reference, match_region):
        given = reference if function is match_reference else reference[:, :1].abs()
        with pytest.raises(ValueError, match=r"of 4 results, got 2.*repeat_interleave\(2, dim=0\).*repeat\(2, 1"):
            function(given, sample)
        assert torch.equal(function(given.repeat(2, 1, 1, 1), sample), given.repeat(2, 1, 1, 1))
        assert function(given[:1], sample).shape[0] in (1, 4)


def test_the_encoder_s_graph_is_not_kept(metric):
    vae = tiny_pipeline().vae.requires_grad_(True)
    guide = MILOGuidance(metric, reference_latents=encode_image(vae, torch.rand(1, 3, 64, 64)))
    assert guide.reference_latents.grad_fn is None
    copy.deepcopy(guide)


def test_references_of_16_bit_keep_their_greys(tmp_path):
    from PIL import Image

    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    vae = tiny_pipeline().vae
    from_path = MILOGuidance.reference_from_image(vae, tmp_path / "ramp.png")
    with Image.open(tmp_path / "ramp.png") as picture:
        assert torch.equal(MILOGuidance.reference_from_image(vae, picture), from_path)


def test_reference_latents_come_from_an_image_once(tmp_path):
    from PIL import Image

    vae = tiny_pipeline().vae
    pixels = torch.rand(1, 3, 64, 96, generator=generator())
    latents = MILOGuidance.reference_from_image(vae, pixels)
    assert latents.shape == (1, 4, 8, 12)
    half = MILOGuidance.reference_from_image(tiny_pipeline().vae.to(torch.bfloat16), pixels)
    assert half.dtype == torch.float32  # in which guides compute
    image = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert (MILOGuidance.reference_from_image(vae, image) - latents).abs().max() < 0.05  # 8 bits
    assert MILOGuidance.reference_from_image(vae, image, size=(128, 128)).shape == (1, 4, 16, 16)
    image.save(tmp_path / "photo.png")
    for path in (tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert torch.equal(MILOGuidance.reference_from_image(vae, path), MILOGuidance.reference_from_image(vae, image))
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        MILOGuidance.reference_from_image(vae, "absent.png")
    with pytest.raises(TypeError, match="a PIL image, a path, an array"):
        MILOGuidance.reference_from_image(vae, 0.5)
    with pytest.warns(UserWarning, match=r"in \[0, 1\], got \[-"):
        MILOGuidance.reference_from_image(vae, pixels * 2 - 1)


def test_functions_are_kept_by_name_in_the_config_and_asked_for_again(metric, tmp_path):
    def ramp(progress):
        return progress

    MILOGuidance(metric, 0.3, schedule=ramp).save_config(tmp_path)
    with pytest.raises(ValueError, match="<function ramp>"):
        MILOGuidance.from_config(tmp_path, metric=metric)
    assert MILOGuidance.from_config(tmp_path, metric=metric, schedule=ramp).milo_scale == 0.3


# The trace


def traced(metric, **options):
    guide, pipe = MILOGuidance(metric, reference_latents=REFERENCE, trace=True, **options), pipeline_with()
    with guide.attach(pipe):
        result = sample_with(pipe, batch=2)
    return guide.trace, result


def test_the_trace_tells_what_happened_and_changes_nothing(metric):
    trace, result = traced(metric, milo_scale=0.4, schedule="constant", stop=0.5)
    untraced = guided_sample(metric, 0.4, schedule="constant", stop=0.5, batch=2)
    assert torch.equal(result, untraced)
    assert [step.timestep for step in trace] == [750.0, 500.0, 250.0, 0.0]
    assert [step.scale for step in trace] == [0.4, 0.4, 0.0, 0.0]
    for step in trace:
        assert step.error.shape == step.weight.shape == step.change.shape == (2,)
        assert step.mask.shape == (2, 1, 16, 16)
        assert ((step.mask > 0) & (step.mask < 1)).all()
        assert torch.allclose(step.weight, torch.full((2,), step.scale), atol=1e-6)
        assert torch.allclose(step.change, torch.full((2,), step.scale), atol=1e-5)  # s of the way, under equal weights


def test_the_trace_is_of_the_latest_run(metric):
    guide, pipe = MILOGuidance(metric, 0.4, reference_latents=REFERENCE, trace=True), pipeline_with()
    with guide.attach(pipe):
        sample_with(pipe, steps=4)
        sample_with(pipe, steps=3)
    assert len(guide.trace) == 3


def test_the_trace_is_a_table_with_a_row_for_each_step_and_sample(metric, monkeypatch):
    trace, _ = traced(metric, milo_scale=0.4, stop=0.5)
    table = json.loads(json.dumps(trace.to_dict()))
    assert list(table) == ["step", "timestep", "scale", "sample", "error", "weight", "change"]
    assert table["step"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table["sample"] == [0, 1] * 4
    assert table["timestep"][::2] == [step.timestep for step in trace]
    for name in ("error", "weight", "change"):
        assert table[name] == torch.stack([getattr(step, name) for step in trace]).flatten().tolist()
    assert GuidanceTrace().to_dict()["step"] == []
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match=r"The table of a trace needs pandas .*milo_latent\[data\]"):
            trace.to_dataframe()
    pandas = pytest.importorskip("pandas", reason='needs pip install "milo_latent[data]"')
    frame = trace.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.to_dict("list") == trace.to_dict()


def test_the_trace_is_plotted_and_its_masks_are_animated(metric, tmp_path):
    from PIL import Image

    trace, _ = traced(metric, milo_scale=0.4)
    for suffix in ("gif", "webp"):
        trace.write_animation(tmp_path / f"masks.{suffix}", sample=1)
        with Image.open(tmp_path / f"masks.{suffix}") as animation:
            assert animation.n_frames == 4
            assert animation.size == (256, 272)
    with pytest.raises(ValueError, match=r"got 'masks\.mp4'"):
        trace.write_animation(tmp_path / "masks.mp4")
    with pytest.raises(ValueError, match=r"`sample` in \[0, 1\], got 2"):
        trace.write_animation(tmp_path / "masks.gif", sample=2)
    matplotlib = pytest.importorskip("matplotlib", reason="plots need it")
    matplotlib.use("Agg")
    figure = trace.plot()
    figure.draw_without_rendering()  # warns where the layout does not fit
    assert [axes.get_title() for axes in figure.axes[3:7]] == ["step 0", "step 1", "step 2", "step 3"]
    curves, masks = (part.bbox.height for part in figure.subfigs)
    assert curves == pytest.approx(1.5 * masks)
    for axes, name in zip(figure.axes, ("error", "weight", "change"), strict=False):
        values = [getattr(step, name)[0].item() for step in trace]
        assert axes.lines[0].get_ydata().tolist() == pytest.approx(values)
        assert axes.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
        assert axes.get_ylim() == pytest.approx((0, 1.1 * max(values)))
    largest = max(step.mask[0].max().item() for step in trace)
    for axes, step in zip(figure.axes[3:7], trace, strict=True):
        assert np.array_equal(axes.images[0].get_array(), step.mask[0, 0].numpy())
        assert axes.images[0].get_clim() == pytest.approx((0, largest))
    second = trace.plot(sample=1)
    assert np.array_equal(second.axes[3].images[0].get_array(), trace.steps[0].mask[1, 0].numpy())


def test_frames_show_the_masks_in_the_colors_of_one_scale_with_text_below(metric, tmp_path):
    from PIL import Image, ImageSequence

    trace, _ = traced(metric, milo_scale=0.4)
    wide = GuidanceTrace([dataclasses.replace(step, mask=step.mask[..., :8, :]) for step in trace])
    largest = max(step.mask[1].max().item() for step in wide)
    wide.write_animation(tmp_path / "masks.webp", sample=1, side=64, milliseconds=120)
    with Image.open(tmp_path / "masks.webp") as animation:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
        assert (animation.info["duration"], animation.info["loop"]) == (120, 0)
    for frame, step in zip(frames, wide, strict=True):
        assert frame.shape == (32 + 16, 64, 3)
        painted = color_error_map(step.mask[1:], size=(32, 64), largest=largest, bar=False)
        assert np.array_equal(frame[:32], to_8bit(painted[0]))
        text = frame[32:]
        assert (text[2:14] > 128).any()
        assert (text[:2] == 0).all()
        assert (text[:, :3] == 0).all()
    assert not np.array_equal(frames[0][32:], frames[1][32:])


def test_a_long_run_is_plotted_with_eight_masks(metric):
    matplotlib = pytest.importorskip("matplotlib", reason="plots need it")
    matplotlib.use("Agg")
    trace, _ = traced(metric, milo_scale=0.4)
    long = GuidanceTrace([dataclasses.replace(trace.steps[0], step=index) for index in range(15)])
    titles = [axes.get_title() for axes in long.plot().axes[3:11]]
    assert titles == [f"step {index}" for index in range(0, 15, 2)]


def test_an_empty_trace_is_refused(metric):
    with pytest.raises(ValueError, match=r"none\. Run a pipeline"):
        MILOGuidance(metric, trace=True).trace.plot()


def test_the_tiny_metric_is_for_any_latents():
    assert tiny_metric().config.scaling_factor is None


def test_a_reference_is_reduced_without_aliasing():
    vae, stripes = tiny_pipeline().vae, torch.zeros(1, 3, 256, 256)
    stripes[..., 1::4] = 1.0
    latents = MILOGuidance.reference_from_image(vae, stripes, size=(64, 64))
    gray, lighter = (
        MILOGuidance.reference_from_image(vae, torch.full((1, 3, 64, 64), value))[..., 2:-2] for value in (0.25, 0.5)
    )
    assert (latents[..., 2:-2] - gray).abs().max() < 0.1 * (lighter - gray).abs().max()


def test_reference_latents_that_are_not_finite_are_refused_where_they_are_encoded():
    vae = tiny_pipeline().vae
    vae.encoder.layers[-1].bias.data[1] = float("inf")
    with pytest.raises(ValueError, match="Expected `reference latents` to be finite"):
        MILOGuidance.reference_from_image(vae, torch.rand(1, 3, 64, 64, generator=generator()))
