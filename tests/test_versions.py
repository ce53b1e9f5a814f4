"""The table of versions says what the official program says."""

import pytest
from golden import table

from milo_latent.diffbir.versions import COMMAND_LINE, FILES, UPSCALE, VERSIONS, version_of


@pytest.fixture(scope="module")
def facts():
    return table("official_facts")


def test_addresses_are_the_official_ones(facts):
    """But for Stable Diffusion 2.1, whose own repository was taken down; the mirror has the same name."""
    found = {name: file.url.replace("/sd2-community/", "/stabilityai/") for name, file in FILES.items()}
    assert found == facts["checkpoints"]


def test_the_command_lines_defaults_are_the_official_ones(facts):
    options = facts["command_line"]
    renamed = {
        "prompt": "pos_prompt", "negative_prompt": "neg_prompt", "num_inference_steps": "steps",
        "guidance_scale": "cfg_scale", "controlnet_conditioning_scale": "strength", "start_point": "start_point_type",
    }  # fmt: skip
    for name, value in vars(COMMAND_LINE).items():
        assert value == options[renamed.get(name, name)]["default"], name
    assert UPSCALE["sr"] == options["upscale"]["default"]
    assert set(UPSCALE) == set(options["task"]["choices"])


def test_every_named_checkpoint_is_a_file_of_its_kind():
    for version in VERSIONS.values():
        assert FILES[version.sd].cleaner is None
        for checkpoints in version.tasks.values():
            assert FILES[checkpoints.controlnet].cleaner is None
            assert checkpoints.cleaner_kind == FILES[checkpoints.cleaner].cleaner
            assert checkpoints.background is None or FILES[checkpoints.background].cleaner is not None
    assert {file.file for file in FILES.values()} >= {"DiffBIR_v2.1.pt", "v2.pth", "face_swinir_v1.ckpt"}


def test_only_v2_1_predicts_v_and_ends_without_signal():
    for name, version in VERSIONS.items():
        assert (version.prediction_type == "v_prediction") == version.zero_snr == (name == "v2.1")


def test_cleaners_are_those_of_the_official_table():
    kinds = {(name, task): row.cleaner_kind for name, v in VERSIONS.items() for task, row in v.tasks.items()}
    assert kinds[("v2", "sr")] == "BSRNet"
    assert kinds[("v2", "denoise")] == "SCUNet"
    assert {kind for key, kind in kinds.items() if key[0] != "v2"} == {"SwinIR"}


def test_unknown_versions_and_tasks_are_refused():
    with pytest.raises(ValueError, match="v3"):
        version_of("v3")
    with pytest.raises(ValueError, match="unaligned_face"):
        version_of("v1").checkpoints("unaligned_face")
