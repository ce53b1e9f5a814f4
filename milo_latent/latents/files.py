"""Files and folders of photos to latents, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError

from milo_latent.checks import ValueWatch
from milo_latent.files import (
    IMAGE_SUFFIXES,
    LATENT_SUFFIXES,
    process_folder,
    read_image,
    read_latents,
    read_latents_metadata,
    write_image,
    write_latents,
)
from milo_latent.latents.codec import VAE, check_tile, decode_latents, encode_image, vae_scale_factor
from milo_latent.resources import available_weights, weights_dir


def vae_folder(source: str | Path) -> Path:
    """Return the folder of the VAE of a shipped set, of a pipeline folder, or of a folder of its own.

    Raises:
        FileNotFoundError: if there is no VAE.
    """
    folder = weights_dir(str(source)) if str(source) in available_weights() else Path(source)
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"Expected a VAE in {source}, found neither vae/config.json nor config.json there.")
    return folder


def load_vae(source: str | Path) -> VAE:
    """Open the VAE of a shipped set, of a pipeline folder, or of a folder of its own, in float32.

    Args:
        source: name or folder.

    Returns:
        `AutoencoderKL` or `AutoencoderTiny`, frozen.

    Raises:
        FileNotFoundError: if there is no VAE.
        ValueError: if it is of another class, damaged, or not whole.
    """
    folder = vae_folder(source)
    name = AutoencoderKL.load_config(folder).get("_class_name")
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if name not in classes:
        raise ValueError(f"Expected a VAE of the classes {sorted(classes)} in {folder}, got {name}.")
    try:
        vae, info = classes[name].from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"Expected the weights of a VAE in {folder}: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"Expected every weight of a VAE in {folder}, missing: {', '.join(info['missing_keys'][:4])}.")
    return vae.eval().requires_grad_(False)


@torch.inference_mode()
def encode_file(
    vae: Callable[[], VAE], photo: Path, output: Path, *, vae_name: str, tile: int | None = None
) -> tuple[int, ...]:
    """Encode a photo into a file of latents, with the photo's size, its padding and the VAE's name and scale in it.

    Args:
        vae: returns the VAE; called once the photo is read.
        photo: any size; its padding to whole cells is undone by `decode_file`.
        output: `.npy` (which holds no metadata) or `.safetensors`.
        vae_name: kept in the file.
        tile: side of the tiles of large photos, in pixels; None encodes whole.

    Returns:
        Shape of the latents, (C, h, w).

    Raises:
        FileNotFoundError: if there is no such photo.
        ValueError: if the photo is damaged, or the suffix of `output` is not one of latents, or `tile` does not fit.
    """
    if output.suffix.lower() not in LATENT_SUFFIXES:
        raise ValueError(f"Expected latents as one of {sorted(LATENT_SUFFIXES)}, got {output.name!r}.")
    image, model = read_image(photo), vae()
    latents = encode_image(model, image, tile=tile)
    factor = vae_scale_factor(model)
    height, width = image.shape[2:]
    metadata = {
        "vae": vae_name,
        "scaling_factor": str(model.config.scaling_factor),
        "shift_factor": str(getattr(model.config, "shift_factor", None) or 0.0),
        "source_size": f"{width}x{height}",
        "padding": f"{latents.shape[3] * factor - width}x{latents.shape[2] * factor - height}",
    }
    write_latents(output, latents, metadata=metadata)
    return tuple(latents.shape[1:])


@torch.inference_mode()
def decode_file(
    vae: Callable[[], VAE],
    latents: Path,
    output: Path,
    *,
    tile: int | None = None,
    watch: ValueWatch | None = None,
) -> tuple[int, int]:
    """Decode a file of latents into an image, cut to the photo's size where the file tells it.

    Args:
        vae: returns the VAE; called once the latents are read.
        latents: `.npy` or `.safetensors`, one image.
        output: image.
        tile: side of the tiles of large images, in pixels; None decodes whole.
        watch: warns of latents of another scale; None warns of each file.

    Returns:
        Width and height of the image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds latents of another VAE.
    """
    tensor, model = read_latents(latents), vae()
    metadata = read_latents_metadata(latents) if latents.suffix.lower() == ".safetensors" else {}
    _check_vae(model, metadata, latents)
    (watch or ValueWatch()).look(str(latents), tensor, latents=True)
    factor = vae_scale_factor(model)
    height, width = _source_size(metadata, (tensor.shape[2] * factor, tensor.shape[3] * factor), latents)
    write_image(output, decode_latents(model, tensor, tile=tile)[..., :height, :width])
    return width, height


def _check_vae(vae: VAE, metadata: dict[str, str], path: Path) -> None:
    """Raise ValueError if the file says that its latents are of a VAE of another scale or shift."""
    for name, words in (("scaling_factor", "scaling factor"), ("shift_factor", "shift factor")):
        own = getattr(vae.config, name, None) or 0.0
        told = metadata.get(name, str(own))
        if told != str(own) and told != str(float(own)):
            raise ValueError(f"Expected latents with the VAE's {words} {own}, {path} says {told}. Use its VAE.")


def _source_size(metadata: dict[str, str], padded: tuple[int, int], path: Path) -> tuple[int, int]:
    """Return the height and width that the photo had before it was padded; those padded where nothing tells."""
    told = metadata.get("source_size")
    if told is None:
        return padded
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", told)
    if sides is None or int(sides[2]) > padded[0] or int(sides[1]) > padded[1]:
        raise ValueError(
            f"Expected `source_size` as WIDTHxHEIGHT of at most {padded[1]}x{padded[0]} in {path}, got {told!r}. "
            "The file does not describe its own latents; encode the photo again."
        )
    return int(sides[2]), int(sides[1])


def encode_folder(
    vae: VAE, photos: Path, output: Path, *, suffix: str, vae_name: str, tile: int | None = None
) -> tuple[int, int]:
    """Encode every photo of a folder; those encoded already are skipped, so an interrupted run goes on.

    Args:
        vae: the VAE.
        photos: folder of images.
        output: folder, made where it is missing; files keep their names, with `suffix`.
        suffix: "npy" or "safetensors".
        vae_name: kept in the files.
        tile: side of the tiles of large photos, in pixels; None encodes whole.

    Returns:
        How many were encoded now, and how many were there.

    Raises:
        FileNotFoundError: if there is no image in the folder.
        ValueError: before the first, if two photos differ in their suffix only or `tile` does not fit; at the end, if
            photos were damaged.
    """
    if tile is not None:
        check_tile(vae, tile)
    return process_folder(
        photos,
        output,
        lambda path, latents: encode_file(lambda: vae, path, latents, vae_name=vae_name, tile=tile),
        inputs=IMAGE_SUFFIXES,
        suffix=suffix,
        unit="photos",
    )


def decode_folder(vae: VAE, latents: Path, output: Path, *, tile: int | None = None) -> tuple[int, int]:
    """Decode every file of latents of a folder into a PNG; those decoded already are skipped.

    Args:
        vae: the VAE.
        latents: folder of `.npy` and `.safetensors`.
        output: folder, made where it is missing.
        tile: side of the tiles of large images, in pixels; None decodes whole.

    Returns:
        How many were decoded now, and how many were there.

    Raises:
        FileNotFoundError: if there are no latents in the folder.
        ValueError: before the first, if two files differ in their suffix only or `tile` does not fit; at the end, if
            files were damaged or of another VAE.
    """
    if tile is not None:
        check_tile(vae, tile)
    watch = ValueWatch()
    return process_folder(
        latents,
        output,
        lambda path, image: decode_file(lambda: vae, path, image, tile=tile, watch=watch),
        inputs=LATENT_SUFFIXES,
        suffix="png",
        unit="latents",
    )
