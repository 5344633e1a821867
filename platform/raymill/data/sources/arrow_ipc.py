"""Arrow's own files: streams and Feather files, such as Hugging Face `datasets` keeps on disk.

Both are record batches, one behind the other (the file format puts a mark before them and an index behind, which is not needed:
https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format). One pass finds where each begins, and what its bytes hash to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import pyarrow as pa

from raymill.data import arrow_types
from raymill.data.arrow import describe, fits, rows_of_table, schema_problems
from raymill.data.rows import num_rows
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.storage.find import place_of
from raymill.storage.place import Entry, Place, changed, digest, files_of, in_parallel, unchanged, where
from raymill.task import Field, Fragment, Rows, Schema

MOST_BYTES = 16 * 2**20
"""Of a fragment, about: batches of Hugging Face have a thousand rows, however small."""

MAGIC = b"ARROW1\x00\x00"

DAMAGE = (OSError, pa.ArrowException, ValueError, MemoryError)
"""A damaged file may claim a message of any length."""

RESTORE = "Restore the file from its source, or write it again."


@dataclass(frozen=True)
class Batches:
    """Record batches that are read together.

    Attributes:
        start: offset of the first, in bytes.
        num_bytes: of all of them.
        num_rows: of all of them.
        digest: of the bytes.
    """

    start: int
    num_bytes: int
    num_rows: int
    digest: str


@dataclass(frozen=True)
class ArrowSource:
    """The rows of all Arrow files of a folder; a fragment is about 16 MiB of record batches.

    Attributes:
        folder: holds the files; a path, or an address such as s3://bucket/folder.
        schema: the columns to read; others are left alone.
        pattern: which files, as in `Path.glob`. Of what `DatasetDict.save_to_disk` wrote, each split has a folder of its own.
        nulls: what a null is for which its field has no `fill`: refused when its row is read, or what makes its row bad.
    """

    folder: str
    schema: Schema
    pattern: str = "**/*.arrow"
    nulls: Literal["refuse", "bad_rows"] = "refuse"

    @classmethod
    def inferred(
        cls,
        folder: str,
        columns: Sequence[str] | None = None,
        *,
        pattern: str = "**/*.arrow",
        nulls: Literal["refuse", "bad_rows"] = "refuse",
        **fields: Field,
    ) -> ArrowSource:
        """The same with the schema that the first file has; see `ParquetSource.inferred`. Class labels keep their number."""
        at = place_of(folder)
        first = files_of(at, pattern, "Arrow files")[0]
        what = where(at, first.name)
        try:
            columns_there = _listed(at, first)[0]
        except DAMAGE as error:
            raise InputError([Problem(what, str(error).rstrip("."), "a whole Arrow file", RESTORE)]) from error
        found, without = arrow_types.schema_of_columns(columns_there)
        counts = {name: count for name, count in _num_classes(columns_there).items() if name in found}
        labels = {name: Field(found[name].dtype, classes=count) for name, count in counts.items()}
        known = {**found, **labels, **fields}
        expected = "a column that rows can have"
        problems = [
            Problem(f"{what}: column {name!r}", without.get(name, "no such column"), expected, did_you_mean(name, found))
            for name in (columns if columns is not None else known)
            if name not in found
        ]
        if problems:
            raise InputError(problems)
        return cls(folder, {name: known[name] for name in columns or found}, pattern, nulls)

    def fragments(self) -> Sequence[Fragment]:
        """List the batches, in one pass over the files.

        Raises:
            InputError: there are no files or no rows; with each that is damaged, or lacks a column.
        """
        at = place_of(self.folder)

        def listed(one: Entry) -> list[Fragment] | list[Problem]:
            what = where(at, one.name)
            try:
                columns, parts = _listed(at, one)
            except DAMAGE as error:
                return [Problem(what, str(error).rstrip("."), "a whole Arrow file", RESTORE)]
            if problems := self._misfits(what, columns):
                return problems
            named = ((number, part, f"{part.start} {part.digest}") for number, part in enumerate(parts))
            return [Fragment(one.name, number, part.num_rows, part.num_bytes, identity) for number, part, identity in named]

        found = [one for part in in_parallel(at, listed, files_of(at, self.pattern, "Arrow files")) for one in part]
        problems = [one for one in found if isinstance(one, Problem)]
        fragments = [one for one in found if isinstance(one, Fragment)]
        if not fragments and not problems:
            problems.append(Problem(self.folder, "no rows in any file", "at least one row", "Name another folder."))
        if problems:
            raise InputError(problems)
        return fragments

    def read(self, fragment: Fragment) -> Rows:
        """The rows of some batches.

        Raises:
            DataError: the file is gone, was changed, or a value does not fit its field; names file and place.
        """
        at = place_of(self.folder)
        what = f"{where(at, fragment.path)}, from byte {fragment.identity.split(' ')[0]} on"
        try:
            table = unchanged(at, fragment.path, lambda version: self._table(at, fragment, version, what))
            # What a file claims of its own bytes may lead outside of them.
            table.validate(full=True)
            rows = rows_of_table(table, self.schema, self.nulls)
        except DAMAGE as error:
            fix = "Field(..., fill=0) says what stands for a null; nulls='bad_rows' leaves its row out."
            raise DataError(f"{what}: cannot be read: {error}. {fix if 'null' in str(error) else RESTORE}") from error
        if num_rows(rows) != fragment.num_rows or (problems := schema_problems(rows, self.schema, what)):
            raise DataError("\n".join(map(str, problems)) if num_rows(rows) == fragment.num_rows else str(changed(what)))
        return rows

    def _table(self, at: Place, fragment: Fragment, version: str, what: str) -> pa.Table:
        start, expected = fragment.identity.split(" ")
        if int(start) < 0:
            # Dictionaries stand before batches that need them, so such a file is read from its beginning.
            data = at.read(fragment.path)
            if digest(data) != expected:
                raise changed(what)
            return pa.ipc.open_stream(pa.py_buffer(data.removeprefix(MAGIC))).read_all()
        data = at.read(fragment.path, int(start), fragment.num_bytes)
        if digest(data) != expected:
            raise changed(what)
        columns, batches, stream = _columns(at, fragment.path, version), [], pa.BufferReader(data)
        while stream.tell() < len(data):
            batches.append(pa.ipc.read_record_batch(pa.ipc.read_message(stream), columns))
        return pa.Table.from_batches(batches, columns)

    def _misfits(self, what: str, columns: pa.Schema) -> list[Problem]:
        problems = []
        for name, field in self.schema.items():
            at, kinds = f"{what}: column {name!r}", arrow_types.type_at(columns, name)
            if len(kinds) != 1:
                known, _ = arrow_types.schema_of_columns(columns)
                problems.append(Problem(at, f"{len(kinds)} columns of this name", describe(field), did_you_mean(name, known)))
            elif not fits(kinds[0], field) and not arrow_types.readable(kinds[0], field):
                has = arrow_types.field_of(kinds[0])
                fix = "Change the pipeline's schema" + (f": this column is {describe(has)}." if has else ", or leave it out.")
                problems.append(Problem(at, str(kinds[0]), describe(field), fix))
        return problems


@lru_cache(maxsize=256)
def _listed(place: Place, one: Entry) -> tuple[pa.Schema, tuple[Batches, ...]]:
    return place.persisting(lambda: _pass(place, one))


def _pass(place: Place, one: Entry) -> tuple[pa.Schema, tuple[Batches, ...]]:
    """The columns of a file and where its batches are."""
    with place.open(one.name) as file:
        head = len(MAGIC) if file.read(len(MAGIC)) == MAGIC else 0
        file.seek(head)
        with pa.ipc.open_stream(file) as stream:
            columns = stream.schema
            if any(pa.types.is_dictionary(column.type) for column in columns):
                count = sum(batch.num_rows for batch in stream)
                return columns, (Batches(-1, one.size_bytes, count, digest(place.read(one.name))),) if count else ()
            ends, counts = [file.tell()], []
            for batch in stream:
                counts.append(batch.num_rows)
                ends.append(file.tell())
    found, begin, rows = [], 0, 0
    for number, count in enumerate(counts):
        rows += count
        num_bytes = ends[number + 1] - ends[begin]
        if num_bytes >= MOST_BYTES or number == len(counts) - 1:
            if rows:
                found.append(Batches(ends[begin], num_bytes, rows, digest(place.read(one.name, ends[begin], num_bytes))))
            begin, rows = number + 1, 0
    return columns, tuple(found)


@lru_cache(maxsize=256)
def _columns(place: Place, name: str, version: str) -> pa.Schema:
    def read() -> pa.Schema:
        with place.open(name) as file:
            file.seek(len(MAGIC) if file.read(len(MAGIC)) == MAGIC else 0)
            return pa.ipc.read_schema(file)

    return place.persisting(read)


def _num_classes(columns: pa.Schema) -> dict[str, int]:
    """Column -> how many classes it has, where Hugging Face has written that down."""
    try:
        features = json.loads((columns.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: len(one["names"]) for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
