"""MILO as a loss."""

import pytest
import torch
from torch import nn

from milo_latent import MILO, MILOLoss
from milo_latent.testing import latent_pair, tiny_metric


@pytest.mark.parametrize("reading", ["error", "error_map"])
def test_reductions_are_those_of_torch(metric, reading):
    target, pred = latent_pair(batch=3)
    none = MILOLoss(metric, reduction="none", reading=reading)(pred, target)
    assert none.shape == (3,)
    assert torch.allclose(MILOLoss(metric, reading=reading)(pred, target), none.mean())
    assert torch.allclose(MILOLoss(metric, reduction="sum", reading=reading)(pred, target), none.sum())


def test_descending_the_loss_finds_the_target(metric):
    target, pred = latent_pair(side=16)
    pred.requires_grad_(True)
    loss, optimizer = MILOLoss(metric), torch.optim.Adam([pred], lr=0.03)
    before = loss(pred, target).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(pred, target).backward()
        optimizer.step()
    assert loss(pred, target).item() < 0.2 * before


@pytest.mark.parametrize("reading", ["error", "error_map"])
def test_no_gradient_passes_through_the_mask_by_default(reading):
    """The gradient is that of a fixed mask, whereas the metric's own has a share of the mask's."""
    metric = MILO.from_pretrained("nano")
    target, pred = latent_pair()
    pred.requires_grad_(True)
    fixed = metric.mask(dist=pred, ref=target).detach()
    error = (fixed * (target - pred).abs()).mean(dim=1, keepdim=True)
    error = error if reading == "error" else metric.scale_error(error)
    by_hand = torch.autograd.grad(error.mean(dim=(1, 2, 3)).mean(), pred)[0]
    whole = metric(dist=pred, ref=target) if reading == "error" else metric.error_map(dist=pred, ref=target)
    through_mask = torch.autograd.grad(whole.mean(), pred)[0]
    (default,) = torch.autograd.grad(MILOLoss(metric, reading=reading)(pred, target), pred)
    (other,) = torch.autograd.grad(MILOLoss(metric, reading=reading, mask_gradient=True)(pred, target), pred)
    assert torch.allclose(default, by_hand, rtol=1e-4, atol=1e-8)
    assert torch.allclose(other, through_mask, rtol=1e-4, atol=1e-8)
    assert (default - other).abs().max() > 0.01 * default.abs().max()


def test_the_value_does_not_depend_on_the_gradient(metric):
    target, pred = latent_pair()
    pred.requires_grad_(True)
    expected = metric(dist=pred, ref=target).mean()
    for mask_gradient in (False, True):
        assert torch.allclose(MILOLoss(metric, mask_gradient=mask_gradient)(pred, target), expected)


def test_the_metric_is_neither_trained_nor_saved():
    module = nn.Module()
    module.loss = MILOLoss(tiny_metric().requires_grad_(True))
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    assert not any(parameter.requires_grad for parameter in module.loss.metric.parameters())


def test_what_is_no_metric_or_no_tensor_is_refused(metric):
    with pytest.raises(TypeError, match="to be a MILO, its name or its folder, got list"):
        MILOLoss([metric])
    with pytest.raises(TypeError, match=r"`pred` to be a torch\.Tensor, got list"):
        MILOLoss(metric)([1.0], latent_pair()[0])


def test_unknown_choices_are_refused(metric):
    with pytest.raises(ValueError, match="`reduction`"):
        MILOLoss(metric, reduction="median")
    loss, (ref, dist) = MILOLoss(metric), latent_pair()
    loss.reduction = "median"
    with pytest.raises(ValueError, match="`reduction`"):
        loss(dist, ref)
    with pytest.raises(ValueError, match="`reading`"):
        MILOLoss(metric, reading="stars")
