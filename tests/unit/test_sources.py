"""Sources: what is written comes back, and every kind of bad input is named before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymill.data.arrow import table_from_rows
from raymill.data.sources import ArraySource, MapStyleSource, ParquetSource, write_parquet
from raymill.errors import DataError, InputError
from raymill.task import Column, Field, Rows, Schema, Source

SCHEMA: Schema = {"image": Field("uint8", (4, 5)), "label": Field("int64", classes=10)}
EVERY_KIND: Schema = {
    "number": Field("float32"),
    "flag": Field("bool"),
    "image": Field("uint8", (4, 5)),
    "half": Field("float16", (3,)),
    "crop": Field("int16", (None, None, 3)),
    "mask": Field("bool", (None,)),
    "raw": Field("bytes"),
    "text": Field("text"),
}


def digits(num_rows: int = 40, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_rows, 4, 5), dtype=np.uint8)
    return {"image": images, "label": np.arange(num_rows, dtype=np.int64) % 10}


def every_kind(num_rows: int) -> Rows:
    generator = np.random.default_rng(1)
    return {
        "number": generator.normal(size=num_rows).astype(np.float32),
        "flag": generator.integers(0, 2, num_rows).astype(bool),
        "image": generator.integers(0, 256, (num_rows, 4, 5), dtype=np.uint8),
        "half": generator.normal(size=(num_rows, 3)).astype(np.float16),
        "crop": [generator.integers(-9, 9, (i % 4, i % 3 + 1, 3)).astype(np.int16) for i in range(num_rows)],
        "mask": [generator.integers(0, 2, i % 11).astype(bool) for i in range(num_rows)],
        "raw": [bytes(range(i % 7)) for i in range(num_rows)],
        "text": [["", "z\u00fcrich", "\u65e5\u672c"][i % 3] for i in range(num_rows)],
    }


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


def write(folder: Path, rows: Rows | None = None, schema: Schema = SCHEMA) -> ParquetSource:
    """4 files of 2 row groups of 5 rows."""
    write_parquet(folder, digits() if rows is None else rows, schema, num_shards=4, row_group_rows=5)
    return ParquetSource(str(folder), schema)


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    pq.write_table(change(pq.read_table(file)), file, row_group_size=5, **options)


def problems_of(source: Source) -> list[str]:
    with pytest.raises(InputError) as caught:
        source.fragments()
    return [str(problem) for problem in caught.value.problems]


# ---------------------------------------------------------------- round trips


def test_every_kind_of_column_comes_back_from_files_in_order(tmp_path: Path) -> None:
    rows = every_kind(23)
    write_parquet(tmp_path / "set", rows, EVERY_KIND, num_shards=3, row_group_rows=4)
    source = ParquetSource(str(tmp_path / "set"), EVERY_KIND)
    start = 0
    for fragment in source.fragments():
        stop = start + fragment.num_rows
        assert_same_rows(source.read(fragment), {name: column[start:stop] for name, column in rows.items()})
        start = stop
    assert start == 23


# ---------------------------------------------------------------- Parquet: what is listed


def test_fragments_are_the_row_groups_in_file_order_with_their_rows(tmp_path: Path) -> None:
    fragments = write(tmp_path / "set").fragments()
    assert [(f.path, f.part, f.num_rows) for f in fragments] == [
        (f"part-{shard:05d}.parquet", part, 5) for shard in range(4) for part in range(2)
    ]
    size_bytes = sum(file.stat().st_size for file in (tmp_path / "set").iterdir())
    assert 0 < sum(f.num_bytes for f in fragments) < size_bytes


def test_only_the_schemas_columns_are_read_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    labels = ParquetSource(source.folder, {"label": SCHEMA["label"]})
    assert sum(f.num_bytes for f in labels.fragments()) < sum(f.num_bytes for f in source.fragments())
    assert list(labels.read(labels.fragments()[0])) == ["label"]


def test_the_identity_stays_when_the_folder_moves_and_changes_with_the_content(tmp_path: Path) -> None:
    before = write(tmp_path / "set").fragments()
    (tmp_path / "set").rename(tmp_path / "moved")
    assert ParquetSource(str(tmp_path / "moved"), SCHEMA).fragments() == before
    other_images = write(tmp_path / "other", digits(seed=1)).fragments()
    assert {f.identity for f in other_images}.isdisjoint({f.identity for f in before})


def test_the_footer_holds_label_statistics_and_no_image_statistics(tmp_path: Path) -> None:
    write(tmp_path / "set")
    group = pq.ParquetFile(tmp_path / "set" / "part-00000.parquet").metadata.row_group(0)
    assert group.column(0).statistics is None
    assert (group.column(1).statistics.min, group.column(1).statistics.max) == (0, 4)


def test_hidden_files_are_not_data(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    (tmp_path / "set" / ".part-9.parquet").write_bytes(b"half")
    assert len(source.fragments()) == 8


# ---------------------------------------------------------------- Parquet: what is wrong


def test_every_bad_file_is_reported_at_once_and_by_name(tmp_path: Path) -> None:
    rows = digits(80)
    write_parquet(tmp_path / "set", rows, SCHEMA, num_shards=8, row_group_rows=5)
    files = sorted((tmp_path / "set").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-300])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"not parquet at all")
    rewrite(files[3], lambda t: t.rename_columns(["image", "lable"]))
    rewrite(files[4], lambda t: t.set_column(1, "label", t["label"].cast(pa.string())))
    rewrite(files[5], lambda t: t.set_column(1, "label", pa.chunked_array([pa.array([0, 10] * 5)])))
    rewrite(files[6], lambda t: t.set_column(1, "label", pa.chunked_array([pa.array([0, None] * 5)])))
    found = problems_of(ParquetSource(str(tmp_path / "set"), SCHEMA))
    assert len(found) == 7
    for file, problem in zip(files, found, strict=False):
        assert str(file) in problem
    assert "0 bytes" in found[1]
    assert "magic bytes" in found[2]
    assert "column 'label': found no such column; expected int64 in 0..9. Did you mean 'lable'?" in found[3]
    assert "column 'label': found string; expected int64" in found[4]
    assert "row group 0: column 'label': found labels from 0 to 10; expected labels in 0..9." in found[5]
    assert "declare classes=11" in found[5]
    assert "5 nulls" in found[6]


def test_two_faults_of_one_file_are_both_reported(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    labels = pa.chunked_array([pa.array([0, 10] * 5)])
    rewrite(tmp_path / "set" / "part-00000.parquet", lambda t: pa.table({"label": labels}))
    image, label = problems_of(source)
    assert "'image': found no such column" in image
    assert "labels from 0 to 10" in label


def test_a_label_outside_its_classes_is_found_without_statistics_too(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    labels = pa.chunked_array([pa.array([0, 1, 2, 3, 4, -1, 1, 2, 3, 12])])
    file = tmp_path / "set" / "part-00002.parquet"
    rewrite(file, lambda t: t.set_column(1, "label", labels), write_statistics=False)
    (problem,) = problems_of(source)
    assert problem.startswith(f"{file}, row group 1: column 'label': found labels from -1 to 12")


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_missing_or_empty_folder_says_how_to_get_the_data(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    (problem,) = problems_of(ParquetSource(str(tmp_path / "set"), SCHEMA))
    assert str(tmp_path / "set") in problem
    assert "raymill data get" in problem


def test_files_without_rows_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    empty: Rows = {"image": np.zeros((0, 4, 5), np.uint8), "label": np.zeros(0, np.int64)}
    pq.write_table(table_from_rows(empty, SCHEMA), tmp_path / "set" / "a.parquet")
    (problem,) = problems_of(ParquetSource(str(tmp_path / "set"), SCHEMA))
    assert "0 rows in 1 files" in problem


def test_a_bit_flip_in_a_page_names_file_and_row_group_and_spares_the_others(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    fragments = source.fragments()
    file = tmp_path / "set" / "part-00001.parquet"
    image = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    # The page ends where the column ends: these are values, not the page's header.
    end = image.data_page_offset + image.total_compressed_size
    content[end - 40 : end] = bytes(byte ^ 0xFF for byte in content[end - 40 : end])
    file.write_bytes(content)
    assert source.fragments() == fragments
    with pytest.raises(DataError, match=r"part-00001\.parquet, row group 1: cannot be read") as caught:
        source.read(fragments[3])
    assert str(file) in str(caught.value)
    assert_same_rows(source.read(fragments[2]), {name: column[10:15] for name, column in digits().items()})


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:200])])
def test_a_file_lost_or_cut_after_it_was_listed_is_named(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    source = write(tmp_path / "set")
    fragments = source.fragments()
    change(tmp_path / "set" / "part-00003.parquet")
    with pytest.raises(DataError, match=r"part-00003\.parquet, row group 1"):
        source.read(fragments[7])


def test_a_file_replaced_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    fragments = source.fragments()
    write(tmp_path / "other", digits(seed=1))
    os.replace(tmp_path / "other" / "part-00000.parquet", tmp_path / "set" / "part-00000.parquet")
    with pytest.raises(DataError, match="has changed since"):
        source.read(fragments[0])


# ---------------------------------------------------------------- Parquet: writing


def test_writing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymill.data.sources.parquet.os.fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_writing_never_replaces_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "set")
    before = {file: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    with pytest.raises(InputError, match="something there already"):
        write(tmp_path / "set", digits(seed=1))
    assert {file: file.read_bytes() for file in (tmp_path / "set").iterdir()} == before


@pytest.mark.parametrize("num_shards", [0, 4])
def test_more_shards_than_rows_or_none_are_refused(tmp_path: Path, num_shards: int) -> None:
    with pytest.raises(InputError, match="expected 1 to 3"):
        write_parquet(tmp_path / "set", digits(3), SCHEMA, num_shards=num_shards, row_group_rows=2)


# ---------------------------------------------------------------- arrays


def test_an_array_source_gives_all_rows_in_order_and_makes_them_once() -> None:
    calls = []

    def make() -> Rows:
        calls.append(1)
        return digits(13)

    source = ArraySource("digits", make, fragment_rows=5)
    fragments = source.fragments()
    assert [f.num_rows for f in fragments] == [5, 5, 3]
    assert sum(f.num_bytes for f in fragments) == 13 * (20 + 8)
    assert_same_rows(source.read(fragments[2]), {name: column[10:] for name, column in digits(13).items()})
    assert len(calls) == 1


def test_equal_partials_are_made_once_and_differing_ones_apart() -> None:
    first = ArraySource("a", partial(digits, 10, seed=1), 5).fragments()
    assert ArraySource("a", partial(digits, 10, seed=1), 5).fragments() == first
    other = ArraySource("a", partial(digits, 10, seed=2), 5).fragments()
    assert {f.identity for f in other}.isdisjoint({f.identity for f in first})


def test_rows_that_differ_from_the_listed_ones_are_refused() -> None:
    listed = ArraySource("drawn", partial(digits, 10, seed=1), 5).fragments()
    with pytest.raises(DataError, match=r"drawn, rows 5 to 9: other rows.*seed what it draws"):
        ArraySource("drawn", partial(digits, 10, seed=2), 5).read(listed[1])


def test_columns_of_different_lengths_are_refused() -> None:
    source = ArraySource("bad", lambda: {"x": np.zeros(3), "y": np.zeros(4)}, 5)
    assert "'x': 3, 'y': 4" in problems_of(source)[0]


# ---------------------------------------------------------------- map-style datasets


class Squares:
    """Items of two kinds: (number, array of a length that differs, text)."""

    def __init__(self, num_items: int, broken: int | None = None) -> None:
        self.num_items, self.broken = num_items, broken

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, number: int) -> tuple[int, np.ndarray, str]:
        if number == self.broken:
            raise OSError("cannot identify image file")
        return number**2, np.full(number % 3, number, np.float32), str(number)


def square_row(item: tuple[int, np.ndarray, str]) -> dict[str, Any]:
    return {"square": item[0], "pair": np.array([item[0], 1], np.uint8), "ragged": item[1], "text": item[2]}


def test_a_map_style_dataset_is_read_by_index_range() -> None:
    source = MapStyleSource("squares", partial(Squares, 7), square_row, fragment_rows=3)
    fragments = source.fragments()
    assert [f.num_rows for f in fragments] == [3, 3, 1]
    rows = source.read(fragments[1])
    assert_same_column(rows["square"], np.array([9, 16, 25]))
    assert_same_column(rows["pair"], np.array([[9, 1], [16, 1], [25, 1]], np.uint8))
    assert_same_column(rows["ragged"], [np.full(number % 3, number, np.float32) for number in (3, 4, 5)])
    assert rows["text"] == ["3", "4", "5"]


def test_an_item_that_cannot_be_read_is_named_by_number() -> None:
    source = MapStyleSource("squares", partial(Squares, 7, broken=4), square_row, fragment_rows=3)
    with pytest.raises(DataError, match="squares, item 4: OSError: cannot identify image file"):
        source.read(source.fragments()[1])


def test_an_item_with_other_columns_is_named_by_number() -> None:
    source = MapStyleSource("squares", partial(Squares, 5), lambda item: {item[2]: item[0]}, fragment_rows=5)
    with pytest.raises(DataError, match=r"squares, item 1: columns \['1'\], not \['0'\]"):
        source.read(source.fragments()[0])


def test_an_iterable_dataset_is_refused() -> None:
    source = MapStyleSource("stream", lambda: iter([1, 2]), square_row, fragment_rows=5)
    assert "list_iterator" in problems_of(source)[0]


def test_the_identity_follows_the_length_of_a_map_style_dataset() -> None:
    short, long = (MapStyleSource("s", partial(Squares, n), square_row, 3).fragments()[0] for n in (7, 8))
    assert short.identity != long.identity


# ---------------------------------------------------------------- what is not imported


def test_writing_and_reading_imports_neither_pandas_nor_torch_nor_ray(tmp_path: Path) -> None:
    # pyarrow imports pandas behind the back of whoever calls `pa.array`: a second in every reader process.
    program = f"""
import sys
from pathlib import Path
import numpy as np
from raymill.data.manifest import as_record, from_record, take_manifest
from raymill.data.quality.statistics import statistics
from raymill.data.sources import ParquetSource, write_parquet
from raymill.task import Field, Pipeline
schema = {{"x": Field("uint8", (2,)), "r": Field("bool", (None,)), "t": Field("text"), "y": Field("int64", classes=3)}}
rows = {{"x": np.zeros((4, 2), np.uint8), "r": [np.ones(i, bool) for i in range(4)], "t": list("abcd")}}
rows["y"] = np.arange(4) % 3
write_parquet(Path({str(tmp_path / "set")!r}), rows, schema, num_shards=2, row_group_rows=1)
pipeline = Pipeline(sources={{"train": ParquetSource({str(tmp_path / "set")!r}, schema)}}, schema=schema)
manifest = from_record(as_record(take_manifest(pipeline)))
assert statistics(pipeline, manifest, "train")["rows"] == 4
print(sorted({{"pandas", "torch", "ray", "mlflow"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "[]\n", done.stderr
