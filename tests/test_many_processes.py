"""Runs of several processes, and runs that are killed, end as one process that nobody disturbs."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from milo_latent.training import train_restorer
from milo_latent.training.engine.loop import fit
from milo_latent.training.engine.run import RunConfig, deepspeed_settings

PROGRAM = """
import json, sys
from milo_latent.training import train_restorer
for command in json.loads(sys.argv[1]):
    train_restorer.main(command)
"""
# accelerate offers FSDP on accelerators alone; here its state is told otherwise.
ON_CPUS = """
from accelerate import state
from accelerate.utils import DistributedType

start = state.AcceleratorState.__init__

def start_with_fsdp(self, *arguments, fsdp_plugin=None, **options):
    start(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

state.AcceleratorState.__init__ = start_with_fsdp
"""
# a training process that nothing can warn
KILLED_BETWEEN_CHECKPOINTS = """
import os, signal
from milo_latent.training.data.restoration_pairs import BatchReader

read = BatchReader.__call__

def read_or_die(reader, step, process_index=0):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(reader, step, process_index)

BatchReader.__call__ = read_or_die
"""
KILLED_WHILE_SAVING = """
import os, signal
from milo_latent.training.engine import run

write = run.write_text

def write_or_die(path, text):
    if path.name == "loop.json" and os.path.isdir(path.parent.parent / "checkpoint-00000002"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)

run.write_text = write_or_die
"""


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    """Compute on one thread, as `start` does, since sums differ in their last bits with the number of threads."""
    set_threads(1)


@pytest.fixture
def command(model_folder, images, tmp_path):
    """Return the arguments of a run."""

    def arguments(output, *more):
        given = ["--model", model_folder, "--images", images, "--output", tmp_path / output, "--crop-size", 128]
        given += ["--precision", "no", "--warmup", 1, "--decay", 0]
        return [str(each) for each in [*given, *more]]

    return arguments


def start(program, commands, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(commands)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_in_two(program, commands, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [start(program, commands, **environment, **place, **rank) for rank in ranks]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]


def weights(output):
    return {
        f"{part}.{key}": value
        for part in ("unet", "controlnet")
        for path in (output / "pipeline" / part).glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def difference(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def test_two_processes_equal_one_at_the_same_global_batch(command, tmp_path):
    objectives = {
        "standard": ("--train", "all"),
        "milo": ("--train", "all", "--objective", "linear", "--noise-levels", 2),
    }
    two, one = ("--batch-size", 1, "--accumulation", 2, "--steps", 3), ("--batch-size", 4, "--steps", 3)
    cached = ("--cache-latents", 4, "--workers", 1)  # shared among the processes
    commands = [command(f"two-{name}", *options, *two) for name, options in objectives.items()]
    commands[1] += map(str, cached)
    run_in_two(PROGRAM, commands)
    for name, options in objectives.items():
        train_restorer.main(command(f"one-{name}", *options, *one))
        assert difference(tmp_path / f"one-{name}", tmp_path / f"two-{name}") < 1e-5
    assert difference(tmp_path / "one-milo", tmp_path / "one-standard") > 1e-4  # the bound means something


def test_killed_runs_resume_to_the_same_bits(command, tmp_path):
    options = ("--train", "all", "--objective", "cosine", "--ema-decay", 0.9, "--batch-size", 2)
    options += ("--steps", 6, "--checkpoint-steps", 2)
    workers = {"between": ("--workers", 2), "saving": ()}
    dying = {"between": KILLED_BETWEEN_CHECKPOINTS, "saving": KILLED_WHILE_SAVING}
    processes = {name: start(code + PROGRAM, [command(name, *options, *workers[name])]) for name, code in dying.items()}
    train_restorer.main(command("whole", *options))
    for name, last in (("between", 4), ("saving", 2)):
        errors = processes[name].communicate()[1]
        assert processes[name].returncode == -signal.SIGKILL, errors[-2000:]
        assert [path.name for path in (tmp_path / name).glob("checkpoint-*")] == [f"checkpoint-{last:08d}"]
        train_restorer.main(command(name, *options, *workers[name]))
        starts = json.loads((tmp_path / name / "run.json").read_text())["starts"]
        assert [each["step"] for each in starts] == [0, last]
        assert difference(tmp_path / name, tmp_path / "whole") == 0.0


def launched(repository, name, *more):
    """Return the arguments that accelerate's own parser makes of a recipe."""
    parser = launch_command_parser()
    file = repository / "recipes" / "accelerate" / f"{name}.yaml"
    given = ["--config_file", str(file), "--num_processes", "2", *more, "script.py"]
    arguments, _, _ = _validate_launch_command(parser.parse_args(given))
    known = vars(parser.parse_args(["script.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        unknown = set(yaml.safe_load(file.read_text()).get(section, {})) - set(known)
        assert not unknown, f"accelerate does not know {unknown} in {file}"
    return arguments


def test_accelerate_reads_the_recipes(repository):
    assert launched(repository, "ddp").multi_gpu
    assert launched(repository, "fsdp").use_fsdp
    deepspeed = launched(repository, "deepspeed")
    assert deepspeed.use_deepspeed
    deepspeed.deepspeed_fields_from_accelerate_config = ""  # as its launcher sets, for DeepSpeed's own files
    environment = prepare_deepspeed_cmd_env(deepspeed)[1]
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment  # the run's counts


def test_deepspeed_is_told_what_the_run_says():
    settings = deepspeed_settings(RunConfig(Path(), 1, batch_size=3, max_grad_norm=0.5, precision="bf16"))
    assert settings == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.5,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    }
    assert deepspeed_settings(RunConfig(Path(), 1, precision="no"))["torch_autocast"] == {"enabled": False}


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="FSDP2 on CPUs needs a newer torch")
def test_split_weights_train_resume_and_are_saved_whole(command, repository, tmp_path):
    more = ("--fsdp_transformer_layer_cls_to_wrap", "ResnetBlock2D")  # the tiny pipeline does not attend
    arguments = launched(repository, "fsdp", *more)
    environment = {
        key: value
        for key, value in prepare_multi_gpu_env(arguments).items()
        if key.startswith(("ACCELERATE_", "FSDP_"))
    }
    assert environment["FSDP_VERSION"] == "2"
    options = ("--train", "all", "--batch-size", 1, "--accumulation", 2, "--checkpoint-steps", 2)
    parts = [command("split", *options, "--steps", steps) for steps in (2, 3)]
    run_in_two(ON_CPUS + PROGRAM, parts, **environment)
    train_restorer.main(command("whole", "--train", "all", "--batch-size", 4, "--steps", 3))
    assert difference(tmp_path / "whole", tmp_path / "split") < 1e-5
    assert not (tmp_path / "split" / "checkpoint-00000003" / "model.safetensors").exists()  # it was split indeed


@pytest.mark.slow
def test_deepspeed_trains_resumes_and_saves_whole(command, repository, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    arguments = launched(repository, "deepspeed")
    arguments.deepspeed_fields_from_accelerate_config = ""
    environment = {
        key: value for key, value in prepare_deepspeed_cmd_env(arguments)[1].items() if key.startswith("ACCELERATE_")
    }
    options = ("--train", "all", "--batch-size", 1, "--accumulation", 2, "--checkpoint-steps", 2)
    parts = [command("split", *options, "--steps", steps) for steps in (2, 3)]
    run_in_two(PROGRAM, parts, **environment, DS_ACCELERATOR="cpu")
    train_restorer.main(command("whole", "--train", "all", "--batch-size", 4, "--steps", 3))
    assert difference(tmp_path / "whole", tmp_path / "split") < 1e-5
    assert list((tmp_path / "split" / "checkpoint-00000003").rglob("*zero_pp_rank_1*"))  # moments were split indeed


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_split_weights_cannot_do_is_refused(flag, monkeypatch, tmp_path):
    monkeypatch.setenv(flag, "true")
    module = torch.nn.Linear(1, 1)

    def train(reopen=lambda: module, validate=None, **options):
        fit(module, lambda *_: (), RunConfig(tmp_path, 1, **options), reopen=reopen, validate=validate)

    with pytest.raises(ValueError, match=r"Expected no this command with FSDP"):
        train(reopen=None)
    with pytest.raises(
        ValueError, match=r"no --validation and no --ema-decay and no --optimizer soap with .*ddp\.yaml"
    ):
        train(validate=lambda _: {}, ema_decay=0.9, optimizer="soap")
