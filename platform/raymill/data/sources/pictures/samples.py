"""Samples of one or more files each, some of which make a fragment: known by the files' names, sizes and times of change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias

from raymill.errors import DataError, InputError, Problem
from raymill.storage.place import Entry, Place, digest, digest_of, files_of, in_parallel, where
from raymill.task import Fragment

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")

MOST_FILES, MOST_BYTES = 256, 16 * 2**20
"""Of a fragment."""

Sample: TypeAlias = tuple[Entry, ...]
"""The files of a row; the picture first."""

Groups: TypeAlias = Sequence[Sequence[Sample]]
"""The samples of each fragment."""


def pictures_of(place: Place, pattern: str) -> list[Entry]:
    """The pictures of a place in the order of their names.

    Raises:
        InputError: there are none, or one is a link that leads elsewhere.
    """
    pictures = [one for one in files_of(place, pattern, "pictures") if one.name.lower().endswith(SUFFIXES)]
    if not pictures:
        expected = f"files that end with {', '.join(SUFFIXES)}"
        raise InputError([Problem(place.root, "no pictures", expected, "Name another folder.")])
    return pictures


def empty_files(place: Place, groups: Groups) -> list[Problem]:
    """A problem for each file of any sample in which nothing is."""
    files = [file for samples in groups for sample in samples for file in sample]
    expected, fix = "a picture, or what is known of one", "Restore or delete it."
    return [Problem(where(place, one.name), "an empty file", expected, fix) for one in files if not one.size_bytes]


def grouped(samples: Iterable[Sample]) -> Groups:
    """Fragments of at most 256 samples and 16 MiB, each of them a mixture.

    Files mostly lie in order, class by class or scene by scene, and training rows are shuffled no farther than a window reaches.
    So they are taken in the order of digests of their names, which has nothing to do with what is on them.
    """
    found: list[list[Sample]] = []
    num_bytes = 0
    for sample in sorted(samples, key=lambda sample: digest(sample[0].name.encode())):
        size_bytes = sum(file.size_bytes for file in sample)
        if not found or len(found[-1]) == MOST_FILES or num_bytes + size_bytes > MOST_BYTES:
            found.append([])
            num_bytes = 0
        found[-1].append(sample)
        num_bytes += size_bytes
    return found


def fragments_of(groups: Groups, known: Callable[[Sequence[Sample]], object] = lambda samples: "") -> list[Fragment]:
    """A fragment for each.

    Args:
        groups: of samples.
        known: what is known of samples that lies in no file of theirs.
    """
    return [_fragment(part, samples, known(samples)) for part, samples in enumerate(groups)]


def _fragment(part: int, samples: Sequence[Sample], known: object) -> Fragment:
    files = [file for sample in samples for file in sample]
    marks: list[object] = [(one.name, one.size_bytes, one.mtime_ns) for one in files]
    identity = digest_of([*marks, known] if known else marks)
    # No word of where they lie: rows are split by this path, and alike wherever that is.
    return Fragment("pictures", part, len(samples), sum(one.size_bytes for one in files), identity)


def read_fragment(
    fragment: Fragment,
    place: Place,
    listed: Callable[..., Groups],
    *named: Hashable,
    known: Callable[[Sequence[Sample]], object] = lambda samples: "",
) -> tuple[Sequence[Sample], list[tuple[bytes, ...]]]:
    """The samples of a fragment, as they were when it was listed, and their files.

    Args:
        fragment: which.
        place: where they are.
        listed: lists the files; a process does that once, and again where that is not how they were.
        named: its arguments.
        known: see `fragments_of`.

    Raises:
        DataError: a file is gone, or was changed.
    """
    for once in (True, False):
        samples = _part(_listed_once(listed, *named) if once else listed(*named), fragment.part)
        if samples and _fragment(fragment.part, samples, known(samples)).identity == fragment.identity:
            return samples, _read(fragment, place, samples, known(samples))
    raise _changed(place, fragment)


@lru_cache(maxsize=4)
def _listed_once(listed: Callable[..., Groups], *named: Hashable) -> Groups:
    return listed(*named)


def _part(groups: Groups, part: int) -> Sequence[Sample]:
    return groups[part] if part < len(groups) else []


def _read(fragment: Fragment, place: Place, samples: Sequence[Sample], known: object) -> list[tuple[bytes, ...]]:
    def read(sample: Sample) -> list[tuple[bytes, Entry]]:
        # As they are behind the reading: what was read is then of the version that was listed.
        return [(content(file.name), place.entry(file.name)) for file in sample]

    def content(name: str) -> bytes:
        try:
            return place.read(name)
        except OSError as error:
            said = error.strerror or str(error)
            raise DataError(f"{where(place, name)}: cannot be read: {said}. Restore this file, then resume.") from error

    found = in_parallel(place, read, samples)
    now = [tuple(entry for _, entry in files) for files in found]
    if _fragment(fragment.part, now, known).identity != fragment.identity:
        raise _changed(place, fragment)
    return [tuple(data for data, _ in files) for files in found]


def _changed(place: Place, fragment: Fragment) -> DataError:
    """The files are others than when the run began."""
    what = f"{place.root}, pictures {fragment.part}"
    return DataError(f"{what}: they have changed since the run's manifest was taken. Restore them, or start a new run.")
