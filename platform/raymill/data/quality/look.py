"""The first rows of a split, to be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from raymill.data.bad_rows import read_good_rows
from raymill.data.manifest import Manifest
from raymill.data.rows import join, num_rows
from raymill.task import Pipeline, Rows


def shown(pipeline: Pipeline, manifest: Manifest, split: str, count: int, *, lenient: bool = False) -> Rows:
    """The first rows of a split, before the transform."""
    parts: list[Rows] = []
    for fragment in manifest.splits[split].fragments:
        rows, _ = read_good_rows(pipeline, split, fragment, lenient=lenient)
        if num_rows(rows):
            parts.append(rows)
        if sum(map(num_rows, parts)) >= count:
            break
    whole = join(parts) if parts else {}
    return {name: column[:count] for name, column in whole.items()}


def in_words(value: Any) -> str:
    """A value as people read it: an array by its shape and range, bytes by their number."""
    if isinstance(value, np.ndarray) and value.ndim:
        limits = f" from {value.min()} to {value.max()}" if value.size else ""
        return str(value.tolist()) if value.size <= 8 else f"{value.dtype} of shape {value.shape}{limits}"
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
