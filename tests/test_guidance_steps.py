"""Each guided step is the one that the formulas give, computed here again, where mask and schedule matter."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

from milo_latent import MILOGuidance
from milo_latent.guidance.reference import match_region
from milo_latent.guidance.x0 import decoder_push
from milo_latent.testing import generator, latent_pair

ALPHA = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 0.5,
}
REFERENCE, X0 = latent_pair(batch=2, side=24, noise=1.0, seed=7)
START, STOP, STEPS = 0.25, 0.75, (0.25, 0.35, 0.65, 0.75)


@pytest.fixture
def metric(uneven_metric):
    return uneven_metric


def weight_by_hand(metric, x0, progress, schedule):
    """W of the clean estimate: less visible regions first, with mean 1."""
    alpha, visible = ALPHA[schedule](progress), metric.mask(dist=x0, ref=REFERENCE) / 4
    weight = (1 - alpha) * (1 - visible) + alpha * visible
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def guided(metric, progress, **options):
    guide = MILOGuidance(metric, reference_latents=REFERENCE, start=START, stop=STOP, **options)
    guide.start(REFERENCE, 9)
    return guide(X0, progress=progress, timestep=500.0)


def test_the_mask_of_this_file_tells_ref_from_dist_and_pixels_from_each_other(metric):
    one, other = metric.mask(dist=X0, ref=REFERENCE), metric.mask(dist=REFERENCE, ref=X0)
    assert (one - other).abs().mean() > 0.05
    assert one.std() > 0.2


@pytest.mark.parametrize("schedule", ALPHA)
@pytest.mark.parametrize("progress", STEPS)
def test_the_mask_mode_moves_each_pixel_by_the_weight_of_its_progress_in_the_interval(metric, schedule, progress):
    weight = weight_by_hand(metric, X0, (progress - START) / (STOP - START), schedule)
    expected = X0 + (0.7 * weight).clamp(max=1) * (REFERENCE - X0)
    assert torch.allclose(guided(metric, progress, milo_scale=0.7, schedule=schedule), expected, atol=1e-5)


@pytest.mark.parametrize("objective", ["weighted", "milo"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("progress", STEPS[1:3])
def test_the_metric_mode_descends_its_objective_through_the_mask(metric, objective, schedule, progress):
    leaf = X0.clone().requires_grad_(True)
    weight = weight_by_hand(metric, leaf, (progress - START) / (STOP - START), schedule)
    weight = metric.mask(dist=leaf, ref=REFERENCE) if objective == "milo" else weight
    gradients = []
    for each in (weight, weight.detach()):
        (gradient,) = torch.autograd.grad((each * (leaf - REFERENCE).abs()).mean(), leaf, retain_graph=True)
        way = REFERENCE - X0
        gradient = gradient * way.abs()
        gradients.append(gradient * (way.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)).view(-1, 1, 1, 1))
    options = {"mode": "metric", "objective": objective, "schedule": schedule}
    result = guided(metric, progress, milo_scale=0.3, **options)
    assert torch.allclose(result, X0 - 0.3 * gradients[0], atol=1e-4)
    assert (gradients[0] - gradients[1]).abs().max() > 0.01  # a detached mask would give another push


@pytest.mark.parametrize("progress", [0.0, 0.24, 0.76, 1.0])
def test_outside_the_interval_the_estimate_itself_comes_back(metric, progress):
    assert guided(metric, progress) is X0


def test_an_interval_of_one_moment_is_its_end(metric):
    guide = MILOGuidance(metric, 0.5, "linear", start=0.5, stop=0.5, reference_latents=REFERENCE)
    guide.start(REFERENCE, 3)
    expected = X0 + (0.5 * weight_by_hand(metric, X0, 1.0, "linear")).clamp(max=1) * (REFERENCE - X0)
    assert torch.allclose(guide(X0, progress=0.5, timestep=1.0), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["mask", "metric"])
def test_the_trace_holds_error_weight_change_and_mask_of_its_step(metric, mode):
    region = 2 * torch.rand(2, 1, 24, 24, generator=generator(1))  # past the whole way in some pixels
    guide = MILOGuidance(metric, 0.9, "linear", reference_latents=REFERENCE, mode=mode, region=region, trace=True)
    guide.start(REFERENCE, 5)
    result = guide(X0, progress=0.2, timestep=321.0)
    (step,) = guide.trace
    way, mask = REFERENCE - X0, metric.mask(dist=X0, ref=REFERENCE)
    weight = weight_by_hand(metric, X0, 0.2, "linear") if mode == "mask" else torch.ones_like(mask)
    assert (step.step, step.timestep, step.scale) == (0, 321.0, 0.9)
    assert torch.allclose(step.error, (mask * way.abs()).mean(dim=(1, 2, 3)))
    applied = 0.9 * weight * region
    applied = applied.clamp(max=1) if mode == "mask" else applied
    assert applied.max() >= 1
    assert torch.allclose(step.weight, applied.mean(dim=(1, 2, 3)))
    change = (result - X0).flatten(1).norm(dim=1) / way.flatten(1).norm(dim=1)
    assert torch.allclose(step.change, change)
    assert torch.allclose(step.mask, mask / 4)


def test_the_masks_of_a_trace_are_averaged_over_cells_where_they_are_large(metric):
    ref, x0 = latent_pair(side=128, noise=1.0)
    guide = MILOGuidance(metric, 0.4, reference_latents=ref, trace=True)
    guide.start(ref, 1)
    guide(x0, progress=0.0, timestep=1.0)
    mask = metric.mask(dist=x0, ref=ref)
    assert torch.allclose(guide.trace.steps[0].mask, F.avg_pool2d(mask, 2) / 4, atol=1e-6)


def run_steps(guide, *, late, steps=4):
    """Run a loop with a guide that is attached, or called back after each step as pipelines do."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    pipe, sample = SimpleNamespace(scheduler=scheduler, num_timesteps=steps), X0
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(0.9 * sample, timestep, sample).prev_sample
        if late:
            guide.callback_fn(pipe, index, timestep, {})
    return sample


@pytest.mark.filterwarnings("ignore:As a plain callback")
def test_as_a_plain_callback_the_curriculum_counts_the_step_that_it_missed(metric):
    seen = []
    guide = MILOGuidance(
        metric, schedule=lambda progress: seen.append(progress) or progress, reference_latents=REFERENCE
    )
    for _ in range(2):
        seen.clear()
        run_steps(guide, late=True)
        assert seen == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_region_multiplies_the_fraction(metric):
    region = torch.rand(1, 1, 24, 24, generator=generator(2)) * 2
    weight = weight_by_hand(metric, X0, 0.5, "linear")
    expected = X0 + (0.4 * weight * region).clamp(max=1) * (REFERENCE - X0)
    result = guided(metric, 0.5, milo_scale=0.4, schedule="linear", region=region)
    assert torch.allclose(result, expected, atol=1e-5)
    assert torch.equal(match_region(None, X0), torch.ones(1, 1, 1, 1))


def test_a_push_through_a_linear_decoder_goes_the_whole_best_step():
    """Of mean(w * (t - A x)^2) down the gradient g = A^T w (t - A x), the best step is |g|^2 / (w (A g)^2)."""
    matrix = torch.randn(3 * 64, 4 * 16, generator=generator(0), dtype=torch.float64)
    x0, target = (
        torch.randn(2, *shape, generator=generator(1), dtype=torch.float64) for shape in ((4, 4, 4), (3, 8, 8))
    )
    weight = torch.rand(2, 1, 8, 8, generator=generator(2), dtype=torch.float64) + 0.1
    push = decoder_push(x0, target, weight, decode=lambda z: (z.flatten(1) @ matrix.T).view(-1, 3, 8, 8), scale=0.5)
    for item in range(2):
        rows = weight[item].expand(3, 8, 8).flatten()
        gradient = matrix.T @ (rows * (target[item].flatten() - matrix @ x0[item].flatten()))
        best = gradient.square().sum() / (rows * (matrix @ gradient).square()).sum()
        assert torch.allclose(push[item].flatten(), 0.5 * best * gradient, rtol=1e-4)
