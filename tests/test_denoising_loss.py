"""The denoising loss: that of DiffBIR's official training code, and MILO's weight of it."""

import copy

import pytest
import torch
from golden import golden, scheduler_for, tiny_networks

from milo_latent.testing import tiny_metric
from milo_latent.training.denoising_loss import MaskWeight, denoising_loss, predict_clean_latents
from milo_latent.training.restorer_networks import training_scheduler

BATCHES = 20
# what is trained: stage 2 of v1 and v2 as official, and the UNet too
CASES = {"eps": ("controlnet",), "v_zsnr": ("controlnet", "unet")}


def batch(number):
    """The batches of the recorded runs, drawn in this order: target, condition, text, noise, timesteps."""
    generator = torch.Generator().manual_seed(9000 + number)
    shapes = {"latents": (2, 4, 16, 16), "condition": (2, 4, 16, 16), "context": (2, 77, 32), "noise": (2, 4, 16, 16)}
    drawn = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    return drawn | {"timestep": torch.randint(0, 1000, (2,), generator=generator)}


def loss_of(networks, scheduler, drawn, **options):
    context, condition = drawn["context"], drawn["condition"]

    def denoise(noisy, timestep):
        down, mid = networks["controlnet"](
            noisy, timestep, encoder_hidden_states=context, controlnet_cond=condition, return_dict=False
        )
        return networks["unet"](
            noisy, timestep, encoder_hidden_states=context, down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample  # fmt: skip

    tensors = {name: drawn[name] for name in ("latents", "condition", "noise", "timestep")}
    return denoising_loss(denoise, scheduler, **tensors, **options)


def row(tensor):
    """What is recorded of a tensor: first, middle and last value, mean and norm."""
    flat = tensor.detach().flatten()
    return torch.stack([flat[0], flat[flat.numel() // 2], flat[-1], flat.mean(), flat.norm()])


def rows(tensors):
    return torch.stack([row(tensor) for _, tensor in sorted(tensors.items())])


def assert_close(found, expected, bound):
    """Within `bound` of each norm, or of 1/1000 of the largest: some gradients are zero but for rounding."""
    norm = expected[:, -1:].clamp(min=1e-3 * expected[:, -1].max().item())
    assert ((found - expected).abs() / norm).max() < bound


@pytest.mark.parametrize(("parameterization", "names"), CASES.items())
def test_loss_gradients_and_weights_are_those_of_the_official_code(parameterization, names):
    recorded = golden("training")
    # copies, since training changes weights in place, which other tests use
    networks = {
        name: copy.deepcopy(network).double().requires_grad_(False) for name, network in tiny_networks().items()
    }
    for name in names:
        networks[name].requires_grad_(True)
    scheduler = training_scheduler(scheduler_for(parameterization))
    parameters = [parameter for name in names for parameter in networks[name].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    losses = []
    for number in range(BATCHES):
        loss = loss_of(networks, scheduler, batch(number))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if number == 0:
            for name in names:
                gradients = {key: parameter.grad for key, parameter in networks[name].named_parameters()}
                assert_close(rows(gradients), recorded[f"{parameterization}.gradient.{name}"], 1e-5)
        optimizer.step()
    expected = recorded[f"{parameterization}.losses"]
    torch.testing.assert_close(torch.tensor(losses[:1], dtype=torch.float64), expected[:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), expected, rtol=1e-4, atol=0)
    for name in names:
        weights = dict(networks[name].named_parameters())
        assert_close(rows(weights), recorded[f"{parameterization}.weights.{name}"], 1e-4)


@pytest.fixture
def scheduler():
    return training_scheduler(scheduler_for("eps"))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(2, 4, 16, 16, generator=generator) for name in ("latents", "condition", "noise")}
    return drawn | {"timestep": torch.tensor([100, 900])}


def predict(noisy, timestep):
    """A stand-in for the networks, whose prediction is wrong by a known pattern."""
    return 0.5 * noisy + torch.linspace(0, 1, 16)


def weight_of(tensors, scheduler, progress=0.0, **options):
    weight = MaskWeight(metric=tiny_metric(), **options)
    noisy = scheduler.add_noise(tensors["latents"], tensors["noise"], tensors["timestep"])
    given = {name: tensors[name] for name in ("timestep", "latents", "condition")}
    return weight(scheduler, model_output=predict(noisy, None), noisy=noisy, progress=progress, **given)


def test_a_weight_of_one_changes_no_bit_of_the_loss(tensors, scheduler):
    standard = denoising_loss(predict, scheduler, **tensors)
    noisy = scheduler.add_noise(tensors["latents"], tensors["noise"], tensors["timestep"])
    assert standard == (predict(noisy, None) - tensors["noise"]).square().mean()
    beyond = MaskWeight("milo", tiny_metric(), timesteps=(950, 999))  # none of the timesteps
    assert denoising_loss(predict, scheduler, **tensors, weight=beyond) == standard
    assert denoising_loss(predict, scheduler, **tensors, weight=MaskWeight()) == standard
    assert denoising_loss(predict, scheduler, **tensors, weight=MaskWeight("milo", tiny_metric())) != standard


def test_latent_pixels_weigh_by_the_mask_between_predicted_and_clean_latents(tensors, scheduler):
    noisy = scheduler.add_noise(tensors["latents"], tensors["noise"], tensors["timestep"])
    clean = []
    for index, timestep in enumerate(tensors["timestep"].tolist()):
        signal = scheduler.alphas_cumprod[timestep]
        output = predict(noisy, None)[index : index + 1]
        clean.append((noisy[index : index + 1] - (1 - signal).sqrt() * output) / signal.sqrt())
    mask = tiny_metric().mask(dist=torch.cat(clean), ref=tensors["latents"])
    mean = mask.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(weight_of(tensors, scheduler, objective="milo"), mask / mean, rtol=1e-4, atol=1e-5)
    by_condition = tiny_metric().mask(dist=tensors["condition"], ref=tensors["latents"])
    found = weight_of(tensors, scheduler, objective="milo", mask_of="condition")
    torch.testing.assert_close(found, by_condition / by_condition.mean(dim=(1, 2, 3), keepdim=True))


@pytest.mark.parametrize("objective", ["linear", "cosine"])
def test_the_curriculum_goes_from_less_to_more_visible_latent_pixels(objective, tensors, scheduler):
    options = {"objective": objective, "mask_of": "condition"}
    mask = tiny_metric().mask(dist=tensors["condition"], ref=tensors["latents"])
    begin, end = (weight_of(tensors, scheduler, progress, **options) for progress in (0.0, 1.0))
    for sample in range(2):
        order = mask[sample].flatten().argsort()
        assert (begin[sample].flatten()[order].diff() <= 0).all()
        assert (end[sample].flatten()[order].diff() >= 0).all()
    torch.testing.assert_close(end, weight_of(tensors, scheduler, **options | {"objective": "milo"}))


def test_masks_are_computed_in_float32_under_autocast_too(tensors, scheduler):
    options = {"objective": "milo", "mask_of": "condition"}
    expected = weight_of(tensors, scheduler, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_of(tensors, scheduler, **options), expected)


def test_only_the_chosen_timesteps_are_weighted(tensors, scheduler):
    whole = weight_of(tensors, scheduler, objective="milo")
    part = weight_of(tensors, scheduler, objective="milo", timesteps=(0, 100))
    assert torch.equal(part[0], whole[0])
    assert torch.equal(part[1], torch.ones_like(part[1]))


def test_no_gradient_passes_through_the_mask(tensors, scheduler):
    scale = torch.tensor(0.5, requires_grad=True)
    weight = MaskWeight("milo", tiny_metric())
    denoising_loss(lambda noisy, timestep: scale * noisy, scheduler, **tensors, weight=weight).backward()
    noisy = scheduler.add_noise(tensors["latents"], tensors["noise"], tensors["timestep"])
    given = {name: tensors[name] for name in ("timestep", "latents", "condition")}
    fixed = weight(scheduler, model_output=0.5 * noisy, noisy=noisy, progress=0.0, **given)
    by_hand = (fixed * 2 * (0.5 * noisy - tensors["noise"]) * noisy).mean()
    torch.testing.assert_close(scale.grad, by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parameterization", CASES)
def test_a_perfect_prediction_stands_for_the_clean_latents(parameterization, tensors):
    scheduler = training_scheduler(scheduler_for(parameterization))
    noisy = scheduler.add_noise(tensors["latents"], tensors["noise"], tensors["timestep"])
    output = tensors["noise"]
    if parameterization == "v_zsnr":
        output = scheduler.get_velocity(tensors["latents"], tensors["noise"], tensors["timestep"])
    clean = predict_clean_latents(scheduler, output, noisy, tensors["timestep"])
    torch.testing.assert_close(clean, tensors["latents"], rtol=1e-3, atol=1e-4)
    assert denoising_loss(lambda *_: output, scheduler, **tensors) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"objective": "louder"}, "Expected `objective`"),
        ({"objective": "milo", "mask_of": "noise"}, "Expected `mask_of`"),
        ({"objective": "milo", "timesteps": (900, 100)}, r"Expected timesteps \(lowest, highest\)"),
    ],
)
def test_weights_that_cannot_be_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        MaskWeight(metric=tiny_metric(), **options)


def test_a_mask_needs_a_metric():
    with pytest.raises(TypeError, match="Expected `metric` to be a MILO"):
        MaskWeight("milo")
