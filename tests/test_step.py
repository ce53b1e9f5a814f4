"""The guided step: from model output to clean estimate and back, and the pulls and pushes of the estimate."""

import diffusers
import pytest
import torch

from milo_latent.guidance.coefficients import StepCoefficients, step_coefficients
from milo_latent.guidance.curriculum import curriculum_weight
from milo_latent.guidance.x0 import (
    gradient_push,
    guide_model_output,
    masked_pull,
    predict_original_sample,
    shift_model_output,
)
from milo_latent.testing import latent_pair, tiny_metric


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_guide_that_returns_the_estimate_itself_leaves_the_output_alone(dtype):
    output, sample = torch.randn(2, 1, 4, 8, 8).to(dtype).unbind()
    guides = [lambda x0, *, progress, timestep: x0] * 2
    assert guide_model_output(guides, diffusers.DDIMScheduler(), output, 500, sample, progress=0.0) is output


@pytest.mark.parametrize("out", [1.0, -0.8, -14.6])
def test_shifting_the_output_shifts_the_estimate(out):
    coefficients = StepCoefficients(1.3, out)
    output, sample, change = torch.randn(3, 2, 4, 5, 5).unbind()
    shifted = shift_model_output(output, change, coefficients)
    before, after = (predict_original_sample(each, sample, coefficients) for each in (output, shifted))
    assert torch.allclose(after, before + change, atol=1e-5)


def test_a_predicted_variance_is_kept():
    coefficients = StepCoefficients(1.3, -0.8)
    output, sample, change = torch.randn(2, 8, 5, 5), torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    shifted = shift_model_output(output, change, coefficients)
    assert torch.equal(shifted[:, 4:], output[:, 4:])
    assert torch.allclose(
        predict_original_sample(shifted, sample, coefficients),
        predict_original_sample(output, sample, coefficients) + change,
        atol=1e-5,
    )


def test_where_the_sample_is_clean_the_output_is_left_alone():
    output = torch.randn(1, 4, 2, 2)
    assert shift_model_output(output, torch.ones_like(output), StepCoefficients(1.0, 0.0)) is output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_keep_their_dtype_and_are_shifted_in_float32(dtype):
    coefficients = StepCoefficients(1 / 0.6, -0.8 / 0.6)
    output, sample, change = torch.randn(3, 1, 4, 8, 8).to(dtype).unbind()
    shifted = shift_model_output(output, change.float(), coefficients)
    assert shifted.dtype == dtype
    exact = output.float() + change.float() / coefficients.out
    assert torch.equal(shifted, exact.to(dtype))
    assert predict_original_sample(output, sample, coefficients).dtype == torch.float32


def test_an_unknown_prediction_type_is_refused():
    scheduler = diffusers.DDIMScheduler(prediction_type="trigflow")
    with pytest.raises(ValueError, match=r"epsilon.*got 'trigflow'"):
        step_coefficients(scheduler, 5)


def test_masked_pull_moves_by_the_weighted_fraction():
    x0, reference = torch.zeros(1, 4, 1, 3), torch.ones(1, 4, 1, 3)
    weight = torch.tensor([0.0, 1.0, 4.0]).reshape(1, 1, 1, 3)
    guided = masked_pull(x0, reference, weight, milo_scale=0.5)
    assert guided[0, 0, 0].tolist() == [
        0.0,
        0.5,
        1.0,
    ]  # the last fraction, 2, is capped at 1


@pytest.mark.parametrize("milo_scale", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_its_range_is_refused(milo_scale):
    with pytest.raises(ValueError, match=r"`milo_scale` in \[0, 1\]"):
        masked_pull(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 2, 2), milo_scale=milo_scale)


def test_a_push_refuses_another_objective():
    latents = torch.zeros(1, 4, 16, 16)
    options = {"find_mask": tiny_metric().mask, "find_weight": lambda mask: mask, "objective": "error"}
    with pytest.raises(ValueError, match=r"`objective` to be one of .*got 'error'"):
        gradient_push(latents, latents, milo_scale=0.1, **options)


@pytest.mark.parametrize("objective", ["weighted", "milo"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_push_against_the_gradient_lowers_the_objective(objective, inference):
    metric = tiny_metric()

    def find_mask(dist, ref):
        return metric.mask(dist=dist, ref=ref)

    def find_weight(mask):
        return curriculum_weight(mask, 0.3, schedule="linear")

    def error(dist, ref):
        mask = find_mask(dist, ref)
        weight = find_weight(mask) if objective == "weighted" else mask
        return (weight * (dist - ref).abs()).mean(dim=(1, 2, 3))

    with torch.inference_mode(inference):
        reference, x0 = (each * 1.0 for each in latent_pair(batch=2, noise=1.0))  # copies made in inference mode
        options = {"find_mask": find_mask, "find_weight": find_weight, "objective": objective}
        guided, mask = gradient_push(x0, reference, milo_scale=0.1, **options)
        assert not guided.requires_grad
        assert torch.allclose(mask, find_mask(x0, reference))
        assert (error(guided, reference) < error(x0, reference)).all()
        way, push = (reference - x0).flatten(1).norm(dim=1), (guided - x0).flatten(1).norm(dim=1)
        assert torch.allclose(push, 0.1 * way, rtol=1e-4)  # the stated normalisation, per sample


def test_equal_latents_are_not_pushed():
    metric, (reference, _) = tiny_metric(), latent_pair()
    guided, _ = gradient_push(
        reference, reference, find_mask=lambda dist, ref: metric.mask(dist=dist, ref=ref),
        find_weight=torch.ones_like, milo_scale=1.0,
    )  # fmt: skip
    assert torch.equal(guided, reference)
