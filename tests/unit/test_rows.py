"""Rows come out of a packet as they went in, whatever they hold, and what cannot travel is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raymill.data.rows import join, num_rows, pack, take, unpack
from raymill.task import Column, Rows
from raymill.training.batch import default_collate

dtypes = st.sampled_from(["bool", "uint8", "int16", "int64", "float16", "float32", ">f4", "float64", "complex64"])
extents = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)


def column(count: int) -> st.SearchStrategy[Column]:
    array = st.tuples(dtypes, extents).flatmap(lambda made: hnp.arrays(made[0], (count, *made[1])))
    arrays = dtypes.flatmap(
        lambda dtype: st.lists(extents.flatmap(lambda shape: hnp.arrays(dtype, shape)), min_size=count, max_size=count)
    )
    texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=count, max_size=count)
    return st.one_of(array, arrays, texts, st.lists(st.binary(max_size=5), min_size=count, max_size=count))


def rows_of(count: int) -> st.SearchStrategy[Rows]:
    return st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), column(count), min_size=1, max_size=4)


some_rows = st.integers(0, 5).flatmap(rows_of)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@given(rows=some_rows)
def test_what_is_packed_comes_back(rows: Rows) -> None:
    header, buffers = pack(rows)
    found = unpack(header, [bytes(buffer) for buffer in buffers])
    assert list(found) == list(rows)
    for name in rows:
        assert_same(found[name], rows[name])


def test_no_columns_and_no_rows_come_back() -> None:
    assert unpack(*pack({})) == {}
    found = unpack(*pack({"list": [], "array": np.zeros((0, 3), np.int16)}))
    assert found["list"] == []
    assert np.shape(found["array"]) == (0, 3)


def test_unpacked_arrays_are_views_that_cannot_be_written_to() -> None:
    header, buffers = pack({"image": np.arange(6).reshape(2, 3)})
    image = unpack(header, buffers)["image"]
    assert isinstance(image, np.ndarray)
    assert np.shares_memory(image, np.frombuffer(buffers[0], np.uint8))
    assert not image.flags.writeable


@given(rows=some_rows, data=st.data())
def test_taking_and_joining_are_the_same_for_every_kind_of_column(rows: Rows, data: st.DataObject) -> None:
    count = num_rows(rows)
    place = data.draw(st.integers(0, count))
    parts = [take(rows, slice(0, place)), take(rows, np.arange(place, count))]
    joined = join(parts)
    for name in rows:
        assert len(joined[name]) == count
        for found, expected in zip(joined[name], rows[name], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_rows_of_other_columns_or_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="columns differ in length"):
        num_rows({"a": [b""], "b": np.zeros(2)})
    with pytest.raises(ValueError, match=r"parts differ in their columns: \[\['a'\], \['b'\]\]"):
        join([{"a": np.zeros(1)}, {"b": np.zeros(1)}])


def test_images_of_different_sizes_join_to_a_list() -> None:
    joined = join([{"image": np.zeros((2, 4, 4))}, {"image": np.ones((1, 8, 8))}])["image"]
    assert isinstance(joined, list)
    assert [image.shape for image in joined] == [(4, 4), (4, 4), (8, 8)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], r"'bad': a list of \['int'\]"),
        ([b"", "text"], r"'bad': a list of \['bytes', 'str'\]"),
        ([{"a": 1}], r"'bad': a list of \['dict'\]"),
        ([np.zeros(1, np.int8), np.zeros(1, np.int16)], "'bad': arrays of different types"),
        (np.array([None, {}]), "'bad': an array of object"),
        (np.array(["text"]), "'bad': an array of <U4"),
        (np.array(["2020-01-01"], "datetime64[D]"), "'bad': an array of datetime64"),
    ],
)
def test_what_cannot_travel_is_named(values: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pack({"good": np.zeros(2), "bad": values})


def test_a_batch_has_a_tensor_where_an_array_was_and_may_be_written_to() -> None:
    rows: Rows = {"image": np.ones((2, 3), np.float32), "boxes": [np.ones((1, 4)), np.ones((2, 4))], "name": ["a", "b"]}
    header, buffers = pack(rows)
    batch = default_collate(unpack(header, buffers))
    batch["image"] += 1
    batch["boxes"][1] += 1
    assert batch["image"].tolist() == [[2.0] * 3] * 2
    assert [tuple(boxes.shape) for boxes in batch["boxes"]] == [(1, 4), (2, 4)]
    assert batch["name"] == ["a", "b"]
    assert unpack(header, buffers)["boxes"][1].max() == 1
