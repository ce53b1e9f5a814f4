"""MILO as metrics of torchmetrics, whose own tests of a metric were passed beside these."""

import pickle

import pytest
import torch
import torchmetrics  # noqa: TID253
from PIL import Image

from milo_latent import encode_image
from milo_latent.metric.torchmetrics import MILOLatentMetric, MILOMetric
from milo_latent.testing import latent_pair, tiny_metric


def batches(channels=3, count=3):
    return [tuple(torch.rand(2, 2, channels, 16, 18).unbind()) for _ in range(count)]


@pytest.mark.parametrize("reading", ["error", "mos"])
def test_a_metric_accumulates_over_batches(reading):
    network, pairs = tiny_metric(channels=3), batches()
    errors = torch.cat([network(dist=dist, ref=ref) for dist, ref in pairs])
    values = errors if reading == "error" else network.mos(errors)
    for reduction, expected in (("mean", values.mean()), ("sum", values.sum()), ("none", values)):
        metric = MILOMetric(network, reading=reading, reduction=reduction)
        for dist, ref in pairs:
            metric.update(dist, ref)
        assert torch.allclose(metric.compute(), expected, rtol=1e-6)
        metric.reset()
        assert torch.equal(metric(*pairs[0]), metric.compute())  # of the first batch alone
        assert not torch.equal(metric.compute(), expected)
    assert MILOMetric(network, reading=reading).higher_is_better == (reading == "mos")


def test_it_takes_images_as_people_have_them(photo):
    metric = MILOMetric()
    metric.update(photo, Image.open(photo))
    assert metric.compute() == 0


def test_it_lives_in_collections_and_pickles_without_weights():
    network = tiny_metric(channels=3)
    metric = MILOMetric(network)
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == []
    pair = batches()[0]
    collection = torchmetrics.MetricCollection({"milo": metric, "mae": torchmetrics.MeanAbsoluteError()})
    assert torch.equal(collection(*pair)["milo"], network(dist=pair[0], ref=pair[1]).mean())
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())
    figure, _ = metric.plot()
    assert figure is not None


def test_a_latent_metric_takes_latents_or_images_with_a_vae(pipeline):
    ref, dist = latent_pair(batch=2)
    network = tiny_metric()
    metric = MILOLatentMetric(network)
    assert torch.equal(metric(dist, ref), network(dist=dist, ref=ref).mean())
    photos = torch.rand(2, 1, 3, 128, 128)
    latents = [encode_image(pipeline.vae, photo) for photo in photos]
    with_vae = MILOLatentMetric(network, vae=pipeline.vae)
    assert torch.equal(with_vae(photos[0], photos[1]), network(dist=latents[0], ref=latents[1]).mean())
    assert MILOLatentMetric("nano", vae="nano").update(photos[0], photos[1]) is None


def test_metrics_of_the_other_space_and_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="for images, got one for latents"):
        MILOMetric(tiny_metric())
    with pytest.raises(ValueError, match="for latents, got one for images"):
        MILOLatentMetric(tiny_metric(channels=3))
    with pytest.raises(ValueError, match="`reading`"):
        MILOMetric(reading="stars")
    with pytest.raises(ValueError, match="`reduction`"):
        MILOMetric(reduction="median")
