"""Columns of Arrow as others write them, read as the fields of a schema; and the schema that such columns have.

    integers, floats, bool                      the number; of another width where no value loses by it
    decimal                                     a float that gives the same decimal back, or a whole number
    date, time, timestamp, duration             int64, counted in the unit of the column, from 1970-01-01 or midnight on
    string, binary, their large and view kinds  text, bytes
    dictionary                                  what its values are
    list, fixed-size list, tensor of Arrow's    an array of the field's shape; None in it for an extent that differs by row
    or of Ray Data's
    struct                                      a column for each of its fields, named "image.bytes"

Nothing is converted that would lose: a value that the field cannot hold is an error that names its row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymill.task import Column, Field, Schema

EXTENSION_NAME, EXTENSION = b"ARROW:extension:name", b"ARROW:extension:metadata"
"""What a file says of a column whose type is somebody's own."""

# ---------------------------------------------------------------- types


def bare(kind: pa.DataType) -> pa.DataType:
    """The type beneath a dictionary or an extension."""
    if pa.types.is_dictionary(kind):
        return bare(kind.value_type)
    return bare(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def is_list(kind: pa.DataType) -> bool:
    """Of any kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Of any width."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Of any width."""
    any_length = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(any_length or pa.types.is_fixed_size_binary(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind) and not pa.types.is_interval(kind))


def _is_number(kind: pa.DataType) -> bool:
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(plain or pa.types.is_decimal(kind))


def readable(kind: pa.DataType, field: Field) -> bool:
    """Whether a column of this type may be read as the field; its values may still not fit."""
    kind, depth = bare(kind), 0
    if pa.types.is_null(kind):
        return True
    if field.dtype == "text":
        return is_text(kind)
    if field.dtype == "bytes":
        return is_bytes(kind) or is_text(kind)
    while is_list(kind):
        kind, depth = bare(kind.value_type), depth + 1
    number, dtype = _is_number(kind), np.dtype(field.dtype)
    if dtype.kind == "c" or not (number or (_is_time(kind) and dtype == np.int64)):
        return False
    # Of a list of lists, and of one that lies flat for several extents, as a tensor does.
    return depth == len(field.shape) or (depth == 1 and bool(field.shape) and None not in field.shape)


def field_of(kind: pa.DataType) -> Field | None:
    """The field that a column of this type has; None: there is none."""
    if isinstance(kind, pa.FixedShapeTensorType):
        inner = field_of(kind.value_type)
        return None if inner is None else Field(inner.dtype, tuple(kind.shape))
    kind = bare(kind)
    if is_text(kind) or is_bytes(kind):
        return Field("text" if is_text(kind) else "bytes")
    shape: list[int | None] = []
    while is_list(kind):
        shape.append(kind.list_size if pa.types.is_fixed_size_list(kind) else None)
        kind = bare(kind.value_type)
    if None in shape:
        shape = [None] * len(shape)
    if _is_time(kind):
        return Field("int64", tuple(shape))
    if pa.types.is_decimal(kind):
        return Field("float64", tuple(shape))
    return Field(str(kind.to_pandas_dtype().__name__).rstrip("_"), tuple(shape)) if _is_number(kind) else None


def schema_of_columns(columns: pa.Schema) -> tuple[Schema, dict[str, str]]:
    """The schema that these columns have, and the columns that have none, with their types."""
    found: dict[str, Field] = {}
    without: dict[str, str] = {}
    for name, column in _leaves(columns):
        field = field_of(column.type)
        if field is None:
            without[name] = str(column.type)
        else:
            shape = _shape_of_ray(column)
            found[name] = field if shape is None else Field(field.dtype, shape)
    return found, without


def _shape_of_ray(column: pa.Field) -> tuple[int, ...] | None:
    """The shape of a tensor that Ray Data wrote; else None. Where Ray Data is not imported, its type is a list with a note."""
    kind, noted = column.type, column.metadata or {}
    if isinstance(kind, pa.ExtensionType):
        noted = {EXTENSION_NAME: kind.extension_name.encode(), EXTENSION: kind.__arrow_ext_serialize__()}
    if not noted.get(EXTENSION_NAME, b"").startswith(b"ray.data.arrow_tensor"):
        return None
    try:
        extents = json.loads(noted[EXTENSION])
    except (KeyError, ValueError, RecursionError):
        return None
    right = isinstance(extents, list) and extents and all(type(extent) is int and extent > 0 for extent in extents)
    return tuple(extents) if right else None


def _leaves(columns: pa.Schema | pa.StructType, above: str = "") -> Iterator[tuple[str, pa.Field]]:
    for column in columns:
        name = f"{above}{column.name}"
        if pa.types.is_struct(column.type):
            yield from _leaves(column.type.fields, f"{name}.")
        else:
            yield name, column


def type_at(columns: pa.Schema, name: str) -> list[pa.DataType]:
    """The types of the columns of this name, which may lead into structs; more than one where a name is there twice."""
    own = [columns.field(at).type for at in columns.get_all_field_indices(name)]
    # Each column of each row group that is read comes by: a name without a dot leads into no struct, so none is looked through.
    return [column.type for leaf, column in _leaves(columns) if leaf == name] or own if "." in name else own


def column_at(table: pa.Table, name: str) -> pa.ChunkedArray:
    """The column of this name, which may lead into structs."""
    if name in table.column_names:
        return table.column(name)
    first, *rest = name.split(".")
    column = table.column(first)
    # The struct's own nulls count for its fields.
    return pc.struct_field(column, rest)


# ---------------------------------------------------------------- values


def null_rows(array: pa.Array) -> np.ndarray:
    """Whether a row is null, or holds a null, bool [num_rows]."""
    array = _plain(array)
    found: np.ndarray = array.is_null().to_numpy(zero_copy_only=False)
    if is_list(array.type):
        inside = null_rows(array.flatten())
        if inside.any():
            parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
            found = found.copy()
            found[np.unique(parents[inside])] = True
    return found


def filled(array: pa.Array, value: int | float | str | bytes) -> pa.Array:
    """The column with this value for each null.

    Raises:
        ValueError: it is none of the column's type.
    """
    array = _plain(array)
    if pa.types.is_null(array.type):
        return pa.array([value] * len(array))
    try:
        return pc.fill_null(array, pa.scalar(value).cast(array.type))
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"fill={value!r} is no value of a column of {array.type}: {error}") from error


def read_column(array: pa.Array, field: Field) -> Column:
    """A column without nulls as the field's values.

    Raises:
        ValueError: names the first row whose value the field cannot hold.
    """
    array = _plain(array)
    if field.dtype in ("text", "bytes"):
        values: list[Any] = array.to_pylist()
        return [value.encode() if field.dtype == "bytes" and isinstance(value, str) else value for value in values]
    if not is_list(array.type):
        return _numbers(array, np.dtype(field.dtype))
    if None not in field.shape:
        return _of_one_shape(array, field)
    return _of_their_own_shapes(array, field)


def _plain(array: pa.Array) -> pa.Array:
    """Without dictionaries and extensions."""
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        else:
            return array


def _of_one_shape(array: pa.Array, field: Field) -> np.ndarray:
    """Values of one shape, which may lie in lists of lists or end to end."""
    num_rows, values = len(array), array
    size, depth = 1, 0
    while is_list(values.type):
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        extent = int(lengths[0]) if len(lengths) else 0
        if (other := np.flatnonzero(lengths != extent)).size:
            row = int(other[0]) // max(1, size)
            raise ValueError(
                f"row {row}: {lengths[other[0]]} values, where the first row has {extent}, and the shape is {field.shape}"
            )
        size, depth, values = size * extent, depth + 1, _plain(values.flatten())
    if num_rows and size != math.prod(extent or 0 for extent in field.shape):
        raise ValueError(f"row 0: {size} values, which do not fill the shape {field.shape}")
    return _numbers(values, np.dtype(field.dtype)).reshape(num_rows, *field.shape)


def _of_their_own_shapes(array: pa.Array, field: Field) -> list[np.ndarray]:
    if not is_list(_plain(array.flatten()).type):
        flat = _numbers(array.flatten(), np.dtype(field.dtype))
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        return [np.asarray(part) for part in np.split(flat, np.cumsum(lengths)[:-1])] if len(lengths) else []
    found = []
    for row in range(len(array)):
        one = array.slice(row, 1)
        shape: list[int] = []
        while is_list(one.type):
            lengths = set(pc.list_value_length(one).to_pylist())
            if len(lengths) > 1:
                raise ValueError(f"row {row}: lists of {sorted(lengths)} values, which are no array")
            shape.append(next(iter(lengths), 0))
            one = _plain(one.flatten())
        found.append(_numbers(one, np.dtype(field.dtype)).reshape(shape[: len(field.shape)] or [0]))
    return found


def _numbers(array: pa.Array, dtype: np.dtype) -> np.ndarray:
    array = _plain(array)
    kind = array.type
    if pa.types.is_decimal(kind):
        return _of_decimals(array, dtype)
    if _is_time(kind):
        array = array.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    return _exactly(array.to_numpy(zero_copy_only=False), dtype)


def _of_decimals(array: pa.Array, dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "iu":
        try:
            return _exactly(array.cast(pa.int64()).to_numpy(), dtype)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{error}, which is no {dtype}") from error
    numbers = array.cast(pa.float64())
    # A decimal is read as the float that is printed as it is.
    again = numbers.cast(array.type, safe=False)
    if (other := np.flatnonzero(~pc.equal(again, array).to_numpy(zero_copy_only=False))).size:
        raise ValueError(f"row {other[0]}: {array[int(other[0])]}, which no float64 tells from its neighbours")
    return _exactly(numbers.to_numpy(), dtype)


def _exactly(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same numbers of another type.

    Raises:
        ValueError: names the first that it cannot hold.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        fits = _fits(values, dtype)
        if not fits.all():
            at = int(np.flatnonzero(~fits)[0])
            raise ValueError(f"row {at}: {values[at]}, which {dtype} cannot hold")
        return values.astype(dtype)


def _fits(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.isin(values, (0, 1))
    if values.dtype.kind == "b":
        return np.ones(len(values), bool)
    if dtype.kind == "f":
        if values.dtype.kind == "f":
            return np.asarray((values.astype(dtype).astype(values.dtype) == values) | np.isnan(values))
        most = 2 ** (np.finfo(dtype).nmant + 1)
        return np.asarray((values <= most) & (values.astype(np.float64) >= -most))
    limits = np.iinfo(dtype)
    if values.dtype.kind == "f":
        # The largest whole number of 64 bits is no float; the one above it is.
        return np.asarray((values == np.floor(values)) & (values >= float(limits.min)) & (values < float(limits.max) + 1))
    low = np.ones(len(values), bool) if values.dtype.kind == "u" else values >= limits.min
    return (
        np.asarray(low & (values.astype(np.uint64) <= limits.max))
        if dtype.kind == "u"
        else np.asarray(low & _at_most(values, limits.max))
    )


def _at_most(values: np.ndarray, most: int) -> np.ndarray:
    if values.dtype.kind == "u":
        return np.asarray(values <= np.uint64(most))
    return np.asarray(values <= min(most, np.iinfo(values.dtype).max))
