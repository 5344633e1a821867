"""Object stores and web servers, through Arrow's file systems (S3, Google Cloud Storage, Azure, HDFS) and fsspec's (HTTP).

Keys, tokens, regions and endpoints come from where each service's own tools look for them (environment, profile, the machine's
role), never from a job. What fails in a way that may pass is tried again, with longer and longer waits; an answer that is cut
short is such a failure. The waits draw from no generator, since a job's rows may.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from pyarrow import ArrowInvalid, NativeFile, fs

from raymill.errors import InputError, Problem
from raymill.storage.place import Entry

T = TypeVar("T")

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az", "hdfs", "http", "https")

CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 10.0, 30.0
"""Until a connection is there; without a byte."""

WAITS_S = (0.1, 0.3, 1.0, 3.0, 9.0)
"""Between tries."""

CLIENT_TRIES = 3
"""Of the service's own client, of each request, in each of ours."""

NUM_READERS = 16

BUFFER_BYTES = 2**20
"""Read at once of a file that is read in small pieces."""

_LASTING = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET|NO_SUCH_KEY|INVALID_TOKEN", re.I)


@dataclass(frozen=True)
class Far:
    """A folder of an object store or of a web server; see `Place`.

    Attributes:
        base: the folder inside the file system.
        system: Arrow's file system.
        web: fsspec's, where that is what Arrow's stands on.
    """

    root: str
    base: str = field(compare=False)
    system: fs.FileSystem = field(compare=False, repr=False)
    web: Any = field(default=None, compare=False, repr=False)
    num_readers: int = NUM_READERS

    def entries(self, pattern: str, *, may_link: bool) -> list[Entry]:
        """The files that fit; see `Place.entries`. A pattern without wildcards is one file, and nothing is listed."""
        if not any(letter in pattern for letter in "*?["):
            return [self.entry(pattern)]
        selector = fs.FileSelector(self.base, recursive=True)
        listed = self.persisting(lambda: self.system.get_file_info(selector))
        fits = glob_expression(pattern)
        found = [_entry(one, self._name(one.path)) for one in listed if one.type == fs.FileType.File]
        kept = [one for one in found if fits.fullmatch(one.name) and not any(p.startswith(".") for p in one.name.split("/"))]
        return sorted(kept, key=lambda one: one.name.split("/"))

    def folders(self) -> list[str]:
        """The folders in it; see `Place.folders`."""
        selector = fs.FileSelector(self.base, allow_not_found=True)
        listed = self.persisting(lambda: self.system.get_file_info(selector))
        return sorted(one.base_name for one in listed if one.type == fs.FileType.Directory and one.base_name[:1] != ".")

    def entry(self, name: str) -> Entry:
        """A file as it is now."""
        info = self.persisting(lambda: self.system.get_file_info(self._path(name)))
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "no such file", f"{self.root.rstrip('/')}/{name}")
        return _entry(info, name)

    def version(self, name: str) -> str:
        """Its entity tag, where the service gives one; else its size and time of change."""
        if self.web is not None:
            told = self.persisting(lambda: self.web.info(self._path(name)))
            known = [told.get(what) for what in ("size", "ETag", "Last-Modified", "Content-MD5")]
            return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
        told = self.persisting(lambda: _metadata(self.system, self._path(name)))
        tag = next((value for key, value in told.items() if key.lower() == b"etag"), None)
        if tag is not None:
            return bytes(tag).decode()
        one = self.entry(name)
        return f"{one.size_bytes} {one.mtime_ns}"

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Some of its bytes; see `Place.read`."""

        def attempt() -> bytes:
            with self.system.open_input_file(self._path(name)) as file:
                size_bytes = file.size()
                wanted = max(0, size_bytes - start) if num_bytes is None else max(0, min(num_bytes, size_bytes - start))
                file.seek(min(start, size_bytes))
                data: bytes = file.read(wanted)
            if len(data) != wanted:
                raise OSError(f"{len(data)} bytes came where {wanted} were asked for")
            return data

        return self.persisting(attempt)

    def open(self, name: str) -> IO[bytes]:
        """The file, read in large pieces."""
        file = self.persisting(lambda: self.system.open_input_file(self._path(name)))
        return io.BufferedReader(file, BUFFER_BYTES)

    def open_arrow(self, name: str) -> NativeFile:
        """The file; Arrow reads several places of it at once."""
        return self.system.open_input_file(self._path(name))

    def write(self, name: str, file: IO[bytes]) -> None:
        """Make a file, which is there once all of it is; see `Place.write`."""
        if self.web is not None:
            raise PermissionError(1, "a web server takes no files", self.root)

        def attempt() -> None:
            file.seek(0)
            with self.system.open_output_stream(self._path(name)) as stream:
                shutil.copyfileobj(file, stream, BUFFER_BYTES)

        self.persisting(attempt)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.persisting(lambda: self.system.delete_file(self._path(name)))

    def persisting(self, function: Callable[[], T]) -> T:
        """Call it, and again after a failure that may pass."""
        for wait_s in WAITS_S:
            try:
                return function()
            except (OSError, ConnectionError, TimeoutError) as error:
                if isinstance(error, FileNotFoundError | PermissionError) or _LASTING.search(str(error)):
                    raise
                time.sleep(wait_s)
        return function()

    def _path(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _name(self, path: str) -> str:
        return path.removeprefix(self.base).lstrip("/")


def _metadata(system: fs.FileSystem, path: str) -> dict[bytes, bytes]:
    with system.open_input_file(path) as file:
        # Arrow's stream over a file of Python's has none.
        return dict(file.metadata() or {})


def _entry(info: fs.FileInfo, name: str) -> Entry:
    return Entry(name, int(info.size), int(info.mtime_ns or 0))


def glob_expression(pattern: str) -> re.Pattern[str]:
    """Which names a pattern of `Path.glob` fits, for a place that cannot be asked so."""
    pieces = re.split(r"(\*\*/|\*|\?|\[[^]/]+\])", pattern)
    plain = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(plain.get(one) or (one.replace("[!", "[^") if one.startswith("[") else re.escape(one)) for one in pieces)
    )


# ---------------------------------------------------------------- addresses


@lru_cache(maxsize=16)
def far(root: str, scheme: str) -> Far:
    """The place at an address.

    Raises:
        InputError: it is of another kind, or holds what does not belong there.
    """
    if scheme not in SCHEMES:
        fix = f"Use an address of {', '.join(f'{one}://' for one in SCHEMES)}, or the path of a folder."
        raise InputError([Problem("data", f"an address of {scheme}://", "one that can be read", fix)])
    parts = urlsplit(root)
    if not parts.netloc:
        raise InputError([Problem("data", f"the address {root!r}", "one with a bucket or host", "Correct it.")])
    if parts.username or parts.password:
        fix = "Put keys where the service's own tools look for them: environment, profile, or the machine's role."
        raise InputError([Problem("data", "an address with a key in it", "an address", fix)])
    try:
        if scheme in ("http", "https"):
            return _on_the_web(root)
        return _s3(root) if scheme == "s3" else _of_arrow(root)
    except (OSError, ArrowInvalid, ValueError, NotImplementedError) as error:
        raise InputError([Problem(root, str(error), "an address that can be reached", "Correct it.")]) from error


def _s3(root: str) -> Far:
    parts = urlsplit(root)
    if parts.query or parts.fragment:
        raise ValueError(f"{parts.query or parts.fragment!r} behind the address; region and endpoint come from the environment")
    # As the AWS tools name it; Arrow looks there only for what it makes of an address by itself.
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    system = fs.S3FileSystem(
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or None,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_TRIES),
    )
    return Far(root.rstrip("/"), f"{parts.netloc}{parts.path}".rstrip("/"), system)


def _of_arrow(root: str) -> Far:
    system, base = fs.FileSystem.from_uri(root.replace("az://", "abfs://", 1))
    return Far(root.partition("?")[0].rstrip("/"), base.rstrip("/"), system)


def _on_the_web(root: str) -> Far:
    import fsspec

    web = fsspec.filesystem("http", client_kwargs={"trust_env": True})
    return Far(root.rstrip("/"), root.rstrip("/"), fs.PyFileSystem(fs.FSSpecHandler(web)), web)
