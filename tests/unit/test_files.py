"""Small files are there whole or not at all, records name their version, and no two processes hold a lock at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raymill.errors import InputError, RunError
from raymill.files import FORMAT_VERSION, STAGE, read_record, replace_file, run_lock, waiting_lock, write_record

# ---------------------------------------------------------------- small files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "attempt"
    replace_file(path, "1")
    replace_file(path, "22")
    assert path.read_text() == "22"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_could_not_be_replaced_has_its_old_content(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "attempt"
    replace_file(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert all(left.name.startswith(STAGE) for left in tmp_path.iterdir() if left != path)


# ---------------------------------------------------------------- records


def test_a_record_comes_back_as_it_was_and_says_its_version_in_the_file(tmp_path: Path) -> None:
    values = {"name": "digits", "parts": [1, 2.5, None], "deep": {"flag": True}}
    write_record(tmp_path / "spec.json", values)
    assert read_record(tmp_path / "spec.json") == values
    assert json.loads((tmp_path / "spec.json").read_text()) == {"format_version": FORMAT_VERSION, **values}


NEWER, OLDER = "It was written by a newer raymill", "It was written by a raymill older than 0.2, or is damaged"


@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        ({"format_version": FORMAT_VERSION + 1, "name": "digits"}, f"format_version {FORMAT_VERSION + 1}", NEWER),
        ({"format_version": 0, "name": "digits"}, "format_version 0", OLDER),
        ({"format_version": "1", "name": "digits"}, "format_version '1'", OLDER),
        ({"name": "digits"}, "format_version None", OLDER),
        ([1, 2], "format_version None", OLDER),
    ],
)
def test_a_record_of_another_version_is_refused_with_what_to_do(content: Any, found: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_record(path)
    (problem,) = caught.value.problems
    assert (problem.where, problem.found) == (str(path), found)
    assert problem.expected == "format_version 1 or 2, which this raymill reads"
    assert problem.fix.startswith(fix)


def test_a_record_that_is_not_there_or_no_json_is_told_apart_from_one_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "spec.json")
    (tmp_path / "spec.json").write_text('{"format_version": 1, "na')
    with pytest.raises(ValueError, match="Unterminated"):
        read_record(tmp_path / "spec.json")


# ---------------------------------------------------------------- locks

HOLDS = """
import sys, threading
from pathlib import Path
from raymill.files import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    threading.Event().wait()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_lock_held_by_another_process_is_refused_with_its_number_each_time(tmp_path: Path) -> None:
    path = tmp_path / "run-1" / "driver.lock"
    path.parent.mkdir()
    with holder(path) as process:
        for _ in range(2):
            with pytest.raises(RunError, match=f"run run-1 is being trained by process {process.pid};"), run_lock(path):
                pass


def test_a_lock_is_free_again_once_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    with holder(path) as process:
        process.kill()
        process.wait()
        with run_lock(path):
            assert path.read_text() == str(os.getpid())


def test_a_lock_is_free_again_after_its_block_also_when_that_raised(tmp_path: Path) -> None:
    path = tmp_path / "driver.lock"
    with pytest.raises(ZeroDivisionError), run_lock(path):
        raise ZeroDivisionError
    with run_lock(path), pytest.raises(RunError, match=f"process {os.getpid()}"), run_lock(path):
        pass
    with run_lock(path):
        pass


def test_a_waiting_lock_waits_until_the_other_process_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "delivery.lock"
    entered = threading.Event()

    def wait_for_it() -> None:
        with waiting_lock(path):
            entered.set()

    with holder(path) as process:
        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        assert not entered.wait(0.3)
        process.kill()
        assert entered.wait(30)
        waiter.join()
