"""Pieces of files that end where lines end.

A piece is known by the digest of its bytes, so that what was changed since the manifest was taken is noticed when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

from raymill.errors import DataError, InputError, Problem
from raymill.storage.find import place_of
from raymill.storage.place import Entry, Place, changed, digest, files_of, in_parallel, where
from raymill.task import Fragment

PIECE_BYTES = 4 * 2**20
"""Of lines that are read together, about."""

MOST_LINE_BYTES = 64 * 2**20
"""Of one line: what is longer is no file of lines."""


@dataclass(frozen=True)
class Piece:
    """Whole lines of a file.

    Attributes:
        start: offset of the first, in bytes.
        num_bytes: of all of them.
        num_lines: those that are not empty.
        digest: of the bytes.
    """

    start: int
    num_bytes: int
    num_lines: int
    digest: str


def line_fragments(folder: str, pattern: str, what: str, *, header: bool = False, whole: bool = False) -> list[Fragment]:
    """The pieces of all files of a folder, from one pass over them; an empty file has none.

    Args:
        what: what the files are, for messages.
        header: the first line of each file is none of its rows.
        whole: a file is one piece.

    Raises:
        InputError: there are no files, or no lines; with each file that cannot be read or has a line that is far too long.
    """
    at = place_of(folder)

    def listed(one: Entry) -> list[Fragment] | Problem:
        try:
            pieces = at.persisting(lambda: _pieces(at, one, header, whole))
        except (OSError, ValueError) as error:
            return Problem(where(at, one.name), str(error), f"{what} with lines", "Correct or restore the file.")
        named = ((number, piece, f"{piece.start} {piece.digest}") for number, piece in enumerate(pieces))
        return [Fragment(one.name, number, piece.num_lines, piece.num_bytes, identity) for number, piece, identity in named]

    found = in_parallel(at, listed, files_of(at, pattern, what))
    fragments = [fragment for part in found if isinstance(part, list) for fragment in part]
    problems = [part for part in found if isinstance(part, Problem)]
    if not fragments and not problems:
        problems.append(Problem(folder, "no rows in any file", "at least one row", "Name another folder."))
    if problems:
        raise InputError(problems)
    return fragments


@lru_cache(maxsize=1024)
def _pieces(place: Place, one: Entry, header: bool, whole: bool) -> tuple[Piece, ...]:
    found = []
    with place.open(one.name) as file:
        start = len(file.readline(MOST_LINE_BYTES)) if header else 0
        while data := _next(file, one.size_bytes if whole else PIECE_BYTES):
            # A file that is read as a whole may hold line ends within its values.
            num_lines = count_lines(data)
            if num_lines:
                found.append(Piece(start, len(data), num_lines, digest(data)))
            start += len(data)
    if start < one.size_bytes:
        raise OSError(f"{start} bytes came where there are {one.size_bytes}")
    return tuple(found)


def _next(file: IO[bytes], num_bytes: int) -> bytes:
    """The next whole lines, of about so many bytes."""
    data = file.read(max(1, num_bytes))
    if data and not data.endswith(b"\n"):
        rest = file.readline(MOST_LINE_BYTES)
        if len(rest) == MOST_LINE_BYTES:
            raise ValueError(f"a line of more than {MOST_LINE_BYTES} bytes")
        data += rest
    return data


def count_lines(data: bytes) -> int:
    """Lines that are not empty."""
    return sum(1 for _ in lines_of(data))


def lines_of(data: bytes) -> Iterator[bytes]:
    """Lines that are not empty, without their ends, which may be those of Windows."""
    return (line for raw in data.split(b"\n") if (line := raw.rstrip(b"\r")).strip())


def read_piece(folder: str, fragment: Fragment) -> bytes:
    """The bytes of a fragment of lines.

    Raises:
        DataError: the file is gone, or was changed.
    """
    at = place_of(folder)
    start, expected = fragment.identity.split(" ")
    try:
        data = at.read(fragment.path, int(start), fragment.num_bytes)
    except OSError as error:
        what = where(at, fragment.path)
        raise DataError(f"{what}: cannot be read: {error}. Restore this file from its source, then resume.") from error
    if digest(data) != expected:
        raise changed(where(at, fragment.path))
    return data


def place(folder: str, fragment: Fragment) -> str:
    """Where a fragment is, for messages."""
    return f"{where(place_of(folder), fragment.path)}, from byte {fragment.identity.split(' ')[0]} on"
