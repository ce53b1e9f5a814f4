"""Scoring many files: pairing, batches, tables that resume where they stopped."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from milo_latent import MILO
from milo_latent.cli import main
from milo_latent.files import LATENT_SUFFIXES, list_unique_files, read_image, read_latents, write_image, write_latents
from milo_latent.score import pairs as scoring
from milo_latent.score.pairs import match_pairs, score_pairs
from milo_latent.score.table import ScoreRow, ScoreTable
from milo_latent.testing import generator, latent_pair, tiny_metric, tiny_pipeline


@pytest.fixture
def folders(tmp_path):
    """Two folders of 20 latents, of two sizes, matched by name."""
    for name in ("ref", "dist"):
        (tmp_path / name).mkdir()
    for index in range(20):
        ref, dist = latent_pair(side=16 if index < 18 else 20, noise=0.1 * index, seed=index)
        write_latents(tmp_path / "ref" / f"{index:02d}.npy", ref)
        write_latents(tmp_path / "dist" / f"{index:02d}.safetensors", dist)
    return tmp_path / "ref", tmp_path / "dist"


@pytest.fixture
def weights(tmp_path):
    tiny_metric().save_pretrained(tmp_path / "weights")
    return str(tmp_path / "weights")


def test_pairs_are_matched_by_name(folders):
    ref, dist = folders
    pairs = match_pairs(ref, dist)
    assert [pair.name for pair in pairs] == [f"{index:02d}" for index in range(20)]
    assert {(pair.ref.stem, pair.dist.suffix) for pair in pairs} == {
        (f"{index:02d}", ".safetensors") for index in range(20)
    }
    many = match_pairs(ref / "00.npy", dist)
    assert {pair.ref.name for pair in many} == {"00.npy"}
    assert len(many) == 20
    assert [pair.name for pair in match_pairs(ref / "00.npy", dist / "01.safetensors")] == ["01.safetensors"]


def test_what_cannot_be_paired_is_refused(folders, tmp_path):
    ref, dist = folders
    with pytest.raises(FileNotFoundError, match="does not exist"):
        match_pairs(ref, tmp_path / "absent")
    with pytest.raises(ValueError, match="folder for `dist`"):
        match_pairs(ref, dist / "00.safetensors")
    (dist / "07.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 are in one only: \['07'\]"):
        match_pairs(ref, dist)
    (ref / "07.npy").unlink()
    write_latents(ref / "08.safetensors", torch.rand(1, 4, 16, 16))
    with pytest.raises(ValueError, match="each name once"):
        match_pairs(ref, dist)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found none"):
        match_pairs(ref / "00.npy", tmp_path / "empty")


def test_hidden_files_of_a_folder_are_none_to_score(folders):
    ref, dist = folders
    pairs = match_pairs(ref, dist)
    (ref / "._00.npy").write_bytes(b"what macOS writes beside a file")
    (dist / ".00.safetensors.k2j3.safetensors").write_bytes(b"half of a file, of a process that was killed")
    assert match_pairs(ref, dist) == pairs
    assert [path.name for path in list_unique_files(ref, LATENT_SUFFIXES)] == [pair.ref.name for pair in pairs]


def test_a_pair_of_many_that_cannot_be_scored_is_named(folders, metric):
    ref, dist = folders
    write_latents(dist / "05.safetensors", torch.randn(1, 4, 20, 16))
    with pytest.raises(ValueError, match=r"05\.npy and .*05\.safetensors: .*of one shape.*in latent cells"):
        list(score_pairs(metric, match_pairs(ref, dist)))
    for index in range(20):
        write_latents(ref / f"{index:02d}.npy", torch.randn(1, 4, 8, 8))
        write_latents(dist / f"{index:02d}.safetensors", torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"00\.npy and .*00\.safetensors: .*sides of at least 16"):
        list(score_pairs(metric, match_pairs(ref, dist)))


def test_batches_score_as_pairs_alone(folders, metric):
    rows = list(score_pairs(metric, match_pairs(*folders)))
    for index, row in enumerate(rows):
        ref, dist = latent_pair(side=16 if index < 18 else 20, noise=0.1 * index, seed=index)
        alone = metric.compare(ref=ref, dist=dist)
        assert row.error == pytest.approx(alone.error.item(), rel=1e-6)
        assert row.mos == pytest.approx(alone.mos.item(), rel=1e-5)


@pytest.fixture
def one_core(set_threads):
    """Score one batch after another, so that it is known which is interrupted."""
    set_threads(1)


@pytest.mark.usefixtures("one_core")
def test_an_interrupted_table_ends_as_an_uninterrupted_one(folders, weights, tmp_path, monkeypatch):
    ref, dist = folders
    command = ["score", "--ref", str(ref), "--dist", str(dist), "--weights", weights, "--csv"]
    assert main([*command, str(tmp_path / "whole.csv")]) == 0
    real, reads = scoring.read_input, []

    def read(path, encode=None):
        reads.append(path)
        if len(reads) == 2 * scoring.BATCH_SIZE + 1:
            raise KeyboardInterrupt
        return real(path, encode)

    monkeypatch.setattr(scoring, "read_input", read)
    assert main([*command, str(tmp_path / "parts.csv")]) == 130
    assert not (tmp_path / "parts.csv").exists()
    with (tmp_path / "parts.csv.partial").open("a") as file:
        file.write('"19",0.5')  # as a kill in the middle of a line leaves it
    reads.clear()
    monkeypatch.setattr(scoring, "read_input", lambda path, encode=None: reads.append(path) or real(path, encode))
    assert main([*command, str(tmp_path / "parts.csv")]) == 0
    assert len(reads) == 2 * (20 - scoring.BATCH_SIZE)
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "parts.csv.partial").exists()
    assert len(list(csv.DictReader((tmp_path / "whole.csv").open()))) == 20


def test_rows_of_other_weights_are_dropped(tmp_path):
    row = ScoreRow('with "quotes", and comma', 0.1, 0.2)
    one, other = ({row.name: {"weights": weights}} for weights in ("one", "other"))
    list(ScoreTable(tmp_path / "a.csv", made=one).extend([row]))
    assert list(ScoreTable(tmp_path / "a.csv", made=one).rows.values()) == [row]
    for made in (other, {}, {row.name: {}}, {"another": {"weights": "one"}}):
        with pytest.warns(UserWarning, match="1 rows of .* are scored anew"):
            assert ScoreTable(tmp_path / "a.csv", made=made).rows == {}


def test_json_prints_every_row(folders, weights, capsys):
    assert main(["score", "--ref", str(folders[0]), "--dist", str(folders[1]), "--weights", weights, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    rows = table["pairs"]
    assert table["metric"] == "MILO_L"
    assert table["weights"] == weights
    for reading in ("error", "mos"):
        assert table["mean"][reading] == pytest.approx(sum(row[reading] for row in rows) / 20)
    assert [row["name"] for row in rows] == [f"{index:02d}" for index in range(20)]
    assert rows[0]["error"] == 0


def test_images_are_scored_as_latents_and_mapped(photo, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    tiny_metric().save_pretrained(tmp_path / "model" / "metric")
    large = torch.nn.functional.interpolate(read_image(photo), size=(136, 144))
    write_image(tmp_path / "a.png", large)
    write_image(tmp_path / "b.png", large * 0.7)
    files = ["--ref", str(tmp_path / "a.png"), "--dist", str(tmp_path / "b.png"), "--vae", str(tmp_path / "model")]
    assert main(["score", *files, "--map", str(tmp_path / "map.png"), "--overlay", str(tmp_path / "a.png")]) == 0
    assert "MILO_L" in capsys.readouterr().out
    picture = read_image(tmp_path / "map.png")
    assert picture.shape[2] == 136
    assert picture.shape[3] > 144


def test_maps_lie_where_the_difference_is_whatever_the_size_of_a_cell(tmp_path):
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4, latent_channels=4
    )
    vae.save_pretrained(tmp_path / "vae")
    photo = torch.full((1, 3, 160, 160), 0.5)
    write_image(tmp_path / "a.png", photo)
    photo[..., 80:, 80:] = 1.0
    write_image(tmp_path / "b.png", photo)
    files = ["--ref", str(tmp_path / "a.png"), "--dist", str(tmp_path / "b.png"), "--vae", str(tmp_path / "vae")]
    metric = MILO(scaling_factor=vae.config.scaling_factor)
    metric.load_state_dict(MILO.from_pretrained("nano").state_dict())
    metric.save_pretrained(tmp_path / "fits")
    assert main(["score", *files, "--weights", str(tmp_path / "fits"), "--map", str(tmp_path / "map.png")]) == 0
    light = read_image(tmp_path / "map.png")[..., :160, :160].mean(dim=1)[0]
    inside, outside = light[96:144, 96:144].mean(), light[16:64, 16:64].mean()
    assert inside > 1.2 * outside


def test_latents_of_another_vae_are_refused(tmp_path):
    ref, dist = latent_pair()
    for name, latents, factor in (("ref", ref, "0.5"), ("dist", dist, "0.18215")):
        write_latents(tmp_path / f"{name}.safetensors", latents, metadata={"vae": "sd", "scaling_factor": factor})
    metric = MILO(latent_space="other", scaling_factor=0.5)
    pairs = match_pairs(tmp_path / "ref.safetensors", tmp_path / "dist.safetensors")
    with pytest.raises(ValueError, match=r"latents of other .*those of sd \(0\.18215\)"):
        list(score_pairs(metric, pairs))
    unnamed = MILO()
    assert len(list(score_pairs(unnamed, pairs))) == 1


def test_one_reference_is_read_once_and_scores_as_pairs_do(folders, metric, monkeypatch):
    ref, dist = folders
    (dist / "18.safetensors").unlink()
    (dist / "19.safetensors").unlink()
    real, reads = scoring.read_input, []
    monkeypatch.setattr(scoring, "read_input", lambda path, encode=None: reads.append(path.name) or real(path, encode))
    rows = list(score_pairs(metric, match_pairs(ref / "00.npy", dist)))
    assert len(rows) == 18
    assert reads.count("00.npy") == 1
    for row in rows:
        single = metric(ref=read_latents(ref / "00.npy"), dist=read_latents(dist / row.name)).item()
        assert row.error == pytest.approx(single, rel=1e-5)


def test_batches_that_were_begun_are_scored_anew():
    pairs = [scoring.Pair(f"{index:02d}", Path("a"), Path("b")) for index in range(40)]
    assert scoring.unfinished(pairs, set()) == pairs
    done = {pair.name for pair in pairs[:20]}
    assert [pair.name for pair in scoring.unfinished(pairs, done)] == [f"{index:02d}" for index in range(16, 40)]
    assert scoring.unfinished(pairs, {pair.name for pair in pairs}) == []


def test_the_mean_over_pairs_is_printed(folders, weights, capsys):
    assert main(["score", "--ref", str(folders[0]), "--dist", str(folders[1]), "--weights", weights]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split(": error ")[1].split(",")[0]) for line in lines[:21]]
    assert lines[20].startswith("mean: ")
    assert scores[20] == pytest.approx(sum(scores[:20]) / 20, abs=1e-9)


SCORE_SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
from milo_latent.score import pairs as scoring
from milo_latent.cli import main
real = scoring.read_input
scoring.read_input = lambda path, encode=None: time.sleep(0.05) or real(path, encode)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_goes_on_and_ends_with_the_same_table(tmp_path, weights, how):
    for name in ("ref", "dist"):
        (tmp_path / name).mkdir()
    for index in range(40):
        for name, latents in zip(("ref", "dist"), latent_pair(noise=0.05 * index, seed=index), strict=True):
            write_latents(tmp_path / name / f"{index:02d}.npy", latents)
    command = ["score", "--ref", str(tmp_path / "ref"), "--dist", str(tmp_path / "dist"), "--weights", weights]
    assert main([*command, "--csv", str(tmp_path / "whole.csv")]) == 0
    partial = tmp_path / "parts.csv.partial"
    process = subprocess.Popen(
        [sys.executable, "-c", SCORE_SLOWLY, *command, "--csv", str(tmp_path / "parts.csv")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_text().count("\n") > 16):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert b"Traceback" not in errors
    assert not (tmp_path / "parts.csv").exists()
    assert 16 <= partial.read_text().count("\n") - 1 < 40
    assert main([*command, "--csv", str(tmp_path / "parts.csv")]) == 0
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not partial.exists()


@pytest.mark.filterwarnings("default::UserWarning")  # as for users, not as errors
def test_rows_of_other_folders_are_dropped(folders, weights, tmp_path, capsys):
    ref, dist = folders
    table = str(tmp_path / "t.csv")
    common = ["--weights", weights, "--csv", table]
    assert main(["score", "--ref", str(ref), "--dist", str(dist), *common]) == 0
    other = (tmp_path / "t.csv").read_text()
    elsewhere = {"00": {"weights": "", "ref": "elsewhere", "dist": "elsewhere"}}
    list(ScoreTable(table, made=elsewhere).extend([ScoreRow("00", 9.0, 9.0)]))
    assert main(["score", "--ref", str(ref), "--dist", str(dist), *common, "--overwrite"]) == 0
    assert (tmp_path / "t.csv").read_text() == other


def interrupted(command, table, monkeypatch):
    """Begin a table and stop after the first batch."""
    real, reads = scoring.read_input, []

    def read(path, encode=None):
        reads.append(path)
        if len(reads) == 2 * scoring.BATCH_SIZE + 1:
            raise KeyboardInterrupt
        return real(path, encode)

    with monkeypatch.context() as context:
        context.setattr(scoring, "read_input", read)
        assert main([*command, "--csv", str(table), "--overwrite"]) == 130
    return Path(f"{table}.partial")


@pytest.mark.filterwarnings("default::UserWarning")  # as for users, not as errors
@pytest.mark.usefixtures("one_core")
def test_rows_of_files_that_changed_since_are_scored_anew_and_that_is_said(
    folders, weights, tmp_path, monkeypatch, capsys
):
    ref, dist = folders
    command = ["score", "--ref", str(ref), "--dist", str(dist), "--weights", weights]
    for changed in (ref / "03.npy", dist / "03.safetensors", Path(weights) / "diffusion_pytorch_model.safetensors"):
        interrupted(command, tmp_path / "parts.csv", monkeypatch)
        if changed.parent == Path(weights):
            tiny_metric(seed=5).save_pretrained(weights)
        else:
            write_latents(changed, torch.randn(1, 4, 16, 16, generator=generator(9)))
        capsys.readouterr()
        assert main([*command, "--csv", str(tmp_path / "parts.csv"), "--overwrite"]) == 0
        assert "rows of" in (told := capsys.readouterr().err)
        assert "are scored anew" in told
        assert main([*command, "--csv", str(tmp_path / "whole.csv"), "--overwrite"]) == 0
        assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.usefixtures("one_core")
def test_a_damaged_row_is_scored_anew(folders, weights, tmp_path, monkeypatch):
    command = ["score", "--ref", str(folders[0]), "--dist", str(folders[1]), "--weights", weights]
    content = bytearray(interrupted(command, tmp_path / "a.csv", monkeypatch).read_bytes())
    made = {json.loads(line[9:])["name"]: json.loads(line[9:]) for line in content.splitlines()}
    right = {name: ScoreRow(name, entry.pop("error"), entry.pop("mos")) for name, entry in made.items()}
    made = {entry.pop("name"): entry for entry in made.values()}
    assert len(right) == scoring.BATCH_SIZE
    first = content.index(b"\n") + 1
    for place in range(first):
        damaged = content.copy()
        damaged[place] ^= 1 << place % 8
        (tmp_path / "a.csv.partial").write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged"):
            rows = ScoreTable(tmp_path / "a.csv", made=made).rows
        assert len(rows) >= scoring.BATCH_SIZE - 2  # two are damaged where the end of a line was hit
        assert all(row == right[name] for name, row in rows.items())


def test_results_never_replace_inputs(folders, weights, photo, tmp_path, capsys):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png", "t.csv.partial")]
    for file in files:
        file.write_bytes(photo.read_bytes())
    (tmp_path / "link.png").hardlink_to(files[0])
    a, b, c, partial = map(str, files)
    before = photo.read_bytes()
    command = ["score", "--weights", "milo-image", "--ref", a, "--dist"]
    for arguments in (
        [b, "--map", a],
        [b, "--map", str(tmp_path / "link.png")],
        [b, "--map", str(tmp_path / "." / "b.png")],
        [b, "--map", c, "--overlay", c],
        [b, "--csv", a],
        [b, "--csv", b],
        [partial, "--csv", str(tmp_path / "t.csv")],
    ):
        assert main([*command, *arguments]) == 1
        assert "which would be overwritten" in capsys.readouterr().err
    assert main(["score", "--weights", a, "--ref", b, "--dist", c, "--csv", a]) == 1
    assert all(file.read_bytes() == before for file in files)


def test_options_that_would_do_nothing_or_fail_late_are_refused(tmp_path, capsys):
    for name, latents in zip(("ref", "dist"), latent_pair(batch=3), strict=True):
        write_latents(tmp_path / f"{name}.npy", latents)
    command = ["score", "--ref", str(tmp_path / "ref.npy"), "--dist", str(tmp_path / "dist.npy")]
    assert main([*command, "--overlay", "photo.png"]) == 1
    assert "Expected --map OUT with --overlay" in capsys.readouterr().err
    assert main([*command, "--csv", str(tmp_path)]) == 1
    assert "Expected a file for --csv, got the folder" in capsys.readouterr().err
    assert main([*command, "--map", str(tmp_path / "map.png")]) == 0
    assert "of the first of 3 latents" in capsys.readouterr().out


def test_maps_are_enlarged_to_pixels_and_say_their_scale(tmp_path, capsys):
    ref, dist = latent_pair(side=20)
    write_latents(tmp_path / "a.npy", ref)
    write_latents(tmp_path / "b.npy", dist)
    files = ["--ref", str(tmp_path / "a.npy"), "--dist", str(tmp_path / "b.npy")]
    assert main(["score", *files, "--map", str(tmp_path / "auto.png")]) == 0
    assert "auto.png, from 0 (dark) to " in capsys.readouterr().out
    assert main(["score", *files, "--map", str(tmp_path / "fixed.png"), "--map-scale", "4"]) == 0
    assert "to 4 (light)" in capsys.readouterr().out
    auto, fixed = (read_image(tmp_path / f"{name}.png")[..., :160] for name in ("auto", "fixed"))
    assert auto.shape[2] == 160
    assert auto.mean() > 1.2 * fixed.mean()
    for wrong in ("0", "-1", "nan", "large"):
        assert main(["score", *files, "--map", str(tmp_path / "no.png"), "--map-scale", wrong]) == 1
        assert "--map-scale to be auto or an error above 0" in capsys.readouterr().err
