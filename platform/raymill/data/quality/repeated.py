"""Rows that come more than once: a model is not to be measured on rows that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from raymill.data.bad_rows import read_good_rows
from raymill.data.manifest import Manifest
from raymill.data.rows import num_rows
from raymill.task import Column, Pipeline, Schema

MOST_KEPT = 10_000_000
"""Digests that are held at once, 8 bytes each; of more rows, each so manieth by its digest."""


def repeated_rows(
    pipeline: Pipeline, manifest: Manifest, progress: Callable[[str, int], None] = lambda split, num_rows: None
) -> dict[str, Any]:
    """Count the rows that were there before, in their own split or another one.

    Rows are alike where their files are (columns of bytes); without any, where all columns are but the targets.

    Args:
        progress: is told of rows that were read.

    Returns:
        columns: what was compared; one_in: of how many rows one was looked at; within: split -> rows that the split has already;
        across: "train, validation" -> rows of the second that are in the first too.
    """
    columns = compared(pipeline.schema, pipeline.targets or ())
    one_in = -(-sum(split.num_rows for split in manifest.splits.values()) // MOST_KEPT)
    digests: dict[str, np.ndarray] = {}
    for name, split in manifest.splits.items():
        parts = [np.empty(0, np.uint64)]
        for fragment in split.fragments:
            rows, _ = read_good_rows(pipeline, name, fragment, lenient=True)
            if num_rows(rows):
                found = _digests([rows[column] for column in columns])
                parts.append(found[found % one_in == 0] if one_in > 1 else found)
            progress(name, fragment.num_rows)
        digests[name] = np.concatenate(parts)
    different = {name: np.unique(found) for name, found in digests.items()}
    return {
        "columns": columns,
        "one_in": max(1, one_in),
        "within": {name: len(found) - len(different[name]) for name, found in digests.items()},
        "across": {
            f"{first}, {second}": int(np.isin(digests[second], different[first]).sum())
            for first, second in combinations(digests, 2)
        },
    }


def compared(schema: Schema, targets: Sequence[str]) -> list[str]:
    """The columns by which rows are told apart."""
    files = [name for name, field in schema.items() if field.dtype == "bytes"]
    return files or [name for name in schema if name not in targets] or list(schema)


def _digests(columns: Sequence[Column]) -> np.ndarray:
    """A number for each row that is the same where the rows are, uint64 [num_rows]."""
    flat = [
        np.ascontiguousarray(one).reshape(len(one), -1).view(np.uint8).reshape(len(one), -1)
        for one in columns
        if isinstance(one, np.ndarray)
    ]
    lists = [one for one in columns if not isinstance(one, np.ndarray)]
    count = len(columns[0])
    numbers: Iterator[bytes] = iter(np.concatenate(flat, axis=1)) if flat else iter([b""] * count)

    def digest(row: int, start: Any) -> bytes:
        hashed = hashlib.blake2b(start, digest_size=8)
        for values in lists:
            value = values[row]
            data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else value.tobytes()
            # With its length, so that no text runs into the next one.
            hashed.update(len(data).to_bytes(8, "little") + data)
        return hashed.digest()

    return np.frombuffer(b"".join(digest(row, start) for row, start in enumerate(numbers)), "<u8")
