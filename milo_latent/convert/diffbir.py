"""The official checkpoints of a DiffBIR version, converted to a folder that `DiffBIRPipeline` opens."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import logging
from torch import Tensor
from transformers import CLIPTokenizer

from milo_latent.convert.card import diffbir_card
from milo_latent.convert.kinds import check_name, check_schedule, find_cleaner, read_kind
from milo_latent.convert.mapping import check_rest, select
from milo_latent.convert.networks import Config, Network, find_controlnet, find_text_encoder, find_unet, find_vae
from milo_latent.convert.tokenizer import HUB_TOKENIZER, WAY_OUT, open_tokenizer
from milo_latent.convert.writing import write_safetensors
from milo_latent.diffbir.prompts import PROMPT_EMBEDS_FILE, PROMPT_TOKENS, prompt_tokens
from milo_latent.diffbir.schedulers import official_scheduler
from milo_latent.diffbir.versions import FILES, TaskName, Version, VersionName, version_of
from milo_latent.files import write_text
from milo_latent.pipelines.diffbir import DiffBIRPipeline

logger = logging.get_logger(__name__)
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
UNUSED = (  # of a Stable Diffusion file: averaged weights, tables of the training's noise schedule, counters
    r"model_ema\..*",
    r"cond_stage_model\.(logvar|transformer\.text_model\.embeddings\.position_ids)",
    r"(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?",
    r"betas|logvar|lvlb_weights|scale_factor",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])",
    r"denoiser\.sigmas",
)


@dataclass(frozen=True)
class Parts:
    """The networks of a pipeline, found and checked, not yet read."""

    unet: Network
    controlnet: Network
    vae: Network
    text_encoder: Network
    cleaner: Network
    background_cleaner: Network | None = None


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
    """Convert official checkpoints to a diffusers folder, strictly: each key has its place, or nothing is written.

    Tensors go from file to file one at a time; no model is ever in memory.

    Args:
        version: "v1", "v2" or "v2.1"; it sets what is predicted and the noise schedule.
        task: sets which cleaner belongs to the version.
        sd: Stable Diffusion 2.1, `.ckpt` or safetensors.
        controlnet: IRControlNet.
        cleaner: stage 1; of the faces, for "unaligned_face".
        output: the folder; there must be none yet, or an empty one. It appears when it is complete.
        background: stage 1 of what is around faces, for "unaligned_face"; stored in `background_cleaner`.
        dtype: of the files written; None keeps that of the checkpoints.
        tokenizer: as of `open_tokenizer`; "none" for none; None asks the hub, and does without if it does not answer.
        configs: arguments of "unet", "controlnet", "vae", "text_encoder", "cleaner" or "background" that replace what
            is read off the shapes (official full-size networks need none).
        ignore: patterns of keys of the Stable Diffusion file that may have no place, beside the known ones.

    Returns:
        The folder. Without a tokenizer it takes `prompt_embeds`, and holds those of the official default prompts.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if there is something in `output`.
        ValueError: for a version without the task, a file of another kind or version, keys that differ.
    """
    release, folder = version_of(version), Path(output)
    checkpoints = release.checkpoints(task)
    if background is not None and checkpoints.background is None:
        raise ValueError(f"Expected no `background` for {task}, got {background}. Only unaligned faces have one.")
    with _folder_at_once(folder) as partial:
        files = {"sd": Path(sd), "controlnet": Path(controlnet), "cleaner": Path(cleaner)}
        if background is not None:
            files["background"] = Path(background)
        parts = _find_parts(release, task, files, configs or {}, ignore)
        length = parts.text_encoder.model.config.max_position_embeddings  # type: ignore[union-attr]
        opened = _open_tokenizer(tokenizer, length=length)  # type: ignore[arg-type]
        _save(parts, release, task, partial, opened, dtype)
        if opened is None:
            _save_prompt_embeds(parts.text_encoder, partial, dtype)
        write_text(partial / "README.md", diffbir_card(folder.name, release, task, files, dtype=dtype))
    return folder


def check_output(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"Expected a new or an empty folder, got {folder}, which holds something. Choose another."
        )


@contextmanager
def _folder_at_once(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place at the end, or vanishes if anything fails."""
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp makes folders private; ours are as any other
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_parts(
    version: Version, task: TaskName, files: Mapping[str, Path], configs: Mapping[str, Config], ignore: Sequence[str]
) -> Parts:
    checkpoints = version.checkpoints(task)
    check_name(files["sd"], version.sd, "sd", version)
    check_name(files["controlnet"], checkpoints.controlnet, "controlnet", version)
    cleaners = {}
    for option, name in (("cleaner", checkpoints.cleaner), ("background", checkpoints.background)):
        kind = FILES[name].cleaner if name is not None else None
        if option in files and kind is not None:
            state, what = read_kind(files[option], kind, option), f"the official {kind} in {files[option]}"
            part = "cleaner" if option == "cleaner" else "background_cleaner"
            cleaners[part] = find_cleaner(state, kind, configs.get(option), what=what)
    state = read_kind(files["controlnet"], "IRControlNet", "controlnet")
    what = f"the official IRControlNet in {files['controlnet']}"
    controlnet = find_controlnet(state, configs.get("controlnet"), what=what)
    state = read_kind(files["sd"], "Stable Diffusion", "sd")
    check_schedule(state, files["sd"], version)
    check_rest(state, (UNET, VAE, TEXT), (*UNUSED, *ignore), what=f"Stable Diffusion in {files['sd']}")
    what = f"the official {{}} in {files['sd']}"
    unet = find_unet(select(state, UNET), configs.get("unet"), what=what.format("UNet"))
    _check_pair(unet, controlnet, files)
    return Parts(
        unet=unet,
        controlnet=controlnet,
        vae=find_vae(select(state, VAE), configs.get("vae"), what=what.format("VAE")),
        text_encoder=find_text_encoder(
            select(state, TEXT), configs.get("text_encoder"), what=what.format("text encoder")
        ),
        **cleaners,
    )


def _check_pair(unet: Network, controlnet: Network, files: Mapping[str, Path]) -> None:
    """Raise ValueError unless the ControlNet's residuals fit the UNet."""
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"):
        theirs, ours = (network.model.config[name] for network in (unet, controlnet))  # type: ignore[index]
        if theirs != ours:
            raise ValueError(
                f"Expected networks that fit, got {name} {theirs} in {files['sd']} and {ours} in {files['controlnet']}."
            )


def _open_tokenizer(source: str | Path | None, *, length: int) -> CLIPTokenizer | None:
    if source == "none":
        return None
    if source is not None:
        return open_tokenizer(source, length=length)
    try:
        return open_tokenizer(HUB_TOKENIZER, length=length)
    except FileNotFoundError:
        logger.warning(f"The tokenizer of {HUB_TOKENIZER} is not at hand; the pipeline is saved without. {WAY_OUT}")
        return None


def _save(
    parts: Parts,
    version: Version,
    task: TaskName,
    folder: Path,
    tokenizer: CLIPTokenizer | None,
    dtype: torch.dtype | None,
) -> None:
    scheduler = official_scheduler(  # the official default, of DiffBIRPipeline.from_pretrained alone too
        version.recommended.sampler, prediction_type=version.prediction_type, rescale_betas_zero_snr=version.zero_snr
    )
    networks = {name: network for name, network in vars(parts).items() if network is not None}
    models = {name: network.model for name, network in networks.items()}
    pipeline = DiffBIRPipeline(
        scheduler=scheduler, tokenizer=tokenizer, release_version=version.name, release_task=task, **models
    )
    for name, network in networks.items():
        network.save(folder / name, dtype)
    scheduler.save_pretrained(folder / "scheduler")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.save_config(folder)


@torch.no_grad()
def _save_prompt_embeds(network: Network, folder: Path, dtype: torch.dtype | None) -> None:
    """Encode the official default prompts, where the text encoder has CLIP's vocabulary."""
    tokens = prompt_tokens()
    if network.tensors and network.model.config.vocab_size <= int(tokens.max()):  # type: ignore[union-attr,operator]
        return
    encoder = network.load(torch.float32)
    embeds: dict[str, Tensor] = dict(zip(PROMPT_TOKENS, encoder(tokens)[0], strict=True))  # (77, width) each
    write_safetensors(folder / PROMPT_EMBEDS_FILE, embeds, dtype=dtype)
