"""Parquet as others write it: one case a type, inferred and read, or refused where something would be lost."""

from __future__ import annotations

import datetime
import decimal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymill.data import arrow_types
from raymill.data.arrow import describe
from raymill.data.bad_rows import read_good_rows
from raymill.data.manifest import take_manifest
from raymill.data.quality.check import check_rows
from raymill.data.quality.statistics import statistics
from raymill.data.sources import ParquetSource
from raymill.errors import DataError, InputError
from raymill.task import Column, Field, Pipeline, Rows

DAY = datetime.date(1970, 1, 11)
NOON = datetime.datetime(1970, 1, 1, 12)
TENSORS = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.float32(), [2, 2]), pa.array([[1, 2, 3, 4], [5, 6, 7, 8]], pa.list_(pa.float32(), 4))
)

COLUMNS: dict[str, tuple[Any, Field, list[Any]]] = {
    **{
        f"{sign}int{width}": (pa.array([1, 2], f"{sign}int{width}"), Field(f"{sign}int{width}"), [1, 2])
        for sign in ("", "u")
        for width in (8, 16, 32, 64)
    },
    "half": (pa.array(np.array([1.5, 2], np.float16)), Field("float16"), [1.5, 2.0]),
    "float": (pa.array([1.5, 2], pa.float32()), Field("float32"), [1.5, 2.0]),
    "double": (pa.array([1.5, float("nan")]), Field("float64"), [1.5, float("nan")]),
    "bool": (pa.array([True, False]), Field("bool"), [True, False]),
    "decimal": (pa.array([decimal.Decimal("0.10"), decimal.Decimal("-12.34")]), Field("float64"), [0.1, -12.34]),
    "decimal256": (pa.array([decimal.Decimal("7.5")] * 2, pa.decimal256(50, 1)), Field("float64"), [7.5, 7.5]),
    "date32": (pa.array([DAY, DAY]), Field("int64"), [10, 10]),
    "date64": (pa.array([DAY, DAY], pa.date64()), Field("int64"), None),
    "time": (pa.array([datetime.time(0, 0, 2)] * 2, pa.time32("ms")), Field("int64"), [2000, 2000]),
    **{
        f"timestamp {unit}": (pa.array([NOON, NOON], pa.timestamp(unit)), Field("int64"), [43200 * factor] * 2)
        for unit, factor in (("ms", 10**3), ("us", 10**6), ("ns", 10**9))
    },
    "timestamp with zone": (pa.array([NOON, NOON], pa.timestamp("us", "Europe/Berlin")), Field("int64"), [43200 * 10**6] * 2),
    "duration": (pa.array([1, 2], pa.duration("s")), Field("int64"), [1, 2]),
    **{str(kind): (pa.array(["a", "ä"], kind), Field("text"), ["a", "ä"]) for kind in (pa.string(), pa.large_string())},
    "string_view": (pa.array(["a", "ä"], pa.string_view()), Field("text"), ["a", "ä"]),
    **{str(kind): (pa.array([b"a", b""], kind), Field("bytes"), [b"a", b""]) for kind in (pa.binary(), pa.large_binary())},
    "fixed_size_binary": (pa.array([b"ab", b"cd"], pa.binary(2)), Field("bytes"), [b"ab", b"cd"]),
    "dictionary of text": (pa.array(["b", "a"]).dictionary_encode(), Field("text"), ["b", "a"]),
    "dictionary of numbers": (pa.array([7, 9], pa.int32()).dictionary_encode(), Field("int32"), [7, 9]),
    "list": (pa.array([[1.0], [2.0, 3.0]]), Field("float64", (None,)), [[1.0], [2.0, 3.0]]),
    "large list": (pa.array([[1], []], pa.large_list(pa.int32())), Field("int32", (None,)), [[1], []]),
    "fixed list": (pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2)), Field("int16", (2,)), [[1, 2], [3, 4]]),
    "list of lists": (pa.array([[[1, 2], [3, 4]], [[5, 6]]]), Field("int64", (None, None)), [[[1, 2], [3, 4]], [[5, 6]]]),
    "tensor": (TENSORS, Field("float32", (2, 2)), [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
}


def written(folder: Path, **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return str(folder)


def values(column: Column) -> list[Any]:
    return [value.tolist() if isinstance(value, np.ndarray | np.generic) else value for value in column]


def read(source: ParquetSource) -> Rows:
    (fragment,) = source.fragments()
    return source.read(fragment)


@pytest.mark.parametrize(("column", "field", "expected"), COLUMNS.values(), ids=COLUMNS)
def test_a_type_is_inferred_and_read(tmp_path: Path, column: Any, field: Field, expected: list[Any] | None) -> None:
    source = ParquetSource.inferred(written(tmp_path / "set", x=column, beside=pa.array([1, 2])), ["x"])
    assert source.schema == {"x": field}
    if expected is not None:
        np.testing.assert_equal(values(read(source)["x"]), expected)


def of_ray(said: bytes | None) -> pa.Field:
    """A column of tensors as Ray Data writes it, and what its file says of their shape."""
    noted = {b"ARROW:extension:name": b"ray.data.arrow_tensor_v2"} | ({b"ARROW:extension:metadata": said} if said else {})
    return pa.field("x", pa.large_list(pa.uint8()), metadata=noted)


@pytest.mark.parametrize(("said", "shape"), [(b"[2, 3]", (2, 3)), (b"[6]", (6,))])
def test_a_tensor_of_ray_data_has_its_shape_also_where_ray_is_not_imported(
    tmp_path: Path, said: bytes, shape: tuple[int, ...]
) -> None:
    column = of_ray(said)
    pq.write_table(pa.table([pa.array([range(6), range(6, 12)], column.type)], pa.schema([column])), tmp_path / "a.parquet")
    source = ParquetSource.inferred(str(tmp_path))
    assert source.schema == {"x": Field("uint8", shape)}
    np.testing.assert_array_equal(read(source)["x"], np.arange(12).reshape(2, *shape))


@pytest.mark.parametrize("said", [b"{}", b"[0, 6]", b"[[[", b'["a"]', None])
def test_a_tensor_of_which_that_is_not_said_is_a_list(said: bytes | None) -> None:
    found, _ = arrow_types.schema_of_columns(pa.schema([of_ray(said)]))
    assert found == {"x": Field("uint8", (None,))}


def test_a_field_inside_a_struct_has_a_dotted_name(tmp_path: Path) -> None:
    pictures = pa.array([{"bytes": b"png", "path": "a.png"}, {"bytes": b"jpg", "path": None}])
    folder = written(tmp_path / "set", image=pictures, label=pa.array([0, 1]))
    assert list(ParquetSource.inferred(folder).schema) == ["image.bytes", "image.path", "label"]
    rows = read(ParquetSource.inferred(folder, ["image.bytes", "label"], label=Field("int64", classes=2)))
    assert (rows["image.bytes"], values(rows["label"])) == ([b"png", b"jpg"], [0, 1])


def test_what_is_asked_for_may_be_of_another_width_and_a_list_of_another_kind(tmp_path: Path) -> None:
    lists, dates = pa.array([[1.0, 2.0, 3.0, 4.0]] * 2), pa.array([5, 6], pa.int32())
    folder = written(tmp_path / "set", x=lists, n=dates, whole=pa.array([1.0, 2.0]), t=pa.array(["a", "b"]))
    schema = {"x": Field("float32", (2, 2)), "n": Field("int64"), "whole": Field("uint8"), "t": Field("bytes")}
    rows = read(ParquetSource(folder, schema))
    assert [rows["x"].dtype.name, rows["x"].shape, rows["n"].dtype.name] == ["float32", (2, 2, 2), "int64"]  # type: ignore[union-attr]
    assert (values(rows["whole"]), rows["t"]) == ([1, 2], [b"a", b"b"])


@pytest.mark.parametrize(
    ("column", "field", "said"),
    [
        (pa.array([1, 300]), Field("uint8"), "row 1: 300, which uint8 cannot hold"),
        (pa.array([1, -1]), Field("uint64"), "row 1: -1, which uint64 cannot hold"),
        (pa.array([1, 2**63], pa.uint64()), Field("int64"), "row 1: 9223372036854775808, which int64 cannot hold"),
        (pa.array([1, 2**62], pa.uint64()), Field("float32"), "which float32 cannot hold"),
        (pa.array([1, 2**53 + 1]), Field("float64"), "row 1: 9007199254740993, which float64 cannot hold"),
        (pa.array([1.0, 0.1]), Field("float32"), "row 1: 0.1, which float32 cannot hold"),
        (pa.array([1.0, 1.5]), Field("int64"), "row 1: 1.5, which int64 cannot hold"),
        (pa.array([1.0, float("nan")]), Field("int64"), "row 1: nan, which int64 cannot hold"),
        (pa.array([1.0, 2.0**63]), Field("int64"), "which int64 cannot hold"),
        (pa.array([1, 2]), Field("bool"), "row 1: 2, which bool cannot hold"),
        (pa.array([decimal.Decimal("0.1234567890123456789")] * 2), Field("float64"), "row 0: 0.1234567890123456789"),
        (pa.array([[1.0, 2.0], [1.0]]), Field("float64", (2,)), "row 1: 1 values, where the first row has 2"),
        (pa.array([[1.0, 2.0]] * 2), Field("float64", (3,)), "2 values, which do not fill the shape (3,)"),
        (pa.array([[[1], [2, 3]]] * 2), Field("int64", (None, None)), "row 0: lists of [1, 2] values, which are no array"),
        (pa.array([[1, None], [2, 3]]), Field("int64", (2,)), "row 0: it is null, or holds a null; 1 in all"),
    ],
    ids=str,
)
def test_what_would_be_lost_is_an_error_that_names_the_row(tmp_path: Path, column: Any, field: Field, said: str) -> None:
    source = ParquetSource(written(tmp_path / "set", x=column), {"x": field})
    with pytest.raises(DataError) as caught:
        read(source)
    assert "a.parquet, row group 0" in str(caught.value)
    assert "column 'x'" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("column", "field", "has"),
    [
        (pa.array(["a"]), Field("int64"), "this column is text"),
        (pa.array([1]), Field("text"), "this column is int64"),
        (pa.array([DAY]), Field("int32"), "this column is int64"),
        (pa.array([[1]]), Field("int64"), "this column is int64 of shape (None,)"),
        (pa.array([{"a": 1}]), Field("int64"), "or write the file again"),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), Field("int64"), "or write the file again"),
    ],
    ids=str,
)
def test_a_type_that_cannot_be_the_field_is_refused_with_what_it_is(tmp_path: Path, column: Any, field: Field, has: str) -> None:
    with pytest.raises(InputError, match="x") as caught:
        ParquetSource(written(tmp_path / "set", x=column), {"x": field}).fragments()
    assert has in caught.value.problems[0].fix


def test_a_column_that_cannot_be_inferred_is_named_and_left_out_where_nobody_asks(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", m=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), x=pa.array([1]))
    assert list(ParquetSource.inferred(folder).schema) == ["x"]
    with pytest.raises(InputError) as caught:
        ParquetSource.inferred(folder, ["m", "y"])
    assert [problem.found.split(",")[0] for problem in caught.value.problems] == ["map<string", "no such column"]


# ---------------------------------------------------------------- nulls

NULLS = {"n": pa.array([1, None, 3, None]), "t": pa.array(["a", "b", None, None]), "x": pa.array([[1.0], [2.0], [3.0], [None]])}


def test_nulls_are_refused_and_the_ways_out_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        ParquetSource.inferred(written(tmp_path / "set", **NULLS), ["n", "t"]).fragments()
    assert [problem.found for problem in caught.value.problems] == ["2 nulls", "2 nulls"]
    assert "fill=0" in caught.value.problems[0].fix
    assert "nulls='bad_rows'" in caught.value.problems[0].fix


def test_a_value_may_stand_for_them(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", **NULLS)
    fields = {"n": Field("int64", fill=-1), "t": Field("text", fill="?")}
    rows = read(ParquetSource.inferred(folder, ["n", "t"], **fields))
    assert (values(rows["n"]), rows["t"]) == ([1, -1, 3, -1], ["a", "b", "?", "?"])
    with pytest.raises(DataError, match=r"fill='none' is no value of a column of int64"):
        read(ParquetSource(folder, {"n": Field("int64", fill="none")}))


def test_rows_that_hold_one_may_be_bad_rows(tmp_path: Path) -> None:
    source = replace(ParquetSource.inferred(written(tmp_path / "set", **NULLS)), nulls="bad_rows")
    pipeline = Pipeline(sources={"train": source}, schema=source.schema)
    (fragment,) = take_manifest(pipeline, lenient=True).splits["train"].fragments
    rows, reasons = read_good_rows(pipeline, "train", fragment, lenient=True)
    assert (values(rows["n"]), rows["t"], values(rows["x"])) == ([1], ["a"], [[1.0]])
    assert reasons == {1: "column 'n' is null, or holds a null", 2: "column 't' is null, or holds a null", 3: reasons[1]}
    with pytest.raises(DataError, match=r"a.parquet, part 0, row 1: column 'n' is null"):
        read_good_rows(pipeline, "train", fragment, lenient=False)


def test_rows_that_hold_one_are_told_by_a_check_of_the_data_and_not_measured(tmp_path: Path) -> None:
    numbers = pa.array([1, None, 3, 100, None])
    source = ParquetSource.inferred(written(tmp_path / "set", n=numbers), nulls="bad_rows")
    pipeline = Pipeline(sources={"train": source}, schema=source.schema)
    manifest = take_manifest(pipeline, lenient=True)
    with pytest.raises(InputError, match="2 bad rows, the first of them row 1: column 'n' is null"):
        check_rows(pipeline, manifest)
    found = statistics(pipeline, manifest, "train")
    about = found["columns"]["n"]
    assert (found["bad_rows"], about["min"], about["max"], about["quantiles"]["0.5"]) == (2, 1, 100, 3.0)


def test_a_field_of_a_struct_that_is_null_is_null(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", s=pa.array([{"a": 1}, None]))
    source = ParquetSource(folder, {"s.a": Field("int64", fill=9)})
    assert values(read(source)["s.a"]) == [1, 9]


def test_what_a_field_is_in_words_is_what_it_was(tmp_path: Path) -> None:
    assert describe(Field("float64", (None,))) == "float64 of shape (None,)"
