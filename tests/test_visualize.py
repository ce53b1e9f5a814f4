"""Error maps as pictures."""

import numpy as np
import pytest
import torch

from milo_latent.metric.visualize import (
    BAR_GAP,
    BAR_WIDTH,
    color_bar,
    color_error_map,
    color_ramp,
    map_scale,
    picture_grid,
)
from milo_latent.pictures import to_8bit
from milo_latent.testing import latent_pair, tiny_metric


def luma(colours):
    return colours @ torch.tensor([0.2126, 0.7152, 0.0722])


def test_colours_grow_lighter_evenly_and_stay_in_gamut():
    ramp = color_ramp()
    assert ramp.shape == (256, 3)
    assert ramp.min() >= 0
    assert ramp.max() <= 1
    steps = luma(ramp).diff()
    assert (steps > 0).all()
    assert steps.max() < 4 * steps.mean()


def test_the_colors_are_the_recorded_ones():
    """Black, blue, purple, orange, yellow: the path in Oklab, and its published conversion to sRGB."""
    recorded = {
        0: (0.0058, 0.0105, 0.0486), 40: (0.1114, 0.0456, 0.2831), 64: (0.1959, 0.0658, 0.4427),
        100: (0.4449, 0.1558, 0.4376), 128: (0.6562, 0.1662, 0.4189), 160: (0.8111, 0.3167, 0.3385),
        192: (0.9712, 0.4472, 0.1515), 220: (1.0, 0.6319, 0.2147), 255: (1.0, 0.8486, 0.2939),
    }  # fmt: skip
    assert torch.allclose(color_ramp()[list(recorded)], torch.tensor(list(recorded.values())), atol=1e-4)


def test_a_larger_error_is_lighter_and_the_bar_stands_at_the_right():
    error_map = torch.linspace(0, 1, 16).reshape(1, 1, 1, 16).expand(2, 1, 16, 16)
    picture = color_error_map(error_map)
    assert picture.shape == (2, 3, 16, 16 + BAR_GAP + BAR_WIDTH)
    assert (luma(picture[0, :, 5, :16].T).diff() > 0).all()
    assert luma(picture[0, :, 0, -1]) > luma(picture[0, :, -1, -1])
    assert (picture[..., 16 : 16 + BAR_GAP] == 1).all()


def test_maps_are_enlarged_and_laid_over_an_image():
    image = torch.rand(1, 3, 64, 80)
    error_map = torch.rand(1, 1, 8, 10)
    over = color_error_map(error_map, image=image, opacity=0.25, bar=False)
    alone = color_error_map(error_map, size=(64, 80), bar=False)
    assert torch.allclose(over, 0.25 * alone + 0.75 * image, atol=1e-6)


def test_the_largest_error_can_be_chosen():
    error_map = torch.full((1, 1, 4, 4), 0.2)
    assert torch.equal(color_error_map(error_map, largest=0.2, bar=False)[0, :, 0, 0], color_ramp()[-1])


def test_small_errors_are_painted_as_light_as_large_ones_unless_a_scale_is_chosen():
    error_map = torch.rand(1, 1, 20, 20)
    assert torch.equal(color_error_map(error_map * 0.01, bar=False), color_error_map(error_map, bar=False))
    faint, strong = (color_error_map(error_map * factor, largest=1.0, bar=False) for factor in (0.01, 1.0))
    assert faint.mean() < 0.6 * strong.mean()


def test_the_scale_of_a_map_leaves_out_its_few_largest_errors():
    error_map = torch.full((1, 1, 100, 100), 0.1)
    error_map[0, 0, 0, :20] = 5.0
    assert map_scale(error_map) == pytest.approx(0.1)
    spot = torch.zeros(1, 1, 100, 100)
    spot[..., 3, 3] = 0.2
    assert map_scale(spot) == pytest.approx(0.2)
    assert map_scale(torch.zeros(1, 1, 8, 8)) == 1.0
    assert map_scale(torch.full((1, 1, 1, 1), 0.25)) == 0.25


def test_the_bar_says_its_errors_where_there_is_room():
    bars = {largest: color_bar(200, largest) for largest in (0.05, 0.06, 1.0)}
    alone = BAR_GAP + BAR_WIDTH
    for bar in bars.values():
        assert bar.shape[2] == 200
        assert bar.shape[3] > alone
        for rows in (slice(0, 14), slice(93, 107), slice(186, 200)):  # largest, half of it, zero
            assert bar[..., rows, alone:].min() < 0.5
        assert torch.equal(bar[..., :alone], bars[1.0][..., :alone])
    assert not torch.equal(bars[0.05][..., alone:], bars[0.06][..., alone:])
    assert color_bar(20, 1.0).shape[3] == alone


@pytest.mark.parametrize(("height", "labels"), [(35, 0), (36, 3), (143, 3), (144, 5), (200, 5)])
def test_the_bar_runs_from_0_below_to_the_largest_above_with_labels_at_their_errors(height, labels):
    bar = color_bar(height, 1.0)
    assert (BAR_GAP, BAR_WIDTH) == (8, 16)
    colors = bar[0, :, :, BAR_GAP : BAR_GAP + BAR_WIDTH]
    assert torch.equal(colors[:, 0, 0], color_ramp()[-1])
    assert torch.equal(colors[:, -1, -1], color_ramp()[0])
    assert torch.equal(colors[:, height // 2, 3], color_ramp()[round(255 * (1 - (height // 2) / (height - 1)))])
    assert (bar[0, :, :, :BAR_GAP] == 1).all()
    text = bar[0, 0, :, BAR_GAP + BAR_WIDTH :]
    if labels:
        assert (text[:, : BAR_GAP // 2] == 1).all()
        assert (text[:, BAR_GAP // 2 : BAR_GAP] < 1).any()
        assert (text[:, -BAR_GAP // 2 - 1 :] < 1).sum() < (text < 1).sum() / 4
    inked = [row for row in range(height) if labels and (text[row] < 0.7).any()]
    runs = [row for row in inked if row - 1 not in inked]
    assert len(runs) == labels
    assert not labels or (inked[0], inked[-1]) == (0, height - 1)  # the outer labels touch the ends of the bar
    for index, top in enumerate(runs[1:-1], start=1):
        bottom = next(row for row in range(top, height) if row + 1 not in inked)
        assert (top + bottom) / 2 == pytest.approx(index / (labels - 1) * (height - 1), abs=1.1)


def test_pictures_take_the_size_of_the_image_or_the_one_that_is_asked_for():
    error_map, image = torch.rand(2, 1, 8, 10), torch.rand(2, 3, 16, 20)
    bar = BAR_GAP + BAR_WIDTH
    assert color_error_map(error_map, image=image).shape == (2, 3, 16, 20 + bar)
    assert color_error_map(error_map, image=image[..., :12, :14], size=(12, 14)).shape == (2, 3, 12, 14 + bar)
    assert torch.equal(
        color_error_map(error_map, bar=False),
        color_ramp()[(error_map / map_scale(error_map)).clamp(0, 1).mul(255).round().long()[:, 0]].movedim(3, 1),
    )


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="1 channels"):
        color_error_map(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="`opacity`"):
        color_error_map(torch.rand(1, 1, 4, 4), opacity=2.0)
    with pytest.raises(ValueError, match="`largest`"):
        color_error_map(torch.rand(1, 1, 4, 4), largest=0.0)


def test_a_grid_of_pictures_paints_all_maps_on_one_scale_and_leaves_images_as_they_are():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason='needs pip install "milo_latent[plots]"')
    image = torch.rand(1, 3, 8, 8)
    maps = {"weak": torch.full((1, 1, 4, 4), 0.1), "strong": torch.full((1, 1, 4, 4), 0.4)}
    figure = picture_grid({"photo": image, **maps}, columns=2)
    drawn = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.images}
    assert list(drawn) == ["photo", "weak", "strong"]
    assert (drawn["photo"].get_array() == to_8bit(image[0])).all()
    assert drawn["weak"].get_clim() == drawn["strong"].get_clim() == pytest.approx((0, 0.4))
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (2, 2)
    grid = (
        picture_grid({**maps, "third": maps["weak"], "photo": image, "last": image}, columns=3).axes[0].get_gridspec()
    )
    assert (grid.nrows, grid.ncols) == (2, 3)
    limits = picture_grid(maps, largest=2.0).axes[0].images[0].get_clim()
    assert limits == (0, 2)
    assert len(picture_grid({"photo": image}).axes) == 1  # no color bar without a map
    assert len(picture_grid({"map": next(iter(maps.values()))}).axes) == 2
    pyplot.close("all")


@pytest.mark.parametrize("pictures", [{}, {"two": torch.rand(2, 3, 8, 8)}, {"latents": torch.rand(1, 4, 8, 8)}])
def test_a_grid_refuses_what_is_no_picture(pictures):
    with pytest.raises(ValueError, match=next(iter(pictures), "pictures")):
        picture_grid(pictures)


@pytest.fixture
def pyplot():
    module = pytest.importorskip("matplotlib.pyplot", reason='needs pip install "milo_latent[plots]"')
    module.switch_backend("Agg")
    yield module
    module.close("all")


def drawn(figure):
    return {axes.get_title(): axes.images[0] for axes in figure.axes if axes.get_title()}


def test_maps_of_different_things_have_scales_and_bars_of_their_own(pyplot):
    maps = {"mask": torch.full((1, 1, 4, 4), 3.0), "map": torch.full((1, 1, 4, 4), 0.25)}
    figure = picture_grid(maps, shared_scale=False)
    limits = {title: image.get_clim() for title, image in drawn(figure).items()}
    assert limits == {"mask": (0, 3.0), "map": (0, 0.25)}
    assert len(figure.axes) == 4


def test_a_comparison_of_images_shows_them_with_mask_map_and_scores(pyplot):
    metric = tiny_metric(channels=3)
    ref, dist = (each.sigmoid() for each in latent_pair(batch=2, channels=3))
    result = metric.compare(ref=ref[:1], dist=dist)  # one reference for both
    figure = result.figure(sample=1)
    pictures = drawn(figure)
    assert list(pictures) == ["reference", "distorted", "mask M", "error map V"]
    assert (pictures["reference"].get_array() == to_8bit(ref[0])).all()
    assert (pictures["distorted"].get_array() == to_8bit(dist[1])).all()
    assert pictures["mask M"].get_array().tolist() == result.mask[1, 0].tolist()
    assert pictures["error map V"].get_array().tolist() == result.error_map[1, 0].tolist()
    assert figure.get_suptitle() == f"error {result.error[1]:.4f}, MOS {result.mos[1]:.2f}"
    with pytest.raises(ValueError, match=r"`sample` in \[0, 1\], got 2"):
        result.figure(sample=2)


def test_a_comparison_of_latents_shows_maps_and_the_images_that_are_given(pyplot, monkeypatch):
    ref, dist = latent_pair(batch=2)
    result = tiny_metric().compare(ref=ref, dist=dist)
    assert list(drawn(result.figure())) == ["mask M", "error map V"]
    image = np.full((32, 32, 3), 7, dtype=np.uint8)
    assert (drawn(result.figure(sample=1, dist=image))["distorted"].get_array() == 7).all()
    with pytest.raises(ValueError, match="Expected 1 or 2 reference images, got 3"):
        result.figure(ref=[image] * 3)
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(drawn(pyplot.gcf())))
    result.show(ref=image)
    assert [list(each) for each in shown] == [["reference", "mask M", "error map V"]]


def test_a_result_does_not_print_its_images():
    ref, dist = (each.sigmoid() for each in latent_pair(channels=3))
    result = tiny_metric(channels=3).compare(ref=ref, dist=dist.requires_grad_(True))
    assert "ref" not in repr(result)
    assert not result.dist.requires_grad
