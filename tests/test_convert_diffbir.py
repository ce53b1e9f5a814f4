"""The conversion as a whole: a folder that the pipeline opens, complete or not there, and every refusal."""

import gzip
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from official_checkpoints import SWINIR, make_files, official_states
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from milo_latent import DiffBIRPipeline, load_restorer
from milo_latent.checkpoints import read_checkpoint
from milo_latent.cli import main
from milo_latent.convert.diffbir import convert_diffbir
from milo_latent.convert.tokenizer import VOCABULARY_SIZE, open_tokenizer
from milo_latent.diffbir.prompts import PROMPT_TOKENS, prompt_tokens, read_prompt_embeds, tokens_of
from milo_latent.diffbir.schedulers import official_scheduler
from milo_latent.diffbir.versions import NEGATIVE_PROMPT, VERSIONS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return convert_diffbir("v2.1", "sr", **tiny.convert_arguments(), output=tmp_path_factory.mktemp("out") / "sr")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A file as CLIP's list of merges, with merges of its own."""
    characters = sorted(ByteLevel.alphabet())
    pairs = itertools.islice(itertools.product(characters, characters), VOCABULARY_SIZE - 514)
    text = "\n".join(["a header", *(f"{first} {second}" for first, second in pairs), "left over", ""])
    path = tmp_path_factory.mktemp("vocabulary") / "bpe.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return path


def state_of(network):
    return {name: value.float() for name, value in network.state_dict().items()}


def test_the_folder_opens_and_holds_every_value(tiny, folder):
    pipeline = DiffBIRPipeline.from_pretrained(folder)
    for name, network in tiny.networks.items():
        converted, original = state_of(getattr(pipeline, name)), state_of(network)
        assert converted.keys() == original.keys(), name
        assert all(torch.equal(converted[key], original[key]) for key in original), name
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DiffBIRPipeline"
    assert "DiffBIR v2.1, task sr" in (folder / "README.md").read_text()


def test_a_converted_folder_is_restored_with_by_the_versions_own_settings(folder):
    restorer = load_restorer(folder, device="cpu")
    assert restorer.release is not None
    assert restorer.release.version is VERSIONS["v2.1"]
    assert restorer.release.task == "sr"
    assert restorer.scheduler.config.prediction_type == "v_prediction"
    assert type(restorer.scheduler).__name__ == "SolverScheduler"


@pytest.mark.parametrize(("name", "wrong"), [("release_version", "v9"), ("release_task", "colorize")])
def test_a_folder_that_tells_an_unknown_version_or_task_is_refused(folder, tmp_path, name, wrong):
    shutil.copytree(folder, tmp_path / "changed")
    index = json.loads((tmp_path / "changed" / "model_index.json").read_text()) | {name: wrong}
    (tmp_path / "changed" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=wrong):
        DiffBIRPipeline.from_pretrained(tmp_path / "changed")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_scheduler_is_the_versions(version):
    terms = {"prediction_type": VERSIONS[version].prediction_type, "rescale_betas_zero_snr": VERSIONS[version].zero_snr}
    scheduler = official_scheduler("spaced", **terms)
    assert scheduler.config.prediction_type == ("v_prediction" if version == "v2.1" else "epsilon")
    last = scheduler.alphas_cumprod[-1].item()
    assert last == 0.0 if version == "v2.1" else abs(last - 0.0046601) < 1e-6


def test_the_saved_scheduler_has_no_terminal_signal_for_v2_1(folder):
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.alphas_cumprod[-1].item() == 0.0
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.clip_sample is False


def test_the_folder_alone_samples_as_the_official_readme_does_in_a_process_of_its_own(folder):
    code = (
        "import sys; from milo_latent.pipelines.diffbir import DiffBIRPipeline\n"
        "scheduler = DiffBIRPipeline.from_pretrained(sys.argv[1]).scheduler\n"
        "print(type(scheduler).__name__, scheduler.config.solver)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SolverScheduler", "dpm++_3m_sde"]
    assert official_scheduler("spaced").config.timestep_spacing == "linspace"


def test_the_pipeline_restores_with_prompt_embeds(folder):
    pipeline = DiffBIRPipeline.from_pretrained(folder, cleaner=None)  # which would enlarge to 512 pixels
    pipeline.set_progress_bar_config(disable=True)
    image, embeds = torch.rand(1, 3, 64, 64), torch.randn(1, 77, 64)
    result = pipeline(
        image=image, prompt_embeds=embeds, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert result.shape[1] == 3
    assert torch.isfinite(result).all()


def test_half_precision_files_are_half_as_large(tiny, folder, tmp_path):
    half = convert_diffbir(
        "v2.1", "sr", **tiny.convert_arguments(), output=tmp_path / "half", dtype=torch.float16
    )  # fmt: skip
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (half / weights).stat().st_size < 0.52 * (folder / weights).stat().st_size
    assert {tensor.dtype for tensor in load_file(half / weights).values()} == {torch.float16}
    unet = DiffBIRPipeline.from_pretrained(half, dtype=torch.float32).unet.state_dict()
    assert all(
        torch.equal(value.half().float(), unet[key]) for key, value in tiny.networks["unet"].state_dict().items()
    )


def test_stable_diffusion_may_be_safetensors(tiny, folder, tmp_path):
    save_file(
        {key: value.clone() for key, value in read_checkpoint(tiny.files["sd"]).items()}, tmp_path / "sd.safetensors"
    )
    arguments = tiny.convert_arguments() | {"sd": tmp_path / "sd.safetensors"}
    again = convert_diffbir("v2.1", "sr", **arguments, output=tmp_path / "again")
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()


def test_the_background_cleaner_lies_beside(tiny, tmp_path):
    arguments = tiny.convert_arguments() | {"configs": {"cleaner": SWINIR, "background": SWINIR}}
    arguments["background"] = tiny.files["cleaner"]
    folder = convert_diffbir("v2.1", "unaligned_face", **arguments, output=tmp_path / "faces")
    assert type(load_restorer(folder, device="cpu").background_cleaner).__name__ == "SwinIR"
    with pytest.raises(ValueError, match="background"):
        convert_diffbir("v2.1", "sr", **arguments, output=tmp_path / "sr")


def test_without_a_tokenizer_the_default_prompts_are_there_encoded(tmp_path):
    tiny = make_files(tmp_path, vocabulary=VOCABULARY_SIZE)
    folder = convert_diffbir("v2", "face", **tiny.convert_arguments(), output=tmp_path / "out")
    embeds = read_prompt_embeds(folder)
    assert embeds.keys() == PROMPT_TOKENS.keys()
    with torch.no_grad():
        expected = tiny.networks["text_encoder"](prompt_tokens([NEGATIVE_PROMPT]))[0]
    assert torch.allclose(embeds[NEGATIVE_PROMPT], expected, atol=1e-5)
    assert embeds[NEGATIVE_PROMPT].shape == (1, 77, 64)


def test_tokens_of_default_prompts_begin_and_end_and_are_padded():
    tokens = prompt_tokens()
    assert tokens.shape == (len(PROMPT_TOKENS), 77)
    assert (tokens[:, 0] == 49406).all()
    assert (tokens == 49407).sum(dim=1).tolist() == [1] * len(PROMPT_TOKENS)
    assert (tokens[:, -1] == 0).all()
    # as CLIP's own tokenizer gave them (benchmarks/diffbir_parity.py)
    assert hashlib.sha256(repr(tokens.tolist()).encode()).hexdigest().startswith("c720738390c89054")


@pytest.mark.parametrize("wrong", [torch.zeros(77, 8, dtype=torch.int32), torch.zeros(1, 77, 8), torch.zeros(8)])
def test_stored_prompts_of_another_shape_or_dtype_are_refused(wrong, tmp_path):
    save_file({"a cat": wrong}, tmp_path / "prompt_embeds.safetensors")
    with pytest.raises(ValueError, match=r"Expected embeddings \(tokens, width\) in .*for 'a cat'"):
        read_prompt_embeds(tmp_path)


def test_folders_without_embeddings_give_none(folder):
    assert read_prompt_embeds(folder) == {}  # this text encoder has not CLIP's vocabulary


def test_a_vocabulary_file_makes_the_tokenizer(vocabulary, tmp_path):
    tokenizer = open_tokenizer(vocabulary)
    assert len(tokenizer) == VOCABULARY_SIZE
    padded = tokenizer("hi", padding="max_length", truncation=True).input_ids
    assert len(padded) == 77
    assert (padded[0], padded[-1], padded.count(VOCABULARY_SIZE - 1)) == (VOCABULARY_SIZE - 2, 0, 1)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert open_tokenizer(tmp_path)("hi there").input_ids == tokenizer("hi there").input_ids


def test_a_tokenizer_becomes_part_of_the_pipeline(tiny, vocabulary, tmp_path):
    arguments = tiny.convert_arguments() | {"tokenizer": vocabulary}
    folder = convert_diffbir("v2.1", "sr", **arguments, output=tmp_path / "out")
    assert DiffBIRPipeline.from_pretrained(folder).tokenizer.pad_token_id == 0


@pytest.mark.parametrize("content", [b"one line", b"\x1f\x8bbroken", b"\xff\xfe"])
def test_other_files_are_no_vocabulary(tmp_path, content):
    (tmp_path / "vocabulary.txt").write_bytes(content)
    with pytest.raises(ValueError, match="bpe_simple_vocab"):
        open_tokenizer(tmp_path / "vocabulary.txt")


def test_an_absent_tokenizer_is_named_with_the_ways_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompt_embeds"):
        open_tokenizer(tmp_path)


# Refusals


def refused(tiny, output, match, *, version="v2.1", task="sr", error=ValueError, **changed):
    """Convert with changed arguments; nothing may be left behind."""
    with pytest.raises(error, match=match):
        convert_diffbir(version, task, **(tiny.convert_arguments() | changed), output=output / "out")
    assert not [path for path in output.iterdir() if path.is_dir()]


def test_files_in_each_others_place_are_told_apart(tiny, tmp_path):
    files = tiny.files
    refused(tiny, tmp_path, "Stable Diffusion.*`sd`.*of IRControlNet", sd=files["controlnet"])
    refused(tiny, tmp_path, "IRControlNet.*`controlnet`.*of Stable Diffusion", controlnet=files["sd"])
    refused(tiny, tmp_path, "SwinIR.*`cleaner`.*of IRControlNet", cleaner=files["controlnet"])


def test_a_cleaner_of_another_architecture_is_refused(tiny, tmp_path):
    refused(tiny, tmp_path, "BSRNet.*`cleaner`.*of SwinIR", version="v2", task="sr")
    refused(tiny, tmp_path, "SCUNet.*`cleaner`.*of SwinIR", version="v2", task="denoise")


def test_unknown_files_are_refused(tiny, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    refused(tiny, tmp_path, r"other keys \(weight\)", sd=tmp_path / "other.pth")


def test_official_names_of_other_versions_are_refused(tiny, tmp_path):
    eps = tmp_path / "v2-1_512-ema-pruned.ckpt"
    eps.symlink_to(tiny.files["sd"])
    refused(tiny, tmp_path, r"sd2\.1-base-zsnr.*by its name the official file of sd_v2\.1", sd=eps)
    old = tmp_path / "v2.pth"
    old.symlink_to(tiny.files["controlnet"])
    refused(tiny, tmp_path, r"DiffBIR_v2\.1\.pt.*official file of v2\.", controlnet=old)


def test_a_schedule_without_terminal_signal_is_refused_for_v1_and_v2(tiny, tmp_path):
    state = read_checkpoint(tiny.files["sd"]) | {"alphas_cumprod": torch.linspace(1, 0, 1000)}
    torch.save(state, tmp_path / "sd.ckpt")
    refused(tiny, tmp_path, "v2-1_512-ema-pruned", version="v2", task="face", sd=tmp_path / "sd.ckpt")


def test_versions_without_the_task_are_refused(tiny, tmp_path):
    refused(tiny, tmp_path, "unaligned_face", version="v1", task="unaligned_face")


def test_missing_files_are_named(tiny, tmp_path):
    refused(tiny, tmp_path, r"absent\.ckpt", sd=tmp_path / "absent.ckpt", error=FileNotFoundError)


def test_half_a_download_is_told_as_such(tiny, tmp_path):
    content = tiny.files["sd"].read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    refused(tiny, tmp_path, "in part .* Fetch it again", sd=tmp_path / "half.ckpt")
    (tmp_path / "page.ckpt").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    refused(tiny, tmp_path, "web page", sd=tmp_path / "page.ckpt")


def test_missing_keys_are_listed_with_their_file(tiny, tmp_path):
    state = read_checkpoint(tiny.files["sd"])
    del state["first_stage_model.decoder.conv_out.bias"]
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    refused(tiny, tmp_path, r"VAE in .*sd\.ckpt.*1 missing \(decoder\.conv_out\.bias\)", sd=tmp_path / "sd.ckpt")


def test_keys_beside_the_networks_are_refused_unless_they_are_named(tiny, tmp_path):
    state = read_checkpoint(tiny.files["sd"]) | {"extra.thing": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save(state, tmp_path / "sd.ckpt")
    refused(tiny, tmp_path, r"1 unknown \(extra\.thing\).*--ignore", sd=tmp_path / "sd.ckpt")
    refused(
        tiny, tmp_path, r"regular expressions to ignore, got '\*\.thing'", sd=tmp_path / "sd.ckpt", ignore=["*.thing"]
    )
    arguments = tiny.convert_arguments() | {"sd": tmp_path / "sd.ckpt", "ignore": [r"extra\..*"]}
    assert convert_diffbir("v2.1", "sr", **arguments, output=tmp_path / "out").is_dir()


def test_networks_that_do_not_fit_each_other_are_refused(tiny, tmp_path):
    state = official_states(tiny.networks)["controlnet"]
    for key in state:
        if "attn2.to_k" in key or "attn2.to_v" in key:
            state[key] = torch.zeros(state[key].shape[0], 32)
    torch.save(state, tmp_path / "controlnet.pth")
    refused(tiny, tmp_path, "cross_attention_dim 64 .* and 32", controlnet=tmp_path / "controlnet.pth")


def test_what_is_in_the_folder_already_is_left_alone(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something"):
        convert_diffbir("v2.1", "sr", **tiny.convert_arguments(), output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


class ModelCheckpoint:
    """As training programs leave in a checkpoint; loading it would be noticed."""

    def __setstate__(self, state):
        raise AssertionError("the checkpoint's own code ran")


def test_objects_of_training_programs_are_passed_over_and_never_made(tmp_path, monkeypatch):
    module = type(pickle)("pytorch_lightning")
    module.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setattr(ModelCheckpoint, "__module__", "pytorch_lightning")
    monkeypatch.setitem(__import__("sys").modules, "pytorch_lightning", module)
    callback = ModelCheckpoint()
    callback.best = 3
    weight = torch.arange(3.0)
    torch.save({"state_dict": {"weight": weight}, "callbacks": {ModelCheckpoint: callback}}, tmp_path / "a.ckpt")
    monkeypatch.delitem(__import__("sys").modules, "pytorch_lightning")
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["weight"], weight)


class Harmful:
    def __reduce__(self):
        return (print, ("the checkpoint's own code ran",))


def test_code_in_a_checkpoint_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "other": Harmful()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert capsys.readouterr().out == ""


def test_the_old_format_of_checkpoints_is_read(tmp_path):
    torch.save({"module.weight": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert torch.equal(read_checkpoint(tmp_path / "old.pth")["weight"], torch.ones(2))


def test_the_command_refuses_in_a_line_and_writes_nothing(tiny, tmp_path, capsys):
    arguments = ["convert", "diffbir", "--version", "v2", "--task", "sr", "-o", str(tmp_path / "out")]
    for option, path in tiny.files.items():
        arguments += [f"--{option}", str(path)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "BSRNet" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_exclamation_mark_is_a_word_not_padding(vocabulary, tmp_path):
    open_tokenizer(vocabulary, length=12).save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path, length=12)
    assert tokenizer("a !").input_ids == [49406, 320, 0, 49407]  # what there is to put right
    ends = [49406, *[256 + index for index in (64, 0)], 49407]
    assert tokens_of(["a !", "a"], tokenizer).tolist() == [ends + [0] * 8, [49406, 320, 49407] + [0] * 9]
    assert tokens_of(["! " * 30], tokenizer).tolist() == [[49406, *[256] * 10, 49407]]


def test_prompts_have_the_tokens_of_the_official_code(tmp_path):
    """Those of CLIP's own tokenizer, for the vocabulary in DiffBIR's code; MILO_LATENT_DIFFBIR says where that is."""
    path = Path(os.environ.get("MILO_LATENT_DIFFBIR", "")) / "diffbir/model/open_clip/bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        pytest.skip("needs DiffBIR's code, in the folder that MILO_LATENT_DIFFBIR names")
    open_tokenizer(path).save_pretrained(tmp_path)
    for text, words in (("hello! wow!!! great !", [3306, 256, 2781, 995, 830, 256]), ("a cat", [320, 2368])):
        expected = [49406, *words, 49407]
        assert tokens_of([text], open_tokenizer(tmp_path)).tolist() == [expected + [0] * (77 - len(expected))]


def test_a_file_that_would_run_code_is_refused_without_advice_to_run_it(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weights": SWINIR.get, "text": Path(".")}, path)
    with pytest.raises(ValueError, match="other objects than tensors") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_checkpoint(tmp_path)
