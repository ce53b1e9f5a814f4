"""What training compares with what: the online loss, its validation, and that of restorers, computed here again."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from milo_latent.evaluation.agreement import Logistic
from milo_latent.evaluation.metrics import FullReference
from milo_latent.latents.codec import encode_image
from milo_latent.metric.network import MILO
from milo_latent.testing import generator, tiny_metric, tiny_pipeline
from milo_latent.training import train_metric_online, validation
from milo_latent.training.pseudo_mos import Calibration, Ensemble
from milo_latent.training.train_metric import initialize
from milo_latent.training.train_metric_online import Teacher


def uneven_metric(channels):
    """Return a metric whose maps differ between pixels, and between (ref, dist) and (dist, ref)."""
    metric = tiny_metric(channels=channels, seed=channels)
    initialize(metric)
    for layer in list(metric.mask_finder)[::2][:-1]:
        layer.weight.mul_(3.0)
    return metric


@pytest.fixture(scope="module")
def loss():
    vae = tiny_pipeline().vae.requires_grad_(False)
    vae.encoder.layers[-1].weight.mul_(60.0)  # or its latents hardly differ
    return train_metric_online.TeacherLoss(uneven_metric(4), teacher=Teacher(uneven_metric(3)), vae=vae)


def maps(loss, ref, dist):
    """Return both error maps."""
    latents = {name: encode_image(loss.vae, image).float() for name, image in (("ref", ref), ("dist", dist))}
    return loss.metric.error_map(**latents), loss.teacher(ref=ref, dist=dist)


def test_the_online_loss_compares_maps_and_means_of_the_same_pair(loss):
    ref, dist = torch.rand(2, 2, 3, 128, 128, generator=generator()).unbind()
    ref *= 0.1
    values = []
    for one, other in ((ref, dist), (dist, ref)):
        predicted, target = maps(loss, one, other)
        target = F.avg_pool2d(target, 8)
        gap = predicted.mean(dim=(1, 2, 3)) - target.mean(dim=(1, 2, 3))
        values.append((gap.square().mean() + (predicted - target).square().mean()).item())
    assert loss(ref, dist).item() == pytest.approx(values[0], rel=1e-5)
    assert abs(values[0] - values[1]) > 1e-4 * values[0]


def test_a_teacher_for_latents_labels_what_its_own_autoencoder_encodes(tmp_path):
    vae, metric = tiny_pipeline(seed=3).vae, uneven_metric(4)
    vae.encoder.layers[-1].weight.data.mul_(30.0)
    metric.save_pretrained(tmp_path / "metric")
    vae.save_pretrained(tmp_path / "vae")
    teacher = Teacher.open(str(tmp_path / "metric"), str(tmp_path / "vae"))
    ref, dist = torch.rand(2, 2, 3, 128, 128, generator=generator()).unbind()
    ref *= 0.1
    labels = teacher(ref=ref, dist=dist)
    expected = metric.error_map(ref=encode_image(vae, ref), dist=encode_image(vae, dist))
    assert torch.allclose(labels, expected, atol=1e-6)
    assert not torch.allclose(labels, teacher(ref=dist, dist=ref), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_members_beside_the_teacher_scale_its_map_to_the_mean_of_all_labels():
    def error(*, ref, dist):
        return 0.2 * ref.mean(dim=(1, 2, 3)) - 0.1 * dist.mean(dim=(1, 2, 3))

    line = Calibration(Logistic(5.0, 1.0, 0.05, -0.02), best=0.0)
    members = Ensemble([FullReference("mine", error, False)], {"mine": line})
    alone, together = Teacher(uneven_metric(3)), Teacher(uneven_metric(3), members=members)
    ref, dist = torch.rand(2, 2, 3, 128, 128, generator=generator()).unbind()
    dist *= torch.tensor([0.3, 0.6]).view(2, 1, 1, 1)
    before, after = alone(ref=ref, dist=dist), together(ref=ref, dist=dist)
    own, labels = before.mean(dim=(1, 2, 3)), line(error(ref=ref, dist=dist))
    assert torch.allclose(after.mean(dim=(1, 2, 3)), ((own + labels) / 2).float(), rtol=1e-4)
    ratio = after / before
    assert torch.allclose(ratio, ratio.mean(dim=(1, 2, 3), keepdim=True).expand_as(ratio), rtol=1e-4)
    assert (ratio[0] - 1).abs().min() > 0.01


def test_a_teacher_needs_the_autoencoder_of_its_latents_and_no_other():
    with pytest.raises(ValueError, match="for latents with it, got nano of 4 channels and None"):
        Teacher.open("nano")
    with pytest.raises(ValueError, match="got milo-image of 3 channels and nano"):
        Teacher.open("milo-image", "nano")
    with pytest.raises(ValueError, match="Expected a VAE whose latents the metric knows"):
        Teacher.open("milo-sd", "nano")


def test_the_online_validation_ranks_the_same_pairs_by_both_metrics(loss, images, monkeypatch):
    batches, seen = torch.rand(2, 2, 2, 3, 128, 128, generator=generator()), []
    batches[:, 0] *= 0.1
    monkeypatch.setattr(
        train_metric_online, "draw_image_pairs", lambda crops, size: lambda step, _: tuple(batches[step])
    )
    monkeypatch.setattr(train_metric_online, "spearman", lambda *means: seen.extend(means) or 0.5)
    assert train_metric_online.teacher_agreement(loss, images, crop_size=128, batches=2) == 0.5
    ref, dist = batches.transpose(0, 1).flatten(1, 2)
    for found, expected, swapped in zip(seen, maps(loss, ref, dist), maps(loss, dist, ref), strict=True):
        assert torch.allclose(found, expected.mean(dim=(1, 2, 3)), rtol=1e-4)
        assert not torch.allclose(found, swapped.mean(dim=(1, 2, 3)), rtol=1e-3)


def test_a_restorer_is_validated_by_psnr_and_by_the_error_of_restored_against_clean(images, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "restore_image", lambda image, **_: image * 0.5 + 0.2)
    degraded = []

    def degrade(image, rng):
        degraded.append((image + 0.1 * torch.from_numpy(rng.standard_normal(image.shape)).float()).clamp(0, 1))
        return degraded[-1]

    validator = validation.RestorationValidator(
        images, count=2, degradation=degrade, pipeline=tiny_pipeline(), output=tmp_path
    )
    figures, metric = validator(torch.nn.Identity()), MILO.from_pretrained("milo-image")
    for number, (image, clean) in enumerate(zip(degraded, validator.clean, strict=True)):
        noise = torch.from_numpy(np.random.default_rng(number).standard_normal(image.shape)).float()
        assert torch.equal(image, (clean[0] + 0.1 * noise).clamp(0, 1))
    pairs = [(image[None] * 0.5 + 0.2, clean) for image, clean in zip(degraded, validator.clean, strict=True)]
    psnr = [-10 * (image - clean).square().mean().log10().item() for image, clean in pairs]
    error, swapped = (
        np.mean([metric(**dict(zip(names, pair, strict=True))).item() for pair in pairs])
        for names in (("dist", "ref"), ("ref", "dist"))
    )
    assert figures == {"psnr": pytest.approx(np.mean(psnr), abs=1e-3), "milo_error": pytest.approx(error, abs=1e-6)}
    assert abs(error - swapped) > 1e-5
