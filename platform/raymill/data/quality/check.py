"""Read every row of a data set once, for all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from raymill.data.arrow import schema_problems
from raymill.data.bad_rows import without_marks
from raymill.data.manifest import Manifest
from raymill.data.rows import finite
from raymill.errors import DataError, InputError, Problem
from raymill.task import Fragment, Pipeline, Rows


def check_rows(
    pipeline: Pipeline, manifest: Manifest, progress: Callable[[str, int], None] = lambda split, num_rows: None
) -> dict[str, Any]:
    """Read every row of every split once, before the transform, and look for all that is wrong.

    Args:
        progress: is told of rows that were read.

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
            progress(name, fragment.num_rows)
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
