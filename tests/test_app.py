"""The app: what its buttons do, with tiny models; and the page itself, where gradio is installed."""

import json
import shlex
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from milo_latent import read_image, restore_image, write_image
from milo_latent.app.restoring import PhotoRestorer, Progress, Restored, StoppedError, stopping
from milo_latent.cli import build_parser, main
from milo_latent.cli.restore import given_settings
from milo_latent.restoration.settings import RestorationSettings
from milo_latent.testing import tiny_metric, tiny_pipeline

SAMPLED = RestorationSettings(stage="all", milo_scale=0.5, steps=3, seed=7)


@pytest.fixture
def restorer():
    pipe = tiny_pipeline()
    pipe.register_modules(metric=tiny_metric())
    return PhotoRestorer(pipe, model="tiny")


def result_of(restorer, photo, folder, settings=SAMPLED, **options):
    *progress, result = restorer.run(photo, folder, settings, **options)
    assert isinstance(result, Restored)
    assert all(isinstance(news, Progress) for news in progress)
    return result


def test_a_result_says_how_to_make_it_again(restorer, photo, tmp_path):
    result = result_of(restorer, photo, tmp_path)
    assert result.after.name == "photo_restored.png"
    with Image.open(result.after) as picture:
        text = picture.text
    assert text["Software"].startswith("milo_latent ")
    record = json.loads(text["milo_latent"])
    assert record["model"] == "tiny"
    again = restore_image(read_image(photo), model=restorer.pipe, **record["settings"])
    assert (read_image(result.after) - again).abs().max() <= 0.5 / 255 + 1e-6


def test_the_command_has_the_settings_of_the_page(restorer, photo, tmp_path):
    settings = restorer.choose("denoise", "all", 1.0, 0.3, "linear", 5.0, 11)
    arguments = shlex.split(result_of(restorer, photo, tmp_path, settings).command)
    assert arguments[:3] == ["milo-latent", "restore", "photo.png"]
    options = build_parser().parse_args(arguments[1:])
    assert given_settings(options) == settings
    assert options.model == "tiny"


def test_settings_that_a_stage_does_not_heed_are_left_out(restorer):
    settings = restorer.choose("denoise", "cleaner", 0.7, 0.3, "linear", 5, 11)
    assert settings == RestorationSettings(task="denoise", stage="cleaner", tile=settings.tile)
    restorer.pipe.join = torch.nn.Identity()
    assert restorer.choose("denoise", "cleaner", 0.7, 0.3, "linear", 5, 11).fidelity is None
    assert restorer.choose("denoise", "join", 0.7, 0.3, "linear", 5, 11).fidelity == 0.7
    assert restorer.choose("denoise", "all", 0.7, 0.3, "linear", 5, None).seed == 0  # an empty field


def test_each_step_is_told_with_its_mask(restorer, photo, tmp_path):
    *progress, result = restorer.run(photo, tmp_path, SAMPLED)
    told = {news.done: news for news in progress if news.done}
    assert sorted(told) == [1, 2, 3]
    assert [len(told[done].masks) for done in (1, 2, 3)] == [1, 2, 3]
    assert [caption for _, caption in result.masks] == ["step 1", "step 2", "step 3"]
    assert all(max(picture.size) == 320 for picture, _ in result.masks)


def test_the_masks_of_many_steps_are_a_selection(restorer, photo, tmp_path):
    masks = result_of(restorer, photo, tmp_path, replace(SAMPLED, steps=20)).masks
    assert len(masks) == 8
    assert (masks[0][1], masks[-1][1]) == ("step 1", "step 20")


def test_without_guidance_masks_are_shown_and_change_nothing(restorer, photo, tmp_path):
    result = result_of(restorer, photo, tmp_path, replace(SAMPLED, milo_scale=0.0))
    assert len(result.masks) == 3
    plain = restore_image(read_image(photo), model=restorer.pipe, stage="all", milo_scale=0.0, steps=3, seed=7)
    write_image(tmp_path / "plain.png", plain)
    assert torch.equal(read_image(tmp_path / "plain.png"), read_image(result.after))


def test_a_clean_reference_is_compared(restorer, photo, tmp_path):
    result = result_of(restorer, photo, tmp_path, RestorationSettings(stage="cleaner"), reference=photo)
    comparison = result.comparison
    assert comparison.before[0] == 0.0  # the photo is its own reference
    assert comparison.before[1] > comparison.mos
    assert comparison.error > 0
    assert 0 <= comparison.mos <= 5
    assert comparison.picture.height == 45
    assert result.masks == ()


@pytest.mark.parametrize(("size", "expected"), [((61, 44), "61x44"), ((122, 90), "122x90")])
def test_a_reference_of_another_size_is_refused(restorer, photo, tmp_path, size, expected):
    Image.new("RGB", size).save(tmp_path / "clean.png")
    with pytest.raises(ValueError, match=f"of the result's size, 61x45, got {expected}"):
        result_of(restorer, photo, tmp_path, reference=tmp_path / "clean.png")


def test_before_and_after_have_one_size(restorer, photo, tmp_path):
    result = result_of(restorer, photo, tmp_path, RestorationSettings(task="sr", stage="cleaner"))
    assert read_image(result.before).shape == read_image(result.after).shape == (1, 3, 180, 244)


def test_too_large_results_are_refused_before_the_photo_is_decoded(restorer, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    restorer.max_pixels = 16 * 45 * 61 - 16
    with pytest.raises(ValueError, match=r"at most 2744 pixels, got 61x45 in .*photo\.png"):
        result_of(restorer, photo, tmp_path, RestorationSettings(task="sr", stage="cleaner"))


def test_a_damaged_file_and_impossible_settings_are_refused(restorer, photo, tmp_path):
    photo.write_text("no picture")
    with pytest.raises(ValueError, match="Expected a complete image"):
        result_of(restorer, photo, tmp_path)
    with pytest.raises(ValueError, match="`milo_scale` in"):
        result_of(restorer, photo, tmp_path, replace(SAMPLED, milo_scale=2.0))


def test_closing_stops_the_work_and_frees_the_model(restorer, photo, tmp_path):
    started, goes_on, calls = threading.Event(), threading.Event(), []

    def wait(module, arguments):
        calls.append(module)
        started.set()
        assert goes_on.wait(30)

    handle = restorer.pipe.unet.register_forward_pre_hook(wait)
    run = restorer.run(photo, tmp_path, replace(SAMPLED, steps=50))
    next(run)
    assert started.wait(30)
    run.close()
    goes_on.set()
    with restorer._turn:  # the thread has ended
        assert len(calls) == 1
    handle.remove()
    assert not (tmp_path / "photo_restored.png").exists()
    assert result_of(restorer, photo, tmp_path).done == 3  # nothing is left behind


def test_a_stop_reaches_every_network(restorer):
    stop, image = threading.Event(), torch.rand(1, 3, 32, 32)
    with stopping(restorer.pipe, stop):
        restorer.pipe.cleaner(image)
        stop.set()
        with pytest.raises(StoppedError):
            restorer.pipe.cleaner(image)
    restorer.pipe.cleaner(image)


def test_two_at_once_get_their_own_results(restorer, photo, tmp_path):
    results = {}

    def restore(seed):
        folder = tmp_path / str(seed)
        folder.mkdir()
        results[seed] = read_image(result_of(restorer, photo, folder, replace(SAMPLED, seed=seed)).after)

    users = [threading.Thread(target=restore, args=(seed,)) for seed in (1, 2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    for seed, result in results.items():
        (tmp_path / "alone").mkdir(exist_ok=True)
        alone = result_of(restorer, photo, tmp_path / "alone", replace(SAMPLED, seed=seed))
        assert torch.equal(result, read_image(alone.after))
    assert not torch.equal(results[1], results[2])


def test_tasks_are_those_of_the_model(restorer):
    assert restorer.tasks == ["denoise", "sr"]  # it knows no faces
    restorer.pipe.register_to_config(release_task="face")
    assert "face" in PhotoRestorer(restorer.pipe, model="tiny").tasks


def test_options_out_of_range_are_refused_by_name(capsys):
    assert main(["app", "--max-megapixels", "0"]) == 1
    assert "`--max-megapixels` in [0.001, 128], got 0.0" in capsys.readouterr().err


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 1
    assert 'pip install "milo_latent[app]"' in capsys.readouterr().err


# The page


@pytest.fixture
def page(restorer, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio, of the extra `app`")
    from milo_latent.app.page import Page

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # set by the page, taken back after the test
    return Page(restorer, tmp_path)


def test_the_page_shows_the_progress_and_the_result(page, photo, tmp_path):
    updates = list(page._restore(str(photo), str(photo), "denoise", "all", 1.0, 0.5, "cosine", 3, 0))
    assert updates[0][page.cancel].interactive
    assert any("step 2 of 3" in update.get(page.status, "") for update in updates)
    last = updates[-1]
    assert "Restored in" in last[page.status]
    assert [Path(path).name for path in last[page.slider]] == ["before.png", "photo_restored.png"]
    assert last[page.download].interactive
    assert "| Photo | 0.00000 |" in last[page.numbers]
    assert list((tmp_path / "working").iterdir()) == []


def test_the_page_tells_errors_without_folders(page, photo):
    photo.write_text("no picture")
    with pytest.raises(page.gr.Error, match=r"got photo\.png, which is damaged"):
        list(page._restore(str(photo), None, "denoise", "all", 1.0, 0.5, "cosine", 3, 0))
    with pytest.raises(page.gr.Error, match="Drop a photo first"):
        list(page._restore(None, None, "denoise", "all", 1.0, 0.5, "cosine", 3, 0))


def test_the_page_shows_what_a_stage_heeds(page):
    assert page._fit_stage("all")[page.diffusion].visible
    assert not page._fit_stage("cleaner")[page.diffusion].visible
    assert not page._fit_stage("all")[page.fidelity].visible  # this model has no join


def test_the_page_asks_no_other_host_for_anything(page):
    from milo_latent.app.page import _theme

    theme = _theme(page.gr)
    assert "http" not in "".join(theme._stylesheets)
    assert not page.blocks.analytics_enabled


def test_a_space_lends_its_gpu(monkeypatch):
    from milo_latent.app.page import on_gpu

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=lambda function: ("lent", function)))
    assert on_gpu(len) == ("lent", len)
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert on_gpu(len) is len
