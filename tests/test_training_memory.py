"""The memory that a training run plans is the memory that it uses."""

import pytest
import torch
from torch import nn

from milo_latent.training import train_restorer
from milo_latent.training.engine.loop import build_optimizer
from milo_latent.training.engine.memory import memory_plan, optimizer_memory, peak_memory
from milo_latent.training.engine.run import RunConfig

CASES = {
    "controlnet": (),
    "checkpointing": ("--train", "all", "--gradient-checkpointing"),
    "average": ("--train", "all", "--ema-decay", "0.9"),
    "lora": ("--train", "lora", "--rank", "2"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cached", [(), ("--cache-latents", "1")])
def test_a_tiny_run_uses_what_it_plans(case, cached, model_folder, images, tmp_path, monkeypatch, capfd):
    """With cached latents the networks that are trained take most of it, and otherwise the encoder does."""
    plans, peaks, fit = [], [], train_restorer.fit

    def plan(*arguments, **options):
        plans.append(memory_plan(*arguments, **options))
        return plans[-1]

    def measure(*arguments, **options):
        modules = []
        peaks.append(peak_memory(lambda: modules.append(fit(*arguments, **options)), torch.device("cpu")))
        return modules[0]

    monkeypatch.setattr(train_restorer, "memory_plan", plan)
    monkeypatch.setattr(train_restorer, "fit", measure)
    command = ["--model", str(model_folder), "--images", str(images), "--output", str(tmp_path / "run"), "--steps", "3"]
    command += ["--batch-size", "2", "--crop-size", "128", "--precision", "no"]
    train_restorer.main([*command, *cached, *CASES[case]])
    [plan], [peak] = plans, peaks
    assert plan.total == pytest.approx(plan.parameters + peak, rel=0.15)
    assert "profiler" not in capfd.readouterr().err  # which would announce itself


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_the_memory_of_an_optimizer_is_what_it_keeps(optimizer, tmp_path):
    if optimizer == "soap":
        pytest.importorskip("pytorch_optimizer")
    module = nn.Sequential(nn.Conv2d(6, 10, 3), nn.Conv2d(10, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    config = RunConfig(tmp_path, 1, optimizer=optimizer)
    built = build_optimizer(module.parameters(), config)
    for _ in range(2):
        module(torch.randn(2, 6, 3, 3)).sum().backward()
        built.step()

    def size(state):
        if isinstance(state, torch.Tensor):
            return state.nbytes if state.ndim else 0  # a step's number is none of its business
        return sum(map(size, state)) if isinstance(state, list) else 0

    kept = sum(size(value) for state in built.state.values() for value in state.values())
    assert optimizer_memory(list(module.parameters()), config) == kept
