"""Rows held against a schema, and there and back through Arrow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raymill.data.arrow import columns_from_arrow, digest_rows, rows_bytes, table_from_rows
from raymill.errors import InputError
from raymill.task import Column, Field, Rows, Schema

SCHEMA: Schema = {"image": Field("uint8", (4, 5)), "label": Field("int64", classes=10)}


def assert_same_column(found: Column, expected: Column) -> None:
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(one, np.ndarray | np.generic):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


def assert_same_rows(found: Rows, expected: Rows) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert_same_column(found[name], expected[name])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_any_array_column_survives_arrow_also_sliced(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["uint8", "int8", "int32", "int64", "uint16", "float16", "float64", "bool"]))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    num_rows = data.draw(st.integers(0, 9))
    column = data.draw(hnp.arrays(dtype, (num_rows, *shape)))
    schema = {"x": Field(dtype, shape)}
    table = table_from_rows({"x": column}, schema)
    table.validate(full=True)
    start = data.draw(st.integers(0, num_rows))
    assert_same_rows(columns_from_arrow(table.slice(start), schema), {"x": column[start:]})


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_any_ragged_bytes_and_text_column_survives_arrow_also_sliced(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["uint8", "float32", "bool"]))
    ragged = data.draw(st.lists(hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=4))))
    texts = [data.draw(st.text(max_size=5)) for _ in ragged]
    rows: Rows = {"r": ragged, "t": list(texts), "b": [text.encode() for text in texts]}
    schema = {"r": Field(dtype, (None, None)), "t": Field("text"), "b": Field("bytes")}
    table = table_from_rows(rows, schema)
    table.validate(full=True)
    start = data.draw(st.integers(0, len(ragged)))
    found = columns_from_arrow(table.slice(start), schema)
    assert_same_rows(found, {name: column[start:] for name, column in rows.items()})


def test_a_fixed_shape_is_read_from_arrow_without_a_copy() -> None:
    table = table_from_rows({"image": np.ones((3, 4, 5), np.uint8), "label": np.arange(3)}, SCHEMA)
    images = columns_from_arrow(table, SCHEMA)["image"]
    assert isinstance(images, np.ndarray)
    assert images.ctypes.data == table.column("image").chunk(0).buffers()[1].address


def test_rows_that_do_not_fit_the_schema_are_refused_with_every_reason() -> None:
    rows: Rows = {"image": np.zeros((3, 4, 6), np.uint8), "lable": np.zeros(3, np.int64)}
    with pytest.raises(InputError) as caught:
        table_from_rows(rows, SCHEMA)
    shape, missing = caught.value.problems
    assert "(4, 6)" in shape.found
    assert "(4, 5)" in shape.expected
    assert "Did you mean 'lable'?" in missing.fix


@pytest.mark.parametrize(
    ("field", "column", "found"),
    [
        (Field("int64"), np.zeros(2, np.int32), "int32"),
        (Field("int64", classes=3), np.array([0, 3]), "values from 0 to 3"),
        (Field("text"), ["a", b"b"], "a bytes"),
        (Field("bytes"), ["a", "b"], "a str"),
        (Field("float32", (2,)), [np.zeros(2, np.float32), np.zeros(3, np.float32)], "a list of ndarray"),
        (Field("float32", (None, 2)), [np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32)], "(1, 3)"),
        (Field("float32", (None,)), [np.zeros(1, np.float32), [1.0]], "a list"),
        (Field("float32"), np.zeros(5, np.float32), "5 rows"),
    ],
)
def test_a_column_of_another_kind_is_refused(field: Field, column: Column, found: str) -> None:
    with pytest.raises(InputError) as caught:
        table_from_rows({"first": np.zeros(2), "x": column}, {"x": field})
    (problem,) = caught.value.problems
    assert found in problem.found


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.array([1, 3]), "t": ["ab", "c"]},
        {"x": np.array([1, 2], np.int32), "t": ["ab", "c"]},
        {"x": np.array([[1, 2]]), "t": ["ab", "c"]},
        {"y": np.array([1, 2]), "t": ["ab", "c"]},
        {"x": np.array([1, 2]), "t": ["a", "bc"]},
        {"x": np.array([1, 2]), "t": [b"ab", b"c"]},
    ],
)
def test_the_digest_follows_names_types_shapes_values_and_their_borders(other: Rows) -> None:
    rows: Rows = {"x": np.array([1, 2]), "t": ["ab", "c"]}
    assert digest_rows(dict(reversed(rows.items()))) == digest_rows(rows)
    assert digest_rows(other) != digest_rows(rows)


def test_bytes_are_counted_over_arrays_lists_and_encoded_text() -> None:
    ragged = [np.zeros(1, np.int16), np.zeros((2, 2), np.int16)]
    rows: Rows = {"x": np.zeros((2, 3), np.float32), "r": ragged, "t": ["\u00fc", ""]}
    assert rows_bytes(rows) == 24 + 2 + 8 + 2
