"""Sets of images beyond a folder: webdataset shards and Hugging Face data sets, read one image at a time."""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from milo_latent.atomic import write_atomically
from milo_latent.checks import check_file
from milo_latent.extras import import_extra
from milo_latent.provenance import file_stamp
from milo_latent.structure import refusing_damage

if TYPE_CHECKING:
    from datasets import Dataset

SHARD_SUFFIX = ".tar"
COLUMN_PREFIX = "hf:"  # of the address of a column: hf:NAME:COLUMN
MOST_NAMES = 1_000_000  # that braces stand for


@dataclass(frozen=True, slots=True)
class Item:
    """A file that is no file on disk: a member of a shard, or an image in a row of a data set.

    Args:
        name: within its set, with its suffix if it has one, such as "cats/0001.png".
        place: what messages call it.
        stamp: changes when the content does, as `file_stamp`.
        read: returns its bytes.
    """

    name: str
    place: str
    stamp: str
    read: Callable[[], bytes]

    @property
    def suffix(self) -> str:
        """The suffix of its name, in lower case, such as ".png"; empty where the name has none."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def key(self) -> str:
        """Its name without the suffix, by which results are named."""
        return self.name.removesuffix(PurePosixPath(self.name).suffix)

    def __str__(self) -> str:
        """Return what messages call it."""
        return self.place


@contextmanager
def _copied(item: Item) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"item{item.suffix}")
        path.write_bytes(item.read())
        try:
            yield path
        except (ValueError, FileNotFoundError, MemoryError) as error:
            raise type(error)(str(error).replace(str(path), item.place)) from error


def as_file(source: Path | Item) -> AbstractContextManager[Path]:
    """Lend an item as a file with its suffix, alone in a temporary folder, so that all that reads files reads it.

    Errors that name the file name the item in its place. A path is lent as it is.
    """
    return _copied(source) if isinstance(source, Item) else nullcontext(source)


def expand_braces(text: str) -> list[str]:
    """Return the names that a pattern of webdataset stands for.

    Raises:
        ValueError: for a range of more than `MOST_NAMES`.

    Example:
        >>> expand_braces("{train,val}-{08..10}.tar")[:4]
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if found is None:
        return [text]
    first, last, choices = found.groups()
    if choices is None:
        start, stop = int(first), int(last)
        if abs(stop - start) >= MOST_NAMES:
            raise ValueError(f"Expected at most {MOST_NAMES} names, got {found[0]} in {text}.")
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if stop >= start else -1
        names = [f"{number:0{width}d}" for number in range(start, stop + step, step)]
    else:
        names = choices.split(",")
    rest = expand_braces(text[found.end() :])
    return [f"{text[: found.start()]}{name}{end}" for name in names for end in rest]


def is_shard(path: str | Path) -> bool:
    """Return whether a path, or a pattern of several, names webdataset shards."""
    return str(path).lower().endswith(SHARD_SUFFIX) and not Path(path).is_dir()


def shard_items(shard: Path) -> Iterator[Item]:
    """Return the files in a shard in their order, but hidden ones; what is in them is read when it is asked for.

    Raises:
        FileNotFoundError: if there is no such shard.
        ValueError: if it is no plain tar file, or damaged.
    """
    check_file(shard, "a shard")
    stamp = f"{shard.parent.resolve()} {file_stamp(shard)}"
    with refusing_damage(f"Expected a tar file, uncompressed, got {shard}"):
        archive = tarfile.open(shard, "r:")  # noqa: SIM115 (the next line closes it)
    with archive:
        while True:
            with refusing_damage(f"Expected a complete tar file, got {shard}"):
                member = archive.next()
            if member is None:
                return
            name, place, size = str(PurePosixPath(member.name)), member.offset_data, member.size
            if member.isreg() and not name.rpartition("/")[2].startswith("."):
                read = partial(_read_part, shard, place, size)
                yield Item(name, f"{shard}: {name}", f"{stamp} {place} {size}", read)
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them


def _read_part(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def write_shard(shard: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a webdataset shard, completely or not at all; the same members give the same bytes.

    Args:
        shard: a `.tar` file.
        members: the name and the content of each, of which one is in memory at a time.

    Raises:
        OSError: if the file cannot be written, as `write_atomically`.
    """

    def write(partial_file: Path) -> None:
        with tarfile.open(partial_file, "w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                archive.members = []  # type: ignore[attr-defined]

    write_atomically(shard, write)


def open_dataset(name: str | Path, *, split: str = "train", columns: Iterable[str]) -> Dataset:
    """Open a Hugging Face data set, whose rows stay on disk.

    Args:
        name: folder written by `Dataset.save_to_disk`, or the data set's id on the hub.
        split: such as "train".
        columns: those that it must have.

    Raises:
        ImportError: without the library `datasets`.
        ValueError: if a column is missing.
    """
    datasets = import_extra("datasets", "data", "A Hugging Face data set")
    found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(str(name), split=split)
    rows = found[split] if isinstance(found, datasets.DatasetDict) else found
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"Expected the columns {missing} in {name}, which has {rows.column_names}.")
    return rows


def is_column(address: str | Path) -> bool:
    """Return whether a text is the address of a column, "hf:NAME:COLUMN"."""
    return str(address).startswith(COLUMN_PREFIX)


def open_column(address: str | Path, *, split: str = "train") -> tuple[Dataset, str]:
    """Open the data set of "hf:NAME:COLUMN", as `open_dataset`; return it and the column ("image" if none)."""
    name, _, column = str(address).removeprefix(COLUMN_PREFIX).partition(":")
    return open_dataset(name, split=split, columns=[column or "image"]), column or "image"


def column_items(rows: Dataset, column: str, chosen: range | None = None) -> Iterator[Item]:
    """Return the images in a column in the order of the rows; each is read when it is asked for.

    Their names are the numbers of their rows, of equal width, so that they are sorted as the rows are.

    Args:
        rows: the data set.
        column: of images.
        chosen: the rows; None takes all.

    Raises:
        ValueError: if the column holds no images.
    """
    datasets = import_extra("datasets", "data", "A Hugging Face data set")
    if not isinstance(rows.features[column], datasets.Image):
        raise ValueError(f"Expected a column of images, got {column}, which holds {rows.features[column]}.")
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    width = len(str(max(len(rows) - 1, 0)))
    for row in range(len(rows)) if chosen is None else chosen:
        read = partial(_read_cell, images, row, column)
        yield Item(f"{row:0{width}d}", f"row {row} of {column}", f"{rows._fingerprint} {row}", read)


def _read_cell(images: Dataset, row: int, column: str) -> bytes:
    cell = images[row][column]
    if cell is None:
        raise ValueError(f"Expected an image, got none in row {row} of {column}.")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
