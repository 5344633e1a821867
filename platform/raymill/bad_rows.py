"""Bad rows: which they are, who keeps the list, and when there are too many.

A row is bad when its source cannot read it, or when the pipeline's `check` says so. Under the policy "fail" the first one
ends the run. Otherwise its place in the order stays, empty, so that all other rows meet in the same steps as without it,
and rank 0 lists each bad row once, in the run's events; "quarantine" also writes them to a file of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raymill.checkpoint import write_file
from raymill.errors import DataError
from raymill.home import RunFolder
from raymill.rows import finite, num_rows, take
from raymill.task import Fragment, Pipeline, Rows, Schema
from raymill.tracking import read_events

FAIL, SKIP, QUARANTINE = "fail", "skip", "quarantine"

MOST_NAMED = 10
"""Rows that a summary names."""

MOST_IN_MESSAGE = 3
"""Rows that an error names."""


@dataclass(frozen=True)
class BadRow:
    """One bad row.

    Attributes:
        split: which rows.
        row: its number in the split, as in ROW_ID.
        file: the fragment's path.
        part: the fragment's number in the file, such as the row group.
        place: the row's number in the fragment.
        reason: why it is bad.
    """

    split: str
    row: int
    file: str
    part: int
    place: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, part {self.part}, row {self.place} ({self.split} row {self.row}): {self.reason}"


def sift(pipeline: Pipeline, split: str, fragment: Fragment, *, lenient: bool) -> tuple[Rows, dict[int, str]]:
    """Read a fragment and set its bad rows apart.

    Args:
        lenient: False to raise at a bad row.

    Returns:
        (the good rows, place in the fragment -> why that row is bad). Without a good row there may be no columns.

    Raises:
        DataError: a row is bad, or the fragment has other rows than the manifest says.
    """
    try:
        rows = pipeline.sources[split].read(fragment)
    except DataError as error:
        if not lenient:
            raise
        return {}, dict.fromkeys(range(fragment.num_rows), str(error))
    where = f"{fragment.path} part {fragment.part}"
    if num_rows(rows) != fragment.num_rows:
        raise DataError(
            f"{where}: {num_rows(rows)} rows were read, {fragment.num_rows} were there when "
            "the run started. Restore the file, or start a new run on the changed data."
        )
    reasons = {int(place): reason for place, reason in pipeline.check(rows).items()} if pipeline.check else {}
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
            for place, value in enumerate(column):
                if np.size(value) and not 0 <= np.min(value) <= np.max(value) < field.classes:
                    reasons[place] = f"column {name!r} holds {np.asarray(value).tolist()}, not a label in 0..{field.classes - 1}"
        if must_be_finite and field.dtype.startswith("float"):
            reasons |= {int(place): f"column {name!r} holds NaN or infinity" for place in np.flatnonzero(~finite(column))}
    return reasons


# ---------------------------------------------------------------- the list


def listed(folder: RunFolder) -> list[dict[str, Any]]:
    """The bad rows that a run has met so far, each once, as in its events."""
    events, _ = read_events(folder.events)
    return [row for event in events if event["kind"] == "bad_rows" for row in event["rows"]]


def as_summary(folder: RunFolder, policy: str) -> dict[str, Any]:
    """What a run's summary says of them: how many different rows, and the first of them."""
    rows = listed(folder)
    return {"policy": policy, "distinct": len(rows), "first": rows[:MOST_NAMED]}


class Ledger:
    """The list of one run, kept by rank 0, over all of its attempts."""

    def __init__(self, folder: RunFolder, policy: str, budget: int, report: Callable[[dict[str, Any]], None]) -> None:
        """Go on with the list in the run's events.

        Args:
            budget: different rows that may be bad.
            report: takes the event that lists new rows.
        """
        known = listed(folder)
        self._known = {_key(row) for row in known}
        self._file = folder.quarantine if policy == QUARANTINE else None
        self._budget, self._report = budget, report
        if self._file and known:
            # A kill may have come between an event and its lines here.
            write_file(self._file, _lines(known))

    def add(self, rows: Sequence[BadRow]) -> None:
        """List those that are new.

        Raises:
            DataError: more than the budget; names the first of them, and lists none.
        """
        new = [asdict(row) for row in rows if (row.split, row.row) not in self._known]
        if not new:
            return
        count = len(self._known) + len(new)
        if count > self._budget:
            first = [str(BadRow(**row)) for row in new[:MOST_IN_MESSAGE]]
            raise DataError(
                f"at least {count} rows are bad, more than bad_rows.budget: {self._budget}. Found now: "
                + "; ".join(first)
                + (f"; and {len(new) - len(first)} more" if len(new) > len(first) else "")
                + ". Repair these files and resume, or start a new run with a larger bad_rows.budget."
            )
        self._known |= {_key(row) for row in new}
        self._report({"kind": "bad_rows", "rows": new})
        if self._file:
            with open(self._file, "a") as file:
                file.write(_lines(new))


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["split"], row["row"]


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
