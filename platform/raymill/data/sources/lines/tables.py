"""Rows as text: JSON, one object a line, and CSV. What Arrow reads of a piece becomes rows as Parquet's columns do.

Dates and times are written in many ways, and what a piece holds decides how Arrow reads them; so all of them become int64, in
microseconds since 1970-01-01 or midnight, whatever the column is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from raymill.data import arrow_types
from raymill.data.arrow import rows_of_table, schema_problems, stream_of
from raymill.data.rows import num_rows
from raymill.data.sources.lines import pieces
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.storage.find import place_of
from raymill.task import Field, Fragment, Rows, Schema

Nulls = Literal["refuse", "bad_rows"]

FIX = "Correct the file."

NULLS_FIX = "Say what stands for a value that is missing, Field(..., fill=0); or leave its row out: nulls='bad_rows'."


@dataclass(frozen=True)
class JsonLinesSource:
    """The rows of all JSON Lines files of a folder (https://jsonlines.org); a fragment is about 4 MiB of whole lines.

    Attributes:
        folder: holds the pieces.
        schema: the names to read; others are left alone. Inside of objects, "image.path". Numbers in lists are arrays.
        pattern: which files, as in `Path.glob`.
        nulls: what null or a missing name is for which its field has no `fill`: refused, or what makes its row bad.
    """

    folder: str
    schema: Schema
    pattern: str = "**/*.jsonl"
    nulls: Nulls = "refuse"

    @classmethod
    def inferred(
        cls,
        folder: str,
        columns: Sequence[str] | None = None,
        *,
        pattern: str = "**/*.jsonl",
        nulls: Nulls = "refuse",
        **fields: Field,
    ) -> JsonLinesSource:
        """The same with the schema that the first piece has; see `ParquetSource.inferred`."""
        source = cls(folder, {}, pattern, nulls)
        first = source.fragments()[0]
        table = _parsed(lambda: _read_json(pieces.read_piece(folder, first), {}), pieces.place(folder, first))
        return cls(folder, inferred_schema(table, columns, fields, pieces.place(folder, first)), pattern, nulls)

    def fragments(self) -> Sequence[Fragment]:
        """List the pieces, in one pass over the pieces.

        Raises:
            InputError: there are no files or no rows, or one cannot be read.
        """
        return pieces.line_fragments(self.folder, self.pattern, "JSON Lines files")

    def read(self, fragment: Fragment) -> Rows:
        """The rows of one piece.

        Raises:
            DataError: the file was changed, a line is no JSON, or a value does not fit its field; names file and place.
        """
        where, data = pieces.place(self.folder, fragment), pieces.read_piece(self.folder, fragment)
        return _rows(lambda: _read_json(data, self.schema), self.schema, self.nulls, fragment, where)


@dataclass(frozen=True)
class CsvSource:
    """The rows of all CSV files of a folder, the first line of each with the names; a fragment is about 4 MiB of whole lines.

    Attributes:
        folder: holds the pieces.
        schema: the columns to read; others are left alone.
        pattern: which files, as in `Path.glob`.
        delimiter: between values.
        newlines_in_values: whether quoted values may hold line ends; a file is then one fragment.
        nulls: what an empty value (or NA, null and the like, in a column of numbers) is: refused, or what makes its row bad.
    """

    folder: str
    schema: Schema
    pattern: str = "**/*.csv"
    delimiter: str = ","
    newlines_in_values: bool = False
    nulls: Nulls = "refuse"

    @classmethod
    def inferred(
        cls,
        folder: str,
        columns: Sequence[str] | None = None,
        *,
        pattern: str = "**/*.csv",
        delimiter: str = ",",
        newlines_in_values: bool = False,
        nulls: Nulls = "refuse",
        **fields: Field,
    ) -> CsvSource:
        """The same with the schema that the first piece has; see `ParquetSource.inferred`."""
        source = cls(folder, {}, pattern, delimiter, newlines_in_values, nulls)
        first = source.fragments()[0]
        where = pieces.place(folder, first)
        table = _parsed(lambda: source._table(first, pieces.read_piece(folder, first)), where)
        schema = inferred_schema(table, columns, fields, where)
        return cls(folder, schema, pattern, delimiter, newlines_in_values, nulls)

    def fragments(self) -> Sequence[Fragment]:
        """List the pieces, in one pass over the pieces.

        Raises:
            InputError: there are no files or no rows, or one cannot be read.
        """
        found = pieces.line_fragments(
            self.folder, self.pattern, "CSV files", header=not self.newlines_in_values, whole=self.newlines_in_values
        )
        if not self.newlines_in_values:
            return found
        # How many rows there are is not how many lines there are.
        return [Fragment(one.path, one.part, self._count(one), one.num_bytes, one.identity) for one in found]

    def read(self, fragment: Fragment) -> Rows:
        """The rows of one piece.

        Raises:
            DataError: the file was changed, a line has other values than there are names, or one does not fit its field.
        """
        where, data = pieces.place(self.folder, fragment), pieces.read_piece(self.folder, fragment)
        return _rows(lambda: self._table(fragment, data), self.schema, self.nulls, fragment, where)

    def _count(self, fragment: Fragment) -> int:
        where = pieces.place(self.folder, fragment)
        return int(_parsed(lambda: self._table(fragment, pieces.read_piece(self.folder, fragment)), where).num_rows)

    def _table(self, fragment: Fragment, data: bytes) -> pa.Table:
        names = None
        if not self.newlines_in_values:
            at = place_of(self.folder)

            def first_line() -> bytes:
                with at.open(fragment.path) as file:
                    return file.readline(pieces.MOST_LINE_BYTES)

            header = at.persisting(first_line)
            parsed = pyarrow.csv.read_csv(stream_of(header), parse_options=self._parse_options())
            names = parsed.column_names
        texts = {name: pa.string() for name, field in self.schema.items() if field.dtype == "text"}
        table = pyarrow.csv.read_csv(
            stream_of(data),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=names, block_size=max(len(data), 1) + 1),
            parse_options=self._parse_options(),
            convert_options=pyarrow.csv.ConvertOptions(column_types=texts),
        )
        return _in_microseconds(table)

    def _parse_options(self) -> pyarrow.csv.ParseOptions:
        return pyarrow.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=self.newlines_in_values)


def inferred_schema(table: pa.Table, columns: Sequence[str] | None, fields: dict[str, Field], where: str) -> Schema:
    """The schema of these columns of a table.

    Args:
        fields: in place of what the table says.
        where: for messages.

    Raises:
        InputError: there is no such column, or one whose type no field can be.
    """
    found, without = arrow_types.schema_of_columns(table.schema)
    known: dict[str, Field] = {**found, **fields}
    problems = [
        Problem(
            f"{where}: column {name!r}",
            without.get(name, "no such column"),
            "a column that rows can have",
            did_you_mean(name, found),
        )
        for name in (columns if columns is not None else known)
        if name not in found and not (name in without and name in fields)
    ]
    if problems:
        raise InputError(problems)
    return {name: known[name] for name in columns or found}


def _parsed(parse: Callable[[], pa.Table], where: str) -> pa.Table:
    try:
        return parse()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where}: {str(error).rstrip('.')}. {FIX}") from error


def _rows(parse: Callable[[], pa.Table], schema: Schema, nulls: str, fragment: Fragment, where: str) -> Rows:
    table = _parsed(parse, where)
    if table.num_rows != fragment.num_rows:
        raise DataError(f"{where}: {table.num_rows} rows in {fragment.num_rows} lines. {FIX}")
    try:
        rows = rows_of_table(table, schema, nulls)
    except ValueError as error:
        raise DataError(f"{where}: {error}. {NULLS_FIX if 'null' in str(error) else FIX}") from error
    if problems := schema_problems(rows, schema, where):
        raise DataError("\n".join(map(str, problems)))
    assert num_rows(rows) == fragment.num_rows
    return rows


def _read_json(data: bytes, schema: Schema) -> pa.Table:
    texts = [(name, pa.string()) for name, field in schema.items() if field.dtype == "text" and "." not in name]
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(texts) if texts else None)
    read = pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    table = _in_microseconds(pyarrow.json.read_json(stream_of(data), read_options=read, parse_options=options))
    # A name that no line of the piece has is null in each.
    for name in schema:
        if "." not in name and name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table


def _in_microseconds(table: pa.Table) -> pa.Table:
    """Whatever Arrow took for a date or a time, in one unit."""
    for number, column in enumerate(table.schema):
        kind = column.type
        if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
            table = table.set_column(
                number, column.name, table.column(number).cast(pa.timestamp("us", getattr(kind, "tz", None)))
            )
        elif pa.types.is_time(kind):
            table = table.set_column(number, column.name, table.column(number).cast(pa.time64("us")))
    return table
