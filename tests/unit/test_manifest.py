"""The manifest: taken with all problems at once, kept as JSON, compared on resume, measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.synthetic import blobs
from raymill.data.arrow import DTYPES, dtype_problems
from raymill.data.manifest import Manifest, SplitManifest, as_record, differences, from_record, take_manifest
from raymill.data.quality.statistics import statistics
from raymill.data.sources import ArraySource, ParquetSource, write_parquet
from raymill.errors import DataError, InputError
from raymill.task import Field, Fragment, Pipeline, Rows, Schema, Source

SCHEMA: Schema = {"x": Field("float32", (2,)), "label": Field("int64", classes=3)}


def rows_of(num_rows: int, seed: int = 0) -> Rows:
    x = np.random.default_rng(seed).normal(size=(num_rows, 2)).astype(np.float32)
    return {"x": x, "label": np.arange(num_rows, dtype=np.int64) % 3}


def pipeline_of(**sources: Source) -> Pipeline:
    return Pipeline(sources=sources, schema=SCHEMA)


def arrays(num_rows: int, seed: int = 0) -> ArraySource:
    return ArraySource("rows", partial(rows_of, num_rows, seed), 4)


def parquet(folder: Path, num_rows: int = 12, seed: int = 0) -> ParquetSource:
    write_parquet(folder, rows_of(num_rows, seed), SCHEMA, num_shards=3, row_group_rows=2)
    return ParquetSource(str(folder), SCHEMA)


def fragment(path: str, part: int = 0, identity: str = "0") -> Fragment:
    return Fragment(path, part, 10, 100, identity)


def manifest_of(**splits: list[Fragment]) -> Manifest:
    return Manifest({name: SplitManifest(tuple(fragments)) for name, fragments in splits.items()})


# ---------------------------------------------------------------- take


def test_a_manifest_has_every_fragment_of_every_split(tmp_path: Path) -> None:
    pipeline = pipeline_of(train=parquet(tmp_path / "a"), validation=arrays(5))
    manifest = take_manifest(pipeline)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 12, "validation": 5}
    assert manifest.splits["train"].fragments == tuple(pipeline.sources["train"].fragments())
    assert manifest.splits["validation"].num_bytes == 5 * (8 + 8)


def with_nulls(source: ParquetSource, *numbers: int) -> ParquetSource:
    for number in numbers:
        file = Path(source.folder, f"part-{number:05d}.parquet")
        table = pq.read_table(file)
        pq.write_table(table.set_column(1, "label", pa.array([None] * table.num_rows, pa.int64())), file)
    return source


def test_a_null_column_is_one_problem_that_names_the_splits(tmp_path: Path) -> None:
    train = with_nulls(parquet(tmp_path / "a"), 0, 2)
    validation = with_nulls(parquet(tmp_path / "b"), 1)
    with pytest.raises(InputError) as caught:
        take_manifest(pipeline_of(train=train, validation=validation))
    (problem,) = caught.value.problems
    assert problem.where == "splits 'train' and 'validation': column 'label'"
    assert problem.found == f"4 nulls in {tmp_path}/a/part-00000.parquet, likewise in 2 other places"
    with pytest.raises(InputError) as caught:
        take_manifest(pipeline_of(train=train, validation=arrays(5)))
    (problem,) = caught.value.problems
    assert (problem.where, problem.found[-25:]) == ("split 'train': column 'label'", "likewise in another place")


def test_columns_with_faults_of_their_own_stay_apart(tmp_path: Path) -> None:
    other = ArraySource("other", partial(rows_of, 5), 4)
    schema = {**SCHEMA, "x": Field("float32", (3,)), "y": Field("float32")}
    with pytest.raises(InputError) as caught:
        take_manifest(Pipeline(sources={"train": arrays(5), "validation": other}, schema=schema))
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == [f"splits 'train' and 'validation': column {name!r}" for name in ("x", "y")]


@pytest.mark.parametrize("dtype", ["string", "timestamp[us]", "datetime64[us]", "object", "", "str", "float23", "f4,f4"])
def test_a_dtype_that_rows_cannot_have_is_named_with_its_column_and_the_valid_ones(dtype: str, tmp_path: Path) -> None:
    wrong: Schema = {"x": Field("float32", (2,)), "when": Field(dtype)}
    folder = parquet(tmp_path / "a").folder
    for use in (
        lambda: take_manifest(Pipeline(sources={"train": arrays(5)}, schema=wrong)),
        lambda: ParquetSource(folder, wrong).fragments(),
        lambda: write_parquet(tmp_path / "b", rows_of(4), wrong, num_shards=1, row_group_rows=2),
    ):
        with pytest.raises(InputError) as caught:
            use()
        (problem,) = caught.value.problems
        assert (problem.where, problem.found) == ("schema: column 'when'", f"Field({dtype!r})")
        assert "float32" in problem.expected
        assert "int64 for times" in problem.fix


def test_every_valid_dtype_and_numpys_other_names_for_them_are_taken() -> None:
    assert dtype_problems({name: Field(name) for name in (*DTYPES, "float", "<f4")}) == []


def test_the_problems_of_all_splits_come_at_once(tmp_path: Path) -> None:
    cut = parquet(tmp_path / "cut")
    (tmp_path / "cut" / "part-00001.parquet").write_bytes(b"PAR1")
    pipeline = pipeline_of(
        validation=cut,
        missing=ParquetSource(str(tmp_path / "nowhere"), SCHEMA),
        empty=ArraySource("empty", partial(rows_of, 0), 4),
        other=ArraySource("other", lambda: {"x": np.zeros((4, 2)), "label": np.array([0, 1, 2, 3])}, 4),
    )
    with pytest.raises(InputError) as caught:
        take_manifest(pipeline)
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 6
    assert "expected a split 'train'" in found[0]
    assert "part-00001.parquet" in found[1]
    assert "nowhere" in found[2]
    assert "split 'empty': found 0 rows" in found[3]
    assert "split 'other', other, part 0: column 'x': found float64 of shape (2,)" in found[4]
    assert "column 'label': found values from 0 to 3; expected int64 in 0..2" in found[5]


def test_a_first_fragment_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a")
    file = tmp_path / "a" / "part-00000.parquet"
    content = bytearray(file.read_bytes())
    content[4:40] = bytes(36)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"split 'train', part-00000.parquet, part 0: found .*cannot be read"):
        take_manifest(pipeline_of(train=source))


# ---------------------------------------------------------------- record


def test_a_record_survives_json_and_gives_the_same_manifest(tmp_path: Path) -> None:
    manifest = take_manifest(pipeline_of(train=parquet(tmp_path / "a"), validation=arrays(9)))
    found = from_record(json.loads(json.dumps(as_record(manifest))))
    assert found == manifest
    assert found.digest == manifest.digest


def test_a_record_of_many_fragments_stays_small() -> None:
    fragments = [fragment(f"part-{i // 100:05d}.parquet", i % 100, f"{i // 100:016x}") for i in range(20_000)]
    assert len(json.dumps(as_record(manifest_of(train=fragments)))) < 20 * 20_000


def test_a_record_that_was_changed_or_cut_is_refused() -> None:
    record = as_record(manifest_of(train=[fragment("a"), fragment("b")]))
    changed = json.loads(json.dumps(record).replace("[10, 10]", "[10, 11]"))
    with pytest.raises(DataError, match="was changed"):
        from_record(changed)
    cut = json.loads(json.dumps(record).replace("[10, 10]", "[10]"))
    for incomplete in (cut, {}, {"digest": "", "splits": {"train": {}}}):
        with pytest.raises(DataError, match="is incomplete"):
            from_record(incomplete)


def test_the_digest_follows_every_property_of_a_fragment_their_order_and_the_split() -> None:
    base = Fragment("a", 0, 10, 100, "0")
    others = [
        Fragment("b", 0, 10, 100, "0"),
        Fragment("a", 1, 10, 100, "0"),
        Fragment("a", 0, 11, 100, "0"),
        Fragment("a", 0, 10, 101, "0"),
        Fragment("a", 0, 10, 100, "1"),
    ]
    manifests = [manifest_of(train=[base, other]) for other in others]
    manifests += [manifest_of(train=[others[0], base]), manifest_of(train=[base]), manifest_of(test=[base])]
    assert len({manifest.digest for manifest in manifests}) == len(manifests)


# ---------------------------------------------------------------- compare


def test_nothing_differs_between_equal_inputs(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a")
    assert differences(take_manifest(pipeline_of(train=source)), take_manifest(pipeline_of(train=source))) == []


def test_each_file_added_removed_or_changed_is_named() -> None:
    old = manifest_of(train=[fragment("kept"), fragment("gone"), fragment("changed", identity="1")])
    new = manifest_of(
        train=[fragment("kept"), fragment("changed", identity="2"), fragment("new"), fragment("new", 1)],
        test=[fragment("t")],
    )
    found = [str(problem) for problem in differences(old, new)]
    assert len(found) == 4
    assert found[0].startswith("split 'test', t: found 10 rows in 1 pieces of identity 0; expected no such file")
    assert "changed: found 10 rows in 1 pieces of identity 2; expected 10 rows in 1 pieces of identity 1" in found[1]
    assert "gone: found no such file; expected 10 rows" in found[2]
    assert "new: found 20 rows in 2 pieces" in found[3]


def test_another_order_of_the_same_files_is_a_difference() -> None:
    old, new = manifest_of(train=[fragment("a"), fragment("b")]), manifest_of(train=[fragment("b"), fragment("a")])
    (problem,) = differences(old, new)
    assert "another order" in problem.found


def test_a_change_inside_one_file_is_seen(tmp_path: Path) -> None:
    old = take_manifest(pipeline_of(train=parquet(tmp_path / "a")))
    parquet(tmp_path / "b", seed=1)
    (tmp_path / "b" / "part-00002.parquet").rename(tmp_path / "a" / "part-00002.parquet")
    new = take_manifest(pipeline_of(train=ParquetSource(str(tmp_path / "a"), SCHEMA)))
    (problem,) = differences(old, new)
    assert problem.where == "split 'train', part-00002.parquet"


# ---------------------------------------------------------------- measure


def test_statistics_are_those_of_all_rows(tmp_path: Path) -> None:
    schema: Schema = {**SCHEMA, "text": Field("text"), "crop": Field("uint8", (None,))}
    rows: Rows = {
        **rows_of(11),
        "text": ["a" * i for i in range(11)],
        "crop": [np.full(i, i, np.uint8) for i in range(11)],
    }
    x = np.asarray(rows["x"])
    x[3, 0], x[7, 1] = np.nan, np.inf
    write_parquet(tmp_path / "set", rows, schema, num_shards=2, row_group_rows=3)
    pipeline = Pipeline(sources={"train": ParquetSource(str(tmp_path / "set"), schema)}, schema=schema)
    manifest = take_manifest(pipeline)
    found = statistics(pipeline, manifest, "train")
    assert json.loads(json.dumps(found)) == found
    assert (found["rows"], found["fragments"], found["bytes"]) == (11, 4, manifest.splits["train"].num_bytes)
    finite = x[np.isfinite(x)]
    column = found["columns"]["x"]
    assert (column["dtype"], column["shape"], column["num_not_finite"]) == ("float32", [2], 2)
    assert (column["min"], column["max"]) == (finite.min(), finite.max())
    assert column["mean"] == pytest.approx(finite.mean(dtype=np.float64), rel=1e-12)
    assert found["columns"]["label"]["class_counts"] == [4, 4, 3]
    quantiles = {"0.05": 0.5, "0.5": 5.0, "0.95": 9.5}
    length = found["columns"]["text"]["length"]
    assert (sum(length["histogram"]), [i for i, count in enumerate(length["histogram"]) if count][-1]) == (11, 29)
    assert {**length, "histogram": []} == {"min": 0, "max": 10, "mean": 5.0, "quantiles": quantiles, "histogram": []}
    assert (found["columns"]["crop"]["min"], found["columns"]["crop"]["max"]) == (1, 10)
    assert found["columns"]["crop"]["mean"] == pytest.approx(sum(i * i for i in range(11)) / 55)


def test_statistics_of_a_split_that_is_not_there_name_the_nearest() -> None:
    pipeline = pipeline_of(train=arrays(5))
    with pytest.raises(InputError, match="Did you mean 'train'"):
        statistics(pipeline, take_manifest(pipeline), "trian")


def test_blobs_are_separable_and_the_same_in_every_making() -> None:
    pipeline = blobs()
    manifest = take_manifest(pipeline)
    assert take_manifest(blobs()).digest == manifest.digest
    assert take_manifest(blobs(seed=1)).digest != manifest.digest
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 600, "validation": 120}
    read = {}
    for split, found in manifest.splits.items():
        parts = [pipeline.sources[split].read(piece) for piece in found.fragments]
        read[split] = tuple(np.concatenate([part[name] for part in parts]) for name in ("features", "label"))
    features, labels = read["train"]
    centres = np.stack([features[labels == label].mean(axis=0) for label in range(3)])
    validation, truth = read["validation"]
    nearest = np.linalg.norm(validation[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == truth).mean() > 0.95
