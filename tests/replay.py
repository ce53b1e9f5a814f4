"""Given noise instead of drawn noise, so that two programs can be compared draw by draw."""

import sys
from contextlib import contextmanager

from diffusers.utils import torch_utils


@contextmanager
def replayed_noise(noises):
    """Let pipelines and schedulers use `noises`, in the order in which they draw.

    Args:
        noises: unit normal, of the shapes that are drawn: the one `DiffBIRPipeline` starts from, then that of
            `noise_aug` if any, then one for each step of a scheduler that draws.

    Raises:
        ValueError: inside, if noise of another shape is drawn, or more than there is.
    """
    left = iter(noises)

    def replay(shape, generator=None, device=None, dtype=None, layout=None):
        noise = next(left, None)
        if noise is None or tuple(noise.shape) != tuple(shape):
            found = "none" if noise is None else str(tuple(noise.shape))
            raise ValueError(f"Expected noise of shape {tuple(shape)} to replay, got {found}.")
        return noise.to(device=device, dtype=dtype)

    original = torch_utils.randn_tensor
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("milo_latent.", "diffusers.schedulers."))
        and getattr(module, "__dict__", {}).get("randn_tensor") is original
    ]
    for module in users:
        module.randn_tensor = replay
    try:
        yield
    finally:
        for module in users:
            module.randn_tensor = original
