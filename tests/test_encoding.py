"""Photos to files of latents and back: sizes are kept, folders resumed, latents of other VAEs refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from milo_latent import batches
from milo_latent.cli import main
from milo_latent.files import read_image, read_latents, read_latents_metadata, write_image, write_latents
from milo_latent.jobs import find_jobs
from milo_latent.latents import files
from milo_latent.latents.files import decode_file, encode_file, encode_files, load_vae
from milo_latent.testing import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(20, 30), (33, 17), (24, 24)]):
        write_image(folder / f"{index}.png", torch.rand(1, 3, *size))
    return folder


def test_a_folder_goes_there_and_back_in_its_sizes(model, photos, tmp_path, capsys):
    assert main(["encode", str(photos), "-o", str(tmp_path / "latents"), "--model", model]) == 0
    assert "3 photos" in capsys.readouterr().out
    assert main(["decode", str(tmp_path / "latents"), "-o", str(tmp_path / "back"), "--model", model]) == 0
    for path in photos.iterdir():
        assert read_image(tmp_path / "back" / path.name).shape == read_image(path).shape
        metadata = read_latents_metadata(tmp_path / "latents" / f"{path.stem}.safetensors")
        assert metadata["vae"] == model
        assert metadata["scaling_factor"] == "1.0"


def test_a_large_photo_goes_there_and_back_in_tiles(model, tmp_path, capsys):
    write_image(tmp_path / "large.png", torch.rand(1, 3, 330, 401))
    for name, tile in (("whole", []), ("tiles", ["--tile", "320"])):
        files = [str(tmp_path / f"{name}.safetensors"), str(tmp_path / f"{name}.png")]
        assert main(["encode", str(tmp_path / "large.png"), "-o", files[0], "--model", model, *tile]) == 0
        assert main(["decode", files[0], "-o", files[1], "--model", model, *tile]) == 0
    latents = [read_latents(tmp_path / f"{name}.safetensors") for name in ("whole", "tiles")]
    assert torch.allclose(*latents, atol=1e-4)
    images = [read_image(tmp_path / f"{name}.png") for name in ("whole", "tiles")]
    assert images[0].shape == (1, 3, 330, 401)
    assert (images[0] - images[1]).abs().max() <= 1.01 / 255
    assert (
        main(["encode", str(tmp_path / "large.png"), "-o", files[0], "--model", model, "--tile", "100", "--overwrite"])
        == 1
    )
    assert "`tile` of at least 320" in capsys.readouterr().err


def test_an_interrupted_folder_is_resumed(model, photos, tmp_path, capsys):
    latents = tmp_path / "latents"
    assert main(["encode", str(photos), "-o", str(latents), "--model", model, "--format", "npy"]) == 0
    whole = {path.name: path.read_bytes() for path in latents.iterdir()}
    (latents / "1.npy").unlink()
    assert main(["encode", str(photos), "-o", str(latents), "--model", model, "--format", "npy"]) == 0
    assert "1 photos" in (out := capsys.readouterr().out.splitlines()[-1])
    assert "2 were there already" in out
    assert {path.name: path.read_bytes() for path in latents.iterdir()} == whole


def test_a_damaged_photo_is_named_and_the_others_are_encoded(model, photos, tmp_path, capsys):
    (photos / "1.png").write_text("no image")
    arguments = ["encode", str(photos), "-o", str(tmp_path / "latents"), "--model", model]
    assert main(arguments) == 1
    assert "2 photos" in (error := capsys.readouterr().err)
    assert "1 failed:" in error
    assert error.splitlines()[-1].startswith("milo-latent: 1.png: Expected a complete image")
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == ["0.safetensors", "2.safetensors"]
    assert main([*arguments, "--tile", "100"]) == 1
    assert "failed" not in (error := capsys.readouterr().err)  # refused before the first photo
    assert "`tile` of at least 320 pixels, got 100" in error


def test_a_vae_that_lacks_weights_is_refused(model, photos, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "broken")
    for part, command, output in (("vae", "encode", "a.npy"), ("unet", "restore", "a.png")):
        path = broken / part / "diffusion_pytorch_model.safetensors"
        whole = path.read_bytes()
        tensors = load_file(path)
        first = next(iter(tensors))
        tensors.pop(first)
        save_file(tensors, path)
        assert main([command, str(photos / "0.png"), "-o", str(tmp_path / output), "--model", str(broken)]) == 1
        assert f"{part}, missing: {first}" in capsys.readouterr().err
        assert not (tmp_path / output).exists()
        path.write_bytes(whole)
    (broken / "vae" / path.name).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"complete safetensors file, got .*vae"):
        load_vae(broken)


def test_latents_of_another_vae_are_refused(model, photos, tmp_path):
    vae = load_vae(model)
    encode_file(vae, photos / "0.png", tmp_path / "a.safetensors", vae_name="tiny")
    latents, metadata = read_latents(tmp_path / "a.safetensors"), read_latents_metadata(tmp_path / "a.safetensors")
    write_latents(tmp_path / "a.safetensors", latents, metadata=metadata | {"scaling_factor": "0.18215"})
    with pytest.raises(ValueError, match=r"factor 1\.0, .* says 0\.18215"):
        decode_file(vae, tmp_path / "a.safetensors", tmp_path / "a.png")


def test_a_vae_is_found_in_a_pipeline_and_alone_and_nowhere_else(model, tmp_path):
    assert type(load_vae(model)).__name__ == type(load_vae(f"{model}/vae")).__name__ == "AutoencoderTiny"
    with pytest.raises(FileNotFoundError, match="Expected a VAE"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="got UNet2DConditionModel"):
        load_vae(f"{model}/unet")


def test_folders_that_cannot_be_encoded_are_refused(model, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["encode", str(tmp_path / "empty"), "-o", str(tmp_path / "out"), "--model", model]) == 1
    assert "found none" in capsys.readouterr().err


def test_a_shared_name_costs_its_files_only(model, photos, tmp_path, capsys):
    write_image(photos / "0.jpg", torch.rand(1, 3, 9, 9))
    assert main(["encode", str(photos), "-o", str(tmp_path / "out"), "--model", model]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("milo-latent: ")]
    assert "2 photos of" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["0.jpg:", "0.png:"]
    assert "each name once" in lines[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.safetensors", "2.safetensors"]


def test_photos_of_one_size_are_encoded_together_and_nearly_as_alone(tmp_path, monkeypatch):
    vae, rng, seen = tiny_pipeline().vae, torch.Generator().manual_seed(0), []
    (tmp_path / "photos").mkdir()
    for index in range(9):
        shape = (1, 3, 24, 40) if index in (2, 5) else (1, 3, 32, 32)
        write_image(tmp_path / "photos" / f"{index}.png", torch.rand(shape, generator=rng))
    (tmp_path / "photos" / "4.png").write_text("no image")
    real = files.encode_image
    monkeypatch.setattr(files, "encode_image", lambda *given, **o: seen.append(len(given[1])) or real(*given, **o))
    reports = {}
    for batch in (1, 4):
        jobs = find_jobs(
            [tmp_path / "photos"], f"{tmp_path / str(batch)}/", suffixes=frozenset({".png"}), suffix=".npy"
        )
        seen.clear()
        reports[batch] = encode_files(vae, jobs, vae_name="tiny", batch=batch, progress=False)
    assert seen == [3, 2, 3]  # 0, 1, 3; 2, 5; 6, 7, 8
    assert reports[4].failed == reports[1].failed
    assert list(reports[4].failed) == [tmp_path / "photos" / "4.png"]
    for path in sorted((tmp_path / "1").iterdir()):
        one, other = (read_latents(folder / path.name) for folder in (tmp_path / "1", tmp_path / "4"))
        assert torch.allclose(one, other, atol=1e-5)
    monkeypatch.setattr(batches, "LARGEST_BATCH", 2 * 32 * 32)
    shutil.rmtree(tmp_path / "4")
    seen.clear()
    encode_files(vae, jobs, vae_name="tiny", batch=4, progress=False)
    assert max(seen) == 2


def test_batches_that_cannot_be_are_refused(photos, tmp_path, capsys):
    vae, png = tiny_pipeline().vae, frozenset({".png"})
    jobs = find_jobs([photos], f"{tmp_path / 'out'}/", suffixes=png, suffix=".npy")
    for options, match in (({"batch": 0}, "at least 1 photo, got 0"), ({"batch": 2, "tile": 320}, "batch of 1 with")):
        with pytest.raises(ValueError, match=match):
            encode_files(vae, jobs, vae_name="tiny", **options)
    assert main(["encode", "photos-0.tar", "-o", str(tmp_path / "out"), "--batch", "2"]) == 1
    assert "with a data set" in capsys.readouterr().err
