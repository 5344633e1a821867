"""Valid things, and what a damaged disk or somebody unkind makes of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raymill.task import Field, Rows, Schema

NUMBER_TYPES = ["bool", "int8", "int64", "uint8", "uint16", "uint64", "float16", "float32", "float64"]

numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.0, -0.0, True, False])
)
strange_texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "9", "..", "../x", "a/b", "\0", "\ud800", "step-00000001.1", "O", "<i4"])
)
leaves = st.one_of(st.none(), numbers, strange_texts)
json_values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strange_texts, inner, max_size=3), max_leaves=6
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places_in(one, (*path, key)))]


@st.composite
def mutated_json(draw: st.DrawFn, valid: Any) -> Any:
    """JSON values of which one or two were replaced, removed or doubled."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places_in(value)))
        if not path:
            return draw(json_values)
        above = value
        for key in path[:-1]:
            above = above[key]
        what = draw(st.sampled_from(["replace", "remove", "double"]))
        if what == "replace":
            above[path[-1]] = draw(json_values)
        elif what == "remove":
            del above[path[-1]]
        elif isinstance(above, list):
            above.append(copy.deepcopy(above[path[-1]]))
        else:
            above[draw(strange_texts)] = copy.deepcopy(above[path[-1]])
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, valid: bytes, tokens: tuple[bytes, ...] = (b"\0", b"\xff", b"\n", b"[" * 2000, b"{")) -> bytes:
    """Bytes of which some were flipped, cut out, doubled or put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        what = draw(st.sampled_from(["flip", "cut", "put", "double", "end"]))
        if what == "flip" and start < len(content):
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del content[start:stop]
        elif what == "put":
            content[start:start] = draw(st.one_of(st.sampled_from(tokens), st.binary(max_size=6)))
        elif what == "double":
            content[start:start] = content[start:stop]
        elif what == "end":
            del content[start:]
    return bytes(content)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """One to four columns of any kind."""
    extents = st.lists(st.one_of(st.none(), st.integers(1, 3)), max_size=3).map(tuple)
    arrays = st.builds(Field, st.sampled_from(NUMBER_TYPES), extents)
    labels = st.builds(Field, st.sampled_from(["int64", "uint8", "int32"]), st.just(()), st.just(5))
    fields = st.one_of(arrays, labels, st.sampled_from([Field("bytes"), Field("text")]))
    return draw(st.dictionaries(st.text("abc.\u00e4", min_size=1, max_size=3), fields, min_size=1, max_size=4))


@st.composite
def rows_of(draw: st.DrawFn, schema: Schema, num_rows: int) -> Rows:
    """Rows that fit a schema."""
    rows: Rows = {}
    for name, field in schema.items():
        if field.dtype in ("bytes", "text"):
            values = st.binary(max_size=5) if field.dtype == "bytes" else st.text(st.characters(codec="utf-8"), max_size=5)
            rows[name] = draw(st.lists(values, min_size=num_rows, max_size=num_rows))
            continue
        elements = st.integers(0, field.classes - 1) if field.classes else None
        dtype = np.dtype(field.dtype)
        if None not in field.shape:
            rows[name] = draw(hnp.arrays(dtype, (num_rows, *field.shape), elements=elements))
        else:
            shapes = [tuple(draw(st.integers(0, 3)) if one is None else one for one in field.shape) for _ in range(num_rows)]
            rows[name] = [draw(hnp.arrays(dtype, shape)) for shape in shapes]
    return rows
