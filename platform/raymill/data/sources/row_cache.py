"""A source whose rows are kept on this machine's disk once they were read: for data far away, or slow to decode."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from filelock import FileLock

from raymill.data.rows import NUMBERS, pack, unpack
from raymill.data.seeds import watching_draws
from raymill.errors import InputError, Problem
from raymill.files import make_private_folder, private
from raymill.paths import home, project_root
from raymill.task import Fragment, Rows, Source

MAGIC = b"raymill rows 1\n"
LENGTHS = struct.Struct("<IQI")
"""Behind it: checksum of all that follows, bytes of the header, number of buffers. Then the header, the sizes of the buffers and,
each from a multiple of 64 bytes on, the buffers."""

ALIGNMENT_BYTES = 64

LIBRARIES = ("raymill", "numpy", "pillow", "pyarrow", "torch", "torchvision")
"""Whose versions rows may depend on."""


def cached(source: Source, *, most_bytes: int = 20 * 2**30) -> CachedSource:
    """Keep the rows of a source on this machine's disk, as they were read: the next epoch, run or trial reads them from there.

    Each fragment is read once on a machine, whatever number of processes ask for it. Its rows are kept under a digest of the
    source with its arguments, the fragment's identity, the project's code and the versions of the libraries that may matter: who
    changes one of them reads anew. What draws random numbers while it reads gives other rows each time, and is not
    kept. Files are in `.raymill/cache/rows`, and may be deleted at any time.

    Args:
        source: a dataclass of plain values, functions of modules (no lambdas) and other such dataclasses.
        most_bytes: beyond that nothing more is kept, and read as without a cache.

    Raises:
        InputError: the source holds something by which it cannot be told from others, such as a lambda.
    """
    made = CachedSource(source, most_bytes)
    made.digest  # noqa: B018  # raises
    return made


@dataclass(frozen=True)
class CachedSource:
    """See `cached`.

    Attributes:
        source: what is read.
        most_bytes: that are kept, of all sources together.
    """

    source: Source
    most_bytes: int

    @cached_property
    def digest(self) -> str:
        """Of the source, the project's code, and the libraries.

        Raises:
            InputError: see `cached`.
        """
        told = repr(_in_plain_values(self.source)).encode()
        return hashlib.blake2b(told + b"\0" + _of_code_and_libraries(str(project_root())), digest_size=16).hexdigest()

    def fragments(self) -> Sequence[Fragment]:
        """Those of the source: a run is the same with and without a cache."""
        return self.source.fragments()

    def read(self, fragment: Fragment) -> Rows:
        """The rows of a fragment, from the disk where they are there. Arrays are read-only then.

        Raises:
            DataError: as the source.
        """
        told = repr((self.digest, fragment.path, fragment.part, fragment.num_rows, fragment.identity))
        path = home() / "cache" / "rows" / f"{hashlib.blake2b(told.encode(), digest_size=16).hexdigest()}.rows"
        if (rows := _kept(path)) is not None:
            return rows
        try:
            make_private_folder(path.parent)
            lock = FileLock(path.with_suffix(".lock"), mode=0o600)
            lock.acquire()
        except (OSError, InputError) as error:
            _say_once(f"rows are not kept: {error}")
            return self.source.read(fragment)
        try:
            # Somebody else may have read it meanwhile.
            if (rows := _kept(path)) is not None:
                return rows
            with watching_draws() as draws:
                rows = self.source.read(fragment)
            if draws.noticed:
                _say_once(f"{fragment.path}: its rows are drawn at random while they are read, and so are not kept")
            else:
                self._keep(path, rows)
            return rows
        finally:
            lock.release()
            with suppress(OSError):
                path.with_suffix(".lock").unlink()

    def _keep(self, path: Path, rows: Rows) -> None:
        """Write rows, whole or not at all; where that fails it is said, and nothing is lost."""
        staged = path.with_suffix(f".{os.getpid()}")
        try:
            lengths, parts = _body(rows)
            size_bytes, held = sum(map(len, parts)), _bytes_in(path.parent)
            if held[0] + size_bytes > self.most_bytes:
                _say_once(f"{path.parent} holds {held[0]} bytes, and takes no more rows. Delete it, or raise most_bytes")
                return
            checksum = 0
            for part in parts:
                checksum = zlib.crc32(part, checksum)
            held[0] += size_bytes
            with open(staged, "wb", opener=private) as file:
                file.write(MAGIC + LENGTHS.pack(checksum, *lengths))
                file.writelines(parts)
            os.replace(staged, path)
        except (OSError, TypeError) as error:
            _say_once(f"rows are not kept: {error}")
            with suppress(OSError):
                staged.unlink()


def _kept(path: Path) -> Rows | None:
    """The rows of a file; None where there is none, or it is damaged, which is said."""
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (FileNotFoundError, ValueError):
        return None
    try:
        return _rows_in(data)
    except (ValueError, struct.error) as error:
        _say_once(f"{path} is damaged ({error}), and is made again")
        return None


def _body(rows: Rows) -> tuple[tuple[int, int], list[bytes | memoryview]]:
    """What a file holds behind its checksum: the lengths of the header and of the list of buffers; and all parts in their order.

    Raises:
        TypeError: a column that cannot travel cannot be kept either.
    """
    header, buffers = pack(rows)
    parts: list[bytes | memoryview] = [header.encode(), struct.pack(f"<{len(buffers)}Q", *map(len, buffers))]
    at = len(MAGIC) + LENGTHS.size + sum(map(len, parts))
    for buffer in buffers:
        parts += [bytes(-at % ALIGNMENT_BYTES), buffer]
        at += -at % ALIGNMENT_BYTES + len(buffer)
    return (len(parts[0]), len(buffers)), parts


def _rows_in(data: memoryview) -> Rows:
    begin = len(MAGIC) + LENGTHS.size
    checksum, header_bytes, num_buffers = LENGTHS.unpack_from(data, len(MAGIC))
    if bytes(data[: len(MAGIC)]) != MAGIC or zlib.crc32(data[begin:]) != checksum:
        raise ValueError("its checksum is another one")
    sizes = struct.unpack_from(f"<{num_buffers}Q", data, begin + header_bytes)
    header = bytes(data[begin : begin + header_bytes]).decode()
    return unpack(header, list(_buffers(data, begin + header_bytes + 8 * num_buffers, sizes)))


def _buffers(data: memoryview, at: int, sizes: Sequence[int]) -> Iterator[memoryview]:
    for size in sizes:
        at += -at % ALIGNMENT_BYTES
        yield data[at : at + size]
        at += size


def _in_plain_values(value: Any) -> object:
    """What tells a source from others with the same code: all that it was given, the same in every process.

    Raises:
        InputError: it was given something of which that cannot be said.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return repr(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, partial):
        return "partial", _in_plain_values([value.func, value.args, value.keywords])
    if isinstance(value, Mapping):
        return [(_in_plain_values(key), _in_plain_values(one)) for key, one in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, map(_in_plain_values, value)))
    if isinstance(value, list | tuple):
        return [_in_plain_values(one) for one in value]
    if inspect.ismethod(value):
        return "method", value.__name__, _in_plain_values(value.__self__)
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str) and "<" not in name and hasattr(value, "__module__"):
        return value.__module__, name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        return (
            kind.__module__,
            kind.__qualname__,
            [(one.name, _in_plain_values(getattr(value, one.name))) for one in fields(value)],
        )
    fix = (
        "Give functions of modules, or functools.partial of one, in place of lambdas, functions inside others and other objects."
    )
    raise InputError([Problem("cached", repr(value), "a source that can be told from others", fix)])


@lru_cache(maxsize=1)
def _of_code_and_libraries(project: str) -> bytes:
    """The code that rows may depend on: all of the project's own, since what calls what is known only when it runs."""
    hashed = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(project).glob("*/**/*.py")):
        if not any(part.startswith(".") for part in file.relative_to(project).parts):
            hashed.update(repr((file.relative_to(project).as_posix(), file.read_bytes())).encode())
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            hashed.update(f"{name} {version(name)}".encode())
    return hashed.digest()


@lru_cache(maxsize=4)
def _bytes_in(folder: Path) -> list[int]:
    """Bytes of all rows that are kept there, in a list of one that this process adds to: counted once, and then about right."""
    with os.scandir(folder) as found:
        return [sum(entry.stat().st_size for entry in found if entry.name.endswith(".rows"))]


@lru_cache(maxsize=64)
def _say_once(what: str) -> None:
    """On stderr, once in a process."""
    print(f"cache: {what}.", file=sys.stderr, flush=True)
