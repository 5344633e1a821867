"""Bad rows: which they are.

A row is bad when its source cannot read it, or when the pipeline's `check` says so. Under the policy "fail" the first one
ends the run. Otherwise its place in the order stays, empty, so that all other rows meet in the same steps as without it,
and rank 0 lists each bad row once (`record.bad_row_ledger`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raymill.data.rows import BAD, finite, num_rows, take
from raymill.errors import DataError
from raymill.own_code.seams import CHECK, READ, calling, wrong
from raymill.own_code.traces import describe, noting
from raymill.task import Check, Fragment, Pipeline, Rows, Schema


@dataclass(frozen=True)
class BadRow:
    """One bad row.

    Attributes:
        split: which rows.
        row: its number in the split, as in ROW_ID.
        file: the fragment's path.
        part: the fragment's number in the file, such as the row group.
        index: the row's number in the fragment.
        reason: why it is bad.
    """

    split: str
    row: int
    file: str
    part: int
    index: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, part {self.part}, row {self.index} ({self.split} row {self.row}): {self.reason}"


def read_good_rows(pipeline: Pipeline, split: str, fragment: Fragment, *, lenient: bool) -> tuple[Rows, dict[int, str]]:
    """Read a fragment and set its bad rows apart.

    Args:
        lenient: False to raise at a bad row.

    Returns:
        (the good rows, index in the fragment -> why that row is bad). Without a good row there may be no columns.

    Raises:
        DataError: a row is bad, or the fragment has other rows than the manifest says.
    """
    where = f"{fragment.path} part {fragment.part}"
    source = pipeline.sources[split]
    try:
        with noting(lambda: f"in {where} (split {split!r})"), calling(READ):
            rows = source.read(fragment)
    except DataError as error:
        if not lenient:
            raise
        return {}, dict.fromkeys(range(fragment.num_rows), str(error))
    if not isinstance(rows, Mapping):
        raise wrong(READ, source.read, describe(rows), "Let read() return a dict of columns.")
    if num_rows(rows) != fragment.num_rows:
        raise DataError(
            f"{where}: {num_rows(rows)} rows were read, {fragment.num_rows} were there when "
            "the run started. Restore the file, or start a new run on the changed data."
        )
    rows, known = without_marks(rows)
    reasons = (_bad_rows(pipeline.check, rows, where) if pipeline.check else {}) | known
    if not reasons:
        return rows, {}
    first = min(reasons)
    if first < 0 or max(reasons) >= fragment.num_rows:
        raise DataError(f"{where}: the pipeline's check named rows {sorted(reasons)} of {fragment.num_rows}. Correct the check.")
    if not lenient:
        raise DataError(
            f"{fragment.path}, part {fragment.part}, row {first}: {reasons[first]}. Repair or drop the row, or set "
            "bad_rows.policy to skip or quarantine."
        )
    good = np.ones(fragment.num_rows, bool)
    good[list(reasons)] = False
    return take(rows, np.flatnonzero(good)), reasons


def without_marks(rows: Rows) -> tuple[Rows, dict[int, str]]:
    """Rows as a source gave them without its marks, and index -> why that row is bad, of those that it marked."""
    others = {name: column for name, column in rows.items() if name != BAD}
    return others, {index: str(reason) for index, reason in enumerate(rows.get(BAD, ())) if reason}


def _bad_rows(check: Check, rows: Rows, where: str) -> dict[int, str]:
    with noting(lambda: f"in {where}"), calling(CHECK, rows):
        found = check(rows)
    if not isinstance(found, Mapping):
        raise wrong(CHECK, check, describe(found), "Return an empty dict where all rows are good.", rows)
    return {int(index): reason for index, reason in found.items()}


def check_values(rows: Rows, schema: Schema, *, must_be_finite: bool = False) -> dict[int, str]:
    """A check for pipelines, as in `check=partial(check_values, schema=SCHEMA)`.

    Args:
        must_be_finite: refuse NaN and infinity too. By default they are values like others.

    Returns:
        Place -> reason, for each row with a label outside its classes.
    """
    reasons: dict[int, str] = {}
    for name, field in schema.items():
        column = rows[name]
        if field.classes is not None:
            for index, value in enumerate(column):
                if np.size(value) and not 0 <= np.min(value) <= np.max(value) < field.classes:
                    reasons[index] = f"column {name!r} holds {np.asarray(value).tolist()}, not a label in 0..{field.classes - 1}"
        if must_be_finite and field.dtype.startswith("float"):
            reasons |= {int(index): f"column {name!r} holds NaN or infinity" for index in np.flatnonzero(~finite(column))}
    return reasons
