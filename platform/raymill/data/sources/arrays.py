"""Rows that a function makes, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raymill.data.arrow import digest_rows, rows_bytes
from raymill.data.rows import take
from raymill.data.sources.once_per_process import made_once
from raymill.errors import DataError, InputError, Problem
from raymill.task import Fragment, Rows

# ---------------------------------------------------------------- rows that a function makes


@dataclass(frozen=True)
class ArraySource:
    """Rows in memory, made once per process; a fragment is a range of rows, known by a digest of its contents.

    Attributes:
        name: what messages call it.
        make: gives the same rows in every process: seed what is drawn.
        fragment_rows: rows of a fragment; the last one may have fewer.
    """

    name: str
    make: Callable[[], Rows]
    fragment_rows: int

    def fragments(self) -> Sequence[Fragment]:
        """List the ranges.

        Raises:
            InputError: when the columns differ in length.
        """
        rows = made_once(self.make)
        lengths = {name: len(column) for name, column in rows.items()}
        if len(set(lengths.values())) > 1:
            found = f"columns of {lengths} rows"
            raise InputError([Problem(self.name, found, "columns of one length", "Change what makes the rows.")])
        count = next(iter(lengths.values()), 0)
        fragments = []
        for part, start in enumerate(range(0, count, self.fragment_rows)):
            piece = take(rows, slice(start, start + self.fragment_rows))
            num = min(self.fragment_rows, count - start)
            fragments.append(Fragment(self.name, part, num, rows_bytes(piece), digest_rows(piece)))
        return fragments

    def read(self, fragment: Fragment) -> Rows:
        """The rows of one range.

        Raises:
            DataError: `make` gave other rows in this process than where the fragments were listed.
        """
        start = fragment.part * self.fragment_rows
        rows = take(made_once(self.make), slice(start, start + fragment.num_rows))
        if digest_rows(rows) != fragment.identity:
            raise DataError(
                f"{self.name}, rows {start} to {start + fragment.num_rows - 1}: other rows than in the run's manifest. "
                "The function that makes them must give the same rows in every process: seed what it draws."
            )
        return rows
