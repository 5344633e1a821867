"""Parquet: a folder of files as a source, what is wrong with one, one row group; and writing such a folder.

Page checksums are written and verified, so that a flipped bit is an error and never a wrong number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raymill.data import arrow_types
from raymill.data.arrow import (
    DTYPES,
    arrow_type,
    columns_from_arrow,
    describe,
    digest_rows,
    dtype_problems,
    empty_buffer,
    fits,
    rows_of_table,
    schema_problems,
    table_from_rows,
)
from raymill.data.rows import num_rows, take
from raymill.data.sources.parquet_index import ColumnChunk, all_pages_have_checksums, read_index
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.storage.find import place_of
from raymill.storage.place import Entry, Place, changed, files_of, in_parallel, unchanged, where
from raymill.task import Field, Fragment, Rows, Schema

# ---------------------------------------------------------------- Parquet


@dataclass(frozen=True)
class ParquetSource:
    """The rows of all Parquet files of a folder; a fragment is a row group.

    A fragment's path is the file's path inside the folder, so that a data set keeps its identity when it is moved. A file may
    be a link to one elsewhere: data sets are often put together so, and whoever may write in the folder says what the data
    are anyway. (The files of checkpoints and model versions may not, see `checkpoint.directory`.)

    Attributes:
        folder: holds the files; a path, or an address such as s3://bucket/folder.
        schema: the columns to read; others are left alone.
        pattern: which files, as in `Path.glob`; files are taken in the order of their names, hidden ones are not.
        nulls: what a null is for which its field has no `fill`: refused, or what makes its row bad, see the job's `bad_rows`.
    """

    folder: str
    schema: Schema
    pattern: str = "*.parquet"
    nulls: Literal["refuse", "bad_rows"] = "refuse"

    @classmethod
    def inferred(
        cls,
        folder: str,
        columns: Sequence[str] | None = None,
        *,
        pattern: str = "*.parquet",
        nulls: Literal["refuse", "bad_rows"] = "refuse",
        **fields: Field,
    ) -> ParquetSource:
        """The same with the schema that the first file has: `source.schema` is then the pipeline's.

        Args:
            columns: those that are wanted, in this order; None: all that rows can have. In a struct, "image.bytes".
            fields: of these columns, in place of what the file says: for `classes`, or `fill`.

        Raises:
            InputError: there is no file, it is damaged, or has no such column, or one whose type no field can be.
        """
        at = place_of(folder)
        (listed, *_) = cls(folder, {}, pattern)._files(at)
        first = where(at, listed.name)
        try:
            footer = read_footer(at, listed.name)
            found, without = arrow_types.schema_of_columns(footer.schema)
            own = json.loads((footer.metadata.metadata or {}).get(SCHEMA_KEY.encode(), b"{}"))
            found = {name: Field(str(dtype), tuple(shape), classes) for name, (dtype, shape, classes) in own.items()} or found
        except (*DAMAGE, TypeError, AttributeError, RecursionError) as error:
            raise InputError([Problem(first, str(error).rstrip("."), "a whole Parquet file", RESTORE)]) from error
        known: dict[str, Field] = {**found, **fields}
        problems = []
        for name in columns if columns is not None else known:
            if name not in found:
                expected = f"a type that rows can have ({', '.join(DTYPES)})" if name in without else "a column of the file"
                column = f"{first}: column {name!r}"
                problems.append(Problem(column, without.get(name, "no such column"), expected, did_you_mean(name, found)))
        if problems:
            raise InputError(problems)
        return cls(folder, {name: known[name] for name in columns or found}, pattern, nulls)

    def fragments(self) -> Sequence[Fragment]:
        """List the row groups from the files' footers.

        Raises:
            InputError: with every file that is damaged, of another schema, or has labels outside their classes.
        """
        if unknown := dtype_problems(self.schema):
            raise InputError(unknown)
        at = place_of(self.folder)
        entries = self._files(at)
        inspected = in_parallel(at, lambda one: inspect_file(at, one.name, self.schema, self.nulls), entries)
        fragments = [fragment for found, _ in inspected for fragment in found]
        problems = [problem for _, wrong in inspected for problem in wrong]
        if not fragments and not problems:
            found_rows = f"0 rows in {len(entries)} files"
            problems.append(Problem(self.folder, found_rows, "at least one row", "Write the data set again."))
        if problems:
            raise InputError(problems)
        return fragments

    def read(self, fragment: Fragment) -> Rows:
        """Read one row group, only the schema's columns, page checksums verified. Arrays are read-only.

        Raises:
            DataError: the file is damaged, gone, or another one than when the fragment was listed.
        """
        at = place_of(self.folder)
        what = f"{where(at, fragment.path)}, row group {fragment.part}"
        fix = "Restore this file from its source, then resume."

        def read(version: str) -> Rows:
            footer = parse_footer(at, fragment.path, version)
            if footer.identity != fragment.identity:
                raise changed(what)
            return rows_of_table(read_group(at, fragment.path, footer, fragment.part, list(self.schema)), self.schema, self.nulls)

        try:
            rows = unchanged(at, fragment.path, read)
        except DAMAGE as error:
            raise DataError(f"{what}: cannot be read: {error}. {fix}") from error
        if (found := num_rows(rows)) != fragment.num_rows:
            raise DataError(f"{what}: {found} rows were read where the file's index says {fragment.num_rows}. {fix}")
        if problems := schema_problems(rows, self.schema, what):
            raise DataError("\n".join(map(str, problems)))
        return rows

    def _files(self, at: Place) -> list[Entry]:
        return files_of(at, self.pattern, "Parquet files", may_link=True)


NULLS_FIX = (
    "Say what stands for them, Field(..., fill=0); or leave their rows out: ParquetSource(..., nulls='bad_rows') with "
    "bad_rows.policy skip in the job; or drop or fill these rows."
)

DAMAGE = (OSError, pa.ArrowException, ValueError)
"""What opening or decoding a damaged file raises."""


DIGEST_KEY = "raymill.digest"
"""Of a file that raymill wrote: what its rows hash to."""

SCHEMA_KEY = "raymill.schema"
"""Likewise: column -> dtype, shape and classes, which Arrow's types do not tell."""

MOST_ROWS_OF_A_GROUP = 2**31 - 1
"""A row group is read at once, and its values are counted in 32 bits."""

MOST_ROWS_PER_BYTE = 2**16
"""Of a file. Repeated values take next to nothing, but no writer puts more of them into a byte; memory is set aside for what a
footer claims, so a claim has to cost something."""

MOST_GROUPS_PER_FILE = 100_000

RESTORE = "Restore the file from its source, or delete the data set's folder and run `raymill data get`."


@dataclass(frozen=True)
class Footer:
    """The index at the end of a Parquet file.

    Attributes:
        identity: of the file's size and the footer's bytes.
        size_bytes: of the file.
        index: the same as bytes.
    """

    metadata: pq.FileMetaData
    schema: pa.Schema
    identity: str
    size_bytes: int
    index: bytes

    @cached_property
    def spans(self) -> np.ndarray:
        """Where the pages of each column are in the file: first byte and number of bytes, int64 [num_groups, num_columns, 2].

        Worked out once: a file is read group by group, and that costs more than to read a small group.

        Raises:
            ValueError: the index is not what Thrift writes, or its groups differ in their columns.
        """

        def inside(number: int) -> int:
            return min(max(number, 0), self.size_bytes)

        return np.array(
            [[(inside(one.start), inside(one.compressed_bytes)) for one in group] for group in read_index(self.index)], np.int64
        )


def read_footer(place: Place, name: str) -> Footer:
    """The footer of a file, parsed once for as long as the file does not change.

    Raises:
        OSError, pa.ArrowException: the file is gone, empty, cut, or not Parquet.
    """
    return unchanged(place, name, lambda version: parse_footer(place, name, version))


# A file is opened once per row group; its footer, which grows with the number of row groups, is parsed once.
@lru_cache(maxsize=64)
def parse_footer(place: Place, name: str, version: str) -> Footer:
    """As `read_footer`, of the version that the file has."""
    size_bytes = place.entry(name).size_bytes
    try:
        metadata, schema = place.persisting(lambda: _metadata_and_schema(place, name))
    except DAMAGE:
        raise
    except Exception as error:
        # A column may claim a type of some library's own, whose code then fails on what it finds there.
        raise ValueError(f"the types of its columns cannot be read: {type(error).__name__}: {error}") from error
    end = place.read(name, size_bytes - 8 - metadata.serialized_size)
    digest = hashlib.sha256(end)
    digest.update(str(size_bytes).encode())
    return Footer(metadata, schema, digest.hexdigest()[:16], size_bytes, end[: metadata.serialized_size])


def _metadata_and_schema(place: Place, name: str) -> tuple[pq.FileMetaData, pa.Schema]:
    with place.open_arrow(name) as raw, pq.ParquetFile(raw) as file:
        return file.metadata, file.schema_arrow


def read_group(place: Place, name: str, footer: Footer, group: int, columns: list[str]) -> pa.Table:
    """One row group with these columns, page checksums verified.

    Arrow verifies those that are there. In a file of raymill's own each page has one, so that damage to a header hides no other.

    Raises:
        OSError, pa.ArrowException, ValueError: a page is damaged.
    """
    options = {"metadata": footer.metadata, "page_checksum_verification": True}
    if DIGEST_KEY.encode() in (footer.metadata.metadata or {}):
        own = pa.BufferReader(_checked_group(place, name, footer, group))
        return pq.ParquetFile(own, **options).read_row_group(group, columns=columns)

    def decode() -> pa.Table:
        with place.open_arrow(name) as raw, pq.ParquetFile(raw, **options, pre_buffer=place.num_readers > 1) as file:
            return file.read_row_group(group, columns=columns)

    return place.persisting(decode)


def _checked_group(place: Place, name: str, footer: Footer, group: int) -> pa.Buffer:
    """The bytes of a file, of which only those of one row group are there, from one read.

    The others are memory that is never touched, and so is never taken.
    """
    spans = footer.spans[group].tolist()
    start, end = min(at for at, _ in spans), max(at + num_bytes for at, num_bytes in spans)
    data = place.read(name, start, end - start)
    if not all(all_pages_have_checksums(data[at - start : at - start + num_bytes]) for at, num_bytes in spans):
        raise ValueError("a page of it has lost its checksum")
    file = empty_buffer(footer.size_bytes)
    np.frombuffer(file, np.uint8)[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return file


def inspect_file(place: Place, name: str, schema: Schema, nulls: str = "refuse") -> tuple[list[Fragment], list[Problem]]:
    """List one file's row groups that hold rows, and all that is wrong with the file.

    Args:
        nulls: see `ParquetSource`.
    """
    path = where(place, name)
    try:
        footer = read_footer(place, name)
    except DAMAGE as error:
        return [], [Problem(path, str(error).rstrip("."), "a whole Parquet file", RESTORE)]
    metadata = footer.metadata
    try:
        groups = read_index(footer.index)
    except ValueError as error:
        return [], [Problem(path, str(error), "a whole Parquet file", RESTORE)]
    if false := _false_claim(metadata, groups, footer.size_bytes):
        return [], [Problem(path, false, "an index that fits the file", RESTORE)]
    problems = _type_problems(path, footer.schema, schema)
    problems += _value_problems(place, name, footer, schema, groups, nulls)
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    wanted = [i for i, leaf in enumerate(leaves) if any(f"{leaf}.".startswith(f"{column}.") for column in schema)]
    fragments = []
    for part in range(metadata.num_row_groups):
        group = metadata.row_group(part)
        if group.num_rows:
            num_bytes = sum(groups[part][i].compressed_bytes for i in wanted)
            fragments.append(Fragment(name, part, group.num_rows, num_bytes, footer.identity))
    return fragments, problems


def _false_claim(metadata: pq.FileMetaData, groups: list[list[ColumnChunk]], size_bytes: int) -> str | None:
    """What the index says that cannot be so, in words. All that is planned goes by it, long before a row is read."""
    if len(groups) != metadata.num_row_groups:
        return f"{metadata.num_row_groups} and {len(groups)} row groups"
    if metadata.num_row_groups > MOST_GROUPS_PER_FILE:
        return f"{metadata.num_row_groups} row groups; at most {MOST_GROUPS_PER_FILE} are read"
    most_rows = min(MOST_ROWS_OF_A_GROUP, MOST_ROWS_PER_BYTE * size_bytes)
    total_rows = 0
    for part in range(metadata.num_row_groups):
        group = metadata.row_group(part)
        if not 0 <= group.num_rows <= most_rows:
            return f"row group {part} of {group.num_rows} rows in a file of {size_bytes} bytes"
        if len(groups[part]) != metadata.num_columns:
            return f"row group {part} of {len(groups[part])} columns where the file has {metadata.num_columns}"
        for column, chunk in enumerate(groups[part]):
            if not 0 <= chunk.compressed_bytes <= size_bytes:
                return f"row group {part}, column {column}: {chunk.compressed_bytes} bytes in a file of {size_bytes}"
            # Memory is set aside for so many before any is read.
            repeated = metadata.schema.column(column).max_repetition_level
            if not (0 <= chunk.num_values <= most_rows and (repeated or chunk.num_values == group.num_rows)):
                return f"row group {part}, column {column}: {chunk.num_values} values of {group.num_rows} rows"
        total_rows += group.num_rows
    return f"{metadata.num_rows} rows where its row groups have {total_rows}" if metadata.num_rows != total_rows else None


def _type_problems(path: str, found: pa.Schema, schema: Schema) -> list[Problem]:
    problems = []
    for name, field in schema.items():
        at, kinds = f"{path}: column {name!r}", arrow_types.type_at(found, name)
        if len(kinds) > 1:
            fix = "Write the file again with each name once."
            problems.append(Problem(at, f"{len(kinds)} columns of this name", describe(field), fix))
        elif not kinds:
            known, _ = arrow_types.schema_of_columns(found)
            problems.append(Problem(at, "no such column", describe(field), did_you_mean(name, [*known, *found.names])))
        elif not fits(kinds[0], field) and not arrow_types.readable(kinds[0], field):
            has = arrow_types.field_of(kinds[0])
            fix = "Change the pipeline's schema" + (f": this column is {describe(has)}." if has else ", or write the file again.")
            problems.append(Problem(at, str(kinds[0]), f"{arrow_type(field)} ({describe(field)})", fix))
    return problems


def _value_problems(
    place: Place, file: str, footer: Footer, schema: Schema, groups: list[list[ColumnChunk]], nulls: str
) -> list[Problem]:
    """Nulls, and labels outside their classes, from the footer's statistics; without them the column is read."""
    metadata = footer.metadata
    problems = []
    for i in range(metadata.num_columns):
        name = metadata.schema.column(i).path
        field = schema.get(name)
        kinds = arrow_types.type_at(footer.schema, name)
        if field is None or len(kinds) != 1 or not (fits(kinds[0], field) or arrow_types.readable(kinds[0], field)):
            continue
        statistics = [group[i] for group in groups]
        num_nulls = sum(max(0, found.num_nulls) for found in statistics)
        if num_nulls and field.fill is None and nulls == "refuse":
            at = f"{where(place, file)}: column {name!r}"
            problems.append(Problem(at, f"{num_nulls} nulls", describe(field), NULLS_FIX))
        elif not num_nulls and field.classes is not None and not field.shape:
            plain = pa.types.is_integer(kinds[0])
            problems += _label_problems(place, file, footer, name, field, statistics if plain else [])
    return problems


def _label_problems(
    place: Place, file: str, footer: Footer, name: str, field: Field, statistics: list[ColumnChunk]
) -> list[Problem]:
    path = where(place, file)
    ranges: dict[int, tuple[int, int]] = {}
    signed = not pa.types.is_unsigned_integer(arrow_types.type_at(footer.schema, name)[0])
    for part in range(footer.metadata.num_row_groups):
        if statistics and (limits := statistics[part].limits(signed=signed)):
            ranges[part] = limits
        elif footer.metadata.row_group(part).num_rows:
            try:
                rows = columns_from_arrow(read_group(place, file, footer, part, [name]), {name: field})
            except DAMAGE as error:
                at = f"{path}, row group {part}: column {name!r}"
                return [Problem(at, str(error).rstrip("."), describe(field), RESTORE)]
            ranges[part] = (int(np.min(rows[name])), int(np.max(rows[name])))
    num_classes = field.classes or 0
    wrong = {part: (low, high) for part, (low, high) in ranges.items() if low < 0 or high >= num_classes}
    if not wrong:
        return []
    at = f"{path}, row group {min(wrong)}: column {name!r}"
    low, high = min(low for low, _ in wrong.values()), max(high for _, high in wrong.values())
    fix = f"Correct the labels, or declare classes={high + 1} in the pipeline's schema."
    return [Problem(at, f"labels from {low} to {high}", f"labels in 0..{num_classes - 1}", fix)]


def write_parquet(folder: Path, rows: Rows, schema: Schema, *, num_shards: int, row_group_rows: int) -> None:
    """Write rows, in their order, as `part-00000.parquet` and so on, with statistics and page checksums.

    The files are staged in a hidden folder beside and renamed into place: `folder` is there whole or not at all.

    Args:
        folder: must not exist yet, or be empty.
        num_shards: files, of nearly equal size.
        row_group_rows: rows of a fragment; the last one of each file may have fewer.

    Raises:
        InputError: the rows do not fit the schema, are fewer than the shards, or the folder holds something.
    """
    problems = dtype_problems(schema) or schema_problems(rows, schema, "rows")
    count = min((len(column) for column in rows.values()), default=0)
    if not 1 <= num_shards <= count:
        fix = "Use at least one shard and at most one per row."
        problems.append(Problem(str(folder), f"{num_shards} shards", f"1 to {count}", fix))
    if row_group_rows < 1:
        problems.append(Problem(str(folder), f"row groups of {row_group_rows} rows", "at least 1", "Use 1000 or so."))
    for name, field in schema.items():
        if 0 in field.shape and None not in field.shape:
            at, fix = f"{folder}: column {name!r}", "Leave the column out: its values hold nothing."
            problems.append(Problem(at, describe(field), "extents of at least 1", fix))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(Problem(str(folder), "something there already", "no folder, or an empty one", "Delete it first."))
    if problems:
        raise InputError(problems)
    stage = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    stage.mkdir(parents=True)
    try:
        for shard in range(num_shards):
            start, stop = count * shard // num_shards, count * (shard + 1) // num_shards
            write_file(stage / f"part-{shard:05d}.parquet", take(rows, slice(start, stop)), schema, row_group_rows)
        stage.rename(folder)
    except BaseException:
        shutil.rmtree(stage)
        raise


def write_file(path: Path, rows: Rows, schema: Schema, row_group_rows: int) -> None:
    """Write rows, in their order, as one file, with statistics, page checksums, their digest and their schema."""
    count = len(next(iter(rows.values())))
    kinds = {name: arrow_type(field) for name, field in schema.items()}
    # Smallest and largest of raw image bytes say nothing and would double a small footer; nor do they repeat.
    plain = [name for name, kind in kinds.items() if not pa.types.is_fixed_size_binary(kind)]
    numbers = [name for name, kind in kinds.items() if pa.types.is_primitive(kind)]
    with open(path, "wb") as raw:
        with pq.ParquetWriter(
            raw,
            pa.schema(kinds.items()),
            compression="zstd",
            use_dictionary=plain,
            write_statistics=numbers,
            write_page_checksum=True,
        ) as writer:
            for start in range(0, count, row_group_rows):
                writer.write_table(table_from_rows(take(rows, slice(start, start + row_group_rows)), schema))
            # Equal footers do not prove equal pages; with this entry they do.
            fields = {name: [field.dtype, field.shape, field.classes] for name, field in schema.items()}
            writer.add_key_value_metadata({DIGEST_KEY: digest_rows(rows), SCHEMA_KEY: json.dumps(fields)})
        os.fsync(raw.fileno())
