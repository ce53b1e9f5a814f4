"""The official checkpoints of a DiffBIR version, converted to a folder that `DiffBIRPipeline` opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor
from transformers import CLIPTokenizer

from milo_latent.atomic import folder_at_once, write_text
from milo_latent.convert.kinds import check_name, check_schedule, read_kind
from milo_latent.convert.mapping import check_rest, select
from milo_latent.convert.networks import Config, Network, find_network
from milo_latent.convert.tokenizer import HUB_TOKENIZER, WAY_OUT, open_tokenizer
from milo_latent.diffbir.prompts import PROMPT_TOKENS, prompt_tokens, write_prompt_embeds
from milo_latent.diffbir.schedulers import official_scheduler
from milo_latent.diffbir.versions import FILES, UPSCALE, TaskName, Version, VersionName, version_of
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.resources import sha256

logger = logging.get_logger(__name__)
STABLE_DIFFUSION = {  # component of the pipeline -> its kind, and where it is in the checkpoint
    "unet": ("UNet", "model.diffusion_model."),
    "vae": ("VAE", "first_stage_model."),
    "text_encoder": ("text encoder", "cond_stage_model.model."),
}
UNUSED = (  # of a Stable Diffusion file: averaged weights, tables of the training's noise schedule, counters
    r"model_ema\..*",
    r"cond_stage_model\.(logvar|transformer\.text_model\.embeddings\.position_ids)",
    r"(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?",
    r"betas|logvar|lvlb_weights|scale_factor",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])",
    r"denoiser\.sigmas",
)
CARD = """\
---
library_name: diffusers
pipeline_tag: image-to-image
tags: [image-restoration, diffbir]
---
# {name}

DiffBIR {version}, task {task}, converted from the official checkpoints. Only names were changed{cast}.

| part | file | SHA-256 |
| --- | --- | --- |
{rows}

The UNet predicts {prediction}; the noise schedule {end}. The official README samples with `{sampler}`, {steps} steps
and a guidance scale of {scale:g}, and enlarges {upscale:g} times.

Source: Lin et al., "DiffBIR: Towards Blind Image Restoration with Generative Diffusion Prior", ECCV 2024, repository
XPixelGroup/DiffBIR. The weights keep the licences of their owners: Stable Diffusion 2.1 that of its model card
(CreativeML Open RAIL++-M), DiffBIR's those of its repositories.
"""


def convert_diffbir(
    version: VersionName,
    task: TaskName,
    *,
    sd: str | Path,
    controlnet: str | Path,
    cleaner: str | Path,
    output: str | Path,
    background: str | Path | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    configs: Mapping[str, Config] | None = None,
    ignore: Sequence[str] = (),
) -> Path:
    """Convert official checkpoints to a diffusers folder, strictly: every key is accounted for, or nothing is written.

    Tensors go from file to file one at a time; no model is ever in memory.

    Args:
        version: "v1", "v2" or "v2.1"; it sets what is predicted and the noise schedule.
        task: one of the version's tasks; it sets the cleaner.
        sd: Stable Diffusion 2.1, `.ckpt` or safetensors.
        controlnet: IRControlNet.
        cleaner: stage 1; for "unaligned_face", that of the faces.
        output: the folder, new or empty. It appears when it is complete.
        background: for "unaligned_face", stage 1 of what is around the faces; it becomes `background_cleaner`.
        dtype: of the files written; None keeps that of the checkpoints.
        tokenizer: as of `open_tokenizer`; "none" for none; None asks the hub, and warns and goes without if it fails.
        configs: arguments of "unet", "controlnet", "vae", "text_encoder", "cleaner" or "background" that replace what
            the shapes tell; the official full-size networks need none.
        ignore: patterns of further keys of the Stable Diffusion file that are not needed.

    Returns:
        The folder. Without a tokenizer the pipeline takes `prompt_embeds`, and has those of the official prompts.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if there is something in `output`.
        ValueError: for a version without the task, a file of another kind or version, keys that differ.
    """
    release, folder = version_of(version), Path(output)
    if background is not None and release.checkpoints(task).background is None:
        raise ValueError(f"Expected no `background` for {task}, got {background}. Only unaligned faces have one.")
    given = {"sd": sd, "controlnet": controlnet, "cleaner": cleaner, "background": background}
    files = {part: Path(file) for part, file in given.items() if file is not None}
    with folder_at_once(folder) as partial:
        networks = _find_networks(release, task, files, configs or {}, ignore)
        _save(networks, release, task, partial, _open_tokenizer(tokenizer, networks["text_encoder"]), dtype)
        write_text(partial / "README.md", _card(folder.name, release, task, files, dtype))
    return folder


def _find_networks(
    version: Version, task: TaskName, files: Mapping[str, Path], configs: Mapping[str, Config], ignore: Sequence[str]
) -> dict[str, Network]:
    """Return the networks by component of the pipeline, found but not read."""
    checkpoints = version.checkpoints(task)
    networks: dict[str, Network] = {}

    def find(component: str, kind: str, state: Mapping[str, Tensor], option: str) -> None:
        what = f"the official {kind} in {files[option]}"
        networks[component] = find_network(kind, state, configs.get(component), what=what)

    check_name(files["sd"], version.sd, "sd", version)
    check_name(files["controlnet"], checkpoints.controlnet, "controlnet", version)
    kinds: dict[str, str] = {"cleaner": checkpoints.cleaner_kind, "controlnet": "IRControlNet"}
    if "background" in files:
        kinds["background"] = str(FILES[str(checkpoints.background)].cleaner)
    for option, kind in kinds.items():
        find(option, kind, read_kind(files[option], kind, option), option)
    state = read_kind(files["sd"], "Stable Diffusion", "sd")
    check_schedule(state, files["sd"], version)
    prefixes = tuple(prefix for _, prefix in STABLE_DIFFUSION.values())
    check_rest(state, prefixes, (*UNUSED, *ignore), what=f"Stable Diffusion in {files['sd']}")
    for component, (kind, prefix) in STABLE_DIFFUSION.items():
        find(component, kind, select(state, prefix), "sd")
    _check_pair(networks["unet"], networks["controlnet"], files)
    if "background" in networks:
        networks["background_cleaner"] = networks.pop("background")
    return networks


def _check_pair(unet: Network, controlnet: Network, files: Mapping[str, Path]) -> None:
    """Raise ValueError unless the ControlNet's residuals fit the UNet."""
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"):
        theirs, ours = (network.model.config[name] for network in (unet, controlnet))  # type: ignore[index]
        if theirs != ours:
            raise ValueError(
                f"Expected networks that fit, got {name} {theirs} in {files['sd']} and {ours} in {files['controlnet']}."
            )


def _open_tokenizer(source: str | Path | None, text_encoder: Network) -> CLIPTokenizer | None:
    if source == "none":
        return None
    try:
        length: Any = text_encoder.model.config.max_position_embeddings  # type: ignore[union-attr]
        return open_tokenizer(source or HUB_TOKENIZER, length=length)
    except FileNotFoundError:
        if source is not None:
            raise
        logger.warning(f"The tokenizer of {HUB_TOKENIZER} cannot be fetched; the pipeline goes without. {WAY_OUT}")
        return None


def _save(
    networks: Mapping[str, Network],
    version: Version,
    task: TaskName,
    folder: Path,
    tokenizer: CLIPTokenizer | None,
    dtype: torch.dtype | None,
) -> None:
    scheduler = official_scheduler(  # what the official README's commands sample with
        version.recommended.sampler, prediction_type=version.prediction_type, rescale_betas_zero_snr=version.zero_snr
    )
    models: dict[str, Any] = {name: network.model for name, network in networks.items()}
    pipeline = DiffBIRPipeline(
        scheduler=scheduler, tokenizer=tokenizer, release_version=version.name, release_task=task, **models
    )
    for name, network in networks.items():
        network.save(folder / name, dtype)
    scheduler.save_pretrained(folder / "scheduler")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    else:
        _save_prompt_embeds(networks["text_encoder"], folder, dtype)
    pipeline.save_config(folder)


@torch.no_grad()
def _save_prompt_embeds(network: Network, folder: Path, dtype: torch.dtype | None) -> None:
    """Encode the official default prompts if the text encoder has CLIP's vocabulary."""
    tokens, model = prompt_tokens(), network.model
    if model.config.vocab_size > int(tokens.max()):  # type: ignore[union-attr,operator]
        encoded: Tensor = network.load(torch.float32)(tokens)[0]  # (prompts, 77, width)
        write_prompt_embeds(folder, dict(zip(PROMPT_TOKENS, encoded.to(dtype or encoded.dtype).split(1), strict=True)))


def _card(name: str, version: Version, task: TaskName, files: Mapping[str, Path], dtype: torch.dtype | None) -> str:
    """Return the text of the card of the folder `name`; `dtype` is that of the converted files if it was changed."""
    return CARD.format(
        name=name,
        version=version.name,
        task=task,
        cast=f", and the precision to {str(dtype).removeprefix('torch.')}" if dtype is not None else "",
        rows="\n".join(f"| {part} | {path.name} | {sha256(path)} |" for part, path in files.items()),
        prediction="v" if version.prediction_type == "v_prediction" else "the noise",
        end="ends without any signal" if version.zero_snr else "keeps some signal to its end",
        sampler=version.recommended.sampler,
        steps=version.recommended.num_inference_steps,
        scale=version.recommended.guidance_scale,
        upscale=UPSCALE[task],
    )
