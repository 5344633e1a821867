"""Read every row of a split once, for what its values are like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymill.data.arrow import schema_problems
from raymill.data.bad_rows import without_marks
from raymill.data.manifest import Manifest
from raymill.data.rows import num_rows, take
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.task import Column, Field, Pipeline

MOST_SAMPLED = 100_000
QUANTILES = (0.05, 0.5, 0.95)
NUM_BINS = 30


@dataclass
class _Measure:
    """Running sums over the values of one column; for bytes and text, over their lengths.

    Attributes:
        every: the quantiles are those of each so manieth value.
    """

    field: Field
    every: int
    num_values: int = 0
    num_not_finite: int = 0
    sampled: list[np.ndarray] = dataclasses.field(default_factory=list)
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.field.classes or 0, np.int64)

    def add(self, column: Column) -> None:
        """Take in one fragment's values."""
        for values in self._arrays(column):
            finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
            self.num_values += values.size
            self.num_not_finite += values.size - finite.size
            if finite.size:
                self.sampled.append(finite.reshape(-1)[:: self.every].astype(np.float64))
                self.total += float(finite.sum(dtype=np.float64))
                self.low, self.high = min(self.low, finite.min().item()), max(self.high, finite.max().item())
            if self.field.classes:
                self.counts += np.bincount(values.reshape(-1), minlength=self.field.classes)

    def _arrays(self, column: Column) -> list[np.ndarray]:
        if self.field.dtype in ("bytes", "text"):
            return [np.array([len(value) for value in column])]
        return [column] if isinstance(column, np.ndarray) else column

    def _shape(self) -> dict[str, Any]:
        """How the sampled values lie between the least and the most."""
        sampled = np.concatenate(self.sampled)
        quantiles = [float(value) for value in np.quantile(sampled, QUANTILES)]
        bins = np.linspace(self.low, self.high, NUM_BINS + 1)
        counts = np.histogram(sampled, bins)[0] if self.low < self.high else np.array([len(sampled)])
        return {"quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)), "histogram": counts.tolist()}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; min, max and mean are of the finite values, None without any."""
        count = self.num_values - self.num_not_finite
        numbers = {
            "min": self.low if count else None,
            "max": self.high if count else None,
            "mean": self.total / count if count else None,
            **(self._shape() if count else {"quantiles": None, "histogram": None}),
        }
        about: dict[str, Any] = {"dtype": self.field.dtype, "shape": list(self.field.shape)}
        if self.field.dtype in ("bytes", "text"):
            return {**about, "length": numbers}
        about |= {**numbers, "num_not_finite": self.num_not_finite}
        return {**about, "class_counts": self.counts.tolist()} if self.field.classes else about


def _sampling(column: Field, num_rows: int) -> int:
    values = math.prod(extent or 1 for extent in column.shape) * num_rows
    return max(1, values // MOST_SAMPLED)


def statistics(
    pipeline: Pipeline,
    manifest: Manifest,
    split: str,
    progress: Callable[[str, int], None] = lambda split, num_rows: None,
) -> dict[str, Any]:
    """Read a whole split, a fragment at a time, and measure its columns before the transform.

    Args:
        progress: is told of rows that were read.

    Returns:
        rows, bytes, fragments, bad_rows (those that the source marks as such, which are not measured), and per column: dtype,
        shape, min, max, mean, quantiles and the counts of a histogram (of at most about 100,000 values), count of NaN and
        infinite values, and for labels the rows of each class; for bytes and text the numbers of the length.

    Raises:
        InputError: no such split.
        DataError: a fragment cannot be read or does not fit the schema.
    """
    if split not in manifest.splits:
        fix = did_you_mean(split, manifest.splits)
        raise InputError([Problem("split", repr(split), "a split of the pipeline", fix)])
    found = manifest.splits[split]
    measures = {name: _Measure(field, _sampling(field, found.num_rows)) for name, field in pipeline.schema.items()}
    num_bad = 0
    for fragment in found.fragments:
        rows, marked = without_marks(pipeline.sources[split].read(fragment))
        if marked:
            num_bad += len(marked)
            rows = take(rows, np.setdiff1d(np.arange(num_rows(rows)), list(marked)))
        if problems := schema_problems(rows, pipeline.schema, f"{fragment.path}, part {fragment.part}"):
            raise DataError("\n".join(map(str, problems)))
        for name, measure in measures.items():
            measure.add(rows[name])
        progress(split, fragment.num_rows)
    return {
        "rows": found.num_rows,
        "bytes": found.num_bytes,
        "fragments": len(found.fragments),
        "bad_rows": num_bad,
        "columns": {name: measure.as_dict() for name, measure in measures.items()},
    }
