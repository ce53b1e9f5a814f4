"""MILO, held to the official code's recorded values and to what a metric must be."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from milo_latent import MILO, MILOLoss, read_image, read_latents
from milo_latent.convert.official import describe
from milo_latent.testing import latent_pair, tiny_metric
from milo_latent.training.train_metric import initialize


@pytest.fixture(scope="module")
def reference(shared):
    return json.loads((shared / "milo_official" / "reference_values.json").read_text())


@pytest.fixture(scope="module")
def latent_metric(shared):
    return MILO.from_pretrained(shared / "milo_official" / "MILO_latent.pth")


@pytest.fixture(scope="module")
def image_metric(shared):
    return MILO.from_pretrained(shared / "milo_official" / "MILO.pth")


@pytest.fixture(scope="module")
def official_pairs(shared):
    folder = shared / "milo_official"
    return {
        "latent": {name: read_latents(folder / "latents" / f"{name}.npy") for name in ("ref", "dist")},
        "image": {name: read_image(folder / "images" / f"{name}.png") for name in ("ref", "dist")},
    }


BLOCKS = [
    ("latent_pair", 64, 64),
    ("latent_pair_61x53", 61, 53),
    ("image_pair", 384, 512),
    ("image_pair_333x257", 333, 257),
]


@pytest.mark.parametrize(("block", "height", "width"), BLOCKS)
def test_scores_masks_and_maps_are_the_official_ones(
    block, height, width, reference, official_pairs, latent_metric, image_metric
):
    kind = block.split("_")[0]
    metric = latent_metric if kind == "latent" else image_metric
    pair = {name: tensor[..., :height, :width] for name, tensor in official_pairs[kind].items()}
    expected = reference[block]
    result = metric.compare(**pair)
    # the tolerances are those the reference file suggests; scores are held to a tenth of it
    assert result.error.item() == pytest.approx(expected["score_model(dist,ref)"], rel=1e-5)
    absolute = 1e-4 if kind == "latent" else 1e-3
    for tensor, name in ((result.mask, "mask"), (result.error_map, "MILO_map")):
        for sample in expected[name]["samples_batch0_channel0"]:
            assert tensor[0, 0, sample["row"], sample["col"]].item() == pytest.approx(sample["value"], abs=absolute)
        assert tensor.mean().item() == pytest.approx(expected[name]["mean"], rel=1e-4)
    swapped = metric(dist=pair["ref"], ref=pair["dist"]).item()
    assert swapped == pytest.approx(expected["score_model(ref,dist)"], rel=1e-5)


def test_a_batch_of_two_scores_each_item_as_the_official_code_does(
    reference, official_pairs, latent_metric, image_metric
):
    for kind, metric in (("latent", latent_metric), ("image", image_metric)):
        pair = {name: torch.cat([tensor, tensor.flip(-1)]) for name, tensor in official_pairs[kind].items()}
        expected = reference[f"{kind}_batch_of_two"]["per_item_score"]
        assert metric(**pair).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_scaler_is_the_official_one(reference, latent_metric, image_metric):
    for metric, name in ((latent_metric, "latent_weights"), (image_metric, "image_weights")):
        for sample in reference["scaler_network"][name]:
            output = metric.scaler(torch.tensor(float(sample["input"])).reshape(1, 1, 1, 1)).item()
            assert output == pytest.approx(sample["output"], rel=1e-4)


def test_gradients_are_the_official_ones(reference, official_pairs, latent_metric):
    for name in ("dist", "ref"):
        pair = {key: tensor.clone() for key, tensor in official_pairs["latent"].items()}
        pair[name].requires_grad_(True)
        latent_metric(**pair).sum().backward()
        expected = reference["gradients"]["latent_pair"][f"d_score/d_{name}"]
        assert pair[name].grad.norm().item() == pytest.approx(expected["l2_norm"], rel=1e-4)
        assert pair[name].grad.abs().mean().item() == pytest.approx(expected["mean_abs"], rel=1e-4)


@given(side=st.integers(16, 40), other=st.integers(16, 40), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_score_is_zero_for_identical_inputs_with_a_finite_gradient(side, other, seed):
    metric = tiny_metric(seed=seed)
    latents = torch.randn(1, 4, side, other, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)
    score = metric(dist=latents, ref=latents.detach())
    score.sum().backward()
    assert score.item() == 0.0
    assert torch.isfinite(latents.grad).all()


@given(seed=st.integers(0, 99), noise=st.floats(0.01, 3.0))
@settings(max_examples=20, deadline=None)
def test_score_is_positive_and_the_mask_within_its_levels(seed, noise):
    ref, dist = latent_pair(batch=2, side=21, noise=noise, seed=seed)
    metric = tiny_metric(seed=seed)
    result = metric.compare(ref=ref, dist=dist)
    assert (result.error > 0).all()
    assert result.mask.min() > 0
    assert result.mask.max() < metric.config.levels


def test_an_item_scores_in_a_batch_as_alone(metric):
    ref, dist = latent_pair(batch=5, side=19)
    alone = torch.cat([metric(ref=ref[i : i + 1], dist=dist[i : i + 1]) for i in range(5)])
    assert torch.allclose(metric(ref=ref, dist=dist), alone, rtol=1e-6, atol=0)


def test_the_gradient_matches_finite_differences(metric):
    metric = metric.double()
    ref, dist = (tensor.double() for tensor in latent_pair(side=16))
    assert torch.autograd.gradcheck(lambda each: metric(ref=ref, dist=each), dist.requires_grad_(True), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_one_percent(metric, dtype):
    ref, dist = latent_pair(side=32)
    half = tiny_metric().to(dtype)(ref=ref.to(dtype), dist=dist.to(dtype)).item()
    assert half == pytest.approx(metric(ref=ref, dist=dist).item(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_official_weights_stay_within_one_percent_in_half_precision(dtype, official_pairs, shared):
    for block, height, width in BLOCKS:
        name = block.partition("_")[0]
        ref, dist = (official_pairs[name][which][..., :height, :width] for which in ("ref", "dist"))
        full = MILO.from_pretrained(shared / "milo_official" / ("MILO_latent.pth" if name == "latent" else "MILO.pth"))
        expected = full.compare(ref=ref, dist=dist)
        got = full.to(dtype).compare(ref=ref.to(dtype), dist=dist.to(dtype))
        assert got.error.item() == pytest.approx(expected.error.item(), rel=0.01)
        assert got.mos.item() == pytest.approx(expected.mos.item(), rel=0.01)
        assert got.error_map.mean().item() == pytest.approx(expected.error_map.mean().item(), rel=0.01)


def test_it_compiles_without_a_graph_break(metric):
    ref, dist = latent_pair(side=19)
    leaf = dist.clone().requires_grad_(True)
    compiled = torch.compile(metric, fullgraph=True, backend="aot_eager")  # fullgraph: a break is an error
    score = compiled(ref=ref, dist=leaf)
    assert score.item() == pytest.approx(metric(ref=ref, dist=dist).item(), rel=1e-6)
    expected = dist.clone().requires_grad_(True)
    metric(ref=ref, dist=expected).sum().backward()
    torch.testing.assert_close(torch.autograd.grad(score.sum(), leaf)[0], expected.grad, rtol=1e-4, atol=1e-8)


def test_one_reference_for_many_candidates_scores_as_many_pairs(metric):
    ref, _ = latent_pair(side=21)
    _, dist = latent_pair(batch=5, side=21, seed=3)
    pairs = metric(ref=ref.expand(5, -1, -1, -1).contiguous(), dist=dist)
    assert torch.allclose(metric(ref=ref, dist=dist), pairs, rtol=1e-5, atol=0)
    gradients = []
    for each in (ref, ref.expand(5, -1, -1, -1).contiguous()):
        leaf = dist.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad(metric(ref=each, dist=leaf).sum(), leaf)[0])
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


def test_a_region_is_all_that_counts(metric):
    ref, dist = latent_pair(batch=2, side=20)
    everywhere = torch.ones(1, 1, 20, 20)
    assert torch.allclose(metric(ref=ref, dist=dist, region=everywhere), metric(ref=ref, dist=dist), rtol=1e-5)
    left = everywhere.clone()
    left[..., 10:] = 0
    result = metric.compare(ref=ref, dist=dist, region=left)
    error = (result.mask * (ref - dist).abs()).mean(dim=1)
    assert torch.allclose(result.error, error[..., :10].mean(dim=(1, 2)), rtol=1e-5)
    assert torch.allclose(result.mos, metric.mos(error[..., :10].mean(dim=(1, 2))), rtol=1e-5)
    loss = MILOLoss(metric, reduction="none", reading="error_map")(dist, ref, region=left)
    assert torch.allclose(loss, result.error_map[..., :10].mean(dim=(1, 2, 3)), rtol=1e-5)
    each = torch.stack([left[0], everywhere[0]])
    whole = error.mean(dim=(1, 2))
    expected = torch.stack([result.error[0], whole[1]])
    assert torch.allclose(metric.compare(ref=ref, dist=dist, region=each).error, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`region` of shape \(2, 1, 20, 20\)"):
        metric(ref=ref, dist=dist, region=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="`region` with 1 channels, got 3"):
        metric(ref=ref, dist=dist, region=torch.ones(1, 3, 20, 20))
    with pytest.raises(TypeError, match="`region` to be floating point"):
        metric(ref=ref, dist=dist, region=left.long())


@pytest.mark.parametrize(
    ("value", "match"),
    [(0.0, "above 0 somewhere"), (-1.0, "`region` >= 0, got -1"), (float("nan"), "`region` to be finite")],
)
def test_a_region_that_nothing_can_be_a_mean_of_is_refused(metric, value, match):
    ref, dist = latent_pair(batch=2)
    region = torch.ones(2, 1, 16, 16)
    region[1] = value
    with pytest.raises(ValueError, match=match):
        metric(ref=ref, dist=dist, region=region)
    with pytest.raises(ValueError, match=match):
        metric.compare(ref=ref, dist=dist, region=region)


def test_a_large_region_stays_in_the_range_of_half_precision(metric):
    ref, dist = (each.half() for each in latent_pair(side=260))
    half, region = copy.deepcopy(metric).half(), torch.ones(1, 1, 260, 260)  # a sum of 67,600 is infinite there
    score = half(ref=ref, dist=dist, region=region)
    assert score.dtype == torch.float16
    assert score.item() == pytest.approx(half(ref=ref, dist=dist).item(), rel=2e-3)


def test_no_candidates_get_no_scores(metric):
    ref, dist = latent_pair()
    assert metric(ref=ref, dist=dist[:0]).shape == (0,)
    assert metric.compare(ref=ref[:0], dist=dist[:0]).mos.shape == (0,)


def test_mos_and_error_map_are_the_scaler_s_by_hand(metric):
    """5 * (1 - S(E)), and S(e) - S(0) for the error e of each pixel, from no error to the worst."""

    def scaled(value):
        hidden = torch.tensor([[value]])
        layers = list(metric.scaler)
        for layer in layers[::2][:-1]:
            hidden = hidden @ layer.weight[:, :, 0, 0].T + layer.bias
            hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
        return (hidden @ layers[4].weight[:, :, 0, 0].T + layers[4].bias).sigmoid().item()

    errors = torch.tensor([0.0, 0.3, 2.0, 1e4])
    expected = [5 * (1 - scaled(error)) for error in errors.tolist()]
    assert metric.mos(errors).tolist() == pytest.approx(expected, abs=1e-5)
    differences = [scaled(error) - scaled(0.0) for error in errors.tolist()]
    assert metric.scale_error(errors.view(1, 1, 2, 2)).flatten().tolist() == pytest.approx(differences, abs=1e-6)
    assert metric.scale_error(errors[1:].view(3, 1, 1, 1)).flatten().tolist() == pytest.approx(
        differences[1:], abs=1e-6
    )


def test_the_mask_is_built_from_coarse_to_fine_by_hand(metric):
    """Odd sides: each level halves them and cuts; masks are doubled, and their last row and column repeated."""
    assert [layer.out_channels for layer in list(metric.mask_finder)[::2]] == [32, 64, 32, 16, 1]
    assert [layer.out_channels for layer in list(metric.scaler)[:5:2]] == [32, 32, 1]
    ref, dist = (each[..., :37, :22] for each in latent_pair(batch=2, side=40))
    levels = [(dist, ref)]
    for _ in range(3):
        levels.append(tuple(F.avg_pool2d(each, 2) for each in levels[-1]))
    mask = torch.zeros(2, 1, 2, 1)
    for level in reversed(levels):
        mask = F.interpolate(mask, scale_factor=2, mode="bilinear", align_corners=True)
        rows, columns = (side - own for side, own in zip(level[0].shape[2:], mask.shape[2:], strict=True))
        mask = torch.cat([mask, mask[..., -1:, :]][: 1 + rows], dim=2)
        mask = torch.cat([mask, mask[..., -1:]][: 1 + columns], dim=3)
        hidden = torch.cat([*level, mask], dim=1)
        for layer in list(metric.mask_finder)[::2]:
            hidden = F.conv2d(hidden.relu() if hidden.shape[1] != 9 else hidden, layer.weight, layer.bias, padding=1)
        mask = mask + hidden.sigmoid()
    assert torch.allclose(metric.mask(dist=dist, ref=ref), mask, atol=1e-5)
    error = (mask * (ref - dist).abs()).mean(dim=(1, 2, 3))
    assert torch.allclose(metric(dist=dist, ref=ref), error, atol=1e-5)
    assert (metric.mask(dist=ref, ref=dist) - mask).abs().max() > 1e-3


def test_the_mos_falls_with_noise_and_is_highest_for_identical_inputs():
    metric = tiny_metric()
    initialize(metric)  # a scaler that rises, as a trained one does
    scores = []
    for noise in (0.0, 0.3, 3.0):
        ref, dist = latent_pair(noise=noise)
        scores.append(metric.compare(ref=ref, dist=dist).mos.item())
    assert scores[0] == pytest.approx(5 * (1 - metric.scaler(torch.zeros(1, 1, 1, 1)).item()))
    assert 5 >= scores[0] > scores[1] > scores[2] >= 0


def test_the_mos_is_that_of_the_official_command(official_pairs, image_metric):
    mos = image_metric.compare(**official_pairs["image"]).mos.item()
    assert f"{mos:.4f}" == "2.4477"  # as it prints
    swapped = {"ref": official_pairs["image"]["dist"], "dist": official_pairs["image"]["ref"]}
    assert image_metric.compare(**swapped).mos.item() < mos - 0.1


def test_each_item_of_a_batch_has_the_mos_of_its_own_error(metric):
    ref, dist = latent_pair(batch=3)
    dist[1] = ref[1]
    result = metric.compare(ref=ref, dist=dist)
    expected = [5 * (1 - metric.scaler(error.reshape(1, 1, 1, 1)).item()) for error in result.error]
    assert result.mos.tolist() == pytest.approx(expected, rel=1e-6)
    assert result.mos[1] != result.mos[0]


@pytest.mark.parametrize(
    ("ref", "dist", "error", "match"),
    [
        (torch.rand(1, 4, 16, 16), torch.rand(1, 4, 16, 17), ValueError, "one shape"),
        (torch.rand(2, 4, 16, 16), torch.rand(3, 4, 16, 16), ValueError, "one shape"),
        (torch.rand(3, 4, 16, 16), torch.rand(1, 4, 16, 16), ValueError, "one shape"),
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), ValueError, "4 channels"),
        (torch.rand(16, 16), torch.rand(16, 16), ValueError, "batch axis"),
        (torch.rand(1, 4, 15, 16), torch.rand(1, 4, 15, 16), ValueError, "at least 16"),
        (torch.ones(1, 4, 16, 16, dtype=torch.long), torch.rand(1, 4, 16, 16), TypeError, "floating point"),
        (torch.rand(1, 4, 16, 16).double(), torch.rand(1, 4, 16, 16), TypeError, "one dtype"),
        ([1.0], torch.rand(1, 4, 16, 16), TypeError, "`ref` as latents"),
    ],
)
def test_inputs_that_cannot_be_compared_are_refused(metric, ref, dist, error, match):
    with pytest.raises(error, match=match):
        metric(ref=ref, dist=dist)


def test_save_and_load_round_trip(metric, tmp_path):
    metric.save_pretrained(tmp_path)
    ref, dist = latent_pair()
    assert MILO.from_pretrained(tmp_path)(ref=ref, dist=dist).item() == metric(ref=ref, dist=dist).item()


def test_a_metric_is_opened_from_a_folder_in_a_folder(metric, tmp_path):
    ref, dist = latent_pair()
    metric.save_pretrained(tmp_path / "other")
    for folder in ("other", "metric"):
        metric.save_pretrained(tmp_path / folder)
        loaded = MILO.from_pretrained(tmp_path, subfolder=folder)
        assert loaded(ref=ref, dist=dist).item() == metric(ref=ref, dist=dist).item()
    with pytest.raises(FileNotFoundError, match="Expected metric weights"):
        MILO.from_pretrained(tmp_path, subfolder="unet")
    with pytest.raises(ValueError, match=r"Expected options among revision.*got \['output_loading_info'\]"):
        MILO.from_pretrained(tmp_path, output_loading_info=True)


def test_a_saved_metric_has_a_card_with_its_space_direction_and_hash(tmp_path):
    metric = MILO(latent_space="some-vae", scaling_factor=0.5)
    metric.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    parameters = sum(each.numel() for each in metric.parameters())
    for row in (
        "library_name: diffusers",
        "# MILO_L, for latents",
        "| input | latents of the autoencoder `some-vae`, times the scaling factor 0.5, (B, 4, H, W), "
        "sides of at least 16 |",
        "| `metric(dist=..., ref=...)` | error E, (B,): 0 = identical, unbounded above; lower is better |",
        "| `metric.compare(...).mos` | 5 * (1 - S(E)), (B,), 0 to 5; higher is better |",
        "| levels | 4 |",
        f"| parameters | {parameters:,} |",
        f"| SHA-256 of `diffusion_pytorch_model.safetensors` | `{digest}` |",
    ):
        assert row in card.splitlines(), row
    MILO(channels=3).save_pretrained(tmp_path / "images")
    lines = (tmp_path / "images" / "README.md").read_text().splitlines()
    assert "# MILO_I, for images" in lines
    assert "error = metric(dist=dist, ref=ref)  # (B,), 0 = identical, lower is better" in lines
    assert "| input | RGB images in [0, 1], (B, 3, H, W), sides of at least 16 |" in lines
    (tmp_path / "README.md").write_text("mine")
    metric.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_file_is_no_folder_to_save_in(metric, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="Expected a folder"):
        metric.save_pretrained(tmp_path / "taken")


def test_a_loaded_metric_is_frozen_and_still_gives_a_gradient_to_its_input(metric, tmp_path):
    metric.save_pretrained(tmp_path)
    loaded = MILO.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ref, dist = latent_pair()
    loaded(ref=ref, dist=dist.requires_grad_(True)).sum().backward()
    assert dist.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"not a checkpoint", "cannot be read"), (b"", "cannot be read")],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, content, match):
    path = tmp_path / "MILO.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        MILO.from_pretrained(path)


def test_a_foreign_checkpoint_is_refused_by_its_keys(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"official MILO checkpoint.*layer\.weight"):
        MILO.from_pretrained(path)


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_runs_code_is_refused_before_it_does(tmp_path, zipped):
    path, trace = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"weight": torch.zeros(1), "other": Harmful(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="cannot be read"):
        MILO.from_pretrained(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # as this file would do
    assert trace.exists()


def test_a_card_written_by_us_keeps_the_hash_of_the_weights_beside_it(tmp_path):
    tiny_metric(seed=1).save_pretrained(tmp_path)
    tiny_metric(seed=2).save_pretrained(tmp_path)
    assert "SHA-256" in describe(str(tmp_path))  # which refuses another one
    card = (tmp_path / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert digest in card
    own = "# Größe\r\nmy own card\r\n".encode("latin-1")
    (tmp_path / "README.md").write_bytes(own)
    tiny_metric(seed=3).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == own


def test_a_metric_for_latents_of_no_name_is_described_as_one(tmp_path):
    tiny_metric().save_pretrained(tmp_path / "latents")
    tiny_metric(channels=3).save_pretrained(tmp_path / "images")
    assert "MILO_L, latents of" in describe(str(tmp_path / "latents"))
    assert "MILO_I, images" in describe(str(tmp_path / "images"))


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}])
def test_weights_that_are_not_whole_are_refused_however_they_are_loaded(tmp_path, options):
    tiny_metric().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("scaler.0.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing: scaler\.0\.weight"):
        MILO.from_pretrained(tmp_path, **options)


def test_values_that_are_not_numbers_are_not_taken_for_equal(metric):
    ref, dist = torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    dist[0, 0, 3, 3] = torch.nan
    result = metric.compare(ref=ref, dist=dist)
    assert all(each.isnan().all() for each in (result.error, result.mos, result.error_map[..., 3, 3]))
    loss = MILOLoss(metric, reading="error_map")(dist, ref)
    assert not torch.isfinite(loss)


def test_missing_weights_are_refused_naming_what_there_is():
    with pytest.raises(FileNotFoundError, match="shipped set"):
        MILO.from_pretrained("no-such-weights")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        MILO.from_pretrained("absent.pth")


def test_a_setting_that_a_metric_does_not_have_is_no_attribute_of_its_configuration(metric):
    assert metric.config.levels == metric.config["levels"]
    assert not hasattr(metric.config, "level")
    with pytest.raises(AttributeError, match=r"one of the settings channels, levels, .*, got 'level'"):
        metric.config.level  # noqa: B018


def test_the_fewest_and_the_most_levels_are_taken():
    assert MILO(levels=16).config.levels == 16
    ref, dist = latent_pair()
    for levels in (1, 2):
        mask = MILO(levels=levels).mask(dist=dist, ref=ref)
        assert 0.2 * levels < mask.mean() < 0.8 * levels


@pytest.mark.parametrize("levels", [0, -1, 2.5, 99])
def test_a_number_of_levels_that_cannot_be_is_refused(levels):
    with pytest.raises(ValueError, match=r"`levels` to be a whole number from 1 to"):
        MILO(levels=levels)
