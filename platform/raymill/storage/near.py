"""A folder of this machine, or of a disk that it sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pyarrow import NativeFile, OSFile

from raymill.errors import InputError, Problem
from raymill.storage.place import Entry

T = TypeVar("T")


@dataclass(frozen=True)
class Near:
    """A folder; see `Place`."""

    root: str
    num_readers: int = 1

    def entries(self, pattern: str, *, may_link: bool) -> list[Entry]:
        """The files that fit; see `Place.entries`."""
        root = Path(self.root)
        paths = sorted(path for path in root.glob(pattern) if path.is_file() and not _is_hidden(path.relative_to(root)))
        if outside := [] if may_link else _outside(root.resolve(), paths):
            fix = "Put the file itself there; a link may lead to what is not for this job."
            raise InputError(
                [Problem(str(path), "a link that leads elsewhere", f"a file inside {self.root}", fix) for path in outside]
            )
        if not paths and not root.is_dir():
            raise FileNotFoundError(2, "no such folder", self.root)
        return [self.entry(path.relative_to(root).as_posix()) for path in paths]

    def folders(self) -> list[str]:
        """The folders in it; see `Place.folders`."""
        root = Path(self.root)
        return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []

    def entry(self, name: str) -> Entry:
        """A file as it is now."""
        status = os.stat(os.path.join(self.root, name))
        return Entry(name, status.st_size, status.st_mtime_ns)

    def version(self, name: str) -> str:
        """Its size and time of change."""
        one = self.entry(name)
        return f"{one.size_bytes} {one.mtime_ns}"

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Some of its bytes; see `Place.read`."""
        with self.open(name) as file:
            file.seek(start)
            return file.read(-1 if num_bytes is None else num_bytes)

    def open(self, name: str) -> IO[bytes]:
        """The file."""
        return open(os.path.join(self.root, name), "rb")

    def open_arrow(self, name: str) -> NativeFile:
        """The file."""
        return OSFile(str(Path(self.root, name)))

    def write(self, name: str, file: IO[bytes]) -> None:
        """Make a file; see `Place.write`."""
        path = Path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        with open(staged, "wb", opener=_private) as made:
            shutil.copyfileobj(file, made)
        os.replace(staged, path)

    def remove(self, name: str) -> None:
        """Remove a file, and the folder where it was the last one."""
        path = Path(self.root, name)
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def persisting(self, function: Callable[[], T]) -> T:
        """Call it once: what goes wrong on a disk goes wrong again."""
        return function()


def _outside(root: Path, files: Sequence[Path]) -> list[Path]:
    """Those that are links out of a folder, or lie in one that is."""
    inside = {parent: parent.resolve().is_relative_to(root) for parent in {path.parent for path in files}}
    linked = {path for path in files if path.is_symlink() and not path.resolve().is_relative_to(root)}
    return [path for path in files if path in linked or not inside[path.parent]]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
