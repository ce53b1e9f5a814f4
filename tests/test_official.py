"""The weights commands: fetched files are checked, converted without change, described."""

import dataclasses

import pytest
import torch

from milo_latent import MILO
from milo_latent.cli import main
from milo_latent.convert import official
from milo_latent.resources import available_weights, cache_dir
from milo_latent.testing import latent_pair, tiny_metric


@pytest.fixture
def checkpoint(tmp_path):
    """A file laid out as the official ones, of random weights."""
    names = {
        new: old for old, new in (("mask_finder_1.netBasic.", "mask_finder."), ("scaler_network.model.", "scaler."))
    }
    state = {
        next(old + key.removeprefix(new) for new, old in names.items() if key.startswith(new)): value
        for key, value in tiny_metric().state_dict().items()
    }
    torch.save(state, tmp_path / "MILO_latent.pth")
    return tmp_path / "MILO_latent.pth"


@pytest.fixture
def address(checkpoint, monkeypatch):
    """The checkpoint as if it were at the official address."""
    entry = official.OfficialCheckpoint(checkpoint.name, checkpoint.as_uri(), official.sha256(checkpoint))
    monkeypatch.setitem(official.OFFICIAL, "official-latent", entry)
    return entry


def test_convert_changes_no_value(checkpoint, tmp_path, capsys):
    assert main(["weights", "convert", str(checkpoint), "-o", str(tmp_path / "out"), "--unofficial"]) == 0
    ref, dist = latent_pair()
    assert MILO.from_pretrained(tmp_path / "out")(ref=ref, dist=dist).item() == tiny_metric()(ref=ref, dist=dist).item()
    card = (tmp_path / "out" / "README.md").read_text()
    assert official.sha256(checkpoint) in card
    assert "Apache-2.0" in card


def test_options_that_mean_nothing_for_an_official_file_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"no options .*got \['dtype'\]"):
        MILO.from_pretrained(checkpoint, dtype=torch.float16)


def test_pulled_weights_are_at_hand_by_their_name(address, capsys):
    assert main(["weights", "list"]) == 0
    assert "official-latent  not here" in capsys.readouterr().out
    assert main(["weights", "pull", "official-latent"]) == 0
    assert "official-latent" in available_weights()
    ref, dist = latent_pair()
    assert MILO.from_pretrained("official-latent")(ref=ref, dist=dist).item() > 0
    assert main(["weights", "info", "official-latent"]) == 0
    assert "latents of stable-diffusion" in capsys.readouterr().out
    assert {path.name for path in (cache_dir() / "official-latent").iterdir()} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip


def test_a_tampered_file_is_not_kept(address, monkeypatch, capsys):
    wrong = dataclasses.replace(address, digest="0" * 64)
    monkeypatch.setitem(official.OFFICIAL, "official-image", wrong)
    assert main(["weights", "pull", "official-image"]) == 1
    assert "Not kept" in capsys.readouterr().err
    assert list((cache_dir() / "official-image").iterdir()) == []
    assert "official-image" not in available_weights()


def test_without_a_network_the_way_out_is_named(address, monkeypatch, capsys):
    absent = dataclasses.replace(address, url=address.url + ".absent")
    monkeypatch.setitem(official.OFFICIAL, "official-latent", absent)
    assert main(["weights", "pull", "official-latent"]) == 1
    assert "weights convert FILE" in capsys.readouterr().err


def test_unknown_weights_are_refused(capsys):
    assert main(["weights", "pull", "something"]) == 1
    assert "official-image, official-latent" in capsys.readouterr().err


def test_the_recorded_hashes_are_those_of_the_official_files(shared):
    for checkpoint in official.OFFICIAL.values():
        assert official.sha256(shared / "milo_official" / checkpoint.file) == checkpoint.digest


def test_a_local_file_that_is_not_an_official_one_is_converted_only_if_meant(checkpoint, tmp_path, capsys):
    assert main(["weights", "convert", str(checkpoint), "-o", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert official.sha256(checkpoint) in line
    assert "--unofficial" in line
    assert not (tmp_path / "out").exists()


def test_info_tells_files_that_are_not_those_of_their_card(address, capsys):
    assert main(["weights", "pull", "official-latent"]) == 0
    assert main(["weights", "info", "official-latent"]) == 0
    assert "as its card says" in capsys.readouterr().out
    weights = cache_dir() / "official-latent" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["weights", "info", "official-latent"]) == 1
    assert "as its card says, got" in capsys.readouterr().err
    weights.unlink()
    assert main(["weights", "info", "official-latent"]) == 1
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
