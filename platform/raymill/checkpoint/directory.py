"""One checkpoint is a folder: staged, flushed, hashed and renamed. No pickle is written or read.

    checkpoints/
        latest.json                     the pointer: newest and best checkpoint, and the attempt that wrote it
        step-00000038.1/                step 38, written by attempt 1
            weights.safetensors         parameters and buffers
            optimizer.safetensors       optimizer tensors
            state.json                  everything else, the position among it
            checksums.json              size and SHA-256 of each file

A kill at any moment leaves either the old pointer and the intact checkpoint that it names, or the new one. Loading checks sizes
and hashes and falls back to the newest checkpoint before that is whole. This file needs no torch; `snapshot` knows tensors.

All files are regular ones: a link would make a checkpoint of what lies elsewhere. Checksums find damage, not a change that was
made to them too; against that stands `weights_sha256` in state.json. `find_latest` compares the weights with it, so such a
checkpoint is passed over; `snapshot.load` does so again with the tensors that it returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill import faults
from raymill.checkpoint.weights_digest import file_weights_sha256
from raymill.errors import CheckpointError, InputError
from raymill.files import STAGE, is_regular_file, parse_json, sync_folder, with_version, without_version

WEIGHTS, OPTIMIZER, RECORD = "weights.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, OPTIMIZER, RECORD)
CHECKSUMS = "checksums.json"
POINTER = "latest.json"
REPLACED = ".replaced-"
"""Before the name of a checkpoint that makes room for one of the same step: behind an evaluation, for the one before it."""
NAME = re.compile(r"step-\d+\.\d+")


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold.

    Attributes:
        step: the step after which it was taken.
        writers: file name -> writes that file at a path.
    """

    step: int
    writers: Mapping[str, Callable[[Path], object]]


@dataclass(frozen=True)
class Packed:
    """A checkpoint as the bytes of its files, on the way from one machine to another.

    Attributes:
        step: the step after which it was taken.
        files: file name -> bytes.
    """

    step: int
    files: Mapping[str, bytes]

    def content(self) -> Content:
        """What is to be written of it."""

        def writer(content: bytes) -> Callable[[Path], object]:
            return lambda path: path.write_bytes(content)

        return Content(self.step, {name: writer(content) for name, content in self.files.items()})


# ---------------------------------------------------------------- one checkpoint


def save(folder: Path, name: str, content: Content) -> None:
    """Write a checkpoint under its final name, whole or not at all."""
    stage = folder / f"{STAGE}{name}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for file_name in FILES:
        content.writers[file_name](stage / file_name)
        faults.point("checkpoint_file_written", stage / file_name)
    faults.point("before_checksums")
    write_checksums(stage)
    for path in stage.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(stage)
    faults.point("before_rename")
    final, replaced = folder / name, folder / f"{REPLACED}{name}"
    if final.exists():
        os.rename(final, replaced)
        faults.point("checkpoint_put_aside")
    os.rename(stage, final)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def write_checksums(folder: Path) -> None:
    """Write the size and SHA-256 of each file of a folder into a file beside them."""
    sums = {
        path.name: {"num_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != CHECKSUMS and path.is_file()
    }
    (folder / CHECKSUMS).write_text(json.dumps(with_version({"files": sums}), indent=1))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, names: Collection[str] = FILES, may_have: Collection[str] = ()) -> None:
    """Check these files of a folder, which must be all that its checksums name, against them.

    Args:
        may_have: files that may be named as well, and are checked where they are.

    Raises:
        CheckpointError: names the first file that is missing, is no regular file, or differs.
    """
    if not is_regular_file(path / CHECKSUMS):
        raise CheckpointError(f"{path}: no regular file {CHECKSUMS}; it is not whole")
    try:
        found = without_version(parse_json((path / CHECKSUMS).read_bytes()), str(path / CHECKSUMS))
        expected = {name: (entry["num_bytes"], entry["sha256"]) for name, entry in found["files"].items()}
    except InputError as error:
        raise CheckpointError(str(error.problems[0])) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable {CHECKSUMS}; it is not whole") from error
    if not set(names) <= expected.keys() <= {*names, *may_have}:
        raise CheckpointError(f"{path}: its {CHECKSUMS} names {sorted(expected)}, not {sorted(names)}")
    for name, (num_bytes, sha256) in expected.items():
        file = path / name
        if not is_regular_file(file):
            raise CheckpointError(f"{file}: missing, or no regular file; {path.name} is not whole")
        try:
            differs = file.stat().st_size != num_bytes or file_sha256(file) != sha256
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
        if differs:
            raise CheckpointError(f"{file}: size or SHA-256 is not what {CHECKSUMS} says; the file was damaged or changed")


def read(path: Path) -> Packed:
    """The files of one checkpoint, verified.

    Raises:
        CheckpointError: when it is not whole.
    """
    verify(path)
    return Packed(read_state(path, "step")["step"], {name: (path / name).read_bytes() for name in FILES})


def read_state(path: Path, *needed: str) -> dict[str, Any]:
    """What a checkpoint says beside its tensors, the position among it.

    Args:
        needed: names that must be there.

    Raises:
        CheckpointError: it cannot be read, one of these is missing, or a value that others go by is not of its kind.
    """
    try:
        content = (path / RECORD).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / RECORD}: cannot be read: {error}") from error
    return parse_state(content, str(path / RECORD), *needed)


def parse_state(content: bytes, where: str, *needed: str) -> dict[str, Any]:
    """The same from the bytes of the file. `where` names it in messages."""
    try:
        record = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{where}: holds a {type(record).__name__}, not names with values")
    if missing := [name for name in needed if name not in record]:
        raise CheckpointError(f"{where}: does not say {missing}")
    for name, (is_of_its_kind, kind) in _STATE_KINDS.items():
        if name in record and not is_of_its_kind(record[name]):
            raise CheckpointError(f"{where}: its {name} is not {kind}; the file was changed")
    return record


def is_count(value: object) -> bool:
    """Whether a value from JSON is a number of steps or rows, or of an attempt."""
    # A bool is an int to Python; what comes after these numbers is 64-bit arithmetic.
    return type(value) is int and 0 <= value < 2**63


_COUNT = (is_count, "a whole number from 0 on")
_STATE_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("step", "position", "rows_used", "rows_skipped"), _COUNT),
    **dict.fromkeys(("is_best", "evaluated"), (lambda value: isinstance(value, bool), "true or false")),
    "weights_sha256": (lambda value: isinstance(value, str), "a SHA-256"),
}


def check_resumable(path: Path) -> None:
    """Check that a run can go on from a checkpoint: its files are whole, its weights those that it recorded, its position is one.

    Raises:
        CheckpointError: it cannot, and why.
    """
    verify(path)
    recorded = read_state(path, "step", "position", "weights_sha256")["weights_sha256"]
    try:
        found = file_weights_sha256(path / WEIGHTS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: cannot be read: {error}") from error
    if found not in (None, recorded):
        raise CheckpointError(other_weights(path / WEIGHTS, found, recorded))


def other_weights(path: Path | str, found: str | None, recorded: str) -> str:
    """What is said of weights that are not those that a checkpoint recorded."""
    return f"{path}: the weights have SHA-256 {found}, but {recorded} were saved; the files and {CHECKSUMS} were changed"


def names(folder: Path) -> list[str]:
    """Folder names of all finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda name: tuple(int(part) for part in name.removeprefix("step-").split(".")))


# ---------------------------------------------------------------- which one


@dataclass(frozen=True)
class Pointer:
    """What the pointer file says.

    Attributes:
        latest: folder name of the newest checkpoint.
        best: folder name of the best one, or None.
        attempt: the attempt that wrote this; a lower one may not replace it.
    """

    latest: str
    best: str | None
    attempt: int


def read_pointer(folder: Path) -> Pointer | None:
    """The pointer; where it is missing or damaged, what the checkpoints themselves tell; None without any checkpoint."""
    return _stored_pointer(folder) or _rebuilt_pointer(folder)


def _stored_pointer(folder: Path) -> Pointer | None:
    """The pointer as it is on disk; None where it is not one that a commit has written."""
    if not is_regular_file(folder / POINTER):
        return None
    try:
        pointer = Pointer(**without_version(parse_json((folder / POINTER).read_bytes()), POINTER))
    except (OSError, ValueError, TypeError, InputError):
        return None
    there = names(folder)
    # Compared with names that are there, nothing in the file can lead out of the folder.
    named = pointer.latest in there and (pointer.best is None or pointer.best in there)
    return pointer if named and is_count(pointer.attempt) and pointer.attempt == attempt_of(pointer.latest) else None


def attempt_of(name: str) -> int:
    """The attempt that wrote a checkpoint, from its name."""
    return int(name.rpartition(".")[2])


def _rebuilt_pointer(folder: Path) -> Pointer | None:
    whole = [name for name in names(folder) if _is_resumable(folder / name)]
    if not whole:
        return None
    best = [name for name in whole if read_state(folder / name).get("is_best")]
    return Pointer(whole[-1], best[-1] if best else None, max(map(attempt_of, whole)))


def _is_resumable(path: Path) -> bool:
    try:
        check_resumable(path)
    except CheckpointError:
        return False
    return True


def find_latest(folder: Path, say: Callable[[str], None]) -> str | None:
    """The name of the newest checkpoint from which the run can go on, the pointer's or an older one; None without any checkpoint.

    Args:
        folder: the folder of checkpoints.
        say: is told of every checkpoint that had to be passed over, and of a pointer that says nothing.

    Raises:
        CheckpointError: when there are checkpoints but none is whole.
    """
    pointer = _stored_pointer(folder)
    candidates = list(reversed(names(folder)))
    if pointer:
        # A newer one was never committed.
        candidates = candidates[candidates.index(pointer.latest) :]
    elif candidates:
        say(
            f"{POINTER} is missing, damaged or names no checkpoint that is there; the newest that is whole was looked for instead"
        )
    reasons = []
    for name in candidates:
        try:
            check_resumable(folder / name)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"checkpoint {name} is passed over: {error}")
        else:
            return name
    if candidates:
        raise CheckpointError(f"{folder}: none of {candidates} is whole: {'; '.join(reasons)}. Start a new run.")
    return None
