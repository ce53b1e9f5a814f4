"""Checkpoints whose values are not those that were saved are refused."""

import zipfile
from pathlib import Path

import pytest
import torch

from milo_latent import MILO
from milo_latent.checkpoints import read_checkpoint, rename_keys
from milo_latent.cli import main
from milo_latent.metric.loading import OFFICIAL_PREFIXES


def repack(path, **options):
    """Write the archive of a checkpoint anew."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def test_an_archive_that_was_compressed_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.ones(1000)}, path)
    repack(path)
    assert torch.equal(read_checkpoint(path)["weight"], torch.ones(1000))
    repack(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.pth, which was packed anew"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", b"")
    with pytest.raises(ValueError, match="packed anew"):
        read_checkpoint(path)


def test_a_flipped_bit_never_passes_as_another_value(tmp_path):
    path, weight = tmp_path / "a.pth", torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": weight}, path)
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            read = read_checkpoint(path)
        except ValueError:
            refused += 1
        else:  # of bytes that mean nothing, such as dates and padding
            assert torch.equal(read["weight"], weight), place
    assert refused > 256 + 100  # of the tensor and of the pickle


@pytest.mark.parametrize("command", [["weights", "info"], ["weights", "convert", "--unofficial", "-o", "out"]])
def test_the_commands_refuse_weights_with_a_flipped_bit(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    state = rename_keys(MILO().state_dict(), {own: official for official, own in OFFICIAL_PREFIXES.items()})
    torch.save(state, "MILO.pth")
    assert main([*command, "MILO.pth"]) == 0
    content = bytearray(Path("MILO.pth").read_bytes())
    place = content.index(state["mask_finder_1.netBasic.0.weight"].numpy().tobytes())
    content[place] ^= 1
    Path("MILO.pth").write_bytes(content)
    capsys.readouterr()
    assert main([*command, "MILO.pth"]) == 1
    assert "checksum" in capsys.readouterr().err
