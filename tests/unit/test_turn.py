"""A driver that stands by: its workers wait until its turn comes, and never train where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymill import errors
from raymill.errors import RunError
from raymill.files import read_record, run_lock
from raymill.orchestration.on_ray import driver
from raymill.orchestration.on_ray.driver_process import MEMORY_FACTOR, PAYS_S, Outlook, decide_standby
from raymill.orchestration.on_ray.session_folder import VARIABLE
from raymill.orchestration.on_ray.turn import STAND_BY, Turn, give_turn, has_come, wait_at_gate
from raymill.record.folder import RunFolder

PATIENCE_S = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run-1")
    made.path.mkdir()
    return made


@pytest.fixture
def session(tmp_path: Path) -> Path:
    made = tmp_path / "session"
    made.mkdir()
    return made


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Where a driver hears of its turn, and where its supervisor says so."""
    heard, said = os.pipe()
    yield heard, said
    for end in (heard, said):
        try:
            os.close(end)
        except OSError:
            continue


class Worker(threading.Thread):
    """Waits at the gate; an open file of its own, as a process of its own would have."""

    def __init__(self, session: Path) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.let_in: bool | None = None
        self.start()

    def run(self) -> None:
        self.let_in = wait_at_gate(self.session)

    def outcome(self) -> bool | None:
        self.join(PATIENCE_S)
        return self.let_in


def is_held(folder: RunFolder) -> bool:
    """Whether another process would find the run taken."""
    program = "import sys; from pathlib import Path; from raymill.files import run_lock\nwith run_lock(Path(sys.argv[1])): pass"
    done = subprocess.run([sys.executable, "-c", program, folder.driver_lock], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "is being trained by process" in done.stderr, done.stderr
    return done.returncode != 0


def test_a_driver_that_does_not_stand_by_has_its_turn_at_once_and_holds_the_run(folder: RunFolder, session: Path) -> None:
    with Turn(folder, session, [str(folder.path)]) as turn:
        assert turn.has_come
        assert has_come(session)
        assert Worker(session).outcome() is True
        assert is_held(folder)
    assert not is_held(folder)


def test_workers_wait_until_their_driver_has_its_turn(folder: RunFolder, session: Path, pipe: tuple[int, int]) -> None:
    heard, said = pipe
    with Turn(folder, session, [str(folder.path), STAND_BY, str(heard)]) as turn:
        workers = [Worker(session), Worker(session)]
        assert (turn.has_come, has_come(session), is_held(folder)) == (False, False, False)
        assert [worker.let_in for worker in workers] == [None, None]
        give_turn(said, folder)
        assert [worker.outcome() for worker in workers] == [True, True]
        assert (turn.has_come, has_come(session), is_held(folder)) == (True, True, True)
    assert not is_held(folder)


def test_a_driver_may_be_told_its_run_when_its_turn_comes(folder: RunFolder, session: Path, pipe: tuple[int, int]) -> None:
    heard, said = pipe
    with Turn(None, session, [STAND_BY, str(heard)]) as turn:
        with pytest.raises(RunError, match="without a turn"):
            _ = turn.known_folder
        assert not turn.is_decided.is_set()
        give_turn(said, folder)
        assert turn.is_decided.wait(PATIENCE_S)
        assert (turn.known_folder, turn.has_come, is_held(folder)) == (folder, True, True)


def test_workers_do_not_train_when_the_supervisor_died_before_their_turn(
    folder: RunFolder, session: Path, pipe: tuple[int, int]
) -> None:
    heard, said = pipe
    with Turn(folder, session, [str(folder.path), STAND_BY, str(heard)]) as turn:
        worker = Worker(session)
        os.close(said)
        assert worker.outcome() is False
        assert (turn.has_come, is_held(folder)) == (False, False)


def test_a_turn_is_refused_while_another_process_drives_the_run(folder: RunFolder, session: Path, pipe: tuple[int, int]) -> None:
    heard, said = pipe
    with run_lock(folder.driver_lock), Turn(folder, session, [str(folder.path), STAND_BY, str(heard)]) as turn:
        give_turn(said, folder)
        assert Worker(session).outcome() is False
        assert not turn.has_come
        assert isinstance(turn.refused, RunError)
        assert f"process {os.getpid()}" in str(turn.refused)


def test_a_driver_says_so_when_another_process_drives_the_run(
    folder: RunFolder, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(session))
    monkeypatch.setattr(driver, "_stop_on_sigterm", lambda turn: None)
    with run_lock(folder.driver_lock):
        assert driver.main([str(folder.path)]) == driver.FAILED
    said = errors.from_record(read_record(folder.failure))
    assert isinstance(said, RunError)
    assert f"is being trained by process {os.getpid()}" in str(said)


# ---------------------------------------------------------------- whether one stands by

LONG, SHORT = PAYS_S + 1, PAYS_S - 1


@pytest.mark.parametrize(
    ("wanted", "may_go_on", "left_s", "free_bytes", "expected", "why"),
    [
        (None, True, LONG, 2**31, True, "the run has 301 s to go"),
        (None, True, SHORT, 2**31, False, "over in 299 s"),
        (True, True, SHORT, 2**31, True, "retry.standby: true"),
        (True, True, LONG, MEMORY_FACTOR * 2**30 - 1, False, "2.0 GiB of memory are free; below 2.0 GiB"),
        (None, True, LONG, MEMORY_FACTOR * 2**30, True, "to go"),
        (True, False, LONG, 2**31, False, "no budget"),
        (False, True, LONG, 2**31, False, "retry.standby: false"),
    ],
)
def test_a_driver_stands_by_where_that_is_worth_its_cost(
    wanted: bool | None, may_go_on: bool, left_s: float, free_bytes: int, expected: bool, why: str
) -> None:
    outlook = Outlook(wanted=wanted, may_go_on=may_go_on, left_s=left_s, taken_bytes=2**30, free_bytes=free_bytes)
    decision, reason = decide_standby(outlook)
    assert decision is expected
    assert why in reason
