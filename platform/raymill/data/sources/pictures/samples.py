"""Samples of one or more files each, some of which make a fragment: known by the files' names, sizes and times of change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


def samples_of(
    place: Place,
    fragment: Fragment,
    listings: Iterable[Callable[[], Groups]],
    known: Callable[[Sequence[Sample]], object] = lambda samples: "",
) -> Sequence[Sample]:
    """The samples of a fragment, as they were when it was listed.

    Args:
        place: where they are.
        fragment: which.
        listings: what lists the files, tried one after the other: as this process has done before, and anew.
        known: see `fragments_of`.

    Raises:
        DataError: they are others now.
    """
    for listing in listings:
        groups = listing()
        if fragment.part < len(groups):
            samples = groups[fragment.part]
            if _fragment(fragment.part, samples, known(samples)).identity == fragment.identity:
                return samples
    raise changed(place, fragment)


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
    if _fragment(fragment.part, now, known).identity != fragment.identity:
        raise changed(place, fragment)
    return [tuple(content for content, _ in files) for files in found]


def changed(place: Place, fragment: Fragment) -> DataError:
    """The files are others than when the run began."""
    what = f"{place.root}, pictures {fragment.part}"
    return DataError(f"{what}: they have changed since the run's manifest was taken. Restore them, or start a new run.")
