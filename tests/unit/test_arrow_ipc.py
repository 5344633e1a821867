"""Arrow's own files: each row once, as others wrote them; what is damaged, hostile or changed is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from raymill.data.sources import ArrowSource, arrow_ipc
from raymill.errors import DataError, InputError, RaymillError
from raymill.task import Field

TABLE = pa.table(
    {
        "number": pa.array(range(100), pa.int32()),
        "text": [f"row {number}" for number in range(100)],
        "at": pa.array([{"x": number / 2, "y": number} for number in range(100)]),
        "list": pa.array([[number] * (number % 3) for number in range(100)], pa.list_(pa.float32())),
    }
)


def stream(path: Path, table: pa.Table = TABLE, rows: int = 10) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def file(path: Path, table: pa.Table = TABLE, rows: int = 10) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def packed(path: Path, table: pa.Table = TABLE) -> None:
    feather.write_feather(table, path, compression="zstd", chunksize=10)


WRITERS: dict[str, Callable[..., None]] = {"stream": stream, "file": file, "feather": packed}


def column(source: ArrowSource, name: str) -> list[Any]:
    found: list[Any] = []
    for fragment in source.fragments():
        rows = pickle.loads(pickle.dumps(source)).read(fragment)
        assert {len(values) for values in rows.values()} == {fragment.num_rows}
        found += [value.tolist() if isinstance(value, np.ndarray | np.generic) else value for value in rows[name]]
    return found


@pytest.mark.parametrize("most_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("kind", WRITERS)
def test_each_row_once_in_pieces_of_any_size(kind: str, most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_ipc, "MOST_BYTES", most_bytes)
    arrow_ipc._listed.cache_clear()
    WRITERS[kind](tmp_path / "a.arrow")
    WRITERS[kind](tmp_path / "b.arrow", TABLE.slice(0, 5))
    source = ArrowSource.inferred(str(tmp_path))
    assert list(source.schema) == ["number", "text", "at.x", "at.y", "list"]
    assert len(source.fragments()) == {1: 11, 3000: len(source.fragments()), 10**9: 2}[most_bytes]
    assert column(source, "number") == [*range(100), *range(5)]
    assert column(source, "text") == TABLE["text"].to_pylist() + TABLE["text"].to_pylist()[:5]
    assert column(source, "at.y") == [*range(100), *range(5)]
    assert column(source, "list")[:5] == [[], [1.0], [2.0, 2.0], [], [4.0]]


def test_what_hugging_face_saved_has_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["no", "yes", "both"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = {"text": [f"t{n}" for n in range(50)], "label": [n % 2 for n in range(50)]}
    made = datasets.Dataset.from_dict(rows, features=features)
    both = datasets.DatasetDict({"train": made, "test": made.select(range(7))})
    both.save_to_disk(tmp_path / "set", num_shards={"train": 3, "test": 1})
    source = ArrowSource.inferred(str(tmp_path / "set" / "train"))
    assert source.schema == {"text": Field("text"), "label": Field("int64", classes=3)}
    assert column(source, "text") == [f"t{n}" for n in range(50)]
    assert column(ArrowSource.inferred(str(tmp_path / "set" / "test")), "label") == [0, 1, 0, 1, 0, 1, 0]


def test_dictionaries_that_change_on_the_way_are_read(tmp_path: Path) -> None:
    batches = [pa.record_batch({"word": pa.array(words).dictionary_encode()}) for words in (["a", "b"], ["c", "a"], ["d"])]
    with pa.ipc.new_stream(tmp_path / "a.arrow", batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    assert column(ArrowSource.inferred(str(tmp_path)), "word") == ["a", "b", "c", "a", "d"]


def test_nulls_are_refused_filled_or_bad(tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow", pa.table({"number": [1, None, 3]}))
    source = ArrowSource(str(tmp_path), {"number": Field("int64")})
    with pytest.raises(DataError, match=r"null.*fill=0"):
        column(source, "number")
    assert column(ArrowSource(str(tmp_path), {"number": Field("int64", fill=7)}), "number") == [1, 7, 3]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "whole Arrow file"),
        (lambda data: data[:100], "whole Arrow file"),
        (lambda data: data[: len(data) // 2], "whole Arrow file"),
        (lambda data: b"no Arrow at all" * 20, "whole Arrow file"),
        # The first message claims 2 GiB of metadata.
        (lambda data: b"\xff\xff\xff\xff" + (2**31 - 1).to_bytes(4, "little") + data[8:], "whole Arrow file"),
    ],
)
def test_damage_is_named_when_the_files_are_listed(damage: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    stream(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=said) as caught:
        ArrowSource(str(tmp_path), {"number": Field("int32")}).fragments()
    assert str(path) in str(caught.value)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow")
    source = ArrowSource.inferred(str(tmp_path))
    fragments = source.fragments()
    stream(tmp_path / "a.arrow", TABLE.set_column(0, "number", pa.array([7] * 100, pa.int32())))
    with pytest.raises(DataError, match="has changed since"):
        source.read(fragments[0])
    (tmp_path / "a.arrow").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.read(fragments[0])


def test_columns_that_are_not_there_or_of_another_type_are_all_named(tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow")
    schema = {"numbr": Field("int64"), "text": Field("float32"), "number": Field("int32")}
    with pytest.raises(InputError) as caught:
        ArrowSource(str(tmp_path), schema).fragments()
    assert "number" in str(caught.value)
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match="no such column"):
        ArrowSource.inferred(str(tmp_path), ["nobody"])


@pytest.mark.parametrize("kind", WRITERS)
def test_changed_bytes_are_refused_or_read_and_never_end_the_process(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    WRITERS[kind](path)
    whole = path.read_bytes()
    generator = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), generator.integers(1, 4)):
            data[place] = generator.integers(256)
        path.write_bytes(data)
        try:
            column(ArrowSource(str(tmp_path), {"number": Field("int32"), "text": Field("text")}), "text")
        except RaymillError:
            refused += 1
    assert refused
