"""Model folders that would run code are refused before anything in them is loaded, and nothing of them runs."""

import ast
import json
import re
import sys

import pytest
import torch

from milo_latent.cli import main
from milo_latent.diffbir import loading
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restorer import load_restorer
from milo_latent.testing import tiny_metric, tiny_pipeline

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from diffusers import DiffusionPipeline, UNet2DConditionModel
class Evil(UNet2DConditionModel): pass
class DiffBIRPipeline(DiffusionPipeline): pass
"""
PLACEMENTS = {  # the file, and what the index names
    "beside the weights": ("unet/evil.py", {"unet": ["evil", "Evil"]}),
    "in the folder": ("evil.py", {"unet": ["evil", "Evil"]}),
    "by the name of a library": ("unet/diffusers.py", {}),
    "by the name of our module": ("controlnet/milo_latent.diffbir.ircontrolnet.py", {}),
    "in capitals": ("unet/diffusers.PY", {}),
    "as the pipeline": ("pipeline.py", {"_class_name": ["pipeline", "DiffBIRPipeline"]}),
    "as another pipeline": ("evil.py", {"_class_name": ["evil", "Evil"]}),
    "as no pipeline": ("None.py", {}),
    "as an optional component": ("background_cleaner/evil.py", {"background_cleaner": ["evil", "Evil"]}),
    "as an unknown component": ("safety_checker/evil.py", {"safety_checker": ["evil", "Evil"]}),
    "by a path": ("evil/evil.py", {"unet": ["../evil/evil", "Evil"]}),
    "importable": ("../importable_evil.py", {"unet": ["importable_evil", "Evil"]}),
    "importable, as an unknown component": ("../importable_evil.py", {"extra": ["importable_evil", "Evil"]}),
}


@pytest.fixture
def folder(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=tiny_metric())
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("on_hub", [False, True])
@pytest.mark.parametrize(("file", "named"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_code_in_a_folder_is_refused_and_never_run(folder, tmp_path, monkeypatch, file, named, on_hub):
    marker = tmp_path / "it ran"
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(CODE.format(marker=str(marker)))
    change(folder / "model_index.json", **named)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **_: str(folder))
    with pytest.raises(ValueError, match=r"Expected (a model without code|the pipeline|the (unet|extra) in)"):
        load_restorer("owner/name" if on_hub else folder, device="cpu")
    assert not marker.exists()
    assert "importable_evil" not in sys.modules


def test_the_command_refuses_code_in_one_line(folder, photo, tmp_path, capsys):
    (folder / "unet" / "evil.py").write_text(CODE.format(marker=str(tmp_path / "it ran")))
    change(folder / "model_index.json", unet=["evil", "Evil"])
    assert main(["restore", str(photo), "--model", str(folder), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        ["diffusers", "DiffusionPipeline"],  # which would open the component's folder as a pipeline of its own
        ["diffusers", "AutoencoderKL"],  # for another component
        ["transformers", "AutoModel"],
        ["stable_diffusion", "StableDiffusionSafetyChecker"],  # of diffusers' pipelines
        ["builtins", "exec"],
        ["os", "system"],
        ["diffusers", "UNet2DConditionModel", "more"],
        ["diffusers"],
        ["diffusers", None],
        [["diffusers"], "UNet2DConditionModel"],
        {"diffusers": "UNet2DConditionModel"},
        [],
    ],
)
def test_a_component_is_of_a_class_that_the_pipeline_takes(folder, value):
    change(folder / "model_index.json", unet=value)
    with pytest.raises(ValueError, match=r"Expected the unet in .* Nothing of it was run"):
        DiffBIRPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", [None, 3, "StableDiffusionPipeline", ["diffusers", "DiffBIRPipeline"]])
def test_the_folder_is_of_this_pipeline(folder, name):
    change(folder / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match="Expected the pipeline DiffBIRPipeline in"):
        DiffBIRPipeline.from_pretrained(folder)


@pytest.mark.parametrize("settings", [{"auto_map": {}}, {"nested": [{"attn_implementation": "owner/kernel"}]}])
def test_settings_that_fetch_code_are_refused_at_any_depth(folder, settings):
    change(folder / "unet" / "config.json", **settings)
    with pytest.raises(ValueError, match="without code, got the settings"):
        DiffBIRPipeline.from_pretrained(folder)
    change(folder / "unet" / "config.json", nested=[], auto_map=None)
    (folder / "unet" / "config.json").write_text('{"auto\\u005fmap": {}}')
    with pytest.raises(ValueError, match=r"got the settings \['auto_map'\]"):
        DiffBIRPipeline.from_pretrained(folder)


def test_pickled_weights_are_never_opened(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(tiny_pipeline().unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        DiffBIRPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="safetensors"):
        DiffBIRPipeline.from_pretrained(folder, use_safetensors=False)


def test_every_network_is_read_from_safetensors_only(repository):
    """Each call of `from_pretrained` says so, but those of classes that always do, or that have no weights."""
    own = {"MILO", "DiffBIRPipeline", "CLIPTokenizer", "DDIMScheduler"}
    calls = 0
    for path in (*repository.glob("milo_latent/**/*.py"), *repository.glob("pipelines/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                if node.func.attr == "from_pretrained" and of not in own:
                    calls += 1
                    assert {"use_safetensors", "**safe", "**kwargs"} & set(re.findall(r"[*\w]+", ast.unparse(node))), (
                        path
                    )
    assert calls >= 8
