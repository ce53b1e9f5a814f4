"""Fetch the official DiffBIR checkpoints, check them against what is published of them, and convert them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from milo_latent.atomic import check_new_folder
from milo_latent.convert.diffbir import convert_diffbir
from milo_latent.diffbir.versions import FILES, TaskName, VersionName, version_of
from milo_latent.resources import cache_dir, sha256

HUB_ADDRESS = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
PUBLISHED = {  # the SHA-256 of a file, else its size as the hub writes it; for v1_face and v1_general neither was found
    # the hub's pages of the file, and of the copies of Stability AI's own repository, which was taken down
    "sd_v2.1": "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36",
    "v2.1": "49477de737be9028ac2d9352cf45633324a0090afde57a7aa358321dd6a1de53",
    "swinir_face": "62fb6605702e6ad35712299a23cc19ea7cd2fb4bbd50a8080fcefa8ad2620c71",
    "swinir_general": "577b8f84815d324e5ee17ef3c85d8bc9b7ebd05b20a6d61a5452b66e7e24dcaf",
    # the hub's page of a copy, camenduru/DiffBIR-v2
    "v2": "c023992d042a4e966a335b084fae7a4e38b3ac3d0df819398c839ff371ebaba5",
    # several projects on GitHub that fetch these release files
    "bsrnet": "fa633d80ff4db5a546740ae8e3baebe925fc84d3c03e3e9002493acc5e88c3ec",
    "scunet_psnr": "fa78899ba2caec9d235a900e91d96c689da71c42029230c2028b00f09f809c2e",
    # the hub's list of files of lxq007/DiffBIR-v2
    "sd_v2.1_zsnr": "5.16 GB",
    "swinir_realesrgan": "90.2 MB",
}


def downloads_dir() -> Path:
    """Return the folder in the cache that official checkpoints are fetched into."""
    return cache_dir() / "official"


def official_files(version: VersionName, task: TaskName) -> dict[str, str]:
    """Return what a version takes for one of its tasks: arguments of `convert_diffbir` to names in `FILES`."""
    release = version_of(version)
    names = {"sd": release.sd, **vars(release.checkpoints(task))}
    return {part: name for part, name in names.items() if name is not None}


def fetch(name: str, folder: Path) -> Path:
    """Fetch an official checkpoint unless it is in the folder already, and check it.

    What comes from the hub is of the commit and has the SHA-256 that the hub names at the start, also where none is
    published here. An interrupted download from there is resumed by the next call. `HF_ENDPOINT` names a mirror.

    Args:
        name: of the checkpoint, in `FILES`.
        folder: where the file is kept under its official name.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be fetched; the message says where to put it by hand.
        ValueError: if the file is not the published one.
    """
    file, path = FILES[name], folder / FILES[name].file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _download(file.url, path)
        except Exception as error:  # each library, and each release of it, has kinds of its own
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(
                f"Could not fetch {file.url}: {reason} Download it by hand and put it at {path}, then try again."
            ) from error
    _check_published(name, path)
    return path


def _download(url: str, path: Path) -> None:
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set.")
    on_hub = HUB_ADDRESS.fullmatch(url)
    if on_hub is None:
        torch.hub.download_url_to_file(url, str(path))
        return
    repository, revision, file = on_hub.groups()
    told = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
    hf_hub_download(repository, file, revision=told.commit_hash or revision, local_dir=path.parent)
    if len(told.etag or "") == 64 and sha256(path) != told.etag:  # the hub tags large files with their SHA-256
        path.unlink()
        raise ValueError(f"The hub tells of a file with the SHA-256 {told.etag}, and sent another, which is not kept.")


def _check_published(name: str, path: Path) -> None:
    expected = PUBLISHED.get(name, "")
    if len(expected) == 64:
        found, what = sha256(path), "SHA-256"
    else:
        size = path.stat().st_size
        found, what = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB", "a size of"
    if expected and found != expected:
        raise ValueError(
            f"Expected {what} {expected} of the official {path.name}, got {found} in {path}: it is damaged or another "
            "file, such as an error page. Delete it, and it is fetched again."
        )


def pull_diffbir(
    version: VersionName,
    task: TaskName,
    *,
    output: str | Path,
    downloads: str | Path | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Path]:
    """Fetch the official checkpoints of a version and task, and convert them.

    Args:
        version: "v1", "v2" or "v2.1".
        task: one of the version's tasks.
        output: as of `convert_diffbir`.
        downloads: the folder where the fetched files are kept; None takes `downloads_dir()`.
        dtype: as of `convert_diffbir`.
        tokenizer: as of `convert_diffbir`.

    Returns:
        The fetched files, by argument of `convert_diffbir`.

    Raises:
        FileExistsError: if there is something in `output`; nothing is fetched then.
        ValueError: if the version has no such task, or the files are not what they should be.
        OSError: if the network or the disk fails.
    """
    check_new_folder(Path(output))
    folder = downloads_dir() if downloads is None else Path(downloads)
    files = {part: fetch(name, folder) for part, name in official_files(version, task).items()}
    convert_diffbir(version, task, **files, output=output, dtype=dtype, tokenizer=tokenizer)  # type: ignore[arg-type]
    return files
