"""Anything with `__len__` and `__getitem__`, such as a torchvision dataset or a user's own class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymill.data.arrow import rows_bytes
from raymill.data.seeds import seed_row, unchanged_generators
from raymill.data.sources.once_per_process import made_once
from raymill.errors import DataError, InputError, Problem
from raymill.task import Column, Fragment, Rows


@dataclass(frozen=True)
class MapStyleSource:
    """Any dataset with `__len__` and `__getitem__`, made once per process; a fragment is a range of indices.

    Such a dataset has no index of its contents, so a fragment is known by the dataset's type and length alone. What it draws at
    random for an item, as torchvision's transforms do, follows from the job's seed, the epoch and the item's number.

    Attributes:
        name: what messages call it.
        make: makes the dataset, in every process that reads it.
        to_row: item -> the row's columns: numbers, arrays (or what numpy makes an array of), `bytes` or `str`.
        fragment_rows: rows of a fragment; the last one may have fewer.
    """

    name: str
    make: Callable[[], Any]
    to_row: Callable[[Any], Mapping[str, Any]]
    fragment_rows: int

    def fragments(self) -> Sequence[Fragment]:
        """List the ranges; one item is read to estimate the bytes.

        Raises:
            InputError: when the dataset has no length or no items by number, or its first item cannot be read.
        """
        dataset = made_once(self.make)
        kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            fix = "Use a map-style dataset; an iterable one has no order that a run could be resumed in."
            raise InputError([Problem(self.name, kind, "a dataset with __len__ and __getitem__", fix)])
        count = len(dataset)
        if count == 0:
            return []
        try:
            with unchanged_generators():
                row_bytes = rows_bytes(self._rows(range(1)))
        except DataError as error:
            raise InputError([Problem(self.name, str(error), "readable items", "Correct the dataset.")]) from error
        identity = hashlib.sha256(f"{kind}:{count}".encode()).hexdigest()[:16]
        sizes = [min(self.fragment_rows, count - start) for start in range(0, count, self.fragment_rows)]
        return [Fragment(self.name, part, num, num * row_bytes, identity) for part, num in enumerate(sizes)]

    def read(self, fragment: Fragment) -> Rows:
        """Read the items of one range. Arrays of equal shapes are stacked, other values are listed.

        Raises:
            DataError: an item cannot be read, or has other columns than the first; names its number.
        """
        start = fragment.part * self.fragment_rows
        return self._rows(range(start, start + fragment.num_rows))

    def _rows(self, numbers: range) -> Rows:
        dataset = made_once(self.make)
        items: list[Mapping[str, Any]] = []
        for number in numbers:
            seed_row(number)
            try:
                item = self.to_row(dataset[number])
            except Exception as error:  # the user's own code may raise anything
                raise DataError(f"{self.name}, item {number}: {type(error).__name__}: {error}") from error
            if items and item.keys() != items[0].keys():
                raise DataError(f"{self.name}, item {number}: columns {sorted(item)}, not {sorted(items[0])}")
            items.append(item)
        return {name: _stack([item[name] for item in items]) for name in items[0]}


def _stack(values: list[Any]) -> Column:
    if isinstance(values[0], bytes | str):
        return values
    arrays = [np.asarray(value) for value in values]
    same = len({(array.shape, array.dtype) for array in arrays}) == 1
    return np.stack(arrays) if same else arrays
