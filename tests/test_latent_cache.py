"""Cached latents: a run with them equals one without, encodes nothing twice, and resumes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.training import train_restorer
from milo_latent.training.data import latent_cache
from milo_latent.training.data.latent_cache import CachedPairs
from milo_latent.training.data.photos import FolderSource
from milo_latent.training.data.restoration_pairs import RestorationPairs


@pytest.fixture
def encoded(monkeypatch):
    """The batches that the VAE and the cleaner are called with, as they are called."""
    batches = []

    def count(name, function):
        def call(network, image, *arguments, **options):
            batches.append((name, image))
            return function(network, image, *arguments, **options)

        return call

    monkeypatch.setattr(train_restorer, "encode_image", count("vae", train_restorer.encode_image))
    monkeypatch.setattr(DiffBIRPipeline, "clean", count("cleaner", DiffBIRPipeline.clean))
    return batches


@pytest.fixture
def train(model_folder, images, tmp_path):
    def run(output, *, epochs=0, steps=4, more=()):
        command = ["--model", model_folder, "--images", images, "--output", tmp_path / output, "--steps", steps]
        command += ["--batch-size", 2, "--crop-size", 128, "--precision", "no", "--warmup", 1, "--decay", 0]
        train_restorer.main([str(each) for each in [*command, "--cache-latents", epochs, *more]])
        [weights] = (tmp_path / output / "pipeline" / "controlnet").glob("*.safetensors")
        return load_file(weights)

    return run


def equal(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_with_cached_latents_of_all_its_epochs_equals_one_without(train, encoded):
    cached = train("cached", epochs=3)
    del encoded[:]
    assert equal(cached, train("plain"))
    assert len(encoded) > 0  # as it encodes always
    assert not equal(cached, train("fewer", epochs=1))  # the second epoch has the crops of the first


def test_vae_and_cleaner_rest_once_the_cache_is_filled(train, encoded):
    train("run", epochs=1, steps=4)  # three photos in two batches, of which the second starts the next epoch
    assert [name for name, _ in encoded] == ["cleaner", "vae", "vae"] * 2
    train("run", epochs=1, steps=6)
    assert len(encoded) == 6


def test_a_killed_filling_resumes(train, encoded, monkeypatch, tmp_path):
    write, written = latent_cache.write_bytes, []

    def kill_at_the_third(path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(latent_cache, "write_bytes", kill_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train("run", epochs=2)
    del encoded[:]
    monkeypatch.setattr(latent_cache, "write_bytes", write)
    resumed = train("run", epochs=2)
    assert [name for name, _ in encoded] == ["cleaner", "vae", "vae"]  # of the third batch alone
    names = sorted(path.name for path in (tmp_path / "run" / "latents").iterdir())
    assert names == [f"{number:08d}.safetensors" for number in range(3)] + ["settings.json"]
    assert equal(resumed, train("whole", epochs=2))


def test_latents_of_other_settings_and_senseless_numbers_of_epochs_are_refused(train, monkeypatch):
    monkeypatch.setattr(train_restorer, "fit", lambda loss, *arguments, **options: loss)
    train("run", epochs=1)
    with pytest.raises(ValueError, match=r'settings\.json there tells, got .*"seed": 5.*Delete that folder'):
        train("run", epochs=1, more=("--seed", 5))
    with pytest.raises(ValueError, match="1 or more epochs of latents, got -1"):
        train("other", epochs=-1)


def test_later_epochs_have_the_same_latents_in_another_order_with_other_noise(images, tmp_path, train, monkeypatch):
    monkeypatch.setattr(train_restorer, "fit", lambda loss, *arguments, **options: loss)
    train("run", epochs=2)
    pairs = RestorationPairs(FolderSource([images]), crop_size=128, degradation=lambda image, rng: image)
    cached = CachedPairs(pairs, tmp_path / "run" / "latents", epochs=2, batch_size=2)
    first, later = ([cached[number] for number in range(start, start + 3)] for start in (3, 9))  # epochs 1 and 3
    for sample in later:
        same = [each for each in first if torch.equal(each["clean"], sample["clean"])]
        assert len(same) == 1
        assert torch.equal(same[0]["degraded"], sample["degraded"])
        assert same[0]["draws"] != sample["draws"]
    draws = [cached[number]["draws"] for number in range(18)]
    assert len(set(draws)) == 18
    orders = [
        [next(place for place in range(3) if torch.equal(first[place]["clean"], sample["clean"])) for sample in epoch]
        for epoch in (first, later, [cached[number] for number in range(15, 18)])
    ]
    assert len(np.unique(orders, axis=0)) > 1
