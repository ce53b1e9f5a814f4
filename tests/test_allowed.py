"""Model folders that would run code are refused before anything in them is loaded, and nothing of them runs."""

import ast
import json
import sys

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from milo_latent.cli import main
from milo_latent.diffbir.residual_cleaner import ResidualCleaner
from milo_latent.latents.files import load_vae
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.restorer import load_restorer
from milo_latent.structure import open_network
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
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
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


def test_pickled_weights_are_never_opened(folder, photo, capfd):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(tiny_pipeline().unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=r"weights in safetensors in .*unet, got none"):
            DiffBIRPipeline.from_pretrained(folder, **options)
    assert main(["restore", str(photo), "--model", str(folder), "--device", "cpu"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_every_network_is_opened_by_what_checks_its_folder(repository):
    """`open_network` does, as do `from_pretrained` of MILO and of the pipeline; the other classes have no weights."""
    own = {"MILO", "DiffBIRPipeline", "CLIPTokenizer", "DDIMScheduler", "super()"}
    calls = []
    for path in (*repository.glob("milo_latent/**/*.py"), *repository.glob("pipelines/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if named and node.func.attr == "from_pretrained" and ast.unparse(node.func.value) not in own:
                calls.append((path.name, ast.unparse(node)))
    ((name, call),) = calls
    assert name == "structure.py"
    assert "use_safetensors=True" in call


NETWORKS = {"vae": AutoencoderTiny, "cleaner": ResidualCleaner, "metric": MILO}
OPENINGS = {
    "vae": [load_vae, lambda folder: open_network(AutoencoderTiny, folder)],
    "cleaner": [lambda folder: open_network(ResidualCleaner, folder)],
    "metric": [MILO.from_pretrained],
}


@pytest.mark.parametrize("part", NETWORKS)
def test_a_network_alone_is_opened_as_in_a_pipeline(folder, tmp_path, part):
    def refused(match):
        for opening in OPENINGS[part]:
            with pytest.raises(ValueError, match=match):
                opening(folder / part)

    def open_it():
        return [opening(folder / part) for opening in OPENINGS[part]]

    assert all(isinstance(each, NETWORKS[part]) for each in open_it())
    marker, code = tmp_path / "it ran", folder / part / "evil.py"
    code.write_text(CODE.format(marker=str(marker)))
    refused("without code, got .*evil")
    code.unlink()
    configuration = folder / part / "config.json"
    content = configuration.read_text()
    change(configuration, auto_map={"AutoModel": "evil--Evil"})
    refused(r"got the settings \['auto_map'\]")
    configuration.write_text(content)
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    first = next(iter(state))
    save_file({name: value for name, value in state.items() if name != first}, weights)
    refused(f"missing: {first}")
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()
    refused("safetensors")
    assert not marker.exists()


def test_a_network_is_of_the_class_that_was_asked_for(folder):
    with pytest.raises(ValueError, match=r"class ResidualCleaner in .*, got AutoencoderTiny"):
        open_network(ResidualCleaner, folder / "vae")
    change(folder / "vae" / "config.json", _class_name=["evil", "Evil"])
    with pytest.raises(ValueError, match=r"class AutoencoderTiny in .*, got \['evil', 'Evil'\]"):
        open_network(AutoencoderTiny, folder / "vae")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="Expected a JSON file"):
        open_network(AutoencoderTiny, folder / "vae")
