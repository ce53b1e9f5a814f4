"""SwinIR, SCUNet, BSRNet: equal to the official networks, of any size, strict about their weights."""

import pytest
import torch
from diffusers import ModelMixin
from golden import CLEANERS, golden, official_shapes, tiny_cleaner

from milo_latent.convert.networks import COMPUTED, find_network
from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.swinir import SwinIR

TINY = {cleaner: CLEANERS[cleaner.__name__.lower()] for cleaner in (SwinIR, SCUNet, BSRNet)}
PARAMETERS = {SwinIR: 15_792_587, SCUNet: 17_946_072, BSRNet: 16_697_987}  # official_facts.json


def name_of(cleaner):
    return cleaner.__name__.lower()


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
def test_the_output_is_the_official_one(cleaner):
    network, recorded = tiny_cleaner(cleaner), golden(f"cleaner_{name_of(cleaner)}")
    sizes = [key.removesuffix(".input") for key in recorded if key.endswith(".input")]
    assert len(sizes) == 2
    for size in sizes:
        expected = recorded[f"{size}.output_every2"]
        difference = (network(recorded[f"{size}.input"])[..., ::2, ::2] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5, f"{size}: {difference:.1e}"


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
def test_the_full_size_keys_are_the_official_ones(cleaner):
    with torch.device("meta"):
        network = cleaner()
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[cleaner]
    found = find_network(cleaner.__name__, official_shapes(name_of(cleaner)))
    assert found.tensors.keys() == network.state_dict().keys()


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
def test_weights_that_lack_a_key_or_have_another_shape_are_refused_by_name(cleaner):
    shapes = official_shapes(name_of(cleaner))
    gone, changed = [key for key in shapes if key.rpartition(".")[2] not in COMPUTED][:2]
    del shapes[gone]
    shapes[changed] = torch.empty(7, device="meta")
    shapes["of.another.network"] = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match=f"Expected the official {cleaner.__name__}") as error:
        find_network(cleaner.__name__, shapes)
    message = str(error.value)
    assert f"1 missing ({gone})" in message
    assert "1 unknown (of.another.network)" in message
    assert f"{changed}: " in message


def test_only_buffers_of_blocks_that_are_there_are_dropped():
    shapes = official_shapes("swinir")
    shapes["layers.8.residual_group.blocks.1.attn_mask"] = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match=r"1 unknown \(layers\.8\.residual_group"):
        find_network("SwinIR", shapes)


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
@pytest.mark.parametrize("size", [(1, 1), (37, 65), (72, 88)])
def test_any_size_gives_the_scaled_size_and_finite_gradients(cleaner, size):
    torch.manual_seed(0)
    network = cleaner(**TINY[cleaner])
    image = torch.rand(2, 3, *size, requires_grad=True)
    cleaned = network(image)
    assert cleaned.shape == (2, 3, network.scale * size[0], network.scale * size[1])
    cleaned.square().mean().backward()
    assert torch.isfinite(image.grad).all()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
def test_each_image_of_a_batch_is_cleaned_as_alone(cleaner):
    torch.manual_seed(0)
    network = cleaner(**TINY[cleaner]).eval()
    images = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        assert torch.allclose(network(images)[1:], network(images[1:]), atol=1e-5)


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
def test_save_and_load_round_trip_without_a_word(tmp_path, cleaner):
    network = cleaner(**TINY[cleaner])
    network.save_pretrained(tmp_path)
    loaded, info = cleaner.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, ModelMixin)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), loaded(image))


@pytest.mark.parametrize("cleaner", TINY, ids=name_of)
def test_half_precision_stays_close(cleaner):
    torch.manual_seed(0)
    network, image = cleaner(**TINY[cleaner]).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        full = network(image)
        half = network.to(torch.bfloat16)(image.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.mse_loss(half.float(), full).sqrt() < 0.02 * max(1.0, full.abs().max())


def test_configurations_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="as many `depths` as `num_heads`, got 2 and 1"):
        SwinIR(depths=(1, 1), num_heads=(1,))
    with pytest.raises(ValueError, match="`upscale` to be a power of two"):
        SwinIR(downscale=3, upscale=3)
    with pytest.raises(ValueError, match="seven numbers of `blocks`, got 3"):
        SCUNet(blocks=(1, 1, 1))
