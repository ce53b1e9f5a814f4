"""Photos to train restorers on: folders, folders of pairs, Hugging Face data sets, webdataset shards."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from milo_latent.datasets import open_dataset
from milo_latent.files import IMAGE_SUFFIXES, read_image
from milo_latent.pictures import picture_to_tensor
from milo_latent.training.data.crops import list_images

DEGRADED_SUFFIX = ".lq"  # of the degraded half in a shard: photo.lq.png beside photo.png
CAPTION_COLUMNS = ("file_name", "text")  # of a caption file, as in Hugging Face's image folders


@dataclass(frozen=True)
class Photo:
    """One photo to train on.

    Args:
        name: identifies the photo within its source; its degradation is drawn from it.
        clean: (3, H, W), in [0, 1].
        degraded: (3, H', W'), the other half of a pair; None for photos that are degraded on the fly.
        caption: what the photo shows; empty where nothing is known.
    """

    name: str
    clean: Tensor
    degraded: Tensor | None = None
    caption: str = ""


class PhotoSource(Protocol):
    """A sequence of photos that are read when they are asked for."""

    def __len__(self) -> int:
        """Return the number of photos."""

    def __getitem__(self, index: int) -> Photo:
        """Read one photo."""


class FolderSource:
    """The photos of folders, or pairs of a clean and a degraded file of one name.

    Args:
        folders: clean images.
        degraded: folder with a degraded file for each photo, of the same name but for the suffix.
        captions: CSV file with the columns `file_name` and `text`.

    Raises:
        FileNotFoundError: if a folder or a file is missing, or there is no image.
        ValueError: if a photo misses its other half, or the caption file its columns.
    """

    def __init__(
        self, folders: Sequence[str | Path], *, degraded: Path | None = None, captions: Path | None = None
    ) -> None:
        self.paths = list_images(folders)
        halves = {} if degraded is None else {path.stem: path for path in list_images([degraded])}
        missing = [path.name for path in self.paths if degraded is not None and path.stem not in halves]
        if missing:
            raise ValueError(
                f"Expected a degraded file in {degraded} for every photo, got none for {len(missing)} of them, such as "
                f"{missing[0]}. Add it, or remove the photo."
            )
        self.degraded = [halves.get(path.stem) for path in self.paths]
        self.captions = {} if captions is None else read_captions(captions)

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Photo:
        """Read one photo."""
        path, degraded = self.paths[index], self.degraded[index]
        half = None if degraded is None else read_image(degraded)[0]
        return Photo(path.name, read_image(path)[0], half, self.captions.get(path.name, ""))


class DatasetSource:
    """The rows of a Hugging Face data set.

    Args:
        name: folder written by `Dataset.save_to_disk`, or the data set's id on the hub.
        split: such as "train".
        image_column: column of clean images.
        degraded_column: column of degraded images; None degrades on the fly.
        caption_column: column of captions; None leaves them empty.

    Raises:
        ImportError: without the library `datasets`.
        ValueError: if a column is missing.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        image_column: str = "image",
        degraded_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self.columns = (image_column, degraded_column, caption_column)
        self.rows = open_dataset(name, split=split, columns=filter(None, self.columns))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Photo:
        """Read one row."""
        image, degraded, caption = self.columns
        row = self.rows[index]
        half = None if degraded is None else picture_to_tensor(row[degraded])
        return Photo(
            str(index), picture_to_tensor(row[image]), half, "" if caption is None else str(row[caption] or "")
        )


class ShardSource:
    """The photos of webdataset shards: tar files in which the members of a photo share the name before the first dot.

    A photo has a clean image (`0001.png`), perhaps a degraded one (`0001.lq.png`) and a caption (`0001.txt`). Shards
    are indexed once and then read at random, so that a resumed run goes on exactly.

    Args:
        shards: tar files.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if a shard is damaged, or none holds an image.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.photos: list[dict[str, tuple[Path, int, int]]] = []  # by suffix: shard, offset and size
        for shard in map(Path, shards):
            if not shard.is_file():
                raise FileNotFoundError(f"Expected a shard, got {shard}, which does not exist.")
            self.photos += _index_shard(shard)
        if not self.photos:
            raise ValueError(f"Expected images in the shards {', '.join(map(str, shards))}, found none.")

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.photos)

    def __getitem__(self, index: int) -> Photo:
        """Read one photo."""
        parts = {suffix: _read_part(*place) for suffix, place in self.photos[index].items()}
        clean = next(content for suffix, content in parts.items() if suffix in IMAGE_SUFFIXES)
        halves = [parts[DEGRADED_SUFFIX + suffix] for suffix in IMAGE_SUFFIXES if DEGRADED_SUFFIX + suffix in parts]
        return Photo(
            str(index),
            _decode(clean, f"photo {index} of the shards"),
            _decode(halves[0], f"degraded photo {index} of the shards") if halves else None,
            parts.get(".txt", b"").decode("utf-8", errors="replace").strip(),
        )


def read_captions(path: Path) -> dict[str, str]:
    """Read a CSV file of captions, by file name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the columns `file_name` and `text` are missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a CSV file of captions, got {path}, which does not exist.")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not set(CAPTION_COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError(f"Expected the columns {CAPTION_COLUMNS} in {path}, got {reader.fieldnames}.")
        name, text = CAPTION_COLUMNS
        return {row[name]: row[text] or "" for row in reader}


def _decode(content: bytes, what: str) -> Tensor:
    try:
        return picture_to_tensor(Image.open(io.BytesIO(content)))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"Expected a complete image, got {what}, which is damaged: {error}.") from error


def _index_shard(shard: Path) -> Iterable[dict[str, tuple[Path, int, int]]]:
    """Return, for each photo of a shard with an image, where its members lie."""
    photos: dict[str, dict[str, tuple[Path, int, int]]] = {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, dot, suffix = name.partition(".")
                    place = (shard, member.offset_data, member.size)
                    photos.setdefault(f"{folder}/{key}", {})[(dot + suffix).lower()] = place
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"Expected a tar file, got {shard}: {error}.") from error
    return [parts for parts in photos.values() if not IMAGE_SUFFIXES.isdisjoint(parts)]


def _read_part(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)
