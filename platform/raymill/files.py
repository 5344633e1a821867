"""Small files that are there whole or not at all, the version that every record carries, and locks between processes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raymill.errors import InputError, Problem, RunError

FORMAT_VERSION = 2
"""Of the files of runs, checkpoints and model versions. It goes up when an older raymill could not read them any more."""

READABLE_VERSIONS = (1, 2)
"""Those that this raymill reads: what a later version added has a default."""

VERSION_FIELD = "format_version"

STAGE = ".stage-"
"""What the names of unfinished files and folders begin with."""


def make_private_folder(path: Path) -> None:
    """Make a folder and what is missing above it, for this user alone. One that is there stays as it is.

    Raises:
        InputError: it cannot be made there.
    """
    try:
        if not path.parent.exists():
            make_private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        fix = "Name another folder with RAYMILL_HOME, or correct what is there."
        raise InputError([Problem(str(path), error.strerror or str(error), "a folder that can be made", fix)]) from error


def private(path: str | Path, flags: int) -> int:
    """Open a file that, where it is new, is this user's alone; an `opener` for `open`."""
    return os.open(path, flags, 0o600)


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a kill at any moment leaves the old or the new content."""
    staged = path.with_name(f"{STAGE}{path.name}.{os.getpid()}")
    with open(staged, "wb", opener=private) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_regular_file(path: Path) -> bool:
    """Whether a file with bytes of its own is there: no link to another one, no folder, no pipe that would never end."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):  # the second for a path that no file can have, such as one with a NUL
        return False


# ---------------------------------------------------------------- records


def parse_json(content: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: it is not JSON, or nests deeper than anything that raymill writes.
    """
    try:
        return json.loads(content.decode() if isinstance(content, bytes) else content)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file of a run, with the version of its format."""
    replace_file(path, json.dumps(with_version(values), indent=1))


def read_record(path: Path) -> dict[str, Any]:
    """The values of a JSON file of a run.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not JSON.
        InputError: this raymill does not know the version of its format.
    """
    try:
        record = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return without_version(record, str(path))


def with_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the version of their format."""
    return {VERSION_FIELD: FORMAT_VERSION, **values}


def without_version(record: Any, where: str) -> dict[str, Any]:
    """The values of a record whose version this raymill knows.

    Args:
        record: what was parsed from JSON.
        where: the file, for the message.

    Raises:
        InputError: the version is missing or another one; says what to do.
    """
    found = record.get(VERSION_FIELD) if isinstance(record, dict) else None
    if type(found) is int and found in READABLE_VERSIONS:
        return {name: value for name, value in record.items() if name != VERSION_FIELD}
    if isinstance(found, int) and found > FORMAT_VERSION:
        fix = "It was written by a newer raymill: use that version here too."
    else:
        fix = "It was written by a raymill older than 0.2, or is damaged: train again with this version."
    expected = f"{VERSION_FIELD} {' or '.join(map(str, READABLE_VERSIONS))}, which this raymill reads"
    shown = repr(found) if found is None or isinstance(found, int | float | str) else f"of type {type(found).__name__}"
    raise InputError([Problem(where, f"{VERSION_FIELD} {shown}", expected, fix)])


# ---------------------------------------------------------------- locks


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold a lock file of a run's folder, so that no two processes ever do at once what it stands for.

    Raises:
        RunError: when another process holds it; names the process.
    """
    # Whichever thread took it, any may let go of it.
    lock = FileLock(path, mode=0o600, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = path.read_text()
        raise RunError(
            f"run {path.parent.name} is being trained by process {holder or 'unknown'}; wait for it, or stop it with SIGTERM"
        ) from error
    try:
        path.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, once whoever holds it now lets go of it."""
    with FileLock(path, mode=0o600):
        yield
