"""The training engine: batches that make a step, the average of the weights, kept checkpoints, planned memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from milo_latent.training.engine.loop import RunConfig, build_optimizer, fit
from milo_latent.training.engine.memory import memory_plan, peak_memory
from milo_latent.training.engine.records import read_log
from milo_latent.training.engine.run import LOG_EVERY, default_precision


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)

    def forward(self, point, value):
        return (self.layer(point)[:, 0] - value).square().mean()


def draw_points(number, process_index, count=2):
    rng = np.random.default_rng((3, number, process_index))
    point = torch.from_numpy(rng.standard_normal((count, 3), dtype="float32"))
    return point, point.sum(dim=1)


def train(folder, steps, *, draw=draw_points, **options):
    module = Line()
    options = {"precision": "no", "warmup": 1, "learning_rate": 0.05, "checkpoint_steps": 100} | options
    fit(module, draw, RunConfig(folder, steps, **options))
    return module.layer.weight.detach().clone()


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    def draw_twice(step, process_index):
        halves = [draw_points(number, process_index) for number in (2 * step, 2 * step + 1)]
        return tuple(torch.cat(parts) for parts in zip(*halves, strict=True))

    accumulated = train(tmp_path / "accumulated", 5, accumulation=2)
    torch.testing.assert_close(accumulated, train(tmp_path / "large", 5, draw=draw_twice), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(accumulated, train(tmp_path / "small", 5), atol=1e-4)


def test_the_loss_of_accumulated_batches_is_their_mean(tmp_path):
    train(
        tmp_path,
        LOG_EVERY,
        draw=lambda number, _: (torch.zeros(1, 3), torch.ones(1)),
        accumulation=4,
        learning_rate=0.0,
    )
    (row,) = read_log(tmp_path / "log.csv")
    assert row["loss"] == pytest.approx(1.0)


def test_each_step_has_the_learning_rate_of_the_schedule(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def note(optimizer, *args, **kwargs):
        rates.extend(group["lr"] for group in optimizer.param_groups)
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    train(tmp_path, 8, warmup=2, decay=0.5, learning_rate=0.4)
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_the_optimizer_has_the_settings_of_the_run(tmp_path):
    settings = {"learning_rate": 0.3, "betas": (0.8, 0.7), "weight_decay": 0.2}
    optimizer = build_optimizer(Line().parameters(), RunConfig(tmp_path, 1, **settings))
    assert type(optimizer) is torch.optim.AdamW
    found = {name: optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")}
    assert tuple(found.values()) == tuple(settings.values())


def test_the_moving_average_is_validated_and_returned_and_training_goes_on_from_the_weights(tmp_path):
    seen = []

    def validate(module):
        seen.append(module.layer.weight.detach().clone())
        return {"first": seen[-1][0, 0].item()}

    module = Line()
    config = RunConfig(
        tmp_path / "run", 4, precision="no", warmup=1, learning_rate=0.05, checkpoint_steps=2, ema_decay=0.9
    )
    fit(module, draw_points, config, validate=validate)
    plain = train(tmp_path / "plain", 4)
    assert len(seen) == 2
    assert torch.equal(module.layer.weight.detach(), seen[1])
    start, average = torch.full((1, 3), 0.5), seen[1]
    assert ((average - start).abs() < (plain - start).abs()).all()  # the average lags behind the weights


def test_an_interrupted_run_resumes_with_its_moving_average(tmp_path):
    def interrupted(number, process_index):
        if number == 5:
            raise KeyboardInterrupt
        return draw_points(number, process_index)

    options = {"ema_decay": 0.8, "checkpoint_steps": 2}
    whole = train(tmp_path / "whole", 8, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 8, draw=interrupted, **options)
    assert torch.equal(train(tmp_path / "parts", 8, **options), whole)
    assert not torch.equal(train(tmp_path / "plain", 8, checkpoint_steps=2), whole)


def test_the_last_checkpoints_are_kept(tmp_path):
    train(tmp_path / "run", 8, checkpoint_steps=2, checkpoint_limit=3)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint*"))
    assert kept == ["checkpoint-00000004", "checkpoint-00000006", "checkpoint-00000008"]


class Constant(nn.Module):
    """Its loss does not depend on the parameter, so that only weight decay changes it."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, point, value):
        return (0.0 * self.value).sum() + value.sum()


def test_weights_decay_by_the_share_of_the_recipe(tmp_path):
    options = {"precision": "no", "warmup": 1, "learning_rate": 0.1, "decay": 0.0, "checkpoint_steps": 100}
    module = Constant()
    fit(module, draw_points, RunConfig(tmp_path / "run", 3, weight_decay=0.5, **options))
    assert module.value.tolist() == pytest.approx([2.0 * (1 - 0.1 * 0.5) ** 3] * 3)


def test_gradients_are_clipped_to_the_norm_of_the_recipe(tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def note(optimizer, *args, **kwargs):
        gradients = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        norms.append(torch.cat([each.flatten() for each in gradients]).norm().item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    for limit in (0.01, 1e6):
        train(tmp_path / str(limit), 3, max_grad_norm=limit)
    assert norms[:3] == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(norm > 0.05 for norm in norms[3:])


def test_an_optimizer_that_is_not_installed_is_refused_in_one_line():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r'bitsandbytes.*pip install "milo_latent\[bitsandbytes\]"'):
            build_optimizer(Line().parameters(), RunConfig(Path(), 1, optimizer="adamw-8bit"))


def test_memory_is_planned_as_it_is_used(tmp_path):
    module = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 1))

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = module

        def forward(self, batch):
            return self.network(batch).mean()

    loss, batch = Mean(), (torch.randn(1024, 512),)
    plan = memory_plan(loss, batch, RunConfig(tmp_path, 1, precision="no"))
    count = sum(parameter.numel() for parameter in loss.parameters())
    assert (plan.parameters, plan.gradients, plan.optimizer) == (4 * count, 4 * count, 8 * count)
    optimizer = torch.optim.AdamW(loss.parameters())

    def steps():
        for _ in range(3):
            loss(*batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    used = peak_memory(steps, torch.device("cpu")) + 4 * count
    assert abs(plan.total - used) < 0.15 * used
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert "total" in str(plan)
    assert "--gradient-checkpointing" in str(plan)


@pytest.mark.parametrize(
    ("capability", "accelerator", "expected"),
    [("AVX512", False, "bf16"), ("AVX2", False, "no"), ("AVX2", True, "bf16"), ("DEFAULT", False, "no")],
)
def test_bfloat16_is_the_default_only_where_it_is_fast(monkeypatch, capability, accelerator, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert default_precision() == expected
