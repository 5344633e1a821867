"""Rows that a model is asked about, from a file or stdin, batch by batch; its answers, into a file or to stdout.

.parquet    as a Parquet source reads and writes it
.jsonl, -   a JSON object per line: numbers, texts and nested lists as they are, bytes in base64; in answers, null for NaN and
            infinity, which JSON does not have
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raymill.data.arrow import arrow_type, describe, schema_of, table_from_rows
from raymill.data.rows import num_rows, take
from raymill.data.sources import ParquetSource
from raymill.data.sources.parquet import DAMAGE, read_footer
from raymill.errors import InputError, Problem, did_you_mean
from raymill.files import STAGE
from raymill.storage.find import place_of
from raymill.task import Column, Field, Rows, Schema

STANDARD = "-"
"""In place of a file: stdin, stdout."""

# ---------------------------------------------------------------- read


def read(place: str, schema: Schema, may_lack: Collection[str], batch_rows: int) -> Iterator[Rows]:
    """The rows of a file in batches, the last of which may be smaller. What is held is a batch, and of Parquet a row group.

    Args:
        place: a .parquet or .jsonl file, or "-" for lines of JSON from stdin.
        schema: the columns to read; others are left alone.
        may_lack: those that need not be there, in any row.
        batch_rows: rows of a batch.

    Raises:
        InputError: the file cannot be read, holds no rows, or a value is not what the schema says; names line and column.
        DataError: a Parquet file is damaged.
    """
    if place.endswith(".parquet"):
        return _read_parquet(place, schema, may_lack, batch_rows)
    if place == STANDARD or place.endswith(".jsonl"):
        return _read_lines(place, schema, may_lack, batch_rows)
    raise _wrong_name("--rows", place)


def _wrong_name(option: str, place: str) -> InputError:
    fix = "Name the file by what it holds."
    return InputError([Problem(option, repr(place), "a file that ends with .parquet or .jsonl, or -", fix)])


def _read_parquet(place: str, schema: Schema, may_lack: Collection[str], batch_rows: int) -> Iterator[Rows]:
    path = Path(place)
    try:
        there = read_footer(place_of(str(path.parent)), path.name).schema.names
    except DAMAGE as error:
        raise InputError([Problem("--rows", str(error).rstrip("."), "a whole Parquet file", "Write it again.")]) from error
    wanted = {name: field for name, field in schema.items() if name in there or name not in may_lack}
    source = ParquetSource(str(path.parent), wanted, escape(path.name))
    for fragment in source.fragments():
        rows = source.read(fragment)
        for start in range(0, num_rows(rows), batch_rows):
            yield take(rows, slice(start, start + batch_rows))


def _read_lines(place: str, schema: Schema, may_lack: Collection[str], batch_rows: int) -> Iterator[Rows]:
    with ExitStack() as stack:
        try:
            lines = sys.stdin if place == STANDARD else stack.enter_context(open(place, encoding="utf-8"))
        except OSError as error:
            fix = "Correct the name."
            raise InputError([Problem("--rows", f"{place}: {error.strerror}", "a file that can be read", fix)]) from error
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        wanted: Schema | None = None
        while some := list(islice(numbered, batch_rows)):
            objects = [_object(f"{place}:{number}", line) for number, line in some]
            # The first row decides which of the columns that may be left out are there.
            wanted = wanted or {name: field for name, field in schema.items() if name in objects[0] or name not in may_lack}
            where = [f"{place}:{number}" for number, _ in some]
            yield {name: _column(name, field, objects, where) for name, field in wanted.items()}
        if wanted is None:
            raise InputError([Problem("--rows", f"{place}: no rows", "a JSON object per line", "Give at least one row.")])


def _object(where: str, line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError([Problem(where, str(error), "a JSON object", "Write one object per line.")]) from error
    if not isinstance(found, dict):
        raise InputError([Problem(where, f"a {type(found).__name__}", "a JSON object", "Write one object per line.")])
    return found


def _column(name: str, field: Field, objects: Iterable[Mapping[str, Any]], where: Iterable[str]) -> Column:
    values = [_value(f"{place}: column {name!r}", name, field, one) for place, one in zip(where, objects, strict=True)]
    # Shapes and labels are held against the schema with all other rows; an array needs values of one shape.
    same = None not in field.shape and field.dtype not in ("text", "bytes") and len({value.shape for value in values}) == 1
    return np.stack(values) if same else values


def _value(where: str, name: str, field: Field, row: Mapping[str, Any]) -> Any:
    """One value as the schema wants it, from JSON."""

    def refuse(found: str, fix: str) -> InputError:
        return InputError([Problem(where, found, describe(field), fix)])

    if name not in row:
        raise refuse("no such column", did_you_mean(name, row))
    value = row[name]
    if field.dtype in ("text", "bytes"):
        if not isinstance(value, str):
            raise refuse(f"a {type(value).__name__}", "Write a string; bytes in base64.")
        try:
            return value if field.dtype == "text" else base64.b64decode(value, validate=True)
        except ValueError as error:
            raise refuse(f"no base64: {error}", "Write bytes in base64.") from error
    dtype = np.dtype(field.dtype)
    try:
        found = np.asarray(value)
        if found.size and (found.dtype.kind not in "biuf" or (found.dtype.kind == "b") != (dtype.kind == "b")):
            raise refuse(f"{describe(Field(str(found.dtype), found.shape))}", "Write numbers, true and false, or lists of them.")
        if found.dtype.kind == "f" and dtype.kind in "iu" and found.size:
            raise refuse("a number with a fraction", "Write whole numbers.")
        array = np.array(value, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise refuse(str(error), "Write a number, or lists of equal length.") from error
    # Of an empty list, JSON does not say of what.
    return array if array.size or None not in field.shape else array.reshape([extent or 0 for extent in field.shape])


# ---------------------------------------------------------------- write


def write(place: str, batches: Iterable[Rows], stdout: TextIO) -> int:
    """Write rows as they come; returns their number. A file is there whole or, where an error passes, as it was before.

    Args:
        place: a .parquet or .jsonl file, which is replaced, or "-" for lines of JSON.
        batches: rows of one schema.
        stdout: where "-" goes.

    Raises:
        InputError: the name says nothing of what is to be written, or it cannot be written there.
    """
    if place == STANDARD:
        return _write_lines(batches, stdout)
    writers: dict[str, Callable[[Path, Iterable[Rows]], int]] = {".parquet": _write_parquet, ".jsonl": _write_text}
    if (suffix := Path(place).suffix) not in writers:
        raise _wrong_name("--out", place)
    with _replacing(Path(place)) as stage:
        return writers[suffix](stage, batches)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    stage = path.with_name(f"{STAGE}{path.name}.{os.getpid()}")
    if not path.parent.is_dir():
        raise InputError([Problem("--out", str(path), "a file in a folder that is there", "Make the folder first.")])
    try:
        yield stage
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def _write_text(path: Path, batches: Iterable[Rows]) -> int:
    with open(path, "w", encoding="utf-8") as file:
        return _write_lines(batches, file)


def _write_lines(batches: Iterable[Rows], file: TextIO) -> int:
    count = 0
    for rows in batches:
        for answer in as_json(rows):
            print(json.dumps(answer), file=file)
            count += 1
        file.flush()
    return count


def _write_parquet(path: Path, batches: Iterable[Rows]) -> int:
    count = 0
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        schema: Schema = {}
        for rows in batches:
            if writer is None:
                schema = schema_of(rows)
                columns = pa.schema([(name, arrow_type(field)) for name, field in schema.items()])
                writer = stack.enter_context(pq.ParquetWriter(path, columns, compression="zstd", write_page_checksum=True))
            writer.write_table(table_from_rows(rows, schema))
            count += num_rows(rows)
    return count


def as_json(rows: Rows) -> Iterator[dict[str, Any]]:
    """The rows one by one, in what JSON has."""
    for row in range(num_rows(rows)):
        yield {name: _plain(column[row]) for name, column in rows.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
