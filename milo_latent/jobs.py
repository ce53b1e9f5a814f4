"""The files of a run: which they are, where their results go, and what becomes of results that are there already."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from milo_latent.atomic import remove_leftovers
from milo_latent.checks import check_apart
from milo_latent.files import IMAGE_SUFFIXES, LATENT_SUFFIXES, check_output, is_hidden
from milo_latent.processes import gather, process_index, share
from milo_latent.provenance import FolderRecord
from milo_latent.threads import in_threads

Existing = Literal["resume", "overwrite", "skip"]
THERE = "there already"  # why a file is left out whose result is there


@dataclass(frozen=True)
class Jobs:
    """Files to process, and where their results go.

    Args:
        results: the result of each file.
        folder: the folder of the results, in which a run is resumed; None where one file is made, which is named.
        existing: what becomes of results that are there: "resume" makes those anew that were made of something else and
            refuses files that are no results of ours; "overwrite" makes all anew; "skip" leaves all alone.
        skipped: files that are left out, and why.
        failed: files that cannot be processed, and why.
    """

    results: dict[Path, Path]
    folder: Path | None
    existing: Existing = "resume"
    skipped: dict[Path, str] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)

    @property
    def idle(self) -> Report:
        """The report of a run that has nothing to do."""
        return Report({}, self.skipped, self.failed)


@dataclass(frozen=True)
class Report:
    """What became of `Jobs`.

    Args:
        made: the result of each file that was processed, and what `work` returned of it.
        skipped: files that were left out, and why.
        failed: files that could not be processed, and why.
    """

    made: dict[Path, tuple[Path, Any]]
    skipped: dict[Path, str]
    failed: dict[Path, str]


def find_jobs(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    suffixes: frozenset[str],
    suffix: str,
    recursive: bool = False,
    existing: Existing = "resume",
) -> Jobs:
    """Find the files of a run, and name their results.

    One file gives the file `output`. Several files, a folder, a pattern, or an `output` that is a folder or ends in a
    slash give a folder of results, which have the files' names with `suffix`. What lies in folders below a given
    folder, or below the first wildcard of a pattern, lies in the same folders of `output`.

    Args:
        inputs: files, folders, and patterns such as "photos/**/*.jpg".
        output: a file or a folder.
        suffixes: those of the files that are taken of folders and patterns.
        suffix: of the results in a folder, such as ".png".
        recursive: whether to take what is in the folders of a folder, too.
        existing: as of `Jobs`; "resume" refuses a file `output` that exists.

    Raises:
        FileExistsError: if `output` may not be replaced, or is a file where a folder is needed.
        FileNotFoundError: if an input does not exist or holds no file of `suffixes`, or `output` has no folder.
        ValueError: if a result would replace one of the files, or would be taken for one of them by the next run.
    """
    for each in inputs:
        if not Path(each).exists() and not glob.has_magic(str(each)):
            raise FileNotFoundError(f"Expected a file, a folder or a pattern, got {each}, which does not exist.")
    target = Path(output)
    if len(inputs) == 1 and Path(inputs[0]).is_file() and not names_folder(output):
        source = Path(inputs[0])
        if not target.suffix:
            raise ValueError(f"Expected a file name with a suffix, or a folder that ends in a slash, got {output}.")
        kinds = (each for each in (LATENT_SUFFIXES, IMAGE_SUFFIXES) if suffix in each)
        check_output(target, next(kinds, frozenset({suffix})))
        check_apart(target, source)
        refuse_existing(target, existing)
        return leave_existing(Jobs({source: target}, None, existing))
    if target.is_file() or (target.suffix.lower() in IMAGE_SUFFIXES | LATENT_SUFFIXES and not names_folder(output)):
        raise FileExistsError(f"Expected a folder for the results of several files, got the file {output}.")
    return leave_existing(_folder_jobs(list(map(str, inputs)), target, suffixes, suffix, recursive, existing))


def _folder_jobs(
    inputs: list[str], target: Path, suffixes: frozenset[str], suffix: str, recursive: bool, existing: Existing
) -> Jobs:
    skipped: dict[Path, str] = {}
    sharing: dict[Path, dict[Path, None]] = {}
    for given in inputs:
        if suffix in suffixes and os.path.realpath(given) == os.path.realpath(target):
            raise ValueError(f"Expected another folder for the results than that of the files, got {given} for both.")
        none = True
        for source, place in _find(given, target, suffixes, recursive, skipped):
            sharing.setdefault(target / place.with_suffix(suffix), {})[source] = None
            none = False
        if none:
            hint = "" if recursive else " -r takes those in its folders, too."
            raise FileNotFoundError(f"Expected files of {sorted(suffixes)} in {given}, found none.{hint}")
    results = {next(iter(sources)): result for result, sources in sharing.items() if len(sources) == 1}
    reason = f"expected each name once in {target}, whatever its suffix, since results are named so. Rename it."
    failed = {source: reason for sources in sharing.values() if len(sources) > 1 for source in sources}
    read = set(map(os.path.abspath, results))
    for result in results.values():
        if os.path.abspath(result) in read:
            raise ValueError(
                f"Expected another folder for the results, got {target}, where {result} would be replaced."
            )
    return Jobs(results, target, existing, skipped, failed)


def names_folder(output: str | Path) -> bool:
    """Return whether a result is to go into the folder `output`: it ends in a slash, or is a folder."""
    return str(output).endswith(("/", os.sep)) or Path(output).is_dir()


def refuse_existing(path: Path, existing: Existing) -> None:
    """Raise FileExistsError if there is a file at `path` that may neither be replaced nor left as it is."""
    if existing == "resume" and path.exists():
        raise FileExistsError(
            f"Expected a new file, got {path}, which exists. --overwrite replaces it, --skip-existing leaves it."
        )


def leave_existing(jobs: Jobs) -> Jobs:
    """Leave out the files whose results are there, where `existing` is "skip"."""
    if jobs.existing != "skip":
        return jobs
    left = {source: result for source, result in jobs.results.items() if not result.exists()}
    there = dict.fromkeys(jobs.results.keys() - left.keys(), THERE)
    return Jobs(left, jobs.folder, jobs.existing, jobs.skipped | there, jobs.failed)


def _find(
    given: str, output: Path, suffixes: frozenset[str], recursive: bool, skipped: dict[Path, str]
) -> Iterator[tuple[Path, Path]]:
    """Yield the files that an input stands for, and their places in the folder of the results."""
    path = Path(given)
    if path.is_file():
        yield path, Path(path.name)
        return
    if path.is_dir():
        root, found = path, list(path.rglob("*") if recursive else path.iterdir())
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = list(map(Path, glob.iglob(given, recursive=True)))
    below = os.path.join(os.path.abspath(output), "")
    inside = below.startswith(os.path.join(os.path.abspath(root), "")) and Path(below) != Path(os.path.abspath(root))
    for each in sorted(found):
        own = inside and f"{os.path.abspath(each)}{os.sep}".startswith(below)
        if own or is_hidden(each.relative_to(root)) or each.suffix == ".record":
            continue
        if each.suffix.lower() in suffixes:
            yield each, each.relative_to(root)
        elif not each.is_dir():
            skipped[each] = f"none of {', '.join(sorted(suffixes))}"
        elif path.is_dir() and not recursive:
            skipped[each] = "a folder; -r takes what is in it"


def run_jobs(
    jobs: Jobs,
    work: Callable[[Path, Path], Any],
    *,
    made: Mapping[str, Any],
    unit: str = "file",
    progress: bool = True,
    threads: int = 1,
    expect: Callable[[list[Path]], None] | None = None,
) -> Report:
    """Call `work(file, result)` for every file of `jobs` that has no result yet, or one made of something else.

    A file beside the folder of the results, `FOLDER.record`, tells of what each was made. Warns of results that are
    made anew. Several processes (`milo_latent.processes`) share the files; all return the same.

    Args:
        jobs: what `find_jobs` found.
        work: what it returns is reported. Where results go into a folder, it may raise ValueError, FileNotFoundError or
            MemoryError, and the other files are processed all the same.
        made: what all results depend on beside their files, such as settings, as values that JSON can hold.
        unit: what the progress bar counts.
        progress: whether to show a bar, if there are several files.
        threads: how many files to work on at once.
        expect: called before all others with the files that this process will work on, in their order.
    """
    skipped, record, left = dict(jobs.skipped), None, list(jobs.results.items())
    if jobs.folder is not None:
        for folder in {jobs.folder, *(result.parent for result in jobs.results.values())}:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        record = FolderRecord(jobs.folder, dict(made), overwrites=jobs.existing == "overwrite")
        left = [(path, result) for path, result in left if not record.is_current(result, path)]
        skipped |= dict.fromkeys(jobs.results.keys() - dict(left).keys(), THERE)
        if process_index() == 0:
            record.tell_of_others(result for _, result in left)
    mine, _ = share(left)
    if expect is not None:
        expect([path for path, _ in mine])
    done: list[tuple[Path, tuple[Path, Any]]] = []
    broken: list[tuple[Path, str]] = []

    def make(job: tuple[Path, Path]) -> Any:
        path, result = job
        with nullcontext() if record is None else record.making(result, path):
            return work(path, result)

    with tqdm(total=len(mine), unit=unit, disable=not progress or len(mine) < 2 or process_index() > 0) as bar:
        for (path, result), outcome in in_threads(make, mine, threads=min(threads, len(mine)) or 1):
            try:
                done.append((path, (result, outcome())))
            except (ValueError, FileNotFoundError, MemoryError) as error:  # a full disk stops the run
                if record is None:
                    raise
                broken.append((path, str(error)))
            bar.update()
    broken = gather(broken)
    if record is not None:
        record.take_parts()
    return Report(dict(sorted(gather(done))), skipped, jobs.failed | dict(broken))
