"""The curriculum moves the weight from less visible to more visible regions, with mean 1 throughout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milo_latent.guidance.curriculum import LEVELS, SCHEDULES, curriculum_alpha, curriculum_weight


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_weight_has_mean_one_and_is_not_negative(schedule, progress, seed):
    mask = LEVELS * torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(seed))
    weight = curriculum_weight(mask, progress, schedule=schedule)
    assert (weight >= 0).all()
    assert torch.allclose(weight.mean(dim=(1, 2, 3)), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_less_visible_regions_come_first_and_visible_ones_last(schedule):
    mask = torch.tensor([[0.5, 3.5]]).reshape(1, 1, 1, 2)
    first, middle, last = (
        curriculum_weight(mask, progress, schedule=schedule).flatten() for progress in (0.0, 0.5, 1.0)
    )
    assert first[0] > first[1]
    assert middle[0] == pytest.approx(middle[1])
    assert last[0] < last[1]
    assert last.tolist() == pytest.approx([0.25, 1.75])


def test_constant_weighs_all_regions_alike():
    weight = curriculum_weight(LEVELS * torch.rand(1, 1, 5, 5), 0.3, schedule="constant")
    assert torch.allclose(weight, torch.ones_like(weight))


def test_alpha_of_the_named_schedules():
    assert curriculum_alpha(0.25, schedule="linear") == 0.25
    assert curriculum_alpha(0.25, schedule="cosine") == pytest.approx(0.1464466)
    assert [curriculum_alpha(each, schedule="cosine") for each in (0.0, 1.0)] == [0.0, 1.0]


def test_a_function_of_progress_is_a_schedule():
    mask = torch.tensor([[0.5, 3.5]]).reshape(1, 1, 1, 2)
    assert curriculum_alpha(0.3, schedule=lambda progress: progress**2) == pytest.approx(0.09)
    weight = curriculum_weight(mask, 0.5, schedule=lambda progress: 1.0)
    assert weight.flatten().tolist() == pytest.approx([0.25, 1.75])
    with pytest.raises(ValueError, match=r"schedule\(progress\)` in \[0, 1\], got 2.0"):
        curriculum_weight(mask, 0.5, schedule=lambda progress: 2.0)


@pytest.mark.parametrize(("visible", "progress"), [(LEVELS, 0.0), (0.0, 1.0)])
def test_a_mask_that_leaves_nothing_to_prefer_weighs_all_alike(visible, progress):
    mask = torch.full((2, 1, 4, 4), float(visible))
    mask[1, ..., 0] = 2.0  # the other item of the batch keeps its own weights
    weight = curriculum_weight(mask, progress)
    assert torch.equal(weight[0], torch.ones(1, 4, 4))
    assert weight[1, 0, 0].tolist() == pytest.approx([4.0, 0.0, 0.0, 0.0])


def test_bad_arguments_are_refused():
    mask = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"`progress` in \[0, 1\], got 1.5"):
        curriculum_weight(mask, 1.5)
    with pytest.raises(ValueError, match=r"`progress` in \[0, 1\], got nan"):
        curriculum_weight(mask, float("nan"))
    with pytest.raises(ValueError, match=r"constant.*cosine.*linear.*'cubic'"):
        curriculum_weight(mask, 0.5, schedule="cubic")
    with pytest.raises(ValueError, match="batch axis"):
        curriculum_weight(mask[0], 0.5)
