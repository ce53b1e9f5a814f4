"""The official MILO checkpoints: where they are, fetched and checked; converted; described."""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from milo_latent.files import write_text
from milo_latent.metric.network import MILO
from milo_latent.resources import available_weights, cache_dir, weights_dir

CARD = """\
# {name}

MILO ({kind}), converted from the official checkpoint `{file}` (SHA-256 `{digest}`) without any change of value.

Source: repository ugurcogalan06/MILO; Cogalan, Bemana, Myszkowski, Seidel, Groth, "MILO: A Lightweight Perceptual
Quality Metric for Image and Latent-Space Optimization", ACM TOG 44(6), 2025. Licence: {licence}

Raw error: 0 = identical, unbounded above. Quality: 0 = identical, towards 1 = worst.
"""
LICENCE = (
    "the snapshot these files are from holds no licence file; third parties state that upstream is Apache-2.0. "
    "Whether you may use them is for you to decide."
)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A checkpoint that can be fetched: its file name, its public address and its SHA-256."""

    file: str
    url: str
    digest: str


ADDRESS = "https://raw.githubusercontent.com/ugurcogalan06/MILO/a54e50e9cd1aaaefd6fddfacacc1427f8387af1c/weights/"
OFFICIAL = {
    "official-image": OfficialCheckpoint(
        "MILO.pth", ADDRESS + "MILO.pth", "a1d66a7e0ebe0f839564ad70160ffdec709708f0b9a7dd03b19c0bee90d31f79"
    ),
    "official-latent": OfficialCheckpoint(
        "MILO_latent.pth",
        ADDRESS + "MILO_latent.pth",
        "639448793a4e2a41614cd1ed7fb97234533ba2d02fa2c18f94909ca44fc169b3",
    ),
}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pull(name: str) -> Path:
    """Fetch an official checkpoint into the cache, check its hash, convert it; from then on `name` is at hand.

    Args:
        name: one of `OFFICIAL`.

    Returns:
        The folder with safetensors, configuration and card.

    Raises:
        ValueError: for another name, or a file whose hash is not the recorded one; it is not kept.
        OSError: if the network or the disk fails.
    """
    if name not in OFFICIAL:
        raise ValueError(f"Expected one of {', '.join(OFFICIAL)}, got {name!r}.")
    checkpoint, folder = OFFICIAL[name], cache_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (checkpoint.file + ".partial")
    try:
        with urllib.request.urlopen(checkpoint.url, timeout=60) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        if sha256(partial) != checkpoint.digest:
            raise ValueError(
                f"Expected SHA-256 {checkpoint.digest} of {checkpoint.url}, got {sha256(partial)}. Not kept."
            )
        fetched = partial.rename(folder / checkpoint.file)
    except urllib.error.URLError as error:
        raise OSError(
            f"Could not fetch {checkpoint.url}: {error.reason}. "
            "Download it by hand, then: milo-latent weights convert FILE -o FOLDER"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    convert(fetched, folder)
    fetched.unlink()
    return folder


def convert(path: str | Path, folder: str | Path) -> Path:
    """Convert an official `.pth` to a folder of safetensors, configuration and card, without any change of value.

    Args:
        path: the official file.
        folder: made where it is missing.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no official MILO checkpoint.
    """
    path, folder = Path(path), Path(folder)
    metric = MILO.from_official(path)
    metric.save_pretrained(folder)
    kind = f"MILO_L, {metric.config.latent_space} latents" if metric.config.latent_space else "MILO_I, images"
    card = CARD.format(name=folder.name, kind=kind, file=path.name, digest=sha256(path), licence=LICENCE)
    write_text(folder / "README.md", card)
    return folder


def describe(source: str) -> str:
    """Return what there is to know of a metric's weights.

    Args:
        source: name, folder or official file.

    Returns:
        Lines of text.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is not MILO.
    """
    metric = MILO.from_pretrained(source)
    config = metric.config
    path = weights_dir(source) if source in available_weights() else Path(source)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    space = f"MILO_L, latents of {config.latent_space}" if config.latent_space else "MILO_I, images in [0, 1]"
    lines = [
        f"{source}: {space}",
        f"channels {config.channels}, levels {config.levels}, scaling factor {config.scaling_factor}",
        f"parameters {sum(parameter.numel() for parameter in metric.parameters())}",
    ]
    return "\n".join([*lines, *(f"{file.name} in {file.parent.name}: SHA-256 {sha256(file)}" for file in files)])
