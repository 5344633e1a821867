"""A checkpoint becomes the newest: written, pointed at, old ones removed; and what a late or killed writer leaves is harmless."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from raymill import faults
from raymill.checkpoint.directory import (
    POINTER,
    REPLACED,
    WEIGHTS,
    Content,
    Pointer,
    names,
    read_pointer,
    read_state,
    save,
)
from raymill.errors import CheckpointError
from raymill.files import STAGE, replace_file, with_version

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


def commit(folder: Path, attempt: int, keep: int, content: Content, *, best: bool) -> str:
    """Write a checkpoint, move the pointer to it, and remove old ones.

    Args:
        folder: the folder of checkpoints.
        attempt: which attempt writes.
        keep: how many of the newest stay.
        content: what it holds.
        best: whether it is the best so far.

    Returns:
        The checkpoint's name, "step-00000038.1".

    Raises:
        CheckpointError: when it could not be written, or a later attempt has taken over.
    """
    name = f"step-{content.step:08d}.{attempt}"
    try:
        _commit(folder, name, attempt, keep, content, best)
    except (OSError, SafetensorError) as error:
        # What is there of it takes room that the next try needs.
        shutil.rmtree(folder / f"{STAGE}{name}", ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the checkpoint of step {content.step} could not be written: {error}. The one before "
            "it is intact. Make room there, or make it writable, and resume the run."
        ) from error
    return name


def _commit(folder: Path, name: str, attempt: int, keep: int, content: Content, best: bool) -> None:
    faults.point("before_commit")
    save(folder, name, content)
    faults.point("after_rename")
    before = read_pointer(folder)
    if before and before.attempt > attempt:
        raise CheckpointError(
            f"attempt {attempt} wrote checkpoint {name} after attempt {before.attempt} had taken over; it is not used"
        )
    pointer = Pointer(name, name if best else (before.best if before else None), attempt)
    faults.point("before_pointer")
    _point(folder, pointer)
    faults.point("after_pointer", folder / name / WEIGHTS)
    for old in to_remove(names(folder), pointer, keep):
        faults.point("before_remove_old")
        shutil.rmtree(folder / old)
    faults.point("after_commit")


def _point(folder: Path, pointer: Pointer) -> None:
    replace_file(folder / POINTER, json.dumps(with_version(pointer.__dict__)))


def settled_best(folder: Path, latest: str) -> str | None:
    """The name of the best checkpoint. Call before an attempt writes, when no other does.

    Behind an evaluation the checkpoint before it is replaced by one of the same name, which the pointer has named already; only
    then does it name that one as the best. What a kill between the two left out is done here.

    Args:
        folder: the folder of checkpoints.
        latest: the newest from which the run can go on, see `find_latest`.
    """
    pointer = read_pointer(folder)
    if pointer is None or pointer.best == latest or pointer.latest != latest or not read_state(folder / latest).get("is_best"):
        return pointer.best if pointer else None
    _point(folder, replace(pointer, best=latest))
    return latest


def clean(folder: Path) -> None:
    """Put back what a kill left aside, and remove what it left unfinished. Call before an attempt writes, when no other does."""
    if folder.is_dir():
        for path in folder.glob(f"{REPLACED}*"):
            final = folder / path.name.removeprefix(REPLACED)
            shutil.rmtree(path) if final.exists() else path.rename(final)
        for path in folder.glob(f"{STAGE}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
