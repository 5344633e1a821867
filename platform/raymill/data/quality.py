"""Read every row of a data set once: what is wrong with it, and its statistics; and its first rows, to be looked at."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymill.data.arrow import schema_problems
from raymill.data.bad_rows import read_good_rows, without_marks
from raymill.data.manifest import Manifest
from raymill.data.rows import finite, join, num_rows, take
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.task import Column, Field, Fragment, Pipeline, Rows


def check_rows(pipeline: Pipeline, manifest: Manifest) -> dict[str, Any]:
    """Read every row of every split once, before the transform, and look for all that is wrong.

    Returns:
        split -> fragments, rows and bytes, all of which are right; and classes_without_rows, column -> those that no row is of,
        where there are any, which is no mistake by itself.

    Raises:
        InputError: with each fragment that cannot be read or has other rows than its index says, and each column of a
            fragment that does not fit the schema, has a label outside its classes, or holds NaN or infinity; and each
            fragment with rows that the pipeline's check refuses.
    """
    problems: list[Problem] = []
    missing = {
        split: {column: set(range(one.classes or 0)) for column, one in pipeline.schema.items()} for split in manifest.splits
    }
    for name, split in manifest.splits.items():
        for fragment in split.fragments:
            where = f"split {name!r}, {fragment.path}, part {fragment.part}"
            try:
                rows = pipeline.sources[name].read(fragment)
            except DataError as error:
                problems.append(Problem(where, str(error), "readable rows", "Correct or restore the data."))
                continue
            rows, marked = without_marks(rows)
            problems += schema_problems(rows, pipeline.schema, where) or _value_problems(rows, fragment, pipeline, where)
            reasons = {**(pipeline.check(rows) if pipeline.check else {}), **marked}
            if reasons:
                found = f"{len(reasons)} bad rows, the first of them row {min(reasons)}: {reasons[min(reasons)]}"
                expected = "rows that the source can read and the pipeline's check lets pass"
                problems.append(Problem(where, found, expected, "Drop or correct these rows."))
            for column, classes in missing[name].items():
                if classes and len(rows[column]):
                    classes.difference_update(np.unique(np.concatenate([np.ravel(one) for one in rows[column]])).tolist())
    if problems:
        raise InputError(problems)
    told: dict[str, Any] = {}
    for name, split in manifest.splits.items():
        told[name] = {"fragments": len(split.fragments), "rows": split.num_rows, "bytes": split.num_bytes}
        if without := {column: sorted(classes) for column, classes in missing[name].items() if classes}:
            told[name]["classes_without_rows"] = without
    return told


def _value_problems(rows: Rows, fragment: Fragment, pipeline: Pipeline, where: str) -> list[Problem]:
    problems = []
    for name, field in pipeline.schema.items():
        column = f"{where}: column {name!r}"
        if len(rows[name]) != fragment.num_rows:
            fix = "Restore the data, or write them again."
            problems.append(Problem(column, f"{len(rows[name])} rows", f"{fragment.num_rows}, as its index says", fix))
        if field.dtype.startswith("float"):
            wrong = np.flatnonzero(~finite(rows[name]))
            if len(wrong):
                found = f"NaN or infinity in {len(wrong)} of {len(rows[name])} rows, the first of them row {wrong[0]}"
                problems.append(Problem(column, found, "finite numbers", "Drop or correct these rows."))
    return problems


# ---------------------------------------------------------------- measure

MOST_SAMPLED = 100_000
QUANTILES = (0.05, 0.5, 0.95)


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

    def _quantiles(self) -> list[float]:
        return [float(value) for value in np.quantile(np.concatenate(self.sampled), QUANTILES)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; min, max and mean are of the finite values, None without any."""
        count = self.num_values - self.num_not_finite
        numbers = {
            "min": self.low if count else None,
            "max": self.high if count else None,
            "mean": self.total / count if count else None,
            "quantiles": dict(zip(map(str, QUANTILES), self._quantiles(), strict=True)) if count else None,
        }
        about: dict[str, Any] = {"dtype": self.field.dtype, "shape": list(self.field.shape)}
        if self.field.dtype in ("bytes", "text"):
            return {**about, "length": numbers}
        about |= {**numbers, "num_not_finite": self.num_not_finite}
        return {**about, "class_counts": self.counts.tolist()} if self.field.classes else about


def _sampling(column: Field, num_rows: int) -> int:
    values = math.prod(extent or 1 for extent in column.shape) * num_rows
    return max(1, values // MOST_SAMPLED)


def statistics(pipeline: Pipeline, manifest: Manifest, split: str) -> dict[str, Any]:
    """Read a whole split, a fragment at a time, and measure its columns before the transform.

    Returns:
        rows, bytes, fragments, bad_rows (those that the source marks as such, which are not measured), and per column: dtype,
        shape, min, max, mean, quantiles (of at most about 100,000 values), count of NaN and infinite values, and for labels the
        rows of each class; for bytes and text the numbers of the length.

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
    return {
        "rows": found.num_rows,
        "bytes": found.num_bytes,
        "fragments": len(found.fragments),
        "bad_rows": num_bad,
        "columns": {name: measure.as_dict() for name, measure in measures.items()},
    }


# ---------------------------------------------------------------- look


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
