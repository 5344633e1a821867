"""The sources that raymill ships: where the rows of a split come from.

`ParquetSource` reads files on disk, `ArraySource` takes rows that a function makes, `MapStyleSource` takes anything
with `__len__` and `__getitem__`, such as a torchvision dataset. Each lists its fragments and reads one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from raymill.arrow import columns_from_arrow, digest_rows, rows_bytes, schema_problems, table_from_rows
from raymill.errors import DataError, InputError, Problem
from raymill.parquet import DAMAGE, inspect_file, read_footer, read_group, write_parquet
from raymill.rows import take
from raymill.task import Column, Fragment, Rows, Schema

__all__ = ["ArraySource", "MapStyleSource", "ParquetSource", "columns_from_arrow", "table_from_rows", "write_parquet"]

# ---------------------------------------------------------------- Parquet


@dataclass(frozen=True)
class ParquetSource:
    """The rows of all Parquet files of a folder; a fragment is a row group.

    A fragment's path is the file's path inside the folder, so that a data set keeps its identity when it is moved.

    Attributes:
        folder: holds the files.
        schema: the columns to read; others are left alone.
        pattern: which files, as in `Path.glob`; files are taken in the order of their names, hidden ones are not.
    """

    folder: str
    schema: Schema
    pattern: str = "*.parquet"

    def fragments(self) -> Sequence[Fragment]:
        """List the row groups from the files' footers.

        Raises:
            InputError: with every file that is damaged, of another schema, or has labels outside their classes.
        """
        fragments: list[Fragment] = []
        problems: list[Problem] = []
        files = self._files()
        for file in files:
            found, wrong = inspect_file(file, str(file.relative_to(self.folder)), self.schema)
            fragments += found
            problems += wrong
        if not fragments and not problems:
            found_rows = f"0 rows in {len(files)} files"
            problems.append(Problem(self.folder, found_rows, "at least one row", "Write the data set again."))
        if problems:
            raise InputError(problems)
        return fragments

    def read(self, fragment: Fragment) -> Rows:
        """Read one row group, only the schema's columns, page checksums verified. Arrays are read-only.

        Raises:
            DataError: the file is damaged, gone, or another one than when the fragment was listed.
        """
        path = str(Path(self.folder, fragment.path))
        where = f"{path}, row group {fragment.part}"
        try:
            footer = read_footer(path)
            if footer.identity != fragment.identity:
                raise DataError(f"{where}: the file has changed since the run's manifest was taken. Start a new run.")
            rows = columns_from_arrow(read_group(path, footer, fragment.part, list(self.schema)), self.schema)
        except DAMAGE as error:
            fix = "Restore this file from its source, then resume."
            raise DataError(f"{where}: cannot be read: {error}. {fix}") from error
        if problems := schema_problems(rows, self.schema, where):
            raise DataError("\n".join(map(str, problems)))
        return rows

    def _files(self) -> list[Path]:
        root = Path(self.folder)
        files = sorted(
            path
            for path in root.glob(self.pattern)
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        if not files:
            found = f"no file that matches {self.pattern!r}" if root.is_dir() else "no such folder"
            fix = "Run `raymill data get`, or name the folder of your files in the job's `data:`."
            raise InputError([Problem(self.folder, found, "a folder of Parquet files", fix)])
        return files


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
        rows = _made(self.make)
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
        rows = take(_made(self.make), slice(start, start + fragment.num_rows))
        if digest_rows(rows) != fragment.identity:
            raise DataError(
                f"{self.name}, rows {start} to {start + fragment.num_rows - 1}: other rows than in the run's manifest. "
                "The function that makes them must give the same rows in every process: seed what it draws."
            )
        return rows


@dataclass(frozen=True)
class MapStyleSource:
    """Any dataset with `__len__` and `__getitem__`, made once per process; a fragment is a range of indices.

    Such a dataset has no index of its contents, so a fragment is known by the dataset's type and length alone.

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
        dataset = _made(self.make)
        kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            fix = "Use a map-style dataset; an iterable one has no order that a run could be resumed in."
            raise InputError([Problem(self.name, kind, "a dataset with __len__ and __getitem__", fix)])
        count = len(dataset)
        if count == 0:
            return []
        try:
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
        dataset = _made(self.make)
        items: list[Mapping[str, Any]] = []
        for number in numbers:
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


# ---------------------------------------------------------------- once per process


def _made(make: Callable[[], Any]) -> Any:
    """What `make` returns, kept: equal functions with equal arguments are called once per process."""
    if not isinstance(make, partial):
        return _call(make, (), ())
    # A partial that went through pickle is another object; its parts are equal.
    arguments = (make.args, tuple(sorted(make.keywords.items())))
    try:
        hash(arguments)
    except TypeError as error:
        fix = "Use numbers, strings and tuples, and make the rest inside the function."
        raise InputError([Problem("make", f"arguments {arguments}", "arguments that can be compared", fix)]) from error
    return _call(make.func, *arguments)


@lru_cache(maxsize=8)
def _call(function: Callable[..., Any], args: tuple[Any, ...], keywords: tuple[tuple[str, Hashable], ...]) -> Any:
    return function(*args, **dict(keywords))
