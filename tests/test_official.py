"""The weights commands: fetched files are checked, converted without change, described."""

import dataclasses
import shutil
import urllib.error

import pytest
import torch
from official_checkpoints import official_metric_file

from milo_latent import MILO
from milo_latent.cli import main
from milo_latent.evaluation.metrics import by_name
from milo_latent.metric.loading import OFFICIAL
from milo_latent.resources import cache_dir, sha256
from milo_latent.testing import latent_pair, tiny_metric
from milo_latent.training.data.fingerprints import source_digest
from milo_latent.training.pseudo_mos import DEFAULT_CALIBRATIONS


@pytest.fixture
def checkpoint(tmp_path):
    """A file of the official layout, of random weights."""
    official_metric_file(tiny_metric(), tmp_path / "MILO_latent.pth")
    return tmp_path / "MILO_latent.pth"


@pytest.fixture
def address(checkpoint, monkeypatch):
    """The checkpoint as if it were at the official address."""
    entry = official_metric_file(tiny_metric(), checkpoint)
    monkeypatch.setitem(OFFICIAL, "official-latent", entry)
    return entry


@pytest.fixture
def downloads(monkeypatch):
    """The addresses that are downloaded from."""
    seen, real = [], torch.hub.download_url_to_file

    def download(url, *args, **kwargs):
        seen.append(url)
        return real(url, *args, **kwargs)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return seen


def test_convert_changes_no_value(checkpoint, tmp_path, capsys):
    assert main(["weights", "convert", str(checkpoint), "-o", str(tmp_path / "out"), "--unofficial"]) == 0
    ref, dist = latent_pair()
    assert MILO.from_pretrained(tmp_path / "out")(ref=ref, dist=dist).item() == tiny_metric()(ref=ref, dist=dist).item()
    card = (tmp_path / "out" / "README.md").read_text()
    assert sha256(checkpoint) in card
    assert "Apache-2.0" in card


def test_options_that_mean_nothing_for_an_official_file_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"no options .*got \['dtype'\]"):
        MILO.from_pretrained(checkpoint, dtype=torch.float16)


def test_official_weights_are_fetched_once_wherever_they_are_named(address, downloads, capsys):
    shutil.rmtree(cache_dir(), ignore_errors=True)  # as on a new machine
    assert main(["weights", "list"]) == 0
    assert capsys.readouterr().out.count("  not in the cache; fetched at its first use") == 2
    metric = MILO.from_pretrained("official-latent")
    ref, dist = latent_pair()
    assert metric(ref=ref, dist=dist).item() == tiny_metric()(ref=ref, dist=dist).item()
    assert (metric.config.latent_space, metric.config.scaling_factor) == ("stable-diffusion", 0.18215)
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    assert main(["weights", "pull", "official-latent"]) == 0
    assert main(["weights", "info", "official-latent"]) == 0
    assert "latents of stable-diffusion" in capsys.readouterr().out
    assert source_digest("official-latent") == address.digest
    assert downloads == [address.url]
    assert [path.name for path in cache_dir().iterdir()] == ["MILO_latent.pth"]


def test_metrics_of_a_benchmark_take_official_names(tmp_path, monkeypatch):
    metric = tiny_metric(channels=3)
    monkeypatch.setitem(OFFICIAL, "official-image", official_metric_file(metric, tmp_path / "MILO.pth"))
    ref, dist = (each.sigmoid() for each in latent_pair(channels=3))  # in the range of images
    expected = metric.error_map(ref=ref, dist=dist).mean().item()
    member = by_name("milo:official-image")
    assert member.error(ref=ref, dist=dist).item() == pytest.approx(expected)
    assert member.name in DEFAULT_CALIBRATIONS  # the file and the name of the official weights share one


def test_a_damaged_file_in_the_cache_is_fetched_anew(address, downloads):
    MILO.from_pretrained("official-latent")
    cached = cache_dir() / "MILO_latent.pth"
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.write_bytes(content)
    MILO.from_pretrained("official-latent")
    assert sha256(cached) == address.digest
    assert len(downloads) == 2


@pytest.mark.parametrize(
    ("change", "match"), [({"digest": "0" * 64}, "the SHA-256 0000"), ({"size": 7}, "Expected 7 bytes")]
)
def test_another_content_is_not_kept(address, monkeypatch, capsys, change, match):
    monkeypatch.setitem(OFFICIAL, "official-image", dataclasses.replace(address, **change))
    assert main(["weights", "pull", "official-image"]) == 1
    assert match in (line := capsys.readouterr().err)
    assert "The file is not kept" in line
    assert list(cache_dir().iterdir()) == []
    with pytest.raises(ValueError, match=match):
        MILO.from_pretrained("official-image")


def test_without_a_network_one_line_names_the_ways_out(address, monkeypatch, tmp_path, capsys):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    for name in ("ref", "dist"):
        (tmp_path / f"{name}.npy").write_bytes(b"")
    files = ["--ref", str(tmp_path / "ref.npy"), "--dist", str(tmp_path / "dist.npy")]
    assert main(["score", *files, "--weights", "official-latent"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    for expected in ("not in the cache", "no network", "weights pull official-latent", "milo-image", "milo-sd"):
        assert expected in line


def test_unknown_weights_are_refused(capsys):
    assert main(["weights", "pull", "something"]) == 1
    assert "official-image, official-latent" in capsys.readouterr().err


def test_the_pinned_sizes_and_hashes_are_those_of_the_official_files(shared):
    for checkpoint in OFFICIAL.values():
        assert checkpoint.is_at(shared / "milo_official" / checkpoint.path.name)


def test_a_local_file_that_is_not_an_official_one_is_converted_only_if_meant(checkpoint, tmp_path, capsys):
    assert main(["weights", "convert", str(checkpoint), "-o", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert sha256(checkpoint) in line
    assert "--unofficial" in line
    assert not (tmp_path / "out").exists()


def test_info_tells_files_that_are_not_those_of_their_card(checkpoint, tmp_path, capsys):
    folder = tmp_path / "converted"
    assert main(["weights", "convert", str(checkpoint), "-o", str(folder), "--unofficial"]) == 0
    assert main(["weights", "info", str(folder)]) == 0
    assert "as its card says" in capsys.readouterr().out
    weights = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["weights", "info", str(folder)]) == 1
    assert "as its card says, got" in capsys.readouterr().err
    weights.unlink()
    assert main(["weights", "info", str(folder)]) == 1
    assert "got no file" in capsys.readouterr().err


def test_info_checks_every_file_of_the_shipped_set(capsys):
    assert main(["weights", "info", "nano"]) == 0
    assert capsys.readouterr().out.count("as its card says") >= 5


def test_official_files_convert_as_official_ones(shared, tmp_path, capsys):
    for name in ("MILO", "MILO_latent"):
        checkpoint, folder = shared / "milo_official" / f"{name}.pth", tmp_path / name
        assert main(["weights", "convert", str(checkpoint), "-o", str(folder)]) == 0
        assert "from the official checkpoint" in (folder / "README.md").read_text()
        assert main(["weights", "info", str(folder)]) == 0
        assert "as its card says" in capsys.readouterr().out
