"""The official MILO checkpoints: where they are, fetched and checked; converted; described."""

from __future__ import annotations

import hashlib
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from milo_latent.files import write_text
from milo_latent.metric.network import MILO, is_image_metric
from milo_latent.resources import available_weights, cache_dir, weights_dir

CARD = """\
# {name}

MILO ({kind}), converted from {origin} `{file}` (SHA-256 `{digest}`) without any change of value.

| file | size | SHA-256 |
| --- | ---: | --- |
| `{weights}` | {size:.2f} MB | `{weights_digest}` |

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


def convert(path: str | Path, folder: str | Path, *, official: bool = True) -> Path:
    """Convert an official `.pth` to a folder of safetensors, configuration and card, without any change of value.

    Args:
        path: the official file.
        folder: made where it is missing.
        official: refuse a file whose hash is that of no official checkpoint; False takes any laid out like one.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no official MILO checkpoint.
    """
    path, folder = Path(path), Path(folder)
    metric = MILO.from_official(path)
    digest = sha256(path)
    known = digest in {checkpoint.digest for checkpoint in OFFICIAL.values()}
    if official and not known:
        expected = ", ".join(f"{each.file} {each.digest}" for each in OFFICIAL.values())
        raise ValueError(
            f"Expected the SHA-256 of an official checkpoint ({expected}), got {digest} of {path}: changed, or another "
            "training. Fetch it again, or pass --unofficial if it is meant."
        )
    metric.save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    card = CARD.format(
        name=folder.name,
        kind="MILO_I, images" if is_image_metric(metric) else f"MILO_L, {metric.config.latent_space} latents",
        origin="the official checkpoint" if known else "a checkpoint laid out like the official ones,",
        file=path.name,
        digest=digest,
        weights=weights.name,
        size=weights.stat().st_size / 1e6,
        weights_digest=sha256(weights),
        licence=LICENCE,
    )
    write_text(folder / "README.md", card)
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
                "Do not use it: install or pull these weights again."
            )
    return [
        f"{name}: SHA-256 {digest}, {'as its card says' if name in recorded else 'not in a card'}"
        for name, digest in found.items()
    ]


def describe(source: str) -> str:
    """Return what there is to know of a metric's weights.

    Args:
        source: name, folder or official file.

    Returns:
        Lines of text.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is not MILO, or a file is not the one that its card describes.
    """
    path = weights_dir(source) if source in available_weights() else Path(source)
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
