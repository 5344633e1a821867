"""Rows held against a schema, and how they lie in Arrow and so in Parquet.

    number, no shape     the plain Arrow number
    fixed shape          fixed_size_binary of the array's bytes
    shape with None      struct<data: list<number>, shape: list<int32>>
    "bytes", "text"      binary, string

That is how raymill writes them. What others write is read too, see `arrow_types`.

Arrays that come from Arrow are views of its memory and read-only. Arrow arrays are made from buffers, never with
`pa.array`, which would import pandas.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raymill.data import arrow_types
from raymill.data.rows import BAD, NUMBERS, take
from raymill.errors import InputError, Problem, did_you_mean
from raymill.task import Column, Field, Rows, Schema

# ---------------------------------------------------------------- memory that Arrow reads


def empty_buffer(num_bytes: int) -> pa.Buffer:
    """Memory of Arrow's own to read from, to be filled; what is never touched is never taken.

    One of Arrow's threads may be the last to let go of what it read, when the table is there and the process ends already. Memory
    of Python's takes Python for that, which aborts the process then: "terminate called without an active exception".
    """
    return pa.allocate_buffer(num_bytes, pa.system_memory_pool())


def stream_of(data: bytes) -> pa.BufferReader:
    """Bytes for a reader with threads: a copy of them in memory of Arrow's own."""
    buffer = empty_buffer(len(data))
    np.frombuffer(buffer, np.uint8)[:] = np.frombuffer(data, np.uint8)
    return pa.BufferReader(buffer)


# ---------------------------------------------------------------- rows and the schema

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"),
    *("bytes", "text"),
)
"""What a field may be; numpy's other names for these numbers are taken too."""


def dtype_problems(schema: Schema) -> list[Problem]:
    """Every column of a schema whose dtype is none that rows can have."""
    fix = "Use text for strings, int64 for times and dates."
    return [
        Problem(f"schema: column {name!r}", f"Field({field.dtype!r})", f"one of {', '.join(DTYPES)}", fix)
        for name, field in schema.items()
        if not _is_dtype(field.dtype)
    ]


def _is_dtype(name: object) -> bool:
    try:
        return name in DTYPES or (isinstance(name, str) and np.dtype(name).kind in NUMBERS)
    except (TypeError, ValueError):
        return False


def rows_bytes(rows: Rows) -> int:
    """Bytes of all values."""
    return sum(
        column.nbytes if isinstance(column, np.ndarray) else sum(len(_raw(value)) for value in column) for column in rows.values()
    )


def digest_rows(rows: Rows) -> str:
    """16 hex digits that change when any name, type, shape or value of the rows does."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        column = rows[name]
        for value in [column] if isinstance(column, np.ndarray) else column:
            raw = _raw(value)
            kind = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            digest.update(f"{name}:{kind}:{len(raw)}:".encode())
            digest.update(raw)
    return digest.hexdigest()[:16]


def _raw(value: Any) -> bytes | memoryview:
    """The bytes of an array, `bytes` or `str`."""
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def describe(field: Field) -> str:
    """The field in words, such as "uint8 of shape (28, 28)"."""
    what = f"{field.dtype} of shape {field.shape}" if field.shape else field.dtype
    return f"{what} in 0..{field.classes - 1}" if field.classes else what


def schema_of(rows: Rows) -> Schema:
    """The schema that rows have. Arrays in a list may be of any shape, whatever these are."""
    return {name: _field_of(column) for name, column in rows.items()}


def _field_of(column: Column) -> Field:
    if isinstance(column, np.ndarray):
        return Field(column.dtype.name, column.shape[1:])
    first = column[0]
    if isinstance(first, np.ndarray):
        return Field(first.dtype.name, (None,) * first.ndim)
    return Field("text" if isinstance(first, str) else "bytes")


def schema_problems(rows: Rows, schema: Schema, where: str) -> list[Problem]:
    """Hold rows against the schema.

    Args:
        where: the file and piece the rows come from, for the messages.

    Returns:
        every column that is missing, of another length, type or shape, or has a label outside its classes.
    """
    problems = []
    first: Column = next(iter(rows.values()), [])
    for name, field in schema.items():
        column = f"{where}: column {name!r}"
        if name not in rows:
            problems.append(Problem(column, "no such column", describe(field), did_you_mean(name, rows)))
            continue
        found = _misfit(rows[name], field)
        if found is None and len(rows[name]) != len(first):
            found = f"{len(rows[name])} rows where the first column has {len(first)}"
        if found is not None:
            fix = "Change what makes the rows, or the pipeline's schema."
            problems.append(Problem(column, found, describe(field), fix))
    return problems


def _misfit(column: Column, field: Field) -> str | None:
    """What the column is, when it is not what the field says; else None."""
    values = [column] if isinstance(column, np.ndarray) else column
    if field.dtype in ("bytes", "text"):
        kind = bytes if field.dtype == "bytes" else str
        wrong = next((value for value in column if not isinstance(value, kind)), None)
        return None if wrong is None else f"a {type(wrong).__name__}"
    if isinstance(column, list) and None not in field.shape:
        return f"a list of {type(column[0]).__name__}" if column else None
    for value in values:
        if not isinstance(value, np.ndarray):
            return f"a list that holds a {type(value).__name__}"
        shape = value.shape[1:] if value is column else value.shape
        fits = len(shape) == len(field.shape) and all(want in (None, have) for want, have in zip(field.shape, shape, strict=True))
        if not fits or value.dtype != np.dtype(field.dtype):
            return describe(Field(str(value.dtype), shape))
        if field.classes and value.size and (value.min() < 0 or value.max() >= field.classes):
            return f"values from {value.min()} to {value.max()}"
    return None


# ---------------------------------------------------------------- rows <-> Arrow


def arrow_type(field: Field) -> pa.DataType:
    """How a column of this field lies in Arrow and Parquet."""
    if field.dtype in ("bytes", "text"):
        return pa.binary() if field.dtype == "bytes" else pa.string()
    number = pa.from_numpy_dtype(np.dtype(field.dtype))
    if not field.shape:
        return number
    if None in field.shape:
        return pa.struct([("data", pa.list_(number)), ("shape", pa.list_(pa.int32()))])
    return pa.binary(_value_bytes(field))


def fits(found: pa.DataType, field: Field) -> bool:
    """Whether a column of this Arrow type can be read as the field. The large variants of text and bytes can."""
    large = {"text": pa.large_string(), "bytes": pa.large_binary()}.get(field.dtype)
    return bool(found == arrow_type(field) or found == large)


def table_from_rows(rows: Rows, schema: Schema) -> pa.Table:
    """Rows as an Arrow table with the schema's columns, without a copy where possible.

    Raises:
        InputError: with every column that does not fit the schema.
    """
    if problems := schema_problems(rows, schema, "rows"):
        raise InputError(problems)
    arrays = [_to_arrow(rows[name], field) for name, field in schema.items()]
    return pa.Table.from_arrays(arrays, names=list(schema))


def columns_from_arrow(table: pa.Table, schema: Schema) -> Rows:
    """The schema's columns of an Arrow table: an array [num_rows, ...] or a list per column; arrays may be read-only.

    Raises:
        ValueError: a column is not there exactly once or of another type, holds nulls on any level that nothing stands for, or
            has a row whose value does not fit the field; names the column and the row.
    """
    rows: Rows = {}
    for name, field in schema.items():
        array = _array_at(table, name, field)
        try:
            rows[name] = _from_arrow(array, field) if fits(array.type, field) else _from_others(array, field)
        except ValueError as error:
            raise ValueError(f"column {name!r}: {error}") from error
    return rows


def rows_with_nulls(table: pa.Table, schema: Schema) -> dict[int, str]:
    """Place -> reason, for each row with a null that nothing stands for, on any level of the schema's columns."""
    found: dict[int, str] = {}
    for name, field in schema.items():
        nulls = arrow_types.null_rows(_array_at(table, name, field))
        for row in np.flatnonzero(nulls):
            found.setdefault(int(row), f"column {name!r} is null, or holds a null")
    return found


def rows_of_table(table: pa.Table, schema: Schema, nulls: str) -> Rows:
    """As `columns_from_arrow`; with `nulls` "bad_rows", rows that hold one are marked as bad (`bad_rows.BAD`), not refused.

    Raises:
        ValueError: as `columns_from_arrow`; or all rows hold one.
    """
    bad = rows_with_nulls(table, schema) if nulls == "bad_rows" else {}
    if not bad:
        return columns_from_arrow(table, schema)
    good = np.ones(table.num_rows, bool)
    good[list(bad)] = False
    if not good.any():
        raise ValueError(f"{bad[0]}, in each of its rows")
    rows = columns_from_arrow(table.filter(pa.array(good)), schema)
    # In the place of a bad row stands a good one, which nobody sees.
    return take(rows, np.maximum(np.cumsum(good) - 1, 0)) | {BAD: [bad.get(row, "") for row in range(len(good))]}


def _array_at(table: pa.Table, name: str, field: Field) -> pa.Array:
    """The column of this name, with what stands for its nulls.

    Raises:
        ValueError: it is not there exactly once, or of a type that cannot be read as the field.
    """
    kinds = arrow_types.type_at(table.schema, name)
    if len(kinds) != 1:
        raise ValueError(f"there are {len(kinds)} columns {name!r}, not one")
    column = arrow_types.column_at(table, name)
    if not (fits(column.type, field) or arrow_types.readable(column.type, field)):
        raise ValueError(f"column {name!r} is {column.type}, not {arrow_type(field)}")
    # Of a single chunk, combine_chunks would make a copy.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return array if field.fill is None or not array.null_count else arrow_types.filled(array, field.fill)


def _from_others(array: pa.Array, field: Field) -> Column:
    nulls = arrow_types.null_rows(array)
    if nulls.any():
        row = int(np.flatnonzero(nulls)[0])
        raise ValueError(f"row {row}: it is null, or holds a null; {int(nulls.sum())} in all")
    return arrow_types.read_column(array, field)


def _refuse_nulls(array: pa.Array, what: str) -> None:
    if array.null_count:
        row = array.is_null().to_pylist().index(True)
        raise ValueError(f"row {row}: {what}; {array.null_count} in all")


def _value_bytes(field: Field) -> int:
    return np.dtype(field.dtype).itemsize * math.prod(extent or 0 for extent in field.shape)


def _to_arrow(column: Column, field: Field) -> pa.Array:
    kind = arrow_type(field)
    if field.dtype in ("bytes", "text"):
        values = [value.encode() if isinstance(value, str) else value for value in column]
        offsets = pa.py_buffer(_offsets(values))
        return pa.Array.from_buffers(kind, len(values), [None, offsets, pa.py_buffer(b"".join(values))])
    if isinstance(column, np.ndarray) and None not in field.shape:
        if not field.shape:
            return _numbers_to_arrow(column)
        return pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])
    flat = [value.reshape(-1) for value in column]
    shapes = [np.array(value.shape, np.int32) for value in column]
    lists = [_lists_to_arrow(flat, np.dtype(field.dtype)), _lists_to_arrow(shapes, np.dtype(np.int32))]
    return pa.StructArray.from_arrays(lists, fields=list(kind))


def _lists_to_arrow(values: Sequence[np.ndarray], dtype: np.dtype) -> pa.ListArray:
    joined = np.concatenate(values) if values else np.empty(0, dtype)
    return pa.ListArray.from_arrays(_numbers_to_arrow(_offsets(values)), _numbers_to_arrow(joined))


def _offsets(values: Sequence[Any]) -> np.ndarray:
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    if len(ends) and ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{ends[-1]} values in one row group; at most 2^31-1 fit. Write smaller row groups")
    return np.concatenate([[0], ends]).astype(np.int32)


def _numbers_to_arrow(values: np.ndarray) -> pa.Array:
    kind = pa.from_numpy_dtype(values.dtype)
    data = np.packbits(values, bitorder="little") if values.dtype.kind == "b" else np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(data)])


def _from_arrow(array: pa.Array, field: Field) -> Column:
    _refuse_nulls(array, "null")
    if field.dtype in ("bytes", "text"):
        values: list[Any] = array.to_pylist()
        return values
    dtype = np.dtype(field.dtype)
    if not field.shape:
        return _numbers_from_arrow(array, dtype)
    if None not in field.shape:
        size = _value_bytes(field)
        raw = _view(array.buffers()[1], np.dtype(np.uint8), len(array) * size, array.offset * size)
        return raw.view(dtype).reshape(len(array), *field.shape)
    flat = _lists_from_arrow(array.field("data"), dtype, "data")
    shapes = _lists_from_arrow(array.field("shape"), np.dtype(np.int32), "shape")
    return [_shaped(row, values, shape.tolist()) for row, (values, shape) in enumerate(zip(flat, shapes, strict=True))]


def _shaped(row: int, values: np.ndarray, shape: list[int]) -> np.ndarray:
    # numpy would take an extent of -1 for "whatever is left".
    if min(shape, default=0) < 0 or math.prod(shape) != len(values):
        raise ValueError(f"row {row}: {len(values)} numbers do not fill the shape {shape}")
    try:
        return values.reshape(shape)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


def _lists_from_arrow(array: pa.Array, dtype: np.dtype, what: str) -> list[np.ndarray]:
    _refuse_nulls(array, f"its {what} is null")
    offsets = _numbers_from_arrow(array.offsets, np.dtype(np.int32)).tolist()
    if array.values.null_count:
        # Under a null lies any number, mostly 0. Nulls before or after these rows' values are none of theirs.
        nulls = np.flatnonzero(_numbers_from_arrow(array.values.is_null(), np.dtype(bool)))
        nulls = nulls[(nulls >= offsets[0]) & (nulls < offsets[-1])]
        if len(nulls):
            row = int(np.searchsorted(offsets, nulls[0], side="right")) - 1
            raise ValueError(f"row {row}: a null in its {what}; {len(nulls)} in all")
    values = _numbers_from_arrow(array.values, dtype)
    return [values[start:stop] for start, stop in pairwise(offsets)]


def _numbers_from_arrow(array: pa.Array, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        num_bits = array.offset + len(array)
        bits = _view(array.buffers()[1], np.dtype(np.uint8), -(-num_bits // 8), 0)
        return np.unpackbits(bits, bitorder="little")[array.offset : num_bits].view(bool)
    return _view(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _view(buffer: Any, dtype: np.dtype, count: int, offset_bytes: int) -> np.ndarray:
    return np.frombuffer(buffer, dtype, count, offset_bytes) if count else np.empty(0, dtype)
