"""Bad rows: none of the others moves, each is named once, and the list survives what kills the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raymill.config.plan import ClusterFacts, make_plan
from raymill.config.spec import BadRowsSpec, JobSpec
from raymill.data import ray_stream
from raymill.data.bad_rows import BadRow, check_values, read_good_rows
from raymill.data.feed import Feed
from raymill.data.manifest import take_manifest
from raymill.data.order import BatchSharding, JobOrder, SplitOrder, Stream, num_batches
from raymill.data.quality.check import check_rows
from raymill.data.reader import Packet, Reader, read_locally
from raymill.data.rows import ROW_ID, num_rows
from raymill.errors import DataError, InputError
from raymill.record.bad_row_ledger import QUARANTINE, BadRowLedger, known_bad_rows, summarise_bad_rows
from raymill.record.events import BadRowsFound, Event, EventWriter
from raymill.record.folder import RunFolder
from raymill.task import TRAIN, Field, Fragment, Pipeline, Rows
from raymill.training.steps import TrainEnd, TrainStep, remaining_steps

# ---------------------------------------------------------------- a source with bad rows


@dataclass(frozen=True)
class Counted:
    """A source whose rows are their own numbers; some fragments cannot be read."""

    sizes: tuple[int, ...]
    unreadable: frozenset[int] = frozenset()

    def fragments(self) -> list[Fragment]:
        return [Fragment("counted", part, size, size, "") for part, size in enumerate(self.sizes)]

    def read(self, fragment: Fragment) -> Rows:
        if fragment.part in self.unreadable:
            raise DataError(f"counted, part {fragment.part}: cannot be read")
        first = sum(self.sizes[: fragment.part])
        return {"value": np.arange(first, first + fragment.num_rows)}

    def rows_of(self, part: int) -> range:
        first = sum(self.sizes[:part])
        return range(first, first + self.sizes[part])


def refuse(rows: Rows, refused: frozenset[int]) -> dict[int, str]:
    return {place: f"value {value}" for place, value in enumerate(rows["value"]) if int(value) in refused}


def pipeline_of(source: Counted, refused: frozenset[int] = frozenset()) -> Pipeline:
    return Pipeline(sources={TRAIN: source}, schema={}, check=partial(refuse, refused=refused))


@dataclass(frozen=True)
class Case:
    """A job of two epochs in small."""

    sizes: tuple[int, ...]
    unreadable: frozenset[int]
    refused: frozenset[int]
    windows: int
    batch_rows: int

    @property
    def order(self) -> JobOrder:
        train = SplitOrder(TRAIN, np.array(self.sizes, np.int64), self.windows, 7, shuffle=True)
        return JobOrder(train, (), 2 * num_batches(train.num_rows, self.batch_rows), self.batch_rows)

    @property
    def bad(self) -> set[int]:
        source = Counted(self.sizes)
        return {row for part in self.unreadable for row in source.rows_of(part)} | self.refused

    def reader(self, world_size: int, *, sound: bool = False) -> Reader:
        source = Counted(self.sizes, frozenset() if sound else self.unreadable)
        pipeline = pipeline_of(source, frozenset() if sound else self.refused)
        sharding = BatchSharding(sum(self.sizes), self.batch_rows, 3, world_size)
        return Reader("", self.order, {TRAIN: sharding}, {TRAIN: source.fragments()}, pipeline, lenient=not sound)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any).map(tuple))
    parts = st.integers(0, len(sizes) - 1)
    return Case(
        sizes=sizes,
        unreadable=draw(st.frozensets(parts, max_size=2)),
        refused=draw(st.frozensets(st.integers(0, sum(sizes) - 1), max_size=8)),
        windows=draw(st.integers(1, 5)),
        batch_rows=draw(st.integers(1, 14)),
    )


def deal(
    case: Case, reader: Reader, packets: Iterator[Packet], position: int, rank: int
) -> tuple[dict[Any, list[int]], list[BadRow]]:
    """(epoch, batch, shard) -> the row ids that a rank is given, and the bad rows that it is told of."""
    noted: list[BadRow] = []
    feed = Feed(packets, noted.extend)
    dealt = {}
    for step in remaining_steps(case.order, position):
        if isinstance(step, TrainEnd):
            feed.finish(TRAIN, step.epoch, case.windows)
        if not isinstance(step, TrainStep):
            continue
        for shard, count in reader.shardings[TRAIN].shards(step.batch, rank):
            rows = feed.take(TRAIN, step.epoch, count)
            np.testing.assert_array_equal(rows.get("value", []), rows[ROW_ID])
            dealt[step.epoch, step.batch, shard] = np.asarray(rows[ROW_ID]).tolist()
    return dealt, noted


# ---------------------------------------------------------------- reader and feed


@given(case=cases(), world_size=st.integers(1, 4), batches=st.integers(0, 3))
def test_all_other_rows_stay_where_they_are_and_rank_0_hears_of_each(case: Case, world_size: int, batches: int) -> None:
    position = min(batches * case.batch_rows, sum(case.sizes))
    reader, sound = case.reader(world_size), case.reader(world_size, sound=True)
    for rank in range(world_size):
        dealt, noted = deal(case, reader, read_locally(reader, position, rank), position, rank)
        expected, _ = deal(case, sound, read_locally(sound, position, rank), position, rank)
        assert dealt == {at: [row for row in rows if row not in case.bad] for at, rows in expected.items()}
        if rank == 0 and position == 0:
            assert sorted(row.row for row in noted) == sorted([*case.bad] * 2), "once in each epoch"
        elif rank > 0:
            assert noted == []


@settings(max_examples=20)
@given(case=cases())
def test_what_a_reading_task_sends_is_what_it_has_read(case: Case) -> None:
    class Dealt:
        """The iterator of one rank, as Ray gives it."""

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
            sent = Stream(case.order, 0)
            tables = ray_stream._read_block(pa.table({"id": list(range(len(sent)))}), case.reader(2), sent)
            return (table for table in tables if table["rank"][0].as_py() == self.rank)

    ray_stream._readers.clear()
    reader = case.reader(2)
    for rank in range(2):
        received = ray_stream.receive(Dealt(rank), rank)  # type: ignore[arg-type]
        assert deal(case, reader, received, 0, rank) == deal(case, reader, read_locally(reader, 0, rank), 0, rank)
    ray_stream._readers.clear()


def test_a_bad_row_is_named_by_file_part_place_and_reason() -> None:
    case = Case((4, 3, 5), unreadable=frozenset({1}), refused=frozenset({9}), windows=1, batch_rows=12)
    [packet] = case.reader(1).read(Stream(case.order, 0)[0])
    assert sorted(packet.bad, key=lambda row: row.row) == [
        *(BadRow(TRAIN, row, "counted", 1, row - 4, "counted, part 1: cannot be read") for row in (4, 5, 6)),
        BadRow(TRAIN, 9, "counted", 2, 2, "value 9"),
    ]
    assert str(packet.bad[-1]).startswith("counted, part ")
    assert len(packet.present) == 12
    assert num_rows(packet.rows) == 8


def test_a_check_that_names_rows_that_are_not_there_is_an_error_under_any_policy() -> None:
    source = Counted((3,))
    [fragment] = source.fragments()
    wild = Pipeline(sources={TRAIN: source}, schema={}, check=lambda rows: {3: "no such row"})
    with pytest.raises(DataError, match=r"counted part 0: the pipeline's check named rows \[3\] of 3"):
        read_good_rows(wild, TRAIN, fragment, lenient=True)


# ---------------------------------------------------------------- checks


def test_values_are_checked_against_classes_and_finiteness_only_when_asked() -> None:
    schema = {"label": Field("int64", classes=3), "x": Field("float32", (2,))}
    rows: Rows = {"label": np.array([0, 3, -1, 2]), "x": np.array([[0, 1], [0, 1], [0, 1], [np.nan, 1]], np.float32)}
    assert check_values(rows, schema) == {
        1: "column 'label' holds 3, not a label in 0..2",
        2: "column 'label' holds -1, not a label in 0..2",
    }
    assert check_values(rows, schema, must_be_finite=True)[3] == "column 'x' holds NaN or infinity"


def test_data_check_reports_what_the_pipelines_check_refuses() -> None:
    pipeline = Pipeline(
        sources={TRAIN: Counted((3, 3))},
        schema={"value": Field("int64")},
        check=partial(refuse, refused=frozenset({4, 5})),
    )
    with pytest.raises(InputError, match=r"part 1: found 2 bad rows, the first of them row 1: value 4"):
        check_rows(pipeline, take_manifest(pipeline))


def test_a_job_that_goes_on_without_bad_rows_may_start_with_an_unreadable_fragment() -> None:
    pipeline = pipeline_of(Counted((3, 3), unreadable=frozenset({0})))
    assert take_manifest(pipeline, lenient=True).splits[TRAIN].num_rows == 6
    with pytest.raises(InputError, match="part 0: cannot be read"):
        take_manifest(pipeline)
    with pytest.raises(InputError, match="2 problems"):
        take_manifest(pipeline_of(Counted((3, 3), unreadable=frozenset({0, 1}))), lenient=True)


# ---------------------------------------------------------------- the list


def bad(row: int) -> BadRow:
    return BadRow(TRAIN, row, "file", row // 10, row % 10, "damaged")


def test_each_row_is_listed_once_over_all_attempts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for rows in ([1, 2], [2, 3], [1, 2, 3]):
        with EventWriter(folder.events) as writer:
            BadRowLedger(folder, QUARANTINE, 3, writer.write).add([bad(row) for row in rows])
        with folder.quarantine.open("a") as torn:
            torn.write('{"split"')
    with EventWriter(folder.events) as writer:
        BadRowLedger(folder, QUARANTINE, 3, writer.write)
    assert [json.loads(line)["row"] for line in folder.quarantine.read_text().splitlines()] == [1, 2, 3]
    assert known_bad_rows(folder) == [bad(1), bad(2), bad(3)]
    summary = summarise_bad_rows(folder, QUARANTINE)
    assert (summary["policy"], summary["distinct"]) == (QUARANTINE, 3)
    assert summary["first"][2] == {"split": TRAIN, "row": 3, "file": "file", "part": 0, "index": 3, "reason": "damaged"}


def test_more_rows_than_the_budget_are_named_and_not_listed(tmp_path: Path) -> None:
    events: list[Event] = []
    ledger = BadRowLedger(RunFolder(tmp_path), "skip", 3, events.append)
    ledger.add([bad(1), bad(2)])
    ledger.add([bad(1), bad(2), bad(3)])
    with pytest.raises(DataError, match=r"at least 7 rows are bad, more than bad_rows.budget: 3.*row 4.*and 1 more") as caught:
        ledger.add([bad(row) for row in range(1, 8)])
    assert "file, part 0, row 6 (train row 6): damaged; and 1 more. Repair these files" in str(caught.value)
    assert [event.rows for event in events if isinstance(event, BadRowsFound)] == [[bad(1), bad(2)], [bad(3)]]
    assert len(events) == 2
    assert not RunFolder(tmp_path).quarantine.exists()


def test_a_summary_counts_all_rows_and_names_the_first_ten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with EventWriter(folder.events) as writer:
        BadRowLedger(folder, "skip", 100, writer.write).add([bad(row) for row in range(12)])
    summary = summarise_bad_rows(folder, "skip")
    assert (summary["policy"], summary["distinct"]) == ("skip", 12)
    assert [row["row"] for row in summary["first"]] == list(range(10))


def test_a_run_without_bad_rows_says_so(tmp_path: Path) -> None:
    assert summarise_bad_rows(RunFolder(tmp_path), "fail") == {"policy": "fail", "distinct": 0, "first": []}


# ---------------------------------------------------------------- spec and plan


def budget(rows: int, **section: Any) -> tuple[int, str]:
    values = {"name": "job", "task": "-", "pipeline": "-", "optimizer": {"kind": "SGD"}, "bad_rows": section}
    pipeline = pipeline_of(Counted((rows,)))
    spec = JobSpec.model_validate(values).model_copy()
    planned = make_plan(spec, take_manifest(pipeline), ClusterFacts(num_cpus=4, num_gpus=0, memory_bytes=2**32))
    return planned.bad_rows_budget, planned.reasons["bad_rows_budget"]


def test_the_budget_is_given_or_one_percent() -> None:
    assert budget(1010) == (0, "bad_rows.policy is fail")
    assert budget(1010, policy="skip") == (11, "1 % of 1010 training rows, rounded up")
    assert budget(1010, policy="quarantine", budget=0) == (0, "given")


def test_a_budget_that_would_mean_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="a budget goes with the policy skip or quarantine"):
        BadRowsSpec(budget=5)
    assert not BadRowsSpec().lenient
    assert BadRowsSpec(policy="skip").lenient
