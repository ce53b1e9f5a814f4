"""Fetch official checkpoints: resumed where it was interrupted, complete or not there."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm.auto import tqdm

from milo_latent.convert.diffbir import check_output, convert_diffbir
from milo_latent.diffbir.versions import FILES, TaskName, VersionName, version_of
from milo_latent.resources import cache_dir

HUB = "https://huggingface.co"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without an answer


def downloads_dir() -> Path:
    """Return the folder that official checkpoints are fetched into, in the cache of the weights that are pulled."""
    return cache_dir() / "official"


def official_files(version: VersionName, task: TaskName) -> dict[str, str]:
    """Return what is needed, as arguments of `convert_diffbir` to names in `FILES`.

    Raises:
        ValueError: if the version has no such task.
    """
    release = version_of(version)
    checkpoints = release.checkpoints(task)
    names = {"sd": release.sd, "controlnet": checkpoints.controlnet, "cleaner": checkpoints.cleaner}
    return names | ({"background": checkpoints.background} if checkpoints.background is not None else {})


def pull_files(version: VersionName, task: TaskName, folder: str | Path | None = None) -> dict[str, Path]:
    """Fetch the official checkpoints of a version and task; those at hand are left alone.

    Args:
        version: "v1", "v2" or "v2.1".
        task: of it.
        folder: where they are kept; None takes `downloads_dir()`.

    Returns:
        Files, as arguments of `convert_diffbir`.

    Raises:
        ValueError: if the version has no such task.
        OSError: if the network or the disk fails; what was fetched is kept, and the next call goes on from there.
    """
    names = official_files(version, task)
    target = downloads_dir() if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return {part: fetch(FILES[name].url, target / FILES[name].file) for part, name in names.items()}


def fetch(url: str, path: Path) -> Path:
    """Fetch a file, going on with what an interrupted call left.

    Args:
        url: its address; `HF_ENDPOINT` replaces the hub's by that of a mirror.
        path: where it appears when it is complete; until then it is `path` with `.partial` behind.

    Returns:
        `path`.

    Raises:
        OSError: if it cannot be fetched; the message names the file and where to put it.
    """
    if path.is_file():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise _failure(url, path, "HF_HUB_OFFLINE is set")
    address = url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), 1)
    partial = path.with_name(path.name + ".partial")
    try:
        _append(address, partial)
    except urllib.error.HTTPError as error:
        raise _failure(url, path, f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _failure(url, path, str(error.reason)) from error
    except (TimeoutError, ConnectionError, HTTPException) as error:
        raise _failure(url, path, f"{type(error).__name__}; the part that came is kept") from error
    partial.replace(path)
    return path


def _append(address: str, partial: Path) -> None:
    """Fetch what `partial` lacks; raise ConnectionError if fewer bytes come than were announced."""
    present = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={present}-"} if present else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").rpartition("/")[2] == str(present):
            return  # nothing is lacking
        raise
    with response:
        resumed = response.status == 206 if response.status else False
        start = present if resumed else 0  # a server without ranges sends everything again
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        if total is not None and shutil.disk_usage(partial.parent).free < total - start:
            raise OSError(f"Expected {total - start} free bytes for {partial.name}, got fewer in {partial.parent}.")
        _copy(response, partial, start, total)
    came = partial.stat().st_size
    if total is not None and came < total:
        raise ConnectionError(f"{came} of {total} bytes came")


def _copy(response: object, partial: Path, start: int, total: int | None) -> None:
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=partial.name.removesuffix(".partial"))
    with bar, partial.open("ab" if start else "wb") as file:
        while chunk := response.read(CHUNK):  # type: ignore[attr-defined]
            file.write(chunk)
            bar.update(len(chunk))


def _failure(url: str, path: Path, reason: str) -> OSError:
    return OSError(f"Could not fetch {url}: {reason}. Download it by hand and put it at {path}, then try again.")


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
        task: of it.
        output: as of `convert_diffbir`.
        downloads: as `folder` of `pull_files`.
        dtype: as of `convert_diffbir`.
        tokenizer: as of `convert_diffbir`.

    Returns:
        The fetched files.

    Raises:
        FileExistsError: if there is something in `output`; nothing is fetched then.
        ValueError: if the version has no such task, or the files are not what they should be.
        OSError: if the network or the disk fails.
    """
    check_output(Path(output))
    files = pull_files(version, task, downloads)
    convert_diffbir(version, task, **files, output=output, dtype=dtype, tokenizer=tokenizer)  # type: ignore[arg-type]
    return files


def describe_files(files: Mapping[str, Path]) -> str:
    """Return the files and their size, in a line."""
    size = sum(path.stat().st_size for path in files.values()) / 2**30
    return f"{', '.join(path.name for path in files.values())} ({size:.1f} GiB)"
