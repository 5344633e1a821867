"""Tar files of samples, as WebDataset lays them out: files beside each other whose names are alike up to the first dot are a row.

    0001.jpg 0001.cls 0002.jpg 0002.cls ...     columns={"image": "jpg", "label": "cls"}

Nothing is unpacked to disk, so a member's name leads nowhere; links and devices are refused all the same.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raymill.errors import DataError, InputError, Problem
from raymill.storage.find import place_of
from raymill.storage.place import Entry, Place, changed, digest_of, files_of, in_parallel, unchanged, where
from raymill.task import Column, Field, Fragment, Rows, Schema

MOST_BYTES = 16 * 2**20
"""Of a fragment, about."""

KEY = "key"
"""The column with the name that a sample's files share."""

Span = tuple[int, int]
"""Where a member's content is in the file: offset and bytes."""

Sample = tuple[str, Mapping[str, Span]]
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
        at = place_of(self.folder)

        def listed(one: Entry) -> list[Fragment] | Problem:
            try:
                groups = at.persisting(lambda: self._groups(at, one.name))
            except (OSError, ValueError, tarfile.TarError) as error:
                return Problem(where(at, one.name), str(error), "a whole tar file of samples", "Correct or restore it.")
            return [self._fragment(one.name, number, group) for number, group in enumerate(groups)]

        parts = in_parallel(at, listed, files_of(at, self.pattern, "tar files"))
        found = [fragment for part in parts if isinstance(part, list) for fragment in part]
        problems = [part for part in parts if isinstance(part, Problem)]
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
        at = place_of(self.folder)
        what = where(at, fragment.path)

        def read(version: str) -> tuple[Sequence[Sample], int, bytes]:
            groups = self._groups(at, fragment.path)
            if fragment.part >= len(groups) or self._fragment(fragment.path, fragment.part, groups[fragment.part]) != fragment:
                raise changed(what)
            samples = groups[fragment.part]
            # Samples lie one behind the other, so all of them are one read.
            spans = [places[extension] for _, places in samples for extension in self.columns.values()]
            start = min((offset for offset, _ in spans), default=0)
            end = max((offset + num_bytes for offset, num_bytes in spans), default=0)
            return samples, start, at.read(fragment.path, start, end - start)

        try:
            samples, start, data = unchanged(at, fragment.path, read)
            rows: Rows = {KEY: [key for key, _ in samples]}
            for name, extension in self.columns.items():
                rows[name] = self._column(data, start, samples, extension)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise DataError(f"{what}: cannot be read: {error}. Restore this file from its source, then resume.") from error
        return rows

    def _column(self, data: bytes, start: int, samples: Sequence[Sample], extension: str) -> Column:
        spans = (places[extension] for _, places in samples)
        raw = [data[offset - start : offset - start + num_bytes] for offset, num_bytes in spans]
        try:
            if extension == "cls":
                return np.array([int(value) for value in raw], np.int64)
            return [value.decode() for value in raw] if extension in ("txt", "json") else raw
        except (ValueError, OverflowError) as error:
            keys = [key for (key, _), value in zip(samples, raw, strict=True) if not _is_sound(value, extension)]
            raise ValueError(f"sample {keys[0] if keys else samples[0][0]!r}, {extension}: {error}") from error

    def _groups(self, at: Place, name: str) -> list[list[Sample]]:
        """The samples of a file, as they are read together."""
        groups: list[list[Sample]] = []
        room = 0
        for key, places in _index(at, name, at.version(name)):
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
            name, number, len(samples), num_bytes, digest_of([(key, sorted(places.items())) for key, places in samples])
        )


def _is_sound(value: bytes, extension: str) -> bool:
    try:
        return bool(int(value) or True) if extension == "cls" else bool(value.decode() or True)
    except ValueError:
        return False


@lru_cache(maxsize=64)
def _index(place: Place, name: str, version: str) -> tuple[Sample, ...]:
    """The samples of a file, from its headers.

    Raises:
        ValueError, tarfile.TarError: it is damaged or cut short, or holds what is no file.
    """
    found: list[Sample] = []
    places: dict[str, Span] = {}
    last = None
    size_bytes = place.entry(name).size_bytes
    with place.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
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
