"""Files and folders of photos to latents, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm.auto import tqdm

from milo_latent.codec import VAE, decode_latents, encode_image
from milo_latent.files import (
    IMAGE_SUFFIXES,
    LATENT_SUFFIXES,
    read_image,
    read_latents,
    read_latents_metadata,
    write_image,
    write_latents,
)
from milo_latent.resources import available_weights, weights_dir


def load_vae(source: str | Path) -> VAE:
    """Open the VAE of a shipped set, of a pipeline folder, or of a folder of its own, in float32.

    Args:
        source: name or folder.

    Returns:
        `AutoencoderKL` or `AutoencoderTiny`, frozen.

    Raises:
        FileNotFoundError: if there is no VAE.
        ValueError: if it is of another class.
    """
    folder = weights_dir(str(source)) if str(source) in available_weights() else Path(source)
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"Expected a VAE in {source}, found neither vae/config.json nor config.json there.")
    name = AutoencoderKL.load_config(folder).get("_class_name")
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if name not in classes:
        raise ValueError(f"Expected a VAE of the classes {sorted(classes)} in {folder}, got {name}.")
    return classes[name].from_pretrained(folder).eval().requires_grad_(False)


@torch.inference_mode()
def encode_file(vae: Callable[[], VAE], photo: Path, output: Path, *, vae_name: str) -> tuple[int, ...]:
    """Encode a photo into a file of latents, with the photo's size and the VAE's name and scale beside them.

    Args:
        vae: returns the VAE; called once the photo is read.
        photo: any size; its padding to whole cells is undone by `decode_file`.
        output: `.npy` (which holds no metadata) or `.safetensors`.
        vae_name: kept in the file.

    Returns:
        Shape of the latents, (C, h, w).

    Raises:
        FileNotFoundError: if there is no such photo.
        ValueError: if the photo is damaged, or the suffix of `output` is not one of latents.
    """
    if output.suffix.lower() not in LATENT_SUFFIXES:
        raise ValueError(f"Expected latents as one of {sorted(LATENT_SUFFIXES)}, got {output.name!r}.")
    image, model = read_image(photo), vae()
    latents = encode_image(model, image)
    metadata = {
        "vae": vae_name,
        "scaling_factor": str(model.config.scaling_factor),
        "shift_factor": str(getattr(model.config, "shift_factor", None) or 0.0),
        "source_size": f"{image.shape[3]}x{image.shape[2]}",
    }
    write_latents(output, latents, metadata=metadata)
    return tuple(latents.shape[1:])


@torch.inference_mode()
def decode_file(vae: Callable[[], VAE], latents: Path, output: Path) -> tuple[int, int]:
    """Decode a file of latents into an image, cut to the photo's size where the file tells it.

    Args:
        vae: returns the VAE; called once the latents are read.
        latents: `.npy` or `.safetensors`, one image.
        output: image.

    Returns:
        Width and height of the image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds latents of another VAE.
    """
    tensor, model = read_latents(latents), vae()
    metadata = read_latents_metadata(latents) if latents.suffix.lower() == ".safetensors" else {}
    told, own = metadata.get("scaling_factor"), str(model.config.scaling_factor)
    if told is not None and told != own:
        raise ValueError(f"Expected latents with the VAE's scaling factor {own}, {latents} says {told}. Use its VAE.")
    image = decode_latents(model, tensor)
    if "source_size" in metadata:
        width, height = map(int, metadata["source_size"].split("x"))
        image = image[..., :height, :width]
    write_image(output, image)
    return image.shape[3], image.shape[2]


def encode_folder(vae: VAE, photos: Path, output: Path, *, suffix: str, vae_name: str) -> tuple[int, int]:
    """Encode every photo of a folder; those encoded already are skipped, so an interrupted run goes on.

    Args:
        vae: the VAE.
        photos: folder of images.
        output: folder, made where it is missing; files keep their names, with `suffix`.
        suffix: "npy" or "safetensors".
        vae_name: kept in the files.

    Returns:
        How many were encoded now, and how many were there.

    Raises:
        FileNotFoundError: if there is no image in the folder.
        ValueError: if a photo is damaged, or two differ in their suffix only.
    """
    paths = _files(photos, IMAGE_SUFFIXES)
    return _each(paths, output, suffix, lambda path, to: encode_file(lambda: vae, path, to, vae_name=vae_name))


def decode_folder(vae: VAE, latents: Path, output: Path) -> tuple[int, int]:
    """Decode every file of latents of a folder into a PNG; those decoded already are skipped.

    Args:
        vae: the VAE.
        latents: folder of `.npy` and `.safetensors`.
        output: folder, made where it is missing.

    Returns:
        How many were decoded now, and how many were there.

    Raises:
        FileNotFoundError: if there are no latents in the folder.
        ValueError: if a file is damaged or of another VAE, or two differ in their suffix only.
    """
    paths = _files(latents, LATENT_SUFFIXES)
    return _each(paths, output, "png", lambda path, to: decode_file(lambda: vae, path, to))


def _files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        raise FileNotFoundError(f"Expected files of {sorted(suffixes)} in {folder}, found none.")
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(f"Expected each name once in {folder}, whatever its suffix; two would become one file.")
    return paths


def _each(paths: list[Path], output: Path, suffix: str, work: Callable[[Path, Path], object]) -> tuple[int, int]:
    output.mkdir(parents=True, exist_ok=True)
    left = [path for path in paths if not (output / f"{path.stem}.{suffix}").exists()]
    for path in tqdm(left, unit="file", disable=len(left) < 2):
        work(path, output / f"{path.stem}.{suffix}")
    return len(left), len(paths) - len(left)
