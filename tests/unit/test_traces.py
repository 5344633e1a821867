"""An error is told from the lines of the job's own code, wherever it happened and wherever it is told."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from raymill import errors
from raymill.errors import DataError, InputError, NumberError, Problem, WorkerError
from raymill.own_code.seams import LOSS, READ, calling, problem
from raymill.own_code.traces import describe, for_a_journey, is_own, noting, own_frames, row_ids, tell

HERE = "tests/unit/test_traces.py"


def deeper(value: str) -> int:
    return int(value)


def caught(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_own_frames_come_with_their_source_and_the_others_are_counted() -> None:
    lines = tell(caught(lambda: json.loads("{", object_hook=deeper))).splitlines()
    assert lines[0].startswith("JSONDecodeError: Expecting property name")
    assert re.fullmatch(rf"  {HERE}:\d+, in caught", lines[1])
    assert lines[2] == "    call()"
    assert lines[-2] == "  raised by Python, in raw_decode"
    assert lines[-1] == "  (3 frames of Python left out)"


def test_the_error_that_an_error_came_from_is_told_where_only_that_came_through_own_code() -> None:
    def read() -> None:
        try:
            deeper("x")
        except ValueError as error:
            raise DataError("item 3 cannot be read") from error

    error = caught(read)
    error.__traceback__ = None
    told = tell(error)
    assert told.startswith("DataError: item 3 cannot be read\nIt came from ValueError: invalid literal")
    assert f"  {HERE}:22, in deeper\n    return int(value)" in told


def test_what_is_of_libraries_is_not_the_jobs_own() -> None:
    assert is_own(__file__)
    assert not any(map(is_own, (json.__file__, errors.__file__, pytest.__file__, "<string>", "<frozen runpy>")))


def test_a_syntax_error_is_at_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("x = 1\ny = (\n")
    error = caught(lambda: compile(file.read_text(), str(file), "exec"))
    (*_, frame) = own_frames(error)
    assert (frame.filename, frame.lineno, (frame.line or "").strip()) == (str(file), 2, "y = (")


def in_the_loss(step: int) -> None:
    with noting(lambda: f"rank 1, step {step}, rows 3, 4"), calling(LOSS, {"x": 1}):
        deeper("x")


def test_an_error_of_own_code_is_text_that_survives_a_journey_and_a_record() -> None:
    class Local(Exception):
        """Cannot be pickled."""

    def fail() -> None:
        with noting(lambda: "rank 1, step 5"):
            raise Local("oh")

    sent = for_a_journey(caught(fail), "rank 1", 1)
    assert isinstance(sent, WorkerError)
    assert (sent.rank, sent.cause) == (1, "code")
    there = pickle.loads(pickle.dumps(sent))
    recorded = errors.from_record(json.loads(json.dumps(errors.as_record(there))))
    for error in (sent, there, recorded):
        assert str(error).startswith("rank 1 failed: Local: oh\n")
        assert 'raise Local("oh")' in str(error)
        assert str(error).endswith("\nrank 1, step 5")


def test_what_is_not_of_own_code_travels_as_it_is() -> None:
    for error in (NumberError("nan"), InputError([Problem("a", "b", "c", "d")]), RuntimeError("no frames")):
        assert for_a_journey(error, "rank 0") is error


def test_notes_of_an_error_survive_a_record() -> None:
    error = InputError([Problem("a", "b", "c", "d")])
    error.add_note("rank 1, step 5")
    there = errors.from_record(json.loads(json.dumps(errors.as_record(error))))
    assert there.__notes__ == ["rank 1, step 5"]
    assert isinstance(there, InputError)


def test_a_record_without_notes_is_read() -> None:
    assert str(errors.from_record({"kind": "DataError", "args": ["gone"]})) == "gone"


def test_a_note_is_given_once_and_not_to_an_error_that_says_itself_where_it_was() -> None:
    error = caught(lambda: in_the_loss(5))
    first, second = error.__notes__
    assert first.startswith("expected: loss(model, batch) to give the mean loss")
    assert first.endswith("it was given x a int. Correct the loss, or what makes the batch.")
    assert second == "rank 1, step 5, rows 3, 4"

    def unreadable() -> None:
        with noting(lambda: "rank 1"), calling(READ):
            raise DataError("row 3 is null")

    assert not hasattr(caught(unreadable), "__notes__")


def test_a_problem_knows_the_line_what_was_called_and_what_to_do() -> None:
    found = problem(READ, caught(lambda: in_the_loss(5)))
    assert found.where == f"{HERE}:22 in deeper: return int(value)"
    assert found.found == "ValueError: invalid literal for int() with base 10: 'x'"
    assert found.expected.startswith("loss(model, batch) to give the mean loss"), "the innermost call is what was expected of"
    assert found.fix == LOSS.fix


def test_many_row_ids_are_counted() -> None:
    assert row_ids(range(3)) == "0, 1, 2"
    assert row_ids(range(25)).endswith("18, 19 and 5 more")


def test_a_batch_is_described_without_its_values() -> None:
    assert describe({"a": [b"secret"], "b": None}) == "a list [1] of a bytes, b None"
