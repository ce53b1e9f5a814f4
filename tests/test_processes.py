"""Several processes share files: the results are those of one process, and what a killed one left is done later."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from milo_latent.cli import main
from milo_latent.files import write_image
from milo_latent.processes import gather, own_part, process_index, share, take_parts

PROGRAM = """
import json, os, signal, sys
from milo_latent.cli import main
from milo_latent.latents import files

encode, rank = files.encode_file, os.environ["RANK"]

def encode_or_die(vae, photo, *rest, **options):
    if rank == "1" and photo.stem == "5" and "DIE" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(vae, photo, *rest, **options)

files.encode_file = encode_or_die
sys.exit(max(main(command) for command in json.loads(sys.argv[1])))
"""


@pytest.fixture
def photos(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "photos").mkdir()
    for index in range(6):
        write_image(tmp_path / "photos" / f"{index}.png", torch.rand(1, 3, 136, 128))
    (tmp_path / "photos" / "1b.png").write_text("no image")
    return tmp_path / "photos"


def run_in_two(commands, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"OMP_NUM_THREADS": "1", **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(commands)],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    return [(*process.communicate(timeout=300), process.returncode) for process in processes]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_what_a_killed_one_left_is_done(
    photos, model_folder, tmp_path, capfd, set_threads
):
    set_threads(1)  # sums differ in their last bits with the number of threads

    def commands(name):
        latents, table = str(tmp_path / name), str(tmp_path / f"{name}.csv")
        return [
            ["encode", str(photos), "-o", latents, "--model", str(model_folder)],
            [
                "score", "--ref", str(tmp_path / "one" / "0.safetensors"), "--dist", str(tmp_path / "one"),
                "--csv", table, "--weights", str(model_folder),
            ],
        ]  # fmt: skip

    for command in commands("one"):
        main(command)
    capfd.readouterr()
    (out, errors, code), (silent, more_errors, other_code) = run_in_two(commands("two"))
    assert (code, other_code) == (1, 0), errors + more_errors  # for the damaged photo
    assert "6 photos of" in errors, errors
    assert errors.count("1b.png: Expected a complete image") == 1
    assert "mean: error" in out
    assert silent == ""
    assert "1b.png" not in more_errors
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()

    results = run_in_two(commands("killed")[:1], DIE="1")
    assert results[1][2] == -signal.SIGKILL
    made = contents(tmp_path / "killed")
    assert 2 < len(made) < 6
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in made}
    assert main(commands("killed")[0]) == 1
    assert f"{6 - len(made)} photos" in capfd.readouterr().err
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in made} == times
    assert not list(tmp_path.rglob("*.part-*"))


def test_a_process_alone_shares_nothing(tmp_path):
    assert share([1, 2, 3]) == ([1, 2, 3], 3)
    assert gather([1]) == [1]
    assert process_index() == 0
    assert own_part(tmp_path / "a") == tmp_path / "a"


def test_parts_are_taken_even_where_the_last_line_has_no_end(tmp_path):
    (tmp_path / "a[1].record").write_text("one\ntw")
    (tmp_path / "a[1].record.part-1").write_text("three\n")
    (tmp_path / "a1.record.part-1").write_text("of another\n")
    take_parts(tmp_path / "a[1].record")
    assert (tmp_path / "a[1].record").read_text() == "one\ntw\nthree\n"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a1.record.part-1", "a[1].record"]
