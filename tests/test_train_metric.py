"""Training a metric on a training set: recipe, exact resume after a kill, two processes, errors."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from milo_latent import MILO
from milo_latent.evaluation.agreement import pearson, spearman
from milo_latent.testing import tiny_metric
from milo_latent.training import train_metric
from milo_latent.training.data.shards import PairSet
from milo_latent.training.engine.loop import build_optimizer
from milo_latent.training.engine.recipe import Recipe, read_recipe
from milo_latent.training.engine.records import append_row, drop_rows_after, read_log
from milo_latent.training.engine.run import Run, RunConfig
from milo_latent.training.train_metric import OpinionLoss, draw_from, mirrored, new_metric, scale_map

PAIRS = 24
PER_PAIR = ("dist_latents", "ref_index", "dmos", "setting", "maps")  # entries of a shard


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Pairs of latents whose labels are their distance, in two shards, as `build_dataset` writes them."""
    from milo_latent.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("dataset")
    tiny_pipeline().vae.save_pretrained(folder / "vae")
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        ref = torch.randn(3, 4, 16, 16, generator=generator)
        index = torch.arange(PAIRS // 2) % 3
        amount = torch.rand(PAIRS // 2, 1, 1, 1, generator=generator)
        dist = ref[index] + amount * torch.randn(PAIRS // 2, 4, 16, 16, generator=generator)
        tensors = {"ref_latents": ref, "dist_latents": dist, "ref_index": index, "dmos": 0.8 * amount.flatten()}
        tensors |= {"setting": index + 1, "maps": 0.8 * amount.expand(-1, 1, 16, 16).contiguous()}
        save_file(tensors, folder / f"shard-{shard:05d}.safetensors")
    (folder / "config.json").write_text(f'{{"vae": "{folder / "vae"}"}}')
    (folder / "dataset.json").write_text('{"shards": 2}')
    return folder


def toml(value):
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def recipe_file(folder, **changes):
    fields = {"steps": 60, "batch_size": 4, "checkpoint_steps": 20, "warmup": 5, "learning_rate": 2e-3} | changes
    path = folder / "recipe.toml"
    path.write_text("".join(f"{name} = {toml(value)}\n" for name, value in fields.items()))
    return path


def command(dataset, output, recipe):
    return [
        *("--dataset", str(dataset), "--validation", str(dataset), "--output", str(output)),
        *("--recipe", str(recipe), "--latent-space", "test"),
    ]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_metric.main(command(dataset, folder / "run", recipe_file(folder)))
    return folder / "run"


def losses(run):
    return [(row["step"], row["loss"]) for row in read_log(run / "log.csv")]


def weights(run, name="metric"):
    return load_file(run / name / "diffusion_pytorch_model.safetensors")


def test_training_learns_and_keeps_best_and_last(dataset, whole):
    rows = read_log(whole / "validation.csv")
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["srcc"] > 0.9
    assert rows[-1]["plcc"] > 0.8
    best = MILO.from_pretrained(whole / "best")
    assert best.config.latent_space == "test"
    assert (whole / "metric").is_dir()
    assert [path.name for path in whole.glob("checkpoint*")] == ["checkpoint-00000060"]
    assert max(row["srcc"] for row in rows) == pytest.approx(
        train_metric.validation_figures(best, train_metric.PairSet(dataset, space="latents"))["srcc"]
    )


def test_a_killed_run_resumes_and_ends_identical(dataset, whole, tmp_path):
    arguments = command(dataset, tmp_path / "run", recipe_file(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "milo_latent.training.train_metric", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "run").glob("checkpoint-*"))
    train_metric.main(arguments)
    assert losses(tmp_path / "run") == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_two_processes_train_as_one(dataset, tmp_path):
    recipe = recipe_file(tmp_path, steps=3)  # Adam amplifies a last bit: some processors have 5e-4 after twenty
    launches = {"one": [], "two": ["torch.distributed.run", "--nproc-per-node", "2", "-m"]}
    for name, launch in launches.items():
        arguments = [*launch, "milo_latent.training.train_metric", *command(dataset, tmp_path / name, recipe)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums over more threads round differently, steps amplify
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    states = [len(list((tmp_path / name).glob("checkpoint-*/random_states_*.pkl"))) for name in launches]
    assert states == [1, 2]  # there were indeed two
    expected = weights(tmp_path / "one")
    for key, value in weights(tmp_path / "two").items():  # the same batches, the mean of two halves' gradients
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-6), key


def test_a_process_whose_clock_is_early_saves_when_another_s_is_late(tmp_path):
    means = iter([0.5, 0.0])  # one of two is late, then none
    fellow = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), reduce=lambda value, reduction: torch.tensor(next(means))
    )
    run = Run(fellow, RunConfig(output=tmp_path, steps=10, checkpoint_minutes=float("inf")))
    assert [run.is_checkpoint_due(5) for _ in range(2)] == [True, False]


def test_a_label_that_breaks_the_loss_stops_and_keeps_the_good_checkpoint(dataset, tmp_path, monkeypatch):
    arguments = command(dataset, tmp_path / "run", recipe_file(tmp_path, steps=40))
    draw = train_metric.PairSet.pairs

    def broken(pairs, indices):
        ref, dist, dmos = draw(pairs, indices)
        return ref, dist, dmos * (torch.nan if len(read_log(tmp_path / "run" / "validation.csv")) else 1.0)

    monkeypatch.setattr(train_metric.PairSet, "pairs", broken)
    with pytest.raises(FloatingPointError, match="last checkpoint is good"):
        train_metric.main(arguments)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000020"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", "best").values())


def test_a_run_with_soap_resumes_and_ends_identical(dataset, tmp_path):
    pytest.importorskip("pytorch_optimizer", reason="SOAP needs pytorch-optimizer")
    recipe = recipe_file(tmp_path, steps=40, optimizer="soap")
    train_metric.main(command(dataset, tmp_path / "whole", recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_metric, "fit", interrupted_at(30, train_metric.fit))
        with pytest.raises(KeyboardInterrupt):
            train_metric.main(command(dataset, tmp_path / "run", recipe))
    train_metric.main(command(dataset, tmp_path / "run", recipe))
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "run").items())


def interrupted_at(last, fit):
    """Return `fit` whose batch number `last` is never drawn."""

    def broken(module, draw, *arguments, **options):
        def interrupting(step, process_index):
            if step == last:
                raise KeyboardInterrupt
            return draw(step, process_index)

        return fit(module, interrupting, *arguments, **options)

    return broken


def test_an_undefined_correlation_is_never_the_best(tmp_path):
    for step, srcc in enumerate([float("nan"), 0.9, float("nan"), 0.1]):
        train_metric.keep_best(tiny_metric(seed=step), tmp_path, {"srcc": srcc})
        append_row(tmp_path / "validation.csv", {"step": step, "srcc": srcc})
    expected = tiny_metric(seed=1).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path, "best").items())
    assert train_metric.best_srcc(tmp_path) == 0.9


def test_a_run_goes_on_with_its_own_pairs_and_recipe_only(dataset, tmp_path):
    train_metric.main(command(dataset, tmp_path / "run", recipe_file(tmp_path, steps=20)))
    moved = shutil.copytree(dataset, tmp_path / "moved")
    train_metric.main(command(moved, tmp_path / "run", recipe_file(tmp_path, steps=22)))
    with pytest.raises(ValueError, match=r"mirror is False there and True here"):
        train_metric.main(command(dataset, tmp_path / "run", recipe_file(tmp_path, steps=24, mirror=True)))
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")  # written anew, the same
    train_metric.main(command(moved, tmp_path / "run", recipe_file(tmp_path, steps=23)))
    path = moved / "shard-00001.safetensors"
    tensors = load_file(path)
    save_file({key: value[:-1] if key in PER_PAIR else value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"data\.dataset is"):
        train_metric.main(command(moved, tmp_path / "run", recipe_file(tmp_path, steps=24)))


def test_maps_that_a_recipe_needs_must_be_there(dataset, tmp_path):
    plain = shutil.copytree(dataset, tmp_path / "plain")
    for path in plain.glob("shard-*"):
        save_file({key: value for key, value in load_file(path).items() if key != "maps"}, path)
    with pytest.raises(ValueError, match=r"maps in .*plain for map_weight 0.5. Build it with --map-teacher"):
        train_metric.main(command(plain, tmp_path / "run", recipe_file(tmp_path, map_weight=0.5)))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"'adamw', 'adamw-8bit', 'soap'.*got 'sgd'"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], Recipe(optimizer="sgd"))


def test_soap_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"milo_latent\[train\]"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], Recipe(optimizer="soap"))


def test_the_default_recipe_is_the_paper_s():
    recipe = read_recipe(None)
    assert recipe == Recipe()
    assert (recipe.batch_size, recipe.weight_decay, recipe.step_size) == (16, 1e-6, 1000)
    assert recipe.betas == (0.9, 0.999)
    assert recipe.schedule == "step"
    assert recipe.map_weight == 0.0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('schedule = "cosine"', "one of 'linear', 'step' as schedule"),
        ('steps = "100"', "a whole number of 1 or more as steps"),
        ("steps = 0", "a whole number of 1 or more as steps"),
        ("warmup = -1", "a whole number of 0 or more as warmup"),
        ("learning_rate = true", "a number of 0 or more as learning_rate"),
        ("map_weight = nan", "a number of 0 or more as map_weight"),
        ("betas = [0.9]", "two numbers as betas"),
        ("mirror = 1", "true or false as mirror"),
    ],
)
def test_values_that_a_recipe_cannot_have_are_refused(tmp_path, line, expected):
    path = tmp_path / "recipe.toml"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=f"Expected {expected} in .*recipe.toml"):
        read_recipe(path)


def test_recipes_are_read_and_unknown_fields_refused(tmp_path):
    path = recipe_file(tmp_path, map_weight=0.5)
    assert read_recipe(path).map_weight == 0.5
    assert read_recipe(recipe_file(tmp_path, optimizer="soap")).betas == (0.95, 0.95)
    path.write_text('optimizer = "soap"\nbetas = [0.9, 0.95]\n')
    assert read_recipe(path).betas == (0.9, 0.95)
    for name in ("epochs", "output"):
        path.write_text(f"{name} = 3\n")
        with pytest.raises(ValueError, match=name):
            read_recipe(path)
    path.write_text("steps = = 3\n")
    with pytest.raises(ValueError, match="TOML"):
        read_recipe(path)
    with pytest.raises(FileNotFoundError, match="recipe"):
        read_recipe(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="multiple of 3"):
        Recipe().start(tmp_path, 3, {})


def test_the_map_adds_to_the_loss(dataset):
    metric = new_metric(dataset, space="latents", latent_space=None)
    ref, dist = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    dmos, target = torch.zeros(2), torch.ones(2, 1, 16, 16)
    plain = OpinionLoss(metric)(ref, dist, dmos, target)
    assert OpinionLoss(metric, map_weight=1.0)(ref, dist, dmos, target) > plain
    assert plain.item() == pytest.approx(
        metric.error_map(ref=ref, dist=dist).mean(dim=(1, 2, 3)).square().mean().item()
    )


def test_maps_are_scaled_to_the_label_and_mirrors_are_eight():
    maps = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    scaled = scale_map(maps, torch.tensor([0.1, 0.02]))
    assert torch.allclose(scaled.mean(dim=(1, 2, 3)), torch.tensor([0.1, 0.02]), atol=1e-6)
    assert scale_map(maps, torch.tensor([0.9, 0.9])).max() <= 0.95
    seen = {mirrored(maps[:1], choice).numpy().tobytes() for choice in range(8)}
    assert len(seen) == 8


def test_both_sides_and_the_map_of_a_pair_are_mirrored_alike_by_the_recipe_s_seed():
    ref = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = SimpleNamespace(
        draw=lambda size, **options: torch.arange(2), pairs=lambda indices: (ref, ref + 1, indices), maps=ref[:, :1] + 2
    )
    drawn = {}
    for seed in (0, 1):
        draw = draw_from(pairs, Recipe(steps=9, seed=seed, mirror=True, map_weight=1.0), processes=1)
        batches = [draw(step, 0) for step in range(8)]
        for one, other, _, target in batches:
            assert torch.equal(one + 1, other)
            assert torch.equal(one[:, :1] + 2, target)
        drawn[seed] = torch.stack([batch[0] for batch in batches])
        assert len(drawn[seed].flatten(1).unique(dim=0)) > 2
    assert not torch.equal(drawn[0], drawn[1])
    plain = draw_from(pairs, Recipe(steps=9), processes=1)(3, 0)
    assert len(plain) == 3
    assert torch.equal(plain[0], ref)


def test_validation_compares_the_map_s_mean_of_ref_and_dist_with_the_labels(dataset, uneven_metric):
    pairs, metric = PairSet(dataset, space="latents"), uneven_metric
    ref, dist, dmos = pairs.pairs(torch.arange(len(pairs)))
    means, swapped = (
        metric.error_map(ref=one, dist=other).mean(dim=(1, 2, 3)) for one, other in ((ref, dist), (dist, ref))
    )
    expected = {"srcc": spearman(means, dmos), "plcc": pearson(means, dmos)}
    figures = train_metric.validation_figures(metric, pairs)
    assert figures == pytest.approx(expected, abs=2e-6)
    assert abs(figures["plcc"] - pearson(swapped, dmos)) > 1e-5


def test_seeds_give_other_weights_and_other_pairs_and_every_part_learns(dataset, whole, tmp_path):
    torch.manual_seed(0)
    start = new_metric(dataset, space="latents", latent_space=None).state_dict()
    for name, value in weights(whole).items():
        assert not torch.equal(value, start[name]), name
    starts = []
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        recipe = recipe_file(tmp_path / name, steps=1, seed=seed)
        train_metric.main(command(dataset, tmp_path / name / "run", recipe))
        starts.append((weights(tmp_path / name / "run"), losses(tmp_path / name / "run")))
    same = [torch.equal(value, starts[1][0][name]) for name, value in starts[0][0].items()]
    assert all(same)
    assert starts[0][1] == starts[1][1]
    first = "mask_finder.0.weight"
    assert not torch.allclose(starts[0][0][first], starts[2][0][first], atol=1e-2)
    pairs = PairSet(dataset, space="latents")
    for processes in (1, 2):
        for seed in (0, 1):
            draw = draw_from(pairs, Recipe(seed=seed, batch_size=4), processes=processes)
            for step, process in ((0, 0), (1, processes - 1)):
                share = {"process_index": process, "processes": processes}
                expected = pairs.pairs(pairs.draw(4, seed=seed, step=step, **share))
                assert all(map(torch.equal, draw(step, process), expected))
    drawn = [pairs.draw(8, seed=seed, step=0) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def test_logs_forget_what_came_after_the_checkpoint(tmp_path):
    log = tmp_path / "log.csv"
    for step in (50, 100, 150):
        append_row(log, {"step": step, "loss": 1 / step})
    drop_rows_after(log, 100)
    append_row(log, {"step": 150, "loss": 0.5})
    assert [row["loss"] for row in read_log(log)] == [0.02, 0.01, 0.5]
    log.write_text(log.read_text() + "20")  # a row that a kill cut off
    drop_rows_after(log, 100)
    assert [row["step"] for row in read_log(log)] == [50, 100]
