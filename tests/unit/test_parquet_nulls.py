"""Parquet files whose rows hold nulls, or whose index lies: named with file, row group, column and row."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuzz import thrift
from fuzz.thrift import COLUMNS, GROUP_ROWS, META, NUM_ROWS, ROW_GROUPS, SCHEMA, SCHEMA_NAME, STATISTICS, Value
from raymill.data.arrow import columns_from_arrow
from raymill.data.sources import parquet
from raymill.data.sources.parquet import MOST_GROUPS_PER_FILE, ParquetSource, write_parquet
from raymill.data.sources.parquet_index import read_index
from raymill.errors import DataError, InputError
from raymill.task import Field, Schema

RAGGED = pa.struct([("data", pa.list_(pa.int64())), ("shape", pa.list_(pa.int32()))])
LISTS: Schema = {"x": Field("int64", (None,))}
GOOD = {"data": [5], "shape": [1]}

# ---------------------------------------------------------------- nulls


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"data": [1, None, 3], "shape": [3]}, "a null in its data; 1 in all"),
        ({"data": None, "shape": [0]}, "its data is null; 1 in all"),
        ({"data": [1], "shape": None}, "its shape is null; 1 in all"),
        ({"data": [], "shape": [None]}, "a null in its shape; 1 in all"),
        ({"data": [1, 2], "shape": [-1]}, "2 numbers do not fill the shape [-1]"),
        ({"data": [1, 2], "shape": [-1, -2]}, "2 numbers do not fill the shape [-1, -2]"),
        ({"data": [1, 2], "shape": [3]}, "2 numbers do not fill the shape [3]"),
        ({"data": [1, 2], "shape": []}, "2 numbers do not fill the shape []"),
        (None, "null; 1 in all"),
    ],
)
def test_a_null_inside_or_a_shape_that_does_not_fit_is_named(row: Any, said: str, tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([GOOD, GOOD, GOOD, row], RAGGED)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = ParquetSource(str(tmp_path), LISTS)
    first, second = source.fragments()
    assert [value.tolist() for value in source.read(first)["x"]] == [[5], [5]]
    where = f"{tmp_path}/a.parquet, row group 1: cannot be read: column 'x': row 1: {said}"
    with pytest.raises(DataError, match=re.escape(where)):
        source.read(second)


def test_nulls_of_other_rows_of_a_slice_are_not_its_own() -> None:
    table = pa.table({"x": pa.array([{"data": [None], "shape": [1]}, GOOD, GOOD, {"data": None, "shape": [None]}], RAGGED)})
    (one, other) = columns_from_arrow(table.slice(1, 2), LISTS)["x"]
    assert (one.tolist(), other.tolist()) == ([5], [5])
    with pytest.raises(ValueError, match=r"column 'x': row 2: (a null in its data|its data is null)"):
        columns_from_arrow(table.slice(1, 3), LISTS)


def test_nulls_of_plain_columns_are_named_by_row() -> None:
    table = pa.table({"n": pa.array([1, None, None])})
    with pytest.raises(ValueError, match="column 'n': row 1: null; 2 in all"):
        columns_from_arrow(table, {"n": Field("int64")})


# ---------------------------------------------------------------- an index that lies

PLAIN: Schema = {"x": Field("float32", (2,)), "y": Field("int64", classes=10)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two row groups of five rows."""
    rows = {"x": np.ones((10, 2), np.float32), "y": np.arange(10)}
    write_parquet(tmp_path / "set", rows, PLAIN, num_shards=1, row_group_rows=5)
    return tmp_path / "set" / "part-00000.parquet"


def lie(file: Path, change: Callable[[Value], None]) -> ParquetSource:
    pages, footer = thrift.read_footer(file)
    change(footer)
    thrift.write_footer(file, pages, footer)
    return ParquetSource(str(file.parent), PLAIN)


def refused(source: ParquetSource) -> str:
    with pytest.raises(InputError) as caught:
        source.fragments()
    return str(caught.value)


def at(*path: int, value: Any) -> Callable[[Value], None]:
    def change(footer: Value) -> None:
        *above, last = path
        for step in above:
            footer = footer[step]
        footer[last].value = value

    return change


COLUMN = (ROW_GROUPS, 0, COLUMNS, 1, META)


def test_an_index_written_again_as_it_was_is_read(file: Path) -> None:
    source = lie(file, lambda footer: None)
    assert [source.read(fragment)["y"].tolist() for fragment in source.fragments()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("number", [2**40, -5, 2**31, 2**63 - 1, 7, 3, 0])
@pytest.mark.parametrize("path", [(ROW_GROUPS, 0, GROUP_ROWS), (*COLUMN, thrift.NUM_VALUES), (NUM_ROWS,)], ids=str)
def test_a_number_of_rows_that_cannot_be_is_refused_when_listed(path: tuple[int, ...], number: int, file: Path) -> None:
    assert "expected an index that fits the file" in refused(lie(file, at(*path, value=number)))


@pytest.mark.parametrize("number", [2**40, -5, 2**31, 2**63 - 1])
def test_a_size_beyond_the_file_is_refused_when_listed(number: int, file: Path) -> None:
    said = refused(lie(file, at(*COLUMN, thrift.COMPRESSED_BYTES, value=number)))
    assert f"row group 0, column 1: {number} bytes in a file of" in said


@pytest.mark.parametrize("number", [2**40, -5, 2**31, 2**63 - 1, 0])
@pytest.mark.parametrize("place", [thrift.UNCOMPRESSED_BYTES, thrift.DATA_PAGE_OFFSET, thrift.COMPRESSED_BYTES])
def test_other_numbers_that_lie_give_the_rows_that_were_written_or_none(place: int, number: int, file: Path) -> None:
    source = lie(file, at(*COLUMN, place, value=number))
    try:
        found = source.read(source.fragments()[0])["y"].tolist()
    except (InputError, DataError):
        return
    assert found == [0, 1, 2, 3, 4]


def test_rows_that_a_consistent_lie_promises_are_missed_when_they_are_read(file: Path) -> None:
    def change(footer: Value) -> None:
        footer[NUM_ROWS].value = 2**22 + 5
        footer[ROW_GROUPS][0][GROUP_ROWS].value = 2**22
        for column in (0, 1):
            footer[ROW_GROUPS][0][COLUMNS][column][META][thrift.NUM_VALUES].value = 2**22

    source = lie(file, change)
    with pytest.raises(DataError, match=r"row group 0: 5 rows were read where the file's index says 4194304"):
        source.read(source.fragments()[0])


def limits(low: bytes, high: bytes) -> Callable[[Value], None]:
    def change(footer: Value) -> None:
        found = footer[ROW_GROUPS][0][COLUMNS][1][META][STATISTICS]
        found[thrift.STATISTICS_MIN].value, found[thrift.STATISTICS_MAX].value = low, high

    return change


def test_labels_that_the_statistics_hide_are_found_when_they_are_read(tmp_path: Path) -> None:
    labels = pa.table({"y": pa.array([0, 1, 77])})
    pq.write_table(labels, tmp_path / "a.parquet")
    schema = {"y": Field("int64", classes=10)}
    pages, footer = thrift.read_footer(tmp_path / "a.parquet")
    found = footer[ROW_GROUPS][0][COLUMNS][0][META][STATISTICS]
    for name in (thrift.STATISTICS_MAX, 1):
        if name in found.value:
            found[name].value = (1).to_bytes(8, "little")
    thrift.write_footer(tmp_path / "a.parquet", pages, footer)
    source = ParquetSource(str(tmp_path), schema)
    with pytest.raises(DataError, match=r"column 'y': found values from 0 to 77; expected int64 in 0\.\.9"):
        source.read(source.fragments()[0])


# Arrow 25 calls std::terminate where it is asked for statistics that are too short. The column is read instead.
@pytest.mark.parametrize("encoded", [b"", b"\1", bytes(7)])
def test_statistics_that_are_too_short_do_not_end_the_process(encoded: bytes, file: Path) -> None:
    assert "row group 0: column 'y'" in refused(lie(file, limits(encoded, encoded)))


@pytest.mark.parametrize("encoded", [bytes(9), bytes(1000)])
def test_statistics_that_are_too_long_are_none(encoded: bytes, file: Path) -> None:
    source = lie(file, limits(encoded, encoded))
    assert source.read(source.fragments()[0])["y"].tolist() == [0, 1, 2, 3, 4]


def test_statistics_are_those_that_arrow_reads(file: Path, tmp_path: Path) -> None:
    values = {
        "i": pa.array([3, None, -70_000], pa.int32()),
        "u": pa.array([1, 2**64 - 1, None], pa.uint64()),
        "b": pa.array([True, False, None]),
        "f": pa.array([1.5, 2.5, None]),
        "t": pa.array(["a", None, None]),
    }
    pq.write_table(pa.table(values), tmp_path / "a.parquet", row_group_size=2)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    index = (tmp_path / "a.parquet").read_bytes()[-8 - metadata.serialized_size : -8]
    found = read_index(index)
    for part in range(metadata.num_row_groups):
        for column, name in enumerate(values):
            theirs, ours = metadata.row_group(part).column(column).statistics, found[part][column]
            assert ours.num_nulls == theirs.null_count
            assert ours.num_values == metadata.row_group(part).column(column).num_values
            assert ours.compressed_bytes == metadata.row_group(part).column(column).total_compressed_size
            number = ours.limits(signed=name == "i")
            assert number == ((theirs.min, theirs.max) if name in "iub" and theirs.has_min_max else None)
    for size in range(len(index)):
        with pytest.raises(ValueError, match="its index"):
            read_index(index[:size])


def test_a_histogram_of_another_length_does_not_end_the_process(tmp_path: Path) -> None:
    # Arrow 25 calls std::terminate where it is asked for such a column.
    write_parquet(tmp_path / "set", {"x": [np.arange(3)] * 2}, LISTS, num_shards=1, row_group_rows=2)
    path = tmp_path / "set" / "part-00000.parquet"
    pages, footer = thrift.read_footer(path)
    histogram = footer[ROW_GROUPS][0][COLUMNS][0][META][thrift.SIZE_STATISTICS][thrift.DEFINITION_HISTOGRAM]
    histogram.value[1].append(histogram[0])
    thrift.write_footer(path, pages, footer)
    source = ParquetSource(str(path.parent), LISTS)
    with pytest.raises(DataError, match="Definition level histogram"):
        source.read(source.fragments()[0])


def test_more_row_groups_than_can_be_read_are_refused(file: Path) -> None:
    def change(footer: Value) -> None:
        one = copy.deepcopy(footer[ROW_GROUPS][0])
        one[COLUMNS].value[1] = []
        footer[ROW_GROUPS].value[1] = [one] * (MOST_GROUPS_PER_FILE + 1)

    assert f"{MOST_GROUPS_PER_FILE + 1} row groups" in refused(lie(file, change))


def test_row_groups_without_their_columns_are_refused(file: Path) -> None:
    def change(footer: Value) -> None:
        footer[ROW_GROUPS][1][COLUMNS].value[1] = []

    assert "row group 1 of 0 columns where the file has 2" in refused(lie(file, change))


@pytest.mark.parametrize(
    ("name", "said"), [(b"y\0", r"Did you mean 'y\x00'"), (b"x", "2 columns of this name"), (b"\xff", "utf-8")]
)
def test_a_column_name_with_a_nul_or_twice_or_no_text_is_a_problem(name: bytes, said: str, file: Path) -> None:
    assert said in refused(lie(file, at(SCHEMA, 2, SCHEMA_NAME, value=name)))


def test_a_column_inside_another_has_a_dotted_name_and_its_labels_are_looked_at(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([{"b": 1}, {"b": 3}])}), tmp_path / "a.parquet")
    source = ParquetSource(str(tmp_path), {"a.b": Field("int64", classes=4)})
    assert source.read(source.fragments()[0])["a.b"].tolist() == [1, 3]
    assert "labels from 1 to 3" in refused(ParquetSource(str(tmp_path), {"a.b": Field("int64", classes=3)}))
    assert "column 'a.c': found no such column" in refused(ParquetSource(str(tmp_path), {"a.c": Field("int64")}))


@pytest.mark.parametrize("size_bytes", [2**30, 2**32 - 1, 0])
def test_an_index_of_a_size_beyond_the_file_is_refused(size_bytes: int, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-8:-4] = size_bytes.to_bytes(4, "little")
    file.write_bytes(content)
    assert "expected a whole Parquet file" in refused(ParquetSource(str(file.parent), PLAIN))


def test_a_column_whose_values_hold_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column 'a': found bool of shape \(0,\); expected extents of at least 1"):
        write_parquet(tmp_path / "set", {"a": np.zeros((1, 0), bool)}, {"a": Field("bool", (0,))}, num_shards=1, row_group_rows=1)


def test_a_file_that_is_read_group_by_group_has_its_index_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetSource(str(file.parent), PLAIN)
    fragments = source.fragments()
    assert len(fragments) > 1
    calls = []
    monkeypatch.setattr(parquet, "read_index", lambda index: calls.append(len(index)) or read_index(index))
    for fragment in fragments:
        source.read(fragment)
    assert len(calls) == 1


def test_data_files_may_be_links(file: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    os.symlink(file, tmp_path / "links" / "a.parquet")
    assert len(ParquetSource(str(tmp_path / "links"), PLAIN).fragments()) == 2
