"""Tar files of samples, as WebDataset lays them out: files beside each other whose names are alike up to the first dot are a row.

    0001.jpg 0001.cls 0002.jpg 0002.cls ...     columns={"image": "jpg", "label": "cls"}

Nothing is unpacked to disk, so a member's name leads nowhere; links and devices are refused all the same.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from raymill.data.sources import files
from raymill.errors import DataError, InputError, Problem
from raymill.task import Column, Field, Fragment, Rows, Schema

MOST_BYTES = 16 * 2**20
"""Of a fragment, about."""

KEY = "key"
"""The column with the name that a sample's files share."""

Place = tuple[int, int]
"""Where a member's content is in the file: offset and bytes."""

Sample = tuple[str, Mapping[str, Place]]
"""A key, and extension -> place."""


@dataclass(frozen=True)
class TarSource:
    """The samples of all tar files of a folder; a fragment is about 16 MiB of them, one after the other.

    Attributes:
        folder: holds the files.
        columns: name of a column -> extension of its file in each sample. "cls" is a whole number, "txt" and "json" are text, any
            other is bytes. The column "key" comes with them.
        pattern: which files, as in `Path.glob`; they are not compressed.
        classes: how many there are, where a sample has a "cls".
    """

    folder: str
    columns: Mapping[str, str]
    pattern: str = "**/*.tar"
    classes: int | None = None

    @property
    def schema(self) -> Schema:
        """The columns, as the pipeline's schema."""
        return {KEY: Field("text"), **{name: self._field(extension) for name, extension in self.columns.items()}}

    def _field(self, extension: str) -> Field:
        if extension == "cls":
            return Field("int64", classes=self.classes)
        return Field("text" if extension in ("txt", "json") else "bytes")

    def fragments(self) -> Sequence[Fragment]:
        """List the samples from the headers of the files.

        Raises:
            InputError: there are no files or no samples; with each file that is damaged or cut short, holds a link or a device,
                or a sample without one of the columns.
        """
        found: list[Fragment] = []
        problems: list[Problem] = []
        for path in files.files_of(self.folder, self.pattern, "tar files"):
            name = path.relative_to(self.folder).as_posix()
            try:
                found += [self._fragment(name, number, group) for number, group in enumerate(self._groups(name))]
            except (OSError, ValueError, tarfile.TarError) as error:
                problems.append(Problem(str(path), str(error), "a whole tar file of samples", "Correct or restore it."))
        if not found and not problems:
            problems.append(Problem(self.folder, "no samples in any file", "at least one", "Name another folder."))
        if problems:
            raise InputError(problems)
        return found

    def read(self, fragment: Fragment) -> Rows:
        """The samples of a fragment.

        Raises:
            DataError: the file was changed, or a value is not of its kind; names the file and the sample.
        """
        path = Path(self.folder, fragment.path)
        try:
            groups = self._groups(fragment.path)
            if fragment.part >= len(groups) or self._fragment(fragment.path, fragment.part, groups[fragment.part]) != fragment:
                raise DataError(f"{path}: the file has changed since the run's manifest was taken. Start a new run.")
            samples = groups[fragment.part]
            with open(path, "rb") as file:
                rows: Rows = {KEY: [key for key, _ in samples]}
                for name, extension in self.columns.items():
                    rows[name] = self._column(file.fileno(), path, samples, extension)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise DataError(f"{path}: cannot be read: {error}. Restore this file from its source, then resume.") from error
        return rows

    def _column(self, file: int, path: Path, samples: Sequence[Sample], extension: str) -> Column:
        raw = [os.pread(file, num_bytes, offset) for offset, num_bytes in (places[extension] for _, places in samples)]
        try:
            if extension == "cls":
                return np.array([int(value) for value in raw], np.int64)
            return [value.decode() for value in raw] if extension in ("txt", "json") else raw
        except (ValueError, OverflowError) as error:
            keys = [key for (key, _), value in zip(samples, raw, strict=True) if not _is_sound(value, extension)]
            raise ValueError(f"sample {keys[0] if keys else samples[0][0]!r}, {extension}: {error}") from error

    def _groups(self, name: str) -> list[list[Sample]]:
        """The samples of a file, as they are read together."""
        path = Path(self.folder, name)
        status = path.stat()
        groups: list[list[Sample]] = []
        room = 0
        for key, places in _index(str(path), status.st_size, status.st_mtime_ns):
            if missing := [extension for extension in self.columns.values() if extension not in places]:
                raise ValueError(f"sample {key!r} has no {', '.join(missing)}, but {', '.join(places)}")
            num_bytes = sum(places[extension][1] for extension in self.columns.values())
            if not groups or num_bytes > room:
                groups.append([])
                room = MOST_BYTES
            groups[-1].append((key, places))
            room -= num_bytes
        return groups

    def _fragment(self, name: str, number: int, samples: Sequence[Sample]) -> Fragment:
        num_bytes = sum(places[extension][1] for _, places in samples for extension in self.columns.values())
        return Fragment(
            name, number, len(samples), num_bytes, files.digest_of([(key, sorted(places.items())) for key, places in samples])
        )


def _is_sound(value: bytes, extension: str) -> bool:
    try:
        return bool(int(value) or True) if extension == "cls" else bool(value.decode() or True)
    except ValueError:
        return False


@lru_cache(maxsize=64)
def _index(path: str, size_bytes: int, mtime_ns: int) -> tuple[Sample, ...]:
    """The samples of a file, from its headers.

    Raises:
        ValueError, tarfile.TarError: it is damaged or cut short, or holds what is no file.
    """
    found: list[Sample] = []
    places: dict[str, Place] = {}
    last = None
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(f"{member.name!r} is a link, a device or sparse, and no plain file")
            if member.offset_data + member.size > size_bytes:
                raise ValueError(f"{member.name!r} claims {member.size} bytes, which the file does not have; it is cut short")
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != last:
                places, last = {}, key
                found.append((key, places))
            if extension.lower() in places:
                raise ValueError(f"sample {key!r} has two files .{extension.lower()}")
            places[extension.lower()] = (member.offset_data, member.size)
    return tuple(found)
