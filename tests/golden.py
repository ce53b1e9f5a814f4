"""What the tests against the official code's results share: its tiny networks, and how close is close enough."""

from safetensors.torch import load_file

from milo_latent import DiffBIRPipeline
from milo_latent.convert.networks import find_controlnet, find_unet, find_vae
from milo_latent.diffbir.schedulers import official_scheduler

HEADS = {"attention_head_dim": (4, 8, 4, 4)}
CLEANERS = {
    "swinir": {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3)},
    "scunet": {"dim": 32, "blocks": (0, 2, 1, 0, 1, 2, 0)},
    "bsrnet": {"channels": 16, "blocks": 2, "growth": 8},
}
PREDICTION = {"eps": "epsilon", "v_zsnr": "v_prediction"}


def golden(shared, name):
    return load_file(shared / "diffbir_golden" / f"{name}.safetensors")


def relative(result, expected):
    """The largest difference, over the largest absolute value."""
    assert result.shape == expected.shape
    return ((result - expected).abs().max() / expected.abs().max()).item()


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def numbered(tensors, prefix):
    """The tensors prefix0, prefix1, ... in their order."""
    return [tensors[f"{prefix}{index}"] for index in range(sum(key.startswith(prefix) for key in tensors))]


def tiny_networks(shared):
    weights = {key: value.float() for key, value in golden(shared, "control_ldm_tiny_weights").items()}
    return {
        "unet": find_unet(part(weights, "unet."), HEADS).load(),
        "controlnet": find_controlnet(part(weights, "controlnet."), HEADS).load(),
        "vae": find_vae(part(weights, "vae.")).load(),
    }


def scheduler_for(parameterization, sampler="spaced"):
    return official_scheduler(
        sampler, prediction_type=PREDICTION[parameterization], rescale_betas_zero_snr=parameterization == "v_zsnr"
    )


def golden_pipeline(networks, parameterization, sampler="spaced", cleaner=None):
    pipeline = DiffBIRPipeline(**networks, scheduler=scheduler_for(parameterization, sampler), cleaner=cleaner)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_cleaner(shared, cleaner):
    """An official tiny cleaner, by its class."""
    name = cleaner.__name__.lower()
    weights = part(golden(shared, f"cleaner_{name}"), "weights.")
    network = cleaner(**CLEANERS[name]).eval().requires_grad_(False)
    network.load_state_dict({k: v.float() for k, v in cleaner.official_state(weights, CLEANERS[name]).items()})
    return network
