"""Samples of one or more files each, some of which make a fragment: known by the files' names, sizes and times of change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from raymill.errors import DataError, InputError, Problem
from raymill.storage.place import Entry, Place, digest_of, files_of, in_parallel, where
from raymill.task import Fragment

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")

MOST_FILES, MOST_BYTES = 256, 16 * 2**20
"""Of a fragment."""

Sample: TypeAlias = tuple[Entry, ...]
"""The files of a row; the picture first."""

Groups: TypeAlias = Mapping[tuple[str, int], Sequence[Sample]]
"""(path, part) of a fragment -> its samples."""


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
    files = [file for samples in groups.values() for sample in samples for file in sample]
    expected, fix = "a picture, or what is known of one", "Restore or delete it."
    return [Problem(where(place, one.name), "an empty file", expected, fix) for one in files if not one.size_bytes]


def grouped(samples: Iterable[Sample], path_of: Callable[[Sample], str]) -> Groups:
    """Neighbours of one path, at most 256 and 16 MiB of them, make a fragment."""
    found: dict[tuple[str, int], list[Sample]] = {}
    path, number, num_bytes = "", 0, 0
    for sample in samples:
        if path_of(sample) != path:
            path, number, num_bytes = path_of(sample), 0, 0
        group = found.setdefault((path, number), [])
        size_bytes = sum(file.size_bytes for file in sample)
        if group and (len(group) == MOST_FILES or num_bytes + size_bytes > MOST_BYTES):
            number, num_bytes = number + 1, 0
            group = found.setdefault((path, number), [])
        group.append(sample)
        num_bytes += size_bytes
    return found


def fragment_of(path: str, part: int, samples: Sequence[Sample], known: object = "") -> Fragment:
    """A fragment of these samples.

    Args:
        known: what is known of them that lies in no file of theirs.
    """
    files = [file for sample in samples for file in sample]
    # The name alone: a folder that was moved as a whole holds the same rows.
    marks: list[object] = [(one.name.rpartition("/")[2], one.size_bytes, one.mtime_ns) for one in files]
    identity = digest_of([*marks, known] if known else marks)
    return Fragment(path, part, len(samples), sum(one.size_bytes for one in files), identity)


def samples_of(
    fragment: Fragment, listings: Iterable[Callable[[], Groups]], known: Callable[[Sequence[Sample]], object] = lambda samples: ""
) -> Sequence[Sample]:
    """The samples of a fragment, as they were when it was listed.

    Args:
        listings: what lists the files, tried one after the other: as this process has done before, and anew.
        known: see `fragment_of`.

    Raises:
        DataError: they are others now.
    """
    for listing in listings:
        samples = listing().get((fragment.path, fragment.part), [])
        if samples and fragment_of(fragment.path, fragment.part, samples, known(samples)) == fragment:
            return samples
    raise changed(fragment)


def read_samples(place: Place, fragment: Fragment, samples: Sequence[Sample], known: object = "") -> list[tuple[bytes, ...]]:
    """The files of a fragment's samples.

    Raises:
        DataError: one is gone, or was changed.
    """

    def read(sample: Sample) -> list[tuple[bytes, Entry]]:
        # As they are behind the reading: what was read is then of the version that was listed.
        return [(_read(place, file.name), place.entry(file.name)) for file in sample]

    def _read(place: Place, name: str) -> bytes:
        try:
            return place.read(name)
        except OSError as error:
            said = error.strerror or str(error)
            raise DataError(f"{where(place, name)}: cannot be read: {said}. Restore this file, then resume.") from error

    found = in_parallel(place, read, samples)
    now = [tuple(entry for _, entry in files) for files in found]
    if fragment_of(fragment.path, fragment.part, now, known) != fragment:
        raise changed(fragment)
    return [tuple(content for content, _ in files) for files in found]


def changed(fragment: Fragment) -> DataError:
    """The files are others than when the run began."""
    what = f"{fragment.path or 'the folder'}, pictures {fragment.part}"
    return DataError(f"{what}: they have changed since the run's manifest was taken. Restore them, or start a new run.")
