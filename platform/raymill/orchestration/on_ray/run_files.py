"""The files of a run, or of a search, on the way from one disk to another: their order, and that a checkpoint is there whole or
not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from raymill.checkpoint import directory
from raymill.errors import InputError
from raymill.files import make_private_folder, private, replace_file
from raymill.record.events import RunFinished, parse_event
from raymill.record.folder import RunFolder

_RUN = RunFolder(Path())
CHECKPOINTS, ATTEMPT, EVENTS, SUMMARY = (str(path) for path in (_RUN.checkpoints, _RUN.attempt, _RUN.events, _RUN.summary))
WHOLE = directory.CHECKSUMS
"""Names in a run's folder; the last is written when all else of a checkpoint is."""

STUDY, TRIALS = "study.json", "trials.jsonl"
"""Names in a search's folder: what it is, and which trials are over."""

POINTER = f"{CHECKPOINTS}/{directory.POINTER}"

COUNTS = ATTEMPT, TRIALS
"""By them it is seen who knows more."""

GROWING = ".jsonl", ".log"
"""How files end that are written on at their end."""

STORE, BESIDE_STORE = ".db", ("-journal", "-wal", "-shm")
"""How SQLite's files end, and those that it has beside them while it writes."""

MARKS = str(_RUN.command), SUMMARY, STUDY, TRIALS, f"{CHECKPOINTS}/[!.]*/{WHOLE}"
"""When one of these is new there is something to send."""

HELD, ARRIVING = ".held", ".arriving"
"""Folders in it: what is being sent, and what has not all come."""

HOLD_TRIES = 50

Stamp = tuple[int, int]
"""Size and time of change of a file."""


def unit_of(name: str) -> str:
    """What a file comes and goes with: its checkpoint, or itself."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == CHECKPOINTS else name


def in_order(names: Iterable[str]) -> list[str]:
    """What is there comes before what tells of it: last the number of the attempt, or the trials that are over; before it the
    summary, the pointer to a checkpoint, and before that checkpoints, each with its checksums last.
    """

    def place(name: str) -> tuple[bool, bool, bool, bool, str, bool, str]:
        unit = unit_of(name)
        return name in COUNTS, name == SUMMARY, name == POINTER, unit != name, unit, name.endswith(f"/{WHOLE}"), name

    return sorted(names, key=place)


def without_torn(names: Iterable[str]) -> list[str]:
    """In order, without the files of checkpoints of which not all came."""
    ordered = in_order(names)
    whole = {unit_of(name) for name in ordered if name.endswith(f"/{WHOLE}")}
    return [name for name in ordered if unit_of(name) == name or unit_of(name) in whole]


def stamps(folder: Path) -> dict[str, Stamp]:
    """The files of a folder; one that is being replaced or removed just now may be missing."""
    found: dict[str, Stamp] = {}
    # What grows is looked at last: it tells of all that a commit holds, since that comes behind it.
    for path in sorted(folder.rglob("*"), key=lambda path: path.name.endswith(GROWING)):
        name = path.relative_to(folder)
        with suppress(FileNotFoundError):
            # What begins with a point is not finished.
            if path.is_file() and not any(part.startswith(".") for part in name.parts) and not path.name.endswith(BESIDE_STORE):
                found[str(name)] = _stamp(path)
    return {name: found[name] for name in without_torn(found)}


def marks(folder: Path) -> dict[str, Stamp]:
    """Those files of a folder by which it is seen that there is something to send."""
    found = {}
    for path in (path for pattern in MARKS for path in folder.glob(pattern)):
        with suppress(FileNotFoundError):
            found[str(path.relative_to(folder))] = _stamp(path)
    return found


def _stamp(path: Path) -> Stamp:
    known = path.stat()
    return known.st_size, known.st_mtime_ns


@contextmanager
def held(folder: Path) -> Iterator[dict[str, Stamp]]:
    """The files of a folder as `stamps` has them. Within this they stay in `HELD` as they were together at one moment, whatever
    becomes of the folder: no commit came meanwhile, and a file that grows is as long as it was.

    Raises:
        OSError: commits come faster than files can be held.
    """
    try:
        for _ in range(HOLD_TRIES):
            found = _hold_all(folder)
            if _of_commits(found) == _of_commits(stamps(folder)):
                break
        else:
            raise OSError(f"{folder} changes faster than its files can be held")
        yield found
    finally:
        shutil.rmtree(folder / HELD, ignore_errors=True)


def _of_commits(found: Mapping[str, Stamp]) -> dict[str, Stamp]:
    return {name: stamp for name, stamp in found.items() if name == POINTER or unit_of(name) != name}


def _hold_all(folder: Path) -> dict[str, Stamp]:
    shutil.rmtree(folder / HELD, ignore_errors=True)
    found, gone = stamps(folder), set[str]()
    # What tells of a store, a count, was looked at before the store is copied.
    for name, (size_bytes, _) in found.items():
        make_private_folder((folder / HELD / name).parent)
        try:
            _hold(folder / name, folder / HELD / name, size_bytes)
        except FileNotFoundError:
            gone.add(unit_of(name))
    return {name: stamp for name, stamp in found.items() if unit_of(name) not in gone}


def _hold(path: Path, to: Path, size_bytes: int) -> None:
    if path.name.endswith(STORE):
        with open(to, "xb", opener=private):
            pass
        with closing(sqlite3.connect(path)) as store, closing(sqlite3.connect(to)) as copy:
            store.backup(copy)
    elif path.name.endswith(GROWING):
        with open(path, "rb") as file, open(to, "xb", opener=private) as copy_of_it:
            shutil.copyfileobj(file, copy_of_it)
            copy_of_it.truncate(size_bytes)
    else:
        try:
            os.link(path, to)
        except FileNotFoundError:
            raise
        except OSError:  # the file system has no links
            shutil.copyfile(path, to)


def open_held(folder: Path, name: str) -> IO[bytes]:
    """A file of those that `held` has."""
    return open(folder / HELD / name, "rb")


@contextmanager
def end_held_back(folder: Path) -> Iterator[bool]:
    """Within this the events that are held are without the one that ends the run; whether there is one, and it was the last."""
    path = folder / HELD / EVENTS
    events = path.read_bytes() if path.exists() else b""
    last = events.rfind(b"\n", 0, -1) + 1
    ends = _is_end(events[last:])
    if ends:
        os.truncate(path, last)
    try:
        yield ends
    finally:
        if ends:
            with path.open("ab") as file:
                file.write(events[last:])


def _is_end(line: bytes) -> bool:
    try:
        return isinstance(parse_event(json.loads(line)), RunFinished)
    except (ValueError, InputError):
        # It is damaged.
        return False


def write(folder: Path, content: Iterable[tuple[str, Any]]) -> None:
    """Write files, given as `in_order` has them, with their bytes; a checkpoint is there whole or not at all."""
    make_private_folder(folder)
    shutil.rmtree(folder / ARRIVING, ignore_errors=True)
    for name, data in content:
        if name in (POINTER, SUMMARY, *COUNTS):
            _arrive(folder)
        path = folder / name if unit_of(name) == name else folder / ARRIVING / name
        make_private_folder(path.parent)
        replace_file(path, bytes(data))
    _arrive(folder)


def _arrive(folder: Path) -> None:
    for made in (folder / ARRIVING / CHECKPOINTS).glob("*"):
        final = folder / CHECKPOINTS / made.name
        make_private_folder(final.parent)
        shutil.rmtree(final, ignore_errors=True)
        made.rename(final)
    shutil.rmtree(folder / ARRIVING, ignore_errors=True)


def remove_all_but(folder: Path, names: Iterable[str]) -> None:
    """Remove the files that are not among these, and folders that are empty then."""
    for name in reversed(in_order(stamps(folder).keys() - set(names))):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
