"""The events of a run: typed, versioned, appended whole by any number of writers, and read back equal."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from raymill.data.bad_rows import BadRow
from raymill.errors import InputError
from raymill.files import FORMAT_VERSION
from raymill.record.events import (
    AnyEvent,
    AttemptFailed,
    AttemptStarted,
    BadRowsFound,
    CheckpointSaved,
    DeliveryStarted,
    DrainNoticed,
    EvaluationDone,
    EvaluationGoesOn,
    Event,
    EventWriter,
    FirstStepDone,
    ResizeStarted,
    RunFinished,
    RunStopped,
    StageReached,
    StandbyDecided,
    StepDone,
    StepRefused,
    StragglerFound,
    TaskChanged,
    TrainingEnded,
    append_event,
    as_record,
    parse_event,
    read_events,
)
from raymill.record.folder import RunFolder

START = AttemptStarted(attempt=1, num_workers=2, step=0, num_total_steps=8, resumed=False)

EVERY_KIND: list[Event] = [
    AttemptStarted(attempt=2, num_workers=3, step=4, num_total_steps=8, resumed=True, notes=("a note",), pid=17),
    StageReached(stage="starting Ray"),
    StandbyDecided(started=True, reason="the run has 900 s to go"),
    FirstStepDone(step=5),
    StepDone(step=6, epoch=1, rows=60, metrics={"train/loss": 0.1 + 0.2}, rows_per_s=1e6 / 3, data_wait_share=0.25),
    EvaluationDone(step=6, epoch=1, rows=9, metrics={"validation/loss": 0.7}, totals={"validation/seen": [[1, 0], [0, 2.5]]}),
    CheckpointSaved(step=6, path="checkpoints/step-00000006.2", best=True),
    StepRefused(step=7, epoch=1, position=70, rows=[3, 1, 2**40], policy="rollback"),
    BadRowsFound(rows=[BadRow("train", 31, "part-00000.parquet", 3, 1, "damaged")]),
    ResizeStarted(num_workers=5),
    DrainNoticed(nodes=("a", "b"), left_s=None, goes_on=False),
    StragglerFound(step=7, rank=1, factor=3.5, lost_s=0.25),
    TaskChanged(step=2, attributes=("counter", "seen")),
    EvaluationGoesOn(epoch=1, batch=3, num_batches=9),
    TrainingEnded(step=7, reason="the loss stands still"),
    RunStopped(reason="failed", message="rank 1 died:\nüber"),
    RunFinished(best_checkpoint=None, metrics={"validation/loss": 0.5}),
    AttemptFailed(cause="lost process", message="rank 1 died", step=6),
    DeliveryStarted(),
]


def step(number: int, **metrics: float) -> StepDone:
    return StepDone(step=number, epoch=0, rows=10 * number, metrics=metrics or {"train/loss": 1.0})


def steps_of(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepDone | CheckpointSaved)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run-1")
    made.path.mkdir()
    return made


# ---------------------------------------------------------------- every kind


def test_there_is_an_example_of_every_kind() -> None:
    assert {type(event) for event in EVERY_KIND} == set(get_args(AnyEvent)) == set(Event.__subclasses__())


def test_every_kind_is_read_back_as_it_was_written(folder: RunFolder) -> None:
    for event in EVERY_KIND:
        append_event(folder, event)
    found, _ = read_events(folder.events)
    assert found == EVERY_KIND
    assert [type(event) for event in found] == [type(event) for event in EVERY_KIND]


# Files of runs hold these names: to change one is to lose the runs there are.
KINDS = (
    "start stage standby first_step step evaluation checkpoint refused bad_rows resize drain straggler task_changed "
    "evaluation_batch ended stop end restart delivering"
)


def test_every_line_names_its_kind_its_version_and_its_time(folder: RunFolder) -> None:
    before_s = time.time()
    events = [event.model_copy(update={"time_s": before_s + number}) for number, event in enumerate(EVERY_KIND)]
    with EventWriter(folder.events, every_s=0) as writer:
        for event in events:
            writer.write(event)
    lines = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [line["kind"] for line in lines] == KINDS.split()
    assert {line["format_version"] for line in lines} == {FORMAT_VERSION}
    assert [line["time_s"] for line in lines] == [before_s + number for number in range(len(events))]


@pytest.mark.parametrize("event", EVERY_KIND, ids=lambda event: event.kind)
def test_the_record_of_an_event_is_plain_json_and_parses_to_an_equal_one(event: Event) -> None:
    assert parse_event(json.loads(json.dumps(as_record(event)))) == event


def test_an_event_is_of_its_time_unless_told_otherwise() -> None:
    before_s = time.time()
    assert before_s <= FirstStepDone(step=1).time_s <= time.time()
    assert FirstStepDone(time_s=7.5, step=1).time_s == 7.5


def test_an_event_cannot_be_changed_or_hold_more_than_its_fields() -> None:
    event = FirstStepDone(step=1)
    with pytest.raises(ValidationError, match="frozen"):
        event.step = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="stepp"):
        FirstStepDone(step=1, stepp=2)  # type: ignore[call-arg]


def test_values_that_are_no_numbers_survive(folder: RunFolder) -> None:
    append_event(folder, step(1, **{"train/loss": math.nan, "train/norm": math.inf, "train/least": -math.inf}))
    (event,), _ = read_events(folder.events)
    assert isinstance(event, StepDone)
    assert math.isnan(event.metrics["train/loss"])
    assert (event.metrics["train/norm"], event.metrics["train/least"]) == (math.inf, -math.inf)


def test_numbers_of_numpy_become_plain_ones_and_what_json_cannot_hold_is_refused_whole(folder: RunFolder) -> None:
    metrics: Any = {"validation/loss": np.float32(0.5)}
    event = EvaluationDone(step=np.int64(3), epoch=0, rows=2, metrics=metrics)
    assert type(event.metrics["validation/loss"]) is float
    assert type(event.step) is int
    append_event(folder, event)
    with pytest.raises(PydanticSerializationError, match="ndarray"):
        append_event(folder, event.model_copy(update={"totals": {"confusion": np.eye(2)}}))
    assert read_events(folder.events)[0] == [event]


# ---------------------------------------------------------------- lines that are none of ours


def refusal_of(folder: RunFolder, line: Any) -> str:
    """What reading a file says whose second line this is."""
    append_event(folder, START)
    offset = folder.events.stat().st_size
    with folder.events.open("a") as file:
        file.write(f"{line if isinstance(line, str) else json.dumps(line)}\n")
    append_event(folder, step(1))
    with pytest.raises(InputError) as caught:
        read_events(folder.events)
    (problem,) = caught.value.problems
    end = offset + len(folder.events.read_bytes()[offset:].partition(b"\n")[0]) + 1
    assert problem.where == f"{folder.events}, the line before byte {end}"
    assert [type(event) for event in read_events(folder.events, 0, 1)[0]] == [AttemptStarted], "the line before is read"
    return f"{problem.found}; {problem.expected}; {problem.fix}"


def test_a_line_of_a_newer_raymill_is_refused_with_what_to_do(folder: RunFolder) -> None:
    said = refusal_of(folder, {**as_record(step(1)), "format_version": FORMAT_VERSION + 1})
    assert said == (
        f"format_version {FORMAT_VERSION + 1}; format_version 1 or 2, which this raymill reads; "
        "It was written by a newer raymill: use that version here too."
    )


@pytest.mark.parametrize("line", [{"kind": "first_step", "step": 1, "time_s": 1.0}, [], 7, None, "text"])
def test_a_line_without_a_version_is_refused_with_what_to_do(folder: RunFolder, line: Any) -> None:
    said = refusal_of(folder, json.dumps(line))
    assert said.startswith("format_version None; format_version 1 or 2, which this raymill reads; ")
    assert said.endswith("older than 0.2, or is damaged: train again with this version.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "moon"}, "'moon'"),
        ({"kind": None}, "kind"),
        ({"step": "many"}, "step.step: Input should be a valid integer"),
        ({"step": None}, "step.step: Input should be a valid integer"),
        ({"moons": 2}, "step.moons: Extra inputs are not permitted"),
        ({"metrics": {"train/loss": "low"}, "rows": 1.5}, "step.rows: "),
    ],
)
def test_a_changed_line_is_refused_with_the_file_the_place_and_the_field(
    folder: RunFolder, changes: dict[str, Any], said: str
) -> None:
    text = refusal_of(folder, {**as_record(step(1)), **changes})
    assert said in text
    assert "an event of raymill" in text
    assert "remove this line, or start a new run" in text


def test_every_fault_of_a_changed_line_is_named() -> None:
    with pytest.raises(InputError, match=r"step\.step: .*; step\.rows: .*; step\.metrics: "):
        parse_event({"format_version": 1, "kind": "step", "epoch": 0})


# ---------------------------------------------------------------- the file


def test_events_come_back_in_order_with_their_time_and_the_offset_goes_on(folder: RunFolder) -> None:
    append_event(folder, START)
    first, offset = read_events(folder.events)
    append_event(folder, step(1))
    then, end = read_events(folder.events, offset)
    assert [type(event) for event in first + then] == [AttemptStarted, StepDone]
    assert first[0].time_s <= then[0].time_s
    assert (end, read_events(folder.events, end)) == (folder.events.stat().st_size, ([], end))


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl", 7) == ([], 7)


def test_the_first_event_of_a_run_makes_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "run-1")
    append_event(folder, START)
    assert read_events(folder.events)[0] == [START]


def test_steps_wait_for_company_and_every_other_event_takes_them_along(folder: RunFolder) -> None:
    with EventWriter(folder.events, every_s=3600) as writer:
        writer.write(step(1))
        for number in (2, 3):
            writer.write(step(number))
        waiting = len(read_events(folder.events)[0])
        writer.write(CheckpointSaved(step=3, path="checkpoints/step-3", best=True))
        assert steps_of(read_events(folder.events)[0]) == [1, 2, 3, 3]
    assert waiting < 3


def test_flush_and_close_write_what_waits(folder: RunFolder) -> None:
    writer = EventWriter(folder.events, every_s=3600)
    for number in range(3):
        writer.write(step(number))
    writer.flush()
    assert len(read_events(folder.events)[0]) == 3
    writer.write(step(3))
    writer.close()
    assert len(read_events(folder.events)[0]) == 4


def test_a_torn_last_line_waits_and_the_next_append_loses_only_it(folder: RunFolder) -> None:
    append_event(folder, step(1))
    whole = folder.events.stat().st_size
    with folder.events.open("a") as file:
        file.write('{"format_version":1,"kind":"step","st')
    events, offset = read_events(folder.events)
    assert (len(events), offset) == (1, whole)
    append_event(folder, step(2))
    events, offset = read_events(folder.events, offset)
    assert steps_of(events) == [2]
    assert offset == folder.events.stat().st_size


def test_a_limit_ends_at_a_line_and_the_rest_follows(folder: RunFolder) -> None:
    for number in range(5):
        append_event(folder, step(number))
    first, offset = read_events(folder.events, 0, 3)
    rest, _ = read_events(folder.events, offset, 3)
    assert (len(first), len(rest)) == (3, 2)
    assert steps_of(first + rest) == [0, 1, 2, 3, 4]


def test_lines_of_several_writers_and_threads_never_mix(folder: RunFolder) -> None:
    def write(writer: EventWriter, first: int) -> None:
        for number in range(first, first + 200):
            writer.write(step(number, **{"a" * 500: 1.0}))

    with EventWriter(folder.events, every_s=0.001) as one, EventWriter(folder.events, every_s=0.0) as other:
        jobs = [(one, 0), (one, 1000), (other, 2000)]
        threads = [threading.Thread(target=write, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    steps = sorted(steps_of(read_events(folder.events)[0]))
    assert steps == [*range(200), *range(1000, 1200), *range(2000, 2200)]


def test_signs_of_life_are_written_only_where_nothing_was_of_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("raymill.record.events.time.monotonic", lambda: now[0])
    with EventWriter(tmp_path / "events.jsonl") as writer:
        for number, moment in enumerate((100.0, 100.1, 100.2, 100.3, 100.6)):
            now[0] = moment
            writer.write(EvaluationGoesOn(epoch=0, batch=number, num_batches=5))
    assert [getattr(event, "batch", None) for event in read_events(tmp_path / "events.jsonl")[0]] == [0, 3, 4]
