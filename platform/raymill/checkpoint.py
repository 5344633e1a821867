"""A snapshot on disk: staged, flushed, hashed, renamed, and only then pointed at. No pickle is written or read.

    checkpoints/
        latest.json                     the pointer: newest and best checkpoint, and the attempt that wrote it
        step-00000038.1/                step 38, written by attempt 1
            weights.safetensors         parameters and buffers
            optimizer.safetensors       optimizer tensors
            state.json                  everything else, the position among it
            manifest.json               size and SHA-256 of each file

A kill at any moment leaves either the old pointer with an intact checkpoint behind it, or the new one. Loading checks
sizes and hashes and falls back to the newest checkpoint before that is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raymill import faults
from raymill.errors import CheckpointError

if TYPE_CHECKING:
    from raymill.state import Snapshot

Event = dict[str, Any]

POINTER = "latest.json"
STAGE = ".stage-"
WEIGHTS, OPTIMIZER, RECORD = "weights.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, OPTIMIZER, RECORD)
NAME = re.compile(r"step-\d+\.\d+")


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
    with suppress(FileNotFoundError, ValueError, TypeError):
        pointer = Pointer(**json.loads((folder / POINTER).read_text()))
        if {pointer.latest, pointer.best} - {None} <= set(names(folder)):
            return pointer
    return _rebuilt_pointer(folder)


def _rebuilt_pointer(folder: Path) -> Pointer | None:
    whole = [name for name in names(folder) if _is_whole(folder / name)]
    if not whole:
        return None
    best = [name for name in whole if read_record(folder / name)["is_best"]]
    attempt = max(int(name.rpartition(".")[2]) for name in whole)
    return Pointer(whole[-1], best[-1] if best else None, attempt)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def write_file(path: Path, content: str) -> None:
    """Replace a small file so that a kill at any moment leaves the old or the new content."""
    staged = path.with_name(f"{STAGE}{path.name}.{os.getpid()}")
    with open(staged, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- one checkpoint


@dataclass(frozen=True)
class Packed:
    """A snapshot as the content of its files, on the way from one machine to another.

    Attributes:
        step: the step that it was taken behind.
        files: file name -> content.
    """

    step: int
    files: Mapping[str, bytes]


def pack(snapshot: Snapshot, *, best: bool) -> Packed:
    """The files of a snapshot, byte for byte as `save` writes them."""
    from safetensors.torch import save as as_bytes

    record = _described(snapshot, best)
    files = {WEIGHTS: as_bytes(snapshot.weights), OPTIMIZER: as_bytes(snapshot.optimizer), RECORD: record.encode()}
    return Packed(snapshot.record["step"], files)


def read(path: Path) -> Packed:
    """The files of one checkpoint, verified. Needs no torch.

    Raises:
        CheckpointError: when it is not whole.
    """
    verify(path)
    return Packed(read_record(path)["step"], {name: (path / name).read_bytes() for name in (WEIGHTS, OPTIMIZER, RECORD)})


def unpack(packed: Packed) -> Snapshot:
    """The snapshot of these files."""
    from safetensors.torch import load as from_bytes

    from raymill.state import Snapshot

    files = packed.files
    return Snapshot(from_bytes(files[WEIGHTS]), from_bytes(files[OPTIMIZER]), json.loads(files[RECORD]))


def _described(snapshot: Snapshot, best: bool) -> str:
    from raymill.state import weights_sha256

    return json.dumps({**snapshot.record, "is_best": best, "weights_sha256": weights_sha256(snapshot.weights)}, indent=1)


def save(folder: Path, name: str, content: Snapshot | Packed, *, best: bool) -> None:
    """Write a checkpoint under its final name, whole or not at all; it remembers whether it was the best when written."""
    stage = folder / f"{STAGE}{name}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    _write(stage, content, best)
    files = sorted(path for path in stage.iterdir())
    faults.point("before_manifest")
    manifest = {path.name: {"num_bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (stage / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in stage.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _sync_folder(stage)
    faults.point("before_rename")
    final = folder / name
    if final.exists():
        shutil.rmtree(final)
    os.rename(stage, final)
    _sync_folder(folder)


def _write(stage: Path, content: Snapshot | Packed, best: bool) -> None:
    for name in FILES:
        path = stage / name
        if isinstance(content, Packed):
            path.write_bytes(content.files[name])
        elif name == RECORD:
            path.write_text(_described(content, best))
        else:
            # Imported here: who writes packed files, a clerk with threads of Ray's, can do without torch.
            from safetensors.torch import save_file

            save_file(content.weights if name == WEIGHTS else content.optimizer, path)
        faults.point("checkpoint_file_written", path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        expected = {name: (entry["num_bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable manifest.json; the checkpoint is not whole") from error
    if expected.keys() != set(FILES):
        raise CheckpointError(f"{path}: its manifest.json names {sorted(expected)}, not {sorted(FILES)}")
    for name, (num_bytes, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the checkpoint is not whole")
        if file.stat().st_size != num_bytes or _sha256(file) != sha256:
            raise CheckpointError(f"{file}: size or SHA-256 is not what the manifest says; the file was damaged")


def load(path: Path) -> Snapshot:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: when it is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from raymill.state import Snapshot

    verify(path)
    tensors = {}
    for name in (WEIGHTS, OPTIMIZER):
        try:
            tensors[name] = load_file(path / name)
        except SafetensorError as error:
            raise CheckpointError(f"{path / name}: is no safetensors file: {error}") from error
    return Snapshot(tensors[WEIGHTS], tensors[OPTIMIZER], read_record(path))


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors, the position among it. Needs no torch."""
    return json.loads((path / "state.json").read_text())  # type: ignore[no-any-return]


def names(folder: Path) -> list[str]:
    """Folder names of all finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda name: tuple(int(part) for part in name.removeprefix("step-").split(".")))


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
    for name in candidates:
        try:
            verify(folder / name)
        except CheckpointError as error:
            say(f"checkpoint {name} is passed over: {error}")
        else:
            return name
    if candidates:
        raise CheckpointError(f"{folder}: none of {candidates} is whole. Start a new run.")
    return None


# ---------------------------------------------------------------- keeping them


def better(value: float | None, best: float | None, mode: Literal["max", "min"]) -> bool:
    """Whether a metric's value is a new best. NaN never is."""
    if value is None or math.isnan(value):
        return False
    if best is None:
        return True
    return value > best if mode == "max" else value < best


def to_remove(all_names: list[str], pointer: Pointer, keep: int) -> list[str]:
    """The checkpoints that may go: neither among the newest `keep`, nor the newest, nor the best."""
    kept = {*all_names[-keep:], pointer.latest, pointer.best}
    return [name for name in all_names if name not in kept]


class Keeper:
    """Writes the checkpoints of one attempt in the background, one at a time."""

    def __init__(self, write: Callable[[Snapshot, bool], Event], committed: Callable[[Event], None]) -> None:
        """`write` commits a snapshot (and whether it is the best); `committed` is told of each that is safe."""
        self._write, self._committed = write, committed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, snapshot: Snapshot, *, best: bool) -> None:
        """Write a snapshot while training goes on. Waits for the save before, and raises what that one raised."""
        self.wait()
        self._writing = self._thread.submit(self._save, snapshot, best)

    def wait(self) -> None:
        """Return when the last save is safe on disk.

        Raises:
            CheckpointError: when it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _save(self, snapshot: Snapshot, best: bool) -> None:
        self._committed(self._write(snapshot, best))


def commit(folder: Path, attempt: int, keep: int, content: Snapshot | Packed, *, best: bool) -> Event:
    """Write a checkpoint, move the pointer to it, and remove old ones.

    Args:
        folder: the folder of checkpoints.
        attempt: which attempt writes.
        keep: how many of the newest stay.
        content: the snapshot.
        best: whether it is the best so far.

    Returns:
        The event that tells of it.

    Raises:
        CheckpointError: when it could not be written, or a later attempt has taken over.
    """
    from safetensors import SafetensorError

    step = content.step if isinstance(content, Packed) else int(content.record["step"])
    name = f"step-{step:08d}.{attempt}"
    try:
        _commit(folder, name, attempt, keep, content, best)
    except (OSError, SafetensorError) as error:
        # What is there of it takes room that the next try needs.
        shutil.rmtree(folder / f"{STAGE}{name}", ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the checkpoint of step {step} could not be written: {error}. The one before "
            "it is intact. Make room there, or make it writable, and resume the run."
        ) from error
    return {"kind": "checkpoint", "step": step, "path": f"checkpoints/{name}", "best": best}


def _commit(folder: Path, name: str, attempt: int, keep: int, content: Snapshot | Packed, best: bool) -> None:
    faults.point("before_commit")
    save(folder, name, content, best=best)
    faults.point("after_rename")
    before = read_pointer(folder)
    if before and before.attempt > attempt:
        raise CheckpointError(
            f"attempt {attempt} wrote checkpoint {name} after attempt {before.attempt} had taken over; it is not used"
        )
    pointer = Pointer(name, name if best else (before.best if before else None), attempt)
    faults.point("before_pointer")
    write_file(folder / POINTER, json.dumps(pointer.__dict__))
    faults.point("after_pointer", folder / name / WEIGHTS)
    for old in to_remove(names(folder), pointer, keep):
        faults.point("before_remove_old")
        shutil.rmtree(folder / old)
    faults.point("after_commit")


def clean(folder: Path) -> None:
    """Remove what kills left behind. Call before an attempt writes, when no other attempt does."""
    if folder.is_dir():
        for path in folder.glob(f"{STAGE}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
