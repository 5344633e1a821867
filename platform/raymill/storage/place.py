"""A place that holds files, by its name: a folder's path, or an address.

What reads files asks a place for them and knows no more of it. So a source of rows is the same wherever its files lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Protocol, TypeVar

from pyarrow import NativeFile

from raymill.errors import DataError, InputError, Problem

T = TypeVar("T")
S = TypeVar("S")

MAX_SHOWN_LETTERS = 200


@dataclass(frozen=True)
class Entry:
    """A file as it was listed.

    Attributes:
        name: its path inside the place, with slashes.
        size_bytes: its size.
        mtime_ns: when it was last changed; 0 where that is not told.
    """

    name: str
    size_bytes: int
    mtime_ns: int


class Place(Protocol):
    """Holds files. Equal places are the same, so that what is read of one can be kept.

    Attributes:
        root: as a user names it.
        num_readers: files that are read at once, where there are many.
    """

    @property
    def root(self) -> str:
        """See above."""

    @property
    def num_readers(self) -> int:
        """See above."""

    def __hash__(self) -> int:
        """Of what it is."""

    def entries(self, pattern: str, *, may_link: bool) -> list[Entry]:
        """The files whose names fit a pattern as of `Path.glob`, sorted by name, folder by folder, without hidden ones.

        Args:
            may_link: a file may be a link to one elsewhere.

        Raises:
            OSError, ValueError: the place cannot be listed.
            InputError: a link leads elsewhere, and may not.
        """

    def folders(self) -> list[str]:
        """The names of the folders directly in it, sorted, without hidden ones; none where it is not there."""

    def entry(self, name: str) -> Entry:
        """A file as it is now.

        Raises:
            OSError: it is not there, or not to be reached.
        """

    def version(self, name: str) -> str:
        """What changes when the file does.

        Raises:
            OSError: as above.
        """

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """So many bytes of a file from a place in it on, or all that follow; fewer where it ends.

        Raises:
            OSError: as above.
        """

    def open(self, name: str) -> IO[bytes]:
        """A file to be read from its beginning on, or here and there.

        Raises:
            OSError: as above.
        """

    def open_arrow(self, name: str) -> NativeFile:
        """A file as Arrow reads it, without Python between.

        Raises:
            OSError: as above.
        """

    def write(self, name: str, file: IO[bytes]) -> None:
        """Make a file of these bytes, whole or not at all; what is missing above it too.

        Raises:
            OSError: as above, or nothing can be written there.
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            OSError: it is not to be reached.
        """

    def persisting(self, function: Callable[[], T]) -> T:
        """Call a function that reads files; where a failure may pass, again."""


def files_of(place: Place, pattern: str, what: str, *, may_link: bool = False) -> list[Entry]:
    """The files of a place in the order of their names, without hidden ones.

    Args:
        pattern: as in `Path.glob`.
        what: what they are, for messages.
        may_link: a file may be a link to one elsewhere.

    Raises:
        InputError: there are none; or one is a link that leads out of the folder, and may not.
    """
    get = "Run `raymill data get`, or name the folder of your files in the job's `data:`."
    try:
        found = place.entries(pattern, may_link=may_link)
    except FileNotFoundError as error:
        raise InputError([Problem(place.root, error.strerror or str(error), f"a folder of {what}", get)]) from error
    except (OSError, ValueError) as error:
        said, fix = getattr(error, "strerror", None) or str(error), "Correct the name in the job's `data:`."
        raise InputError([Problem(repr(place.root[:MAX_SHOWN_LETTERS]), said, f"a folder of {what}", fix)]) from error
    if not found:
        raise InputError([Problem(place.root, f"no file that matches {pattern!r}", f"a folder of {what}", get)])
    return found


def where(place: Place, name: str) -> str:
    """A file, for messages."""
    return f"{place.root.rstrip('/')}/{name}"


def unchanged(place: Place, name: str, read: Callable[[str], T]) -> T:
    """What is read of a file, all of it of one version, which `read` is told.

    Raises:
        DataError: it was changed meanwhile.
        OSError: it cannot be read.
    """
    version = place.version(name)
    found = read(version)
    if place.version(name) != version:
        raise changed(where(place, name))
    return found


def changed(what: str) -> DataError:
    """A file is another one than when the run began."""
    return DataError(f"{what}: the file has changed since the run's manifest was taken. Start a new run.")


def in_parallel(place: Place, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """The function's values for these, in their order; of a far place several at once, since most of the time is waiting."""
    given: Sequence[S] = list(items)
    if place.num_readers == 1 or len(given) < 2:
        return [function(item) for item in given]
    with ThreadPoolExecutor(min(place.num_readers, len(given))) as pool:
        return list(pool.map(function, given))


def digest(data: bytes) -> str:
    """24 hex digits that change when the bytes do."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def digest_of(parts: Sequence[object]) -> str:
    """24 hex digits that change when one of these values does."""
    return digest(repr(tuple(parts)).encode())
