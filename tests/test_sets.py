"""Webdataset shards and Hugging Face data sets in place of folders."""

import io
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from milo_latent import MILO
from milo_latent.cli import main
from milo_latent.datasets import as_file, column_items, expand_braces, is_shard, open_dataset, shard_items, write_shard
from milo_latent.latents import sets
from milo_latent.latents.codec import encode_image
from milo_latent.latents.files import encode_file
from milo_latent.latents.sets import GROUP, encode_rows, encode_shard, failures_path, read_failures
from milo_latent.score.pairs import match_columns, match_pairs, match_shards, score_pairs
from milo_latent.testing import tiny_metric, tiny_pipeline


@pytest.fixture(scope="module")
def vae():
    return tiny_pipeline().vae


def png(seed, side=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def members_of(shard):
    with tarfile.open(shard) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{b,c}{0..1}", ["b0", "b1", "c0", "c1"]),
        ("{a}-{}.tar", ["{a}-{}.tar"]),
    ],
)
def test_braces_stand_for_names(pattern, names):
    assert expand_braces(pattern) == names


def test_braces_for_too_many_names_are_refused():
    with pytest.raises(ValueError, match=r"at most 1000000 names, got \{0\.\.99999999999\}"):
        expand_braces("a-{0..99999999999}.tar")
    assert is_shard("A-{0..9}.TAR")
    assert not is_shard("a.tar.gz")


def test_a_shard_gives_its_files_one_by_one_and_is_the_same_bytes_again(tmp_path):
    content = {"b/1.png": png(1), "b/1.txt": b"a caption", "a.png": png(2)}
    write_shard(tmp_path / "a.tar", content.items())
    write_shard(tmp_path / "b.tar", ((name, value) for name, value in content.items()))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    items = list(shard_items(tmp_path / "a.tar"))
    assert {item.name: item.read() for item in items} == content
    assert [(item.key, item.suffix) for item in items] == [("b/1", ".png"), ("b/1", ".txt"), ("a", ".png")]
    assert str(items[0]) == f"{tmp_path / 'a.tar'}: b/1.png"
    assert len({item.stamp for item in items}) == 3


def test_hidden_files_links_and_folders_are_no_items(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("x", tarfile.DIRTYPE), ("x/l.png", tarfile.SYMTYPE), ("x/._a.png", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("./x/a.png")
        archive.addfile(member)
    assert [item.name for item in shard_items(tmp_path / "a.tar")] == ["x/a.png"]


def test_an_item_is_a_file_as_long_as_it_is_needed_and_errors_name_it(tmp_path):
    write_shard(tmp_path / "a.tar", [("../evil.PNG", b"content")])
    (item,) = shard_items(tmp_path / "a.tar")
    with as_file(item) as path:
        assert (path.suffix, path.read_bytes()) == (".png", b"content")
    assert not path.parent.exists()
    assert tmp_path not in path.parents
    with pytest.raises(ValueError, match=r"^Expected more, got .*a\.tar: \.\./evil\.PNG\.$"), as_file(item) as path:
        raise ValueError(f"Expected more, got {path}.")
    with as_file(tmp_path) as path:
        assert path == tmp_path


@pytest.mark.parametrize("content", [b"no tar file" * 100, b""])
def test_what_is_no_shard_is_refused(tmp_path, content, vae):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="Expected a tar file, uncompressed"):
        list(shard_items(tmp_path / "a.tar"))
    with pytest.raises(FileNotFoundError, match="Expected a shard"):
        list(shard_items(tmp_path / "b.tar"))
    write_shard(tmp_path / "whole.tar", [("a.png", png(1)), ("b.txt", b"x" * 20_000)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:12_000])
    with pytest.raises(ValueError, match="Expected a complete tar file"):
        encode_shard(vae, tmp_path / "cut.tar", tmp_path / "out.tar", vae_name="tiny")
    write_shard(tmp_path / "none.tar", [("a.txt", b"text")])
    with pytest.raises(ValueError, match=r"Expected images of .*none\.tar, found none"):
        encode_shard(vae, tmp_path / "none.tar", tmp_path / "out.tar", vae_name="tiny")
    assert not (tmp_path / "out.tar").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_a_shard_of_photos_becomes_a_shard_of_their_latents(tmp_path, vae, suffix):
    write_shard(tmp_path / "in.tar", [("x/1.png", png(1)), ("x/1.txt", b"a caption"), ("2.v.jpg", png(2))])
    assert encode_shard(vae, tmp_path / "in.tar", tmp_path / "out.tar", vae_name="tiny", suffix=suffix) == 2
    made = members_of(tmp_path / "out.tar")
    assert list(made) == [f"x/1{suffix}", "x/1.txt", f"2.v{suffix}"]
    assert made["x/1.txt"] == b"a caption"
    for seed, name in ((1, "x/1"), (2, "2.v")):
        (tmp_path / "photo.png").write_bytes(png(seed))
        encode_file(vae, tmp_path / "photo.png", tmp_path / f"latents{suffix}", vae_name="tiny")
        assert made[name + suffix] == (tmp_path / f"latents{suffix}").read_bytes()
    assert not failures_path(tmp_path / "out.tar").exists()


def test_damaged_photos_and_shared_names_cost_themselves_and_are_listed_until_they_are_repaired(tmp_path, vae):
    good = [("a.png", png(1))]
    bad = [("b.png", png(2)[:100]), ("c.png", png(3)), ("c.jpg", png(4))]
    write_shard(tmp_path / "in.tar", good + bad)
    result = tmp_path / "out.tar"
    assert encode_shard(vae, tmp_path / "in.tar", result, vae_name="tiny") == 1
    assert list(members_of(result)) == ["a.safetensors"]
    failed = read_failures(result)
    assert list(failed) == ["b.png", "c.png", "c.jpg"]
    assert (
        f"Expected a complete image (PNG, JPEG, WEBP, BMP, TIFF), got {tmp_path / 'in.tar'}: b.png" in failed["b.png"]
    )
    assert "expected each name once" in failed["c.jpg"]
    write_shard(tmp_path / "in.tar", good)
    encode_shard(vae, tmp_path / "in.tar", result, vae_name="tiny")
    assert read_failures(result) == {}
    assert [path.name for path in tmp_path.iterdir() if "failed" in path.name] == []


@pytest.fixture
def data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason='needs pip install "milo_latent[data]"')
    count = GROUP + 3
    images = [{"bytes": png(seed), "path": None} for seed in range(count)]
    images[GROUP] = {"bytes": png(0)[:50], "path": None}
    images[GROUP + 1] = None
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    columns = {"image": images, "label": [0, 1] * (count // 2) + [0], "text": [f"photo {row}" for row in range(count)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def test_a_column_of_images_becomes_a_column_of_latents_beside_the_others(tmp_path, data_set, vae):
    import datasets

    rows = open_dataset(data_set, columns=["image"])
    result = tmp_path / "part.parquet"
    assert encode_rows(vae, rows, "image", result, start=1) == GROUP
    made = datasets.load_dataset("parquet", data_files=str(result), cache_dir=str(tmp_path / "cache"))["train"]
    assert made.column_names == ["label", "text", "latents"]
    assert made.features["label"].names == ["cat", "dog"]
    assert made["text"] == rows["text"][1:]
    assert [row + 1 for row, latents in enumerate(made["latents"]) if latents is None] == [GROUP, GROUP + 1]
    (tmp_path / "photo.png").write_bytes(png(5))
    encode_file(vae, tmp_path / "photo.png", tmp_path / "latents.npy", vae_name="tiny")
    assert torch.equal(torch.tensor(made["latents"][4]), torch.from_numpy(np.load(tmp_path / "latents.npy")))
    failed = read_failures(result)
    assert list(failed) == [f"{GROUP}", f"{GROUP + 1}"]
    assert f"got row {GROUP} of image, which is damaged" in failed[f"{GROUP}"]
    assert "got none" in failed[f"{GROUP + 1}"]


def test_a_data_set_of_images_alone_gives_latents_alone(tmp_path, data_set, vae):
    import pyarrow.parquet

    rows = open_dataset(data_set, columns=["image"]).select_columns(["image"])
    encode_rows(vae, rows, "image", tmp_path / "part.parquet", stop=2)
    assert pyarrow.parquet.read_table(tmp_path / "part.parquet").column_names == ["latents"]
    assert len(pyarrow.parquet.read_table(tmp_path / "part.parquet")) == 2


def test_the_items_of_a_column_are_named_by_their_rows(data_set):
    rows = open_dataset(data_set, columns=["image"])
    items = list(column_items(rows, "image", range(9, 11)))
    assert [item.name for item in items] == ["09", "10"]
    assert items[0].read() == png(9)
    with pytest.raises(ValueError, match="Expected a column of images, got text"):
        next(column_items(rows, "text"))
    with pytest.raises(ValueError, match=r"Expected the columns \['photo'\]"):
        open_dataset(data_set, columns=["photo"])


def scores(metric, pairs, **options):
    return {row.name: row.error for row in score_pairs(metric, pairs, **options)}


def test_shards_are_scored_as_folders_are(tmp_path):
    metric = tiny_metric(channels=3)
    for side, seeds in (("ref", (1, 2, 3)), ("dist", (4, 5, 6))):
        (tmp_path / side).mkdir()
        for index, seed in enumerate(seeds):
            (tmp_path / side / f"{index}.png").write_bytes(png(seed))
        members = [(f"{index}.png", png(seed)) for index, seed in enumerate(seeds)]
        write_shard(tmp_path / f"{side}-0.tar", members[:2])
        write_shard(tmp_path / f"{side}-1.tar", [("2.txt", b"more"), members[2]])
    expected = scores(metric, match_pairs(tmp_path / "ref", tmp_path / "dist"))
    pairs = match_shards(tmp_path / "ref-{0..1}.tar", tmp_path / "dist-{0..1}.tar")
    assert scores(metric, pairs) == {
        f"dist-{shard}/{index}": expected[str(index)] for shard, index in ((0, 0), (0, 1), (1, 2))
    }
    one = match_shards(tmp_path / "ref-1.tar", tmp_path / "dist-1.tar")
    assert scores(metric, one) == {"2": expected["2"]}
    with pytest.raises(ValueError, match="as many shards of references as distorted ones, got 2 and 1"):
        match_shards(tmp_path / "ref-{0..1}.tar", tmp_path / "dist-1.tar")
    with pytest.raises(ValueError, match=r"the same names .*: \['0', '1', '2'\]"):
        match_shards(tmp_path / "ref-0.tar", tmp_path / "dist-1.tar")


def test_damaged_members_cost_their_own_pair(tmp_path):
    metric, failed = tiny_metric(channels=3), []
    write_shard(tmp_path / "ref.tar", [("a.png", png(1)), ("b.png", png(2)), ("b.jpg", png(2))])
    write_shard(tmp_path / "dist.tar", [("a.png", png(3)[:99]), ("b.png", png(4))])
    pairs = match_shards(tmp_path / "ref.tar", tmp_path / "dist.tar", failed=failed)
    assert list(scores(metric, pairs, failed=failed)) == ["b"]
    assert "ref.tar: b.jpg: expected each name once" in failed[0]
    assert f"got {tmp_path / 'dist.tar'}: a.png, which is damaged" in failed[1]


def test_encoded_shards_are_scored_as_latents_of_their_vae(tmp_path, vae):
    for side, seed in (("ref", 1), ("dist", 2)):
        write_shard(tmp_path / f"{side}.tar", [("a.png", png(seed, side=128))])
        encode_shard(vae, tmp_path / f"{side}.tar", tmp_path / f"{side}-latents.tar", vae_name="tiny")
    metric = tiny_metric()
    pairs = match_shards(tmp_path / "ref-latents.tar", tmp_path / "dist-latents.tar")
    latents = [encode_image(vae, np.asarray(Image.open(io.BytesIO(png(seed, side=128))))) for seed in (1, 2)]
    expected = metric(ref=latents[0], dist=latents[1]).item()
    assert scores(metric, pairs) == {"a": pytest.approx(expected, rel=1e-6)}
    other = MILO(latent_space="other", scaling_factor=0.5)
    with pytest.raises(ValueError, match=r"got those of tiny \(1\.0\) in .*ref-latents\.tar: a\.safetensors"):
        scores(other, pairs)


def test_two_columns_of_a_data_set_are_scored_row_by_row(tmp_path):
    datasets = pytest.importorskip("datasets", reason='needs pip install "milo_latent[data]"')
    images = {
        name: [{"bytes": png(seed), "path": None} for seed in seeds] for name, seeds in (("a", (1, 2)), ("b", (3, 4)))
    }
    rows = datasets.Dataset.from_dict(images, features=datasets.Features({name: datasets.Image() for name in images}))
    metric = tiny_metric(channels=3)
    found = scores(metric, match_columns(rows, "a", "b"))
    ref, dist = ([Image.open(io.BytesIO(cell["bytes"])) for cell in images[name]] for name in images)
    assert list(found) == ["0", "1"]
    assert list(found.values()) == pytest.approx(metric(ref=ref, dist=dist).tolist(), rel=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_the_command_resumes_shards_and_lists_damaged_photos_every_time(tmp_path, model, capsys):
    for number in range(2):
        members = [(f"{index}.png", png(10 * number + index)) for index in range(2)]
        write_shard(tmp_path / f"in-{number}.tar", [*members, ("bad.png", png(9)[:99])] if number else members)
    command = ["encode", str(tmp_path / "in-{0..1}.tar"), "-o", str(tmp_path / "out"), "--model", model]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "bad.png" in told.out + told.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "in-0.tar", "in-1.tar", "in-1.tar.failed.txt",
    ]  # fmt: skip
    assert list(members_of(tmp_path / "out" / "in-1.tar")) == ["0.safetensors", "1.safetensors"]
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())]
    write_shard(tmp_path / "in-2.tar", [("0.png", png(20))])
    command[1] = str(tmp_path / "in-{0..2}.tar")
    assert main(command) == 1  # of the damaged photo, which is not tried again
    told = capsys.readouterr()
    assert "bad.png" in told.out + told.err
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())][:3] == before
    assert (tmp_path / "out" / "in-2.tar").is_file()
    assert main(["encode", str(tmp_path / "in-0.tar"), "a.png", "-o", str(tmp_path / "out"), "--model", model]) == 1
    assert "Expected photos, or shards" in capsys.readouterr().err


def test_one_shard_becomes_the_shard_that_is_named(tmp_path, model):
    write_shard(tmp_path / "in.tar", [("0.png", png(1))])
    assert main(["encode", str(tmp_path / "in.tar"), "-o", str(tmp_path / "out.tar"), "--model", model]) == 0
    assert list(members_of(tmp_path / "out.tar")) == ["0.safetensors"]


def test_the_command_encodes_a_column_in_parts(tmp_path, data_set, model, monkeypatch):
    import datasets

    monkeypatch.setattr(sets, "PART", 20)
    command = ["encode", f"hf:{data_set}:image", "-o", str(tmp_path / "out"), "--model", model]
    assert main(command) == 1  # two rows hold no image
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    assert [path.name for path in parts] == ["part-00000.parquet", "part-00001.parquet"]
    parts[1].unlink()
    before = parts[0].stat().st_mtime_ns
    assert main(command) == 1
    assert parts[0].stat().st_mtime_ns == before
    files = list(map(str, parts))
    made = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert made["text"] == [f"photo {row}" for row in range(GROUP + 3)]
    assert sum(latents is None for latents in made["latents"]) == 2


def test_the_command_scores_shards_into_a_table_and_a_sheet(tmp_path, capsys):
    for side, seed in (("ref", 1), ("dist", 4)):
        write_shard(tmp_path / f"{side}.tar", [(f"{index}.png", png(seed + index)) for index in range(2)])
    files = [str(tmp_path / f"{side}.tar") for side in ("ref", "dist")]
    outputs = ["--csv", str(tmp_path / "a.csv"), "--html", str(tmp_path / "a.html")]
    assert main(["score", *files, "--weights", "milo-image", *outputs]) == 0
    assert (tmp_path / "a.csv").read_text().count("\n") == 3
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/jpeg;base64") == 4
    assert "<h1>MILO_I (milo-image)</h1>" in page
    capsys.readouterr()
    assert main(["score", *files, "--weights", "milo-image", *outputs]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_the_command_scores_two_columns(tmp_path, capsys):
    datasets = pytest.importorskip("datasets", reason='needs pip install "milo_latent[data]"')
    images = {name: [{"bytes": png(seed), "path": None}] for name, seed in (("a", 1), ("b", 2))}
    features = datasets.Features({name: datasets.Image() for name in images})
    datasets.Dataset.from_dict(images, features=features).save_to_disk(str(tmp_path / "set"))
    address = f"hf:{tmp_path / 'set'}"
    assert main(["score", f"{address}:a", f"{address}:b", "--weights", "milo-image"]) == 0
    ref, dist = (Image.open(io.BytesIO(images[name][0]["bytes"])) for name in images)
    expected = MILO.from_pretrained("milo-image")(ref=ref, dist=dist).item()
    found = re.search(r"^0: error (\S+), MOS", capsys.readouterr().out, re.M)
    assert float(found[1]) == pytest.approx(expected, rel=1e-6)
    arguments = [f"{address}:a", f"{address}:b", "--weights", "milo-image", "--csv", str(tmp_path / "table.csv")]
    assert main(["score", *arguments]) == 0
    table = {"data_files": str(tmp_path / "table.csv"), "cache_dir": str(tmp_path / "cache")}
    columns = datasets.load_dataset("csv", split="train", **table)
    rows = datasets.concatenate_datasets([datasets.load_from_disk(tmp_path / "set"), columns], axis=1)
    assert rows.column_names[:2] == ["a", "b"]
    assert rows["error"] == pytest.approx([expected], rel=1e-5)
