"""What sources of plain files share: which files a folder has, and pieces of files that end where lines end.

A piece is known by the digest of its bytes, so that what was changed since the manifest was taken is noticed when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from raymill.errors import DataError, InputError, Problem
from raymill.task import Fragment

PIECE_BYTES = 4 * 2**20
"""Of lines that are read together, about."""

MOST_LINE_BYTES = 64 * 2**20
"""Of one line: what is longer is no file of lines."""

MAX_SHOWN_LETTERS = 200


def files_of(folder: str, pattern: str, what: str, *, may_link: bool = False) -> list[Path]:
    """The files of a folder in the order of their names, without hidden ones.

    Args:
        pattern: as in `Path.glob`.
        what: what they are, for messages.
        may_link: a file may be a link to one elsewhere.

    Raises:
        InputError: there are none; or one is a link that leads out of the folder, and may not.
    """
    root = Path(folder)
    try:
        files = sorted(path for path in root.glob(pattern) if path.is_file() and not _is_hidden(path.relative_to(root)))
        outside = [] if may_link else _outside(root.resolve(), files)
    except (OSError, ValueError) as error:
        found, fix = getattr(error, "strerror", None) or str(error), "Correct the name in the job's `data:`."
        raise InputError([Problem(repr(folder[:MAX_SHOWN_LETTERS]), found, f"a folder of {what}", fix)]) from error
    if outside:
        fix = "Put the file itself there; a link may lead to what is not for this job."
        raise InputError([Problem(str(path), "a link that leads elsewhere", f"a file inside {folder}", fix) for path in outside])
    if not files:
        found = f"no file that matches {pattern!r}" if root.is_dir() else "no such folder"
        fix = "Run `raymill data get`, or name the folder of your files in the job's `data:`."
        raise InputError([Problem(folder, found, f"a folder of {what}", fix)])
    return files


def _outside(root: Path, files: Sequence[Path]) -> list[Path]:
    """Those that are links out of a folder, or lie in one that is."""
    inside = {parent: parent.resolve().is_relative_to(root) for parent in {path.parent for path in files}}
    linked = {path for path in files if path.is_symlink() and not path.resolve().is_relative_to(root)}
    return [path for path in files if path in linked or not inside[path.parent]]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# ---------------------------------------------------------------- pieces of lines


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
    fragments, problems = [], []
    for path in files_of(folder, pattern, what):
        name = path.relative_to(folder).as_posix()
        try:
            status = path.stat()
            for number, piece in enumerate(_pieces(path, status.st_size, status.st_mtime_ns, header, whole)):
                identity = f"{piece.start} {piece.digest}"
                fragments.append(Fragment(name, number, piece.num_lines, piece.num_bytes, identity))
        except (OSError, ValueError) as error:
            problems.append(Problem(str(path), str(error), f"{what} with lines", "Correct or restore the file."))
    if not fragments and not problems:
        problems.append(Problem(folder, "no rows in any file", "at least one row", "Name another folder."))
    if problems:
        raise InputError(problems)
    return fragments


@lru_cache(maxsize=1024)
def _pieces(path: Path, size_bytes: int, mtime_ns: int, header: bool, whole: bool) -> tuple[Piece, ...]:
    found = []
    with open(path, "rb") as file:
        start = len(file.readline(MOST_LINE_BYTES)) if header else 0
        while data := _next(file, size_bytes if whole else PIECE_BYTES):
            # A file that is read as a whole may hold line ends within its values.
            num_lines = count_lines(data)
            if num_lines:
                found.append(Piece(start, len(data), num_lines, _digest(data)))
            start += len(data)
    return tuple(found)


def _next(file: object, num_bytes: int) -> bytes:
    """The next whole lines, of about so many bytes."""
    data: bytes = file.read(max(1, num_bytes))  # type: ignore[attr-defined]
    if data and not data.endswith(b"\n"):
        rest: bytes = file.readline(MOST_LINE_BYTES)  # type: ignore[attr-defined]
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
    path = Path(folder, fragment.path)
    start, digest = fragment.identity.split(" ")
    try:
        with open(path, "rb") as file:
            file.seek(int(start))
            data = file.read(fragment.num_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}. Restore this file from its source, then resume.") from error
    if _digest(data) != digest:
        raise DataError(f"{path}: the file has changed since the run's manifest was taken. Start a new run.")
    return data


def place(folder: str, fragment: Fragment) -> str:
    """Where a fragment is, for messages."""
    return f"{Path(folder, fragment.path)}, from byte {fragment.identity.split(' ')[0]} on"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def digest_of(parts: Sequence[object]) -> str:
    """24 hex digits that change when one of these values does."""
    return _digest(repr(tuple(parts)).encode())
