"""Photos to train on: every kind of source, and samples that do not depend on who draws them."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from milo_latent.files import read_image
from milo_latent.training.data.photos import DatasetSource, FolderSource, ShardSource
from milo_latent.training.data.restoration_pairs import BatchReader, RestorationPairs, noise_and_timestep


def picture(value, size=(40, 36)):
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([columns * 5, rows * 5, np.full_like(rows, value)], axis=2).astype(np.uint8))


def halve(image, rng):
    return image * 0.5 + 0.1 * float(rng.random())


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for value in range(5):
        picture(value * 40).save(folder / f"photo{value}.png")
    return folder


def pairs(source, **options):
    return RestorationPairs(source, **{"crop_size": 32, "degradation": halve, "seed": 3} | options)


def collate(samples):
    return tuple(torch.stack([sample[name] for sample in samples]) for name in ("clean", "degraded"))


def test_an_epoch_shows_every_photo_once_and_each_epoch_in_another_order(photos):
    found = pairs(FolderSource([photos]))
    blue = [round(found[number]["clean"][2, 0, 0].item() * 255) for number in range(15)]
    epochs = [blue[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 40, 80, 120, 160] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_sample_is_the_same_whenever_it_is_drawn_and_another_in_the_next_epoch(photos):
    first, again = (pairs(FolderSource([photos])) for _ in range(2))
    later = [first[number] for number in range(9, -1, -1)][::-1]
    for number in range(10):
        sample = again[number]
        assert torch.equal(sample["clean"], later[number]["clean"])
        assert torch.equal(sample["degraded"], later[number]["degraded"])
        assert sample["draws"] == later[number]["draws"]
    assert len({sample["draws"] for sample in later}) == 10
    assert pairs(FolderSource([photos]), seed=4)[0]["draws"] != later[0]["draws"]


def test_both_halves_of_a_pair_are_cut_flipped_and_turned_alike(photos, tmp_path):
    halves = tmp_path / "halves"
    halves.mkdir()
    for path in photos.iterdir():
        image = Image.open(path)
        image.point(lambda value: value // 2).save(halves / path.name)
    found = pairs(FolderSource([photos], degraded=halves), degradation=None)
    for number in range(10):
        sample = found[number]
        assert torch.equal(sample["degraded"], (sample["clean"] * 255 / 2 + 1e-4).floor() / 255)


def test_a_small_half_is_enlarged_to_its_photo(photos, tmp_path):
    halves = tmp_path / "small"
    halves.mkdir()
    for path in photos.iterdir():
        Image.open(path).resize((10, 9), Image.Resampling.BOX).save(halves / path.name)
    sample = pairs(FolderSource([photos], degraded=halves))[0]
    assert sample["degraded"].shape == sample["clean"].shape == (3, 32, 32)
    assert (sample["degraded"] - sample["clean"]).abs().mean() < 0.05


def test_a_photo_without_its_half_is_named(photos, tmp_path):
    halves = tmp_path / "halves"
    halves.mkdir()
    picture(1).save(halves / "photo0.png")
    with pytest.raises(ValueError, match=r"got none for 4 of them, such as photo1\.png"):
        FolderSource([photos], degraded=halves)


def test_photos_smaller_than_the_crop_are_named(photos):
    with pytest.raises(ValueError, match=r"at least 64 pixels a side, got 40x36 for photo\d\.png"):
        pairs(FolderSource([photos]), crop_size=64)[0]


def test_captions_are_read_and_dropped_with_the_chosen_probability(photos, tmp_path):
    captions = tmp_path / "captions.csv"
    captions.write_text("file_name,text\n" + "".join(f'photo{n}.png,"a photo, number {n}"\n' for n in range(4)))
    source = FolderSource([photos], captions=captions)
    assert [source[n].caption for n in range(5)] == [*(f"a photo, number {n}" for n in range(4)), ""]
    drawn = [pairs(FolderSource([photos]), caption_dropout=0.0)[n]["caption"] for n in range(5)]
    assert drawn == [""] * 5
    assert all(pairs(source, caption_dropout=1.0)[n]["caption"] == "" for n in range(10))
    kept = [pairs(source, caption_dropout=0.5)[n]["caption"] != "" for n in range(200)]
    assert 50 < sum(kept) < 110
    captions.write_text("name,caption\nphoto0.png,x\n")
    with pytest.raises(ValueError, match="Expected the columns"):
        FolderSource([photos], captions=captions)


def encoded(image, suffix="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=suffix)
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards_hold_clean_images_degraded_ones_and_captions(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        {
            "x/0001.png": encoded(picture(10)),
            "x/0001.lq.png": encoded(picture(20)),
            "x/0001.txt": "Grüße".encode(),
            "x/0002.jpg": encoded(picture(30), "JPEG"),
            "x/0003.json": b"{}",
        },
    )
    write_shard(tmp_path / "b.tar", {"0001.webp": encoded(picture(40), "WEBP")})
    source = ShardSource([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert len(source) == 3
    assert round(source[0].clean[2, 0, 0].item() * 255) == 10
    assert round(source[0].degraded[2, 0, 0].item() * 255) == 20
    assert source[0].caption == "Grüße"
    assert source[1].degraded is None
    assert source[2].clean.shape == (3, 36, 40)


def test_shards_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        ShardSource([tmp_path / "none.tar"])
    (tmp_path / "cut.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"Expected a tar file, got .*cut\.tar"):
        ShardSource([tmp_path / "cut.tar"])
    write_shard(tmp_path / "damaged.tar", {"a.png": encoded(picture(1))[:80]})
    with pytest.raises(ValueError, match="photo 0 of the shards, which is damaged"):
        ShardSource([tmp_path / "damaged.tar"])[0]
    write_shard(tmp_path / "empty.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match="found none"):
        ShardSource([tmp_path / "empty.tar"])


def test_a_data_set_gives_images_pairs_and_captions_by_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"photo": [picture(10), picture(20)], "noisy": [picture(30), picture(40)], "text": ["one", None]}
    kinds = datasets.Features({"photo": datasets.Image(), "noisy": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set")
    columns = {"image_column": "photo", "degraded_column": "noisy", "caption_column": "text"}
    source = DatasetSource(str(tmp_path / "set"), **columns)
    assert len(source) == 2
    assert [round(source[1].clean[2, 0, 0].item() * 255), round(source[1].degraded[2, 0, 0].item() * 255)] == [20, 40]
    assert [source[0].caption, source[1].caption] == ["one", ""]
    with pytest.raises(ValueError, match=r"Expected the columns \['image'\]"):
        DatasetSource(str(tmp_path / "set"))


def test_batches_follow_from_step_and_process_not_from_workers(photos):
    found = pairs(FolderSource([photos]))
    alone = BatchReader(found, batch_size=4, collate=collate)
    ahead = BatchReader(found, batch_size=4, workers=2, collate=collate)
    halves = [BatchReader(found, batch_size=2, processes=2, collate=collate) for _ in range(2)]
    for step in (0, 1, 2, 7):
        clean, degraded = alone(step)
        assert torch.equal(ahead(step)[1], degraded)
        parts = [half(step, process) for process, half in enumerate(halves)]
        assert torch.equal(torch.cat([part[0] for part in parts]), clean)
        assert torch.equal(torch.cat([part[1] for part in parts]), degraded)


def test_noise_and_timestep_follow_from_the_seed_alone():
    noise, timestep = noise_and_timestep((5, 0), (4, 8, 8), 1000)
    again, same = noise_and_timestep((5, 0), (4, 8, 8), 1000)
    assert torch.equal(noise, again)
    assert timestep == same
    assert not torch.equal(noise_and_timestep((5, 1), (4, 8, 8), 1000)[0], noise)
    drawn = [noise_and_timestep((seed, 0), (1,), 10)[1] for seed in range(300)]
    assert set(drawn) == set(range(10))


def test_images_of_a_folder_are_read_as_they_are(photos):
    source = FolderSource([photos])
    assert torch.equal(source[2].clean, read_image(photos / "photo2.png")[0])
    assert source[2].name == "photo2.png"
