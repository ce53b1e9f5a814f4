"""What networks are trained to lower: each objective against a calculation by hand, and where gradients go."""

import math

import pytest
import torch

from milo_latent.guidance.curriculum import curriculum_weight
from milo_latent.testing import tiny_metric
from milo_latent.training.objectives import Objective, training_progress


@pytest.fixture
def metric():
    return tiny_metric(channels=3).requires_grad_(False)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 32, 32, generator=generator)
    pred = (target + 0.1 * torch.randn(2, 3, 32, 32, generator=generator)).clamp(0, 1)
    return pred.requires_grad_(), target


def test_mae_is_the_mean_absolute_error(pair):
    pred, target = pair
    assert Objective("mae")(pred, target).item() == pytest.approx((pred - target).abs().sum().item() / 6144, rel=1e-5)


def test_log_mse_is_the_mean_over_images_of_the_logarithm():
    target = torch.zeros(2, 3, 8, 8)
    pred = torch.stack([torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.2)])
    expected = (math.log(0.01 + 1e-4) + math.log(0.04 + 1e-4)) / 2
    assert Objective("log-mse")(pred, target).item() == pytest.approx(expected, rel=1e-5)


def test_milo_is_the_metric_s_error(pair, metric):
    pred, target = pair
    expected = metric(dist=pred, ref=target).mean()
    assert torch.allclose(Objective("milo", metric)(pred, target), expected)


def test_log_milo_is_the_mean_over_images_of_the_logarithm_of_the_error(pair, metric):
    pred, target = pair
    expected = (metric(dist=pred, ref=target) + 1e-4).log().mean()
    assert torch.allclose(Objective("log-milo", metric)(pred, target), expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_curriculum_weighs_absolute_errors(pair, metric, schedule, progress):
    pred, target = pair
    weight = curriculum_weight(metric.mask(dist=pred, ref=target), progress, schedule=schedule)
    expected = (weight * (pred - target).abs()).mean()
    assert torch.allclose(Objective(schedule, metric)(pred, target, progress=progress), expected)


def test_a_curriculum_half_way_is_the_mean_absolute_error(pair, metric):
    pred, target = pair
    loss = Objective("linear", metric)(pred, target, progress=0.5)
    assert torch.allclose(loss, Objective("mae")(pred, target))


@pytest.mark.parametrize("name", ["milo", "linear", "cosine"])
def test_no_gradient_passes_through_the_mask(pair, metric, name):
    """The gradient is that of a fixed weight: sign of the difference times weight, over the number of values."""
    pred, target = pair
    mask = metric.mask(dist=pred, ref=target).detach()
    weight = mask if name == "milo" else curriculum_weight(mask, 1.0, schedule=name)
    (gradient,) = torch.autograd.grad(Objective(name, metric)(pred, target, progress=1.0), pred)
    expected = weight * (pred - target).sign() / pred.numel()
    assert torch.allclose(gradient, expected.detach(), rtol=1e-4, atol=1e-9)


def test_the_gradient_through_the_mask_is_that_of_the_metric(pair, metric):
    pred, target = pair
    (gradient,) = torch.autograd.grad(Objective("milo-through-mask", metric)(pred, target), pred)
    (expected,) = torch.autograd.grad(metric(dist=pred, ref=target).mean(), pred)
    (detached,) = torch.autograd.grad(Objective("milo", metric)(pred, target), pred)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-9)
    assert not torch.allclose(gradient, detached, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["milo", "cosine"])
def test_masks_are_computed_in_float32_under_autocast_too(pair, metric, name):
    pred, target = pair
    expected = Objective(name, metric)(pred, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert Objective(name, metric)(pred, target).item() == expected.item()


def test_objectives_that_need_a_metric_ask_for_it():
    with pytest.raises(TypeError, match="`metric` to be a MILO, its name or its folder, got NoneType"):
        Objective("milo")
    with pytest.raises(ValueError, match="'lpips'"):
        Objective("lpips")


def test_progress_runs_from_0_to_1():
    assert [training_progress(step, 5) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert training_progress(0, 1) == 0.0
