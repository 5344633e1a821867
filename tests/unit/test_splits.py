"""One source split into several: each row in exactly one, always the same, whatever comes beside it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.data.manifest import differences, take_manifest
from raymill.data.sources import (
    ArraySource,
    ParquetSource,
    resample,
    split_by_key,
    split_by_share,
    split_by_time,
    split_into_folds,
)
from raymill.errors import DataError, InputError
from raymill.task import Field, Fragment, Pipeline, Rows, Source

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def make_rows(count: int) -> Rows:
    """Numbered rows of users, labels and times."""
    generator = np.random.default_rng(3)
    return {
        "row": np.arange(count, dtype=np.int64),
        "user": [f"user {number}" for number in generator.integers(0, max(1, count // 10), count)],
        "label": generator.choice(4, count, p=[0.7, 0.2, 0.09, 0.01]),
        "time": np.sort(generator.random(count)),
    }


def arrays(count: int, fragment_rows: int = 700) -> ArraySource:
    return ArraySource("rows", partial(make_rows, count), fragment_rows)


def parquet(folder: Path, count: int, names: tuple[str, ...] = ("a", "b", "c")) -> ParquetSource:
    folder.mkdir(exist_ok=True)
    for name in names:
        rows = make_rows(count)
        rows["row"] = np.asarray(rows["row"]) + ord(name) * 10**6
        pq.write_table(pa.table(rows), folder / f"{name}.parquet", row_group_size=300)
    return ParquetSource.inferred(str(folder))


def read_all(source: Source) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for fragment in source.fragments():
        rows = source.read(fragment)
        assert {len(column) for column in rows.values()} == {fragment.num_rows}
        for name, column in rows.items():
            found.setdefault(name, []).extend(column)
    return found


def rows_of(split: dict[str, Any]) -> dict[str, set[int]]:
    """Of each split; no two of which share one."""
    lists = {name: read_all(source)["row"] for name, source in split.items()}
    sets = {name: {int(row) for row in rows} for name, rows in lists.items()}
    assert [len(rows) for rows in lists.values()] == [len(rows) for rows in sets.values()]
    assert len(set().union(*sets.values())) == sum(map(len, sets.values()))
    return sets


def splits(source: Source) -> dict[str, dict[str, Any]]:
    """Each way to split it."""
    return {
        "share": split_by_share(source, SHARES),
        "stratified": split_by_share(source, SHARES, stratify="label"),
        "key": split_by_key(source, "user", SHARES),
        "time": split_by_time(source, "time", {"train": 0.8, "validation": 0.9, "test": None}),
        "fold": split_into_folds(source, 1, 5),
        "fold of users": split_into_folds(source, 1, 5, column="user"),
    }


WAYS = list(splits(arrays(10)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["arrays", "parquet"])
def test_each_row_is_in_one_split_and_the_shares_are_about_right(tmp_path: Path, way: str, kind: str) -> None:
    source: Source = arrays(9000) if kind == "arrays" else parquet(tmp_path / "set", 3000)
    found = rows_of(splits(source)[way])
    assert sum(map(len, found.values())) == 9000
    # Four times the deviation: of 9000 rows, or of 900 users with ten rows each.
    assert len(found["train"]) == pytest.approx(7200, abs=480 if "user" in way or way == "key" else 152)


@given(count=st.integers(3, 60), fragment_rows=st.integers(1, 20), seed=st.integers(0, 99), share=st.floats(0.05, 0.95))
def test_no_row_is_lost_or_doubled(count: int, fragment_rows: int, seed: int, share: float) -> None:
    source = arrays(count, fragment_rows)
    split = split_by_share(source, {"a": share, "b": 1 - share}, seed=seed, stratify="label" if seed % 2 else None)
    found = [row for one in split.values() for fragment in fragments_of(one) for row in one.read(fragment)["row"]]
    assert sorted(found) == list(range(count))


def fragments_of(source: Source) -> Sequence[Fragment]:
    """None for a split that has no rows, which is refused."""
    try:
        return source.fragments()
    except InputError:
        return []


def test_labels_keep_their_shares_and_rare_ones_too() -> None:
    source = arrays(20_000, 100)
    labels = {name: np.bincount(read_all(one)["label"], minlength=4) for name, one in splits(source)["stratified"].items()}
    total = sum(labels.values())
    for name, counts in labels.items():
        np.testing.assert_allclose(counts / total, SHARES[name], atol=0.05)
        assert abs(counts[0] / total[0] - SHARES[name]) < 0.003, "of many, the share is nearly exact"


def test_all_rows_of_a_key_are_together() -> None:
    users = [set(read_all(one)["user"]) for one in splits(arrays(5000))["key"].values()]
    assert len(set().union(*users)) == sum(map(len, users))


KEYS = {"numbers": [1, 2, 1], "fractions": [0.0, 1.5, -0.0], "bytes": [b"a", b"b", b"a"], "texts": ["a", "b", "a"]}


def keyed(kind: str) -> Rows:
    """Three rows, the first and the last of one key."""
    keys = KEYS[kind]
    return {"row": np.arange(3), "key": np.array(keys) if kind in ("numbers", "fractions") else list(keys)}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_may_be_a_number_a_text_or_bytes(kind: str) -> None:
    source = ArraySource("rows", partial(keyed, kind), 1)
    for seed in range(8):
        split = split_by_key(source, "key", {"a": 0.5, "b": 0.5}, seed=seed)
        found = [{row for fragment in fragments_of(one) for row in one.read(fragment)["row"]} for one in split.values()]
        assert any({0, 2} <= rows for rows in found)


def test_what_comes_later_is_in_a_later_split() -> None:
    times = [read_all(one)["time"] for one in splits(arrays(2000))["time"].values()]
    assert max(times[0]) < 0.8 <= min(times[1]) <= max(times[1]) < 0.9 <= min(times[2])


def test_folds_are_each_validated_once() -> None:
    found = [rows_of(split_into_folds(arrays(1000), fold, 4))["validation"] for fold in range(4)]
    assert sorted(row for rows in found for row in rows) == list(range(1000))
    assert max(map(len, found)) - min(map(len, found)) < 80


@pytest.mark.parametrize("way", ["share", "key", "stratified", "time", "fold"])
def test_a_row_stays_in_its_split_when_files_are_added(tmp_path: Path, way: str) -> None:
    before = rows_of(splits(parquet(tmp_path / "set", 900, ("b",)))[way])
    after = rows_of(splits(parquet(tmp_path / "set", 900, ("a", "b", "c")))[way])
    assert all(rows <= after[name] for name, rows in before.items())


def test_another_seed_is_another_split_and_each_file_another_too(tmp_path: Path) -> None:
    first, second = (rows_of(split_by_share(arrays(500), SHARES, seed=seed))["test"] for seed in (0, 1))
    assert first != second
    found = rows_of(splits(parquet(tmp_path / "set", 300, ("a", "b")))["share"])["test"]
    assert {row % 10**6 for row in found if row < 98 * 10**6} != {row % 10**6 for row in found if row >= 98 * 10**6}


def test_it_is_the_same_in_another_process() -> None:
    for made in splits(arrays(400)).values():
        for source in made.values():
            again = pickle.loads(pickle.dumps(source))
            fragment = source.fragments()[0]
            assert again.read(fragment)["row"].tolist() == source.read(fragment)["row"].tolist()


def test_a_run_whose_rule_was_changed_is_not_gone_on_with() -> None:
    schema = {"row": Field("int64")}
    one, other = (
        take_manifest(Pipeline(sources=split_by_share(arrays(400), SHARES, seed=seed), schema=schema)) for seed in (0, 1)
    )
    assert differences(one, other)
    first, second = (split_by_share(arrays(400), SHARES, seed=seed)["train"] for seed in (0, 1))
    with pytest.raises(DataError, match="was made by another rule when the run began"):
        second.read(first.fragments()[0])


def test_rows_that_are_bad_for_another_column_move_no_row(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    holes = pa.array([None if row % 3 == 0 else row for row in range(600)])
    users = pa.array([f"user {row % 50}" for row in range(600)])
    pq.write_table(pa.table({"row": holes, "user": users, "id": pa.array(range(600))}), tmp_path / "set" / "a.parquet")
    source = ParquetSource.inferred(str(tmp_path / "set"), nulls="bad_rows")
    for split in split_by_key(source, "user", SHARES).values():
        for fragment in split.fragments():
            rows = split.read(fragment)
            assert len(rows["user"]) == fragment.num_rows


@pytest.mark.parametrize(
    ("split", "found"),
    [
        (lambda source: split_by_share(source, {"a": 0.5, "b": 0.4}), "'b': 0.4"),
        (lambda source: split_by_share(source, {"a": 1.2, "b": -0.2}), "-0.2"),
        (lambda source: split_by_share(source, {}), "{}"),
        (lambda source: split_by_share(source, SHARES, stratify="lable"), "no such column"),
        (lambda source: split_by_key(source, "usr", SHARES), "no such column"),
        (lambda source: split_by_time(source, "time", {"a": 0.5, "b": 0.4, "c": None}), "0.4"),
        (lambda source: split_by_time(source, "time", {"a": 0.5, "b": 0.6}), "0.6"),
        (lambda source: split_by_time(source, "user", {"a": 0.5, "b": None}), "text"),
        (lambda source: split_into_folds(source, 5, 5), "fold 5 of 5"),
        (lambda source: split_into_folds(source, 0, 1), "fold 0 of 1"),
        (
            lambda source: split_by_time(source, "time", {"a": 7, "b": None})["b"].fragments(),
            "none of 300 rows; time goes from 0.0",
        ),
    ],
)
def test_a_split_that_is_none_is_refused(tmp_path: Path, split: Any, found: str) -> None:
    with pytest.raises(InputError) as caught:
        split(parquet(tmp_path / "set", 300, ("a",)))
    assert found in str(caught.value.problems[0])


@pytest.mark.parametrize("way", ["share", "key", "fold", "fold of users"])
def test_a_part_is_split_anew(way: str) -> None:
    inner = rows_of(splits(splits(arrays(9000))[way]["train"])[way])
    assert len(inner["validation"]) == pytest.approx(720 if "fold" not in way else 1440, rel=0.5)


def test_a_row_without_a_time_is_in_no_split() -> None:
    split = split_by_time(ArraySource("rows", no_time, 2), "time", {"a": 1, "b": None})
    with pytest.raises(InputError, match="part 0, row 1: time is NaN, which is in no split"):
        split["a"].fragments()


def no_time() -> Rows:
    return {"row": np.arange(2), "time": np.array([0.5, np.nan])}


# ---------------------------------------------------------------- rows that come more often


def test_rows_of_a_weight_come_as_often_as_it_says_on_average_and_the_same_ones_each_time(tmp_path: Path) -> None:
    plain = parquet(tmp_path / "set", 3000)
    source = resample(plain, "label", {1: 2.5, 2: 0.25, 3: 40, 0: 0})
    before, after = np.bincount(read_all(plain)["label"]), np.bincount(read_all(source)["label"], minlength=4)
    # Four times the deviation of the rarest, of which there are some 780.
    np.testing.assert_allclose(after / before, [0, 2.5, 0.25, 40], rtol=0.25)
    rows = read_all(source)["row"]
    assert rows == read_all(pickle.loads(pickle.dumps(source)))["row"]
    assert rows != read_all(resample(plain, "label", {1: 2.5, 2: 0.25, 3: 40, 0: 0}, seed=1))["row"]
    counts = np.unique(np.array(read_all(resample(plain, "user", {"user 7": 2.5}))["row"]), return_counts=True)[1]
    assert set(counts) == {1, 2, 3}


def test_weights_that_are_none_are_refused_and_others_are_another_rule(tmp_path: Path) -> None:
    plain = parquet(tmp_path / "set", 300, ("a",))
    for weights, found in (({1: -1}, "-1"), ({1: float("nan")}, "nan"), ({1: 1e9}, "1000000000.0")):
        with pytest.raises(InputError) as caught:
            resample(plain, "label", weights)
        assert found in str(caught.value)
    with pytest.raises(InputError, match="no such column"):
        resample(plain, "lable", {})
    with pytest.raises(InputError, match="no row is left"):
        resample(plain, "label", dict.fromkeys(range(4), 0)).fragments()
    (fragment,) = resample(plain, "label", {1: 2}).fragments()
    with pytest.raises(DataError, match="was made by another rule when the run began"):
        resample(plain, "label", {1: 3}).read(fragment)


def test_only_the_column_that_decides_is_read_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "set", 300, ("a",))
    asked: list[list[str]] = []
    read = ParquetSource.read
    monkeypatch.setattr(ParquetSource, "read", lambda self, fragment: asked.append(list(self.schema)) or read(self, fragment))
    splits(source)["share"]["train"].fragments()
    assert asked == []
    splits(source)["key"]["train"].fragments()
    assert asked == [["user"]]
