"""Which networks of a pipeline are trained, and how they are saved: IRControlNet, UNet, or low-rank adapters of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from milo_latent.checks import check_choice
from milo_latent.extras import import_extra
from milo_latent.pipelines.diffbir import DiffBIRPipeline

Trained = Literal["controlnet", "all", "lora"]
TRAINED = ("controlnet", "all", "lora")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # layers that adapters are put on
CONVOLUTIONS = ("conv1", "conv2")  # of UNets without attention


class DenoisingNetworks(nn.Module):
    """The networks of a pipeline that are trained; the others are called, and no checkpoint holds them.

    Args:
        pipeline: whose networks these are; its weights change.
        trained: "controlnet", IRControlNet alone as in DiffBIR's stage 2; "all", the UNet too; "lora", low-rank
            adapters of the UNet alone.
        rank: of the adapters.

    Raises:
        ImportError: for "lora" without peft.
        ValueError: for another choice, a rank below 1, or a pipeline without the network that is to be trained.
    """

    def __init__(self, pipeline: DiffBIRPipeline, trained: str = "controlnet", *, rank: int = 16) -> None:
        super().__init__()
        check_choice("trained", trained, TRAINED)
        for name in ("unet", "controlnet"):
            if getattr(pipeline, name) is None:
                raise ValueError(f"Expected a pipeline with a {name}, got one without. Choose another folder.")
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)
        self.trained = trained
        if trained == "lora":
            add_adapters(pipeline.unet, rank)
        else:
            pipeline.controlnet.requires_grad_(True)
            pipeline.unet.requires_grad_(trained == "all")
        networks = {"unet": pipeline.unet, "controlnet": pipeline.controlnet}
        kept = {"controlnet": ("controlnet",), "all": ("unet", "controlnet"), "lora": ("unet",)}[trained]
        self.networks = nn.ModuleDict({name: networks[name] for name in kept})
        self._frozen = {name: each for name, each in networks.items() if name not in kept}  # a dict registers none

    def network(self, name: str) -> Any:
        """Return the UNet or the IRControlNet."""
        return self._frozen[name] if name in self._frozen else self.networks[name]

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor, prompt_embeds: Tensor | None) -> Tensor:
        """Return the model output.

        Args:
            noisy: (B, C, h, w).
            timestep: (B,).
            condition: latents of the cleaned image, (B, C, h, w).
            prompt_embeds: (B, tokens, width), or None for models without prompts.

        Returns:
            (B, C, h, w).
        """
        for network in self._frozen.values():
            if network.device != noisy.device:
                network.to(noisy.device)
        down_residuals, mid_residual = self.network("controlnet")(
            noisy, timestep, encoder_hidden_states=prompt_embeds, controlnet_cond=condition, return_dict=False
        )
        return self.network("unet")(
            noisy,
            timestep,
            encoder_hidden_states=prompt_embeds,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
        ).sample

    def save(self, pipeline: DiffBIRPipeline, folder: Path) -> None:
        """Save the trained pipeline, and for adapters also what `load_lora_weights` loads, in `folder`/lora.

        Args:
            pipeline: the one that this was made from; adapters are merged into its UNet.
            folder: made if need be.
        """
        if self.trained == "lora":
            save_adapters(pipeline.unet, folder / "lora")
            merge_adapters(pipeline.unet)
        pipeline.save_pretrained(folder / "pipeline")


def training_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """Return a scheduler with the noise schedule and the prediction type of a pipeline's, at all training timesteps.

    The products of a scaled linear schedule are taken in float64, as in DiffBIR's official code. In float32, as
    diffusers takes them, gradients differ by up to 2e-5 where there is much noise.
    """
    training = DDPMScheduler.from_config(scheduler.config)
    if training.config.beta_schedule == "scaled_linear":
        ends = (training.config.beta_start**0.5, training.config.beta_end**0.5)
        betas = torch.linspace(*ends, training.config.num_train_timesteps, dtype=torch.float64) ** 2
        if training.config.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        training.alphas_cumprod = (1.0 - betas).cumprod(dim=0).float()
    return training


def reinitialize(pipeline: DiffBIRPipeline) -> None:
    """Give UNet and IRControlNet untrained weights of the same shape, drawn from torch's generator."""
    for name in ("unet", "controlnet"):
        network = getattr(pipeline, name)
        fresh = type(network).from_config(network.config)
        setattr(pipeline, name, fresh.to(network.device, memory_format=torch.channels_last))


def add_adapters(unet: UNet2DConditionModel, rank: int) -> None:
    """Put low-rank adapters on the attention of a UNet, or on its convolutions if it attends to nothing.

    Raises:
        ImportError: without peft.
        ValueError: for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"Expected a LoRA rank of 1 or more, got {rank}.")
    lora_config = import_extra("peft", "train", "LoRA").LoraConfig
    attends = any(name.endswith(".to_q") for name, _ in unet.named_modules())
    targets = list(ATTENTION if attends else CONVOLUTIONS)
    unet.add_adapter(lora_config(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))


def save_adapters(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters of a UNet as `pytorch_lora_weights.safetensors`."""
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    DiffBIRPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def merge_adapters(unet: UNet2DConditionModel) -> None:
    """Add the adapters to the weights of a UNet, and take them off."""
    unet.fuse_lora()
    unet.unload_lora()
