"""A metric costs what torch costs, and is a component of diffusers' pipelines all the same."""

import copy
import json
import pickle
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from milo_latent import MILO
from milo_latent.metric.component import LISTS
from milo_latent.testing import latent_pair, tiny_metric

WEIGHTS = "diffusion_pytorch_model.safetensors"
ALONE = """
import sys, torch
import milo_latent
from milo_latent.metric import MILO, MILOLoss

metric = MILO.from_pretrained("milo-image")
ref = torch.rand(1, 3, 32, 32)
assert metric.compare(ref=ref, dist=1 - ref).error > 0
MILOLoss(metric)(ref.clone().requires_grad_(True), 1 - ref).backward()
print(sorted({"diffusers", "transformers", "accelerate", "huggingface_hub", "torch._dynamo"} & set(sys.modules)))

from diffusers import DiffusionPipeline

class Scorer(DiffusionPipeline):
    def __init__(self, metric):
        super().__init__()
        self.register_modules(metric=metric)

Scorer(metric).save_pretrained(sys.argv[1])
loaded = Scorer.from_pretrained(sys.argv[1]).metric
print(type(loaded) is milo_latent.MILO, torch.equal(loaded(ref=ref, dist=1 - ref), metric(ref=ref, dist=1 - ref)))
print([finder for finder in sys.meta_path if "milo_latent.metric" in type(finder).__module__])
"""


class Scorer(DiffusionPipeline):
    def __init__(self, metric):
        super().__init__()
        self.register_modules(metric=metric)


def test_a_metric_compares_without_diffusers_and_becomes_a_component_once_that_is_imported(tmp_path):
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines() == ["[]", "True True", "[]"], ran.stderr


def test_any_pipeline_saves_and_opens_a_metric_in_float32(tmp_path):
    metric = tiny_metric()
    Scorer(metric).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["metric"] == ["milo_latent.metric.network", "MILO"]
    loaded = Scorer.from_pretrained(tmp_path, torch_dtype=torch.float16).metric
    assert type(loaded) is MILO
    for own, other in zip(metric.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(own, other)
        assert other.dtype == torch.float32


def test_diffusers_still_has_the_lists_that_name_the_classes_of_components():
    assert sys.modules[LISTS].LOADABLE_CLASSES["milo_latent.metric.network"] == {
        "MILO": ["save_pretrained", "from_pretrained"]
    }
    assert issubclass(sys.modules["diffusers"].ModelMixin, torch.nn.Module)


def test_a_pipeline_moves_and_converts_its_metric():
    pipe = Scorer(tiny_metric())
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    pipe.to(torch.bfloat16)
    assert pipe.metric.dtype == torch.bfloat16
    assert pipe.metric.device == torch.device("cpu")


def test_opening_a_metric_draws_no_random_numbers_and_gives_float32(tmp_path):
    metric = tiny_metric().half()
    metric.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["scaler.0.weight"].dtype == torch.float16
    state = torch.get_rng_state()
    loaded = MILO.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training


def test_variants_and_shards_are_opened_and_another_variant_is_missing(tmp_path):
    metric = tiny_metric()
    ref, dist = latent_pair()
    expected = metric(ref=ref, dist=dist)
    metric.save_pretrained(tmp_path, variant="own")
    assert torch.equal(MILO.from_pretrained(tmp_path, variant="own")(ref=ref, dist=dist), expected)
    assert torch.equal(MILO.from_pretrained(tmp_path)(ref=ref, dist=dist), expected)  # the only one there is
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.fp16\.safetensors"):
        MILO.from_pretrained(tmp_path, variant="fp16")
    whole = load_file(tmp_path / "diffusion_pytorch_model.own.safetensors")
    (tmp_path / "diffusion_pytorch_model.own.safetensors").unlink()
    for part in range(2):
        names = sorted(whole)[part::2]
        save_file(
            {name: whole[name] for name in names},
            tmp_path / f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors",
        )
    assert torch.equal(MILO.from_pretrained(tmp_path)(ref=ref, dist=dist), expected)


def test_weights_and_settings_of_something_else_are_refused(tmp_path):
    tiny_metric().save_pretrained(tmp_path)
    weights, config = tmp_path / WEIGHTS, tmp_path / "config.json"
    before = load_file(weights)
    save_file({**before, "more": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="unexpected: more"):
        MILO.from_pretrained(tmp_path)
    save_file(before, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8]}))
    with pytest.raises(ValueError, match=r"Expected MILO weights.*block_out_channels"):
        MILO.from_pretrained(tmp_path)
    config.write_text(json.dumps({"channels": 4, "mask_channels": [1000000] * 4}))
    with pytest.raises(ValueError, match="Expected MILO weights"):  # before any memory is taken
        MILO.from_pretrained(tmp_path)


def test_settings_are_read_by_name_and_by_key():
    config = MILO(levels=2).config
    assert config.levels == config["levels"] == 2
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(AttributeError, match=r"one of the settings channels, levels.*got 'width'"):
        _ = config.width


def test_of_a_repository_on_the_hub_only_the_metric_is_fetched(tmp_path, monkeypatch):
    asked = []

    def fetch(name, *, allow_patterns, **options):
        asked.append((name, allow_patterns, options))
        return str(tmp_path)

    tiny_metric().save_pretrained(tmp_path / "metric")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    MILO.from_pretrained("someone/pipeline", revision="v1")
    MILO.from_pretrained("someone/pipeline", subfolder="metric", dtype=torch.float16)
    files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
    own = [f"metric/{file}" for file in files]
    assert asked == [("someone/pipeline", files + own, {"revision": "v1"}), ("someone/pipeline", own, {})]


def test_a_metric_is_pushed_as_it_is_saved(monkeypatch):
    asked = []

    class Hub:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, name, *, private, exist_ok):
            asked.append((name, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path):
            loaded = MILO.from_pretrained(folder_path)
            asked.append((repo_id, loaded.config.channels))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    tiny_metric().push_to_hub("me/metric", private=True)
    assert asked == [None, ("me/metric", True, True), ("me/metric", 4)]
