"""The guided step: exact for every scheduler and prediction type, against a denoiser whose clean estimate is known."""

import diffusers
import pytest
import torch

from milo_latent.guidance.step import (
    KNOWN_SCHEDULERS,
    StepCoefficients,
    masked_pull,
    predict_original_sample,
    shift_model_output,
    step_coefficients,
)

# those whose last sigma is not 0 keep noise in their last sample: they end near a constant estimate, not on it
ENDS_NEAR = {"DEISMultistepScheduler": 0.15}


def make_scheduler(name: str, prediction_type: str):
    if name.startswith("FlowMatch"):
        return getattr(diffusers, name)()
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    options["prediction_type"] = prediction_type
    if "clip_sample" in getattr(diffusers, name).__init__.__wrapped__.__code__.co_varnames:
        options["clip_sample"] = False
    if name == "DDIMScheduler":
        options["set_alpha_to_one"] = True
    return getattr(diffusers, name)(**options)


def denoise(scheduler, model, steps=8):
    """Run `model(sample, timestep) -> model output` through the scheduler."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
        output = model(scheduler, sample, timestep)
        options = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
        sample = scheduler.step(output, timestep, sample, **options, return_dict=False)[0]
    return sample


def output_for(x0):
    """A model that always predicts `x0`, whatever it has to say to do so."""

    def model(scheduler, sample, timestep):
        coefficients = step_coefficients(scheduler, timestep)
        zero = torch.zeros_like(sample)
        change = x0 - predict_original_sample(zero, sample, coefficients)
        return shift_model_output(zero, change, coefficients)

    return model


PREDICTIONS = ("epsilon", "v_prediction", "sample")
EPSILON_ONLY = {"FlowMatchEulerDiscreteScheduler"}  # a flow model predicts the flow, whatever the configuration says
NO_SAMPLE = {"EulerAncestralDiscreteScheduler"}  # diffusers raises NotImplementedError
CASES = [
    (name, kind)
    for name in KNOWN_SCHEDULERS
    for kind in PREDICTIONS
    if (name not in EPSILON_ONLY or kind == "epsilon") and (name not in NO_SAMPLE or kind != "sample")
]


@pytest.mark.parametrize(("name", "prediction_type"), CASES)
def test_a_constant_clean_estimate_is_where_sampling_ends(name, prediction_type):
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="LMS needs scipy")
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    end = denoise(make_scheduler(name, prediction_type), output_for(x0))
    assert (end - x0).abs().max() < ENDS_NEAR.get(name, 2e-5)


RETURNS_X0 = {
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
}


@pytest.mark.parametrize(("name", "prediction_type"), [case for case in CASES if case[0] in RETURNS_X0])
def test_the_clean_estimate_is_the_scheduler_s_own(name, prediction_type):
    scheduler = make_scheduler(name, prediction_type)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        output = torch.randn(sample.shape, generator=generator)
        ours = predict_original_sample(output, sample, step_coefficients(scheduler, timestep))
        result = scheduler.step(output, timestep, sample)
        scale = ours.abs().max()
        assert (ours - result.pred_original_sample).abs().max() / scale < 1e-5
        sample = result.prev_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_shifting_the_output_shifts_the_estimate(prediction_type):
    coefficients = StepCoefficients(0.6, 0.8, 1.0, prediction_type)
    output, sample, change = torch.randn(3, 2, 4, 5, 5).unbind()
    shifted = shift_model_output(output, change, coefficients)
    before, after = (predict_original_sample(each, sample, coefficients) for each in (output, shifted))
    assert torch.allclose(after, before + change, atol=1e-5)


def test_zero_terminal_snr_works_for_v_and_is_refused_for_epsilon():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    x0 = torch.randn(1, 4, 8, 8)
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True, **options
    )
    assert (denoise(scheduler, output_for(x0)) - x0).abs().max() < 1e-5
    scheduler = diffusers.DDIMScheduler(prediction_type="epsilon", **options)
    with pytest.raises(ValueError, match="zero signal"):
        step_coefficients(scheduler, 999)


def test_an_unknown_scheduler_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"got IPNDMScheduler.*DDIMScheduler.*UniPCMultistepScheduler"):
        step_coefficients(diffusers.IPNDMScheduler(), 999)


def test_masked_pull_moves_by_the_weighted_fraction():
    x0, reference = torch.zeros(1, 4, 1, 3), torch.ones(1, 4, 1, 3)
    weight = torch.tensor([0.0, 1.0, 4.0]).reshape(1, 1, 1, 3)
    guided = masked_pull(x0, reference, weight, milo_scale=0.5)
    assert guided[0, 0, 0].tolist() == [0.0, 0.5, 1.0]  # the last would be 2: capped at the reference itself


@pytest.mark.parametrize("milo_scale", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_its_range_is_refused(milo_scale):
    with pytest.raises(ValueError, match=r"`milo_scale` in \[0, 1\]"):
        masked_pull(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 2, 2), milo_scale=milo_scale)
