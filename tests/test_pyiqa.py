"""MILO in pyiqa, where that is installed."""

import sys

import pytest
import torch

from milo_latent import MILO, MILOLoss
from milo_latent.metric.pyiqa import MILONetwork, register
from milo_latent.testing import latent_pair, tiny_metric


def image_pair(**options):
    return (each.sigmoid() for each in latent_pair(channels=3, side=48, **options))


@pytest.fixture
def pyiqa():
    module = pytest.importorskip("pyiqa", reason="needs pip install pyiqa, whose licence is non-commercial")
    register()
    return module


def test_pyiqa_makes_a_milo_that_equals_it(pyiqa):
    register()  # a second time
    ref, dist = image_pair(batch=3)
    metric = pyiqa.create_metric("milo", device="cpu")
    assert "milo" in pyiqa.list_models("FR")
    assert metric.lower_better
    assert metric.metric_mode == "FR"
    expected = MILO.from_pretrained("milo-image")(ref=ref, dist=dist)
    assert torch.allclose(metric(dist, ref), expected, rtol=0, atol=1e-6)
    assert metric(ref, ref).tolist() == [0, 0, 0]


def test_options_choose_the_weights_and_the_reading(pyiqa):
    own = tiny_metric(channels=3)
    ref, dist = image_pair()
    metric = pyiqa.create_metric("milo", device="cpu", metric=own, reading="error_map")
    expected = own.error_map(ref=ref, dist=dist).mean()
    assert metric(dist, ref).item() == pytest.approx(expected.item(), abs=1e-6)


def test_as_a_loss_it_has_the_gradient_of_ours(pyiqa):
    ref, dist = image_pair(batch=2)
    gradients = []
    for loss in (pyiqa.create_metric("milo", device="cpu", as_loss=True), MILOLoss("milo-image")):
        pred = dist.clone().requires_grad_(True)
        loss(pred, ref).backward()
        gradients.append(pred.grad)
    assert torch.allclose(*gradients, rtol=0, atol=1e-8)
    assert gradients[0].abs().sum() > 0


def test_files_are_read_by_pyiqa_as_they_are_by_us(pyiqa, photo, tmp_path):
    from milo_latent import read_image, write_image

    write_image(tmp_path / "other.png", read_image(photo) * 0.8)
    metric = pyiqa.create_metric("milo", device="cpu")
    expected = MILO.from_pretrained("milo-image")(ref=photo, dist=tmp_path / "other.png")
    assert metric(str(tmp_path / "other.png"), str(photo)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_network_takes_the_distorted_image_first_and_gray_ones():
    metric = tiny_metric(channels=3)
    ref, dist = image_pair(batch=2)
    network = MILONetwork(metric)
    assert torch.equal(network(dist, ref), metric(dist=dist, ref=ref))
    gray = [each[:, :1] for each in (dist, ref)]
    assert torch.equal(network(*gray), metric(dist=gray[0].repeat(1, 3, 1, 1), ref=gray[1].repeat(1, 3, 1, 1)))
    assert not list(network.state_dict())


def test_a_metric_for_latents_is_refused():
    with pytest.raises(ValueError, match="a metric for images, got one for latents, 'milo-sd'"):
        MILONetwork("milo-sd")


def test_without_pyiqa_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.delitem(sys.modules, "pyiqa.default_model_configs", raising=False)
    with pytest.raises(ImportError, match=r"needs pyiqa .*: pip install pyiqa\."):
        register()


def test_another_metric_of_that_name_is_not_replaced(monkeypatch):
    configs = type("Configs", (), {"DEFAULT_CONFIGS": {"milo": {"metric_opts": {"type": "MILO"}}}})
    monkeypatch.setitem(sys.modules, "pyiqa", configs)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", configs)
    monkeypatch.setitem(sys.modules, "pyiqa.utils", configs)
    monkeypatch.setitem(sys.modules, "pyiqa.utils.registry", type("Registry", (), {"ARCH_REGISTRY": None}))
    with pytest.raises(ValueError, match="got one of its own"):
        register()
    assert configs.DEFAULT_CONFIGS == {"milo": {"metric_opts": {"type": "MILO"}}}
