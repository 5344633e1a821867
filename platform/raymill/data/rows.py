"""Rows as they travel: take, join, pack into buffers, unpack without copying.

A column is an array [num_rows, ...], or a list with one array, `bytes` or `str` per row. Packed, a set of rows is a
JSON header and a few flat buffers, which is all that is ever sent between processes: no pickle, no extension types.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from raymill.task import Column, Rows

ROW_ID = "__row__"
"""The column that holds each row's number in its split, int64 [num_rows]. Every batch has it."""

BAD = "__bad__"
"""A column that a source may give: per row why it is bad, "" for a good one. A bad row has any value in the other columns."""

NUMBERS = "biufc"
"""The kinds of numpy types that travel: no objects, which only a pickle could carry, and no texts or times."""


def num_rows(rows: Rows) -> int:
    """The number of rows, or 0 without columns.

    Raises:
        ValueError: when columns differ in length.
    """
    lengths = {name: len(column) for name, column in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns differ in length: {lengths}")
    return next(iter(lengths.values()), 0)


def take(rows: Rows, index: np.ndarray | slice) -> Rows:
    """The rows of these numbers, in this order."""
    return {name: _take(column, index) for name, column in rows.items()}


def _take(column: Column, index: np.ndarray | slice) -> Column:
    if isinstance(column, np.ndarray) or isinstance(index, slice):
        return column[index]
    return [column[row] for row in index]


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one after the other. All parts have the same columns.

    Raises:
        ValueError: when columns differ between parts.
    """
    if len(parts) == 1:
        return parts[0]
    names = [set(part) for part in parts]
    if any(other != names[0] for other in names):
        raise ValueError(f"parts differ in their columns: {[sorted(other) for other in names]}")
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def _join(columns: Sequence[Column]) -> Column:
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    if len(arrays) == len(columns) and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return [value for column in columns for value in column]


def finite(column: Column) -> np.ndarray:
    """Whether all numbers of a row's value are finite, bool [num_rows]."""
    if isinstance(column, np.ndarray):
        return np.asarray(np.isfinite(column).reshape(len(column), -1).all(axis=1))
    return np.array([np.isfinite(value).all() for value in column], bool)


def pack(rows: Rows) -> tuple[str, list[bytes | memoryview]]:
    """Turn rows into a JSON header and flat buffers, which may be views of the rows: copy them before the rows change.

    Raises:
        TypeError: when a column holds anything but numbers, arrays, `bytes` or `str`.
    """
    header: list[dict[str, Any]] = []
    buffers: list[bytes | memoryview] = []
    for name, column in rows.items():
        kind, entry, parts = _pack(name, column)
        header.append({"name": name, "kind": kind, **entry})
        buffers.extend(parts)
    return json.dumps(header), buffers


def _pack(name: str, column: Column) -> tuple[str, dict[str, Any], list[bytes | memoryview]]:
    if isinstance(column, np.ndarray):
        if column.dtype.hasobject or column.dtype.kind not in NUMBERS:
            raise TypeError(f"column {name!r}: an array of {column.dtype} cannot travel; use numbers, or a list of str or bytes")
        flat = np.ascontiguousarray(column)
        return "array", {"dtype": flat.dtype.str, "shape": flat.shape}, [flat.reshape(-1).view(np.uint8).data.toreadonly()]
    if all(isinstance(value, np.ndarray) for value in column):
        dtypes = {value.dtype.str for value in column} or {"<f4"}
        if len(dtypes) > 1:
            raise TypeError(f"column {name!r}: arrays of different types {sorted(dtypes)}; give all rows one type")
        shapes = [value.shape for value in column]
        data = b"".join(np.ascontiguousarray(value).tobytes() for value in column)
        return "arrays", {"dtype": dtypes.pop(), "shapes": shapes}, [data]
    if all(isinstance(value, bytes) for value in column):
        return "bytes", {"sizes": [len(value) for value in column]}, [b"".join(column)]
    if all(isinstance(value, str) for value in column):
        encoded = [value.encode() for value in column]
        return "text", {"sizes": [len(value) for value in encoded]}, [b"".join(encoded)]
    found = sorted({type(value).__name__ for value in column})
    raise TypeError(f"column {name!r}: a list of {found} cannot travel; use one array, or arrays, bytes or str only")


def unpack(header: str, buffers: Sequence[Any]) -> Rows:
    """The rows that `pack` was given. Arrays are views of the buffers and cannot be written to.

    Raises:
        ValueError: the header does not describe these buffers to the last byte.
    """
    try:
        entries = json.loads(header)
        rows = {entry["name"]: _unpack(entry, buffer) for entry, buffer in zip(entries, buffers, strict=True)}
        named = len(rows) == len(entries) and all(isinstance(name, str) for name in rows)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the header of a packet is none: {type(error).__name__}: {error}") from error
    if not named:
        raise ValueError("the header of a packet does not name each of its columns once")
    num_rows(rows)
    return rows


def _unpack(entry: dict[str, Any], buffer: Any) -> Column:
    kind, data = entry["kind"], memoryview(buffer)
    if kind in ("array", "arrays"):
        dtype = np.dtype(str(entry["dtype"]))
        if dtype.hasobject or dtype.kind not in NUMBERS:
            raise ValueError(f"the header of a packet names the type {entry['dtype']}, which is not one of numbers")
        shapes = [entry["shape"]] if kind == "array" else entry["shapes"]
        flat = np.frombuffer(data, dtype=dtype)
        parts = _cut([math.prod(_counts(shape)) for shape in shapes], len(flat))
        arrays = [flat[part].reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        if kind == "array" and not arrays[0].ndim:
            raise ValueError("the header of a packet gives a column no rows")
        return arrays[0] if kind == "array" else arrays
    if kind not in ("bytes", "text"):
        raise ValueError(f"the header of a packet names the kind {kind!r}, which there is not")
    values = [bytes(data[part]) for part in _cut(_counts(entry["sizes"]), len(data))]
    return values if kind == "bytes" else [value.decode() for value in values]


def _counts(values: Sequence[Any]) -> Sequence[int]:
    """The numbers of a header, none below zero: a slice would count that from the end, and a shape guess it."""
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("the header of a packet holds sizes that are none")
    return values


def _cut(sizes: Sequence[int], whole: int) -> list[slice]:
    """The places of parts of these sizes that lie end to end; together they are the whole."""
    ends = [0, *accumulate(sizes)]
    if ends[-1] != whole:
        raise ValueError(f"the header of a packet speaks of {ends[-1]} values or bytes, and there are {whole}")
    return [slice(start, stop) for start, stop in pairwise(ends)]
