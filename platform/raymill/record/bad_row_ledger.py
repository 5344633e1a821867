"""The list of a run's bad rows: rank 0 keeps it over all attempts, and says when there are too many."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from raymill.data.bad_rows import BadRow
from raymill.errors import DataError
from raymill.files import private, replace_file
from raymill.record.events import BadRowsFound, Event, read_events
from raymill.record.folder import RunFolder
from raymill.redaction import redact_text

QUARANTINE = "quarantine"

MAX_NAMED_ROWS = 10
"""Rows that a summary names."""

MAX_ROWS_IN_MESSAGE = 3
"""Rows that an error names."""


def known_bad_rows(folder: RunFolder) -> list[BadRow]:
    """The bad rows that a run has met so far, each once, as in its events."""
    events, _ = read_events(folder.events)
    return [row for event in events if isinstance(event, BadRowsFound) for row in event.rows]


def summarise_bad_rows(folder: RunFolder, policy: str) -> dict[str, Any]:
    """What a run's summary says of them: how many different rows, and the first of them."""
    rows = known_bad_rows(folder)
    return {"policy": policy, "distinct": len(rows), "first": [asdict(row) for row in rows[:MAX_NAMED_ROWS]]}


class BadRowLedger:
    """The list of one run."""

    def __init__(self, folder: RunFolder, policy: str, budget: int, report: Callable[[Event], None]) -> None:
        """Go on with the list in the run's events.

        Args:
            budget: different rows that may be bad.
            report: takes the event that lists new rows.
        """
        known = known_bad_rows(folder)
        self._known = {(row.split, row.row) for row in known}
        self._file = folder.quarantine if policy == QUARANTINE else None
        self._budget, self._report = budget, report
        if self._file and known:
            # A kill may have come between an event and its lines here.
            replace_file(self._file, _lines(known))

    def add(self, rows: Sequence[BadRow]) -> None:
        """List those that are new.

        Raises:
            DataError: more than the budget; names the first of them, and lists none.
        """
        unknown = [row for row in rows if (row.split, row.row) not in self._known]
        new = [replace(row, reason=redact_text(row.reason)) for row in unknown]
        if not new:
            return
        count = len(self._known) + len(new)
        if count > self._budget:
            first = [str(row) for row in new[:MAX_ROWS_IN_MESSAGE]]
            raise DataError(
                f"at least {count} rows are bad, more than bad_rows.budget: {self._budget}. Found now: "
                + "; ".join(first)
                + (f"; and {len(new) - len(first)} more" if len(new) > len(first) else "")
                + ". Repair these files and resume, or start a new run with a larger bad_rows.budget."
            )
        self._known |= {(row.split, row.row) for row in new}
        self._report(BadRowsFound(rows=new))
        if self._file:
            with open(self._file, "a", opener=private) as file:
                file.write(_lines(new))


def _lines(rows: Sequence[BadRow]) -> str:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)
