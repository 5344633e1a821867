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
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill import faults
from raymill.errors import CheckpointError, InputError
from raymill.files import STAGE, sync_folder, with_version, without_version

WEIGHTS, OPTIMIZER, RECORD = "weights.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, OPTIMIZER, RECORD)
CHECKSUMS = "checksums.json"
POINTER = "latest.json"
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
    final = folder / name
    if final.exists():
        shutil.rmtree(final)
    os.rename(stage, final)
    sync_folder(folder)


def write_checksums(folder: Path) -> None:
    """Write the size and SHA-256 of each file of a folder into a file beside them."""
    sums = {
        path.name: {"num_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != CHECKSUMS
    }
    (folder / CHECKSUMS).write_text(json.dumps(with_version({"files": sums}), indent=1))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, names: Collection[str] = FILES) -> None:
    """Check these files of a folder, which must be all that its checksums name, against them.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        found = without_version(json.loads((path / CHECKSUMS).read_text()), str(path / CHECKSUMS))
        expected = {name: (entry["num_bytes"], entry["sha256"]) for name, entry in found["files"].items()}
    except InputError as error:
        raise CheckpointError(str(error.problems[0])) from error
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable {CHECKSUMS}; it is not whole") from error
    if expected.keys() != set(names):
        raise CheckpointError(f"{path}: its {CHECKSUMS} names {sorted(expected)}, not {sorted(names)}")
    for name, (num_bytes, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {path.name} is not whole")
        if file.stat().st_size != num_bytes or file_sha256(file) != sha256:
            raise CheckpointError(f"{file}: size or SHA-256 is not what {CHECKSUMS} says; the file was damaged or changed")


def read(path: Path) -> Packed:
    """The files of one checkpoint, verified.

    Raises:
        CheckpointError: when it is not whole.
    """
    verify(path)
    return Packed(read_state(path)["step"], {name: (path / name).read_bytes() for name in FILES})


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors, the position among it."""
    return json.loads((path / RECORD).read_text())  # type: ignore[no-any-return]


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
    with suppress(FileNotFoundError, ValueError, TypeError, InputError):
        pointer = Pointer(**without_version(json.loads((folder / POINTER).read_text()), POINTER))
        if {pointer.latest, pointer.best} - {None} <= set(names(folder)):
            return pointer
    return _rebuilt_pointer(folder)


def _rebuilt_pointer(folder: Path) -> Pointer | None:
    whole = [name for name in names(folder) if _is_whole(folder / name)]
    if not whole:
        return None
    best = [name for name in whole if read_state(folder / name)["is_best"]]
    attempt = max(int(name.rpartition(".")[2]) for name in whole)
    return Pointer(whole[-1], best[-1] if best else None, attempt)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def find_latest(folder: Path, say: Callable[[str], None]) -> str | None:
    """The name of the newest checkpoint that is whole, the pointer's or an older one; None without any checkpoint.

    Args:
        folder: the folder of checkpoints.
        say: is told of every checkpoint that had to be passed over.

    Raises:
        CheckpointError: when there are checkpoints but none is whole.
    """
    pointer = read_pointer(folder)
    candidates = list(reversed(names(folder)))
    if pointer and pointer.latest in candidates:
        candidates = candidates[candidates.index(pointer.latest) :]
    reasons = []
    for name in candidates:
        try:
            verify(folder / name)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"checkpoint {name} is passed over: {error}")
        else:
            return name
    if candidates:
        raise CheckpointError(f"{folder}: none of {candidates} is whole: {'; '.join(reasons)}. Start a new run.")
    return None
