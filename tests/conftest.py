"""Fixtures: the reference material beside the checkout, tiny models, a photo."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from milo_latent.diffbir.ircontrolnet import IRControlNet
from milo_latent.testing import tiny_metric, tiny_pipeline

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material, beside the checkout or named by MILO_LATENT_SHARED; tests skip without it.

    Only tests that need photos or the official MILO's own weights use it; recorded values are in `data`.
    """
    folder = Path(os.environ.get("MILO_LATENT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "milo_official").is_dir():
        pytest.skip("needs the official MILO or photos, in ../shared or the folder that MILO_LATENT_SHARED names")
    return folder


@pytest.fixture(autouse=True)
def _no_pulled_weights(tmp_path_factory, monkeypatch):
    """Tests see the shipped weights only, and write no cache of the user's."""
    monkeypatch.setenv("MILO_LATENT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def metric():
    return tiny_metric()


@pytest.fixture(scope="session")
def uneven_metric():
    """A metric whose masks differ a lot between pixels, and between (ref, dist) and (dist, ref)."""
    metric = tiny_metric()
    for layer in list(metric.mask_finder)[::2][:-1]:
        layer.weight.mul_(3.0)
    return metric


@pytest.fixture
def photo(tmp_path) -> Path:
    """A small noisy PNG: a gradient with an edge."""
    rows, columns = np.mgrid[0:45, 0:61]
    picture = np.stack([columns * 4, rows * 5, (columns > 30) * 200], axis=2)
    noise = np.random.default_rng(0).normal(0, 20, picture.shape)
    path = tmp_path / "photo.png"
    Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def prompted(pipeline):
    """The tiny pipeline with a UNet and a ControlNet that attend to prompts, given as embeddings."""
    torch.manual_seed(0)
    shape = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
        "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    }  # fmt: skip
    pipeline.unet = UNet2DConditionModel(**shape, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    pipeline.controlnet = IRControlNet(**shape, conditioning_channels=4)
    return pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """The folder of a tiny pipeline with a metric."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny_pipeline()
    pipeline.register_modules(metric=tiny_metric())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of three small photos, made from a formula."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        rows, columns = np.mgrid[0:136, 0:140]
        picture = np.stack([rows, columns, (rows // 8 + columns // 8 + index) % 2 * 200], axis=2) % 256
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{index}.png")
    return folder
