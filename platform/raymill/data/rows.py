"""Rows as they travel: take, join, pack into buffers, unpack without copying.

A column is an array [num_rows, ...], or a list with one array, `bytes` or `str` per row. Packed, a set of rows is a
JSON header and a few flat buffers, which is all that is ever sent between processes: no pickle, no extension types.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from raymill.task import Column, Rows

ROW_ID = "__row__"
"""The column that holds each row's number in its split, int64 [num_rows]. Every batch has it."""


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
    """Turn rows into a JSON header and flat buffers.

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
        if column.dtype.hasobject or column.dtype.kind not in "biufc":
            raise TypeError(f"column {name!r}: an array of {column.dtype} cannot travel; use numbers, or a list of str or bytes")
        flat = np.ascontiguousarray(column)
        return "array", {"dtype": flat.dtype.str, "shape": flat.shape}, [flat.tobytes()]
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
    """The rows that `pack` was given. Arrays are views of the buffers and cannot be written to."""
    return {entry["name"]: _unpack(entry, buffer) for entry, buffer in zip(json.loads(header), buffers, strict=True)}


def _unpack(entry: dict[str, Any], buffer: Any) -> Column:
    if entry["kind"] == "array":
        return np.frombuffer(buffer, dtype=entry["dtype"]).reshape(entry["shape"])
    if entry["kind"] == "arrays":
        flat = np.frombuffer(buffer, dtype=entry["dtype"])
        sizes = [int(np.prod(shape)) for shape in entry["shapes"]]
        ends = np.cumsum([0, *sizes])
        return [flat[ends[i] : ends[i + 1]].reshape(shape) for i, shape in enumerate(entry["shapes"])]
    data = memoryview(buffer)
    ends = np.cumsum([0, *entry["sizes"]])
    values = [bytes(data[ends[i] : ends[i + 1]]) for i in range(len(entry["sizes"]))]
    return values if entry["kind"] == "bytes" else [value.decode() for value in values]
