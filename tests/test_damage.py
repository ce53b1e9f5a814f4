"""Damaged and hostile files: one line of error, no hang, nothing left behind, and one bad file costs itself alone."""

import fcntl
import gzip
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from official_checkpoints import official_metric_file
from PIL import Image
from safetensors.torch import save_file

from milo_latent import MILO, load_restorer
from milo_latent.atomic import PREFIX, folder_at_once, remove_leftovers, write_text
from milo_latent.checkpoints import read_checkpoint
from milo_latent.checks import SHOWN, shortened
from milo_latent.cli import main
from milo_latent.convert.tokenizer import open_tokenizer
from milo_latent.evaluation.distortion_settings import read_setting_opinions
from milo_latent.evaluation.iqa_datasets import load_kadid10k
from milo_latent.files import read_image, read_latents, read_latents_metadata, write_image, write_latents
from milo_latent.latents.files import load_vae
from milo_latent.programs import run_program
from milo_latent.structure import check_model_folder, read_json
from milo_latent.testing import tiny_metric, tiny_pipeline
from milo_latent.training.data.shards import PairSet


@pytest.fixture(scope="module")
def fuzz(repository):
    path = repository / "benchmarks" / "fuzz.py"
    specification = importlib.util.spec_from_file_location("fuzz", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz"] = module  # its dataclasses look for it
    specification.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


@pytest.fixture
def vae(tmp_path):
    folder = tmp_path / "vae"
    tiny_pipeline().vae.save_pretrained(folder)
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.filterwarnings("default::UserWarning")  # as for users, who are told of rows that are scored anew
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("images", 150), ("npy", 150), ("safetensors", 100), ("checkpoints", 80), ("metrics", 60), ("VAEs", 30),
        ("pipelines", 5), ("training sets", 40), ("training runs", 8), ("tables", 4),
    ],
)  # fmt: skip
def test_damage_ends_in_a_result_or_in_one_line(fuzz, kind, cases):
    counts = fuzz.fuzz(kind, cases, seed=20, first=0, show=3)
    assert counts["refused"] + counts["accepted"] == cases, counts
    assert counts["refused"] > 0 or kind == "tables"


def test_the_fuzzer_sees_tracebacks_hangs_long_texts_and_litter(fuzz, tmp_path, monkeypatch):
    def outcome(read):
        return fuzz.run_case(fuzz.Kind(None, read), tmp_path, None)[0]

    def fail(error):
        raise error

    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    assert outcome(lambda *_: 1) == "accepted"
    assert outcome(lambda *_: fail(ValueError("no"))) == "refused"
    assert outcome(lambda *_: fail(KeyError("no"))) == "tracebacks"
    assert outcome(lambda *_: sum(index for index in range(10**9))) == "hangs"
    assert outcome(lambda *_: fail(ValueError("A" * 201))) == "texts"
    assert outcome(lambda *_: (tmp_path / ".half").touch()) == "litter"


def test_killed_commands_leave_nothing_once_they_are_run_again(repository):
    command = [sys.executable, str(repository / "benchmarks" / "fuzz.py"), "--only", "encode", "--kills", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| encode | 4 |" in done.stdout


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "GIF", "EPS"])
def test_only_the_decoders_of_known_suffixes_are_used(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this release of Pillow cannot write {kind}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(ValueError, match="PNG, JPEG, WEBP, BMP, TIFF"):
        read_image(tmp_path / "a.png")


def test_a_decoder_may_fail_by_any_error(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for error in (RuntimeError("odd"), NotImplementedError("odd"), IndexError("odd"), ZeroDivisionError("odd")):
        monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=r"a\.png, which is damaged or another file: odd"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 16, 16, }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 16, 16), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 999999999, 16), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 16, 17), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 16, 16), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4, 16, 16), }",
        "{'descr': '<f4', 'fortran_order': __import__('os'), 'shape': (4, 16, 16), }",
        "'''", "(" * 5000, "{'descr': '<f4'",
    ],
)  # fmt: skip
def test_headers_of_npy_are_never_evaluated(tmp_path, header):
    text = (header + "\n").encode()
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * 4 * 16 * 16)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a plain array .*a\.npy"):
        read_latents(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_plain_array_reads_as_numpy_reads_it(tmp_path, dtype, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), dtype, order=order)
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "a.npy").open("wb") as file:
            np.lib.format.write_array(file, array, version=version)
        assert np.array_equal(read_latents(tmp_path / "a.npy")[0].numpy(), array.astype(np.float32))


def test_dtypes_that_pytorch_lacks_are_refused(tmp_path):
    write_latents(tmp_path / "a.safetensors", torch.zeros(1, 4, 16, 16))
    content = (tmp_path / "a.safetensors").read_bytes()
    smaller = content.replace(b'"F32"', b'"F4" ').replace(b"[1,4,16,16]", b"[8,4,16,16]")
    (tmp_path / "a.safetensors").write_bytes(smaller)
    with pytest.raises(ValueError, match=r"Expected dtypes of F64.*got F4"):
        read_latents(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="got F4"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_checkpoints_hold_all_of_their_numbers(tmp_path):
    for name, tensor in (("wide", torch.zeros(1).expand(10**6, 10**6)), ("sparse", torch.eye(3).to_sparse())):
        torch.save({"a": tensor}, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match="odd tensors"):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_damaged_checkpoints_of_the_old_format_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with suppress(ValueError):  # any other error fails the test
            read_checkpoint(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"a"', "[" * 10**5, "9" * 5000, "", "{", "\ufeff{}"])
def test_json_that_is_no_object_is_refused(tmp_path, vae, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"Expected (a )?JSON .*a\.json"):
        read_json(tmp_path / "a.json")
    (vae / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"Expected (a )?JSON .*config\.json"):
        load_vae(vae)


@pytest.mark.parametrize(
    "values",
    [
        {"num_decoder_blocks": [10**5] * 4}, {"num_decoder_blocks": [1] * 10**5}, {"num_decoder_blocks": 10**30},
        {"latent_channels": 10**9}, {"scaling_factor": float("nan")}, {"act_fn": "A" * 5000},
        {"act_fn": [[[[[[[[[[1]]]]]]]]]]},
        {"num_decoder_blocks": [60] * 4, "num_encoder_blocks": [60] * 4},
    ],
)  # fmt: skip
def test_a_configuration_asks_for_no_more_than_its_weights_can_fill(vae, values):
    check_model_folder(vae)
    change(vae / "config.json", **values)
    with pytest.raises(ValueError, match=r"Expected at most|Expected numbers of at most") as caught:
        load_vae(vae)
    assert len(str(caught.value)) < 2 * SHOWN + 200


@pytest.mark.parametrize("levels", [10**30, 17, 0, -1, "x", None, 1.5])
def test_levels_of_a_metric_are_few(tmp_path, levels):
    tiny_metric().save_pretrained(tmp_path)
    change(tmp_path / "config.json", levels=levels)
    with pytest.raises(ValueError, match=r"Expected MILO weights in .*(whole number from 1 to 16|at most)"):
        MILO.from_pretrained(tmp_path)


@pytest.mark.parametrize("shards", [[], None, {}, {"a": 3}, {"a": "../vae/config.json"}, {"a": "absent.safetensors"}])
def test_a_table_of_shards_names_files_beside_it(tmp_path, shards):
    folder = tmp_path / "vae"
    tiny_pipeline().vae.save_pretrained(folder, max_shard_size="10KB")
    load_vae(folder)
    change(folder / "diffusion_pytorch_model.safetensors.index.json", weight_map=shards)
    with pytest.raises(ValueError, match=r"weight_map|Expected the shards"):
        load_vae(folder)


def test_shards_hold_what_their_table_says(tmp_path):
    folder = tmp_path / "vae"
    tiny_pipeline().vae.save_pretrained(folder, max_shard_size="10KB")
    shard = sorted(folder.glob("*-00002-*"))[0]
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match=r"Expected the tensor .* in .*00002"):
        load_vae(folder)


def test_a_pipeline_with_damaged_parts_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.prompt_cache.stored = {"a photo": torch.rand(1, 77, 8)}
    pipeline.save_pretrained(tmp_path / "model")
    for name, content in (
        ("unet/config.json", "[]"), ("scheduler/scheduler_config.json", '{"trained_betas": "x"}'),
        ("prompt_embeds.safetensors", "half"), ("model_index.json", "3"),
    ):  # fmt: skip
        folder = shutil.copytree(tmp_path / "model", tmp_path / name.replace("/", "-"))
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="Expected"):
            load_restorer(folder, device="cpu")


def test_messages_repeat_at_most_200_characters_of_a_value(tmp_path, capsys):
    assert shortened("a\n b") == "a b"
    assert len(shortened("A" * 5000)) == SHOWN
    long = "A" * 5000
    write_latents(tmp_path / "a.safetensors", torch.zeros(1, 4, 16, 16), metadata={"scaling_factor": long})
    save_file({long: torch.zeros(1, 4, 16, 16)}, tmp_path / "b.safetensors")
    metric = MILO(latent_space="sd", scaling_factor=0.18215)
    metric.save_pretrained(tmp_path / "metric")
    for name in "ab":
        path = str(tmp_path / f"{name}.safetensors")
        assert main(["score", "--ref", path, "--dist", path, "--weights", str(tmp_path / "metric")]) == 1
        assert "A" * 100 in (text := capsys.readouterr().err)
        assert "A" * (SHOWN + 1) not in text


def test_what_a_killed_process_left_is_removed_and_what_is_written_now_stays(tmp_path):
    for name in ("file.png", "folder"):
        left, held = tmp_path / f"{PREFIX}left-{name}", tmp_path / f"{PREFIX}held-{name}"
        for path in (left, held):
            path.mkdir() if name == "folder" else path.touch()
        handle = os.open(held, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert not left.exists()
        assert held.exists()
        os.close(handle)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / f"{PREFIX}left").touch()
    write_text(folder / "a.txt", "text")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    (folder / f"{PREFIX}not-yet-locked").touch()  # of another process, which began to write after this one has looked
    write_text(folder / "b.txt", "text")
    assert len(list(folder.iterdir())) == 3


def test_what_a_run_has_looked_through_is_not_looked_through_again_while_others_write(tmp_path):
    remove_leftovers(tmp_path)
    (tmp_path / f"{PREFIX}not-yet-locked").touch()
    write_text(tmp_path / "a.txt", "text")
    assert len(list(tmp_path.iterdir())) == 2


def test_files_and_folders_are_held_while_they_are_written(tmp_path):
    with folder_at_once(tmp_path / "new") as partial:
        (partial / "a").touch()
        remove_leftovers(tmp_path)
        assert partial.is_dir()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(FileExistsError), folder_at_once(tmp_path / "new"):
        pass


def test_folders_are_rid_of_leftovers_though_all_is_done(tmp_path, photo):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    photo.rename(tmp_path / "photos" / "a.png")
    command = ["encode", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    assert main(command) == 0
    (tmp_path / "out" / f"{PREFIX}x.safetensors").touch()
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.safetensors"]


def test_a_full_disk_costs_one_line_and_leaves_no_folder(tmp_path, capsys):
    official_metric_file(tiny_metric(), tmp_path / "a.pth")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # of 190,000 bytes
    try:
        code = main(["weights", "convert", str(tmp_path / "a.pth"), "-o", str(tmp_path / "out"), "--unofficial"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert re.match(r"milo-latent: Could not write the weights in .*: .*File too large", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_encoding_gives_the_same_bytes(tmp_path):
    metadata = {f"key {index}": str(index) for index in range(20)}
    for name in "abc":
        write_latents(tmp_path / f"{name}.safetensors", torch.ones(1, 4, 16, 16), metadata=metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read_latents_metadata(tmp_path / "a.safetensors") == metadata


def test_long_names_are_written(tmp_path):
    for suffix in (".npy", ".safetensors"):
        write_latents(tmp_path / ("n" * (255 - len(suffix)) + suffix), torch.zeros(1, 4, 16, 16))
    write_image(tmp_path / ("n" * 251 + ".png"), torch.rand(1, 3, 8, 8))
    assert len(list(tmp_path.iterdir())) == 3


def test_errors_and_warnings_start_on_lines_of_their_own(capsys):
    from tqdm.auto import tqdm

    def program():
        for index in tqdm(range(3), mininterval=0):
            if index:
                raise ValueError("no")

    assert run_program(program) == 1
    assert capsys.readouterr().err.split("\n")[-2:] == ["milo-latent: no", ""]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--upscale", "1e9"], "`upscale` above 0 and at most 64"), (["--device", "meta"], "a device that is there"),
        (["--device", "A" * 5000], "a device that is there"), (["--seed", "9" * 30], "seeds of 64 bits"),
        (["--model", "A" * 5000], "name too long"),
    ],
)  # fmt: skip
def test_options_beyond_all_bounds_are_refused(tmp_path, photo, capsys, arguments, match):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    command = ["restore", str(photo), "--model", str(tmp_path / "model"), "--device", "cpu", *arguments]
    assert main(command) == 1
    assert match in (text := capsys.readouterr().err)
    assert len(text) < 700


def test_bad_files_and_shared_names_cost_themselves_alone_in_a_table(tmp_path, capsys):
    tiny_metric().save_pretrained(tmp_path / "metric")
    for folder in ("ref", "dist"):
        (tmp_path / folder).mkdir()
        for index in range(20):
            side = 12 if folder == "dist" and index == 7 else 16
            write_latents(tmp_path / folder / f"{index:02}.npy", torch.randn(1, 4, side, 16))
    command = ["score", f"--ref={tmp_path / 'ref'}", f"--dist={tmp_path / 'dist'}", f"--weights={tmp_path / 'metric'}"]
    (tmp_path / "dist" / "03.npy").write_bytes(b"half")
    (tmp_path / "ref" / "05.npy").write_bytes(b"half")
    write_latents(tmp_path / "dist" / "09.safetensors", torch.randn(1, 4, 16, 16))
    assert main([*command, f"--csv={tmp_path / 't.csv'}"]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("milo-latent: ")]
    assert "16 pairs of" in lines[0]
    assert len(lines) == 6
    for name in ("dist/03.npy", "ref/05.npy", "dist/07.npy", "09.npy", "09.safetensors"):
        assert sum(name in line for line in lines) >= 1, name
    names = [line.split(",")[0].strip('"') for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    assert names == [f"{index:02}" for index in range(20) if index not in (3, 5, 7, 9)]
    assert "mean: error" in captured.out


def test_a_bad_reference_of_many_is_told_once(tmp_path, capsys):
    tiny_metric().save_pretrained(tmp_path / "metric")
    (tmp_path / "dist").mkdir()
    for name in "abc":
        write_latents(tmp_path / "dist" / f"{name}.npy", torch.randn(1, 4, 16, 16))
    (tmp_path / "ref.npy").write_bytes(b"half")
    command = ["score", f"--ref={tmp_path / 'ref.npy'}", f"--dist={tmp_path / 'dist'}"]
    assert main([*command, f"--weights={tmp_path / 'metric'}"]) == 1
    assert capsys.readouterr().err.count("ref.npy. Pickled") == 1


@pytest.mark.parametrize(
    "values",
    [
        {"ref_index": torch.tensor([0, 9])}, {"ref_index": torch.tensor([-1, 0])}, {"ref_index": torch.rand(2)},
        {"dmos": torch.rand(3)}, {"dmos": torch.rand(2, 2)}, {"dist_latents": torch.rand(1, 4, 8, 8)},
        {"dist_latents": torch.rand(2, 4, 8, 9)}, {"dist_latents": torch.rand(2, 4, 8, 8).double()},
        {"maps": torch.rand(2, 1, 8, 8)}, {"dmos": None},
    ],
)  # fmt: skip
def test_shards_whose_tensors_do_not_fit_are_refused(tmp_path, values):
    whole = {"dmos": torch.rand(2), "ref_index": torch.tensor([0, 0])}
    whole |= {"ref_latents": torch.rand(1, 4, 8, 8), "dist_latents": torch.rand(2, 4, 8, 8)}
    save_file(whole, tmp_path / "shard-00000.safetensors")
    damaged = {key: value for key, value in (whole | values).items() if value is not None}
    save_file(damaged, tmp_path / "shard-00001.safetensors")
    (tmp_path / "dataset.json").write_text('{"shards": 2}')
    with pytest.raises(ValueError, match=r"Expected (dmos|pairs of one size)"):
        PairSet(tmp_path, space="latents")


def test_tables_and_vocabularies_that_are_damaged_are_refused(tmp_path):
    for name, read in (("dmos.csv", lambda path: load_kadid10k(path.parent)), ("s.csv", read_setting_opinions)):
        (tmp_path / name).write_text("a,b,c\n" + "A" * 200_000 + ",1,2\n")  # the csv module allows 131,072 characters
        with pytest.raises(ValueError, match=rf"Expected .*{name}"):
            read(tmp_path / name)
    packed = bytearray(gzip.compress(b"#version\na b\n" * 1000))
    packed[20:40] = b"?" * 20
    (tmp_path / "vocabulary.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"vocabulary of byte pairs, got .*vocabulary\.gz"):
        open_tokenizer(tmp_path / "vocabulary.gz")


def test_a_damaged_checkpoint_of_a_run_is_named(fuzz, tmp_path):
    fuzz.train(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.partial").mkdir()
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    fuzz.train(copy, 6)
    assert not (copy / "checkpoint.partial").exists()
    for name in ("optimizer.bin", "loop.json", "model.safetensors", "random_states_0.pkl"):
        copy = shutil.copytree(tmp_path / "run", tmp_path / name)
        path = copy / "checkpoint-00000004" / name
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"Expected a complete checkpoint in .*checkpoint-00000004"):
            fuzz.train(copy, 6)
