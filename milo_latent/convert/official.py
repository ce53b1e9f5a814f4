"""Official MILO checkpoints to folders of safetensors; what a set of weights is, and whether its files are intact."""

from __future__ import annotations

import re
from pathlib import Path

from milo_latent.atomic import folder_at_once
from milo_latent.metric.card import write_card
from milo_latent.metric.loading import OFFICIAL, weights_path
from milo_latent.metric.network import MILO, is_image_metric
from milo_latent.resources import sha256

ORIGIN = """\
Converted from {source} `{file}` (SHA-256 `{digest}`) without any change of value.

Source: repository ugurcogalan06/MILO; Cogalan, Bemana, Myszkowski, Seidel, Groth, "MILO: A Lightweight Perceptual
Quality Metric for Image and Latent-Space Optimization", ACM TOG 44(6), 2025. The official weights are licensed under
Apache-2.0, copyright 2025 Uğur Çoğalan, Mojtaba Bemana, Karol Myszkowski, Hans-Peter Seidel, Colin Groth."""


def convert(path: str | Path, folder: str | Path, *, official: bool = True) -> Path:
    """Convert an official `.pth` to a folder of safetensors, configuration and card, without any change of value.

    Args:
        path: the official file.
        folder: new or empty; it appears when it is complete.
        official: refuse a file whose hash is that of no official checkpoint; False takes any of the same layout.

    Returns:
        The folder.

    Raises:
        FileExistsError: if there is something in `folder`.
        FileNotFoundError: if there is no such file.
        OSError: if the disk is full; nothing is left behind.
        ValueError: if it is no official MILO checkpoint.
    """
    path, folder = Path(path), Path(folder)
    metric = MILO.from_official(path)
    digest = sha256(path)
    known = digest in {file.digest for file in OFFICIAL.values()}
    if official and not known:
        expected = ", ".join(f"{name} {file.digest}" for name, file in OFFICIAL.items())
        raise ValueError(
            f"Expected the SHA-256 of an official checkpoint ({expected}), got {digest} of {path}: the file was "
            "changed, or is of another training. Fetch it again, or pass --unofficial to convert it anyway."
        )
    source = "the official checkpoint" if known else "a checkpoint of the layout of the official ones,"
    with folder_at_once(folder) as partial:
        metric.save_pretrained(partial)
        write_card(metric, partial, origin=ORIGIN.format(source=source, file=path.name, digest=digest))
    return folder


def check_hashes(folder: Path) -> list[str]:
    """Compare the weight files of a folder with the hashes that its card gives.

    Args:
        folder: with a card, `README.md`, whose tables give a SHA-256 behind each file.

    Returns:
        A line for each weight file: its hash, and whether the card gives the same.

    Raises:
        ValueError: if a file is not the one that the card describes, or is missing.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    recorded = dict(re.findall(r"`([\w/.-]+\.safetensors)`[^`\n]*`([0-9a-f]{64})`", text))
    found = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*.safetensors"))}
    for name, digest in recorded.items():
        if found.get(name) != digest:
            raise ValueError(
                f"Expected SHA-256 {digest} of {folder / name}, as its card says, got {found.get(name, 'no file')}. "
                "Do not use these weights: install or convert them again."
            )
    return [
        f"{name}: SHA-256 {digest}, {'as its card says' if name in recorded else 'not in a card'}"
        for name, digest in found.items()
    ]


def describe(source: str) -> str:
    """Return lines of text that describe a metric's weights.

    Args:
        source: as of `MILO.from_pretrained`.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        OSError: if official weights cannot be fetched.
        ValueError: if the weights are not those of a MILO, or a file is not the one that its card describes.
    """
    path = weights_path(source)
    hashes = [f"{path.name}: SHA-256 {sha256(path)}"] if path.is_file() else check_hashes(path)
    metric = MILO.from_pretrained(source)
    config = metric.config
    latents = f"MILO_L, latents of {config.latent_space or 'a VAE without a name'}"
    space = "MILO_I, images in [0, 1]" if is_image_metric(metric) else latents
    lines = [
        f"{source}: {space}",
        f"channels {config.channels}, levels {config.levels}, scaling factor {config.scaling_factor}",
        f"parameters {sum(parameter.numel() for parameter in metric.parameters())}",
    ]
    return "\n".join([*lines, *hashes])
