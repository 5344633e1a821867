"""Attempt after attempt: what is tried again, what is shown of it, and where a run stands in between."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raymill.checkpoint import snapshot
from raymill.checkpoint.commit import commit
from raymill.checkpoint.snapshot import Snapshot
from raymill.config.spec import JobSpec
from raymill.errors import Interrupted, RaymillError, RunError, StallError, WorkerError
from raymill.orchestration import executors, retry
from raymill.orchestration.attempts import committed_step, run_attempts, stop_on_signal
from raymill.orchestration.retry import Cause
from raymill.record.events import AttemptFailed, Event, StepDone, append_event, read_events
from raymill.record.folder import RunFolder

LOST = WorkerError("rank 1 died", 1, cause=Cause.LOST_PROCESS)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run-1")
    made.path.mkdir()
    return made


def save(folder: RunFolder, step: int) -> None:
    taken = Snapshot({"weight": torch.zeros(1)}, {}, {"step": step, "position": 10 * step})
    commit(folder.checkpoints, 1, 10, snapshot.content(taken, best=False), best=False)


class Attempts:
    """Attempts that end as told: with an error, or None for a run that is finished; before, a number saves that step, an event is
    reported."""

    def __init__(self, folder: RunFolder, *ends: RaymillError | Event | int | None, **retry: int) -> None:
        self.folder, self.ends = folder, iter(ends)
        self.count = 0
        self.shown: list[Event] = []
        values = {"name": "job", "task": "-", "pipeline": "-", "optimizer": {"kind": "SGD"}, "retry": retry}
        self.spec = JobSpec.model_validate(values)

    def attempt(self) -> RaymillError | None:
        self.count += 1
        for end in self.ends:
            if isinstance(end, int):
                save(self.folder, end)
            elif isinstance(end, Event):
                append_event(self.folder, end)
            else:
                return end
        raise AssertionError("one attempt more than was to be")

    def run(self) -> None:
        run_attempts(self.folder, self.spec, self.attempt, self.shown.append)


# ---------------------------------------------------------------- again or not


def test_a_run_goes_on_until_it_is_finished_and_shows_each_failure(folder: RunFolder) -> None:
    attempts = Attempts(folder, LOST, 7, StallError("nobody moved"), None)
    attempts.run()
    assert attempts.count == 3
    found = [(event.cause, event.message, event.step) for event in attempts.shown if isinstance(event, AttemptFailed)]
    assert found == [("lost process", "rank 1 died", 0), ("stall", "nobody moved", 7)]
    assert len(attempts.shown) == 2


def test_a_failure_says_where_this_attempt_died_and_where_the_next_goes_on(folder: RunFolder) -> None:
    def died_after(step: int) -> StepDone:
        return StepDone(step=step, epoch=0, rows=step, metrics={})

    append_event(folder, died_after(99))  # of a command before
    attempts = Attempts(folder, died_after(8), 7, died_after(12), LOST, LOST, died_after(9), LOST, None)
    attempts.run()
    found = [(event.last_step, event.step) for event in attempts.shown if isinstance(event, AttemptFailed)]
    assert found == [(12, 7), (None, 7), (9, 7)]


def test_a_spent_budget_ends_the_run_with_the_last_cause(folder: RunFolder) -> None:
    attempts = Attempts(folder, 3, LOST, LOST, WorkerError("rank 2 died", 2, cause=Cause.LOST_PROCESS), lost_processes=2)
    with pytest.raises(WorkerError, match="rank 2 died"):
        attempts.run()
    assert (attempts.count, len(attempts.shown)) == (3, 2)


def test_a_newer_checkpoint_makes_the_budget_whole(folder: RunFolder) -> None:
    attempts = Attempts(folder, 3, LOST, 4, LOST, 5, LOST, None, lost_processes=1)
    attempts.run()
    assert attempts.count == 4


def test_what_would_only_fail_again_is_not_tried_again(folder: RunFolder) -> None:
    attempts = Attempts(folder, RunError("the task raised"))
    with pytest.raises(RunError, match="the task raised"):
        attempts.run()
    assert (attempts.count, attempts.shown) == (1, [])


def test_a_run_that_is_asked_to_stop_in_a_pause_can_be_gone_on_with(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 1e9)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 1e9)
    attempts = Attempts(folder, 3, LOST, LOST)
    threading.Timer(0.3, folder.stop_request.touch).start()
    with pytest.raises(Interrupted) as stopped:
        attempts.run()
    assert (attempts.count, stopped.value.step) == (2, 3)
    assert read_events(folder.events)[0][-1].kind == "stop"


def test_a_run_that_was_asked_to_stop_and_died_is_not_started_again_but_can_be_gone_on_with(folder: RunFolder) -> None:
    folder.stop_request.touch()
    attempts = Attempts(folder, 3, LOST)
    with pytest.raises(Interrupted) as stopped:
        attempts.run()
    assert (attempts.count, stopped.value.step) == (1, 3)


def test_a_run_that_was_asked_to_stop_and_failed_has_failed(folder: RunFolder) -> None:
    folder.stop_request.touch()
    with pytest.raises(RunError, match="the task raised"):
        Attempts(folder, RunError("the task raised")).run()


def test_an_interruption_passes_through_as_it_is(folder: RunFolder) -> None:
    def stop() -> None:
        raise Interrupted("run-1", 7)

    with pytest.raises(Interrupted):
        run_attempts(folder, Attempts(folder).spec, stop, print)


# ---------------------------------------------------------------- where it stands


def test_the_committed_step_is_that_of_the_newest_checkpoint_pointed_at(folder: RunFolder) -> None:
    assert committed_step(folder) == 0
    save(folder, 7)
    save(folder, 9)
    assert committed_step(folder) == 9
    (folder.checkpoints / "step-00000009.1" / "state.json").write_text("{")
    assert committed_step(folder) == 0


# ---------------------------------------------------------------- stopping


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_workers_to_stop(folder: RunFolder, number: signal.Signals) -> None:
    with stop_on_signal(folder):
        assert not folder.stop_request.exists()
        os.kill(os.getpid(), number)
        assert folder.stop_request.exists()


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_stops_at_once_and_says_what_is_saved(folder: RunFolder) -> None:
    save(folder, 7)
    with stop_on_signal(folder):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert (caught.value.run_id, caught.value.step) == ("run-1", 7)


@pytest.mark.usefixtures("handlers")
def test_a_second_sigterm_still_lets_the_workers_save(folder: RunFolder) -> None:
    with stop_on_signal(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert folder.stop_request.exists()


# ---------------------------------------------------------------- who executes


@pytest.mark.parametrize(
    ("this_process", "cluster", "expected"),
    [
        (True, None, executors.IN_PROCESS),
        (True, "10.0.0.1:6379", executors.IN_PROCESS),
        (False, None, executors.SUPERVISED),
        (False, "local", executors.SUPERVISED),
        (False, "10.0.0.1:6379", executors.CLUSTER),
    ],
)
def test_a_run_is_executed_here_if_asked_else_on_the_cluster_that_is_named_else_supervised(
    this_process: bool, cluster: str | None, expected: executors.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster)
    assert executors.choose(this_process=this_process) is expected
    assert expected.only_one_worker is this_process
