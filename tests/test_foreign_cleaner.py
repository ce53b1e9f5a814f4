"""Cleaners of another library: wrapped as they are, and a clear word where the library is missing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from milo_latent.diffbir.cleaning import clean_image
from milo_latent.diffbir.foreign_cleaner import ForeignCleaner, load_upscaler
from milo_latent.testing import tiny_pipeline


class UnsupportedModelError(Exception):
    pass


class Descriptor:
    """What spandrel returns for an image model, with one learned factor and nearest neighbour x2."""

    architecture = SimpleNamespace(name="Doubler")
    scale = 2

    def __init__(self, channels=3):
        self.input_channels = self.output_channels = channels
        self.model = nn.Conv2d(3, 3, 1)

    def __call__(self, image):
        assert image.shape[0] == 1, "spandrel's models take one image"
        return self.model(image).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture
def spandrel(monkeypatch):
    """A stand-in for the library, whose loader returns `module.model`."""

    def load(path):
        if module.model is None:
            raise UnsupportedModelError("no architecture matches")
        return module.model

    module = ModuleType("spandrel")
    module.UnsupportedModelError = UnsupportedModelError
    module.ImageModelDescriptor = Descriptor
    module.ModelLoader = lambda device: SimpleNamespace(load_from_file=load)
    module.model = Descriptor()
    monkeypatch.setitem(sys.modules, "spandrel", module)
    return module


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"weights")
    return path


def test_the_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ImportError, match=r'pip install "milo_latent\[upscalers\]"'):
        load_upscaler(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_upscaler(tmp_path / "none.pth")


def test_a_model_of_the_library_is_a_cleaner_with_its_scale(spandrel, file):
    cleaner = load_upscaler(file)
    assert isinstance(cleaner, ForeignCleaner)
    assert cleaner.scale == 2
    assert not cleaner.training
    assert not any(parameter.requires_grad for parameter in cleaner.parameters())
    images = torch.rand(2, 3, 8, 10)
    expected = torch.cat([spandrel.model(image[None]) for image in images])
    assert torch.equal(cleaner(images), expected)
    assert clean_image(cleaner, images, output_size=(32, 40)).shape == (2, 3, 32, 40)


def test_its_parameters_move_with_the_pipeline(spandrel, file):
    cleaner = load_upscaler(file)
    pipeline = tiny_pipeline()
    pipeline.register_modules(cleaner=cleaner)
    pipeline.to(torch.bfloat16)
    assert cleaner.dtype == torch.bfloat16
    assert cleaner.device == torch.device("cpu")


def test_files_of_no_known_architecture_are_refused(spandrel, file):
    spandrel.model = None
    with pytest.raises(ValueError, match=r"model\.pth: no architecture matches"):
        load_upscaler(file)


def test_models_that_need_a_mask_are_refused(spandrel, file):
    spandrel.model = SimpleNamespace(architecture=SimpleNamespace(name="Inpainter"))
    with pytest.raises(ValueError, match="Inpainter, which needs more than an image"):
        load_upscaler(file)


def test_models_of_grey_images_are_refused(spandrel, file):
    spandrel.model = Descriptor(channels=1)
    with pytest.raises(ValueError, match=r"RGB to RGB, got .* 1 channels in"):
        load_upscaler(file)


def test_a_file_with_a_flipped_bit_is_refused(spandrel, tmp_path):
    weight = torch.arange(100.0)
    torch.save({"weight": weight}, tmp_path / "a.pth")
    assert load_upscaler(tmp_path / "a.pth").scale == 2
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth: the checksum of .* is wrong"):
        load_upscaler(tmp_path / "a.pth")
