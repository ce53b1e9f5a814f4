"""Distillation: synthetic latents, the loss and its minimum, the comparison with the teacher, the command."""

import ast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from milo_latent import MILO
from milo_latent.files import write_latents
from milo_latent.testing import latent_pair, tiny_metric
from milo_latent.training.data.crops import ImageCrops
from milo_latent.training.data.image_pairs import draw_image_pairs
from milo_latent.training.distillation import distill_metric
from milo_latent.training.distillation.distill_metric import MatchingLoss, compare, levels_and_mask, perturb_pair
from milo_latent.training.distillation.encoded_pairs import EncodedPairs, half_encoded
from milo_latent.training.distillation.latent_distortions import DISTORTIONS, draw_latent_pairs
from milo_latent.training.distillation.latent_fields import (
    REGIONS,
    colored_noise,
    encode_randomly,
    encoder_kernels,
    piecewise_constant,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_coloured_noise_has_the_spectrum_asked_for():
    fields = colored_noise(seeded(), (32, 4, 64, 64), torch.full((32,), 1.0))
    power = torch.fft.rfft2(fields).abs().square().mean(dim=(0, 1))
    low, high = power[4, 0], power[16, 0]  # four times the frequency: a sixteenth of the power
    assert (low / high).item() == pytest.approx(16, rel=0.3)
    assert fields.std(dim=(2, 3)).mean().item() == pytest.approx(1, abs=1e-3)


def test_flat_regions_are_flat_and_random_encoders_see_each_image_by_themselves():
    assert len(piecewise_constant(seeded(), (1, 1, 32, 32)).unique()) <= REGIONS
    photos = torch.rand(2, 3, 64, 64, generator=seeded(1))
    kernels = encoder_kernels(seeded(2), 2, stride=4)
    both = encode_randomly(photos, kernels, stride=4)
    assert both.shape == (2, 8, 16, 16)
    assert torch.allclose(both[:1], encode_randomly(photos[:1], kernels[:8], stride=4), atol=1e-4)


@pytest.mark.parametrize("distort", DISTORTIONS)
def test_every_distortion_of_latents_changes_them_and_stays_finite(distort):
    ref = torch.randn(4, 4, 32, 32, generator=seeded())
    dist = distort(seeded(5), ref)
    assert dist.shape == ref.shape
    assert torch.isfinite(dist).all()
    assert not torch.equal(dist, ref)


def test_drawn_pairs_follow_from_the_step_and_have_the_spread_of_latents(images):
    draw = draw_latent_pairs(ImageCrops([images], crop_size=128, seed=1), 8)
    pairs = [draw(step, 0) for step in range(6)]
    assert all(torch.equal(first, again) for first, again in zip(pairs[3], draw(3, 0), strict=True))
    assert {ref.shape[2] for ref, _ in pairs} == {32, 64}
    assert all(
        ref.shape == dist.shape and torch.isfinite(ref).all() and torch.isfinite(dist).all() for ref, dist in pairs
    )
    spread = torch.stack([ref.std() for ref, _ in pairs])
    assert 0.4 < spread.min() < spread.max() < 1.6
    ref, dist = draw_image_pairs(ImageCrops([images], crop_size=64, seed=1), 3)(0, 0)
    assert ref.shape == dist.shape == (3, 3, 64, 64)
    assert dist.min() >= 0
    assert dist.max() <= 1


@pytest.fixture
def encoded(tmp_path):
    """A training set in which only the first half of the pairs differ."""
    ref = torch.randn(6, 4, 32, 32, generator=seeded(3)) * torch.tensor([2.0, 1.0, 0.5, 0.1]).view(1, 4, 1, 1)
    dist = ref + torch.cat([torch.ones(3), torch.zeros(3)]).view(6, 1, 1, 1)
    tensors = {"ref_latents": ref, "dist_latents": dist, "ref_index": torch.arange(6)}
    tensors |= {"dmos": torch.zeros(6)}
    save_file(tensors, tmp_path / "shard-00000.safetensors")
    (tmp_path / "dataset.json").write_text('{"shards": 1}')
    return tmp_path


def test_encoded_pairs_are_mixed_alike_and_follow_from_the_draw(encoded):
    pairs = EncodedPairs(encoded, channels=4)
    ref, dist = pairs.draw(np.random.default_rng(1), 64)
    assert ref.shape == dist.shape == (64, 4, 32, 32)
    assert all(torch.equal(*each) for each in zip(pairs.draw(np.random.default_rng(1), 64), (ref, dist), strict=True))
    assert 0.4 < ref.std() < 1.6
    for seed in range(6):  # in other orientations
        ref, dist = pairs.draw(np.random.default_rng(seed), 64)
        changed = (ref - dist).abs().amax(dim=(1, 2, 3)) > 1e-4
        assert 0.4 < changed.float().mean() < 0.85  # half, and a quarter of the others, which are distorted once more


def test_encoded_pairs_of_another_space_are_refused(encoded):
    with pytest.raises(ValueError, match=r"latents of 3 channels .* got 4"):
        EncodedPairs(encoded, channels=3)


def test_every_other_batch_is_encoded(encoded):
    draw = half_encoded(lambda step, process: (torch.zeros(()),), encoded, channels=4, batch_size=2, seed=0)
    shapes = [draw(step, 0)[0].shape for step in range(40)]
    assert 10 < shapes.count((2, 4, 32, 32)) < 30
    assert torch.equal(draw(3, 0)[0], draw(3, 0)[0])


def test_levels_add_up_to_the_mask_that_the_metric_gives(metric):
    ref, dist = latent_pair(side=32)
    levels, mask = levels_and_mask(metric, ref=ref, dist=dist)
    assert [level.shape[2] for level in levels] == [4, 8, 16, 32]
    assert torch.allclose(mask, metric.mask(ref=ref, dist=dist), atol=1e-5)
    odd = (ref[..., :29, :21], dist[..., :29, :21])
    assert torch.allclose(
        levels_and_mask(metric, ref=odd[0], dist=odd[1])[1], metric.mask(ref=odd[0], dist=odd[1]), atol=1e-5
    )
    flat = [level.sigmoid().mean() for level in levels]
    assert mask.mean().item() == pytest.approx(sum(flat).item(), rel=0.05)


def test_the_loss_is_zero_for_the_teacher_itself_and_falls_with_training(metric):
    ref, dist = latent_pair(batch=2, side=32)
    assert MatchingLoss(tiny_metric(), metric)(ref, dist).item() == pytest.approx(0, abs=1e-5)
    student = MILO(channels=4)
    loss = MatchingLoss(student, tiny_metric(seed=3))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    values = []
    for _ in range(25):
        value = loss(ref, dist)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


def test_comparison_is_perfect_with_itself_and_sees_a_difference(metric):
    pairs = perturb_pair(*latent_pair(side=32))
    same = compare(metric, tiny_metric(), pairs)
    assert same["srcc"] == pytest.approx(1)
    assert same["relative_error"] == 0
    assert same["mask_correlation_worst"] == pytest.approx(1, abs=1e-5)
    assert compare(metric, tiny_metric(seed=1), pairs)["mask_correlation"] < 0.9


def test_the_held_out_pair_is_perturbed_in_more_than_200_ways():
    pairs = perturb_pair(*latent_pair(side=32))
    assert len(pairs) > 200
    assert not any(torch.equal(*pair) for pair in pairs)
    again = perturb_pair(*latent_pair(side=32))
    assert all(torch.equal(first[1], second[1]) for first, second in zip(pairs, again, strict=True))


def test_the_student_never_reads_the_teacher_s_weights(repository):
    """Only its outputs: no `state_dict`, `parameters` or `copy_` in the module, and a start from random weights."""
    tree = ast.parse((repository / "milo_latent" / "training" / "distillation" / "distill_metric.py").read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"state_dict", "load_state_dict", "parameters", "copy_", "weight", "data"}


def test_the_command_distils_resumes_and_evaluates(images, tmp_path, capsys):
    tiny_metric(seed=2).save_pretrained(tmp_path / "teacher")
    ref, dist = latent_pair(side=32)
    write_latents(tmp_path / "ref.npy", ref)
    write_latents(tmp_path / "dist.npy", dist)
    common = ["--images", str(images), "--validation", str(images), "--teacher", str(tmp_path / "teacher")]
    common += ["--held-out", str(tmp_path / "ref.npy"), str(tmp_path / "dist.npy"), "--output", str(tmp_path / "run")]
    distill_metric.main([*common, "--steps", "2", "--batch-size", "2", "--precision", "no"])
    metric = tmp_path / "run" / "metric"
    printed = capsys.readouterr().out
    assert "mask_correlation" in printed
    distill_metric.main([*common, "--evaluate", str(metric)])
    assert capsys.readouterr().out == printed
    teacher, student = tiny_metric(seed=2).state_dict(), MILO.from_pretrained(metric).state_dict()
    assert not any(torch.equal(student[key], teacher[key]) for key in teacher)
