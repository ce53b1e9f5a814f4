"""The mask finder: its hand-written gradient is autograd's, and it notices when its weights change."""

import copy
import pickle

import pytest
import torch

from milo_latent.testing import generator, latent_pair, tiny_metric


def gradients(metric, dist, ref, of=("dist", "ref")):
    leaves = {"dist": dist.clone(), "ref": ref.clone()}
    for name in of:
        leaves[name].requires_grad_(True)
    score = metric(**leaves).sum()
    return torch.autograd.grad(score, [leaves[name] for name in of])


@pytest.fixture
def pair():
    return tuple(latents[..., :37, :] for latents in latent_pair(batch=3, side=50))


@pytest.mark.parametrize("of", [("dist",), ("ref",), ("dist", "ref")])
@pytest.mark.parametrize("shared_ref", [False, True])
def test_frozen_weights_change_no_gradient(metric, pair, of, shared_ref):
    ref, dist = pair
    ref = ref[:1] if shared_ref else ref
    trained = copy.deepcopy(metric).requires_grad_(True)
    for ours, autograd in zip(gradients(metric, dist, ref, of), gradients(trained, dist, ref, of), strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-4, atol=1e-8)
        assert ours.abs().max() > 0


def test_the_gradient_matches_finite_differences_in_float64(metric):
    metric = metric.double()
    ref, dist = (each.double() for each in latent_pair(side=17))
    direction = torch.randn(dist.shape, generator=generator(3), dtype=torch.float64)
    (gradient,) = gradients(metric, dist, ref, of=("dist",))
    step = 1e-6
    difference = (metric(dist=dist + step * direction, ref=ref) - metric(dist=dist - step * direction, ref=ref)) / (
        2 * step
    )
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_second_derivatives_are_autograds(metric):
    ref, dist = latent_pair()
    results = []
    for model in (metric, copy.deepcopy(metric).requires_grad_(True)):
        leaf = dist.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(model(dist=leaf, ref=ref).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-10)
    assert results[0].abs().max() > 0


@pytest.mark.parametrize("change", ["in place", "loaded", "dtype"])
def test_changed_weights_change_the_gradient(metric, pair, change):
    ref, dist = pair
    gradients(metric, dist, ref)  # whatever is kept is kept now
    other = tiny_metric(seed=5)
    if change == "in place":
        with torch.no_grad():
            for ours, theirs in zip(metric.parameters(), other.parameters(), strict=True):
                ours.copy_(theirs)
    elif change == "loaded":
        metric.load_state_dict(other.state_dict(), assign=True)
        metric.requires_grad_(False)
    else:
        metric, other, ref, dist = metric.double(), metric.double(), ref.double(), dist.double()
        other = copy.deepcopy(other).requires_grad_(True)
    for ours, expected in zip(gradients(metric, dist, ref), gradients(other, dist, ref), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("of_inputs", [False, True])
def test_training_still_reaches_every_parameter(metric, pair, of_inputs):
    ref, dist = (each.clone().requires_grad_(of_inputs) for each in pair)
    trained = metric.requires_grad_(True)
    trained(dist=dist, ref=ref).sum().backward()
    finder = [parameter.grad for name, parameter in trained.named_parameters() if name.startswith("mask_finder")]
    assert len(finder) == 10
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in finder)


def test_autocast_gives_a_score_and_a_gradient(metric):
    ref, dist = latent_pair(side=32)
    leaf = dist.clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = metric(dist=leaf, ref=ref)
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    (expected,) = gradients(metric, dist, ref, of=("dist",))
    assert score.item() == pytest.approx(metric(dist=dist, ref=ref).item(), rel=0.01)
    assert (gradient - expected).norm() < 0.05 * expected.norm()


def test_inputs_of_another_dtype_or_device_than_the_metrics_are_refused(metric):
    ref, dist = latent_pair()
    with pytest.raises(TypeError, match=r"metric's dtype torch\.float32, got torch\.float64"):
        metric(dist=dist.double(), ref=ref.double())
    with pytest.raises(ValueError, match="metric's device cpu, got meta"):
        metric(dist=dist.to("meta"), ref=ref.to("meta"))


def test_weights_changed_through_data_change_the_gradient(metric, pair):
    ref, dist = pair
    gradients(metric, dist, ref)
    for parameter in metric.parameters():  # as averages of weights are often written; torch does not count it
        parameter.data.mul_(1.7)
    expected = gradients(copy.deepcopy(metric).requires_grad_(True), dist, ref)
    for ours, autograd in zip(gradients(metric, dist, ref), expected, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-4, atol=1e-8)


def test_a_metric_keeps_nothing_of_a_gradient(metric, pair):
    before = len(pickle.dumps(metric))
    gradients(metric, *pair)
    assert len(pickle.dumps(metric)) == before


def test_the_transformations_of_torch_func_agree_with_autograd(metric, pair):
    ref, dist = pair

    def score(candidate):
        return metric(dist=candidate[None], ref=ref[:1])[0]

    (expected,) = gradients(metric, dist, ref[:1], of=("dist",))
    both = torch.func.vmap(torch.func.grad(score))(dist)
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(torch.func.vmap(score)(dist), metric(dist=dist, ref=ref[:1]))
    way = torch.randn(dist.shape[1:], generator=generator(4))
    slope = torch.func.jvp(score, (dist[0],), (way,))[1]
    assert slope.item() == pytest.approx((expected[0] * way).sum().item(), rel=1e-4)


def test_a_vectorised_jacobian_is_that_of_a_loop(metric, pair):
    ref, dist = pair

    def scores(candidates):
        return metric(dist=candidates, ref=ref)

    loop = torch.autograd.functional.jacobian(scores, dist)
    torch.testing.assert_close(torch.autograd.functional.jacobian(scores, dist, vectorize=True), loop)
    assert loop.abs().max() > 0


def test_shapes_are_found_without_memory(metric):
    leaf = torch.empty(2, 4, 32, 32, device="meta", requires_grad=True)
    score = metric.to("meta")(dist=leaf, ref=torch.empty(2, 4, 32, 32, device="meta"))
    assert score.shape == (2,)
    assert torch.autograd.grad(score.sum(), leaf)[0].shape == leaf.shape
