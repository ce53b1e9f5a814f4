"""Files of photos to files of latents, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from milo_latent import __version__
from milo_latent.batches import Batches
from milo_latent.checks import ValueWatch, check_apart, shortened
from milo_latent.files import (
    EXIF_SUFFIXES,
    LATENT_SUFFIXES,
    check_output,
    read_image,
    read_latents,
    read_latents_metadata,
    write_image,
    write_latents,
)
from milo_latent.jobs import Jobs, Report, run_jobs
from milo_latent.latents.codec import check_tile, decode_latents, encode_image, vae_scale_factor
from milo_latent.latents.spaces import KINDS, VAE, LatentSpace
from milo_latent.provenance import weights_digest
from milo_latent.resources import find_weights
from milo_latent.structure import open_network, read_json
from milo_latent.threads import alone_if_large, thread_count


def vae_folder(source: str | Path) -> Path:
    """Return the folder of a VAE, given the name of shipped weights, a pipeline's folder or the VAE's own.

    Raises:
        FileNotFoundError: if there is no VAE.
    """
    folder = find_weights(source)
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"Expected a VAE in {source}, found neither vae/config.json nor config.json there.")
    return folder


def load_vae(source: str | Path) -> VAE:
    """Load a VAE in float32, frozen.

    Args:
        source: the name of shipped weights, a pipeline's folder, or the VAE's own folder.

    Raises:
        FileNotFoundError: if there is no VAE.
        ValueError: if the VAE is of an unknown class, damaged or incomplete.
    """
    folder = vae_folder(source)
    name = read_json(folder / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"Expected a VAE of the classes {sorted(KINDS)} in {folder}, got {shortened(name)}.")
    return open_network(getattr(diffusers, name), folder).eval().requires_grad_(False)


@torch.inference_mode()
def encode_file(vae: VAE, photo: Path, output: Path, *, vae_name: str, tile: int | None = None) -> tuple[int, ...]:
    """Encode a photo into a file of latents; `.safetensors` also stores the photo's size and the VAE's name and scale.

    The photo is padded to whole latent cells, which `decode_file` undoes.

    Returns:
        Shape of the latents, (C, h, w).

    Raises:
        FileNotFoundError: if there is no such photo.
        ValueError: if the photo is damaged, `output` is the photo or of another suffix, or `tile` does not fit the VAE.
    """
    check_output(output, LATENT_SUFFIXES)
    check_apart(output, photo)
    image = read_image(photo)
    height, width = image.shape[2:]
    with alone_if_large(height * width):
        latents = encode_image(vae, image, tile=tile)
    return _write_encoded(vae, latents, output, size=(height, width), vae_name=vae_name)


def _write_encoded(vae: VAE, latents: Tensor, output: Path, *, size: tuple[int, int], vae_name: str) -> tuple[int, ...]:
    """Write the latents, (1, C, h, w), of a photo of `size`; return their shape, (C, h, w)."""
    factor, (height, width) = vae_scale_factor(vae), size
    metadata = {
        "vae": vae_name,
        **LatentSpace(vae).describe(),
        "source_size": f"{width}x{height}",
        "padding": f"{latents.shape[3] * factor - width}x{latents.shape[2] * factor - height}",
    }
    write_latents(output, latents, metadata=metadata)
    return tuple(latents.shape[1:])


@torch.inference_mode()
def decode_file(
    vae: VAE,
    latents: Path,
    output: Path,
    *,
    tile: int | None = None,
    watch: ValueWatch | None = None,
    text: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """Decode a file of latents into an image, cropped to the photo's size if the file stores it.

    Args:
        vae: decodes.
        latents: `.npy` or `.safetensors`, with the latents of one image.
        output: an image file.
        tile: as of `decode_latents`.
        watch: warns once if the latents of several files have an unusual scale; None warns for this file.
        text: that of `write_image`, left out where the format of `output` holds none.

    Returns:
        Width and height of the image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds latents of another VAE, or is `output` itself.
    """
    check_apart(output, latents)
    tensor, metadata = read_latents(latents), read_latents_metadata(latents)
    for name, own in LatentSpace(vae).describe().items():
        stored = metadata.get(name, own)
        if stored != own and not (name.endswith("factor") and stored == str(float(own))):
            words = name.replace("_", " ")
            raise ValueError(
                f"Expected latents with the VAE's {words} {own}, {latents} says {shortened(stored)}. Use its VAE."
            )
    (watch or ValueWatch()).look(str(latents), tensor, latents=True)
    factor = vae_scale_factor(vae)
    height, width = _source_size(metadata, (tensor.shape[2] * factor, tensor.shape[3] * factor), latents)
    with alone_if_large(height * width):
        image = decode_latents(vae, tensor, tile=tile)[..., :height, :width]
    write_image(output, image, text=text if output.suffix.lower() in EXIF_SUFFIXES else None)
    return width, height


def _source_size(metadata: dict[str, str], padded: tuple[int, int], path: Path) -> tuple[int, int]:
    """Return the height and width of the photo before padding, or the padded ones if the file does not store them."""
    stored = metadata.get("source_size")
    if stored is None:
        return padded
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", stored)
    if sides is None or int(sides[2]) > padded[0] or int(sides[1]) > padded[1]:
        raise ValueError(
            f"Expected `source_size` as WIDTHxHEIGHT of at most {padded[1]}x{padded[0]} in {path}, got "
            f"{shortened(stored)!r}. The file does not describe its own latents; encode the photo again."
        )
    return int(sides[2]), int(sides[1])


def encode_files(
    vae: VAE, jobs: Jobs, *, vae_name: str, tile: int | None = None, batch: int = 1, progress: bool = True
) -> Report:
    """Encode photos by `encode_file`; the report holds the shapes of their latents.

    Args:
        vae: encodes.
        jobs: photos, and files of latents.
        vae_name: goes into the files.
        tile: as of `encode_image`.
        batch: how many photos of one size to encode at once, as far as they are small, which is faster; the last
            digits of the latents then depend on what was encoded together.
        progress: whether to show a bar.

    Raises:
        ValueError: for tiles that do not fit the VAE, a batch below 1, or both together, before the first photo.
    """
    if tile is not None:
        check_tile(vae, tile)
        if batch > 1:
            raise ValueError(f"Expected a batch of 1 with tiles, got {batch} with tile {tile}.")
    if batch > 1:
        vae.to(memory_format=torch.channels_last)
    batches = Batches(batch, torch.inference_mode()(partial(encode_image, vae)))

    def work(photo: Path, output: Path) -> tuple[int, ...]:
        if batch == 1:
            return encode_file(vae, photo, output, vae_name=vae_name, tile=tile)
        read, latents = batches(photo)
        height, width = read.image.shape[2:]
        return _write_encoded(vae, latents, output, size=(height, width), vae_name=vae_name)

    made = {"weights": weights_digest({"vae": vae}), "vae": vae_name, "tile": tile}
    threads = thread_count(vae.device) if batch == 1 else 1  # a batch keeps all cores busy
    return run_jobs(jobs, work, made=made, unit="photo", progress=progress, threads=threads, expect=batches.expect)


def decode_files(vae: VAE, jobs: Jobs, *, vae_name: str, tile: int | None = None, progress: bool = True) -> Report:
    """Decode files of latents by `decode_file` into images that say so; the report holds their sizes.

    Raises:
        ValueError: for tiles that do not fit the VAE, before the first file.
    """
    if tile is not None:
        check_tile(vae, tile)
    watch, made = ValueWatch(), {"weights": weights_digest({"vae": vae}), "tile": tile}
    text = {"Software": f"milo_latent {__version__}", "milo_latent": json.dumps({"vae": vae_name, **made})}

    def work(latents: Path, image: Path) -> tuple[int, int]:
        return decode_file(vae, latents, image, tile=tile, watch=watch, text=text)

    return run_jobs(jobs, work, made=made, unit="file", progress=progress, threads=thread_count(vae.device))
