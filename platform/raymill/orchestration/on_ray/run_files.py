"""The files of a run on the way from one disk to another: their order, and that a checkpoint is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from raymill.checkpoint import directory
from raymill.files import make_private_folder, replace_file

CHECKPOINTS, ATTEMPT, WHOLE = "checkpoints", "attempt", directory.CHECKSUMS
"""Names in a run's folder; the last is written when all else of a checkpoint is."""

POINTER = f"{CHECKPOINTS}/{directory.POINTER}"

HELD, ARRIVING = ".held", ".arriving"
"""Folders in it: what is being sent, and what has not all come."""

Stamp = tuple[int, int]
"""Size and time of change of a file."""


def unit_of(name: str) -> str:
    """What a file comes and goes with: its checkpoint, or itself."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == CHECKPOINTS else name


def in_order(names: Iterable[str]) -> list[str]:
    """What is there comes before what tells of it: last the number of the attempt, by which it is seen who knows more; before it
    the pointer to a checkpoint, and before that checkpoints, each with its checksums last.
    """

    def place(name: str) -> tuple[bool, bool, bool, str, bool, str]:
        unit = unit_of(name)
        return name == ATTEMPT, name == POINTER, unit != name, unit, name.endswith(f"/{WHOLE}"), name

    return sorted(names, key=place)


def without_torn(names: Iterable[str]) -> list[str]:
    """In order, without the files of checkpoints of which not all came."""
    ordered = in_order(names)
    whole = {unit_of(name) for name in ordered if name.endswith(f"/{WHOLE}")}
    return [name for name in ordered if unit_of(name) == name or unit_of(name) in whole]


def stamps(folder: Path) -> dict[str, Stamp]:
    """The files of a folder; one that is being replaced or removed just now may be missing."""
    found: dict[str, Stamp] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        with suppress(FileNotFoundError):
            # What begins with a point is not finished.
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[str(name)] = path.stat().st_size, path.stat().st_mtime_ns
    return {name: found[name] for name in without_torn(found)}


@contextmanager
def held(folder: Path) -> Iterator[dict[str, Stamp]]:
    """The files of a folder as `stamps` has them. Within this those of checkpoints stay, in `HELD`, whoever removes them."""
    shutil.rmtree(folder / HELD, ignore_errors=True)
    found, gone = stamps(folder), set[str]()
    try:
        for name in found:
            if unit_of(name) == name:
                continue
            make_private_folder((folder / HELD / name).parent)
            try:
                _link(folder / name, folder / HELD / name)
            except FileNotFoundError:
                gone.add(unit_of(name))
        yield {name: stamp for name, stamp in found.items() if unit_of(name) not in gone}
    finally:
        shutil.rmtree(folder / HELD, ignore_errors=True)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except FileNotFoundError:
        raise
    except OSError:  # the file system has no links
        shutil.copyfile(path, to)


def open_held(folder: Path, name: str) -> IO[bytes]:
    """A file of those that `held` has."""
    return open(folder / name if unit_of(name) == name else folder / HELD / name, "rb")


def write(folder: Path, content: Iterable[tuple[str, Any]]) -> None:
    """Write files, given as `in_order` has them, with their bytes; a checkpoint is there whole or not at all."""
    make_private_folder(folder)
    shutil.rmtree(folder / ARRIVING, ignore_errors=True)
    for name, data in content:
        if name in (POINTER, ATTEMPT):
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
